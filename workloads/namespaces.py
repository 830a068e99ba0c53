"""A namespace and what holds for everything in it: as whom pods run, on how many GPUs, and that nothing is open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pulumi
from pulumi_kubernetes import core, meta

from workloads.policies import egress_dns, network_policy

TUNING = "drydock-tuning"
SERVING = "drydock-serving"
GPU = "drydock-gpu"

# Far above what we run (replicas, router, Jobs with their retries): it stops a loop that makes pods, nothing else.
MAX_PODS = 200


@dataclass(frozen=True)
class NamespaceArgs:
    """What one namespace allows.

    `gpus` is the most GPUs that its pods may ask for together: those of the largest pool it runs on. A Job beyond it is
    not lost: the Job controller tries to make the pod again, with growing pauses, until a GPU of the quota is free.
    `service_accounts` are names with the client ID of the Azure identity that each stands for.
    """

    name: str
    pod_security: Literal["restricted", "baseline", "privileged"]
    gpus: int
    service_accounts: Mapping[str, pulumi.Input[str]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


class Namespace(pulumi.ComponentResource):
    """Namespace, quota, service accounts, and the default: nothing in, nothing out but name resolution.

    `name` and `service_accounts` (by name) are outputs: what is made with them waits until they are there.
    """

    name: pulumi.Output[str]
    service_accounts: dict[str, pulumi.Output[str]]

    def __init__(self, name: str, args: NamespaceArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Namespace", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        levels = ("enforce", "warn", "audit")
        namespace = core.v1.Namespace(
            name,
            metadata=meta.v1.ObjectMetaArgs(
                name=args.name,
                labels={
                    **args.labels,
                    **{f"pod-security.kubernetes.io/{level}": args.pod_security for level in levels},
                },
            ),
            opts=child,
        )
        place = namespace.metadata.name

        network_policy(
            "default-deny", place, labels={}, egress=[egress_dns()], resource_name=f"{name}-default-deny", opts=child
        )
        core.v1.ResourceQuota(
            f"{name}-quota",
            metadata=meta.v1.ObjectMetaArgs(name="quota", namespace=place),
            # No CPU or memory: a quota on them refuses every pod that does not state them, such as a debugging pod.
            spec=core.v1.ResourceQuotaSpecArgs(
                hard={"requests.nvidia.com/gpu": str(args.gpus), "pods": str(MAX_PODS)},
            ),
            opts=child,
        )
        accounts = {
            account: core.v1.ServiceAccount(
                f"{name}-{account}",
                metadata=meta.v1.ObjectMetaArgs(
                    name=account,
                    namespace=place,
                    annotations={"azure.workload.identity/client-id": client_id},
                ),
                automount_service_account_token=False,  # workload identity projects a token of its own
                opts=child,
            )
            for account, client_id in args.service_accounts.items()
        }

        self.name = place
        self.service_accounts = {account: resource.metadata.name for account, resource in accounts.items()}
        self.register_outputs({"name": self.name, "service_accounts": self.service_accounts})
