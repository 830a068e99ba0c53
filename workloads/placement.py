"""Which nodes a pod may run on and what it asks of them: pure functions, shared with the pools that must match."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pulumi_kubernetes import core

from infra.pools import APPS, POOL_LABEL, Taint, gpu_taints

if TYPE_CHECKING:
    from infra.settings import GpuPool

# Left to the kubelet, the system and the agents of AKS on every node; AKS's own formula reserves less.
NODE_RESERVE_CPU = 1.0
NODE_RESERVE_MEMORY = 0.15  # share


@dataclass(frozen=True)
class GpuShare:
    """What a pod asks for, for its GPUs: their share of the node."""

    cpu: str
    memory: str
    ephemeral_storage: str


def gpu_share(pool: GpuPool, gpus: int = 1) -> GpuShare:
    """The shares that `gpus` GPUs have of CPU (cores), memory and disk (GiB) of a node of `pool`, each rounded down."""
    sku = pool.sku
    cpu = math.floor((sku.vcpus - NODE_RESERVE_CPU) / sku.gpus)
    memory = math.floor(sku.ram_gib * (1 - NODE_RESERVE_MEMORY) / sku.gpus)
    disk = math.floor(pool.os_disk_gib * 0.6 / sku.gpus)  # images take some, and the kubelet evicts at 85 % full
    return GpuShare(str(gpus * cpu), f"{gpus * memory}Gi", f"{gpus * disk}Gi")


def gpu_node_selector(pool: str) -> dict[str, str]:
    return {POOL_LABEL: pool}


def gpu_tolerations(settings: GpuPool) -> list[core.v1.TolerationArgs]:
    """For all taints of the pool's nodes."""
    return tolerations(*gpu_taints(settings))


def tolerations(*taints: Taint) -> list[core.v1.TolerationArgs]:
    return [
        core.v1.TolerationArgs(key=taint.key, operator="Equal", value=taint.value, effect=taint.effect)
        for taint in taints
    ]


def apps_node_selector() -> dict[str, str]:
    return {POOL_LABEL: APPS}
