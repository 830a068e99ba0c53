"""The drills: what their Job runs, what its account may do and no more, what starts them, and who must agree first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args

import pytest

from infra.settings import Environment, read_environment
from policy.rules import violations
from serving import faults
from stress import cluster
from stress.drills import LOSS_MARGIN_SECONDS
from stress.scenarios import LONGEST_LOSS_SECONDS, NOTICED_SECONDS, Bounds, DrillSpec, Scenario
from tests.stack.test_stack import deployed, objects, stack
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, Resource
from tests.unit.test_environment import SEED, as_pulumi
from workloads import drills
from workloads.engine import LABELS as ENGINE_LABELS
from workloads.metrics import SIDECAR_PORT
from workloads.stress import job_name

ALL: tuple[Scenario, ...] = get_args(Scenario)
RUN = {"run": "friday", "scenarios": ALL, "allow_outage": True}

Rights = dict[tuple[str, str], set[str]]
"""Verbs by (namespace, resource); the namespace is empty for those of the whole cluster, and where a rule holds for
certain objects alone, `resource/name` stands for the resource."""


def environment(change: dict[str, Any] | None = None, **more: Any) -> Environment:
    values = as_pulumi(SEED) | {"drills": json.dumps(RUN | (change or {})), "api_keys": json.dumps({"load": "k3y"})}
    pools = json.loads(values["pools"])
    pools["a100"]["max_nodes"] = 3  # room for a replica whose node is drained
    values |= {key: json.dumps(value) for key, value in ({"pools": pools} | more).items()}
    return read_environment(values, ("api_keys",), project="drydock")


@cache
def made() -> Recorder:
    """The production environment with all drills."""
    return deployed("prod", {"drydock:drills": RUN})


@cache
def added() -> list[Resource]:
    known = {(item.type, item.name) for item in stack("prod").resources}
    return [item for item in made().resources if (item.type, item.name) not in known]


def rights(*places: tuple[str, Sequence[Mapping[str, Any]]]) -> Rights:
    found: Rights = {}
    for namespace, rules in places:
        for rule in rules:
            assert rule["apiGroups"] == [""]
            assert set(rule) - {"resourceNames"} == {"apiGroups", "resources", "verbs"}
            names = [f"/{name}" for name in rule.get("resourceNames") or []] or [""]
            for resource in (f"{kind}{name}" for kind in rule["resources"] for name in names):
                found.setdefault((namespace, resource), set()).update(rule["verbs"])
    return found


def pod() -> dict[str, Any]:
    job = next(item for item in made().of(":Job") if item.name.startswith("drills-"))
    return dict(job.inputs["spec"]["template"]["spec"])


def test_a_run_named_in_the_settings_adds_them_and_changes_nothing_else() -> None:
    def untagged(item: Resource) -> dict[str, Any]:
        return {key: value for key, value in item.inputs.items() if key != "tags"}

    assert not [item.name for item in stack("prod").resources if "drills" in item.name]
    assert sorted(item.type.rpartition(":")[2] for item in added()) == [
        "ClusterRole", "ClusterRoleBinding", "ConfigMap", "ConfigMap", "Drills", "FederatedIdentityCredential", "Job",
        "NetworkPolicy", "NetworkPolicy", "Role", "Role", "RoleBinding", "RoleBinding", "Secret", "ServiceAccount",
    ]  # fmt: skip
    known = {(item.type, item.name): untagged(item) for item in stack("prod").resources}
    others = [item for item in made().resources if (item.type, item.name) in known]
    assert len(others) == len(known)
    assert [item.name for item in others if known[item.type, item.name] != untagged(item)] == []
    new = {item.name for item in added()}
    assert {item.name: said for item in objects(made()) if item.name in new and (said := problems(item.inputs))} == {}
    assert [item.name for item in added() if violations(item.type, item.inputs)] == []


@pytest.mark.parametrize(
    ("scenarios", "wanted"),
    [
        (("long-prompts",), {("drydock-serving", "pods"): {"list"}}),
        (("replica-loss",), {("drydock-serving", "pods"): {"list", "delete"}}),
        (("outage",), {("drydock-serving", "pods"): {"list", "delete"}}),
        (
            ("node-drain",),
            {
                ("drydock-serving", "pods"): {"list"},
                ("drydock-serving", "pods/eviction"): {"create"},
                ("", "nodes"): {"get", "patch"},
            },
        ),
        (
            ("tuning-eviction",),
            {
                ("drydock-serving", "pods"): {"list"},
                ("drydock-tuning", "pods"): {"list"},
                ("drydock-tuning", "pods/log"): {"get"},
                ("drydock-tuning", "pods/eviction"): {"create"},
            },
        ),
        (
            ("registry-unreachable",),
            {("drydock-serving", "pods"): {"list"}, ("drydock-serving", "configmaps/drill-faults"): {"patch"}},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_scenario_brings_the_rights_it_uses_and_no_other(scenarios: tuple[Scenario, ...], wanted: Rights) -> None:
    def plain(rules: Sequence[Any]) -> list[dict[str, Any]]:
        return [
            {"apiGroups": rule.api_groups, "resources": rule.resources, "verbs": rule.verbs}
            | ({"resourceNames": rule.resource_names} if rule.resource_names else {})
            for rule in rules
        ]

    places = {
        "drydock-serving": drills.serving_rules(scenarios),
        "drydock-tuning": drills.tuning_rules(scenarios),
        "": drills.cluster_rules(scenarios),
    }
    assert rights(*((place, plain(rules)) for place, rules in places.items())) == wanted


def test_all_together_have_the_sum_of_these_rights_and_only_their_account_has_them() -> None:
    roles = [item.inputs for item in added() if item.type.endswith((":Role", ":ClusterRole"))]
    assert rights(*((role["metadata"].get("namespace", ""), role["rules"]) for role in roles)) == {
        ("drydock-serving", "pods"): {"list", "delete"},
        ("drydock-serving", "pods/eviction"): {"create"},
        ("drydock-serving", "configmaps/drill-faults"): {"patch"},
        ("drydock-tuning", "pods"): {"list"},
        ("drydock-tuning", "pods/log"): {"get"},
        ("drydock-tuning", "pods/eviction"): {"create"},
        ("", "nodes"): {"get", "patch"},
    }
    bindings = [item.inputs for item in added() if item.type.endswith("RoleBinding")]
    assert sorted(binding["roleRef"]["kind"] for binding in bindings) == ["ClusterRole", "Role", "Role"]
    for binding in bindings:
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "drills", "namespace": "drydock-serving"}]
    assert pod()["serviceAccountName"] == "drills"


def test_towards_azure_it_is_the_stress_test() -> None:
    seen = made()
    credential = next(item for item in added() if item.type.endswith(":FederatedIdentityCredential"))
    stress = next(item for item in seen.of(":UserAssignedIdentity") if item.name.endswith("-stress"))
    assert credential.inputs["resourceName"] == stress.inputs["resourceName"]
    assert credential.inputs["subject"] == "system:serviceaccount:drydock-serving:drills"
    account = next(item for item in added() if item.type.endswith(":ServiceAccount"))
    own = next(item for item in seen.of(":ServiceAccount") if item.inputs["metadata"]["name"] == "stress")
    assert account.inputs["metadata"]["annotations"] == own.inputs["metadata"]["annotations"]


def test_one_container_alone_may_ask_the_api_server() -> None:
    spec = pod()
    assert spec["automountServiceAccountToken"] is False
    (token,) = [volume for volume in spec["volumes"] if volume["name"] == "token"]
    sources = token["projected"]["sources"]
    assert [next(iter(source)) for source in sources] == ["serviceAccountToken", "configMap"]
    assert "audience" not in sources[0]["serviceAccountToken"]  # the API server's own
    (container,) = spec["containers"]
    mounted = {item["name"]: item for item in container["volumeMounts"]}
    assert mounted["token"] == {"name": "token", "mountPath": str(cluster.ACCOUNT), "readOnly": True}
    for fetch in spec["initContainers"]:
        assert "token" not in {item["name"] for item in fetch["volumeMounts"]}
        assert "DRYDOCK_API_KEY" not in json.dumps(fetch)


def policies(seen: Recorder) -> dict[str, dict[str, Any]]:
    found = [item.inputs for item in seen.of(":NetworkPolicy") if "drills" in item.name]
    return {item["metadata"]["name"]: item["spec"] for item in found}


def test_it_reaches_the_router_and_https_and_nothing_reaches_it() -> None:
    policy = policies(made())["drills"]
    assert policy["podSelector"]["matchLabels"] == {"app": "drills"} and policy["ingress"] == []
    router, https, _ = policy["egress"]
    assert router["to"] == [{"podSelector": {"matchLabels": {"app": "router"}}}]
    assert [int(port["port"]) for port in router["ports"]] == [8080]
    assert [int(port["port"]) for port in https["ports"]] == [443]


def test_a_loss_of_the_registry_is_told_to_the_sidecars_and_they_alone_are_asked_what_they_make_of_it() -> None:
    """Of the network nothing is touched but for the way to their metrics."""
    seen = policies(made())
    *_, asked = seen["drills"]["egress"]
    assert asked["to"] == [{"podSelector": {"matchLabels": ENGINE_LABELS}}]
    ingress = seen["engine-drills"]
    assert ingress["podSelector"]["matchLabels"] == ENGINE_LABELS and ingress["egress"] == []
    (let_in,) = ingress["ingress"]
    assert let_in["from"] == [{"podSelector": {"matchLabels": {"app": "drills"}}}]
    assert [[int(port["port"]) for port in rule["ports"]] for rule in (asked, let_in)] == [[9402], [9402]]
    (empty,) = [item.inputs for item in added() if item.inputs.get("metadata", {}).get("name") == cluster.FAULTS]
    assert empty["kind"] == "ConfigMap" and not empty.get("data") and "immutable" not in empty
    engine = next(item for item in stack("prod").of(":Deployment") if item.inputs["metadata"]["name"] == "engine")
    spec = engine.inputs["spec"]["template"]["spec"]
    assert {"name": "faults", "configMap": {"name": cluster.FAULTS, "optional": True}} in spec["volumes"]
    holders = [item for item in [*spec["initContainers"], *spec["containers"]]
               if "faults" in {mount["name"] for mount in item["volumeMounts"]}]  # fmt: skip
    (sidecar,) = holders
    (mount,) = [mount for mount in sidecar["volumeMounts"] if mount["name"] == "faults"]
    assert sidecar["name"] == cluster.SIDECAR and mount["readOnly"] is True
    assert sidecar["command"][sidecar["command"].index("--faults") + 1] == mount["mountPath"]


def test_without_that_scenario_there_is_neither_the_loss_nor_the_way() -> None:
    others = [name for name in ALL if name != drills.UNREACHABLE]
    seen = deployed("prod", {"drydock:drills": RUN | {"scenarios": others}})
    assert set(policies(seen)) == {"drills"} and len(policies(seen)["drills"]["egress"]) == 2
    assert not [item for item in seen.of(":ConfigMap") if item.inputs["metadata"]["name"] == cluster.FAULTS]


def test_sidecar_and_drill_mean_the_same_and_a_loss_is_never_longer_than_sidecars_let_it_be() -> None:
    assert cluster.LOSS == faults.FILE
    assert NOTICED_SECONDS + LONGEST_LOSS_SECONDS + LOSS_MARGIN_SECONDS < faults.LONGEST_SECONDS


def test_the_container_reads_the_settings_as_they_were_written() -> None:
    (container,) = pod()["containers"]
    command = container["command"]
    assert command[:4] == ["python", "-m", "stress", "drills"]
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--target"] == "http://drydock.drydock-serving.svc.cluster.local"
    assert (options["--namespace"], options["--tuning-namespace"]) == ("drydock-serving", "drydock-tuning")
    assert options["--push"].endswith("/reports/drills/friday")
    written = next(item for item in added() if item.type.endswith(":ConfigMap") and "faults" not in item.name).inputs
    assert written["immutable"] is True
    spec = DrillSpec.model_validate_json(written["data"]["drills.json"])
    assert spec.scenarios == ALL and spec.bounds == Bounds()
    assert set(spec.load.models) == {"base", "kubectl", "triage"} and spec.load.users == 20


def test_it_finds_the_pods_by_the_labels_that_they_have() -> None:
    assert dict([cluster.REPLICAS.split("=")]) == ENGINE_LABELS
    tuners = [item.inputs for item in made().of(":Job") if item.name.startswith("tune-")]
    for job in tuners:
        template = job["spec"]["template"]
        assert dict([cluster.TUNERS.split("=")]).items() <= template["metadata"]["labels"].items()
        assert cluster.TUNE in [container["name"] for container in template["spec"]["initContainers"]]
    engine = next(item for item in made().of(":Deployment") if item.inputs["metadata"]["name"] == "engine").inputs
    spec = engine["spec"]["template"]["spec"]
    assert [item["name"] for item in spec["containers"]] == [cluster.ENGINE]
    (sidecar,) = [item for item in spec["initContainers"] if item["name"] == cluster.SIDECAR]
    assert [item["name"] for item in sidecar["ports"]] == [cluster.METRICS] == [SIDECAR_PORT]


def test_another_run_or_setting_is_another_job_and_nothing_else_is() -> None:
    changes: list[dict[str, Any]] = [{}, {"run": "monday"}, {"users": 3}, {"bounds": {"lost_requests": 1}}]
    names = [job_name(environment(change, protect=False).drills, "drills") for change in changes]
    assert len(set(names)) == 4
    adapters = {"another": {"dataset": "rehearsal/data/triage.jsonl"}}
    assert job_name(environment(adapters=adapters).drills, "drills") == names[0]


def test_a_breach_ends_the_job_and_it_is_tried_once() -> None:
    spec = next(item for item in made().of(":Job") if item.name.startswith("drills-")).inputs["spec"]
    assert spec["backoffLimit"] == 0
    _, failed = spec["podFailurePolicy"]["rules"]
    assert failed["action"] == "FailJob" and 3 in failed["onExitCodes"]["values"]


def test_the_deadline_leaves_room_for_every_wait() -> None:
    env = environment()
    waits = sum(3 * env.drills.bounds.timeout_seconds(name) for name in ALL)
    assert drills.deadline_seconds(env.drills) > waits + 2 * (120 + 10) + 900
    one = environment({"scenarios": ["long-prompts"]})
    assert drills.deadline_seconds(one.drills) < drills.deadline_seconds(env.drills)


def refusal(change: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ValueError) as caught:
        environment(change, **more)
    return str(caught.value)


def test_what_hurts_in_a_protected_environment_needs_a_word() -> None:
    said = refusal({"allow_outage": False})
    assert "drills.allow_outage: node-drain and outage may leave clients without an answer" in said
    assert environment({"allow_outage": False}, protect=False).drills.run == "friday"
    gentle = environment({"allow_outage": False, "scenarios": ["long-prompts", "replica-loss", "tuning-eviction"]})
    assert gentle.drills.run == "friday"


def test_what_would_not_measure_what_it_says_is_refused() -> None:
    serving = json.loads(as_pulumi(SEED)["serving"])
    said = refusal({}, serving=serving | {"min_replicas": 1})
    assert "drills.scenarios: replica-loss and node-drain would be an outage" in said
    assert "drills.slo: is the stress test's" in refusal({"slo": {"ttft_p95_ms": 1}})
    lost = {"scenarios": ["registry-unreachable"]}
    said = refusal(lost | {"after_seconds": 1201})
    assert "drills.after_seconds: 1201 s are more than the 1200 s that registry-unreachable may last" in said
    assert environment(lost | {"after_seconds": 1200}).drills.run == "friday"
    assert "registry-unreachable needs an adapter" in refusal(lost, adapters={})
    assert "drills.client: someone is not among the api_keys (load)" in refusal({"client": "someone"})
    pools = json.loads(as_pulumi(SEED)["pools"])
    tight = {name: pool | {"max_nodes": 2} for name, pool in pools.items()}
    assert "without the node of node-drain" in refusal({}, pools=tight, serving=serving | {"max_replicas": 2})
