"""One pod: what is to be done next about it, seen from what it should be and what its containers do."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localcloud.api import Api, ApiError
from localcloud.pods import pod_path
from localcloud.runner import node as nodes
from localcloud.runner.container import Container
from localcloud.runner.environment import command, environment, expand, services
from localcloud.runner.events import Events, now
from localcloud.runner.fields import ConfigError
from localcloud.runner.identity import dropped_capabilities, identity
from localcloud.runner.images import Image, ImageMissing, Images
from localcloud.runner.logs import log_file
from localcloud.runner.network import Network, NetworkError
from localcloud.runner.objects import Objects
from localcloud.runner.process import Namespaced, StartError
from localcloud.runner.status import Place, Seen, adopted, changed, done, restarts, status_of
from localcloud.runner.volumes import Volumes

TICK_SECONDS = 0.1
RETRY_SECONDS = 2.0  # after what only the cluster can mend: a ConfigMap that is not there yet
OVER = ("Succeeded", "Failed")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What all pods of a runner share."""

    api: Api
    images: Images
    pulls: ThreadPoolExecutor
    network: Network
    folder: Path
    variables: Mapping[str, str]  # in every container: where the API server is
    nameserver: str  # for /etc/resolv.conf; empty: Services by /etc/hosts alone
    backoff_seconds: float
    refresh_seconds: float


class PodRun(threading.Thread):
    """Runs one pod until it is gone from the API server; ends then. `close` ends it at once.

    All processes are children of this thread and die with it.
    """

    def __init__(self, pod: dict[str, Any], node: dict[str, Any], around: Surroundings) -> None:
        super().__init__(name=f"{pod['metadata']['namespace']}/{pod['metadata']['name']}", daemon=True)
        self._pod, self._node, self._around = pod, node, around
        self.uid: str = pod["metadata"]["uid"]
        self.node: str = node["metadata"]["name"]
        self._folder = around.folder / "run" / self.uid
        self._events = Events(around.api, pod)
        self._objects = Objects(around.api, pod)
        host = around.folder / "nodes" / node["metadata"]["name"]
        self._volumes = Volumes(pod, self._folder, host, self._objects, node)
        self._woken = threading.Event()
        self._gone = self._closing = False
        self._ending = False  # nothing is started any more
        self._over = pod.get("status", {}).get("phase") in OVER
        self._place = Place(pod.get("status", {}).get("startTime") or now(), "", nodes.address(node))
        self._host_network = bool(pod["spec"].get("hostNetwork"))
        self._sandbox: Namespaced | None = None
        self._sandbox_after = 0.0
        self._refresh_at = 0.0
        seen = adopted(pod)
        inits, mains = pod["spec"].get("initContainers", []), pod["spec"]["containers"]
        first = "PodInitializing" if inits else "ContainerCreating"
        for item in mains:
            if "waiting" in seen[item["name"]].state and not seen[item["name"]].last:
                seen[item["name"]].state = {"waiting": {"reason": first}}
        self._inits = [Container(item, True, seen[item["name"]], self._events, self._woken.set) for item in inits]
        self._mains = [Container(item, False, seen[item["name"]], self._events, self._woken.set) for item in mains]

    def see(self, pod: dict[str, Any]) -> None:
        """The pod as the API server has it now; what its containers are was settled when it began."""
        if int(pod["metadata"]["resourceVersion"]) > int(self._pod["metadata"]["resourceVersion"]):
            self._pod = {**pod, "spec": self._pod["spec"]}
            self._woken.set()

    def vanish(self) -> None:
        """The API server has it no more: end it within its grace."""
        self._gone = True
        self._woken.set()

    def close(self) -> None:
        """Kill everything and end; nothing is reported."""
        self._closing = True
        self._woken.set()

    def run(self) -> None:
        try:
            while not self._closing:
                try:
                    if self._step():
                        break
                except (ApiError, OSError) as error:  # the server is away, or says no: all is seen anew
                    log.warning("%s: %s", self.name, error)
                    self._woken.wait(1.0)
                except Exception:
                    log.exception("%s", self.name)
                    self._woken.wait(1.0)
                self._woken.wait(TICK_SECONDS)
                self._woken.clear()
        finally:
            self._drop()

    @property
    def _all(self) -> list[Container]:
        return [*self._inits, *self._mains]

    def _seen(self) -> dict[str, Seen]:
        return {container.name: container.seen for container in self._all}

    def _step(self) -> bool:
        """Whether there is nothing left to do, ever."""
        pod = self._pod
        deleted = self._gone or "deletionTimestamp" in pod["metadata"]
        for container in self._all:
            if container.reap():
                shutil.rmtree(self._folder / "layers" / container.name, ignore_errors=True)
        if deleted or self._ending or self._over or self._work_done(pod["spec"]["restartPolicy"]):
            self._ending = True
            if not self._over:
                self._stop_all(self._grace(deleted))
                self._over = not any(container.process for container in self._all)
        else:
            self._go_on(pod)
        if self._over:
            self._drop()
        if not self._gone:
            self._publish()
        if self._over and deleted:
            self._remove()
            return True
        return False

    def _grace(self, deleted: bool) -> float:
        given = self._pod["metadata"].get("deletionGracePeriodSeconds") if deleted else None
        return float(self._pod["spec"].get("terminationGracePeriodSeconds", 30) if given is None else given)

    def _stop_all(self, seconds: float) -> None:
        """The containers at once; a sidecar after them and after those that started later than it."""
        order = [*self._mains, *reversed(self._inits)]
        for index, container in enumerate(order):
            earlier = order[:index] if container.sidecar else []

            def later(earlier: list[Container] = earlier) -> bool:
                return any(other.running for other in earlier)

            container.stop(seconds, later)

    def _policy(self, container: Container, policy: str) -> str:
        if container.sidecar:
            return "Always"
        return "OnFailure" if container.init and policy == "Always" else policy

    def _finished(self, container: Container, policy: str) -> bool:
        code = container.seen.exit_code
        return code is not None and not restarts(self._policy(container, policy), code)

    def _work_done(self, policy: str) -> bool:
        failed = [item for item in self._inits if item.init and item.seen.exit_code and self._finished(item, policy)]
        return bool(failed) or all(self._finished(item, policy) for item in self._mains)

    def _go_on(self, pod: dict[str, Any]) -> None:
        if self._sandbox is not None and self._sandbox.ended() is not None:
            log.warning("%s: its sandbox was killed", self.name)
            self._leave_sandbox()
        if self._sandbox is None and not self._make_sandbox():
            return
        if time.monotonic() > self._refresh_at:
            self._refresh()
        for container in self._inits:
            self._tend(container, pod)
            again = container.sidecar and any(item.starts for item in self._mains)
            if not again and not done(container.spec, container.seen):
                return  # those after it wait; a sidecar that starts another time holds nobody up
        for container in self._mains:
            self._tend(container, pod)

    def _make_sandbox(self) -> bool:
        """The pod's volumes, namespaces and address."""
        if time.monotonic() < self._sandbox_after:
            return False
        self._sandbox_after = time.monotonic() + RETRY_SECONDS
        try:
            memory = self._volumes.prepare()
        except (ConfigError, ApiError) as error:
            self._events.say("FailedMount", f"MountVolume.SetUp failed: {error}", warning=True)
            return False
        spec = {"hostname": self._hostname(), "tmpfs": memory, "network": not self._host_network}
        try:
            self._sandbox = Namespaced("sandbox", spec, self._folder / "sandbox.json")
            network = self._around.network
            address = self._place.host_ip if self._host_network else network.attach(self.uid, self._sandbox.pid)
        except (StartError, NetworkError) as error:
            self._events.say("FailedCreatePodSandBox", str(error), warning=True)
            self._leave_sandbox()
            return False
        self._place = Place(self._place.started, address, self._place.host_ip)
        self._write_etc()
        self._refresh_at = time.monotonic() + self._around.refresh_seconds
        return True

    def _hostname(self) -> str:
        return str(self._pod["spec"].get("hostname") or self._pod["metadata"]["name"])[:63].rstrip("-.")

    def _refresh(self) -> None:
        self._refresh_at = time.monotonic() + self._around.refresh_seconds
        try:
            self._volumes.refresh()
        except ConfigError as error:  # what was there stays
            self._events.say("FailedMount", f"MountVolume.SetUp failed: {error}", warning=True)
        self._write_etc()

    def _write_etc(self) -> None:
        """hosts, hostname and resolv.conf; they are mounted one by one, so the same files are written again."""
        spec, place = self._pod["spec"], self._pod["metadata"]["namespace"]
        lines = ["127.0.0.1 localhost", f"{self._place.pod_ip} {self._hostname()}"]
        lines += [f"{item['ip']} {' '.join(item.get('hostnames', []))}" for item in spec.get("hostAliases") or []]
        if not self._around.nameserver:
            lines += _hosts(self._around.api.list("/api/v1/services"), place)
        domains = [f"{place}.svc.cluster.local", "svc.cluster.local", "cluster.local"]
        server = self._around.nameserver or "127.0.0.1"  # where nobody answers: a refusal at once, no waiting
        texts = {
            "hosts": "\n".join(lines),
            "hostname": self._hostname(),
            "resolv.conf": f"search {' '.join(domains)}\nnameserver {server}\noptions ndots:5",
        }
        for name, text in texts.items():
            file = self._folder / "etc" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_text() != text + "\n":
                file.write_text(text + "\n")

    def _tend(self, container: Container, pod: dict[str, Any]) -> None:
        """Start it if it should run, stop it if a probe wants that."""
        policy = self._policy(container, pod["spec"]["restartPolicy"])
        if container.process is not None:
            if verdict := container.condemned():
                reason, seconds = verdict
                self._events.say("Killing", reason, container=container.name)
                grace = pod["spec"].get("terminationGracePeriodSeconds", 30) if seconds is None else seconds
                container.stop(float(grace))
            return
        code = container.seen.exit_code
        if code is not None:
            if not restarts(policy, code):
                return
            container.seen.last = container.seen.state
            seconds = container.back_off(self._around.backoff_seconds)
            message = f"back-off {seconds:.0f}s restarting failed container={container.name} pod={self.name}"
            container.wait("CrashLoopBackOff", message, seconds)
            if seconds:
                self._events.say("BackOff", message, container=container.name, warning=True)
        if time.monotonic() >= container.not_before and (image := self._image(container)) is not None:
            self._start(container, image, pod)

    def _image(self, container: Container) -> Image | None:
        """None while it is fetched, or cannot be."""
        reference = container.spec["image"]
        if container.pull is None:
            container.pull = self._around.pulls.submit(self._around.images.ensure, reference)
        if not container.pull.done():
            return None
        try:
            return container.pull.result()
        except ImageMissing as error:
            again = container.seen.state.get("waiting", {}).get("reason") in ("ErrImagePull", "ImagePullBackOff")
            seconds = container.back_off(self._around.backoff_seconds) or container.back_off(0)
            message = f'Back-off pulling image "{reference}": ErrImagePull: {error}' if again else str(error)
            container.wait("ImagePullBackOff" if again else "ErrImagePull", message, seconds)
            self._events.say("Failed", f'Failed to pull image "{reference}": {error}', container=container.name,
                             warning=True)  # fmt: skip
        container.pull = None
        return None

    def _start(self, container: Container, image: Image, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        number = container.starts
        output = log_file(
            self._around.folder, metadata["namespace"], metadata["name"], self.uid, container.name, number
        )
        folder = self._folder / "containers" / container.name
        folder.mkdir(parents=True, exist_ok=True)
        termination = folder / "termination"
        termination.unlink(missing_ok=True)
        termination.touch()
        termination.chmod(0o666)
        try:
            run = self._run_spec(container.spec, image, pod, termination)
        except ConfigError as error:
            container.wait("CreateContainerConfigError", str(error), RETRY_SECONDS)
            self._events.say("Failed", f"Error: {error}", container=container.name, warning=True)
            return
        address = "127.0.0.1" if self._host_network else self._place.pod_ip
        container.start({**run, "log": str(output)}, image, folder, output, address)

    def _run_spec(
        self, container: Mapping[str, Any], image: Image, pod: dict[str, Any], termination: Path
    ) -> dict[str, Any]:
        assert self._sandbox is not None
        user = identity(pod, container, image)
        security = container.get("securityContext") or {}
        here = {**pod, "status": {"podIP": self._place.pod_ip, "hostIP": self._place.host_ip}}
        linked = services(self._objects.services()) if pod["spec"].get("enableServiceLinks", True) else {}
        variables = environment(
            here,
            container,
            image,
            base={"HOME": user.home, "HOSTNAME": self._hostname()},
            cluster={**linked, **self._around.variables},
            lookup=self._objects.text,
            node=self._node,
        )
        layer = self._folder / "layers" / container["name"]
        shutil.rmtree(layer, ignore_errors=True)
        mounts = [_mount(self._folder / "etc" / name, f"/etc/{name}") for name in ("hosts", "hostname", "resolv.conf")]
        mounts.append(_mount(termination, container.get("terminationMessagePath") or "/dev/termination-log"))
        shm = self._folder / "shm"
        if "/dev/shm" not in [item["mountPath"] for item in container.get("volumeMounts", [])]:
            mounts.append({**_mount(shm, "/dev/shm"), "in_memory": True, "volume": str(shm)})
        for item in container.get("volumeMounts", []):
            sub_path = item.get("subPath") or expand(item.get("subPathExpr", ""), variables)
            source = self._volumes.source(item["name"], sub_path)
            locked = item.get("readOnly", False) or self._volumes.from_cluster(item["name"])
            within_volume = {
                "in_memory": self._volumes.in_memory(item["name"]),
                "volume": str(self._volumes.source(item["name"])),
            }
            mounts.append({**_mount(source, item["mountPath"], read_only=locked), **within_volume})
        return {
            "sandbox": self._sandbox.pid,
            "rootfs": str(image.rootfs),
            **{name: str(layer / name) for name in ("root", "upper", "work")},
            "mounts": sorted(mounts, key=lambda item: str(item["path"])),
            "privileged": bool(security.get("privileged")),
            "read_only_root": bool(security.get("readOnlyRootFilesystem")),
            "working_dir": container.get("workingDir") or image.working_dir or "/",
            "command": command(container, image, variables),
            "env": variables,
            "uid": user.uid,
            "gid": user.gid,
            "groups": list(user.groups),
            "dropped_capabilities": dropped_capabilities(container),
            "no_new_privileges": security.get("allowPrivilegeEscalation") is False,
        }

    def _publish(self) -> None:
        status = status_of(self._pod, self._seen(), self._place, now(), over=self._over)
        before = self._pod.get("status", {})
        if before.get("phase") in OVER or not changed(before, status):
            return
        metadata = self._pod["metadata"]
        if "podIPs" in status:  # a merge would add to those of an earlier runner's sandbox
            status["podIPs"] = [{"$patch": "replace"}, *status["podIPs"]]
        body = {"metadata": {"uid": self.uid}, "status": status}  # of another pod of that name it is refused
        try:
            self.see(
                self._around.api.patch(f"{pod_path(metadata['namespace'], metadata['name'])}/status", body, "strategic")
            )
        except ApiError as error:
            if error.status not in (404, 409):  # it went, or another has its name: seen as vanished soon
                raise

    def _remove(self) -> None:
        """Its processes are gone: take it away from the API server, and its folder from here."""
        if not self._gone:
            metadata = self._pod["metadata"]
            path = pod_path(metadata["namespace"], metadata["name"])
            found = self._around.api.find(path)
            if found is not None and found["metadata"]["uid"] == self.uid:
                self._around.api.delete(path, gracePeriodSeconds="0")
        self._volumes.remove()

    def _leave_sandbox(self) -> None:
        for container in self._all:
            container.kill()
        if self._sandbox is not None:
            self._sandbox.kill()
            self._sandbox = None
        self._around.network.detach(self.uid)

    def _drop(self) -> None:
        self._leave_sandbox()
        if self._over:  # of what has ended, only the log is kept
            self._volumes.remove()


def _mount(source: Path, path: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"source": str(source), "path": path, "read_only": read_only, "in_memory": False}


def _hosts(found: list[dict[str, Any]], place: str) -> list[str]:
    """A line of /etc/hosts for each Service that has an address, in place of a DNS server."""
    lines = []
    for service in found:
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        address = service["spec"].get("clusterIP")
        if address not in (None, "", "None"):
            full = f"{name}.{namespace}"
            names = [f"{full}.svc.cluster.local", f"{full}.svc", full, *([name] if namespace == place else [])]
            lines.append(f"{address} {' '.join(names)}")
    return lines
