"""What is refused before a weight is loaded: bases that cannot be tuned or served, too little disk, all told at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file, save_file

from common.settings import SettingsError
from tests.unit.conftest import ROWS
from training import preflight
from training import tune as module
from training.base import base_folder
from training.spec import TuningSpec

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base to spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def spec(base: Path, **values: Any) -> TuningSpec:
    return TuningSpec(adapter="mine", base_model=str(base), dataset="d.jsonl", **values)


def shard(base: Path) -> None:
    """Weights in two files with an index, the second of which is absent."""
    names = sorted(load_file(base / WEIGHTS))
    (base / WEIGHTS).rename(base / "model-00001-of-00002.safetensors")
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def truncate(base: Path) -> None:
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-64])


def shrink_embeddings(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    save_file(tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:-8]}, base / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda base: (base / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda base: (base / WEIGHTS).unlink(), r"lacks weights \(\*\.safetensors\)"),
        (shard, r"lacks model-00002-of-00002.safetensors of the weights, which model.safetensors.index.json names"),
        (truncate, r"model.safetensors is not a whole safetensors file \(.*\); fetch the base again"),
        (shrink_embeddings, r"its embeddings have \d+ rows, config.json says vocab_size \d+"),
        (lambda base: (base / "config.json").write_text("{"), "config.json is not JSON"),
        (
            lambda base: change(base / "config.json", architectures=["MambaForCausalLM"]),
            "is a MambaForCausalLM; what can be tuned and served here are LlamaForCausalLM, ",
        ),
        (lambda base: change(base / "config.json", architectures=None), "is a model that names no architecture"),
        (
            lambda base: change(base / "config.json", quantization_config={"quant_method": "awq"}),
            "is quantised itself .awq.; give the base that it was made from, and load_in_4bit: true",
        ),
    ],
)
def test_a_base_that_cannot_be_tuned_is_told_with_the_remedy(
    base: Path, spoil: Callable[[Path], object], told: str
) -> None:
    spoil(base)
    with pytest.raises(SettingsError, match=rf"^base_model: .*base: {told}"):
        base_folder(str(base))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 64}, True),  # Phi-3's way
        ({"rope_parameters": {"rope_type": "dynamic", "original_max_position_embeddings": 64}}, True),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}, True),
        ({"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 128}, False),
        ({"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64}}, False),
        ({"max_position_embeddings": 64}, False),
    ],
)
def test_rows_whose_positions_depend_on_their_neighbours_are_refused(config: dict[str, Any], told: bool) -> None:
    found = preflight.rope_problems(config, 128)
    assert bool(found) == told
    assert all("max_seq_length: 128 is beyond the 64 tokens" in problem for problem in found)


def test_a_cut_tokenizer_is_told(base: Path) -> None:
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text()[:300])
    (told,) = preflight.problems(spec(base), base / "out")
    assert "its tokenizer cannot be read (" in told and "fetch the base again" in told


def test_a_tokenizer_of_another_model_is_refused(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    tensors = load_file(base / WEIGHTS)
    save_file(tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:300]}, base / WEIGHTS)
    change(base / "config.json", vocab_size=300)
    (problem,) = preflight.problems(spec(base), base)
    assert f"the tokenizer has {config['vocab_size']} tokens and the model 300" in problem


def test_problems_of_base_layers_and_data_are_told_together_and_nothing_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("weights were loaded"))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    rows = tmp_path / "d.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:2], ROWS[0], {"instruction": "a"}]))
    broken = spec(base, lora_target_modules=("q_proj", "c_attn")).model_copy(update={"dataset": str(rows)})
    with pytest.raises(SettingsError) as caught:
        module.tune(broken, tmp_path / "out")
    told = caught.value.problems
    assert [problem.split(": found")[0].replace(str(base), "BASE") for problem in told] == [
        "base_model: BASE: no chat template; use an instruct model, or add chat_template.jinja",
        "lora_target_modules: c_attn not in this base; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        f"{rows}:3", f"{rows}:4", f"{rows}:4",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_disk_is_told_with_what_is_needed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = spec(tiny_base, lora_r=4, lora_target_modules=("q_proj", "down_proj"))
    # Two layers; q: 32 to 32, down: 64 to 32. Three checkpoints of three fp32 numbers a weight, and the adapter.
    weights = 2 * 4 * ((32 + 32) + (64 + 32))
    assert preflight.adapter_weights(settings, preflight.linear_layers(tiny_base)) == weights
    needed = weights * 4 * (3 * 3 + 1)
    out = tmp_path / "not" / "there"
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(0, 0, needed))
    assert preflight.problems(settings, out) == []
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(0, 0, needed - 1))
    (problem,) = preflight.problems(settings, out)
    assert problem.startswith(f"--out: {out}: 0.00 GiB are needed for 2 checkpoints") and "lower lora_r" in problem
    (out / "checkpoints" / "step-1").mkdir(parents=True)
    (out / "checkpoints" / "step-1" / "trainer.pt").write_bytes(b"1")
    assert preflight.problems(settings, out) == [], "what a run that resumes has there already is not needed again"
