"""What all our Jobs have in common: names that follow from their inputs, and which failures are worth another pod."""

from __future__ import annotations

import hashlib

from pulumi_kubernetes import batch

from common import exits

# Pulumi starts a Job and goes on. It does not wait for a deleted one either (pulumi-kubernetes #3154), so a Job that is
# made anew under its old name needs the old object to be gone at once: its pods may follow, and end in their own time.
ANNOTATIONS = {"pulumi.com/skipAwait": "true", "pulumi.com/deletionPropagationPolicy": "background"}

# The API server lets neither template nor failure policy change; the provider knows it of the template alone.
REPLACE_ON_CHANGES = ["spec.podFailurePolicy"]


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


def failure_policy() -> batch.v1.PodFailurePolicyArgs:
    """The first rule that matches a failed pod decides; with none, its failure counts against `backoffLimit`.

    No rule names a container, so that all are meant: those that fetch, tune and evaluate.
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
