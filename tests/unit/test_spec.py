"""The typed descriptions of tuning and serving: familiar names, all problems at once, no torch, honest fingerprint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.lora import vllm_lora_rank
from common.settings import SettingsError, load_settings
from serving.spec import ServingSpec
from training.spec import TuningSpec

PASTED = """\
learning_rate: 2e-4
num_train_epochs: 3
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
"""
OWN = "adapter: a\nbase_model: base\ndataset: d.jsonl\n"
BASIC = {"adapter": "a", "base_model": "base", "dataset": "d.jsonl"}


def load(tmp_path: Path, text: str) -> TuningSpec:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return load_settings(path, TuningSpec)


def fingerprint(**settings: Any) -> str:
    return TuningSpec.model_validate(BASIC | settings).fingerprint(dataset_digest="d", base_revision="r")


def test_the_familiar_block_pastes_in_unchanged(tmp_path: Path) -> None:
    spec = load(tmp_path, OWN + PASTED)
    assert spec.learning_rate == 0.0002
    assert isinstance(spec.learning_rate, float)
    assert (spec.num_train_epochs, spec.per_device_train_batch_size, spec.gradient_accumulation_steps) == (3, 4, 4)
    assert (spec.lora_r, spec.lora_alpha, spec.lora_dropout) == (16, 32, 0.05)


def test_a_wrong_file_is_told_whole_with_lines_and_nearest_names(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load(
            tmp_path,
            "adapter: My_Adapter\nbase_model: b\nlearning-rate: 1e-4\nlora_rank: 8\nlora_dropout: 1.5\nlora_r: 513\ngate:\n  min_gains: 0\n",
        )
    told = "\n".join(caught.value.problems).replace(str(tmp_path), "")
    for part in (
        "spec.yaml:1: adapter: ",
        "spec.yaml: dataset: required, but absent",
        "spec.yaml:3: learning-rate: unknown setting; did you mean learning_rate?",
        "spec.yaml:4: lora_rank: unknown setting; did you mean lora_",
        "spec.yaml:5: lora_dropout: should be less than 1, found 1.5",
        "spec.yaml:6: lora_r: should be less than or equal to 512, found 513",
        "spec.yaml:8: gate.min_gains: unknown setting; did you mean min_gain?",
    ):
        assert part in told
    assert len(caught.value.problems) == 7


@pytest.mark.parametrize("name", ["a", "k8s-ops", "0", "a" * 40])
def test_a_name_that_suits_client_volume_and_registry_is_taken(name: str) -> None:
    assert TuningSpec.model_validate(BASIC | {"adapter": name}).adapter == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "a b", "a" * 41, "a\n", "é"])
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="adapter"):
        TuningSpec.model_validate(BASIC | {"adapter": name})


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3}, {"num_train_epochs": 1}, {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2}, {"lora_r": 8}, {"lora_alpha": 16}, {"lora_dropout": 0.0},
        {"lora_target_modules": ("q_proj",)}, {"max_seq_length": 512}, {"lr_scheduler_type": "cosine"},
        {"warmup_ratio": 0.1}, {"weight_decay": 0.1}, {"max_grad_norm": 0.5}, {"seed": 1}, {"held_out_fraction": 0.2},
        {"load_in_4bit": True},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_the_fingerprint_changes_with_whatever_decides_the_weights(change: dict[str, Any]) -> None:
    assert fingerprint(**change) != fingerprint()


def test_the_fingerprint_changes_with_data_and_base() -> None:
    spec = TuningSpec.model_validate(BASIC)
    pairs = [("d", "r"), ("d2", "r"), ("d", "r2")]
    assert len({spec.fingerprint(dataset_digest=d, base_revision=r) for d, r in pairs}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"logging_steps": 1}, {"save_steps": 7}, {"save_minutes": 1}, {"gradient_checkpointing": True},
        {"gate": {"min_gain": 0.5}}, {"dataset": "x"}, {"base_model": "y"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_the_fingerprint_ignores_how_often_it_logs_the_gate_and_where_things_lie(change: dict[str, Any]) -> None:
    assert fingerprint(**change) == fingerprint()


@pytest.mark.parametrize(
    "rank,allowed", [(1, 1), (2, 8), (8, 8), (9, 16), (24, 32), (257, 320), (321, 512), (512, 512)]
)
def test_a_rank_is_rounded_up_to_the_next_one_that_vllm_takes(rank: int, allowed: int) -> None:
    assert vllm_lora_rank(rank) == allowed


def test_a_rank_beyond_vllms_largest_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"513.*512"):
        vllm_lora_rank(513)


def test_a_serving_spec_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="device"):
        ServingSpec.model_validate({"base_model": "b", "store": "s", "device": "tpu"})


def test_settings_and_serving_need_no_torch() -> None:
    modules = "training.spec, training.__main__, serving.spec, serving.middleware, serving.sidecar, rehearsal.chain"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
