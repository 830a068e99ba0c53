"""Nodes of agent pools: as many, labelled, tainted and as large as AKS would make them."""

from __future__ import annotations

from typing import Any

import pytest

from infra.catalog import SKUS
from infra.settings import GpuPool
from localcloud.nodes import nodes_of, reserved_millicores
from workloads.placement import gpu_share

GPU_POOL = {
    "agentPoolName": "a10063be",
    "mode": "User",
    "vmSize": "Standard_NC24ads_A100_v4",
    "osSKU": "Ubuntu",
    "osDiskSizeGB": 256.0,  # as Pulumi's wire has numbers
    "maxPods": 60.0,
    "enableAutoScaling": True,
    "count": 0.0,
    "minCount": 0.0,
    "maxCount": 3.0,
    "nodeLabels": {"drydock/pool": "a100", "kubernetes.azure.com/scalesetpriority": "spot"},
    "nodeTaints": ["sku=gpu:NoSchedule", "kubernetes.azure.com/scalesetpriority=spot:NoSchedule"],
    "scaleSetPriority": "Spot",
}
SYSTEM_POOL = {
    "name": "system",
    "mode": "System",
    "vmSize": "Standard_D4ds_v5",
    "count": 2,
    "enableAutoScaling": False,
    "maxPods": 60,
    "osDiskSizeGB": 64,
    "availabilityZones": ["1", "2", "3"],
    "nodeTaints": ["CriticalAddonsOnly=true:NoSchedule"],
}


def made(pool: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return nodes_of(pool | changes, cluster="drydock-dev-aks", location="swedencentral")


def mib(quantity: str) -> int:
    assert quantity.endswith("Mi")
    return int(quantity[:-2])


def test_an_autoscaled_pool_is_as_large_as_it_may_become_and_another_has_its_count() -> None:
    assert len(made(GPU_POOL)) == 3
    assert len(made(SYSTEM_POOL)) == 2
    assert made(SYSTEM_POOL, count=0) == []


def test_names_are_those_of_the_scale_set() -> None:
    names = [node["metadata"]["name"] for node in made(SYSTEM_POOL, count=37)]
    stem = names[0].removesuffix("000000")
    assert stem.startswith("aks-system-") and stem.endswith("-vmss")
    assert [names[index].removeprefix(stem) for index in (9, 10, 35, 36)] == ["000009", "00000a", "00000z", "000010"]
    assert made(GPU_POOL)[0]["metadata"]["name"].split("-")[2] == stem.split("-")[2]  # one number a cluster
    other = nodes_of(SYSTEM_POOL, cluster="drydock-prod-aks", location="swedencentral")
    assert other[0]["metadata"]["name"] != names[0]


def test_labels_are_those_of_aks_and_the_pools_own() -> None:
    spot, system = made(GPU_POOL)[0]["metadata"], made(SYSTEM_POOL)[1]["metadata"]
    assert spot["labels"] == {
        "agentpool": "a10063be",
        "drydock/pool": "a100",
        "kubernetes.azure.com/accelerator": "nvidia",
        "kubernetes.azure.com/agentpool": "a10063be",
        "kubernetes.azure.com/mode": "user",
        "kubernetes.azure.com/os-sku": "Ubuntu",
        "kubernetes.azure.com/role": "agent",
        "kubernetes.azure.com/scalesetpriority": "spot",
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": spot["name"],
        "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": "Standard_NC24ads_A100_v4",
        "topology.kubernetes.io/region": "swedencentral",
        "topology.kubernetes.io/zone": "0",
    }
    assert system["labels"]["kubernetes.azure.com/mode"] == "system"
    assert system["labels"]["topology.kubernetes.io/zone"] == "swedencentral-2"
    assert not {"kubernetes.azure.com/accelerator", "kubernetes.azure.com/scalesetpriority"} & set(system["labels"])
    assert system["annotations"] == {"kwok.x-k8s.io/node": "fake"}


def test_zones_are_taken_in_turn() -> None:
    zones = [node["metadata"]["labels"]["topology.kubernetes.io/zone"][-1] for node in made(SYSTEM_POOL, count=5)]
    assert zones == ["1", "2", "3", "1", "2"]


def test_taints_with_that_of_spot_once_whether_or_not_it_is_declared() -> None:
    wanted = [
        {"key": "sku", "value": "gpu", "effect": "NoSchedule"},
        {"key": "kubernetes.azure.com/scalesetpriority", "value": "spot", "effect": "NoSchedule"},
    ]
    assert made(GPU_POOL)[0]["spec"]["taints"] == wanted
    assert made(GPU_POOL, nodeTaints=["sku=gpu:NoSchedule"])[0]["spec"]["taints"] == wanted
    assert made(GPU_POOL, scaleSetPriority=None, nodeTaints=["alone:NoExecute"])[0]["spec"]["taints"] == [
        {"key": "alone", "effect": "NoExecute"}
    ]
    assert made(SYSTEM_POOL, nodeTaints=None)[0]["spec"]["taints"] == []


def test_reserved_cpu_follows_the_table_of_aks() -> None:
    table = {1: 60, 2: 100, 4: 140, 8: 180, 16: 260, 32: 420, 64: 740}
    assert {cores: reserved_millicores(cores) for cores in table} == table
    assert (reserved_millicores(24), reserved_millicores(96)) == (340, 1060)


def test_a_node_offers_what_aks_leaves_of_it() -> None:
    status = made(GPU_POOL)[0]["status"]
    assert status["capacity"]["nvidia.com/gpu"] == status["allocatable"]["nvidia.com/gpu"] == "1"
    assert status["capacity"]["cpu"] == "24" and status["allocatable"]["cpu"] == "23660m"
    # 20 MB for each of 60 pods and 50 MB, and the kubelet's threshold of 100 MiB.
    assert mib(status["capacity"]["memory"]) - mib(status["allocatable"]["memory"]) == 20 * 60 + 50 + 100
    assert 0.95 * 220 < mib(status["capacity"]["memory"]) / 1024 < 220
    assert 0.85 * 256 < mib(status["allocatable"]["ephemeral-storage"]) / 1024 < 0.9 * 256
    assert status["allocatable"]["pods"] == "60"
    small = made(SYSTEM_POOL, vmSize="Standard_D2ds_v5", maxPods=None)[0]["status"]
    assert small["allocatable"]["pods"] == "250" and "nvidia.com/gpu" not in small["capacity"]
    assert mib(small["capacity"]["memory"]) - mib(small["allocatable"]["memory"]) == mib(small["capacity"]["memory"]) // 4 + 100  # fmt: skip


@pytest.mark.parametrize(
    ("size", "cpu", "memory_gib"),
    [("Standard_D4ds_v5", 4, 16), ("Standard_E8s_v5", 8, 64), ("Standard_F16s_v2", 16, 32), ("Standard_D2as_v6", 2, 8)],
)
def test_sizes_without_gpu(size: str, cpu: int, memory_gib: int) -> None:
    capacity = made(SYSTEM_POOL, vmSize=size)[0]["status"]["capacity"]
    assert capacity["cpu"] == str(cpu)
    assert 0.95 * memory_gib < mib(capacity["memory"]) / 1024 < memory_gib


def test_a_size_that_is_not_known_is_named() -> None:
    with pytest.raises(ValueError, match=r"Standard_HB120rs_v3.*not known here"):
        made(SYSTEM_POOL, vmSize="Standard_HB120rs_v3")


@pytest.mark.parametrize("size", sorted(SKUS))
def test_every_gpu_of_a_node_finds_room_for_its_pod(size: str) -> None:
    pool = GpuPool(vm_size=size)
    share, gpus = gpu_share(pool), SKUS[size].gpus
    assert int(gpu_share(pool, gpus).cpu) == gpus * int(share.cpu)  # so a pod with all of them finds it as well
    [node] = made(GPU_POOL, vmSize=size, maxCount=1, osDiskSizeGB=pool.os_disk_gib)
    room = node["status"]["allocatable"]
    plugin = {"cpu": 50, "memory": 128, "disk": 64}  # the device plugin's own requests, millicores and MiB
    assert int(share.cpu) * 1000 * gpus + plugin["cpu"] <= int(room["cpu"].removesuffix("m"))
    assert int(share.memory.removesuffix("Gi")) * 1024 * gpus + plugin["memory"] <= mib(room["memory"])
    assert int(share.ephemeral_storage.removesuffix("Gi")) * 1024 * gpus + plugin["disk"] <= mib(
        room["ephemeral-storage"]
    )
