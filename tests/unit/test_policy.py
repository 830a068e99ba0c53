"""The policy pack's rules, each on a resource that keeps it and on those that break it; and the gate of the workflows."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from policy import gate
from policy.rules import RULES, violations

ROOT = Path(__file__).parents[2]
DIGEST = "registry.example/app@sha256:" + "a" * 64
TAGS = {"project": "p", "environment": "dev", "owner": "o"}
LIMITS = {"limits": {"cpu": "1", "memory": "1Gi"}}

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("azure-native:containerservice:AgentPool", {
        "vmSize": "Standard_NC24ads_A100_v4", "nodeTaints": ["sku=gpu:NoSchedule", "kubernetes.azure.com/scalesetpriority=spot:NoSchedule"],
        "enableAutoScaling": True, "maxCount": 2.0, "scaleSetPriority": "Spot", "tags": TAGS}),
    ("azure-native:containerservice:AgentPool", {"vmSize": "Standard_D4ds_v5", "tags": TAGS}),
    ("azure-native:storage:StorageAccount", {"allowSharedKeyAccess": False, "allowBlobPublicAccess": False, "tags": TAGS}),
    ("azure-native:storage:BlobContainer", {"publicAccess": "None"}),
    ("azure-native:containerregistry:Registry", {"adminUserEnabled": False, "anonymousPullEnabled": False, "tags": TAGS}),
    ("azure-native:containerservice:ManagedCluster", {"disableLocalAccounts": True, "apiServerAccessProfile": {"enablePrivateCluster": True}, "tags": TAGS}),
    ("azure-native:containerservice:ManagedCluster", {"disableLocalAccounts": True, "apiServerAccessProfile": {"authorizedIPRanges": ["198.18.0.1/32"]}, "tags": TAGS}),
    ("kubernetes:apps/v1:Deployment", {"spec": {"template": {"spec": {"containers": [{"name": "a", "image": DIGEST, "resources": LIMITS}]}}}}),
    ("kubernetes:core/v1:Service", {"spec": {"type": "LoadBalancer"}, "metadata": {"annotations": {"service.beta.kubernetes.io/azure-load-balancer-internal": "true"}}}),
    ("kubernetes:core/v1:Service", {"spec": {"type": "ClusterIP"}}),
]  # fmt: skip

BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("gpu-pools-are-bounded", "azure-native:containerservice:AgentPool", {"nodeTaints": []}, "add the taint sku=gpu:NoSchedule"),
    ("gpu-pools-are-bounded", "azure-native:containerservice:AgentPool", {"nodeTaints": ["sku=gpu:NoSchedule"]}, "declare kubernetes.azure.com/scalesetpriority=spot:NoSchedule"),
    ("gpu-pools-are-bounded", "azure-native:containerservice:AgentPool", {"enableAutoScaling": False}, "fixed size"),
    ("gpu-pools-are-bounded", "azure-native:containerservice:AgentPool", {"maxCount": 17}, "maxCount is 17, more than 16"),
    ("gpu-pools-are-bounded", "azure-native:containerservice:AgentPool", {"maxCount": None}, "unbounded"),
    ("storage-is-private", "azure-native:storage:StorageAccount", {"allowSharedKeyAccess": True}, "account key"),
    ("storage-is-private", "azure-native:storage:StorageAccount", {"allowSharedKeyAccess": None}, "account key"),
    ("storage-is-private", "azure-native:storage:StorageAccount", {"allowBlobPublicAccess": None}, "opened to everyone"),
    ("storage-is-private", "azure-native:storage:BlobContainer", {"publicAccess": "Blob"}, "publicAccess is Blob"),
    ("registry-is-private", "azure-native:containerregistry:Registry", {"adminUserEnabled": True}, "shared password"),
    ("registry-is-private", "azure-native:containerregistry:Registry", {"anonymousPullEnabled": True}, "everyone could pull"),
    ("cluster-is-guarded", "azure-native:containerservice:ManagedCluster", {"disableLocalAccounts": False}, "disableLocalAccounts"),
    ("cluster-is-guarded", "azure-native:containerservice:ManagedCluster", {"apiServerAccessProfile": {}}, "whole internet reaches the API server"),
    ("cluster-is-guarded", "azure-native:containerservice:ManagedCluster", {"apiServerAccessProfile": {"authorizedIPRanges": ["0.0.0.0/0"]}}, "name your own ranges"),
    ("images-are-pinned", "kubernetes:apps/v1:Deployment", {"image": "registry.example/app:1.2"}, "container a: image registry.example/app:1.2 is not named by digest"),
    ("containers-are-limited", "kubernetes:apps/v1:Deployment", {"resources": {"limits": {"cpu": "1"}}}, "container a: set resources.limits for memory"),
    ("containers-are-limited", "kubernetes:apps/v1:Deployment", {"resources": {}}, "for cpu and memory"),
    ("services-are-internal", "kubernetes:core/v1:Service", {"metadata": {}}, "public address"),
    ("tags-are-there", "azure-native:storage:StorageAccount", {"tags": {"project": "p"}}, "lacks the tags environment, owner"),
    ("tags-are-there", "azure-native:containerservice:AgentPool", {"tags": None}, "lacks the tags project, environment, owner"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "props"), GOOD)
def test_what_keeps_the_rules_passes(kind: str, props: dict[str, Any]) -> None:
    assert violations(kind, props) == {}


@pytest.mark.parametrize(("rule", "kind", "change", "said"), BAD)
def test_one_wrong_property_is_told_with_its_remedy(rule: str, kind: str, change: dict[str, Any], said: str) -> None:
    props = json.loads(json.dumps(next(props for good, props in GOOD if good == kind)))
    where = props["spec"]["template"]["spec"]["containers"][0] if kind.endswith("Deployment") else props
    where.update(change)
    found = violations(kind, props)
    assert list(found) == [rule]
    assert any(said in line for line in found[rule]), found


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        ("kubernetes:core/v1:Pod", lambda pod: {"spec": pod}),
        ("kubernetes:batch/v1:Job", lambda pod: {"spec": {"template": {"spec": pod}}}),
        ("kubernetes:batch/v1:CronJob", lambda pod: {"spec": {"jobTemplate": {"spec": {"template": {"spec": pod}}}}}),
        ("kubernetes:apps/v1:DaemonSet", lambda pod: {"spec": {"template": {"spec": pod}}}),
    ],
)
@pytest.mark.parametrize("field", ["containers", "initContainers"])
def test_containers_are_found_wherever_pods_are_made(kind: str, wrap: Any, field: str) -> None:
    found = violations(kind, wrap({field: [{"name": "a", "image": "app:latest"}]}))
    assert set(found) == {"images-are-pinned", "containers-are-limited"}


def test_every_rule_is_broken_by_some_test_and_says_what_it_is_for() -> None:
    assert {rule for rule, *_ in BAD} == set(RULES)
    assert all(rule.__doc__ for rule in RULES.values())


def test_unknown_images_of_a_preview_are_not_violations() -> None:
    props = {"spec": {"template": {"spec": {"containers": [{"name": "a", "resources": LIMITS}]}}}}
    assert violations("kubernetes:apps/v1:Deployment", props) == {}


def preview(op: str, *, protect: bool, **more: Any) -> dict[str, Any]:
    urn = "urn:pulumi:dev::drydock::drydock:infra:Storage$azure-native:storage:StorageAccount::account"
    return {"steps": [{"op": op, "urn": urn, "oldState": {"protect": protect}, **more}], "diagnostics": []}


@pytest.mark.parametrize(
    ("plan", "code", "said"),
    [
        (preview("same", protect=True), 0, ""),
        (preview("update", protect=True), 0, ""),
        (preview("delete", protect=False), 0, ""),
        (preview("delete", protect=True), 3, "protected: azure-native:storage:StorageAccount account would be deleted"),
        (preview("replace", protect=True, replaceReasons=["location"]), 3, "would be replaced because of location"),
        (preview("replace", protect=True, newState={"protect": False}), 3, "would be replaced"),
        ({"steps": [], "diagnostics": [{"severity": "error", "message": "no such stack"}]}, 1, "no such stack"),
        ({"steps": [{"op": "create", "urn": "a::b", "oldState": None}]}, 0, ""),
        ({}, 1, "the preview itself failed"),
    ],
)
def test_the_gate(
    plan: dict[str, Any], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(plan)))
    assert gate.main() == code
    assert said in capsys.readouterr().err


def test_the_gate_refuses_what_is_no_preview(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("error: no stack"))
    assert gate.main() == 2
    assert "error: no stack" in capsys.readouterr().err


WORKFLOWS = {path.name: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yaml")}


def test_actions_are_pinned_by_commit() -> None:
    used = re.findall(r"uses: (\S+)", "\n".join(WORKFLOWS.values()))
    assert used
    assert not [name for name in used if not name.startswith("./") and not re.search(r"@[0-9a-f]{40}$", name)]


def test_a_fork_gets_neither_identity_nor_secrets() -> None:
    jobs = yaml.safe_load(WORKFLOWS["preview.yaml"])["jobs"]
    assert True in yaml.safe_load(WORKFLOWS["preview.yaml"]) and "pull_request_target" not in WORKFLOWS["preview.yaml"]
    for name, job in jobs.items():
        if "id-token" in job.get("permissions", {}):
            assert "head.repo.full_name == github.repository" in job["if"], name
        else:
            assert "secrets." not in json.dumps(job) and "login" not in json.dumps(job)


def test_who_asks_azure_has_a_runner_that_the_api_server_answers_and_can_read_the_stacks_secrets() -> None:
    for job in (
        yaml.safe_load(WORKFLOWS["preview.yaml"])["jobs"]["preview"],
        yaml.safe_load(WORKFLOWS["up-one.yaml"])["jobs"]["up"],
    ):
        assert job["runs-on"] == "${{ vars.RUNNER }}", "none of GitHub's own"
        assert {"PULUMI_CONFIG_PASSPHRASE", "PULUMI_ACCESS_TOKEN"} <= job["env"].keys()
    assert all(job["secrets"] == "inherit" for job in yaml.safe_load(WORKFLOWS["up.yaml"])["jobs"].values())


def test_nothing_is_brought_up_before_plan_policy_and_gate() -> None:
    steps = yaml.safe_load(WORKFLOWS["up-one.yaml"])["jobs"]["up"]["steps"]
    order = [
        step.get("with", {}).get("command") or ("gate" if "gate.py" in step.get("run", "") else None) for step in steps
    ]
    assert [name for name in order if name] == ["preview", "gate", "up"]
    logins = [number for number, step in enumerate(steps) if step.get("uses", "").startswith("azure/login@")]
    assert len(logins) == 2 and order.index("gate") < logins[1] < order.index("up"), (
        "an `up` outlives the first sign-in"
    )
    assert all(step["with"]["policyPacks"] == "policy" for step in steps if step.get("with", {}).get("command"))
    up = yaml.safe_load(WORKFLOWS["up.yaml"])["jobs"]
    assert up["prod"]["needs"] == "dev"
    assert yaml.safe_load(WORKFLOWS["up-one.yaml"])["jobs"]["up"]["environment"] == "${{ inputs.stack }}"


def test_the_pack_runs_in_what_pulumi_install_makes() -> None:
    pack = yaml.safe_load((ROOT / "policy/PulumiPolicy.yaml").read_text())["runtime"]
    program = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["runtime"]
    assert (pack["name"], pack["options"]["toolchain"]) == (program["name"], program["options"]["toolchain"])
    # Pulumi takes it from the pack's folder; without one, the pack runs in the first Python on the PATH.
    assert (ROOT / "policy" / pack["options"]["virtualenv"]).resolve() == ROOT / program["options"]["virtualenv"]
    assert re.search(r"^pulumi-policy==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
