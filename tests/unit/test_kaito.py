"""What KAITO cannot honour is refused with reason and way out, and what it can is written in its own fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr, ValidationError

from common.settings import SettingsError
from infra.catalog import MODELS
from infra.kaito import BEGIN, CAPABILITIES, END, MOST_ADAPTERS, PAGE, SIZES, nodes_a_replica, preset, table, written
from infra.kaito_types import Inference
from infra.settings import Environment, read_environment
from tests.unit.kaito_crds import problems
from tests.unit.test_environment import SEED, as_pulumi
from workloads.alerts import alerts
from workloads.kaito import inference_config, manifest, watch

IMAGE = "registry.example/team/domain-llama@sha256:" + "a" * 64
SERVED: dict[str, Any] = {
    "runtime": "kaito",
    "pool": "a100",
    "kaito": {"adapter_images": {"domain-llama": IMAGE}, "pull_secret": "adapters", "unproven_adapters": True},
}
CHANGES = dict[str, Any]


def environment(serving: CHANGES | None = None, **others: Any) -> Environment:
    values = as_pulumi(SEED) | {"serving": json.dumps(SERVED | (serving or {}))}
    values |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in others.items()}
    return read_environment(values, ("api_keys", "huggingface_token"), project="drydock")


def pool(**changes: Any) -> CHANGES:
    return {"a100": {"vm_size": "Standard_NC24ads_A100_v4", "max_nodes": 2} | changes}


def adapters(count: int, **changes: Any) -> CHANGES:
    dataset = {"dataset": "rehearsal/data/kubectl.jsonl"}
    return {f"a{number}": dataset | changes for number in range(count)}


def images(count: int) -> CHANGES:
    return {"kaito": SERVED["kaito"] | {"adapter_images": {f"a{number}": IMAGE for number in range(count)}}}


KEY = {"api_keys": {"team-a": "k3y"}}
BASE = yaml.safe_load(SEED)["config"]["drydock:base"]
RUN = {"run": "one"}
LARGE = "Qwen/Qwen2.5-14B-Instruct"
REFUSED: list[tuple[str, CHANGES, CHANGES]] = [
    ("base.hub", {}, {"base": BASE | {"hub": "https://mirror.example"}}),
    ("serving.device", {"device": "cpu"}, {}),
    ("serving.tool_call_parser", {"tool_call_parser": "llama3_json"}, {}),
    ("adapters.domain-llama", {"kaito": {}}, {}),
    ("serving.kaito.adapter_images.other", {"kaito": SERVED["kaito"] | {"adapter_images": {"domain-llama": None, "other": IMAGE}}}, {}),
    ("serving.kaito.adapter_images", images(11), {"adapters": adapters(11)}),
    ("serving.kaito.adapter_images.domain-llama", {"kaito": {"adapter_images": {"domain-llama": IMAGE}}}, {}),
    ("serving.poll_seconds", {"poll_seconds": 5}, {}),
    ("serving.old_version_seconds", {"old_version_seconds": 5}, {}),
    ("serving.shutdown_timeout_seconds", {"shutdown_timeout_seconds": 45}, {}),  # the default, but written down
    ("serving.customer_facing", {"customer_facing": True, "min_replicas": 3, "max_replicas": 3}, {"pools": pool(max_nodes=3)}),
    ("serving.min_replicas", {"min_replicas": 1, "max_replicas": 2}, {}),
    ("serving.min_replicas", {"min_replicas": 0, "max_replicas": 1}, {}),
    ("serving.gpus", {"gpus": 2}, {}),
    ("serving.queue_target", {"queue_target": 3}, {}),
    ("serving.keep_compiled", {"keep_compiled": True}, {}),
    ("serving.stall_seconds", {"stall_seconds": 60}, {}),
    ("api_keys", {}, KEY),
    ("tiers.standard", {}, {"tiers": {"standard": {"n": 4}}}),
    ("serving.max_request_kib", {"max_request_kib": 64}, {}),
    ("serving.expose", {"expose": "vnet"}, {}),
    ("stress.run", {}, {"stress": RUN}),
    ("drills.run", {}, {"drills": RUN}),
    ("pools.a100.vm_size", {}, {"pools": pool(vm_size="Standard_NC4as_T4_v3")}),
    ("pools.a100.vm_size", {}, {"pools": pool(vm_size="Standard_NC48ads_A100_v4")}),
    ("pools.a100.vm_size", {}, {"base": BASE | {"model": LARGE}, "pools": pool(vm_size="Standard_NV36ads_A10_v5")}),
    ("pools.a100.spot", {}, {"pools": pool(spot=True)}),
    ("pools.a100.zones", {}, {"pools": pool(zones=["1"])}),
    ("pools.a100.os_disk_gib", {}, {"pools": pool(os_disk_gib=512)}),
    ("pools.a100.alternatives", {}, {"pools": pool(alternatives=["Standard_NC40ads_H100_v5"]), "cluster": {"provisioning": "automatic"}}),
    ("pools.a100.min_nodes", {}, {"pools": pool(min_nodes=1) | {"tune": pool()["a100"]}, "tuning": {"pool": "tune"}}),
    ("cluster.provisioning", {}, {"cluster": {"provisioning": "automatic"}}),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "serving", "others"), REFUSED, ids=[f"{row[0]}-{n}" for n, row in enumerate(REFUSED)])  # fmt: skip
def test_what_kaito_cannot_honour_is_an_error_with_its_reason_and_way_out(
    setting: str, serving: CHANGES, others: CHANGES
) -> None:
    with pytest.raises(SettingsError) as error:
        environment(serving, **others)
    told = [line for line in error.value.problems if line.startswith(f"{setting}: not with serving.runtime: kaito")]
    assert len(told) == 1, error.value.problems
    refusing = [each for each in CAPABILITIES if each.asked and each.kaito in told[0]]
    assert len(refusing) == 1 and told[0].endswith(refusing[0].remedy)


def test_every_refusal_is_tried_above() -> None:
    told = []
    for _, serving, others in REFUSED:
        with pytest.raises(SettingsError) as error:
            environment(serving, **others)
        told += error.value.problems
    refusing = [each for each in CAPABILITIES if each.asked]
    assert [each.what for each in refusing if not any(each.kaito in line for line in told)] == []
    assert all(each.remedy for each in refusing) and not any(each.remedy for each in CAPABILITIES if not each.asked)


def test_a_min_nodes_that_tuning_uses_may_stay_and_an_adapter_without_image_may_wait() -> None:
    env = environment({"kaito": {"adapter_images": {"domain-llama": None}}}, pools=pool(min_nodes=1))
    assert env.served == ("base",)
    assert "adapters" not in manifest(env)["spec"]["template"]["inference"]
    assert "max-lora-rank" not in inference_config(env)


def test_settings_of_kaito_without_its_runtime_are_refused_and_direct_asks_nothing_of_it() -> None:
    direct = {"runtime": "direct", "kaito": {}, "tool_call_parser": "llama3_json", "shutdown_timeout_seconds": 45}
    assert environment(direct, **KEY).served == ("base", "domain-llama")
    with pytest.raises(SettingsError, match=r"serving\.kaito: counts with serving\.runtime: kaito alone"):
        environment({"runtime": "direct"})


def test_images_are_named_by_digest() -> None:
    with pytest.raises(SettingsError, match=r"adapter_images"):
        environment({"kaito": {"adapter_images": {"domain-llama": "registry.example/domain-llama:latest"}}})


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("token", [None, "hf_token"])
def test_what_is_written_keeps_the_structural_schema(replicas: int, token: str | None) -> None:
    others = {"huggingface_token": token} if token else {}
    item = manifest(environment({"min_replicas": replicas, "max_replicas": replicas}, **others))
    assert problems(item) == []
    assert item["kind"] == ("Workspace" if replicas == 1 else "InferenceSet")
    inference = item["inference"] if replicas == 1 else item["spec"]["template"]["inference"]
    assert inference["adapters"] == [
        {"source": {"name": "domain-llama", "image": IMAGE, "imagePullSecrets": ["adapters"]}}
    ]
    assert inference["preset"]["name"] == "llama-3.1-8b-instruct"
    assert ("presetOptions" in inference["preset"]) == (token is not None)
    assert inference["config"] == item["metadata"]["name"]


def test_the_schema_refuses_what_the_crds_do_not_have() -> None:
    item = manifest(environment({"min_replicas": 1, "max_replicas": 1}))
    assert "runtime" in problems(item | {"inference": item["inference"] | {"runtime": "vllm"}})[0]
    assert "labelSelector" in problems(item | {"resource": {"instanceType": "x"}})[0]
    assert problems(item | {"spec": {}}) != []  # a Workspace has none
    with pytest.raises(ValidationError):
        Inference(preset=item["inference"]["preset"], config="x", adapters=item["inference"]["adapters"] * 11)
    assert MOST_ADAPTERS == 10


def test_settings_reach_vllm_by_the_config_and_every_value_is_text() -> None:
    serving = {"max_model_len": 8192, "max_num_seqs": 32, "gpu_memory_utilization": 0.85, "dtype": "bfloat16"}
    config = yaml.safe_load(inference_config(environment(serving)))
    assert config == {
        "kv_cache_cpu_memory_utilization": 0,
        "vllm": {
            "served-model-name": "base", "revision": BASE["revision"], "tokenizer-revision": BASE["revision"],
            "max-model-len": "8192", "max-num-seqs": "32", "gpu-memory-utilization": "0.85", "dtype": "bfloat16",
            "max-lora-rank": "16", "max-loras": "1", "max-cpu-loras": "1",
        },
    }  # fmt: skip


def test_a_rank_above_16_is_said_since_kaito_says_none() -> None:
    env = environment(images(2), adapters=adapters(1) | {"a1": adapters(1, lora_r=48)["a0"]})
    assert yaml.safe_load(inference_config(env))["vllm"]["max-lora-rank"] == "64"


def test_all_but_the_number_of_replicas_is_in_the_name() -> None:
    three = {"pools": pool(max_nodes=3)}
    two = manifest(environment(**three))
    more = manifest(environment({"min_replicas": 3, "max_replicas": 3}, **three))
    assert more["metadata"]["name"] == two["metadata"]["name"] and more["spec"]["replicas"] == 3
    other_image = {"kaito": SERVED["kaito"] | {"adapter_images": {"domain-llama": IMAGE[:-1] + "b"}}}
    changed = [
        manifest(environment(serving, **others))["metadata"]["name"]
        for serving, others in (
            ({"max_model_len": 2048}, {}),
            (other_image, {}),
            ({}, {"pools": pool(vm_size="Standard_NC40ads_H100_v5")}),
            ({"min_replicas": 1, "max_replicas": 1}, {}),
        )
    ]
    assert len({two["metadata"]["name"], *changed}) == 5
    assert two["spec"]["labelSelector"] == {"matchLabels": {"drydock/kaito": two["metadata"]["name"]}}


def test_watching_waits_for_all_replicas() -> None:
    several = manifest(environment())
    name = several["metadata"]["name"]
    assert watch(several).split()[:5] == [
        "kubectl", "--namespace", "drydock-kaito", "wait", "--for=jsonpath='{.status.readyReplicas}'=2",
    ]  # fmt: skip
    assert f"inferenceset/{name}" in watch(several)
    assert "--for=condition=InferenceReady workspace/" in watch(
        manifest(environment({"min_replicas": 1, "max_replicas": 1}))
    )


@pytest.mark.parametrize(
    ("model", "size", "nodes"),
    [  # by the table of KAITO's estimator, recomputed for v0.12
        ("meta-llama/Llama-3.1-8B-Instruct", "Standard_NV36ads_A10_v5", 1),
        ("microsoft/phi-4", "Standard_NV36ads_A10_v5", 2),
        ("microsoft/phi-4", "Standard_NC24ads_A100_v4", 1),
        ("meta-llama/Llama-3.3-70B-Instruct", "Standard_NC24ads_A100_v4", 3),
        ("meta-llama/Llama-3.3-70B-Instruct", "Standard_NV36ads_A10_v5", 9),
        ("meta-llama/Llama-3.3-70B-Instruct", "Standard_NC40ads_H100_v5", 2),
    ],
)
def test_nodes_are_estimated_as_kaito_does(model: str, size: str, nodes: int) -> None:
    assert size in SIZES
    assert nodes_a_replica(MODELS[model], size) == nodes


def test_a_model_outside_of_the_catalogue_keeps_its_hub_name() -> None:
    assert preset("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert preset("meta-llama/Llama-3.3-70B-Instruct") == "llama-3.3-70b-instruct"


def test_no_alert_is_about_what_prometheus_does_not_see() -> None:
    by_us = environment({"runtime": "direct", "kaito": {}})
    left = {each.name for each in alerts(environment())}
    assert left < {each.name for each in alerts(by_us)}
    assert "GateFailed" in left and not left & {"ServingDown", "MetricsMissing", "ReplicasMissing"}


def test_the_page_has_the_table_of_today(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "python -m infra.kaito writes it"
    assert page.split(BEGIN)[1].split(END)[0].strip() == table()
    stale = page.replace("| `direct` |", "| `straight` |")
    assert stale != page and written(stale) == page


def test_the_token_is_no_part_of_what_is_written() -> None:
    env = environment(huggingface_token="hf_secret")
    assert env.huggingface_token == SecretStr("hf_secret")
    assert "hf_secret" not in json.dumps(manifest(env)) + inference_config(env)
