"""Node auto-provisioning (Karpenter) in place of agent pools: the same labels and taints, and sizes to fall back on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pulumi
from pulumi_kubernetes import apiextensions, meta

from infra.catalog import sku
from infra.pools import MAX_PODS, POOL_LABEL, gpu_taints

if TYPE_CHECKING:
    from infra.settings import GpuPool


@dataclass(frozen=True)
class NodeProvisioningArgs:
    """`zones` are the cluster's, for pools that name none; `location` is the region that they are in."""

    pools: Mapping[str, GpuPool]
    zones: Sequence[str]
    location: str


class NodeProvisioning(pulumi.ComponentResource):
    """For each GPU pool one AKSNodeClass (how nodes are made) and, for each of its sizes, one NodePool.

    Among the sizes of one NodePool Karpenter takes the cheapest; in order of preference they need NodePools of falling
    weight. Each is limited to the pool's GPUs by itself: the namespaces' quotas limit the sum. `min_nodes` has no
    meaning here: nodes are made for pods alone.
    """

    def __init__(self, name: str, args: NodeProvisioningArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:NodeProvisioning", name, None, opts)
        for pool_name, pool in args.pools.items():
            node_class = apiextensions.CustomResource(
                f"{name}-{pool_name}",
                api_version="karpenter.azure.com/v1beta1",
                kind="AKSNodeClass",
                metadata=meta.v1.ObjectMetaArgs(name=pool_name),
                spec={"imageFamily": "Ubuntu", "osDiskSizeGB": pool.os_disk_gib, "maxPods": MAX_PODS},
                opts=pulumi.ResourceOptions(parent=self),
            )
            zones = [f"{args.location}-{zone}" for zone in (args.zones if pool.zones is None else pool.zones)]
            for number, size in enumerate(pool.sizes):
                apiextensions.CustomResource(
                    f"{name}-{pool_name}-{number}",
                    api_version="karpenter.sh/v1",
                    kind="NodePool",
                    metadata=meta.v1.ObjectMetaArgs(name=f"{pool_name}-{number}"),
                    spec=node_pool(pool_name, pool, size, zones, weight=100 - number),
                    opts=pulumi.ResourceOptions(parent=self, depends_on=[node_class]),
                )
        self.register_outputs({})


def node_pool(name: str, pool: GpuPool, size: str, zones: Sequence[str], *, weight: int) -> dict[str, Any]:
    """The `spec` of the NodePool (karpenter.sh/v1) that makes nodes of `size` for `pool`; `zones` as REGION-NUMBER."""
    wanted = {
        "karpenter.azure.com/sku-name": [size],
        "karpenter.sh/capacity-type": ["spot" if pool.spot else "on-demand"],
        "kubernetes.io/arch": ["amd64"],
        "kubernetes.io/os": ["linux"],
        **({"topology.kubernetes.io/zone": list(zones)} if zones else {}),
    }
    return {
        "weight": weight,
        "limits": {"nvidia.com/gpu": str(pool.max_nodes * sku(size).gpus)},
        "disruption": {
            "consolidationPolicy": "WhenEmpty",  # packing pods more densely would restart replicas to save nothing
            "consolidateAfter": "10m",  # as the cluster autoscaler does: the next Job often follows soon
        },
        "template": {
            # The spot label comes from Karpenter itself.
            "metadata": {"labels": {POOL_LABEL: name}},
            "spec": {
                "nodeClassRef": {"group": "karpenter.azure.com", "kind": "AKSNodeClass", "name": name},
                "expireAfter": "Never",  # a node's age would end a training in its midst; new images come by drift
                "requirements": [
                    {"key": key, "operator": "In", "values": values} for key, values in sorted(wanted.items())
                ],
                "taints": [
                    {"key": taint.key, "value": taint.value, "effect": taint.effect} for taint in gpu_taints(pool)
                ],
            },
        },
    }
