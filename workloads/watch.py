"""What watches an environment: the alerts and the dashboards of its settings, as Azure resources."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi

from infra.alerts import Alerts, AlertsArgs
from infra.dashboards import Dashboards, DashboardsArgs
from infra.place import Place
from infra.settings import Environment
from workloads.alerts import alerts
from workloads.dashboards import dashboards, usd_an_hour


@dataclass(frozen=True)
class WatchArgs:
    """`workspace_id` is that of the Azure Monitor workspace (metrics)."""

    place: Place
    env: Environment
    workspace_id: pulumi.Input[str]


class Watch(pulumi.ComponentResource):
    """Make it after the replicas: or alerts would be about what has yet to come, or is being destroyed."""

    def __init__(self, name: str, args: WatchArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Watch", name, None, opts)
        place, env, child = args.place, args.env, pulumi.ResourceOptions(parent=self)
        Alerts("alerts", AlertsArgs(place, env.alerts, args.workspace_id, alerts(env)), child)
        boards = dashboards(usd_an_hour(env, place.location))
        Dashboards("dashboards", DashboardsArgs(place, boards, args.workspace_id), child)
        self.register_outputs({})
