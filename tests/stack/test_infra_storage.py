"""The storage account as Azure gets it."""

from __future__ import annotations

import re
from typing import Any

import pulumi
import pytest

from infra.roles import BLOB_DATA_CONTRIBUTOR
from infra.settings import Retention
from infra.storage import CONTAINERS, Storage, StorageArgs
from tests.unit.pulumi_mocks import ADMIN, Recorder, deploy, place
from tests.unit.registrations import Request, deploy_with_requests, orphans


def made(*, zones: bool = False, **where: Any) -> tuple[Recorder, dict[tuple[str, str], Request]]:
    retention = Retention(deleted_days=9, checkpoint_days=40)
    return deploy_with_requests(lambda: Storage("storage", StorageArgs(place(**where), retention, zones=zones)))


@pytest.mark.parametrize("private", [False, True])
def test_only_entra_identities_reach_data(private: bool) -> None:
    seen, requests = made(private=private)
    inputs = seen.one(":StorageAccount").inputs
    assert inputs["allowSharedKeyAccess"] is False and inputs["allowBlobPublicAccess"] is False
    assert inputs["isLocalUserEnabled"] is False and inputs["defaultToOAuthAuthentication"] is True
    assert inputs["allowCrossTenantReplication"] is False
    assert inputs["minimumTlsVersion"] == "TLS1_2" and inputs["enableHttpsTrafficOnly"] is True
    assert re.fullmatch("[a-z0-9]{3,24}", inputs["accountName"])
    assert {item.inputs["publicAccess"] for item in seen.of(":BlobContainer")} == {"None"}
    assert not seen.of(":Blob")  # it would need a shared key
    assert orphans(requests, "Storage") == []


def test_a_private_account_has_no_public_address() -> None:
    public, private = (made(private=is_private)[0].one(":StorageAccount").inputs for is_private in (False, True))
    assert public["publicNetworkAccess"] == "Enabled"  # the deployer uploads from outside
    assert private["publicNetworkAccess"] == "Disabled"
    assert private["networkRuleSet"] == {"defaultAction": "Deny", "bypass": "None"}


def test_copies_spread_over_zones_where_the_environment_does() -> None:
    assert made(zones=True)[0].one(":StorageAccount").inputs["sku"] == {"name": "Standard_ZRS"}
    assert made()[0].one(":StorageAccount").inputs["sku"] == {"name": "Standard_LRS"}


def test_what_was_deleted_or_overwritten_stays_for_a_while() -> None:
    service = made()[0].one(":BlobServiceProperties").inputs
    assert service["isVersioningEnabled"] is True
    assert service["deleteRetentionPolicy"] == {"enabled": True, "days": 9.0}
    assert service["containerDeleteRetentionPolicy"] == {"enabled": True, "days": 9.0}


def test_what_comes_again_goes_when_it_is_old_and_nothing_else() -> None:
    rules = {rule["name"]: rule for rule in made()[0].one(":ManagementPolicy").inputs["policy"]["rules"]}
    assert {name: rule["definition"]["filters"]["prefixMatch"] for name, rule in rules.items()} == {
        "old-checkpoints": ["checkpoints/"],
        "old-compiled": ["compiled/"],
        "old-versions": ["datasets/", "models/", "checkpoints/", "reports/", "compiled/"],
    }
    assert rules["old-compiled"]["definition"]["actions"] == {
        "baseBlob": {"delete": {"daysAfterModificationGreaterThan": 365.0}}
    }
    assert rules["old-checkpoints"]["definition"]["actions"] == {
        "baseBlob": {"delete": {"daysAfterModificationGreaterThan": 40.0}}
    }
    assert rules["old-versions"]["definition"]["actions"] == {
        "version": {"delete": {"daysAfterCreationGreaterThan": 9.0}}
    }
    assert all(rule["enabled"] is True and rule["type"] == "Lifecycle" for rule in rules.values())


def test_data_is_protected_and_what_comes_again_may_go() -> None:
    def protected(requests: dict[tuple[str, str], Request]) -> set[str]:
        return {name for (_, name), request in requests.items() if request.protect}

    assert protected(made()[1]) == {"storage-account", "storage-datasets", "storage-models", "storage-reports"}
    assert protected(made(protect=False)[1]) == set()


def test_containers_come_after_versioning() -> None:
    requests = made()[1]
    for container in CONTAINERS:
        assert any(
            ":BlobServiceProperties::" in urn for urn in requests["BlobContainer", f"storage-{container}"].dependencies
        )


def test_the_administrators_and_nobody_else_may_write_the_account() -> None:
    role = made()[0].one(":RoleAssignment").inputs
    assert role["roleDefinitionId"].endswith(BLOB_DATA_CONTRIBUTOR)
    assert (role["principalId"], role["principalType"]) == (ADMIN, "User")
    assert role["scope"].endswith("/storage-account")


def test_outputs() -> None:
    found: list[Any] = []

    def program() -> pulumi.Output[None]:
        storage = Storage("storage", StorageArgs(place(), Retention(), zones=False))
        return pulumi.Output.all(storage.name, storage.container_ids).apply(found.append)

    deploy(program)
    name, ids = found[0]
    assert name == place().names.unique("st")
    assert {container: value.rpartition("/")[2] for container, value in ids.items()} == {
        container: f"storage-{container}" for container in CONTAINERS
    }
