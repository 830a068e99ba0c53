"""The replicas and tuning pods of a cluster, through its API server, by the rights of the drills' own account alone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

from common import kube
from common.kube import ApiError, Object
from stress.client import get_text
from stress.fleet import FleetError
from stress.sites import Stage

SERVER, ACCOUNT = kube.SERVER, kube.ACCOUNT
REPLICAS, ENGINE = "app=engine", "engine"  # label of the replicas' pods, and the container that serves
TUNERS, TUNE = "app=tune", "tune"
OVER = ("Succeeded", "Failed")
JOB_LABEL, INDEX_LABEL = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"
# The least that the kubelet knows. Without any (0) the API server forgets the pod at once, and the kubelet, never told,
# gives it the whole grace of its spec (pkg/kubelet/pod_workers.go, calculateEffectiveGracePeriod): nobody is killed.
GRACE_SECONDS = 1
GONE_SECONDS = 60.0  # for a kubelet to tell that all processes of a pod are gone: a few seconds
MEND_SECONDS = 20.0  # of tries: within the 30 s that a pod has after SIGTERM
FAULTS, LOSS = "drill-faults", "registry_unreachable_until"  # ConfigMap and key that the sidecars read
SIDECAR, METRICS = "sidecar", "sidecar-metrics"  # container and port at which a replica's sidecar tells its metrics
EVICTION_POLL_SECONDS = 2.0
LOG_BYTES = 1_000_000


class ClusterError(FleetError, ApiError):
    """The API server refused or did not answer; `status` is 0 in the latter case."""


class Api(kube.Api):
    """Asks the API server; what it refuses is a `ClusterError`."""

    error = ClusterError


@dataclass
class Cluster:
    """The pods of namespace `serving`, with the router's Service before them, and the tuning pods of `tuning`."""

    api: Api
    router: str
    serving: str
    tuning: str
    poll_seconds: float = 0.5
    how: str = "Deletion, with a second of grace, of"
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
        """Returns when they are gone: until then, seconds later, they may answer. Raises `ClusterError`."""
        pods = self._note(names)
        at, deadline = time.time(), time.monotonic() + GONE_SECONDS
        for pod in pods:
            options = {"gracePeriodSeconds": GRACE_SECONDS, "preconditions": {"uid": pod["metadata"]["uid"]}}
            body = {"apiVersion": "v1", "kind": "DeleteOptions", **options}
            self.api.ask("DELETE", _path(self.serving, _name(pod)), body)
        while left := self._there(pods):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{', '.join(left)}: not gone {GONE_SECONDS:g} s after the deletion: does the kubelet there answer?"
                )
            time.sleep(self.poll_seconds)
        return at

    def _there(self, pods: list[Object]) -> list[str]:
        """Those of `pods` that the API server still has; all of them where it does not answer."""
        try:
            known = {pod["metadata"]["uid"] for pod in self._pods(self.serving, REPLICAS)}
        except ClusterError:
            return [_name(pod) for pod in pods]
        return [_name(pod) for pod in pods if pod["metadata"]["uid"] in known]

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
        _mend(lambda: self._schedulable(node, True), f"node {node} stays cordoned: kubectl uncordon {node}")

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

    # --- the registry, as the sidecars see it -------------------------------------------------------------------

    def lose_registry(self, seconds: float) -> float:
        """Tell the sidecars that the registry is out of reach, for so long at most; the unix time just before.

        They hear of it when their kubelet brings the ConfigMap. Raises `ClusterError`.
        """
        at = time.time()
        self._declare(f"{at + seconds:.0f}")
        return at

    def find_registry(self) -> None:
        """Take that back. Tries again for some seconds. Raises `ClusterError`; the loss ends by itself then."""
        _mend(lambda: self._declare(None), f"ConfigMap {FAULTS}: {LOSS} stays there until it is over")

    def _declare(self, until: str | None) -> None:
        path = f"/api/v1/namespaces/{self.serving}/configmaps/{FAULTS}"
        self.api.ask("PATCH", path, {"data": {LOSS: until}}, "application/merge-patch+json")

    def registry_unseen(self) -> dict[str, float | None]:
        """Seconds for which each replica has not seen the registry; None where its sidecar does not answer."""
        return {_name(pod): _registry_unseen(pod) for pod in self._replicas() if not _leaving(pod)}

    def lapsed(self, names: list[str]) -> list[str]:
        """Those of `names` that are there to stay and not ready."""
        pods = [pod for pod in self._replicas() if _name(pod) in names]
        return [_name(pod) for pod in pods if not _leaving(pod) and not _ready(pod)]

    # --- tuning -------------------------------------------------------------------------------------------------

    def tuners(self) -> list[Object]:
        """Pods that tune at present; the first of a Job of several pods before its others."""
        found = [pod for pod in self._pods(self.tuning, TUNERS) if not _leaving(pod) and _tunes(pod)]
        return sorted(found, key=lambda pod: (int(_labels(pod).get(INDEX_LABEL, 0)), _name(pod)))

    def tunes_or_will(self) -> bool:
        """Whether there is a pod that tunes, or that has yet to: it may wait for a node, or for what it tunes."""
        found = [pod for pod in self._pods(self.tuning, TUNERS) if not _leaving(pod)]
        pods = [pod for pod in found if pod["status"].get("phase") not in OVER]
        return any("terminated" not in _container(pod, "initContainerStatuses", TUNE).get("state", {}) for pod in pods)

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
        return [pod for pod in found if pod["status"].get("phase") not in OVER]

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


def unseen_in(metrics: str) -> float | None:
    """Of a sidecar's metrics: seconds for which it has not seen the registry."""
    found = re.search(r"^drydock_registry_unreachable_seconds (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else None


def _registry_unseen(pod: Object) -> float | None:
    address = pod["status"].get("podIP")
    sidecars = [item for item in pod["spec"].get("initContainers", []) if item["name"] == SIDECAR]
    ports = [port for item in sidecars for port in item.get("ports", []) if port.get("name") == METRICS]
    if not address or not ports:
        return None
    text = get_text(f"http://{address}:{ports[0]['containerPort']}/metrics")
    return None if text is None else unseen_in(text)


def _mend(repair: Callable[[], None], otherwise: str) -> None:
    """Try for some seconds; what is gone needs nothing. Raises `ClusterError` with `otherwise`."""
    deadline = time.monotonic() + MEND_SECONDS
    while True:
        try:
            repair()
            return
        except ClusterError as error:
            if error.status == 404:
                return
            if time.monotonic() > deadline:
                raise ClusterError(f"{otherwise} ({error})") from None
            time.sleep(1)


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
