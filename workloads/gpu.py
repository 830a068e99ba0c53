"""NVIDIA's device plugin: without it a GPU node has no `nvidia.com/gpu` to ask for. AKS installs the driver alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pulumi
from pulumi_kubernetes import apps, core, meta

from infra.pools import GPU_TAINT, POOL_LABEL, SPOT_TAINT
from workloads.placement import tolerations
from workloads.pods import container_security, mount, resources

# The repository below the registry's cache rules; the digest is that of the index for all architectures.
REPOSITORY = "nvidia/k8s-device-plugin:v0.20.0@sha256:a61ba9fd8efb82f3a79f877f7580e02c1e8e7593f62473644bc9c79e315c3312"
NAME = "nvidia-device-plugin"
SOCKETS = "/var/lib/kubelet/device-plugins"  # where the kubelet listens, and looks for the plugin's own socket


@dataclass(frozen=True)
class DevicePluginArgs:
    """`cache` is where the registry caches repositories, such as HOST/cache; `pools` are the names of GPU pools."""

    namespace: pulumi.Input[str]
    cache: pulumi.Input[str]
    pools: Sequence[str]


class DevicePlugin(pulumi.ComponentResource):
    """A DaemonSet on the nodes of our GPU pools, by NVIDIA's published manifest (deployments/static in its repository).

    Where it differs: our taints and pools, limits, a read-only root, and that a node whose driver does not answer shows
    as a failing pod, where the manifest's plugin would run on and offer nothing.
    """

    def __init__(self, name: str, args: DevicePluginArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:DevicePlugin", name, None, opts)
        labels = {"app": NAME}
        container = core.v1.ContainerArgs(
            name=NAME,
            image=pulumi.Output.concat(args.cache, "/", REPOSITORY),
            env=[core.v1.EnvVarArgs(name="FAIL_ON_INIT_ERROR", value="true")],
            security_context=container_security(),
            resources=resources(cpu="50m", memory="128Mi", storage="64Mi", cpu_limit="500m"),
            volume_mounts=[mount("sockets", SOCKETS)],
        )
        apps.v1.DaemonSet(
            name,
            metadata=meta.v1.ObjectMetaArgs(name=NAME, namespace=args.namespace, labels=labels),
            spec=apps.v1.DaemonSetSpecArgs(
                selector=meta.v1.LabelSelectorArgs(match_labels=labels),
                template=core.v1.PodTemplateSpecArgs(
                    metadata=meta.v1.ObjectMetaArgs(labels=labels),
                    # As the manifest has it: the last to be evicted, since no GPU pod can start without it.
                    spec=node_pod(
                        args.pools, container, [host_folder("sockets", SOCKETS)], priority="system-node-critical"
                    ),
                ),
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.register_outputs({})


def node_pod(
    pools: Sequence[str],
    container: core.v1.ContainerArgs,
    volumes: list[core.v1.VolumeArgs],
    *,
    priority: str | None = None,
) -> core.v1.PodSpecArgs:
    """The pod of a DaemonSet on the nodes of `pools`: root, as the kubelet's folders are root's, and nothing more."""
    return core.v1.PodSpecArgs(
        priority_class_name=priority,
        security_context=core.v1.PodSecurityContextArgs(
            seccomp_profile=core.v1.SeccompProfileArgs(type="RuntimeDefault")
        ),
        automount_service_account_token=False,
        enable_service_links=False,
        affinity=_on_pools(pools),
        tolerations=tolerations(GPU_TAINT, SPOT_TAINT),
        containers=[container],
        volumes=volumes,
    )


def host_folder(name: str, path: str) -> core.v1.VolumeArgs:
    """A folder of the node, which must be there."""
    return core.v1.VolumeArgs(name=name, host_path=core.v1.HostPathVolumeSourceArgs(path=path, type="Directory"))


def _on_pools(pools: Sequence[str]) -> core.v1.AffinityArgs:
    """A node selector takes one value of a label; an affinity takes any of several."""
    ours = core.v1.NodeSelectorRequirementArgs(key=POOL_LABEL, operator="In", values=list(pools))
    return core.v1.AffinityArgs(
        node_affinity=core.v1.NodeAffinityArgs(
            required_during_scheduling_ignored_during_execution=core.v1.NodeSelectorArgs(
                node_selector_terms=[core.v1.NodeSelectorTermArgs(match_expressions=[ours])]
            )
        )
    )
