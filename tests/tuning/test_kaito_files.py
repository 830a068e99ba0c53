"""What KAITO is told, by the libraries that read it there; and its adapter's way through our own commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts.adapter import promoted_digest
from artifacts.store import open_store
from common import exits
from common.files import read_json, read_jsonl, write_json
from infra.datasets import for_kaito
from serving.evaluate import open_run
from tests.unit.test_kaito_tuning import config
from training.__main__ import main
from training.publish import subject
from training.spec import TuningSettings
from workloads.kaito_tuning import ADAPTER_FILES

# Of KAITO's own classes (cli.py), which are not here; LoraConfig and TrainingArguments are of peft and transformers.
OWN_FIELDS = {
    "ModelConfig": {"pretrained_model_name_or_path", "torch_dtype", "device_map", "local_files_only", "chat_template"},
    "QuantizationConfig": {
        "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant",
    },
    "DatasetConfig": {
        "dataset_path", "dataset_extension", "shuffle_dataset", "shuffle_seed", "train_test_split", "response_column",
    },
    "DataCollator": {"mlm"},
}  # fmt: skip


def test_every_field_is_one_that_kaitos_parser_takes() -> None:
    """As its parser does it: each section becomes a command line, and a field that is not known ends the training."""
    from peft import LoraConfig
    from transformers import HfArgumentParser, TrainingArguments

    sections = config(load_in_4bit=True, max_seq_length=2048)
    assert set(sections) == {*OWN_FIELDS, "LoraConfig", "TrainingArguments"}
    assert {name for name, known in OWN_FIELDS.items() if not set(sections[name]) <= known} == set()
    assert set(sections["LoraConfig"]) <= set(LoraConfig.__dataclass_fields__)
    arguments = sections["TrainingArguments"]
    assert arguments.pop("max_length") == 2048  # TRL's
    line = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    (read_back,) = HfArgumentParser((TrainingArguments,)).parse_args_into_dataclasses(line)
    assert {key: getattr(read_back, key) for key in arguments if key not in ("save_strategy", "lr_scheduler_type")} == {
        key: value for key, value in arguments.items() if key not in ("save_strategy", "lr_scheduler_type")
    }
    assert read_back.lr_scheduler_type == "linear" and read_back.save_strategy == "no"


def test_what_kaito_leaves_becomes_a_run_and_its_gate_asks_what_it_never_saw(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fine_tuning.py ends: the trainer's adapter, its model card, and the sentinel, beside each other."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("DRYDOCK_CACHE", str(tmp_path / "cache"))
    told = for_kaito(rows_file, TuningSettings(dataset=str(rows_file), held_out_fraction=0.5))
    left = tmp_path / "results"
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    lora = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.05, target_modules=["q_proj", "down_proj"])
    get_peft_model(base, lora).save_pretrained(left)
    peft = read_json(left / "adapter_config.json")
    write_json(left / "adapter_config.json", peft | {"base_model_name_or_path": "/workspace/tfs/weights"})
    (left / "fine_tuning_completed.txt").write_text("Fine-Tuning completed at 2026-08-21-20-00-00\n")
    fetched = tmp_path / "peer"  # the Job fetches these two alone
    fetched.mkdir()
    for name in ADAPTER_FILES:
        (fetched / name).write_bytes((left / name).read_bytes())

    # All settings of the adapter, as the ConfigMap has them: those of the files must not contradict them.
    spec = {"adapter": "notes", "base_model": str(tiny_base), "dataset": str(rows_file), "held_out_fraction": 0.5}
    whole = TuningSettings(dataset=str(rows_file), lora_r=3, lora_alpha=6).model_dump(mode="json") | spec
    write_json(tmp_path / "tuning.json", whole)
    out = tmp_path / "run"
    arguments = ["--spec", str(tmp_path / "tuning.json"), "--adapter", str(fetched), "--out", str(out)]
    assert main(["adopt", *arguments]) == exits.OK
    assert open_run(out).spec.adapter == "notes"
    asked = {json.dumps(row, sort_keys=True) for row in read_jsonl(out / "held_out.jsonl")}
    seen = list(read_jsonl(told.path))
    assert asked and len(asked) + len(seen) == len(list(read_jsonl(rows_file)))

    measured = {
        "metric": "exact_match", "base": 0.25, "adapter": 0.75, "gain_ci95": [0.4, 0.6], "examples": 40, "passed": True,
        "verdict": "PASSED: better", "versions": {"vllm": "2"}, "seconds": 1.5,
    }  # fmt: skip
    write_json(out / "evaluation.json", measured | subject(out, open_run(out).spec))
    assert main(["publish", "--run", str(out), "--store", str(tmp_path / "store")]) == exits.OK
    assert promoted_digest(open_store(tmp_path / "store"), "notes")
