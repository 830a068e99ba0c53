"""Who each workload is towards Azure, and what it may do: the whole table, so that a further right is seen."""

from __future__ import annotations

import itertools

import pytest

from infra.identities import Identities, IdentitiesArgs
from infra.registry import Registry, RegistryArgs
from infra.roles import ACR_PULL, ACR_PUSH, BLOB_DATA_CONTRIBUTOR, BLOB_DATA_READER, MONITORING_DATA_READER
from infra.settings import Retention
from infra.storage import Storage, StorageArgs
from tests.unit.pulumi_mocks import PREFIX, Recorder, computed, place
from tests.unit.registrations import Request, deploy_with_requests

WORKSPACE = f"{PREFIX}/Microsoft.Monitor/accounts/metrics"
ISSUER = "https://oidc.example/1/"


@pytest.fixture(scope="module")
def made() -> tuple[Recorder, dict[tuple[str, str], Request]]:
    def program() -> None:
        where = place()
        registry = Registry("registry", RegistryArgs(where, "kubelet"))
        storage = Storage("storage", StorageArgs(where, Retention(), zones=False))
        Identities("identities", IdentitiesArgs(where, ISSUER, registry, storage, WORKSPACE))

    return deploy_with_requests(program)


def test_each_identity_has_these_roles_at_these_scopes_and_no_other(
    made: tuple[Recorder, dict[tuple[str, str], Request]],
) -> None:
    principals = {
        str(computed("x:UserAssignedIdentity", f"identities-{who}", {})["principalId"]): who
        for who in ("tuning", "mirror", "serving", "stress", "keda", "compiler")
    }
    assignments = [item for item in made[0].of(":RoleAssignment") if item.name.startswith("identities-")]
    table = sorted(
        (
            principals[item.inputs["principalId"]],
            item.inputs["roleDefinitionId"].rpartition("/")[2],
            item.inputs["scope"].rpartition("/")[2],
        )
        for item in assignments
    )
    assert table == sorted(
        [
            ("tuning", BLOB_DATA_READER, "storage-datasets"),
            ("tuning", BLOB_DATA_READER, "storage-models"),
            ("tuning", BLOB_DATA_CONTRIBUTOR, "storage-checkpoints"),
            ("tuning", ACR_PUSH, "registry-registry"),
            ("mirror", BLOB_DATA_CONTRIBUTOR, "storage-models"),
            ("serving", BLOB_DATA_READER, "storage-models"),
            ("serving", BLOB_DATA_READER, "storage-compiled"),
            ("serving", ACR_PULL, "registry-registry"),
            ("stress", BLOB_DATA_READER, "storage-datasets"),
            ("stress", BLOB_DATA_CONTRIBUTOR, "storage-reports"),
            ("keda", MONITORING_DATA_READER, "metrics"),
            ("compiler", BLOB_DATA_READER, "storage-models"),
            ("compiler", BLOB_DATA_CONTRIBUTOR, "storage-compiled"),
        ]
    )
    assert {item.inputs["principalType"] for item in assignments} == {"ServicePrincipal"}
    assert len({item.inputs["roleAssignmentName"] for item in assignments}) == len(assignments)


def test_each_service_account_is_one_identity(made: tuple[Recorder, dict[tuple[str, str], Request]]) -> None:
    credentials = made[0].of(":FederatedIdentityCredential")
    assert {item.inputs["resourceName"]: item.inputs["subject"] for item in credentials} == {
        "drydock-test-tuning": "system:serviceaccount:drydock-tuning:tuning",
        "drydock-test-mirror": "system:serviceaccount:drydock-tuning:mirror",
        "drydock-test-serving": "system:serviceaccount:drydock-serving:serving",
        "drydock-test-stress": "system:serviceaccount:drydock-serving:stress",
        "drydock-test-keda": "system:serviceaccount:kube-system:keda-operator",
        "drydock-test-compiler": "system:serviceaccount:drydock-serving:compiler",
    }
    assert {item.inputs["issuer"] for item in credentials} == {ISSUER}
    assert all(item.inputs["audiences"] == ["api://AzureADTokenExchange"] for item in credentials)


def test_what_replicas_run_is_written_by_one_identity_that_clients_cannot_reach(
    made: tuple[Recorder, dict[tuple[str, str], Request]],
) -> None:
    """Compiled graphs are code: whoever could write there would be in every replica."""
    there = [item for item in made[0].of(":RoleAssignment") if item.inputs["scope"].endswith("/storage-compiled")]
    writers = [item.name for item in there if not item.inputs["roleDefinitionId"].endswith(BLOB_DATA_READER)]
    assert writers == ["identities-compiler-writes-compiled-graphs"]


def test_credentials_are_written_one_after_the_other(made: tuple[Recorder, dict[tuple[str, str], Request]]) -> None:
    chain = [request for (kind, _), request in made[1].items() if kind == "FederatedIdentityCredential"]
    assert len(chain) == 6
    for before, after in itertools.pairwise(chain):
        assert any(urn.endswith(f"::{before.name}") for urn in after.dependencies)
