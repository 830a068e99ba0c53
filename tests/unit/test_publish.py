"""Publishing: what an artifact holds, and that the promoted tag moves for what passed and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifacts.adapter import fetch_adapter, promoted_digest, read_card
from artifacts.store import open_store
from common import exits
from common.files import read_json, write_json, write_jsonl
from training.__main__ import main
from training.publish import subject
from training.spec import TuningSpec

EVENTS = [
    {"step": step, "total_steps": 10, "epoch": step / 5, "loss": 2 - step / 10, "learning_rate": 1e-4,
     "tokens_per_second": 1000.0}
    for step in (5, 10)
]  # fmt: skip
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A tuned and evaluated run, without the tuning."""

    def make(*, passed: bool = True, **config: Any) -> Path:
        run = tmp_path / "run"
        spec = TuningSpec(adapter="mine", base_model="models/llama", dataset="d.jsonl", lora_r=2)
        write_json(run / "spec.json", spec.model_dump(mode="json"))
        origin = {"base_revision": "sha256:b", "dataset_digest": "sha256:d"}
        write_json(run / "tuning.json", {**origin, "examples": 1234, "dropped": 3, "versions": {"peft": "1"}})
        verdict = "PASSED: better" if passed else "FAILED: not better"
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        write_json(run / "adapter" / "adapter_config.json", settings | config)
        (run / "adapter" / "README.md").write_text("[More Information Needed]")
        weights = {KEY.format("A"): np.ones((2, 8), np.float32), KEY.format("B"): np.ones((8, 2), np.float32)}
        save_file(weights, run / "adapter" / "adapter_model.safetensors")
        figures = {"metric": "exact_match", "base": 0.25, "adapter": 0.75, "gain_ci95": [0.4, 0.6], "examples": 99}
        more = {"passed": passed, "verdict": verdict, "versions": {"vllm": "2"}, "seconds": 1.5, "samples": [{"p": 1}]}
        write_json(run / "evaluation.json", figures | more | subject(run, spec))
        write_json(run / "canaries.json", {"canaries": []})
        write_jsonl(run / "events.jsonl", EVENTS)
        return run

    return make


def publish(run: Path, store: Path) -> int:
    return main(["publish", "--run", str(run), "--store", str(store)])


def test_what_passed_is_promoted_with_all_that_proves_it(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    assert publish(run, tmp_path / "store") == exits.OK
    store = open_store(tmp_path / "store")
    digest = promoted_digest(store, "mine")
    assert digest
    fetched = fetch_adapter(store, "mine", digest, tmp_path / "fetched")
    assert {path.name for path in fetched.folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "spec.json", "tuning.json", "evaluation.json",
        "canaries.json", "README.md", "curves.svg",
    }  # fmt: skip
    card = fetched.card
    assert (card.base_model, card.base_revision, card.dataset_digest) == ("llama", "sha256:b", "sha256:d")
    assert card.tuning == read_json(run / "spec.json")
    assert card.evaluation["gain_ci95"] == [0.4, 0.6] and "samples" not in card.evaluation
    assert card.versions == {"peft": "1", "vllm": "2"}
    readme = (fetched.folder / "README.md").read_text()
    assert "PASSED: better" in readme and "1,234 rows" in readme and "+0.400 to +0.600" in readme
    assert "More Information Needed" not in readme
    assert "](curves.svg)" in readme and "| 10 | 2.00 | 1.0000 | 1.00e-04 | 1,000 |" in readme
    assert "was lost" not in readme


def test_the_card_says_how_the_run_went_and_by_which_seeds(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    more = {"steps": 10, "tokens": 54321, "seconds": 12.0, "tokens_per_second": 4526.75, "device": "cuda", "seed": 7}
    write_json(run / "tuning.json", read_json(run / "tuning.json") | more | {"peak_gpu_bytes": 3 * 2**30})
    write_json(run / "evaluation.json", read_json(run / "evaluation.json") | {"seeds": {"bootstrap": 11}})
    write_jsonl(run / "events.jsonl", EVENTS[1:])
    publish(run, tmp_path / "store")
    readme = (run / "README.md").read_text()
    assert "10 steps, 54,321 tokens in 12 s (4,527 tokens/s) on cuda; at most 3.0 GiB of GPU memory" in readme
    assert "| seeds | tuning 7, bootstrap 11 |" in readme
    assert "what was measured before step 10 was lost with an earlier attempt's disk" in readme
    assert "| learning_rate | `0.0002` |" in readme


def test_a_run_without_measurements_has_no_curves(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    publish(run, tmp_path / "store")
    (run / "events.jsonl").unlink()
    publish(run, tmp_path / "store")
    assert not (run / "curves.svg").exists() and "curves" not in (run / "README.md").read_text()


def test_publishing_the_same_run_again_makes_no_other_version(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    publish(run, tmp_path / "store")
    publish(run, tmp_path / "store")
    assert len(open_store(tmp_path / "store").tags("adapters/mine")) == 2  # its version and `promoted`


def test_what_failed_stays_a_candidate(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(make_run(), tmp_path / "store") == exits.OK
    store = open_store(tmp_path / "store")
    before = promoted_digest(store, "mine")
    capsys.readouterr()
    assert publish(make_run(passed=False), tmp_path / "store") == exits.GATE
    shown = capsys.readouterr().out
    assert "FAILED: not better" in shown
    assert promoted_digest(store, "mine") == before
    _, card = read_card(store, "mine", shown.split()[1])
    assert not card.passed


@pytest.mark.parametrize("missing", ["spec.json", "tuning.json", "evaluation.json"])
def test_a_run_that_is_not_evaluated_is_not_published(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    run = make_run()
    (run / missing).unlink()
    assert publish(run, tmp_path / "store") == exits.INPUT
    assert f"lacks {missing}" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_an_adapter_that_vllm_would_refuse_is_not_published(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(make_run(use_dora=True, bias="all"), tmp_path / "store") == exits.INPUT
    told = capsys.readouterr().err
    assert "use_dora" in told and "bias" in told


def test_a_store_that_does_not_answer_is_told_without_a_traceback(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("artifacts.registry.time.sleep", lambda seconds: None)
    assert main(["publish", "--run", str(make_run()), "--store", "oci://127.0.0.1:1/team"]) == exits.FAILED
    told = capsys.readouterr().err
    assert "127.0.0.1:1" in told and "Traceback" not in told


@pytest.mark.parametrize(("change", "told"), [("gate", "the gate:"), ("adapter", "the adapter:")])
def test_an_evaluation_of_something_else_promotes_nothing(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, told: str
) -> None:
    run = make_run()
    if change == "gate":
        spec = read_json(run / "spec.json")
        write_json(run / "spec.json", spec | {"gate": spec["gate"] | {"min_gain": 0.5}})
    else:
        save_file({KEY.format("A"): np.zeros((2, 8), np.float32)}, run / "adapter" / "adapter_model.safetensors")
    assert publish(run, tmp_path / "store") == exits.INPUT
    assert f"evaluation.json is of before a change of {told} evaluate again" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
