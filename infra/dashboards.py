"""Grafana dashboards as Azure resources: in the portal under Monitor, "Dashboards with Grafana", at no price.

Dashboards of a managed Grafana are its own data, which Azure Resource Manager does not know: there they are imported
(python -m workloads.dashboards), or copied from the portal. These need no managed Grafana, and ask the same managed
Prometheus, as whoever looks at them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pulumi
from pulumi_azure_native import dashboard

from infra.place import Place
from infra.roles import MONITORING_DATA_READER, grant


@dataclass(frozen=True)
class DashboardsArgs:
    """`boards`: Grafana's JSON by name. `workspace_id` is that of the Azure Monitor workspace (metrics)."""

    place: Place
    boards: Mapping[str, Mapping[str, Any]]
    workspace_id: pulumi.Input[str]


class Dashboards(pulumi.ComponentResource):
    """The dashboards, and the right of the environment's administrator to what they ask."""

    def __init__(self, name: str, args: DashboardsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Dashboards", name, None, opts)
        place, child = args.place, pulumi.ResourceOptions(parent=self)
        for title, board in args.boards.items():
            made = dashboard.Dashboard(
                f"{name}-{title}",
                dashboard_name=place.names.of(title),
                resource_group_name=place.group,
                location=place.location,
                tags={"GrafanaDashboardTags": ",".join(board["tags"])},  # by which the portal's list is searched
                opts=child,
            )
            dashboard.DashboardDefinition(
                f"{name}-{title}-definition",
                definition_name="default",  # the only one that the portal shows
                dashboard_name=made.name,
                resource_group_name=place.group,
                properties=dashboard.DashboardDefinitionPropertiesArgs(
                    serialized_data=json.dumps(board, separators=(",", ":"), sort_keys=True)
                ),
                opts=child,
            )
        grant(
            f"{name}-admin-reads-metrics",
            place,
            role=MONITORING_DATA_READER,
            scope=args.workspace_id,
            principal_id=place.admin_id,
            principal_type=place.admin_type,
            key="admin reads metrics",
            opts=child,
        )
        self.register_outputs({})
