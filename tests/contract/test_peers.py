"""Beside its peers: adapters go both ways between plain PEFT and here, and what is claimed of bases holds in vLLM."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import localcloud.registry
from artifacts.adapter import promoted_digest
from artifacts.store import open_store
from common.chat import answer, prompt_messages
from common.files import read_json, read_jsonl, write_json
from serving.evaluate import evaluate, open_run
from tests.contract.conftest import BASE, ROOT, Replica
from tests.contract.kaito import needs_images, pushed
from training import tune as module
from training.__main__ import main as training
from training.base import ARCHITECTURES, load_tokenizer
from training.encode import Example
from training.model import load_model
from training.packing import ATTENTION, summed_loss
from training.publish import subject
from training.spec import TuningSpec

CPU = torch.device("cpu")
TOKEN = "hf_a_secret_that_nobody_may_see"


# Theirs to us.


def tune_with_peft(folder: Path, rows: Path) -> Path:
    """An adapter as anybody makes one with transformers and PEFT: padded batches, the loss over whole rows.

    With what is odd in KAITO's: no task type, target modules as an expression, and a base at a path of its pod.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*\.(q|v|o|up|down)_proj")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config).train()
    texts = [
        tokenizer.apply_chat_template(
            [*prompt_messages(row), {"role": "assistant", "content": answer(row)}], tokenize=False
        )
        for row in read_jsonl(rows)
    ]
    random.Random(0).shuffle(texts)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for first in range(0, len(texts), 8):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[first : first + 8]]
        width = max(map(len, ids))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        labels = padded.masked_fill(mask == 0, -100)
        model(input_ids=padded, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    config_file = folder / "adapter_config.json"
    written = json.loads(config_file.read_text()) | {"base_model_name_or_path": "/workspace/weights"}
    assert isinstance(written["target_modules"], str) and written["modules_to_save"] is None
    config_file.write_text(json.dumps(written))
    return folder


@needs_images
def test_an_adapter_that_kaito_pushed_is_proven_by_vllm_and_promoted(
    work: Path, tmp_path: Path, replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, run, store = tmp_path / "theirs", tmp_path / "run", tmp_path / "store"
    tune_with_peft(theirs, work / "rows.jsonl")
    settings = {"adapter": "theirs", "base_model": str(BASE), "dataset": str(work / "rows.jsonl")}
    write_json(
        tmp_path / "spec.yaml",
        settings | {"held_out_fraction": 0.1, "gate": {"min_examples": 5}, "max_seq_length": 256},
    )
    with localcloud.registry.serve(tmp_path / "registry") as host:
        pushed(theirs, f"{host}/kaito/theirs:v1", tmp_path / "pusher", "phi-3-mini-4k-instruct")
        command = ["adopt", "--spec", str(tmp_path / "spec.yaml"), "--adapter", f"oci://{host}/kaito/theirs:v1"]
        assert training([*command, "--out", str(run)]) == 0
    assert "its image says that it was tuned on phi-3-mini-4k-instruct; it will be measured on" in caplog.text
    adopted = read_json(run / "tuning.json")["adopted"]
    assert adopted["image"].startswith(f"{host}/kaito/theirs@sha256:")
    assert not list(tmp_path.glob(".image-*"))
    opened = open_run(run)
    assert opened.spec.lora_target_modules == ("down_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    with replica.inside() as engine:
        engine.load(opened.name, run / "adapter")
        try:
            result = evaluate(opened, engine, "base")
        finally:
            engine.unload(opened.name)
    assert result["passed"], result["verdict"]
    assert training(["publish", "--run", str(run), "--store", str(store)]) == 0
    assert promoted_digest(open_store(store), "theirs")
    readme = (run / "README.md").read_text()
    assert "adopted here" in readme and result["verdict"] in readme and adopted["image"] in readme


# Ours to them, and what the command shows of itself.


def test_plain_peft_loads_ours_and_gives_the_logits_of_the_tuned_model(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kept: list[Any] = []

    def keep(*given: Any) -> Any:
        kept.append(load_model(*given))
        return kept[0]

    monkeypatch.setattr(module, "load_model", keep)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((work / "rows.jsonl").read_text().splitlines(keepends=True)[:120]))
    spec = TuningSpec(
        adapter="ours", base_model=str(BASE), dataset=str(rows), max_seq_length=256, learning_rate=2e-3,
        num_train_epochs=1, held_out_fraction=0.2, gate={"min_examples": 5},
    )  # fmt: skip
    module.tune(spec, tmp_path / "run")
    tuned = kept[0].eval()
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = load_tokenizer(BASE)
    largest = moved = 0.0
    for row in list(read_jsonl(tmp_path / "run" / "held_out.jsonl"))[:8]:
        text = tokenizer.apply_chat_template(prompt_messages(row), tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            plain = base(ids).logits
            ours = tuned(input_ids=ids).logits
            theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
            largest = max(largest, (theirs(ids).logits - ours).abs().max().item())
            moved = max(moved, (plain - ours).abs().max().item())
            theirs.unload()
    assert moved > 0.1, "the adapter does something"
    assert largest < 1e-5


def test_a_log_for_machines_is_json_and_the_token_of_a_gated_base_is_nowhere(work: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((work / "rows.jsonl").read_text().splitlines(keepends=True)[:60]))
    settings = {"adapter": "ours", "base_model": str(BASE), "dataset": str(rows), "max_seq_length": 256}
    write_json(
        tmp_path / "spec.yaml",
        settings | {"num_train_epochs": 1, "held_out_fraction": 0.3, "gate": {"min_examples": 5}, "save_steps": 1},
    )
    command = [sys.executable, "-m", "training", "tune", "--spec", str(tmp_path / "spec.yaml")]
    command += ["--out", str(tmp_path / "run"), "--metrics-address", "off"]
    environment = {name: value for name, value in os.environ.items() if name != "DRYDOCK_LOG"}
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment | dict.fromkeys(names, TOKEN), timeout=120
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "message"} <= set(record) for record in records)
    (last,) = [record for record in records if record.get("eta_seconds") == 0]
    assert last["message"].startswith(f"step {last['total_steps']}/{last['total_steps']}")
    assert last["loss"] > 0 and last["tokens_per_second"] > 0
    ended = json.loads(done.stdout)
    assert ended["final_loss"] == read_json(tmp_path / "run" / "tuning.json")["final_loss"]

    write_json(tmp_path / "run" / "evaluation.json", {
        "metric": "exact_match", "base": 0.1, "adapter": 0.2, "gain_ci95": [-0.1, 0.3], "examples": 18,
        "passed": False, "verdict": "FAILED: by hand", "versions": {},
    } | subject(tmp_path / "run", open_run(tmp_path / "run").spec))  # fmt: skip
    assert training(["publish", "--run", str(tmp_path / "run"), "--store", str(tmp_path / "store")]) == 3
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr


# Which bases.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_base_that_is_taken_keeps_packed_rows_apart(architecture: str) -> None:
    """The loss of rows packed into one pass is the sum of what plain transformers gives to each row alone."""
    import transformers

    config_class = getattr(transformers, architecture).config_class
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    if getattr(config_class(), "sliding_window", None):
        shape["sliding_window"] = 6  # shorter than the rows
    config = config_class(**shape)
    plain = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
    packed = getattr(transformers, architecture)._from_config(config, attn_implementation=ATTENTION).eval()
    packed.load_state_dict(plain.state_dict())
    rows = [tuple(random.Random(n).choices(range(1, 64), k=n)) for n in (5, 12, 9)]
    with torch.no_grad():
        alone = 0.0
        for ids in rows:
            said = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
            alone -= sum(said[at - 1, ids[at]].item() for at in range(3, len(ids)))
        together = summed_loss(packed, [Example(n, ids, 3) for n, ids in enumerate(rows)], CPU).item()
    assert together == pytest.approx(alone, rel=1e-4)


def _is_literal(value: ast.Tuple) -> bool:
    return len(value.elts) == 2 and all(isinstance(each, ast.Constant) for each in value.elts)


def test_vllm_serves_lora_on_every_base_that_is_taken() -> None:
    """Read from vLLM's source: importing its models would take minutes."""
    spec = importlib.util.find_spec("vllm")
    assert spec and spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0]) / "model_executor" / "models"
    registry = {
        key.value: tuple(ast.literal_eval(value))
        for node in ast.walk(ast.parse((models / "registry.py").read_text()))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and _is_literal(value)
    }

    def serves_lora(name: str, file: str) -> bool:
        classes = {
            n.name: n for n in ast.parse((models / f"{file}.py").read_text()).body if isinstance(n, ast.ClassDef)
        }
        if name not in classes:  # it comes from another model's file
            return name == "LlamaForCausalLM" and file != "llama" and serves_lora(name, "llama")
        bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
        return "SupportsLoRA" in bases or any(serves_lora(base, file) for base in bases if base.endswith("ForCausalLM"))

    refused = [name for name in ARCHITECTURES if not serves_lora(registry[name][1], registry[name][0])]
    assert not refused
    assert not serves_lora("MambaForCausalLM", "mamba"), "this looks at something"
