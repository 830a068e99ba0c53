"""Adapters from elsewhere: what is taken in, what is said of it and what is not, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.adapter import fetch_adapter, promoted_digest
from artifacts.store import open_store
from common import exits
from common.files import file_digest, read_json, read_jsonl, tree_digest, write_json
from serving.evaluate import open_run
from tests.unit.conftest import ROWS
from training.__main__ import main
from training.publish import subject

EVALUATION = {
    "metric": "exact_match", "base": 0.25, "adapter": 0.75, "gain_ci95": [0.4, 0.6], "examples": 40, "passed": True,
    "verdict": "PASSED: better", "versions": {"vllm": "2"}, "seconds": 1.5,
}  # fmt: skip


@pytest.fixture
def peer(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """An adapter that plain PEFT made and saved."""

    def make(**settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(tiny_base)
        values: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **(values | settings))).save_pretrained(
            tmp_path / "peer"
        )
        return tmp_path / "peer"

    return make


@pytest.fixture
def adopt(tiny_base: Path, rows_file: Path, tmp_path: Path) -> Callable[..., int]:
    def run(adapter: Path, out: str = "run", **change: Any) -> int:
        values: dict[str, Any] = {"adapter": "theirs", "base_model": str(tiny_base), "dataset": str(rows_file)}
        values |= {"held_out_fraction": 0.5, "gate": {"min_gain": 0.1, "min_examples": 5}}
        write_json(tmp_path / "spec.yaml", values | change)
        return main(
            ["adopt", "--spec", str(tmp_path / "spec.yaml"), "--adapter", str(adapter), "--out", str(tmp_path / out)]
        )

    return run


def test_an_adapter_of_plain_peft_becomes_a_run_to_evaluate_and_publish(
    peer: Callable[..., Path], adopt: Callable[..., int], tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    from peft import __version__ as peft_version

    run, adapter = tmp_path / "run", peer()
    assert adopt(adapter, learning_rate=1e-3) == exits.OK
    opened = open_run(run)
    assert (opened.spec.adapter, opened.spec.lora_r, opened.spec.gate.min_gain) == ("theirs", 3, 0.1)
    assert opened.spec.lora_target_modules == ("down_proj", "q_proj")
    asked = list(read_jsonl(run / "held_out.jsonl"))
    assert asked and len(asked) < len(ROWS) and all(row in ROWS for row in asked)
    tuning = read_json(run / "tuning.json")
    weights = file_digest(adapter / "adapter_model.safetensors")
    assert file_digest(run / "adapter" / "adapter_model.safetensors") == weights
    assert tuning["adopted"]["files"]["adapter_model.safetensors"] == weights
    assert (tuning["dataset_digest"], tuning["base_revision"]) == (file_digest(rows_file), tree_digest(tiny_base))
    assert tuning["versions"] == {"peft": peft_version}
    assert not {"steps", "tokens", "seconds", "final_loss", "examples", "seed"} & set(tuning), "nobody measured them"

    write_json(run / "evaluation.json", EVALUATION | subject(run, opened.spec))
    assert main(["publish", "--run", str(run), "--store", str(tmp_path / "store")]) == exits.OK
    store = open_store(tmp_path / "store")
    digest = promoted_digest(store, "theirs")
    assert digest
    fetched = fetch_adapter(store, "theirs", digest, tmp_path / "fetched")
    assert fetched.card.lora_rank == 3
    assert "learning_rate" not in fetched.card.tuning and "learning_rate" not in read_json(run / "spec.json")
    readme = (fetched.folder / "README.md").read_text()
    assert f"tuned elsewhere with PEFT {peft_version} and adopted here: how it was tuned is not known" in readme
    assert "held-out rows of the dataset; whether its tuning saw them is not known" in readme
    assert "never saw" not in readme and "learning_rate" not in readme and "curves" not in readme


def test_what_vllm_would_refuse_is_refused_with_all_reasons(
    peer: Callable[..., Path], adopt: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt(peer(use_dora=True, bias="all", modules_to_save=["lm_head"])) == exits.INPUT
    told = capsys.readouterr().err
    assert "use_dora is True" in told and "bias is 'all'" in told and "modules_to_save is ['lm_head']" in told
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_is_refused(
    peer: Callable[..., Path], adopt: Callable[..., int], tiny_base: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from safetensors.numpy import load_file, save_file

    adapter = peer()
    tensors = load_file(adapter / "adapter_model.safetensors")
    q, down = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.down_proj"
    tensors[f"{q}.lora_B.weight"] = tensors[f"{q}.lora_B.weight"][:16]
    for side in "AB":
        moved = tensors.pop(f"{down}.lora_{side}.weight")
        tensors[f"{down.replace('layers.1', 'layers.7')}.lora_{side}.weight"] = moved
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert adopt(adapter) == exits.INPUT
    told = capsys.readouterr().err.splitlines()
    assert [line.partition("safetensors: ")[2] for line in told if "safetensors: " in line] == [
        f"layers that {tiny_base} lacks: model.layers.7.mlp.down_proj; name the base that it was tuned on",
        f"sizes that are not those of {tiny_base}: model.layers.0.self_attn.q_proj is for (16, 32), and there is "
        "(32, 32); name the base that it was tuned on",
    ]


def test_no_signature_of_an_address_is_written_down(
    peer: Callable[..., Path], adopt: Callable[..., int], tmp_path: Path, rows_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("training.begin.local", lambda dataset, sha256: rows_file)
    assert adopt(peer(), dataset="https://example.com/rows.jsonl?sig=secret") == exits.OK
    assert read_json(tmp_path / "run" / "spec.json")["dataset"] == "https://example.com/rows.jsonl"
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"secret" in p.read_bytes()]


def test_settings_that_contradict_the_adapter_are_told(
    peer: Callable[..., Path], adopt: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt(peer(), lora_r=16, lora_alpha=6) == exits.INPUT
    told = capsys.readouterr().err
    assert "lora_r: the settings say 16, the adapter's adapter_config.json 3; leave it out" in told
    assert "lora_alpha" not in told


def test_the_same_adapter_again_keeps_its_verdict_and_another_is_not_written_over_it(
    peer: Callable[..., Path], adopt: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, adapter = tmp_path / "run", peer()
    adopt(adapter)
    write_json(run / "evaluation.json", EVALUATION)
    assert adopt(adapter) == exits.OK
    assert (run / "evaluation.json").exists()
    assert adopt(adapter, held_out_fraction=0.4) == exits.OK
    assert not (run / "evaluation.json").exists(), "it was measured on other rows"
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 7}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    before = tree_digest(run)
    assert adopt(adapter) == exits.INPUT
    assert "holds something else, which would be lost; name a new folder" in capsys.readouterr().err
    assert tree_digest(run) == before


def test_tuning_does_not_take_an_adopted_run_for_its_own(
    peer: Callable[..., Path], adopt: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adopt(peer())
    command = [
        "tune",
        "--spec",
        str(tmp_path / "spec.yaml"),
        "--out",
        str(tmp_path / "run"),
        "--metrics-address",
        "off",
    ]
    assert main(command) == exits.INPUT
    assert "is of a finished run with other settings, data or base" in capsys.readouterr().err
