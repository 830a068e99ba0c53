"""What GPUs do and how they are: NVIDIA's dcgm-exporter on every GPU node, read by managed Prometheus."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pulumi
from pulumi_kubernetes import apps, core, meta

from workloads.gpu import host_folder, node_pod
from workloads.metrics import GPU_PORT
from workloads.pods import config, container_security, http_probe, mount, resources, scratch
from workloads.policies import ingress_scrape, network_policy

# The repository below the registry's cache rules; the digest is that of the index for all architectures, as NVIDIA's
# GPU Operator v26.3.3 names it. Of this version the source was read: names, labels and rights below are by it.
REPOSITORY = (
    "nvidia/dcgm-exporter:4.5.3-4.8.2-distroless"
    "@sha256:60d3b00ac80b4ae77f94dae2f943685605585ad9e92fdccda3154d009ae317cc"
)
NAME = "dcgm-exporter"
PORT = 9400
POD_RESOURCES = "/var/lib/kubelet/pod-resources"  # where the kubelet says which GPU it gave to which pod
COUNTERS_FOLDER = "/etc/counters"
INTERVAL_MS = 15_000  # as often as Prometheus asks

COUNTERS = (
    ("DCGM_FI_DEV_GPU_UTIL", "Share of the time in which a kernel ran (in %)."),
    ("DCGM_FI_DEV_FB_USED", "Memory in use (in MiB)."),
    ("DCGM_FI_DEV_GPU_TEMP", "Temperature (in C)."),
    ("DCGM_FI_DEV_POWER_USAGE", "Power drawn (in W)."),
    ("DCGM_EXP_XID_ERRORS_COUNT", "Xid errors of the last five minutes by xid."),
    ("DCGM_EXP_CLOCK_EVENTS_COUNT", "Samples of the last five minutes with slowed clocks by clock_event."),
    ("DCGM_FI_DEV_ROW_REMAP_FAILURE", "Whether a broken row of the memory could not be replaced."),
    ("DCGM_FI_DEV_ROW_REMAP_PENDING", "Whether a broken row waits for a reset to be replaced."),
    ("DCGM_FI_DEV_RETIRED_PENDING", "Broken pages that wait for a reset (T4)."),
)
"""What dashboards and alerts ask, and no more. What a GPU does not have, it leaves out.

None is of the profiling kind (`DCGM_FI_PROF_*`), which would need the capability SYS_ADMIN and shuts profilers out.
"""
SLOWED = 'clock_event=~"hw_slowdown|hw_thermal|hw_power_brake|sw_thermal"'
"""Of the clock events those that nobody asked for; the others are idleness, and caps that belong to the product."""
PROGRAMS_XIDS = "13|31|43|45|68|109"
"""Xid errors that are a program's own, the GPU being well: those at which NVIDIA's device plugin keeps it too."""


def counters_file() -> str:
    """In the exporter's own format: field, type for Prometheus, help; neither may hold a comma."""
    return "".join(f"{name}, gauge, {told}\n" for name, told in COUNTERS)


@dataclass(frozen=True)
class GpuMetricsArgs:
    """`cache` is where the registry caches repositories, such as HOST/cache; `pools` are the names of GPU pools."""

    namespace: pulumi.Input[str]
    cache: pulumi.Input[str]
    pools: Sequence[str]


class GpuMetrics(pulumi.ComponentResource):
    """A DaemonSet on the nodes of our GPU pools. It asks for no GPU: on GPU nodes, AKS's default runtime is NVIDIA's,
    which gives this image all of them (its NVIDIA_VISIBLE_DEVICES) beside whoever has them.

    Root, as the kubelet's socket is root's, but without any capability. Pods are told by name and namespace; their
    labels would take the right to read all pods. Of a pod's init containers the kubelet says nothing: of a tuning pod
    it names the GPU of the evaluation, which the training has before; its further ones show as nobody's.
    """

    def __init__(self, name: str, args: GpuMetricsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:GpuMetrics", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        labels, counters = {"app": NAME}, counters_file()
        listed = core.v1.ConfigMap(
            f"{name}-counters",
            metadata=meta.v1.ObjectMetaArgs(
                name=f"{NAME}-{hashlib.sha256(counters.encode()).hexdigest()[:10]}", namespace=args.namespace
            ),
            data={"counters.csv": counters},
            immutable=True,
            opts=child,
        )
        network_policy(
            NAME,
            args.namespace,
            labels=labels,
            ingress=[ingress_scrape(PORT)],
            resource_name=f"{name}-network",
            opts=child,
        )
        environment = {
            "DCGM_EXPORTER_COLLECTORS": f"{COUNTERS_FOLDER}/counters.csv",
            "DCGM_EXPORTER_INTERVAL": str(INTERVAL_MS),
            "DCGM_EXPORTER_KUBERNETES": "true",
            "DCGM_EXPORTER_LISTEN": f":{PORT}",
            "DCGM_EXPORTER_NO_HOSTNAME": "true",  # the pod's; the node's is a label of the scrape
        }
        container = core.v1.ContainerArgs(
            name=NAME,
            image=pulumi.Output.concat(args.cache, "/", REPOSITORY),
            env=[core.v1.EnvVarArgs(name=key, value=value) for key, value in environment.items()],
            ports=[core.v1.ContainerPortArgs(name=GPU_PORT, container_port=PORT)],
            security_context=container_security(),
            # Memory: what NVIDIA's chart allows.
            resources=resources(cpu="50m", memory="512Mi", storage="64Mi", cpu_limit="500m"),
            liveness_probe=http_probe("/health", PORT, period=10, failures=6, delay=45),
            volume_mounts=[
                mount("pod-resources", POD_RESOURCES, read_only=True),
                mount("counters", COUNTERS_FOLDER, read_only=True),
                # DCGM's library was made for a root that can be written.
                mount("scratch", "/tmp"),
                mount("scratch", "/var/log"),
            ],
        )
        apps.v1.DaemonSet(
            name,
            metadata=meta.v1.ObjectMetaArgs(
                name=NAME,
                namespace=args.namespace,
                labels=labels,
                annotations={"pulumi.com/skipAwait": "true"},  # no update fails for want of a measurement
            ),
            spec=apps.v1.DaemonSetSpecArgs(
                selector=meta.v1.LabelSelectorArgs(match_labels=labels),
                template=core.v1.PodTemplateSpecArgs(
                    metadata=meta.v1.ObjectMetaArgs(labels=labels),
                    # Of no priority, unlike the device plugin: no replica may go to make room for a measurement.
                    spec=node_pod(
                        args.pools,
                        container,
                        [
                            host_folder("pod-resources", POD_RESOURCES),
                            config("counters", listed.metadata.apply(lambda made: str(made.name))),
                            scratch("scratch"),
                        ],
                    ),
                ),
            ),
            opts=child,
        )
        self.register_outputs({})
