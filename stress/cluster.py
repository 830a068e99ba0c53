"""The replicas and tuning pods of a cluster, through its API server, by the rights of the drills' own account alone."""

from __future__ import annotations

import http.client
import json
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from stress.fleet import FleetError
from stress.sites import Stage

SERVER = "https://kubernetes.default.svc"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where pods have their account's token
ANSWER_SECONDS = 15.0
REPLICAS, ENGINE = "app=engine", "engine"  # label of the replicas' pods, and the container that serves
TUNERS, TUNE = "app=tune", "tune"
JOB_LABEL, INDEX_LABEL = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"
UNCORDON_SECONDS = 20.0  # of tries: within the 30 s that a pod has after SIGTERM
EVICTION_POLL_SECONDS = 2.0
LOG_BYTES = 1_000_000

Object = dict[str, Any]


class ClusterError(FleetError):
    """The API server refused or did not answer; `status` is 0 in the latter case."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Api:
    """Asks the API server as the account whose token and authority are in the folder `account`."""

    def __init__(self, server: str = SERVER, account: Path = ACCOUNT) -> None:
        self.server, self._account = urlsplit(server), account

    def ask(self, method: str, path: str, body: Object | None = None, kind: str = "application/json") -> Object:
        """The object that comes back. Raises `ClusterError`."""
        return dict(json.loads(self.text(method, path, body, kind)))

    def text(self, method: str, path: str, body: Object | None = None, kind: str = "application/json") -> str:
        """What comes back, as text. Raises `ClusterError`."""
        what, host = f"{method} {path}", self.server.hostname or ""
        connection: http.client.HTTPConnection
        try:
            # Read each time: the kubelet changes the token within the hour.
            headers = {"Authorization": f"Bearer {(self._account / 'token').read_text().strip()}"}
            if self.server.scheme == "https":
                trusted = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
                connection = http.client.HTTPSConnection(
                    host, self.server.port, timeout=ANSWER_SECONDS, context=trusted
                )
            else:
                connection = http.client.HTTPConnection(host, self.server.port, timeout=ANSWER_SECONDS)
            try:
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, path, data, headers | ({"Content-Type": kind} if body is not None else {}))
                answer = connection.getresponse()
                text = answer.read().decode(errors="replace")
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(f"{what}: no answer of the API server: {type(error).__name__}: {error}") from None
        if answer.status >= 300:
            try:
                said = json.loads(text).get("message", text)
            except (ValueError, AttributeError):
                said = text[:500]
            raise ClusterError(f"{what}: {answer.status}: {said}", answer.status)
        return text


@dataclass
class Cluster:
    """The pods of namespace `serving`, with the router's Service before them, and the tuning pods of `tuning`."""

    api: Api
    router: str
    serving: str
    tuning: str
    poll_seconds: float = 0.5
    how: str = "Deletion, without grace, of"
    _before: set[str] = field(default_factory=set)  # UIDs of the pods that were there when some were taken
    _taken: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        return [pod["metadata"]["name"] for pod in self._replicas() if not _leaving(pod)]

    def unready(self) -> list[str]:
        pods = self._replicas()
        return [_name(pod) for pod in pods if _leaving(pod) or not _ready(pod)] if pods else ["(there is no pod)"]

    def check(self, names: list[str]) -> None:
        for name in names:
            self._pod(name)

    def kill(self, names: list[str]) -> float:
        """Force the deletion: the kubelet gives such a pod a second or two between SIGTERM and SIGKILL."""
        pods = self._note(names)
        at = time.time()
        for pod in pods:
            options = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
            body = {"apiVersion": "v1", "kind": "DeleteOptions", **options}
            self.api.ask("DELETE", _path(self.serving, _name(pod)), body)
        return at

    def reached(self, name: str) -> tuple[Stage, str]:
        """Pods have other names than those that they replace: the first new one counts for the first that was taken."""
        new = [pod for pod in self._replicas() if pod["metadata"]["uid"] not in self._before and not _leaving(pod)]
        new.sort(key=lambda pod: (pod["metadata"]["creationTimestamp"], _name(pod)))
        number = self._taken.index(name)
        if number >= len(new):
            return 0, name
        pod = new[number]
        engine = _container(pod, "containerStatuses", ENGINE)
        if "running" not in engine.get("state", {}):
            return 0, _name(pod)
        if not engine.get("started"):
            return 1, _name(pod)
        return (3 if _ready(pod) else 2), _name(pod)

    # --- nodes --------------------------------------------------------------------------------------------------

    def node_of(self, name: str) -> tuple[str, list[str]]:
        """The node of a replica, and all replicas there. Raises `ClusterError` for a node that is cordoned already."""
        node = self._pod(name)["spec"]["nodeName"]
        if self.api.ask("GET", f"/api/v1/nodes/{node}")["spec"].get("unschedulable"):
            raise ClusterError(f"node {node} is cordoned already: wait for whoever did it, or: kubectl uncordon {node}")
        return node, [_name(pod) for pod in self._replicas() if pod["spec"].get("nodeName") == node]

    def cordon(self, node: str) -> None:
        self._schedulable(node, False)

    def uncordon(self, node: str) -> None:
        """Tries again for some seconds. Raises `ClusterError` with what a person has to do then.

        A node that is gone needs nothing: the autoscaler takes an empty one away, cordoned or not.
        """
        deadline = time.monotonic() + UNCORDON_SECONDS
        while True:
            try:
                self._schedulable(node, True)
                return
            except ClusterError as error:
                if error.status == 404:
                    return
                if time.monotonic() > deadline:
                    raise ClusterError(f"node {node} stays cordoned: kubectl uncordon {node} ({error})") from None
                time.sleep(1)

    def _schedulable(self, node: str, value: bool) -> None:
        change = {"spec": {"unschedulable": None if value else True}}
        self.api.ask("PATCH", f"/api/v1/nodes/{node}", change, "application/merge-patch+json")

    def drain(self, names: list[str], seconds: float, check: Callable[[], None]) -> float:
        """Evict these replicas as a drain does, in turn, each as soon as the disruption budget lets it go.

        The unix time just before the first. Raises `ClusterError` after `seconds`; `check` may raise earlier.
        """
        self._note(names)
        at, deadline = time.time(), time.monotonic() + seconds
        for name in names:
            while not self._evict(self.serving, name):
                check()
                if time.monotonic() > deadline:
                    raise ClusterError(f"{name}: its disruption budget did not allow an eviction within {seconds:g} s")
                time.sleep(EVICTION_POLL_SECONDS)
        return at

    # --- tuning -------------------------------------------------------------------------------------------------

    def tuners(self) -> list[Object]:
        """Pods that tune at present; the first of a Job of several pods before its others."""
        found = [pod for pod in self._pods(self.tuning, TUNERS) if not _leaving(pod) and _tunes(pod)]
        return sorted(found, key=lambda pod: (int(_labels(pod).get(INDEX_LABEL, 0)), _name(pod)))

    def evict_tuner(self, pod: Object) -> float:
        """Take its node away, as it were; the unix time just before. Raises `ClusterError`."""
        at = time.time()
        if not self._evict(self.tuning, _name(pod)):
            raise ClusterError(f"{_name(pod)}: a disruption budget of yours forbids its eviction")
        return at

    def tuner_after(self, pod: Object) -> Object | None:
        """The pod of the same Job (and place in it) that tunes after `pod`."""

        def place(found: Object) -> tuple[str | None, ...]:
            return tuple(_labels(found).get(key) for key in (JOB_LABEL, INDEX_LABEL))

        others = [found for found in self.tuners() if found["metadata"]["uid"] != pod["metadata"]["uid"]]
        return next((found for found in others if place(found) == place(pod)), None)

    def step(self, pod: Object) -> int | None:
        """The newest step that the log of `pod` tells (`training.progress`)."""
        found = re.findall(r"step (\d+)/\d+", self._log(pod, "tailLines=50"))
        return int(found[-1]) if found else None

    def resumed_at(self, pod: Object) -> int | None:
        """The step at which the log of `pod` says that it goes on (`training.tune`)."""
        found = re.search(r"resuming at step (\d+)", self._log(pod, f"limitBytes={LOG_BYTES}"))
        return int(found[1]) if found else None

    def _log(self, pod: Object, query: str) -> str:
        return self.api.text("GET", f"{_path(self.tuning, _name(pod))}/log?container={TUNE}&{query}")

    # ------------------------------------------------------------------------------------------------------------

    def _pods(self, namespace: str, selector: str) -> list[Object]:
        path = f"/api/v1/namespaces/{namespace}/pods?labelSelector={quote(selector)}"
        return [dict(item) for item in self.api.ask("GET", path)["items"]]

    def _replicas(self) -> list[Object]:
        found = self._pods(self.serving, REPLICAS)
        return [pod for pod in found if pod["status"].get("phase") not in ("Succeeded", "Failed")]

    def _pod(self, name: str) -> Object:
        pods = {_name(pod): pod for pod in self._replicas() if not _leaving(pod)}
        if name not in pods:
            raise ClusterError(f"no replica {name!r} in {self.serving}, which has: {', '.join(pods) or 'none'}")
        return pods[name]

    def _note(self, names: list[str]) -> list[Object]:
        pods = [self._pod(name) for name in names]
        self._before = {pod["metadata"]["uid"] for pod in self._replicas()}
        self._taken = list(names)
        return pods

    def _evict(self, namespace: str, name: str) -> bool:
        """False where a disruption budget forbids it now."""
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}}
        try:
            self.api.ask("POST", f"{_path(namespace, name)}/eviction", eviction)
        except ClusterError as error:
            if error.status == 429:
                return False
            raise
        return True


def _path(namespace: str, pod: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods/{pod}"


def _name(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def _labels(pod: Object) -> dict[str, str]:
    return dict(pod["metadata"].get("labels", {}))


def _leaving(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def _ready(pod: Object) -> bool:
    return any(item["type"] == "Ready" and item["status"] == "True" for item in pod["status"].get("conditions", []))


def _container(pod: Object, statuses: str, name: str) -> Object:
    return next((item for item in pod["status"].get(statuses, []) if item["name"] == name), {})


def _tunes(pod: Object) -> bool:
    return "running" in _container(pod, "initContainerStatuses", TUNE).get("state", {})
