"""Serving by KAITO in the whole program: what is made in place of our own replicas, and that nothing else changes."""

from __future__ import annotations

import runpy
from functools import cache
from typing import Any
from unittest.mock import patch

import pulumi
import pytest
import yaml

from localcloud.azure.types import check
from policy.rules import violations
from tests.stack.test_stack import ROOT, config_of, objects
from tests.unit import kaito_crds
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, Resource, mocked
from workloads.kaito import NAMESPACE
from workloads.render import plain

IMAGE = "registry.example/kubectl@sha256:" + "a" * 64
TOKEN = "hf_very-secret-token"


def settings(replicas: int) -> dict[str, Any]:
    kaito = {"adapter_images": {"kubectl": IMAGE}, "pull_secret": "adapters", "unproven_adapters": True}
    serving = {"runtime": "kaito", "pool": "a100", "min_replicas": replicas, "max_replicas": replicas, "kaito": kaito}
    return {"drydock:serving": serving}


def deployed(change: dict[str, Any]) -> Recorder:
    config = config_of("dev") | {
        "drydock:network": {"authorized_ip_ranges": ["198.18.0.7/32"]},
        "drydock:pools": {"a100": {"vm_size": "Standard_NC24ads_A100_v4", "max_nodes": 3}},
        "drydock:huggingface_token": TOKEN,
    }
    installed = patch("infra.kubeconfig.shutil.which", return_value="kubelogin")
    with installed, mocked(stack="dev", config=config | change) as seen:
        pulumi.runtime.config._SECRET_KEYS.set({"drydock:huggingface_token", "drydock:api_keys"})
        pulumi.runtime.test(lambda: (runpy.run_path(str(ROOT / "__main__.py")), None)[1])()  # type: ignore[no-untyped-call]
    return seen


@cache
def by_kaito(replicas: int = 2) -> Recorder:
    return deployed(settings(replicas))


@cache
def direct() -> Recorder:
    return deployed({"drydock:serving": {"pool": "a100", "min_replicas": 2, "max_replicas": 2}})


def inside(seen: Recorder) -> dict[str, Resource]:
    """What is in KAITO's namespace, by kind and name."""
    return {
        f"{item.inputs['kind']} {item.inputs['metadata']['name']}": item
        for item in objects(seen)
        if item.inputs["metadata"].get("namespace") == NAMESPACE
    }


def one(seen: Recorder, kind: str) -> dict[str, Any]:
    (found,) = (item.inputs for name, item in inside(seen).items() if name.startswith(f"{kind} "))
    return found


def test_the_add_on_is_there_for_kaito_alone() -> None:
    cluster = by_kaito().one(":ManagedCluster").inputs
    assert cluster["aiToolchainOperatorProfile"] == {"enabled": True}
    assert "aiToolchainOperatorProfile" not in direct().one(":ManagedCluster").inputs
    assert check("azure-native:containerservice:ManagedCluster", plain(cluster)) == []  # by the SDK's own types


@pytest.mark.parametrize(("replicas", "kind"), [(1, "Workspace"), (2, "InferenceSet")])
def test_every_object_keeps_its_schema_and_the_policy(replicas: int, kind: str) -> None:
    found = inside(by_kaito(replicas))
    for name, item in found.items():
        said = kaito_crds.problems if name.startswith(kind) else problems
        assert said(item.inputs) == [], name
        assert violations(item.type, item.inputs) == {}, name
    engine = one(by_kaito(replicas), kind)["metadata"]["name"]
    assert set(found) == {
        f"{kind} {engine}", f"ConfigMap {engine}", "Secret huggingface", "Role router", "RoleBinding router",
        "NetworkPolicy kaito", "NetworkPolicy default-deny", "ResourceQuota quota",
    }  # fmt: skip


@pytest.mark.parametrize(("replicas", "label"), [(1, "kaito.sh/workspace"), (2, "inferenceset.kaito.sh/created-by")])
def test_the_router_finds_the_pods_that_kaito_makes(replicas: int, label: str) -> None:
    seen = by_kaito(replicas)
    kind = "Workspace" if replicas == 1 else "InferenceSet"
    deployment = next(item for item in objects(seen) if item.name == "serving-router-deployment").inputs
    (router,) = deployment["spec"]["template"]["spec"]["initContainers"]
    given = dict(zip(router["command"][3::2], router["command"][4::2], strict=True))
    assert given["--selector"] == f"{label}={one(seen, kind)['metadata']['name']}"
    assert (given["--namespace"], given["--replica-port"], given["--replica-health"]) == (NAMESPACE, "5000", "/health")
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    assert one(seen, "RoleBinding")["subjects"] == [
        {"kind": "ServiceAccount", "name": account, "namespace": "drydock-serving"}
    ]
    assert one(seen, "Role")["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]


def test_the_config_has_the_name_that_the_resource_refers_to() -> None:
    engine, config = one(by_kaito(), "InferenceSet"), one(by_kaito(), "ConfigMap")
    assert engine["spec"]["template"]["inference"]["config"] == config["metadata"]["name"]
    assert config["immutable"] is True
    assert yaml.safe_load(config["data"]["inference_config.yaml"])["vllm"]["served-model-name"] == "base"


def test_the_token_is_a_secret_under_kaitos_key() -> None:
    assert one(by_kaito(), "Secret")["stringData"] == {"HF_TOKEN": TOKEN}
    preset = one(by_kaito(), "InferenceSet")["spec"]["template"]["inference"]["preset"]
    assert preset["presetOptions"] == {"modelAccessSecret": "huggingface"}


def test_only_the_router_reaches_a_replica_and_it_reaches_them() -> None:
    rules = next(item.inputs for name, item in inside(by_kaito()).items() if name == "NetworkPolicy kaito")["spec"]
    (ingress,) = rules["ingress"]
    of_serving = {"matchLabels": {"kubernetes.io/metadata.name": "drydock-serving"}}
    assert ingress["from"] == [{"namespaceSelector": of_serving, "podSelector": {"matchLabels": {"app": "router"}}}]
    out = next(item.inputs["spec"] for item in objects(by_kaito()) if item.inputs["metadata"]["name"] == "router-kaito")
    assert out["podSelector"] == {"matchLabels": {"app": "router"}}
    ((peer,), (port,)) = out["egress"][0]["to"], out["egress"][0]["ports"]
    assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}}
    assert port["port"] == 5000
    assert [port["port"] for port in ingress["ports"]] == [5000]
    assert [port["port"] for rule in rules["egress"] for port in rule["ports"]] == [443]


def test_the_namespace_takes_kaitos_pods_and_no_privileged_ones() -> None:
    (space,) = (item.inputs for item in objects(by_kaito()) if item.inputs["metadata"]["name"] == NAMESPACE)
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "baseline"


def test_all_else_of_the_stack_is_unchanged() -> None:
    def rest(seen: Recorder) -> dict[tuple[str, str], dict[str, Any]]:
        return {
            (item.type, item.name): {key: value for key, value in item.inputs.items() if key != "tags"}
            for item in seen.resources
        }

    ours, kaitos = rest(direct()), rest(by_kaito())
    gone = {name for _, name in ours.keys() - kaitos.keys()}
    expected = ("serving-engine", "serving-scaling", "serving-compiled", "alerts-")
    assert gone and all(name.startswith(expected) for name in gone), gone
    assert all(name.startswith("serving-kaito") for _, name in kaitos.keys() - ours.keys())
    changed = {key[1] for key in ours.keys() & kaitos.keys() if ours[key] != kaitos[key]}
    # The add-on; alerts of serving left out; and where the router leads to: its Service is what it was.
    assert {name for name in changed if not name.startswith("alerts-")} == {"cluster", "serving-router-deployment"}
