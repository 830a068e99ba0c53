"""The cluster autoscaler: agent pools grow for pods that find no node, and lose nodes that are idle."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from localcloud import nodes
from localcloud.api import Api, ApiError
from localcloud.azure.hands import Pool, pools_of
from localcloud.azure.world import Resources, World
from localcloud.predicates import OVER, Room, belongs, fits, requests
from localcloud.runner.events import now

PROVISION_SECONDS = 20 * 60  # for how long a node that is not ready yet counts as one that will be: `infra.cluster`
TRANSIENT = ("node.kubernetes.io/not-ready", "node.kubernetes.io/network-unavailable")  # taints of such a node
log = logging.getLogger(__name__)

Object = dict[str, Any]  # as the API server has it


@dataclass(frozen=True)
class Growth:
    """More nodes of a pool, and which pods they are for."""

    pool: Pool
    before: int
    manifests: list[Object]
    pods: list[Object]
    waste: float  # the shares of their CPU and memory that would be left over

    def __str__(self) -> str:
        """As the real one writes it."""
        group, most = nodes.scale_set(self.pool.inputs, self.pool.cluster), int(self.pool.inputs["maxCount"])
        return f"{{{group} {self.before}->{self.before + len(self.manifests)} (max: {most})}}"


class Autoscaler:
    """A context manager with a thread that looks every `seconds`; `world` has the agent pools, of this cluster alone.

    Pods that the scheduler calls unschedulable get as many nodes as they need, at most `maxCount` of a pool, of the
    pool of which they waste least (`localcloud.predicates` says what is known of where pods fit). A node that has had
    nothing but DaemonSets' pods and finished ones for `idle_seconds` goes, down to `minCount`. The real one also moves
    pods together to free nodes; this one does not. `kubelet`: who keeps new nodes, as in `nodes.nodes_of`.
    """

    def __init__(
        self, api: Api, world: World, *, seconds: float = 1.0, idle_seconds: float = 60.0, kubelet: str = "kwok"
    ) -> None:
        self._api, self._world = api, world
        self._seconds, self._idle_seconds, self._kubelet = seconds, idle_seconds, kubelet
        self._idle_since: dict[str, float] = {}  # by the node's name, of time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="autoscaler", daemon=True)

    def __enter__(self) -> Autoscaler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(self._seconds):
            try:
                self._look()
            except (ApiError, OSError) as error:  # the server is away, or something went meanwhile: all is seen anew
                log.warning("autoscaler: %s", error)
            except Exception:
                log.exception("autoscaler")

    def _look(self) -> None:
        with self._world.hold() as resources:
            pools = _autoscaled(resources)
        if not pools:
            return
        there, pods = self._api.list("/api/v1/nodes"), self._api.list("/api/v1/pods")
        rooms = [_room(node, pods) for node in there]
        open_names = {node["metadata"]["name"] for node in there if not node["spec"].get("unschedulable")}
        awaited, homeless = set(), []
        for pod in sorted(filter(_unschedulable, pods), key=_size, reverse=True):
            room = next((room for room in rooms if room.name in open_names and fits(pod, room, rooms)), None)
            if room is None:
                homeless.append(pod)
            else:  # the scheduler has not seen yet that there is room
                room.add(pod)
                awaited.add(room.name)
        if homeless:
            self._grow(pools, homeless, there, rooms)
        self._shrink(pools, there, pods, awaited)

    def _grow(self, pools: list[Pool], homeless: list[Object], there: list[Object], rooms: list[Room]) -> None:
        daemons = [_daemon(item) for item in self._api.list("/apis/apps/v1/daemonsets")]
        pools, homeless = list(pools), list(homeless)
        while homeless and pools:
            tried = [self._pack(pool, homeless, _of(pool, there), rooms, daemons) for pool in pools]
            best = min((growth for growth in tried if growth.pods), key=lambda growth: growth.waste, default=None)
            if best is None:
                return
            if self._put(best):
                for pod in best.pods:
                    self._say(pod, f"pod triggered scale-up: [{best}]")
            pools.remove(best.pool)
            homeless = [pod for pod in homeless if pod not in best.pods]

    def _pack(
        self, pool: Pool, homeless: list[Object], mine: list[Object], rooms: list[Room], daemons: list[Object]
    ) -> Growth:
        """What the pool could give: the pods one by one, each to the first new node that takes it."""
        left = max(0, int(pool.inputs["maxCount"]) - len(mine))
        free = itertools.islice(nodes.free_indices({nodes.index_of(node) for node in mine}), left)
        fresh = nodes.nodes_of(
            pool.inputs, cluster=pool.cluster, location=pool.location, kubelet=self._kubelet, indices=free
        )
        made: list[Room] = []
        placed: list[Object] = []
        for pod in homeless:
            opened = [Room(manifest) for manifest in fresh[len(made) : len(made) + 1]]
            for room in opened:
                for daemon in daemons:
                    if belongs(daemon, room):
                        room.add(daemon)
            found = next((room for room in [*made, *opened] if fits(pod, room, [*rooms, *made])), None)
            if found is not None:
                made += [found] if found not in made else []
                found.add(pod)
                placed.append(pod)
        return Growth(pool, len(mine), fresh[: len(made)], placed, _waste(made, fresh))

    def _put(self, growth: Growth) -> bool:
        """Whether the pool was still there, as it was. It is held meanwhile: who takes it away then finds its nodes."""
        with self._world.hold() as resources:
            if growth.pool not in _autoscaled(resources):
                return False
            nodes.put(self._api, growth.pool.id, growth.manifests)
            return True

    def _shrink(self, pools: list[Pool], there: list[Object], pods: list[Object], awaited: set[str]) -> None:
        busy = {pod["spec"].get("nodeName") for pod in pods if _keeps(pod)} | awaited
        since = {name: self._idle_since.get(name, time.monotonic()) for name in map(_name, there) if name not in busy}
        self._idle_since = since
        for pool in pools:
            mine = _of(pool, there)
            spare = len(mine) - int(pool.inputs.get("minCount") or 0)
            for name in sorted(map(_name, mine), reverse=True):
                if spare > 0 and name in since and time.monotonic() - since[name] >= self._idle_seconds:
                    spare -= self._remove(name)

    def _remove(self, name: str) -> bool:
        """Unless the scheduler was faster: once it is told to leave the node alone, the node must still be idle."""
        path = f"/api/v1/nodes/{name}"
        self._api.patch(path, {"spec": {"unschedulable": True}})
        if any(_keeps(pod) for pod in self._api.list("/api/v1/pods", fieldSelector=f"spec.nodeName={name}")):
            self._api.patch(path, {"spec": {"unschedulable": None}})
            return False
        nodes.remove(self._api, [name])
        return True

    def _say(self, pod: Object, message: str) -> None:
        metadata = pod["metadata"]
        about = {key: metadata[key] for key in ("name", "namespace", "uid")}
        event = {
            "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}", "namespace": metadata["namespace"]},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", **about},
            "reason": "TriggeredScaleUp",
            "message": message,
            "type": "Normal",
            "source": {"component": "cluster-autoscaler"},
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "count": 1,
        }
        try:
            self._api.post(f"/api/v1/namespaces/{metadata['namespace']}/events", event)
        except ApiError as error:  # its namespace may be ending
            log.info("autoscaler: %s: %s", metadata["name"], error)


def _autoscaled(resources: Resources) -> list[Pool]:
    pools = itertools.chain.from_iterable(pools_of(resources, record) for record in resources.all())
    return [pool for pool in pools if pool.inputs.get("enableAutoScaling")]


def _of(pool: Pool, there: list[Object]) -> list[Object]:
    mark = nodes.mark(pool.id)
    return [node for node in there if (node["metadata"].get("labels") or {}).get(nodes.POOL_LABEL) == mark]


def _room(node: Object, pods: list[Object]) -> Room:
    """With the taints of a node that comes up left out."""
    born = datetime.strptime(node["metadata"]["creationTimestamp"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    taints = node["spec"].get("taints") or []
    if (datetime.now(UTC) - born).total_seconds() < PROVISION_SECONDS:
        taints = [taint for taint in taints if taint["key"] not in TRANSIENT]
    on_it = [pod for pod in pods if pod["spec"].get("nodeName") == _name(node)]
    return Room({**node, "spec": {**node["spec"], "taints": taints}}, on_it)


def _name(node: Object) -> str:
    return str(node["metadata"]["name"])


def _unschedulable(pod: Object) -> bool:
    """One that the scheduler found no place for, and that does not wait for others to be preempted either."""
    status = pod["status"]
    if "nodeName" in pod["spec"] or "deletionTimestamp" in pod["metadata"] or status.get("nominatedNodeName"):
        return False
    return status.get("phase") == "Pending" and any(
        (item["type"], item["status"], item.get("reason")) == ("PodScheduled", "False", "Unschedulable")
        for item in status.get("conditions") or []
    )


def _size(pod: Object) -> list[Any]:
    """The large ones are packed first."""
    asked = requests(pod["spec"])
    return [asked.get(name, 0) for name in ("nvidia.com/gpu", "cpu", "memory")]


def _keeps(pod: Object) -> bool:
    """Whether a node stays because this pod is on it."""
    return pod["status"].get("phase") not in OVER and not nodes.of_daemon_set(pod)


def _daemon(daemon_set: Object) -> Object:
    template = daemon_set["spec"]["template"]
    metadata = {**(template.get("metadata") or {}), "namespace": daemon_set["metadata"]["namespace"]}
    return {"metadata": metadata, "spec": template["spec"]}


def _waste(made: list[Room], fresh: Sequence[Object]) -> float:
    """The shares of CPU and of memory that are left over in `made`, together."""
    if not made:
        return 0.0
    whole = Room(fresh[0]).free
    return sum(float(sum(room.free[name] for room in made) / (len(made) * whole[name])) for name in ("cpu", "memory"))
