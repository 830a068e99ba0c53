"""The stand-in for Azure refuses inputs as the SDK's types and Azure's own limits do; the engine is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localcloud.azure import rules, types
from localcloud.azure.values import UNKNOWN, has_unknown, plain
from tests.stack.azure_engine import GROUP, Engine

POOL = {
    "resourceGroupName": "g", "resourceName": "aks", "agentPoolName": "a100", "mode": "User", "count": 0,
    "vmSize": "Standard_NC24ads_A100_v4", "enableAutoScaling": True, "minCount": 0, "maxCount": 2, "osType": "Linux",
}  # fmt: skip
ACCOUNT = {
    "resourceGroupName": "g", "accountName": "data0001", "kind": "StorageV2", "sku": {"name": "Standard_LRS"},
    "location": "swedencentral",
}  # fmt: skip
CLUSTER = {"resourceGroupName": "g", "resourceName": "aks", "location": "swedencentral", "dnsPrefix": "aks",
           "agentPoolProfiles": [{"name": "system", "mode": "System", "count": 1, "vmSize": "Standard_D4s_v5"}]}  # fmt: skip

RULES = {"resourceGroupName": "g", "ruleGroupName": "alerts", "scopes": ["/w"], "rules": [{"expression": "up == 0"}]}


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


@pytest.mark.parametrize("token", rules.RULES)
def test_what_is_known_of_a_type_is_also_in_the_sdk(token: str) -> None:
    rule, kind = rules.RULES[token], types.ResourceType(f"azure-native:{token}")
    named = [*rule.path_inputs, *rule.names, *rule.replaces, *rule.frozen]
    assert [name for name in named if name.partition(".")[0].partition("[")[0] not in kind.inputs] == []
    assert "name" in kind.outputs and kind.api_version.startswith("20")


@pytest.mark.parametrize(
    ("token", "good", "wrong", "path", "said"),
    [
        ("containerservice:AgentPool", POOL, {"osSku": "Ubuntu"}, "osSku", "did you mean 'osSKU'?"),
        ("containerservice:AgentPool", POOL, {"osSKU": "Ubunto"}, "osSKU", "did you mean 'Ubuntu'?"),
        ("containerservice:AgentPool", POOL, {"count": "2"}, "count", "of type 'integer' but is '2'"),
        ("containerservice:AgentPool", POOL, {"count": 1.5}, "count", "of type 'integer' but is 1.5"),
        ("containerservice:AgentPool", POOL, {"enableAutoScaling": 1}, "enableAutoScaling", "of type 'boolean'"),
        ("containerservice:AgentPool", POOL, {"availabilityZones": "1"}, "availabilityZones", "of type 'array'"),
        ("containerservice:AgentPool", POOL, {"nodeLabels": {"a": 1}}, "nodeLabels.a", "of type 'string'"),
        ("containerservice:AgentPool", POOL, {"nodeLabels": "a=b"}, "nodeLabels", "of type 'map'"),
        ("containerservice:AgentPool", POOL, {"agentPoolName": "A100"}, "agentPoolName", "1 to 12 lower-case letters"),
        ("containerservice:AgentPool", POOL, {"agentPoolName": "a" * 13}, "agentPoolName", "1 to 12 lower-case letters"),
        ("containerservice:AgentPool", POOL, {"agentPoolName": "1a"}, "agentPoolName", "a letter first"),
        ("containerservice:AgentPool", POOL, {"maxCount": 1001}, "maxCount", "1001: Azure takes 1 to 1000"),
        ("containerservice:AgentPool", POOL, {"minCount": 3}, "minCount", "3, more than maxCount, 2"),
        ("containerservice:AgentPool", POOL, {"enableAutoScaling": False}, "minCount", "with enableAutoScaling"),
        ("containerservice:AgentPool", POOL, {"mode": "System", "count": 1}, "minCount", "Azure takes 1 to 1000"),
        ("containerservice:AgentPool", POOL, {"maxPods": 5}, "maxPods", "Azure takes 10 to 250"),
        ("containerservice:AgentPool", POOL, {"spotMaxPrice": -1}, "spotMaxPrice", "scaleSetPriority Spot"),
        ("containerservice:AgentPool", POOL, {"nodeTaints": ["gpu"]}, "nodeTaints[0]", "write key=value:effect"),
        (
            "containerservice:AgentPool",
            POOL,
            {"scaleSetPriority": "Spot", "upgradeSettings": {"maxSurge": "1"}},
            "upgradeSettings.maxSurge",
            "a spot pool cannot have it",
        ),
        ("containerservice:AgentPool", POOL, {"gpuProfile": {"drivers": "None"}}, "gpuProfile.drivers", "mean 'driver'"),
        ("containerservice:ManagedCluster", CLUSTER, {"dnsPrefix": "-a"}, "dnsPrefix", "1 to 54 letters"),
        (
            "containerservice:ManagedCluster",
            CLUSTER,
            {"agentPoolProfiles": [{"name": "SYSTEM", "mode": "System", "vmSize": "Standard_D4s_v5"}]},
            "agentPoolProfiles[0].name",
            "'SYSTEM': Azure takes",
        ),
        (
            "containerservice:ManagedCluster",
            CLUSTER,
            {"agentPoolProfiles": [{"name": "system", "mode": "User"}]},
            "agentPoolProfiles",
            "no pool of mode System",
        ),
        (
            "containerservice:ManagedCluster",
            CLUSTER,
            {"securityProfile": {"workloadIdentity": {"enable": True}}},
            "securityProfile.workloadIdentity.enable",
            "did you mean 'enabled'?",
        ),
        ("storage:StorageAccount", ACCOUNT, {"accountName": "data-0001"}, "accountName", "3 to 24 lower-case letters"),
        ("storage:StorageAccount", ACCOUNT, {"sku": {"name": "Standard"}}, "sku.name", "not one of Standard_LRS"),
        ("storage:StorageAccount", ACCOUNT, {"sku": {}}, "sku.name", "missing required property 'sku.name'"),
        ("storage:StorageAccount", ACCOUNT, {"minimumTlsVersion": "1.2"}, "minimumTlsVersion", "TLS1_2"),
        (
            "storage:BlobContainer",
            {"resourceGroupName": "g", "accountName": "data0001"},
            {"containerName": "My_Box"},
            "containerName",
            "3 to 63 lower-case letters",
        ),
        (
            "containerservice:MaintenanceConfiguration",
            {"resourceGroupName": "g", "resourceName": "aks", "configName": "default"},
            {"configName": "nightly"},
            "configName",
            "aksManagedAutoUpgradeSchedule",
        ),
        (
            "alertsmanagement:PrometheusRuleGroup",
            RULES,
            {"rules": [{"expression": "up == 0"}] * 21},
            "rules",
            "has 21 rules: Azure takes 20",
        ),
        ("alertsmanagement:PrometheusRuleGroup", RULES, {"interval": "PT30S"}, "interval", "PT1M to PT15M"),
        (
            "alertsmanagement:PrometheusRuleGroup",
            RULES,
            {"rules": [{"expression": "up == 0", "severity": 5}]},
            "rules[0].severity",
            "Azure takes 0 to 4",
        ),
        (
            "dashboard:DashboardDefinition",
            {"resourceGroupName": "g", "dashboardName": "serving", "definitionName": "default"},
            {"properties": {"serialisedData": "{}"}},
            "properties.serialisedData",
            "did you mean 'serializedData'?",
        ),
        (
            "authorization:RoleAssignment",
            {"scope": GROUP, "principalId": UNKNOWN, "roleDefinitionId": "/x", "principalType": "User"},
            {"roleAssignmentName": "admin"},
            "roleAssignmentName",
            "a GUID",
        ),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused_by_path_and_with_a_remedy(
    engine: Engine, token: str, good: dict[str, Any], wrong: dict[str, Any], path: str, said: str
) -> None:
    assert engine.failures(token, {**good, "agentPoolName": "ok"} if "agentPoolName" in wrong else good) == []
    found = engine.failures(token, good | wrong)
    assert [property for property, _ in found] == [path], found
    assert said in found[0][1] and path in found[0][1]


def test_everything_wrong_is_told_together(engine: Engine) -> None:
    found = engine.failures("containerservice:AgentPool", {"agentPoolName": 3, "vmsize": "x", "mode": "user"})
    assert {path for path, _ in found} == {"agentPoolName", "vmsize", "mode", "resourceGroupName", "resourceName"}


def test_streams_of_data_collection_are_open_and_other_enums_are_not(engine: Engine) -> None:
    rule = {"resourceGroupName": "g", "dataCollectionRuleName": "r", "location": "swedencentral", "kind": "Linux",
            "dataFlows": [{"streams": ["Custom-Mine", "Microsoft-KubeEvents"], "destinations": ["logs"]}]}  # fmt: skip
    assert engine.failures("monitor:DataCollectionRule", rule) == []
    assert [path for path, _ in engine.failures("monitor:DataCollectionRule", rule | {"kind": "linux"})] == ["kind"]


@pytest.mark.parametrize(
    "unknown",
    ["04da6b54-80e4-46f7-96ec-b56ff0331ba9", "3eeb2bf0-c639-47a8-9e75-3b44932eb421",
     "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2", "dd056dcd-154b-4c76-9bd3-c8f88648b5ff"],
)  # fmt: skip
def test_what_is_unknown_is_not_judged(engine: Engine, unknown: str) -> None:
    for key in POOL:
        assert engine.failures("containerservice:AgentPool", POOL | {key: unknown}) == [], key
    for key in CLUSTER:
        assert engine.failures("containerservice:ManagedCluster", CLUSTER | {key: unknown}) == [], key


def test_secrets_and_outputs_pass_as_they_are_and_are_judged_by_what_is_in_them(engine: Engine) -> None:
    secret = {"4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270", "value": "swedencentral"}
    output = {"4dabf18193072939515e22adb298388d": "d0e6a833031e9bbcd3f4e8bde6ca49a4", "dependencies": []}
    given = ACCOUNT | {"location": secret, "accessTier": output}
    answer = engine.check("storage:StorageAccount", given)
    assert list(answer.failures) == []
    assert answer.inputs["location"]["value"] == "swedencentral"
    assert (
        dict(answer.inputs["location"])["4dabf18193072939515e22adb298388d"]
        == secret["4dabf18193072939515e22adb298388d"]
    )
    assert plain(answer.inputs)["location"] == "swedencentral" and has_unknown(plain(answer.inputs)["accessTier"])
    wrong = engine.failures("storage:StorageAccount", given | {"kind": secret})
    assert [path for path, _ in wrong] == ["kind"]


def test_the_provider_puts_in_name_location_and_version(engine: Engine) -> None:
    engine.make("resources:ResourceGroup", {"resourceGroupName": "g", "location": "swedencentral"})
    wanted = {"resourceGroupName": "g", "resourceName": None}
    first = plain(engine.check("managedidentity:UserAssignedIdentity", wanted).inputs)
    assert first["location"] == "swedencentral" and first["azureApiVersion"] == "2023-01-31"
    assert first["resourceName"].startswith("thing") and len(first["resourceName"]) == len("thing") + 8
    again = plain(engine.check("managedidentity:UserAssignedIdentity", wanted, olds=first).inputs)
    assert again == first
    lost = plain(engine.check("managedidentity:UserAssignedIdentity", wanted | {"resourceGroupName": UNKNOWN}).inputs)
    assert has_unknown(lost["location"])
    engine.configure({"azure-native:config:location": "westeurope"})
    assert plain(engine.check("managedidentity:UserAssignedIdentity", wanted).inputs)["location"] == "westeurope"


def test_a_type_that_it_does_not_know_is_named(engine: Engine) -> None:
    with pytest.raises(Exception, match=r"azure-native:compute:VirtualMachine: .*rules\.py"):
        engine.check("compute:VirtualMachine", {})
