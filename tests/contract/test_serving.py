"""The path from a tuned run to traffic, on a real vLLM: evaluate, gate, publish, hot-load, prove, switch, roll back.

The tests of this file share one replica and run in their order; each says what it needs from the ones before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.numpy import load_file, save_file

from artifacts.adapter import promote, promoted_digest, version
from artifacts.store import open_store
from common.files import read_json, read_jsonl, write_json
from serving import canaries
from serving.evaluate import evaluate, open_run
from tests.contract.conftest import BASE, Replica, tune, wait_until
from training.__main__ import main as training
from training.publish import subject

# From tag to traffic. The bar is 10 on a machine of its own (make rehearse and make bench-serving measure it); here another
# worker starts its engines beside this one, on the same two cores.
SWITCH_SECONDS = 25


def question(run: Path) -> str:
    row = next(row for row in read_jsonl(run / "held_out.jsonl"))
    return f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]


def judge(replica: Replica, run: Path) -> dict:
    """Evaluate `run` on the shared replica, through the door that only the sidecar's token opens."""
    opened = open_run(run)
    with replica.inside() as engine:
        engine.load(opened.name, run / "adapter")
        try:
            return evaluate(opened, engine, "base")
        finally:
            engine.unload(opened.name)


def publish(run: Path, replica: Replica) -> int:
    return training(["publish", "--run", str(run), "--store", str(replica.store)])


def serves(replica: Replica, adapter: str, wanted: str) -> bool:
    return replica.ready()["adapters"].get(adapter) == wanted


@pytest.fixture(scope="module")
def promoted(good_run: Path, replica: Replica) -> str:
    """Digest of the good adapter, promoted and served."""
    assert judge(replica, good_run)["passed"]
    assert publish(good_run, replica) == 0
    digest = promoted_digest(open_store(replica.store), "kubectl")
    assert digest
    wait_until(lambda: serves(replica, "kubectl", version(digest)), SWITCH_SECONDS, "hot load")
    return digest


def test_a_replica_without_adapters_serves_the_base_and_nothing_else(replica: Replica) -> None:
    assert list(replica.models()) == ["base"]
    assert replica.chat("base", "hello").status_code == 200
    missing = replica.chat("kubectl", "hello")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_the_useless_adapter_fails_its_gate_and_is_never_promoted(useless_run: Path, replica: Replica) -> None:
    result = judge(replica, useless_run)
    assert not result["passed"]
    assert result["gain_ci95"][0] <= 0 <= result["gain_ci95"][1]
    assert result["verdict"].startswith("FAILED")
    # Nothing tells it from the base, so there is nothing by which a replica could prove that it serves it.
    assert not (useless_run / "canaries.json").exists()
    assert publish(useless_run, replica) == 3
    assert promoted_digest(open_store(replica.store), "useless") is None
    assert replica.chat("useless", "hello").status_code == 404


def test_the_good_adapter_passes_and_answers_through_its_alias(promoted: str, good_run: Path, replica: Replica) -> None:
    evaluation = read_json(good_run / "evaluation.json")
    assert evaluation["adapter"] > evaluation["base"] + 0.1
    assert evaluation["gain_ci95"][0] > evaluation["min_gain"]
    reply = replica.chat("kubectl", question(good_run)).json()
    assert reply["model"] == f"kubectl.{version(promoted)}"
    sample = evaluation["samples"][0]
    assert reply["choices"][0]["message"]["content"] == sample["adapter"] != sample["base"]
    assert replica.models()["kubectl"]["digest"] == promoted


def test_streams_pass_through_the_request_layer_whole(promoted: str, good_run: Path, replica: Replica) -> None:
    body = {
        "model": "kubectl",
        "messages": [{"role": "user", "content": question(good_run)}],
        "temperature": 0,
        "max_tokens": 48,
        "stream": True,
    }
    headers = {"api-key": "any"}
    with httpx.stream("POST", f"{replica.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == replica.chat("kubectl", question(good_run)).json()["choices"][0]["message"]["content"]
    assert len(chunks) > 3


def clients(replica: Replica) -> dict[str, openai.OpenAI]:
    """Strangers' clients, after one change: the endpoint."""
    azure = openai.AzureOpenAI(azure_endpoint=replica.url, api_key="any", api_version="2024-10-21", max_retries=0)
    newer = openai.OpenAI(base_url=f"{replica.url}/openai/v1/", api_key="any", max_retries=0)
    return {"openai": openai.OpenAI(base_url=f"{replica.url}/v1", api_key="any"), "azure": azure, "azure v1": newer}


@pytest.mark.parametrize("kind", ["openai", "azure", "azure v1"])
def test_clients_written_for_openai_and_azure_openai_work(
    promoted: str, good_run: Path, replica: Replica, kind: str
) -> None:
    client, wanted = clients(replica)[kind], replica.chat("kubectl", question(good_run)).json()
    asked: Any = {
        "model": "kubectl", "messages": [{"role": "user", "content": question(good_run)}], "temperature": 0,
        "max_tokens": 48,
    }  # fmt: skip
    answer = client.chat.completions.create(**asked, logprobs=True)
    assert answer.choices[0].message.content == wanted["choices"][0]["message"]["content"]
    assert answer.model == f"kubectl.{version(promoted)}"
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert len(parts) > 3 and "".join(parts) == answer.choices[0].message.content
    assert client.completions.create(model="kubectl", prompt="a", max_tokens=2).choices[0].text
    assert [model.id for model in client.models.list()] == ["base", "kubectl"]
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(**asked | {"model": "gpt-4"})
    assert refused.value.code == ("DeploymentNotFound" if kind == "azure" else "model_not_found")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked | {"max_tokens": 100_000})


def test_plain_peft_computes_what_vllm_serves(promoted: str, good_run: Path) -> None:
    """The adapter is PEFT's own format, and vLLM's LoRA kernels give PEFT's log-probabilities (vLLM issue 10798)."""
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recorded = canaries.load(good_run / "canaries.json")
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, good_run / "adapter").eval()
    for canary in recorded.canaries:
        ids = torch.tensor([canary.token_ids])
        with torch.no_grad():
            told = torch.log_softmax(model(ids).logits[0, :-1], -1)
            told = told.gather(1, ids[0, 1:, None])[canary.prompt_length - 1 :, 0].tolist()
        assert canaries.mean_difference(told, canary.adapter) < 0.002
        assert canary.contrast > canaries.CONTRAST * canaries.TOLERANCE


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/adapters"),
        ("DELETE", "/adapters/kubectl"),
        ("POST", "/tokenize"),
        ("POST", "/invocations"),
        ("POST", "/v1/responses"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "//v1/load_lora_adapter"),
        ("POST", "/v1/./load_lora_adapter"),
        ("POST", "/v1/%6coad_lora_adapter"),
    ],
)
def test_routes_of_vllm_that_clients_do_not_need_are_closed(replica: Replica, method: str, path: str) -> None:
    response = httpx.request(method, replica.url + path, json={}, headers={"x-drydock-sidecar": "guess"})
    assert response.status_code == 404
    assert "is not served here" in response.json()["error"]["message"]


def test_a_second_adapter_is_served_beside_the_first(promoted: str, work: Path, replica: Replica) -> None:
    run = tune(work, "second", lora_r=8, lora_alpha=16, num_train_epochs=2)
    assert judge(replica, run)["passed"]
    assert publish(run, replica) == 0
    digest = promoted_digest(open_store(replica.store), "second")
    assert digest
    wait_until(lambda: serves(replica, "second", version(digest)), SWITCH_SECONDS, "hot load of the second")
    assert replica.chat("second", question(run)).json()["model"] == f"second.{version(digest)}"
    assert replica.chat("kubectl", question(run)).json()["model"] == f"kubectl.{version(promoted)}"


def test_an_adapter_that_answers_as_the_base_is_refused_and_the_old_version_stays(
    promoted: str, good_run: Path, work: Path, replica: Replica
) -> None:
    """Weights without effect load without an error and serve the base in the adapter's name (vLLM issue 34186)."""
    broken = work / "runs" / "broken"
    shutil.copytree(good_run, broken)
    weights = load_file(broken / "adapter" / "adapter_model.safetensors")
    zeroed = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(zeroed, broken / "adapter" / "adapter_model.safetensors")
    assert publish(broken, replica) == 2, "its evaluation is of other weights"
    forged = read_json(broken / "evaluation.json") | subject(broken, open_run(broken).spec)
    write_json(broken / "evaluation.json", forged)
    assert publish(broken, replica) == 0
    digest = promoted_digest(open_store(replica.store), "kubectl")
    assert digest and digest != promoted
    wait_until(lambda: "kubectl" in replica.ready()["refused"], SWITCH_SECONDS, "refusal")
    state = replica.ready()
    assert "canaries differ" in state["refused"]["kubectl"]
    assert state["ready"] and state["adapters"]["kubectl"] == version(promoted)
    assert replica.chat("kubectl", "hello").json()["model"] == f"kubectl.{version(promoted)}"
    assert replica.chat(f"kubectl.{version(digest)}", "hello").status_code == 404


def test_a_new_version_switches_under_load_and_rollback_is_moving_the_tag(
    promoted: str, good_run: Path, work: Path, replica: Replica
) -> None:
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    newer = work / "runs" / "newer"
    shutil.copytree(good_run, newer)
    evaluation = read_json(newer / "evaluation.json")
    write_json(newer / "evaluation.json", evaluation | {"note": "another version with the same weights"})
    stop = Event()

    def client() -> list[tuple[int, str]]:
        seen = []
        while not stop.is_set():
            response = replica.chat("kubectl", question(good_run), max_tokens=16)
            seen.append((response.status_code, response.json().get("model", response.text)))
        return seen

    store = open_store(replica.store)
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        try:
            assert publish(newer, replica) == 0
            digest = promoted_digest(store, "kubectl")
            assert digest
            wait_until(lambda: serves(replica, "kubectl", version(digest)), SWITCH_SECONDS, "switch under load")
            promote(store, "kubectl", promoted)
            wait_until(lambda: serves(replica, "kubectl", version(promoted)), SWITCH_SECONDS, "rollback under load")
        finally:
            stop.set()
    answers = [answer for client in clients for answer in client.result()]
    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == {f"kubectl.{version(promoted)}", f"kubectl.{version(digest)}"}
    with replica.inside() as engine:
        wait_until(lambda: f"kubectl.{version(digest)}" not in engine.models(), SWITCH_SECONDS, "old one unloaded")


def test_a_killed_engine_comes_back_with_all_its_adapters(promoted: str, replica: Replica) -> None:
    """/health alone is true before the adapters are back (vLLM issue 12174); /ready is not."""
    os.killpg(replica.engine.pid, signal.SIGKILL)
    replica.engine.wait()
    replica.start_engine()
    replica.wait_ready()
    state = replica.ready()
    assert state["adapters"]["kubectl"] == version(promoted)
    assert "second" in state["adapters"]
    assert replica.chat("kubectl", "hello").status_code == 200
