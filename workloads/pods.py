"""What every container and pod of ours has in common: no root, no writable root, no privilege, nothing injected."""

from __future__ import annotations

import pulumi
from pulumi_kubernetes import core, meta

USER = 10001  # the user of the images (see the Dockerfiles)
IDENTITY_LABEL = {"azure.workload.identity/use": "true"}  # the webhook of AKS adds token and variables to such pods
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"  # where every client looks for it
TOKEN_SECONDS = 3600


def pod_security() -> core.v1.PodSecurityContextArgs:
    """As the Pod Security standard `restricted` wants it."""
    return core.v1.PodSecurityContextArgs(
        run_as_non_root=True,
        run_as_user=USER,
        run_as_group=USER,
        fs_group=USER,  # emptyDir volumes belong to the user
        seccomp_profile=core.v1.SeccompProfileArgs(type="RuntimeDefault"),
    )


def container_security() -> core.v1.SecurityContextArgs:
    return core.v1.SecurityContextArgs(
        allow_privilege_escalation=False,
        read_only_root_filesystem=True,
        capabilities=core.v1.CapabilitiesArgs(drop=["ALL"]),
    )


def scratch(name: str, size: str | None = None) -> core.v1.VolumeArgs:
    """A folder on the node's disk that goes with the pod."""
    return core.v1.VolumeArgs(name=name, empty_dir=core.v1.EmptyDirVolumeSourceArgs(size_limit=size))


def shared_memory(size: str) -> core.v1.VolumeArgs:
    """/dev/shm: the runtime's 64 MB are too few for NCCL and for torch's workers; it counts as the pod's memory."""
    return core.v1.VolumeArgs(name="shm", empty_dir=core.v1.EmptyDirVolumeSourceArgs(medium="Memory", size_limit=size))


def config(name: str, config_map: pulumi.Input[str], *, optional: bool = False) -> core.v1.VolumeArgs:
    """A ConfigMap's entries as files; `optional`: an empty folder as long as there is no such ConfigMap."""
    source = core.v1.ConfigMapVolumeSourceArgs(name=config_map, optional=optional or None)
    return core.v1.VolumeArgs(name=name, config_map=source)


def api_token() -> core.v1.VolumeArgs:
    """What `automountServiceAccountToken` would give to every container, for the one that mounts it at `TOKEN`."""
    return core.v1.VolumeArgs(
        name="token",
        projected=core.v1.ProjectedVolumeSourceArgs(
            sources=[
                core.v1.VolumeProjectionArgs(
                    service_account_token=core.v1.ServiceAccountTokenProjectionArgs(
                        path="token", expiration_seconds=TOKEN_SECONDS
                    )
                ),
                core.v1.VolumeProjectionArgs(
                    config_map=core.v1.ConfigMapProjectionArgs(
                        name="kube-root-ca.crt", items=[core.v1.KeyToPathArgs(key="ca.crt", path="ca.crt")]
                    )
                ),
            ]
        ),
    )


def mount(name: str, path: str, *, read_only: bool = False) -> core.v1.VolumeMountArgs:
    return core.v1.VolumeMountArgs(name=name, mount_path=path, read_only=read_only or None)


def resources(
    *, cpu: str, memory: str, storage: str, gpus: int = 0, cpu_limit: str | None = None
) -> core.v1.ResourceRequirementsArgs:
    """Requests with limits: memory and disk equal, so that a surprise ends this pod alone; CPU up to `cpu_limit`.

    Every container states its disk: pods without a request are the first to go when a node's disk fills.
    """
    gpu = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return core.v1.ResourceRequirementsArgs(
        requests={"cpu": cpu, "memory": memory, "ephemeral-storage": storage, **gpu},
        limits={"cpu": cpu_limit or cpu, "memory": memory, "ephemeral-storage": storage, **gpu},
    )


def spread(labels: dict[str, str]) -> list[core.v1.TopologySpreadConstraintArgs]:
    """Over nodes and zones as far as there are any: a pod in a poor place is worth more than an even count."""
    return [
        core.v1.TopologySpreadConstraintArgs(
            max_skew=1,
            topology_key=key,
            when_unsatisfiable="ScheduleAnyway",
            label_selector=meta.v1.LabelSelectorArgs(match_labels=labels),
            match_label_keys=["pod-template-hash"],  # during a rollout, the pods on their way out do not count
        )
        for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
    ]


def one_a_node(labels: dict[str, str]) -> core.v1.AffinityArgs:
    """No two of the pods with these labels on one node."""
    term = core.v1.PodAffinityTermArgs(
        topology_key="kubernetes.io/hostname", label_selector=meta.v1.LabelSelectorArgs(match_labels=labels)
    )
    return core.v1.AffinityArgs(
        pod_anti_affinity=core.v1.PodAntiAffinityArgs(required_during_scheduling_ignored_during_execution=[term])
    )


def http_probe(
    path: str, port: int, *, period: int, failures: int, timeout: int = 5, delay: int | None = None
) -> core.v1.ProbeArgs:
    """A GET every `period` seconds; `failures` in a row count."""
    return core.v1.ProbeArgs(
        http_get=core.v1.HTTPGetActionArgs(path=path, port=port),
        period_seconds=period,
        failure_threshold=failures,
        timeout_seconds=timeout,
        initial_delay_seconds=delay,
    )
