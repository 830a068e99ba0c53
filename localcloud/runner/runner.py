"""The pod runner: real processes for the pods of some nodes of a local cluster, against its real API server.

It needs root and iproute2. `kubectl exec` does not work; `kubectl logs` does with `kubelet_port` (see `kubelet.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.settings import SettingsError
from localcloud.api import Api, ApiError
from localcloud.runner.images import Images
from localcloud.runner.kubelet import Kubelet
from localcloud.runner.network import Network
from localcloud.runner.node import ANNOTATION, LEASE_SECONDS, address, is_ready, keep_ready
from localcloud.runner.pod import PodRun, Surroundings

POLL_SECONDS = 0.5
PULLS = 2  # images fetched at a time
BACKOFF_SECONDS = 10.0  # the kubelet's first; then twice as long each time, up to 5 minutes
REFRESH_SECONDS = 30.0  # volumes from ConfigMaps, Secrets and tokens; a kubelet takes about a minute
PROGRAMS = ("ip", "nsenter", "sleep")
Dress = Callable[[dict[str, Any]], dict[str, Any]]
log = logging.getLogger(__name__)


def problems() -> list[str]:
    """Why no runner can work here, a line each; none where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    lines = [f"the pod runner needs {', '.join(absent)}: install util-linux and iproute2"] if absent else []
    if os.geteuid() != 0:
        lines.append("the pod runner makes namespaces, mounts and interfaces: run it as root")
    elif "overlay" not in Path("/proc/filesystems").read_text():
        lines.append("the pod runner mounts images with overlayfs, which this kernel does not offer: modprobe overlay")
    return lines


class Runner:
    """A context manager: while it is entered, pods of its nodes run, and these nodes are Ready.

    Its nodes are those in `node_names`, or, without that, those annotated `drydock.local/runner: "true"`, as they come
    and go. `folder` gets the logs (`pods/`, kept), the nodes' own disks (`nodes/`, which last as long as their nodes; a
    hostPath is there) and what running pods need (`run/`). `service_host` and `service_port` are what pods find in
    KUBERNETES_SERVICE_HOST and _PORT; `dress` changes a pod before it runs, as a webhook would; `nameserver` is for
    their /etc/resolv.conf: without one, Services' names are in /etc/hosts. With `kubelet_port` a kubelet's server
    listens there, and the nodes' addresses are on `lo`: for a network namespace of the cluster's own. When it is left
    or killed, all processes are killed; a pod whose processes are gone is reported so when the next runner finds it.
    Raises `SettingsError` where it cannot work (`problems`), or the folder is in use.
    """

    def __init__(
        self,
        api: Api,
        images: Images,
        folder: Path,
        *,
        node_names: Collection[str] | None = None,
        service_host: str = "",
        service_port: int = 443,
        nameserver: str = "",
        network: Network | None = None,
        dress: Dress | None = None,
        kubelet_port: int | None = None,
        backoff_seconds: float = BACKOFF_SECONDS,
        refresh_seconds: float = REFRESH_SECONDS,
    ) -> None:
        self._api, self._folder, self._names = api, folder.resolve(), node_names
        self._network, self._dress = network or Network(), dress or (lambda pod: pod)
        self._kubelet = None if kubelet_port is None else Kubelet(api, self._folder, kubelet_port)
        self._pulls = ThreadPoolExecutor(PULLS, thread_name_prefix="image")
        port = str(service_port)
        where = {"KUBERNETES_SERVICE_HOST": service_host, "KUBERNETES_SERVICE_PORT": port,
                 "KUBERNETES_SERVICE_PORT_HTTPS": port}  # fmt: skip
        self._around = Surroundings(
            api, images, self._pulls, self._network, self._folder, where if service_host else {}, nameserver,
            backoff_seconds, refresh_seconds,
        )  # fmt: skip
        self._runs: dict[str, PodRun] = {}
        self._nodes: dict[str, dict[str, Any]] = {}
        self._leases_at = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="runner", daemon=True)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Runner:
        if found := problems():
            raise SettingsError(found)
        (self._folder / "run").mkdir(parents=True, exist_ok=True)
        (self._folder / "run").chmod(0o700)  # Secrets are in there
        with contextlib.ExitStack() as opened:
            lock = opened.enter_context((self._folder / "lock").open("a+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SettingsError([f"{self._folder}: another runner uses it: end that one"]) from None
            opened.enter_context(self._network)
            if self._kubelet is not None:
                opened.enter_context(self._kubelet)
            self._thread.start()
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        for run in self._runs.values():
            run.close()
        for run in self._runs.values():
            run.join()
        self._pulls.shutdown(wait=False, cancel_futures=True)
        self._open.close()

    def _watch(self) -> None:
        swept = False
        while not self._closing.is_set():
            try:
                self._see_nodes()
                pods = self._see_pods()
                if not swept:
                    self._sweep(pods)
                    swept = True
            except (ApiError, OSError) as error:  # the server is away: what runs goes on
                log.warning("runner: %s", error)
            except Exception:
                log.exception("runner")
            self._closing.wait(POLL_SECONDS)

    def _see_nodes(self) -> None:
        nodes = {node["metadata"]["name"]: node for node in self._api.list("/api/v1/nodes", resourceVersion="0")}
        ours = {name: node for name, node in nodes.items() if self._ours(node)}
        for name in self._nodes.keys() - ours.keys():
            self._lose(name, disk_too=name not in nodes)
        self._nodes = ours
        port = 0
        if self._kubelet is not None:
            self._kubelet.hold(filter(None, map(address, ours.values())))
            port = self._kubelet.port
        due = time.monotonic() > self._leases_at
        for node in ours.values():
            if due or not is_ready(node, port):
                keep_ready(self._api, node, port)
        if due:
            self._leases_at = time.monotonic() + LEASE_SECONDS / 4

    def _lose(self, name: str, *, disk_too: bool) -> None:
        """A machine that is switched off: what ran there is gone at once, and nobody reports it."""
        lost = [run for run in self._runs.values() if run.node == name]
        for run in lost:
            run.close()
        for run in lost:
            run.join()
            del self._runs[run.uid]
        if disk_too:
            shutil.rmtree(self._folder / "nodes" / name, ignore_errors=True)

    def _ours(self, node: dict[str, Any]) -> bool:
        metadata = node["metadata"]
        if self._names is not None:
            return metadata["name"] in self._names
        return (metadata.get("annotations") or {}).get(ANNOTATION) == "true"

    def _see_pods(self) -> set[str]:
        """Start, tell and end the pods' threads; the UIDs of all pods of our nodes."""
        # From the server's cache: cheap, and never older than what it answered before on the same connection.
        found = {pod["metadata"]["uid"]: pod for pod in self._api.list("/api/v1/pods", resourceVersion="0")}
        for uid, pod in found.items():
            if uid in self._runs:
                self._runs[uid].see(pod)
            elif node := self._nodes.get(pod["spec"].get("nodeName", "")):
                self._runs[uid] = PodRun(self._dress(pod), node, self._around)
                self._runs[uid].start()
        for uid, run in list(self._runs.items()):
            if uid not in found:
                if run.is_alive():
                    run.vanish()
                else:
                    del self._runs[uid]
        return {uid for uid, pod in found.items() if pod["spec"].get("nodeName") in self._nodes}

    def _sweep(self, known: set[str]) -> None:
        """What earlier runners have left of pods that are gone meanwhile."""
        for path in (self._folder / "run").glob("*"):
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
