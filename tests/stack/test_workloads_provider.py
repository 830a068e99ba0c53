"""The kubeconfig is made fit for a machine, stays secret, and says what is wrong with it."""

from __future__ import annotations

import pulumi
import pytest
import yaml
from pulumi.runtime import rpc

from common.settings import SettingsError
from infra.kubeconfig import SERVER_ID, check_kubelogin, for_kubelogin
from tests.unit.pulumi_mocks import KUBECONFIG, deploy
from workloads.provider import cluster_provider

IDENTIFIER = "/subscriptions/x/managedClusters/drydock-test-aks"


def args_of(text: str, user: int = 0) -> list[str]:
    return yaml.safe_load(text)["users"][user]["user"]["exec"]["args"]


def test_azurecli_gets_nothing_but_login_and_server():
    assert args_of(for_kubelogin(KUBECONFIG)) == ["get-token", "--login", "azurecli", "--server-id", SERVER_ID]


def test_other_ways_to_sign_in():
    spn = args_of(for_kubelogin(KUBECONFIG, login="spn"))
    assert spn[:3] == ["get-token", "--login", "spn"]
    assert spn[5:] == ["--environment", "AzurePublicCloud", "--tenant-id", "00000000-0000-0000-0000-000000000002"]
    workload = args_of(for_kubelogin(KUBECONFIG, login="workloadidentity", server_id="1-2"))
    assert workload == ["get-token", "--login", "workloadidentity", "--server-id", "1-2"]


def test_cluster_and_contexts_stay_as_they_were():
    before, after = yaml.safe_load(KUBECONFIG), yaml.safe_load(for_kubelogin(KUBECONFIG))
    for part in ("apiVersion", "kind", "clusters", "contexts", "current-context"):
        assert after[part] == before[part]
    assert after["clusters"][0]["cluster"]["certificate-authority-data"] == "Q0E="
    assert after["users"][0]["name"] == "clusterUser"
    assert after["users"][0]["user"]["exec"]["apiVersion"] == "client.authentication.k8s.io/v1beta1"


def test_every_user_of_kubelogin_and_no_other():
    document = yaml.safe_load(KUBECONFIG)
    document["users"] += [
        {
            "name": "second",
            "user": {"exec": {"command": "/usr/bin/kubelogin", "args": ["get-token", "--login", "msi"]}},
        },
        {"name": "robot", "user": {"token": "t"}},
    ]
    after = for_kubelogin(yaml.safe_dump(document))
    assert args_of(after, 1) == args_of(after, 0)
    assert yaml.safe_load(after)["users"][2] == {"name": "robot", "user": {"token": "t"}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "is no YAML"),
        ("just text", "names no cluster"),
        ("clusters: []\nusers: []", "names no cluster"),
        ("clusters: [{name: a}]\nusers:", "no user that signs in by kubelogin"),
        ("clusters: [{name: a}]\nusers: [{name: u, user: {client-key-data: eA==}}]", "user credentials"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str):
    with pytest.raises(SettingsError, match=says):
        for_kubelogin(text)


def test_an_unknown_way_to_sign_in_lists_the_known():
    with pytest.raises(SettingsError, match="azurecli, workloadidentity, spn"):
        for_kubelogin(KUBECONFIG, login="devicecode")  # type: ignore[arg-type]


def test_provider_keeps_the_kubeconfig_secret():
    def program() -> None:
        cluster_provider("aks", kubeconfig=pulumi.Output.from_input(KUBECONFIG), identifier=IDENTIFIER)

    made = deploy(program).one("providers:kubernetes").inputs
    assert made["kubeconfig"][rpc._special_sig_key] == rpc._special_secret_sig
    assert made["kubeconfig"]["value"] == KUBECONFIG
    assert made["clusterIdentifier"] == IDENTIFIER
    assert (made["enableServerSideApply"], made["enableSecretMutable"]) == ("true", "true")
    assert "deleteUnreachable" not in made


def test_kubelogin_must_be_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(pulumi.runtime, "is_dry_run", lambda: False)
    assert "install-cli" in (check_kubelogin() or "")
    monkeypatch.setattr(pulumi.runtime, "is_dry_run", lambda: True)
    assert check_kubelogin() is None
    monkeypatch.setattr(pulumi.runtime, "is_dry_run", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert check_kubelogin() is None
