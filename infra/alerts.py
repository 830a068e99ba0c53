"""Alerts of an environment: Prometheus rules that Azure Monitor evaluates over its metrics, and whom they tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pulumi
import yaml
from pulumi_azure_native import alertsmanagement

from infra.place import Place
from infra.settings import Alerts as AlertSettings

RUNBOOKS = "docs/runbooks"  # one file an alert
RULES_A_GROUP = 20  # Azure takes no more
INTERVAL_MINUTES = 1  # the shortest that Azure takes


@dataclass(frozen=True)
class Alert:
    """`expression` (PromQL) must give a series for `minutes` before it fires, once for each series that it gives.

    `severity` is Azure's: 0 wakes somebody, 1 is for the working day's first hour, 2 for its end, 3 to be read.
    `summary` is a template of Prometheus over the series: `{{ $labels.adapter }}`, `{{ $value }}`.
    """

    name: str
    expression: str
    minutes: int
    severity: Literal[0, 1, 2, 3]
    summary: str

    @property
    def runbook(self) -> str:
        """What to do, as a file of the repository: `docs/runbooks/gate-failed.md` for `GateFailed`."""
        return f"{RUNBOOKS}/{re.sub(r'(?<!^)(?=[A-Z])', '-', self.name).lower()}.md"

    def annotations(self, runbooks: str | None) -> dict[str, str]:
        """`runbooks`: the address of the repository's docs/runbooks, if there is one."""
        return {
            "summary": self.summary,
            "runbook_url": self.runbook.replace(RUNBOOKS, runbooks.rstrip("/")) if runbooks else self.runbook,
        }


def rules_file(alerts: Sequence[Alert], runbooks: str | None = None) -> str:
    """The same rules in Prometheus's own format, for promtool or for a Prometheus outside Azure."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": f"{alert.minutes}m",
            "labels": {"severity": str(alert.severity)},
            "annotations": alert.annotations(runbooks),
        }
        for alert in alerts
    ]
    group: dict[str, Any] = {"name": "drydock", "interval": f"{INTERVAL_MINUTES}m", "rules": rules}
    return yaml.safe_dump({"groups": [group]}, sort_keys=False, width=1000)


@dataclass(frozen=True)
class AlertsArgs:
    """`workspace_id` is that of the Azure Monitor workspace (metrics)."""

    place: Place
    settings: AlertSettings
    workspace_id: pulumi.Input[str]
    alerts: Sequence[Alert]


class Alerts(pulumi.ComponentResource):
    """The rule groups. The workspace holds the metrics of one cluster, so no rule says which."""

    def __init__(self, name: str, args: AlertsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Alerts", name, None, opts)
        for start in range(0, len(args.alerts), RULES_A_GROUP):
            number = start // RULES_A_GROUP + 1
            alertsmanagement.PrometheusRuleGroup(
                f"{name}-{number}",
                rule_group_name=args.place.names.of(f"alerts-{number}"),
                resource_group_name=args.place.group,
                location=args.place.location,
                scopes=[args.workspace_id],
                interval=f"PT{INTERVAL_MINUTES}M",
                enabled=True,
                rules=[_rule(alert, args.settings) for alert in args.alerts[start : start + RULES_A_GROUP]],
                opts=pulumi.ResourceOptions(parent=self),
            )
        self.register_outputs({})


def _rule(alert: Alert, settings: AlertSettings) -> alertsmanagement.PrometheusRuleArgs:
    told = [alertsmanagement.PrometheusRuleGroupActionArgs(action_group_id=settings.action_group_id)]
    return alertsmanagement.PrometheusRuleArgs(
        alert=alert.name,
        enabled=True,
        expression=alert.expression,
        for_=f"PT{alert.minutes}M" if alert.minutes else None,
        severity=alert.severity,
        annotations=alert.annotations(settings.runbooks),
        actions=told if settings.action_group_id else None,
        # Otherwise an alert stays fired in Azure until somebody closes it.
        resolve_configuration=alertsmanagement.PrometheusRuleResolveConfigurationArgs(
            auto_resolved=True, time_to_resolve="PT10M"
        ),
    )
