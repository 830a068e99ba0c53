"""Where metrics and logs go: Azure Monitor workspace for Prometheus, Log Analytics, managed Grafana over both."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
from pulumi_azure_native import dashboard, monitor, operationalinsights

from infra.place import Place
from infra.roles import GRAFANA_ADMIN, MONITORING_DATA_READER, grant

# kube-audit also has every read, many times the volume, and costs accordingly.
CLUSTER_LOGS = ("kube-audit-admin", "cluster-autoscaler", "guard")
GRAFANA_NAME_LIMIT = 23


@dataclass(frozen=True)
class ObservabilityArgs:
    """`retention_days` is that of the logs; Azure keeps the metrics 18 months at no price."""

    place: Place
    retention_days: int
    grafana: bool


class Observability(pulumi.ComponentResource):
    """The workspaces and the rules by which agents fill them. Public endpoints, by Entra identity only."""

    workspace_id: pulumi.Output[str]
    """Of the Azure Monitor workspace (metrics)."""
    query_endpoint: pulumi.Output[str]
    """PromQL over HTTPS."""
    rule_id: pulumi.Output[str]
    """Data collection rule of the metrics."""
    logs_rule_id: pulumi.Output[str]
    """Data collection rule of the containers' logs."""
    endpoint_id: pulumi.Output[str]
    """Data collection endpoint."""
    log_workspace_id: pulumi.Output[str]
    grafana_url: pulumi.Output[str] | None

    def __init__(self, name: str, args: ObservabilityArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Observability", name, None, opts)
        place, child = args.place, pulumi.ResourceOptions(parent=self)
        metrics = monitor.AzureMonitorWorkspace(
            f"{name}-metrics",
            azure_monitor_workspace_name=place.names.of("metrics"),
            resource_group_name=place.group,
            location=place.location,
            opts=pulumi.ResourceOptions(parent=self, protect=place.protect),
        )
        logs = operationalinsights.Workspace(
            f"{name}-logs",
            workspace_name=place.names.of("logs"),
            resource_group_name=place.group,
            location=place.location,
            sku=operationalinsights.WorkspaceSkuArgs(name="PerGB2018"),  # pay by volume: the only one new ones get
            retention_in_days=args.retention_days,
            features=operationalinsights.WorkspaceFeaturesArgs(disable_local_auth=True),  # no shared workspace keys
            opts=pulumi.ResourceOptions(parent=self, protect=place.protect),
        )
        endpoint = monitor.DataCollectionEndpoint(
            f"{name}-endpoint",
            data_collection_endpoint_name=place.names.of("collection"),
            resource_group_name=place.group,
            location=place.location,
            kind="Linux",
            network_acls=monitor.DataCollectionEndpointNetworkAclsArgs(public_network_access="Enabled"),
            opts=child,
        )
        rule = monitor.DataCollectionRule(
            f"{name}-prometheus",
            data_collection_rule_name=place.names.of("prometheus"),
            resource_group_name=place.group,
            location=place.location,
            kind="Linux",
            data_collection_endpoint_id=endpoint.id,
            data_sources=monitor.DataCollectionRuleDataSourcesArgs(
                prometheus_forwarder=[
                    monitor.PrometheusForwarderDataSourceArgs(
                        name="PrometheusDataSource", streams=["Microsoft-PrometheusMetrics"]
                    )
                ]
            ),
            destinations=monitor.DataCollectionRuleDestinationsArgs(
                monitoring_accounts=[
                    monitor.MonitoringAccountDestinationArgs(account_resource_id=metrics.id, name="metrics")
                ]
            ),
            data_flows=[monitor.DataFlowArgs(streams=["Microsoft-PrometheusMetrics"], destinations=["metrics"])],
            opts=child,
        )
        logs_rule = _container_logs(f"{name}-containers", place, logs.id, child)
        self.workspace_id = metrics.id
        self.query_endpoint = metrics.metrics.apply(lambda found: found.prometheus_query_endpoint)
        self.rule_id = rule.id
        self.logs_rule_id = logs_rule.id
        self.endpoint_id = endpoint.id
        self.log_workspace_id = logs.id
        self.grafana_url = self._grafana(f"{name}-grafana", place) if args.grafana else None
        self.register_outputs(
            {
                "workspace_id": self.workspace_id,
                "query_endpoint": self.query_endpoint,
                "rule_id": self.rule_id,
                "logs_rule_id": self.logs_rule_id,
                "endpoint_id": self.endpoint_id,
                "log_workspace_id": self.log_workspace_id,
                "grafana_url": self.grafana_url,
            }
        )

    def _grafana(self, name: str, place: Place) -> pulumi.Output[str]:
        """A managed Grafana over the metrics, administered by the environment's administrator. Returns its URL."""
        child = pulumi.ResourceOptions(parent=self)
        grafana = dashboard.Grafana(
            name,
            workspace_name=place.names.unique("gf", GRAFANA_NAME_LIMIT),
            resource_group_name=place.group,
            location=place.location,
            sku=dashboard.ResourceSkuArgs(name="Standard"),  # new workspaces get no other
            identity=dashboard.ManagedServiceIdentityArgs(type="SystemAssigned"),
            properties=dashboard.ManagedGrafanaPropertiesArgs(
                api_key="Disabled",  # people and services sign in with Entra
                public_network_access="Enabled",  # for people's browsers, who also sign in with Entra
                grafana_integrations=dashboard.GrafanaIntegrationsArgs(
                    azure_monitor_workspace_integrations=[
                        dashboard.AzureMonitorWorkspaceIntegrationArgs(
                            azure_monitor_workspace_resource_id=self.workspace_id
                        )
                    ]
                ),
            ),
            opts=child,
        )
        grant(
            f"{name}-reads-metrics",
            place,
            role=MONITORING_DATA_READER,
            scope=self.workspace_id,
            principal_id=grafana.identity.apply(lambda found: found.principal_id),
            key="grafana reads metrics",
            opts=child,
        )
        grant(
            f"{name}-admin",
            place,
            role=GRAFANA_ADMIN,
            scope=grafana.id,
            principal_id=place.admin_id,
            principal_type=place.admin_type,
            key="admin administers grafana",
            opts=child,
        )
        url: pulumi.Output[str] = grafana.properties.apply(lambda found: found.endpoint)
        return url


def _container_logs(
    name: str, place: Place, workspace_id: pulumi.Input[str], opts: pulumi.ResourceOptions
) -> monitor.DataCollectionRule:
    """What containers print and the events around them: all that is left of a tuning pod once it is gone."""
    streams = ["Microsoft-ContainerLogV2", "Microsoft-KubeEvents"]  # no inventory, no node metrics: Prometheus has them
    return monitor.DataCollectionRule(
        name,
        data_collection_rule_name=place.names.of("containers"),
        resource_group_name=place.group,
        location=place.location,
        kind="Linux",
        data_sources=monitor.DataCollectionRuleDataSourcesArgs(
            extensions=[
                monitor.ExtensionDataSourceArgs(
                    name="ContainerInsightsExtension",
                    extension_name="ContainerInsights",
                    streams=streams,
                    extension_settings={
                        "dataCollectionSettings": {
                            "interval": "1m",
                            "namespaceFilteringMode": "Exclude",
                            "namespaces": ["kube-system"],  # AKS's own pods, and most of the volume
                            "enableContainerLogV2": True,
                        }
                    },
                )
            ]
        ),
        destinations=monitor.DataCollectionRuleDestinationsArgs(
            log_analytics=[monitor.LogAnalyticsDestinationArgs(workspace_resource_id=workspace_id, name="logs")]
        ),
        data_flows=[monitor.DataFlowArgs(streams=streams, destinations=["logs"])],
        opts=opts,
    )


@dataclass(frozen=True)
class ClusterMonitoringArgs:
    place: Place
    cluster_id: pulumi.Input[str]
    observability: Observability


class ClusterMonitoring(pulumi.ComponentResource):
    """Ties a cluster to the rules: which metrics and logs its agents send, and where the control plane's logs go."""

    def __init__(self, name: str, args: ClusterMonitoringArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:ClusterMonitoring", name, None, opts)
        found, child = args.observability, pulumi.ResourceOptions(parent=self)
        monitor.DataCollectionRuleAssociation(
            f"{name}-prometheus",
            association_name="MSProm",
            resource_uri=args.cluster_id,
            data_collection_rule_id=found.rule_id,
            opts=child,
        )
        monitor.DataCollectionRuleAssociation(
            f"{name}-containers",
            association_name="ContainerInsightsExtension",
            resource_uri=args.cluster_id,
            data_collection_rule_id=found.logs_rule_id,
            opts=child,
        )
        monitor.DataCollectionRuleAssociation(
            f"{name}-endpoint",
            association_name="configurationAccessEndpoint",  # Azure's own name: an endpoint is found by no other
            resource_uri=args.cluster_id,
            data_collection_endpoint_id=found.endpoint_id,
            opts=child,
        )
        monitor.DiagnosticSetting(
            f"{name}-control-plane",
            name="control-plane",
            resource_uri=args.cluster_id,
            workspace_id=found.log_workspace_id,
            log_analytics_destination_type="Dedicated",  # a table each, with columns, instead of AzureDiagnostics
            logs=[monitor.DiagnosticsLogSettingsArgs(category=category, enabled=True) for category in CLUSTER_LOGS],
            opts=child,
        )
        self.register_outputs({})
