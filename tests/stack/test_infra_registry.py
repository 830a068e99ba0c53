"""The container registry as Azure gets it."""

from __future__ import annotations

from typing import Any

import pulumi
import pytest

from infra.registry import Registry, RegistryArgs
from infra.roles import ACR_PULL, ACR_PUSH
from tests.unit.pulumi_mocks import Recorder, deploy, place
from tests.unit.registrations import Request, deploy_with_requests, orphans

KUBELET = "00000000-0000-0000-0000-00000000000a"


def made(*, zones: bool = False, **where: Any) -> tuple[Recorder, dict[tuple[str, str], Request]]:
    return deploy_with_requests(lambda: Registry("registry", RegistryArgs(place(**where), KUBELET, zones=zones)))


@pytest.mark.parametrize("private", [False, True])
def test_nobody_gets_in_without_an_identity_of_his_own(private: bool) -> None:
    seen, requests = made(private=private)
    inputs = seen.one("containerregistry:Registry").inputs
    assert inputs["adminUserEnabled"] is False and inputs["anonymousPullEnabled"] is False
    assert inputs["policies"]["azureADAuthenticationAsArmPolicy"] == {"status": "disabled"}
    assert inputs["registryName"].isalnum() and 5 <= len(inputs["registryName"]) <= 50
    assert orphans(requests, "Registry") == []


def test_a_public_registry_is_standard_and_asks_for_nothing_that_only_premium_has() -> None:
    inputs = made(zones=True)[0].one("containerregistry:Registry").inputs
    assert inputs["sku"] == {"name": "Standard"} and inputs["publicNetworkAccess"] == "Enabled"
    assert "dataEndpointEnabled" not in inputs and inputs["zoneRedundancy"] == "Disabled"
    assert set(inputs["policies"]) == {"azureADAuthenticationAsArmPolicy"}


def test_a_private_registry_lets_nothing_in_or_out_but_by_the_network() -> None:
    inputs = made(private=True, zones=True)[0].one("containerregistry:Registry").inputs
    assert inputs["sku"] == {"name": "Premium"} and inputs["publicNetworkAccess"] == "Disabled"
    assert inputs["dataEndpointEnabled"] is True and inputs["zoneRedundancy"] == "Enabled"
    assert inputs["policies"]["exportPolicy"] == {"status": "disabled"}
    assert inputs["policies"]["retentionPolicy"]["status"] == "disabled"  # digests refer to untagged manifests
    assert made(private=True)[0].one("containerregistry:Registry").inputs["zoneRedundancy"] == "Disabled"


@pytest.mark.parametrize("protect", [True, False])
def test_the_registry_is_protected_where_the_environment_says_so(protect: bool) -> None:
    requests = made(protect=protect)[1]
    assert [request.protect for (kind, _), request in requests.items() if kind == "Registry"] == [False, protect]


def test_public_images_come_through_the_cache() -> None:
    rules = {item.inputs["sourceRepository"]: item.inputs for item in made()[0].of(":CacheRule")}
    assert {source: rule["targetRepository"] for source, rule in rules.items()} == {
        "nvcr.io/nvidia/k8s-device-plugin": "cache/nvidia/k8s-device-plugin",
        "nvcr.io/nvidia/k8s/dcgm-exporter": "cache/nvidia/dcgm-exporter",
        "public.ecr.aws/docker/library/python": "cache/python",
    }
    assert all(rule["cacheRuleName"].replace("-", "").isalnum() for rule in rules.values())


def test_nodes_may_pull_and_no_more() -> None:
    seen = made()[0]
    role = seen.one(":RoleAssignment", "registry-kubelet-pull").inputs
    assert role["roleDefinitionId"].endswith(ACR_PULL) and role["principalId"] == KUBELET
    assert role["scope"].endswith("/registry-registry") and role["principalType"] == "ServicePrincipal"


def test_administrators_who_own_nothing_may_move_tags() -> None:
    """To roll an adapter back: what a runbook asks of whoever is on call."""
    seen = made()[0]
    role = seen.one(":RoleAssignment", "registry-admin-push").inputs
    assert role["roleDefinitionId"].endswith(ACR_PUSH) and role["principalId"] == place().admin_id
    assert role["scope"].endswith("/registry-registry") and role["principalType"] == place().admin_type
    assert len(seen.of(":RoleAssignment")) == 2


def test_outputs() -> None:
    found: list[list[str]] = []

    def program() -> pulumi.Output[None]:
        registry = Registry("registry", RegistryArgs(place(), KUBELET))
        return pulumi.Output.all(registry.name, registry.login_server, registry.cache_prefix).apply(found.append)

    deploy(program)
    name = place().names.unique("acr", 50)
    assert found == [[name, f"{name}.azurecr.io", f"{name}.azurecr.io/cache"]]
