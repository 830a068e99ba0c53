"""Workspaces, rules and their ties to the cluster as Azure gets them."""

from __future__ import annotations

import json
from typing import Any

import pulumi
import pytest

from infra.alerts import RULES_A_GROUP, Alert, Alerts, AlertsArgs
from infra.dashboards import Dashboards, DashboardsArgs
from infra.observability import ClusterMonitoring, ClusterMonitoringArgs, Observability, ObservabilityArgs
from infra.roles import GRAFANA_ADMIN, MONITORING_DATA_READER
from infra.settings import Alerts as AlertSettings
from tests.unit.pulumi_mocks import ADMIN, Recorder, place
from tests.unit.registrations import Request, deploy_with_requests, orphans

CLUSTER = "/subscriptions/0/managedClusters/aks"
WORKSPACE = "/subscriptions/0/accounts/metrics"
ON_CALL = "/subscriptions/0/resourceGroups/ops/providers/Microsoft.Insights/actionGroups/on-call"


def made(*, grafana: bool = True, protect: bool = True) -> tuple[Recorder, dict[tuple[str, str], Request], list[Any]]:
    found: list[Any] = []

    def program() -> pulumi.Output[None]:
        where = place(protect=protect)
        observability = Observability("observability", ObservabilityArgs(where, 45, grafana))
        ClusterMonitoring("monitoring", ClusterMonitoringArgs(where, CLUSTER, observability))
        outputs = (observability.query_endpoint, observability.grafana_url)
        return pulumi.Output.all(*outputs).apply(found.extend)

    seen, requests = deploy_with_requests(program)
    return seen, requests, found


def test_metrics_flow_from_the_cluster_to_the_workspace() -> None:
    seen, _, found = made()
    assert found[0] == "https://prometheus.example"
    rule = seen.one(":DataCollectionRule", "observability-prometheus").inputs
    assert rule["dataSources"]["prometheusForwarder"][0]["streams"] == ["Microsoft-PrometheusMetrics"]
    (account,) = rule["destinations"]["monitoringAccounts"]
    assert account["accountResourceId"].endswith("AzureMonitorWorkspace/observability-metrics")
    assert rule["dataFlows"] == [{"streams": ["Microsoft-PrometheusMetrics"], "destinations": [account["name"]]}]
    assert rule["dataCollectionEndpointId"].endswith("DataCollectionEndpoint/observability-endpoint")
    tie = seen.one(":DataCollectionRuleAssociation", "monitoring-prometheus").inputs
    assert tie["resourceUri"] == CLUSTER
    assert tie["dataCollectionRuleId"].endswith("DataCollectionRule/observability-prometheus")


def test_what_containers_print_is_kept() -> None:
    seen, _, _ = made()
    rule = seen.one(":DataCollectionRule", "observability-containers").inputs
    (extension,) = rule["dataSources"]["extensions"]
    assert extension["extensionName"] == "ContainerInsights"
    assert "Microsoft-ContainerLogV2" in extension["streams"]
    # Inside `extension_settings` the SDK renames nothing, so these are Azure's own spellings.
    assert extension["extensionSettings"]["dataCollectionSettings"]["enableContainerLogV2"] is True
    (logs,) = rule["destinations"]["logAnalytics"]
    assert rule["dataFlows"] == [{"streams": extension["streams"], "destinations": [logs["name"]]}]
    tie = seen.one(":DataCollectionRuleAssociation", "monitoring-containers").inputs
    assert tie["dataCollectionRuleId"].endswith("DataCollectionRule/observability-containers")


def test_the_endpoint_is_tied_under_azures_own_name() -> None:
    tie = made()[0].one(":DataCollectionRuleAssociation", "monitoring-endpoint").inputs
    assert tie["associationName"] == "configurationAccessEndpoint"
    assert tie["dataCollectionEndpointId"].endswith("DataCollectionEndpoint/observability-endpoint")
    assert "dataCollectionRuleId" not in tie


def test_logs_of_the_control_plane() -> None:
    sent = made()[0].one(":DiagnosticSetting").inputs
    assert sent["resourceUri"] == CLUSTER
    assert sent["workspaceId"].endswith("Workspace/observability-logs")
    assert {(item["category"], item["enabled"]) for item in sent["logs"]} == {
        ("kube-audit-admin", True),
        ("cluster-autoscaler", True),
        ("guard", True),
    }


def test_log_workspace_keeps_as_long_as_told_and_has_no_keys() -> None:
    sent = made()[0].one(":Workspace").inputs
    assert sent["retentionInDays"] == 45
    assert sent["features"] == {"disableLocalAuth": True}


def test_grafana_reads_metrics_and_has_an_administrator() -> None:
    seen, _, found = made()
    assert found[1] == "https://grafana.example"
    sent = seen.one(":Grafana").inputs
    assert len(sent["workspaceName"]) <= 23
    assert sent["identity"] == {"type": "SystemAssigned"}
    assert sent["properties"]["apiKey"] == "Disabled"
    reads = seen.one(":RoleAssignment", "observability-grafana-reads-metrics").inputs
    assert reads["roleDefinitionId"].endswith(MONITORING_DATA_READER)
    assert reads["scope"].endswith("AzureMonitorWorkspace/observability-metrics")
    assert reads["principalType"] == "ServicePrincipal"
    admin = seen.one(":RoleAssignment", "observability-grafana-admin").inputs
    assert admin["roleDefinitionId"].endswith(GRAFANA_ADMIN)
    assert admin["principalId"] == ADMIN != reads["principalId"]


def test_no_grafana_where_none_is_wanted() -> None:
    seen, _, found = made(grafana=False)
    assert not seen.of(":Grafana") and not seen.of(":RoleAssignment")
    assert found[1] is None


@pytest.mark.parametrize("protect", [True, False])
def test_what_holds_data_is_protected(protect: bool) -> None:
    _, requests, _ = made(protect=protect)
    protected = {name for (_, name), request in requests.items() if request.protect}
    assert protected == ({"observability-metrics", "observability-logs"} if protect else set())
    own = {key: request for key, request in requests.items() if key[1].startswith("observability")}
    ties = {key: request for key, request in requests.items() if key[1].startswith("monitoring")}
    assert orphans(own, "Observability") == [] and orphans(ties, "ClusterMonitoring") == []


def alert(name: str, minutes: int = 5) -> Alert:
    return Alert(name, "up == 0", minutes, 1, "{{ $labels.instance }} is down")


def told(*alerts: Alert, **settings: str) -> tuple[Recorder, dict[tuple[str, str], Request]]:
    def program() -> None:
        Alerts("alerts", AlertsArgs(place(), AlertSettings(**settings), WORKSPACE, alerts))

    return deploy_with_requests(program)


def test_an_alert_is_a_rule_over_the_workspace_and_names_its_runbook() -> None:
    seen, requests = told(alert("GateFailed", 0), alert("Down"))
    group = seen.one(":PrometheusRuleGroup").inputs
    assert (group["scopes"], group["interval"], group["enabled"]) == ([WORKSPACE], "PT1M", True)
    first, second = group["rules"]
    assert (first["alert"], first["expression"], first["severity"]) == ("GateFailed", "up == 0", 1)
    assert "for" not in first and second["for"] == "PT5M"
    assert first["annotations"] == {
        "summary": "{{ $labels.instance }} is down",
        "runbook_url": "docs/runbooks/gate-failed.md",
    }
    assert first["resolveConfiguration"]["autoResolved"] is True
    assert "actions" not in first
    assert orphans(requests, "Alerts") == []


def test_whom_an_alert_tells_and_where_its_runbook_is_read() -> None:
    seen, _ = told(alert("Down"), action_group_id=ON_CALL, runbooks="https://code.example/runbooks")
    (rule,) = seen.one(":PrometheusRuleGroup").inputs["rules"]
    assert rule["actions"] == [{"actionGroupId": ON_CALL}]
    assert rule["annotations"]["runbook_url"] == "https://code.example/runbooks/down.md"


def test_more_rules_than_a_group_takes_are_two_groups() -> None:
    seen, _ = told(*(alert(f"Down{number}") for number in range(RULES_A_GROUP + 1)))
    groups = seen.of(":PrometheusRuleGroup")
    assert [len(group.inputs["rules"]) for group in groups] == [RULES_A_GROUP, 1]
    assert len({group.inputs["ruleGroupName"] for group in groups}) == 2


def test_dashboards_are_whole_and_whoever_administers_may_read_what_they_ask() -> None:
    boards = {"serving": {"title": "Serving", "tags": ["drydock", "serving"], "panels": []}}

    def program() -> None:
        Dashboards("dashboards", DashboardsArgs(place(), boards, WORKSPACE))

    seen, requests = deploy_with_requests(program)
    made = seen.one(":Dashboard").inputs
    assert made["dashboardName"] == "drydock-test-serving"
    assert made["tags"]["GrafanaDashboardTags"] == "drydock,serving"
    content = seen.one(":DashboardDefinition").inputs
    assert (content["dashboardName"], content["definitionName"]) == ("drydock-test-serving", "default")
    assert json.loads(content["properties"]["serializedData"]) == boards["serving"]
    reads = seen.one(":RoleAssignment").inputs
    assert (reads["scope"], reads["principalId"]) == (WORKSPACE, ADMIN)
    assert reads["roleDefinitionId"].endswith(MONITORING_DATA_READER)
    assert orphans(requests, "Dashboards") == []
