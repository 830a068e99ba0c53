"""Nothing is open that no policy opens, and every pod of a namespace is as harmless as it says."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pulumi
import pytest

from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, deploy
from workloads.namespaces import TUNING, Namespace, NamespaceArgs
from workloads.policies import (
    egress_dns,
    egress_https,
    egress_to,
    ingress_from,
    ingress_from_addresses,
    ingress_scrape,
    network_policy,
)


@pytest.fixture(scope="module")
def made() -> Recorder:
    def program() -> None:
        accounts: dict[str, pulumi.Input[str]] = {
            "tuning": pulumi.Output.from_input("client-1"),
            "mirror": "client-2",
        }
        Namespace("tuning", NamespaceArgs(TUNING, "restricted", 3, accounts, {"team": "a"}))

    return deploy(program)


def policy(**rules: Any) -> dict[str, Any]:
    """The `spec` that reaches the API server."""

    def program() -> None:
        network_policy("p", "ns", labels={"app": "a"}, **rules)

    made = deploy(program).one(":NetworkPolicy").inputs
    assert problems(made) == []
    return made["spec"]


def test_every_object_keeps_the_published_schema(made: Recorder):
    objects = [item for item in made.resources if item.custom]
    assert len(objects) == 5
    assert {item.name: said for item in objects if (said := problems(item.inputs))} == {}
    assert {item.inputs["metadata"].get("namespace", TUNING) for item in objects} == {TUNING}


def test_pod_security_is_enforced_and_told(made: Recorder):
    labels = made.one("core/v1:Namespace").inputs["metadata"]["labels"]
    for level in ("enforce", "warn", "audit"):
        assert labels[f"pod-security.kubernetes.io/{level}"] == "restricted"
    assert labels["team"] == "a"


def test_nothing_passes_but_name_resolution(made: Recorder):
    spec = made.one(":NetworkPolicy").inputs["spec"]
    assert spec["podSelector"] in ({}, {"matchLabels": {}})  # every pod
    assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
    assert not spec.get("ingress")
    (rule,) = spec["egress"]
    assert {(port["protocol"], int(port["port"])) for port in rule["ports"]} == {("UDP", 53), ("TCP", 53)}
    servers, local = rule["to"]
    assert servers["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kube-system"}
    assert servers["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}
    assert ip_network(local["ipBlock"]["cidr"]).num_addresses == 1


def test_gpus_are_bounded_and_no_pod_must_state_what_it_need_not(made: Recorder):
    hard = made.one(":ResourceQuota").inputs["spec"]["hard"]
    assert hard["requests.nvidia.com/gpu"] == "3"
    assert not [key for key in hard if "cpu" in key or "memory" in key]


def test_service_accounts_stand_for_their_identity_and_carry_no_token(made: Recorder):
    accounts = {item.inputs["metadata"]["name"]: item.inputs for item in made.of(":ServiceAccount")}
    clients = {
        name: item["metadata"]["annotations"]["azure.workload.identity/client-id"] for name, item in accounts.items()
    }
    assert clients == {"tuning": "client-1", "mirror": "client-2"}
    assert {item["automountServiceAccountToken"] for item in accounts.values()} == {False}


def test_https_reaches_the_world_but_not_the_nodes_own_credentials():
    (rule,) = policy(egress=[egress_https()])["egress"]
    assert [int(port["port"]) for port in rule["ports"]] == [443]
    (peer,) = rule["to"]
    block = peer["ipBlock"]

    def reached(address: str) -> bool:
        ip = ip_address(address)
        return ip in ip_network(block["cidr"]) and not any(ip in ip_network(cidr) for cidr in block["except"])

    assert reached("20.60.1.1") and reached("10.64.0.10")  # Blob in public, and by private endpoint
    assert not reached("169.254.169.254")  # the metadata service
    assert not reached("168.63.129.16")  # the wire server


def test_a_policy_states_both_directions_even_without_rules():
    spec = policy(ingress=[ingress_scrape(9401)])
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["podSelector"] == {"matchLabels": {"app": "a"}}
    assert spec["egress"] == []


def test_only_the_scraper_reads_metrics():
    (rule,) = policy(ingress=[ingress_scrape(9401, 9402)])["ingress"]
    assert [int(port["port"]) for port in rule["ports"]] == [9401, 9402]
    assert rule["from"] == [
        {
            "podSelector": {"matchLabels": {"rsName": "ama-metrics"}},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        }
    ]


def test_a_pod_without_namespace_is_one_of_the_policys_own():
    spec = policy(
        ingress=[ingress_from({"app": "router"}, 8000), ingress_from_addresses(["10.64.0.0/16"], 8080)],
        egress=[egress_to({"app": "b"}, 1, 2), egress_dns()],
    )
    assert spec["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"app": "router"}}}]
    assert spec["ingress"][1]["from"] == [{"ipBlock": {"cidr": "10.64.0.0/16"}}]
    assert spec["egress"][0]["to"] == [{"podSelector": {"matchLabels": {"app": "b"}}}]
