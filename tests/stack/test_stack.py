"""The whole program under mocks, for each committed environment: what it registers, and what must hold for all of it."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import time
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pulumi
import pytest
import yaml

from infra.catalog import SKUS
from policy.rules import violations
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, Resource, mocked

ROOT = Path(__file__).parents[2]
STACKS = ("dev", "local", "prod")
SECRET = "k3y-of-team-a"
SECRET_SIGNATURE = "4dabf18193072939515e22adb298388d"  # how Pulumi marks a secret on its way to the engine


def config_of(stack: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / f"Pulumi.{stack}.yaml").read_text())["config"])


def deployed(stack: str, change: dict[str, Any] | None = None) -> Recorder:
    config = config_of(stack) | {"drydock:api_keys": {"team-a": SECRET}} | (change or {})
    if stack != "prod":
        config["drydock:network"] = {"authorized_ip_ranges": ["198.18.0.7/32"]}  # not the documentation's example
    installed = patch("infra.kubeconfig.shutil.which", return_value="kubelogin")
    with installed, mocked(stack=stack, config=config) as seen:
        pulumi.runtime.config._SECRET_KEYS.set({"drydock:api_keys"})
        pulumi.runtime.test(lambda: (runpy.run_path(str(ROOT / "__main__.py")), None)[1])()  # type: ignore[no-untyped-call]
    return seen


@cache
def stack(name: str) -> Recorder:
    return deployed(name)


def objects(seen: Recorder) -> list[Resource]:
    """Kubernetes objects, with what is secret in the clear, as the API server gets it."""
    found = [item for item in seen.resources if item.type.startswith("kubernetes:") and "apiVersion" in item.inputs]
    return [dataclasses.replace(item, inputs=revealed(item.inputs)) for item in found]


def revealed(value: Any) -> Any:
    if isinstance(value, dict):
        return revealed(value["value"]) if SECRET_SIGNATURE in value else {k: revealed(v) for k, v in value.items()}
    return [revealed(item) for item in value] if isinstance(value, list) else value


def hidden(value: Any) -> Any:
    """`value` without what is marked as secret: the engine encrypts that, and shows it to nobody."""
    if isinstance(value, dict):
        return "[secret]" if SECRET_SIGNATURE in value else {k: hidden(v) for k, v in value.items()}
    return [hidden(item) for item in value] if isinstance(value, list) else value


def pod_specs(seen: Recorder) -> dict[str, dict[str, Any]]:
    found = {}
    for item in objects(seen):
        template = (item.inputs.get("spec") or {}).get("template")
        if isinstance(template, dict) and "spec" in template:
            found[item.name] = template["spec"]
    return found


@pytest.mark.parametrize("name", STACKS)
def test_every_object_keeps_the_published_schema(name: str) -> None:
    checked = [
        item for item in objects(stack(name)) if not item.type.endswith(("ScaledObject", "TriggerAuthentication"))
    ]
    assert len(checked) > 20
    assert {item.name: said for item in checked if (said := problems(item.inputs))} == {}


@pytest.mark.parametrize("name", STACKS)
def test_no_resource_breaks_the_policy(name: str) -> None:
    found = {}
    for item in stack(name).resources:
        said = violations(item.type, item.inputs)
        said.pop("tags-are-there", None)  # a transform of the engine sets them; mocks run none
        if said:
            found[item.name] = said
    assert found == {}


@pytest.mark.parametrize("name", STACKS)
def test_each_gpu_pod_fits_the_pool_meant_for_it(name: str) -> None:
    seen = stack(name)
    pools = {
        item.inputs["nodeLabels"]["drydock/pool"]: item.inputs
        for item in seen.of(":AgentPool")
        if "drydock/pool" in (item.inputs.get("nodeLabels") or {})
    }
    for owner, pod in pod_specs(seen).items():
        if "nodeSelector" not in pod:
            continue
        pool = pools[pod["nodeSelector"]["drydock/pool"]]
        tolerated = {f"{item['key']}={item['value']}:{item['effect']}" for item in pod.get("tolerations") or []}
        assert set(pool.get("nodeTaints") or []) <= tolerated, owner
        containers = [*pod["containers"], *(pod.get("initContainers") or [])]
        gpus = max(int(item["resources"]["limits"].get("nvidia.com/gpu", 0)) for item in containers)
        assert gpus <= (SKUS[pool["vmSize"]].gpus if pool["vmSize"] in SKUS else 0), owner
        assert bool(gpus) == pool["vmSize"].startswith("Standard_N"), owner


@pytest.mark.parametrize("name", STACKS)
def test_no_secret_is_registered_in_plain_text(name: str) -> None:
    for item in stack(name).resources:
        assert SECRET not in json.dumps(hidden(item.inputs), default=str), item.name


def test_every_adapter_has_one_job_with_its_own_settings() -> None:
    jobs = [item for item in stack("prod").of(":Job") if item.name.startswith("tune-")]
    adapters = [item.inputs["metadata"]["labels"]["drydock/adapter"] for item in jobs]
    assert sorted(adapters) == ["kubectl", "triage"]  # the engine promises no order
    assert len(jobs) == len({item.inputs["metadata"]["name"] for item in jobs}) == 2


def specs(seen: Recorder) -> dict[str, str]:
    return {
        item.name: item.inputs["data"]["tuning.json"]
        for item in seen.of(":ConfigMap")
        if "tuning.json" in item.inputs["data"]
    }


def test_a_parameter_changed_in_the_yaml_reaches_the_container_and_renames_that_job_alone() -> None:
    adapters = json.loads(json.dumps(config_of("prod")["drydock:adapters"]))
    adapters["triage"]["learning_rate"] = 0.0007
    changed, before = deployed("prod", {"drydock:adapters": adapters}), stack("prod")
    assert json.loads(specs(changed)["tune-triage-specs"])["learning_rate"] == 0.0007
    old, new = ({item.name for item in seen.of(":Job")} for seen in (before, changed))
    assert [name.rpartition("-")[0] for name in old ^ new] == ["tune-triage", "tune-triage"]


def test_deadline_and_retries_do_not_tune_again() -> None:
    tuning = {"pool": "tune", "deadline_hours": 2, "retries": 1}
    changed = deployed("prod", {"drydock:tuning": tuning})
    names = [
        {item.name: item.inputs["metadata"]["name"] for item in seen.of(":Job")} for seen in (stack("prod"), changed)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", STACKS)
def test_a_job_ends_at_once_on_a_mistake_and_never_for_an_eviction(name: str) -> None:
    for item in stack(name).of(":Job"):
        if not item.name.startswith("tune-"):
            continue
        rules = item.inputs["spec"]["podFailurePolicy"]["rules"]
        assert rules[0]["action"] == "Ignore" and rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
        assert rules[1]["action"] == "FailJob" and [int(code) for code in rules[1]["onExitCodes"]["values"]] == [2, 3]
        assert item.inputs["metadata"]["annotations"]["pulumi.com/skipAwait"] == "true"


def test_a_setting_that_cannot_work_stops_the_program_with_its_remedy() -> None:
    serving = config_of("dev")["drydock:serving"] | {"max_model_len": 131072, "max_num_seqs": 256}
    with pytest.raises(pulumi.RunError, match=r"Pulumi\.dev\.yaml:\d+: serving\.max_model_len: .* are needed"):
        deployed("dev", {"drydock:serving": serving})


def test_without_gpus_vllm_runs_on_cpu_and_no_gpu_memory_is_counted() -> None:
    serving = config_of("dev")["drydock:serving"] | {"device": "cpu", "max_model_len": 131072}
    seen = deployed("dev", {"drydock:serving": serving})
    specs_of_vllm = [
        json.loads(text)
        for item in seen.of(":ConfigMap")
        for name, text in item.inputs["data"].items()
        if name in ("serving.json", "evaluate.json")
    ]
    assert [spec["device"] for spec in specs_of_vllm] == ["cpu", "cpu"]


def test_the_program_is_short_and_quick() -> None:
    assert len((ROOT / "__main__.py").read_text().splitlines()) <= 64
    started = time.process_time()  # of this process alone: what runs beside it is not the program's fault
    deployed("dev")
    assert time.process_time() - started < 5


LOADED = {"drydock:stress": {"run": "before-launch", "slo": {"ttft_p95_ms": 1500}}}


@pytest.mark.parametrize("name", ("dev", "prod"))
def test_a_run_named_in_the_settings_adds_the_stress_test_and_changes_nothing_else(name: str) -> None:
    def untagged(item: Resource) -> dict[str, Any]:
        """Without what the stack's transformation adds, which mocks run or not: programs before may have left it."""
        return {key: value for key, value in item.inputs.items() if key != "tags"}

    before, loaded = stack(name), deployed(name, LOADED)
    known = {(item.type, item.name): untagged(item) for item in before.resources}
    added = [item for item in loaded.resources if (item.type, item.name) not in known]
    assert sorted(item.type.rpartition(":")[2] for item in added) == [
        "ConfigMap", "Job", "NetworkPolicy", "Secret", "StressTest",
    ]  # fmt: skip
    others = [item for item in loaded.resources if item not in added]
    assert [item.name for item in others if known[item.type, item.name] != untagged(item)] == []
    found = {item.name: said for item in objects(loaded) if item in added and (said := problems(item.inputs))}
    assert found == {}
    broken = [item.name for item in added if violations(item.type, item.inputs)]
    assert broken == []
    for item in added:
        assert SECRET not in json.dumps(item.inputs, default=str) or item.type.endswith(":Secret"), item.name


def test_the_stack_tells_where_the_report_will_be() -> None:
    told: dict[str, Any] = {}

    def export(name: str, value: Any) -> None:
        pulumi.Output.from_input(value).apply(lambda known: told.update({name: known}))

    with patch("pulumi.export", export):
        deployed("dev")
        assert told.pop("stress_report") is None and told.pop("drills_report") is None and len(told["next_steps"]) == 3
        deployed("dev", LOADED)
    assert re.fullmatch(r"az://drydockdevst[0-9a-f]{8}/reports/stress/before-launch", told["stress_report"])
    assert re.fullmatch(r"kubectl -n drydock-serving logs -f job/stress-[0-9a-f]{8}", told["next_steps"][-1])


def test_the_label_told_to_clients_is_the_one_that_the_network_policy_asks_for() -> None:
    policy = next(item for item in stack("dev").of(":NetworkPolicy") if item.inputs["metadata"]["name"] == "router")
    peers = [peer for rule in policy.inputs["spec"]["ingress"] for peer in rule["from"]]
    assert {"namespaceSelector": {"matchLabels": {"drydock/client": "true"}}} in peers


LARGE = {
    "drydock:base": {"model": "meta-llama/Llama-3.3-70B-Instruct", "revision": "0" * 40},
    "drydock:pools": {"a100": {"vm_size": "Standard_NC96ads_A100_v4", "spot": True, "max_nodes": 3}},
}


def large(*, four_bits: bool, gpus: int) -> dict[str, Any]:
    dev = config_of("dev")
    adapter = dev["drydock:adapters"]["kubectl"] | {"load_in_4bit": four_bits}
    return LARGE | {
        "drydock:adapters": {"kubectl": adapter},
        "drydock:serving": dev["drydock:serving"] | {"gpus": gpus},
    }


def test_a_model_beyond_one_gpu_is_served_by_four_and_tuned_in_4_bits_by_one() -> None:
    seen = deployed("dev", large(four_bits=True, gpus=4))
    (replicas,) = (item.inputs for item in seen.of(":Deployment") if item.inputs["metadata"]["name"] == "engine")
    (engine,) = replicas["spec"]["template"]["spec"]["containers"]
    assert engine["resources"]["limits"]["nvidia.com/gpu"] == "4"
    pod = next(item for item in seen.of(":Job") if "tune-kubectl" in item.name).inputs["spec"]["template"]["spec"]
    asked = {
        item["name"]: item["resources"]["limits"].get("nvidia.com/gpu")
        for item in [*pod["initContainers"], *pod["containers"]]
    }
    assert asked["tune"] == "1" and asked["evaluate"] == "4", "it is measured as it is served"


def test_where_it_does_not_fit_each_setting_has_its_way_out() -> None:
    with pytest.raises(pulumi.RunError) as caught:
        deployed("dev", large(four_bits=False, gpus=1))
    told = str(caught.value)
    assert "serving.max_model_len: serving meta-llama/Llama-3.3-70B-Instruct on Standard_NC96ads_A100_v4: about" in told
    assert "what fits: gpus 4 for each replica" in told
    assert (
        "adapters.kubectl: tuning kubectl on Standard_NC96ads_A100_v4: about" in told and "load_in_4bit: true" in told
    )
    assert (
        "adapters.kubectl: evaluating kubectl on Standard_NC96ads_A100_v4, as it is served: vLLM would not start"
        in told
    )
