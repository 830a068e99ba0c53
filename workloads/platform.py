"""What the cluster needs before anything runs in it: the way in, namespaces, GPUs, nodes to order, metrics."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi

from infra.cluster import Cluster
from infra.identities import Identities
from infra.kubeconfig import check_kubelogin
from infra.place import Place
from infra.pools import Pools
from infra.registry import Registry
from infra.settings import Environment
from workloads.gpu import DevicePlugin, DevicePluginArgs
from workloads.gpu_metrics import GpuMetrics, GpuMetricsArgs
from workloads.lifetime import end_with
from workloads.metrics import Metrics, MetricsArgs
from workloads.namespaces import GPU, SERVING, TUNING, Namespace, NamespaceArgs
from workloads.provider import cluster_provider
from workloads.provisioning import NodeProvisioning, NodeProvisioningArgs


@dataclass(frozen=True)
class PlatformArgs:
    place: Place
    env: Environment
    cluster: Cluster
    pools: Pools
    registry: Registry
    identities: Identities


class Platform(pulumi.ComponentResource):
    """The prepared cluster. `inside` are the options with which everything in it is made."""

    inside: pulumi.ResourceOptions
    tuning: Namespace
    serving: Namespace

    def __init__(self, name: str, args: PlatformArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Platform", name, None, opts)
        if missing := check_kubelogin():
            raise pulumi.RunError(missing)
        env, identities = args.env, args.identities
        provider = cluster_provider(
            f"{name}-provider",
            kubeconfig=args.cluster.kubeconfig,
            identifier=args.place.names.of("aks"),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[args.pools]),
        )
        end_with(args.cluster.resource)
        self.inside = pulumi.ResourceOptions(provider=provider)
        child = pulumi.ResourceOptions(parent=self, provider=provider)

        gpus = {pool: settings.max_nodes * settings.sku.gpus for pool, settings in env.pools.items()}
        self.tuning = Namespace(
            "tuning",
            NamespaceArgs(
                TUNING, "restricted", gpus[env.tuning.pool],
                {"tuning": identities.tuning.client_id, "mirror": identities.mirror.client_id},
            ),
            child,
        )  # fmt: skip
        self.serving = Namespace(
            "serving",
            # One replica more than there are: one on its way out still counts, and would keep the one that follows out.
            # And one for the Job that compiles, as long as it waits for a GPU.
            NamespaceArgs(
                SERVING, "restricted", gpus[env.serving.pool] + (1 + env.compiles) * env.serving.gpus,
                {
                    "serving": identities.serving.client_id, "stress": identities.stress.client_id,
                    "compiler": identities.compiler.client_id,
                },
            ),
            child,
        )  # fmt: skip
        system = Namespace("gpu", NamespaceArgs(GPU, "privileged", 0), child)
        DevicePlugin("device-plugin", DevicePluginArgs(system.name, args.registry.cache_prefix, list(env.pools)), child)
        if env.cluster.gpu_metrics:
            GpuMetrics("gpu-metrics", GpuMetricsArgs(system.name, args.registry.cache_prefix, list(env.pools)), child)
        if env.cluster.provisioning == "automatic":
            NodeProvisioning("nodes", NodeProvisioningArgs(env.pools, env.cluster.zones, args.place.location), child)
        Metrics("metrics", MetricsArgs((TUNING, SERVING, GPU)), child)
        self.register_outputs({})
