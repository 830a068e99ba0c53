"""The node pools beside the cluster's own: `apps` for pods without GPU, and one agent pool for each GPU pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pulumi
from pulumi_azure_native import containerservice

from infra.names import pool_name
from infra.place import Place

if TYPE_CHECKING:
    from infra.cluster import Cluster
    from infra.settings import Cluster as ClusterSettings
    from infra.settings import GpuPool

POOL_LABEL = "drydock/pool"
APPS = "apps"


@dataclass(frozen=True)
class Taint:
    """A node taint; `str()` is how AKS writes it, `key=value:effect`."""

    key: str
    value: str
    effect: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}:{self.effect}"


GPU_TAINT = Taint("sku", "gpu", "NoSchedule")  # the taint of the AKS documentation: pods without GPU stay away
SPOT_TAINT = Taint("kubernetes.azure.com/scalesetpriority", "spot", "NoSchedule")  # AKS adds it to every spot node

# AKS reserves 20 MB of every node's memory for each pod it might hold (node-resource-reservations), and its default of
# 250 would take a quarter of a 16 GiB node. No node here holds more than some 30 pods.
MAX_PODS = 60
# Quota families whose sizes cannot be Trusted Launch machines: ND A100 v4 not yet (azure-compute-docs, trusted-launch),
# NCC H100 v5 because they are confidential ones.
NO_TRUSTED_LAUNCH = ("Standard NDASv4_A100 Family", "Standard NDAMSv4_A100Family", "StandardNCCads2023Family")
CPU_OS_DISK_GIB = 64  # fits into the local disk of the usual sizes with one, which AKS then takes: faster, and free


def gpu_labels(name: str, pool: GpuPool) -> dict[str, str]:
    """Labels of the nodes of GPU pool `name`.

    Set through AKS, not by kubectl: the autoscaler knows no others of a pool that has no nodes.
    """
    # AKS puts this one on spot nodes by itself; left out here, the next update would try to take it away (#959).
    spot = {SPOT_TAINT.key: SPOT_TAINT.value} if pool.spot else {}
    return {POOL_LABEL: name, **spot}


def gpu_taints(pool: GpuPool) -> list[Taint]:
    """Taints of the nodes of `pool`; that of spot is declared for the same reason as its label."""
    return [GPU_TAINT, *([SPOT_TAINT] if pool.spot else [])]


def pool_zones(pool: GpuPool, cluster: ClusterSettings) -> tuple[str, ...]:
    """The availability zones of `pool`: its own, otherwise the cluster's; none: Azure places its nodes."""
    return cluster.zones if pool.zones is None else pool.zones


@dataclass(frozen=True)
class PoolsArgs:
    """`pools` by the name that pods select; with provisioning `automatic`, no agent pool is made of them."""

    place: Place
    cluster: Cluster
    subnet_id: pulumi.Input[str]
    settings: ClusterSettings
    pools: Mapping[str, GpuPool]


class Pools(pulumi.ComponentResource):
    """Agent pools, scaled by the cluster autoscaler.

    What AKS cannot change in place is in the hash that ends a pool's name. Another VM size is thus a pool of another
    name, made before the old one is deleted, where the same name would be an error of the service (#959, #2462).
    """

    names: dict[str, pulumi.Output[str]]
    """Names of the agent pools in Azure, by pool; `apps` among them."""

    def __init__(self, name: str, args: PoolsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Pools", name, None, opts)
        made = {APPS: self._apps(f"{name}-{APPS}", args)}
        if args.settings.provisioning == "pools":
            made |= {key: self._gpu(f"{name}-{key}", key, pool, args) for key, pool in args.pools.items()}
        self.names = {key: pool.name for key, pool in made.items()}
        self.register_outputs({"names": self.names})

    def _apps(self, name: str, args: PoolsArgs) -> containerservice.AgentPool:
        settings = args.settings
        immutable = (settings.apps_vm_size, settings.zones, CPU_OS_DISK_GIB, MAX_PODS)
        return containerservice.AgentPool(
            name,
            agent_pool_name=pool_name(APPS, *immutable),
            resource_group_name=args.place.group,
            resource_name_=args.cluster.name,
            mode="User",
            vm_size=settings.apps_vm_size,
            orchestrator_version=settings.kubernetes_version,
            os_type="Linux",
            os_sku="Ubuntu",
            os_disk_size_gb=CPU_OS_DISK_GIB,
            max_pods=MAX_PODS,
            availability_zones=list(settings.zones) or None,
            vnet_subnet_id=args.subnet_id,
            enable_auto_scaling=True,
            count=1,  # wanted by AKS although the autoscaler decides (#2943)
            min_count=1,
            max_count=settings.apps_max_nodes,
            node_labels={POOL_LABEL: APPS},
            upgrade_settings=containerservice.AgentPoolUpgradeSettingsArgs(
                max_surge="33%"  # the AKS documentation's value for production pools; such nodes are easy to get
            ),
            security_profile=containerservice.AgentPoolSecurityProfileArgs(enable_vtpm=True, enable_secure_boot=True),
            opts=self._options(args.cluster),
        )

    def _gpu(self, name: str, key: str, pool: GpuPool, args: PoolsArgs) -> containerservice.AgentPool:
        zones = pool_zones(pool, args.settings)
        # Quota of scarce sizes is rarely there for one more node, so nodes are upgraded in place, one at a time.
        # A spot pool never surges, and AKS refuses the setting.
        upgrades = containerservice.AgentPoolUpgradeSettingsArgs(max_surge="0", max_unavailable="1")
        # The driver that AKS builds is not signed, and secure boot would refuse it; the vTPM works without.
        measured = containerservice.AgentPoolSecurityProfileArgs(enable_vtpm=True, enable_secure_boot=False)
        return containerservice.AgentPool(
            name,
            agent_pool_name=pool_name(key, pool.vm_size, pool.spot, zones, pool.os_disk_gib, MAX_PODS),
            resource_group_name=args.place.group,
            resource_name_=args.cluster.name,
            mode="User",  # only such a pool can shrink to no nodes
            vm_size=pool.vm_size,
            orchestrator_version=args.settings.kubernetes_version,
            os_type="Linux",
            os_sku="Ubuntu",
            os_disk_size_gb=pool.os_disk_gib,  # stated: the default grows with the size and leaves no room beside it
            max_pods=MAX_PODS,
            availability_zones=list(zones) or None,
            vnet_subnet_id=args.subnet_id,
            enable_auto_scaling=True,
            count=pool.min_nodes,  # wanted by AKS although the autoscaler decides (#2943)
            min_count=pool.min_nodes,
            max_count=pool.max_nodes,
            node_labels=gpu_labels(key, pool),
            node_taints=[str(taint) for taint in gpu_taints(pool)],
            # AKS picks the driver that suits the size: CUDA, or GRID for the A10 sizes.
            gpu_profile=containerservice.GPUProfileArgs(driver="Install"),
            scale_set_priority="Spot" if pool.spot else None,
            scale_set_eviction_policy="Delete" if pool.spot else None,  # a deallocated node would keep its quota
            spot_max_price=-1 if pool.spot else None,  # up to the normal price: evicted for capacity, never for price
            upgrade_settings=None if pool.spot else upgrades,
            security_profile=None if pool.sku.quota_family in NO_TRUSTED_LAUNCH else measured,
            opts=self._options(args.cluster),
        )

    def _options(self, cluster: Cluster) -> pulumi.ResourceOptions:
        return pulumi.ResourceOptions(
            parent=self,
            depends_on=[cluster.resource],  # the control plane is upgraded first: nodes may not be newer
            ignore_changes=["count"],  # the autoscaler's
            # Else `destroy` drains them first, which the disruption budgets of what runs there forbid (AKS #2090).
            deleted_with=cluster.resource,
            # The provider would delete first whatever has a name of its own: replicas need the new pool to move to. The
            # name tells the two apart.
            delete_before_replace=False,
            # A GPU node takes up to 20 minutes to be ready; draining a pool on its way out may take longer.
            custom_timeouts=pulumi.CustomTimeouts(create="60m", update="120m", delete="60m"),
        )
