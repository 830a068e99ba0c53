"""The Kubernetes nodes of an AKS agent pool: what Azure would start for it, as Node objects that KWOK keeps ready."""

from __future__ import annotations

import hashlib
import itertools
import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from infra.catalog import SKUS
from localcloud.api import Api, ApiError
from localcloud.pods import evict, pod_path, wait_for
from localcloud.runner.node import ANNOTATION as RUNNER_ANNOTATION

KWOK_ANNOTATION = "kwok.x-k8s.io/node"  # with the value `fake`: KWOK plays the kubelet of this node
KUBELETS = {"kwok": {KWOK_ANNOTATION: "fake"}, "runner": {RUNNER_ANNOTATION: "true"}}
POOL_ANNOTATION = "drydock.localcloud/pool-id"
POOL_LABEL = "drydock.localcloud/pool"  # a hash of the pool's ID: an ID of Azure is no label value

SPOT = "kubernetes.azure.com/scalesetpriority"
DEFAULT_MAX_PODS = 250  # AKS, Azure CNI overlay

# GiB of memory for each vCPU of the general families without GPU (azure-compute-docs, sizes/overview).
MEMORY_PER_CPU = {"B": 4, "D": 4, "E": 8, "F": 2, "L": 8}
_CPU_SIZE = re.compile(r"Standard_([BDEFL])(\d+)[a-z]*(?:_v\d+)?")

# AKS, node-resource-reservations: millicores kept by the number of cores; memory by `_reserved_mib` below.
RESERVED_CPU = ((1, 60), (2, 100), (4, 140), (8, 180), (16, 260), (32, 420), (64, 740))
EVICTION_MIB = 100  # memory.available, AKS 1.29 and later
# What a node shows of the VM's memory and of its disk: kernel and firmware keep some, the file system too. By `kubectl
# describe node` of D4s_v5 (16 GiB: 16393244Ki) and of 128 GiB disks (129886128Ki).
SEEN_MEMORY, SEEN_DISK = 0.977, 0.967
DISK_ALLOCATABLE = 0.9  # the kubelet evicts below 10 % free (nodefs.available)

READY_SECONDS = 30.0  # less than one on an idle machine
DRAIN_SECONDS = 10.0  # AKS waits half an hour for pods that may not be evicted; afterwards they are ended here


def nodes_of(
    pool: Mapping[str, Any], *, cluster: str, location: str, kubelet: str = "kwok", indices: Iterable[int] | None = None
) -> list[dict[str, Any]]:
    """Node manifests of `pool`: the inputs of an AgentPool, or one of a ManagedCluster's `agentPoolProfiles`.

    Those with these `indices` in its scale set. Without: `count` of them, or `maxCount` where the pool is autoscaled,
    as if it had scaled out. Over the pool's zones in turn. `cluster` is the managed cluster's name, `location` its
    region, `kubelet` who keeps the nodes (one of KUBELETS). Raises ValueError for a VM size whose CPUs and memory are
    not known, and for another kubelet.
    """
    if kubelet not in KUBELETS:
        raise ValueError(f"kubelet = {kubelet}: expected one of {', '.join(KUBELETS)}")
    name = str(pool.get("agentPoolName") or pool["name"])
    count = int(pool["maxCount"] if pool.get("enableAutoScaling") else pool.get("count", 1))
    zones = [f"{location}-{zone}" for zone in pool.get("availabilityZones") or ()]
    group = scale_set(pool, cluster)
    chosen = range(count) if indices is None else indices
    return [
        _node(pool, name, f"{group}{_base36(index):0>6}", location, zones, index, KUBELETS[kubelet]) for index in chosen
    ]


def scale_set(pool: Mapping[str, Any], cluster: str) -> str:
    """The name that AKS gives to the pool's scale set: that of a node without its index."""
    number = int(hashlib.sha256(cluster.encode()).hexdigest(), 16) % 10**8  # AKS: one for all pools of a cluster
    return f"aks-{pool.get('agentPoolName') or pool['name']}-{number:08d}-vmss"


def sized(pool: Mapping[str, Any], there: Collection[int]) -> list[int]:
    """The indices that the nodes of an autoscaled pool have after it was made or changed: those that are `there` and as
    many more as make `count`, and `minCount`; never more than `maxCount`."""
    most = int(pool["maxCount"])
    kept = sorted(there)[:most]
    least = min(max(int(pool.get("count") or 0), int(pool.get("minCount") or 0)), most)
    return sorted([*kept, *itertools.islice(free_indices(kept), max(0, least - len(kept)))])


def free_indices(taken: Collection[int]) -> Iterable[int]:
    """The indices of a scale set's next nodes: the lowest that no node has."""
    return (index for index in itertools.count() if index not in taken)


def _node(
    pool: Mapping[str, Any],
    pool_name: str,
    name: str,
    location: str,
    zones: list[str],
    index: int,
    annotations: Mapping[str, str],
) -> dict[str, Any]:
    spot = pool.get("scaleSetPriority") == "Spot"
    size = str(pool["vmSize"])
    capacity, allocatable = _resources(pool, size)
    labels = {
        "agentpool": pool_name,
        "kubernetes.azure.com/agentpool": pool_name,
        "kubernetes.azure.com/mode": str(pool.get("mode", "User")).lower(),
        "kubernetes.azure.com/os-sku": str(pool.get("osSKU", "Ubuntu")),
        "kubernetes.azure.com/role": "agent",
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": size,
        "topology.kubernetes.io/region": location,
        "topology.kubernetes.io/zone": zones[index % len(zones)] if zones else "0",
    }
    labels |= {"kubernetes.azure.com/accelerator": "nvidia"} if "nvidia.com/gpu" in capacity else {}
    labels |= {SPOT: "spot"} if spot else {}
    taints = dict.fromkeys(pool.get("nodeTaints") or ())
    taints |= {f"{SPOT}=spot:NoSchedule": None} if spot else {}  # AKS adds it where the pool does not say it
    address = hashlib.sha256(name.encode()).digest()
    node: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": labels | dict(pool.get("nodeLabels") or {}),
            "annotations": dict(annotations),
        },
        "spec": {"taints": [_taint(text) for text in taints]},
        "status": {
            "capacity": capacity,
            "allocatable": allocatable,
            "addresses": [
                {"type": "InternalIP", "address": f"10.224.{address[0]}.{address[1] % 254 + 1}"},
                {"type": "Hostname", "address": name},
            ],
        },
    }
    return node


def _taint(text: str) -> dict[str, str]:
    """`key=value:effect` as AKS writes it; the value may be missing."""
    pair, _, effect = text.rpartition(":")
    key, _, value = pair.partition("=")
    return {"key": key, "effect": effect} | ({"value": value} if value else {})


def _resources(pool: Mapping[str, Any], size: str) -> tuple[dict[str, str], dict[str, str]]:
    """Capacity and allocatable of a node as the kubelet of AKS would report them."""
    cores, memory_gib, gpus = _machine(size)
    pods = int(pool.get("maxPods") or DEFAULT_MAX_PODS)
    memory = int(memory_gib * 1024 * SEEN_MEMORY)
    # Without a size, AKS takes one by the number of cores; 128 is the smallest.
    disk = int((pool.get("osDiskSizeGB") or 128) * 1024 * SEEN_DISK)
    gpu = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    capacity = {
        "cpu": str(cores),
        "memory": f"{memory}Mi",
        "ephemeral-storage": f"{disk}Mi",
        "pods": str(pods),
        **gpu,
    }
    allocatable = {
        "cpu": f"{cores * 1000 - reserved_millicores(cores)}m",
        "memory": f"{memory - _reserved_mib(memory, pods) - EVICTION_MIB}Mi",
        "ephemeral-storage": f"{int(disk * DISK_ALLOCATABLE)}Mi",
        "pods": str(pods),
        **gpu,
    }
    return capacity, allocatable


def _machine(size: str) -> tuple[int, int, int]:
    """Cores, memory in GiB and GPUs of a VM size."""
    if size in SKUS:
        return SKUS[size].vcpus, SKUS[size].ram_gib, SKUS[size].gpus
    if match := _CPU_SIZE.fullmatch(size):
        cores = int(match[2])
        return cores, cores * MEMORY_PER_CPU[match[1]], 0
    raise ValueError(
        f"vmSize = {size}: how many CPUs and how much memory it has is not known here: "
        "take a size from the catalogue (python -m infra.fit --sku all), or one such as Standard_D4ds_v5"
    )


def reserved_millicores(cores: int) -> int:
    """What AKS keeps of a node's CPU for the kubelet and its like; between its table's sizes, in proportion."""
    for (below, least), (above, most) in itertools.pairwise(RESERVED_CPU):
        if cores <= above:
            return round(least + (most - least) * max(0, cores - below) / (above - below))
    return RESERVED_CPU[-1][1] + (cores - RESERVED_CPU[-1][0]) * 10  # as from 4 cores to 64


def _reserved_mib(memory: int, pods: int) -> int:
    """AKS 1.29 and later: 20 MB for each pod that the node might hold and 50 MB, at most a quarter."""
    return min(20 * pods + 50, memory // 4)


def _base36(number: int) -> str:
    """How Azure numbers the machines of a scale set: 0 to 9, a to z, 10."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return digits[number] if number < 36 else _base36(number // 36) + digits[number % 36]


def sync(api: Api, pool_id: str, manifests: list[dict[str, Any]]) -> None:
    """Give the cluster exactly `manifests` as nodes of the pool with this ID of Azure; none: the pool is gone.

    Returns when the nodes are ready, as Azure does, or raises TimeoutError. Changed labels and taints reach nodes that
    are there, as AKS changes them in place. A node that goes is drained before: its pods move to other nodes, if there
    are any for them.
    """
    wanted = {manifest["metadata"]["name"] for manifest in manifests}
    there = [node["metadata"]["name"] for node in api.list("/api/v1/nodes", labelSelector=_selector(pool_id))]
    put(api, pool_id, manifests)
    remove(api, [name for name in there if name not in wanted])
    for name in sorted(wanted):
        wait_for(api, f"/api/v1/nodes/{name}", _ready, READY_SECONDS)


def put(api: Api, pool_id: str, manifests: list[dict[str, Any]]) -> None:
    """Make these nodes of the pool with this ID of Azure, or change them; whether they are ready is not waited for."""
    for manifest in manifests:
        metadata = manifest["metadata"]
        labels = metadata["labels"] | {POOL_LABEL: mark(pool_id)}
        annotations = metadata["annotations"] | {POOL_ANNOTATION: pool_id}
        named = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": metadata["name"]}}
        described = {**metadata, "labels": labels, "annotations": annotations}
        api.apply({**named, "metadata": described, "spec": manifest["spec"]})
        api.apply({**named, "status": manifest["status"]}, "status")


def taken_indices(api: Api, pool_id: str) -> list[int]:
    """Of the nodes that the pool has, in its scale set."""
    return [index_of(node) for node in api.list("/api/v1/nodes", labelSelector=_selector(pool_id))]


def index_of(node: Mapping[str, Any]) -> int:
    return int(node["metadata"]["name"][-6:], 36)


def mark(pool_id: str) -> str:
    """What POOL_LABEL is on the pool's nodes. Azure's IDs ignore case."""
    return hashlib.sha256(pool_id.lower().encode()).hexdigest()[:16]


def _selector(pool_id: str) -> str:
    return f"{POOL_LABEL}={mark(pool_id)}"


def _ready(node: dict[str, Any]) -> bool:
    """The controllers take the taint away some moments after the node says that it is ready."""
    waiting = {taint["key"] for taint in node.get("spec", {}).get("taints", [])} & {"node.kubernetes.io/not-ready"}
    conditions = node.get("status", {}).get("conditions", [])
    return not waiting and any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def remove(api: Api, nodes: list[str]) -> None:
    """Drain these nodes and take them away; what does not go by itself in DRAIN_SECONDS is ended."""
    for node in nodes:
        api.patch(f"/api/v1/nodes/{node}", {"spec": {"unschedulable": True}})
    deadline = time.monotonic() + DRAIN_SECONDS
    while (moving := [pod for pod in _pods_on(api, nodes) if not of_daemon_set(pod)]) and time.monotonic() < deadline:
        for pod in moving:
            if "deletionTimestamp" not in pod["metadata"]:
                _evict(api, pod)
        time.sleep(0.2)
    left = _pods_on(api, nodes)
    for node in nodes:
        api.delete(f"/api/v1/nodes/{node}")
    for pod in left:  # the kubelet that would end them in order is gone with the node
        api.delete(pod_path(pod["metadata"]["namespace"], pod["metadata"]["name"]), gracePeriodSeconds="0")


def _pods_on(api: Api, nodes: list[str]) -> list[dict[str, Any]]:
    return [pod for node in nodes for pod in api.list("/api/v1/pods", fieldSelector=f"spec.nodeName={node}")]


def of_daemon_set(pod: dict[str, Any]) -> bool:
    """Whether it belongs to its node and would come back there: a drain leaves it."""
    return any(owner["kind"] == "DaemonSet" for owner in pod["metadata"].get("ownerReferences", []))


def _evict(api: Api, pod: dict[str, Any]) -> None:
    try:
        evict(api, pod["metadata"]["namespace"], pod["metadata"]["name"])
    except ApiError as error:
        if error.status not in (404, 429):  # it went by itself; its disruption budget forbids it now: tried again
            raise
