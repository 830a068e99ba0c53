"""What all our Jobs have in common: their frame, names from their inputs, and which failures are worth another pod."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pulumi
from pulumi_kubernetes import batch, core, meta

from common import exits
from workloads.pods import IDENTITY_LABEL, pod_security

# Pulumi starts a Job and goes on. It does not wait for a deleted one either (pulumi-kubernetes #3154), so a Job that is
# made anew under its old name needs the old object to be gone at once: its pods may follow, and end in their own time.
ANNOTATIONS = {"pulumi.com/skipAwait": "true", "pulumi.com/deletionPropagationPolicy": "background"}

# The API server lets neither template nor failure policy change; the provider knows it of the template alone.
REPLACE_ON_CHANGES = ["spec.podFailurePolicy"]

JOB_LABEL = "batch.kubernetes.io/job-name"  # the Job controller puts it on every pod of a Job

INDEX = "JOB_COMPLETION_INDEX"  # the variable by which each of several pods of a Job knows its number

ROLE_WAIT_SECONDS = 900  # Azure needs minutes until a role just given counts


def inputs_hash(*inputs: str, length: int) -> str:
    """`length` hex digits of a hash over `inputs`, one after the other."""
    digest = hashlib.sha256()
    for text in inputs:
        digest.update(f"{len(text)}:{text}".encode())  # with lengths, or ("ab", "c") would be ("a", "bc")
    return digest.hexdigest()[:length]


def digest_of(image: str) -> str:
    """`sha256:...` of an image reference: what it holds, wherever it is kept. Raises ValueError for one by tag."""
    _, at, digest = image.partition("@")
    if not at:
        raise ValueError(
            f"{image}: an image is named by its digest, REPOSITORY@sha256:..., or a Job could change unseen"
        )
    return digest


def job(
    title: pulumi.Input[str],
    namespace: pulumi.Input[str],
    pod: core.v1.PodSpecArgs,
    *,
    labels: Mapping[str, str],
    retries: int,
    deadline_seconds: int,
    resource_name: str,
    annotations: Mapping[str, str] | None = None,
    pods: int = 1,
    equal: bool = False,
    identity: bool = True,
    suspend: bool | None = None,
    opts: pulumi.ResourceOptions,
) -> batch.v1.Job:
    """The Job `title` that runs `pod`; it and its pods have `labels`, its pods `annotations` and an Azure `identity`.

    Of several `pods`, all at once, each knows its number by `INDEX`. What number 0 comes to is what the
    Job comes to, and the others are ended with it; `equal` ones have no number, and all must end well. With `suspend`
    it has no pod until someone sets that to false; its deadline counts from then.
    """
    several: dict[str, Any] = {}
    marks = {**labels, **(IDENTITY_LABEL if identity else {})}
    if equal:
        several = {"completions": pods, "parallelism": pods}
    elif pods > 1:
        first = batch.v1.SuccessPolicyRuleArgs(succeeded_indexes="0")
        several = {
            "completions": pods,
            "parallelism": pods,
            "completion_mode": "Indexed",
            "success_policy": batch.v1.SuccessPolicyArgs(rules=[first]),
        }
    return batch.v1.Job(
        resource_name,
        metadata=meta.v1.ObjectMetaArgs(name=title, namespace=namespace, labels=labels, annotations=ANNOTATIONS),
        spec=batch.v1.JobSpecArgs(
            suspend=suspend,
            backoff_limit=retries,
            active_deadline_seconds=deadline_seconds,
            pod_failure_policy=failure_policy(),
            # The only one beside a failure policy. Two pods at once would also write the same checkpoints.
            pod_replacement_policy="Failed",
            **several,
            template=core.v1.PodTemplateSpecArgs(
                metadata=meta.v1.ObjectMetaArgs(labels=marks, annotations=annotations),
                spec=pod,
            ),
        ),
        # The new one has the old one's name: made first, it would be a conflict (a changed failure policy), or what is
        # deleted then (`pulumi up --target-replace`: seen, the Job was gone and no later `up` made it).
        opts=pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(delete_before_replace=True)),
    )


def job_pod(
    service_account: pulumi.Input[str],
    containers: Sequence[core.v1.ContainerArgs],
    volumes: Sequence[core.v1.VolumeArgs],
    *,
    node_selector: Mapping[str, str],
    init_containers: Sequence[core.v1.ContainerArgs] | None = None,
    tolerations: Sequence[core.v1.TolerationArgs] | None = None,
    grace_seconds: int | None = None,
    affinity: core.v1.AffinityArgs | None = None,
    subdomain: str | None = None,
) -> core.v1.PodSpecArgs:
    """A pod of a Job: its containers once, in turn and without privilege."""
    return core.v1.PodSpecArgs(
        restart_policy="Never",  # the failure policy looks at failed pods, not at restarted containers
        service_account_name=service_account,
        automount_service_account_token=False,
        enable_service_links=False,
        security_context=pod_security(),
        node_selector=node_selector,
        tolerations=tolerations,
        termination_grace_period_seconds=grace_seconds,
        affinity=affinity,
        subdomain=subdomain,
        init_containers=init_containers,
        containers=containers,
        volumes=volumes,
    )


def variables(values: Mapping[str, str]) -> list[core.v1.EnvVarArgs]:
    """Environment variables of a container."""
    return [core.v1.EnvVarArgs(name=name, value=value) for name, value in values.items()]


def failure_policy() -> batch.v1.PodFailurePolicyArgs:
    """The first rule that matches a failed pod decides; with none, its failure counts against `backoffLimit`.

    No rule names a container, so that all are meant: those that fetch, tune and evaluate. None ignores exit code 143 by
    itself: whoever takes a pod away from its node sets the condition, and a pod that stops because another one of its
    Job was told to does not end (`training.launch`). What is left is a container that something else sends SIGTERM:
    ignored, that would go on until the deadline.
    """
    disruption = batch.v1.PodFailurePolicyOnPodConditionsPatternArgs(type="DisruptionTarget", status="True")
    hopeless = batch.v1.PodFailurePolicyOnExitCodesRequirementArgs(operator="In", values=[exits.INPUT, exits.GATE])
    return batch.v1.PodFailurePolicyArgs(
        rules=[
            # Eviction, drain, preemption, a spot node taken away: another pod, and it does not count.
            batch.v1.PodFailurePolicyRuleArgs(action="Ignore", on_pod_conditions=[disruption]),
            # What only a person can mend, or a gate not passed: the same inputs would end the same way.
            batch.v1.PodFailurePolicyRuleArgs(action="FailJob", on_exit_codes=hopeless),
        ]
    )
