"""The CrossGuard pack: `pulumi preview --policy-pack policy` holds every resource against the rules."""

from __future__ import annotations

from pulumi_policy import (
    EnforcementLevel,
    PolicyPack,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
)
from rules import RULES, Rule  # Pulumi runs the pack with its own folder as the place to import from


def _policy(name: str, rule: Rule) -> ResourceValidationPolicy:
    def validate(args: ResourceValidationArgs, report_violation: ReportViolation) -> None:
        for said in rule(args.resource_type, args.props):
            report_violation(f"{args.name}: {said}", None)

    return ResourceValidationPolicy(name=name, description=(rule.__doc__ or name).strip(), validate=validate)


PolicyPack(
    name="drydock",
    enforcement_level=EnforcementLevel.MANDATORY,
    policies=[_policy(name, rule) for name, rule in RULES.items()],
)
