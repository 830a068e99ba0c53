"""Default tags: on everything that takes them, and never over a resource's own."""

from __future__ import annotations

from typing import Any

import pulumi
import pytest
from pulumi_azure_native import authorization, containerregistry, containerservice, keyvault, managedidentity, resources

from infra.tags import tag_everything, takes_tags, with_tags
from tests.unit.pulumi_mocks import deploy

TAGS = {"owner": "ml", "environment": "dev"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (resources.ResourceGroup, True),
        (containerservice.ManagedCluster, True),
        (containerservice.AgentPool, True),
        (managedidentity.UserAssignedIdentity, True),
        (managedidentity.FederatedIdentityCredential, False),
        (authorization.RoleAssignment, False),
        (containerregistry.CacheRule, False),
        (keyvault.PrivateEndpointConnection, False),  # has tags, but as an output alone
        (pulumi.ComponentResource, False),
    ],
)
def test_takes_tags(kind: type[Any], expected: bool) -> None:
    assert takes_tags(kind) is expected


def test_a_resources_own_tags_stay() -> None:
    assert with_tags(None, TAGS) == TAGS
    assert with_tags({"owner": "search", "index": "3"}, TAGS) == {"owner": "search", "index": "3", "environment": "dev"}
    assert with_tags({"Owner": "search"}, TAGS) == {"Owner": "search", "environment": "dev"}  # one name to Azure


class Component(pulumi.ComponentResource):
    def __init__(self) -> None:
        super().__init__("drydock:infra:Component", "component", None)
        child = pulumi.ResourceOptions(parent=self)
        managedidentity.UserAssignedIdentity("child", resource_group_name="group", opts=child)
        self.register_outputs({})


def test_everything_that_takes_tags_gets_them() -> None:
    def program() -> None:
        resources.ResourceGroup("before")
        tag_everything(TAGS)
        resources.ResourceGroup("bare")
        resources.ResourceGroup("own", tags={"owner": "search"})
        resources.ResourceGroup("later", tags=pulumi.Output.from_input({"index": "3"}))
        authorization.RoleAssignment("role", principal_id="p", role_definition_id="r", scope="s")
        Component()

    seen = deploy(program)
    assert {item.name: item.inputs.get("tags") for item in seen.resources} == {
        "before": None,
        "bare": TAGS,
        "own": {"owner": "search", "environment": "dev"},
        "later": {"index": "3", **TAGS},
        "role": None,
        "component": None,
        "child": TAGS,
    }


def test_nothing_else_of_a_resource_is_touched() -> None:
    def program() -> None:
        tag_everything(TAGS)
        group = resources.ResourceGroup("group", resource_group_name="rg", location="swedencentral")
        containerservice.AgentPool(
            "pool",
            resource_group_name=group.name,
            resource_name_="aks",
            node_taints=["sku=gpu:NoSchedule"],
            upgrade_settings=containerservice.AgentPoolUpgradeSettingsArgs(max_surge="0"),
            min_count=0,
        )

    assert deploy(program).one(":AgentPool").inputs == {
        "resourceGroupName": "rg",
        "resourceName": "aks",
        "nodeTaints": ["sku=gpu:NoSchedule"],
        "upgradeSettings": {"maxSurge": "0"},
        "minCount": 0,
        "tags": TAGS,
    }
