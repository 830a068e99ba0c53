"""Tuning a tiny random Llama: what it learns, that it resumes bit for bit, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts.adapter import check_adapter, lora_shapes
from common import exits
from common.files import file_digest, read_json, read_jsonl, tree_digest, write_json, write_jsonl
from common.processes import free_ports
from common.settings import SettingsError
from tests.unit.conftest import ROWS
from training import checkpoint
from training import tune as module
from training.__main__ import main
from training.base import load_tokenizer
from training.begin import SHOWN_PROBLEMS, split
from training.encode import Example, encode_all
from training.model import load_model
from training.packing import ATTENTION, summed_loss
from training.progress import Progress
from training.spec import TuningSpec
from training.tune import Terminated, rate, steps, tune

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec(tiny_base: Path, rows_file: Path) -> Callable[..., TuningSpec]:
    def make(**change: Any) -> TuningSpec:
        settings = {
            "adapter": "kubectl", "base_model": str(tiny_base), "dataset": str(rows_file), "learning_rate": 5e-3,
            "num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lora_r": 4,
            "lora_alpha": 8, "lora_dropout": 0.1, "max_seq_length": 128, "logging_steps": 1, "save_steps": 3,
            "held_out_fraction": 0.2, "gate": {"min_examples": 5},
        }  # fmt: skip
        return TuningSpec.model_validate(settings | change)

    return make


@pytest.fixture(scope="module")
def finished(spec: Callable[..., TuningSpec], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One uninterrupted run by the default settings of `spec`; tests that change its folder copy it."""
    out = tmp_path_factory.mktemp("run")
    return out, tune(spec(), out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(out / "adapter" / "adapter_model.safetensors"))


def same_bits(one: Path, other: Path) -> bool:
    name = Path("adapter") / "adapter_model.safetensors"
    return file_digest(one / name) == file_digest(other / name)


def at_step(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `act` called once, right after optimiser step `number` of the next run."""
    count = iter(range(1, 10**6))
    plain = Progress.step

    def step(self: Progress) -> None:
        plain(self)
        if next(count) == number:
            act()

    monkeypatch.setattr(Progress, "step", step)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product may catch it."""


def kill() -> None:
    raise Killed


# What it makes.


def test_the_adapter_learns_and_loads_with_plain_peft(finished: tuple[Path, dict[str, Any]], tiny_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out, summary = finished
    losses = [event["loss"] for event in read_jsonl(out / "events.jsonl")]
    assert summary["final_loss"] < losses[0] - 0.1
    assert check_adapter(out / "adapter") == [], "vLLM takes it"
    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    ids = torch.tensor([[1, 10, 20, 30]])
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
    assert (after - before).abs().max() > 0.01
    config = read_json(out / "adapter" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert not any("lm_head" in name or "embed" in name for name in weights(out)), "no resized embeddings ride along"


def test_the_summary_agrees_with_the_run(
    finished: tuple[Path, dict[str, Any]], tiny_base: Path, rows_file: Path
) -> None:
    out, summary = finished
    assert read_json(out / "tuning.json") == summary
    assert summary["examples"] + summary["held_out"] + summary["dropped"] == len(ROWS)
    assert summary["steps"] == 2 * -(-summary["examples"] // 8)
    held_out = list(read_jsonl(out / "held_out.jsonl"))
    assert len(held_out) == summary["held_out"]
    examples, _ = encode_all(
        [(n, row) for n, row in enumerate(ROWS, 1) if row not in held_out], load_tokenizer(tiny_base), 128
    )
    assert summary["tokens"] == 2 * sum(len(example.ids) for example in examples)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"], rel=0.01)
    assert (summary["dataset_digest"], summary["base_revision"]) == (file_digest(rows_file), tree_digest(tiny_base))
    assert set(summary["versions"]) == {"torch", "transformers", "peft"}
    assert (summary["device"], summary["world_size"]) == ("cpu", 1)
    assert None not in summary.values(), "the report would name it as missing"
    events = list(read_jsonl(out / "events.jsonl"))
    assert [event["step"] for event in events] == list(range(1, summary["steps"] + 1))
    assert events[-1]["loss"] == pytest.approx(summary["final_loss"], abs=1e-5)
    assert events[-1]["eta_seconds"] == 0
    assert events[-1]["epoch"] == 2
    assert all(event["tokens_per_second"] > 0 and event["total_steps"] == summary["steps"] for event in events)
    elapsed = [event["elapsed_seconds"] for event in events]
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] <= summary["seconds"] + 0.001


def test_the_head_as_a_target_does_not_bring_the_bases_own_along(
    spec: Callable[..., TuningSpec], tiny_base: Path, tmp_path: Path
) -> None:
    """PEFT adds it by itself, and vLLM refuses an adapter that holds it; seen on a base that does not tie the two."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    change = read_json(base / "config.json") | {"tie_word_embeddings": False}
    write_json(base / "config.json", change)
    tensors = load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    targets = ("q_proj", "lm_head")
    tune(spec(base_model=str(base), lora_target_modules=targets, num_train_epochs=1), tmp_path / "run")
    assert check_adapter(tmp_path / "run" / "adapter") == []
    changed = lora_shapes(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert changed["lm_head"] == tuple(head.shape)
    assert {name for step in (tmp_path / "run" / "checkpoints").iterdir() for name in load_file(step / "adapter.safetensors") if ".lora_" not in name} == set()  # fmt: skip


def test_tuning_never_sees_a_held_out_prompt(spec: Callable[..., TuningSpec], tmp_path: Path) -> None:
    seen: list[int] = []
    tuning, held_out, _ = split(spec())
    examples = [Example(line, (1, 2), 1) for line, _ in tuning]
    for _, (batches,) in steps(examples, spec(), start=0):
        seen += [example.line for batch in batches for example in batch]
    assert sorted(seen) == sorted(2 * [line for line, _ in tuning]), "every tuning row once an epoch"
    prompts = [{(row["instruction"], row["input"]) for _, row in side} for side in (tuning, held_out)]
    assert not prompts[0] & prompts[1]


# Resuming.


@pytest.mark.parametrize("end", ["SIGTERM", "killed at a checkpoint", "killed between checkpoints"])
def test_a_run_stopped_anywhere_and_started_again_gives_the_very_same_adapter(
    finished: tuple[Path, dict[str, Any]], spec: Callable[..., TuningSpec], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, end: str,
) -> None:  # fmt: skip
    whole, summary = finished
    with monkeypatch.context() as patch:
        if end == "SIGTERM":
            at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
            with pytest.raises(Terminated, match=f"stopped at step 5 of {summary['steps']}; run again to resume"):
                tune(spec(), tmp_path)
        else:
            at_step(7 if end == "killed at a checkpoint" else 8, kill, patch)
            with pytest.raises(Killed):
                tune(spec(), tmp_path)
        assert not (tmp_path / "tuning.json").exists()
    made: list[int] = []

    def noted(*arguments: Any, start: int, ranks: int) -> Any:
        made.append(start)
        return steps(*arguments, start=start, ranks=ranks)

    monkeypatch.setattr(module, "steps", noted)
    again = tune(spec(), tmp_path)
    assert made == [5 if end == "SIGTERM" else 6], "it went on from the checkpoint"
    assert same_bits(tmp_path, whole)
    events = list(read_jsonl(tmp_path / "events.jsonl"))
    assert [event["step"] for event in events] == list(range(1, summary["steps"] + 1)), "each step once, in order"
    assert [event["loss"] for event in events] == [event["loss"] for event in read_jsonl(whole / "events.jsonl")]
    changing = {"seconds", "tokens_per_second"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in summary.items() if k not in changing
    }


def test_a_resumed_run_measures_the_loss_of_the_steps_before_too(
    spec: Callable[..., TuningSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seldom = spec(logging_steps=4)
    whole = tune(seldom, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(Terminated):
            tune(seldom, tmp_path / "again")
    assert tune(seldom, tmp_path / "again")["final_loss"] == whole["final_loss"]
    losses = [[event["loss"] for event in read_jsonl(tmp_path / run / "events.jsonl")] for run in ("whole", "again")]
    assert losses[0] == losses[1]


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    finished: tuple[Path, dict[str, Any]], spec: Callable[..., TuningSpec], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        at_step(8, kill, patch)
        with pytest.raises(Killed):
            tune(spec(), tmp_path)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1] / "adapter.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # and the last line was half written
    tune(spec(), tmp_path)
    assert same_bits(tmp_path, finished[0])
    assert [event["step"] for event in read_jsonl(tmp_path / "events.jsonl")] == list(
        range(1, finished[1]["steps"] + 1)
    )


def test_sigterm_counts_again_after_the_run(finished: tuple[Path, dict[str, Any]]) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def copy(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def _no_training(*_: Any) -> None:
    raise AssertionError("it tuned again")


def test_a_finished_run_is_not_tuned_again(
    copy: Path, finished: tuple[Path, dict[str, Any]], spec: Callable[..., TuningSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", _no_training)
    assert tune(spec(), copy) == finished[1]
    assert tune(spec(logging_steps=7, save_steps=9, gate={"min_gain": 0.5, "min_examples": 5}), copy) == finished[1]
    assert read_json(copy / "spec.json")["gate"]["min_gain"] == 0.5, "the evaluation must ask what is asked for now"


def test_other_settings_in_the_folder_of_a_run_are_refused_and_destroy_nothing(
    copy: Path, spec: Callable[..., TuningSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", _no_training)
    before = tree_digest(copy)
    with pytest.raises(SettingsError, match=r"finished run with other settings.*another --out.*--fresh"):
        tune(spec(lora_r=8), copy)
    assert tree_digest(copy) == before
    (copy / "tuning.json").unlink()
    before = tree_digest(copy)
    with pytest.raises(SettingsError, match=r"other settings, data or base; choose another --out.*--fresh"):
        tune(spec(lora_r=8), copy)
    assert tree_digest(copy) == before


def test_fresh_begins_anew_and_leaves_strange_files_alone(copy: Path, spec: Callable[..., TuningSpec]) -> None:
    (copy / "notes.txt").write_text("mine")
    write_json(copy / "evaluation.json", {"passed": True})
    summary = tune(spec(num_train_epochs=1, lora_r=8), copy, fresh=True)
    assert (read_json(copy / "adapter" / "adapter_config.json")["r"], summary["steps"]) == (8, 6)
    assert not (copy / "evaluation.json").exists(), "the old verdict was about another adapter"
    assert (copy / "notes.txt").read_text() == "mine"


def test_checkpoints_come_by_the_clock_and_by_the_step_and_not_at_the_end(
    spec: Callable[..., TuningSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, fingerprint, position, *_: saved.append(position.step))
    tune(spec(save_steps=None, save_minutes=1e-9, num_train_epochs=1), tmp_path / "clock")
    assert saved == [1, 2, 3, 4, 5], "6 is the last step"
    saved.clear()
    tune(spec(save_steps=2, num_train_epochs=1), tmp_path / "steps")
    assert saved == [2, 4]
    saved.clear()
    tune(spec(save_steps=None, num_train_epochs=1), tmp_path / "neither")
    assert saved == [], "no five minutes"


# In 4 bits.


def test_qlora_learns_on_a_quantised_base_and_its_adapter_loads_on_the_whole_one(
    spec: Callable[..., TuningSpec], tmp_path: Path, tiny_base: Path
) -> None:
    from bitsandbytes.nn.modules import Linear4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = spec(load_in_4bit=True, gradient_checkpointing=True)
    model = load_model(settings, tiny_base, CPU)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 2 * 7, "every linear layer of the two decoder layers, and lm_head stays whole"
    weight: Any = next(iter(layers.values())).weight
    assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}

    summary = tune(settings, tmp_path)
    losses = [event["loss"] for event in read_jsonl(tmp_path / "events.jsonl")]
    assert summary["final_loss"] < losses[0] - 0.1
    assert (summary["load_in_4bit"], "bitsandbytes" in summary["versions"]) == (True, True)
    assert check_adapter(tmp_path / "adapter") == [], "vLLM takes it"
    examples, _ = encode_all(split(settings)[0], load_tokenizer(tiny_base), 128)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation=ATTENTION).eval()
    with torch.no_grad():
        before = summed_loss(base, examples[:8], CPU).item()
        after = summed_loss(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), examples[:8], CPU).item()
    assert after < before


# Arithmetic.


@pytest.fixture
def model_and_examples(spec: Callable[..., TuningSpec], tiny_base: Path) -> Iterator[tuple[Any, list[Example]]]:
    torch.manual_seed(1)
    model = load_model(spec(lora_dropout=0.0), tiny_base, CPU)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # 0 at the start, which would hide lora_A's gradient
    rows = [row | {"output": row["output"] * (1 + number % 3)} for number, row in enumerate(ROWS[:8])]
    yield model, encode_all(list(enumerate(rows, 1)), load_tokenizer(tiny_base), 128)[0]


def test_the_loss_is_the_cross_entropy_of_the_answer_tokens_alone(
    model_and_examples: tuple[Any, list[Example]],
) -> None:
    model, examples = model_and_examples
    example = examples[0]
    ids = torch.tensor([example.ids])
    with torch.no_grad():
        log_probabilities = model(input_ids=ids).logits[0].log_softmax(-1)
        loss = summed_loss(model, examples[:1], CPU).item()
    by_hand = -sum(
        log_probabilities[i - 1, example.ids[i]].item() for i in range(example.prompt_length, len(example.ids))
    )
    assert loss == pytest.approx(by_hand, rel=1e-5)


def test_batch_and_accumulation_divide_the_work_and_change_nothing_else(
    model_and_examples: tuple[Any, list[Example]], spec: Callable[..., TuningSpec]
) -> None:
    model, examples = model_and_examples
    gradients = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        settings = spec(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_train_epochs=1)
        ((_, (batches,)),) = steps(examples, settings, start=0)
        assert len(batches) <= accumulation
        assert all(sum(len(example.ids) for example in batch) <= size * settings.max_seq_length for batch in batches)
        tokens = sum(example.answer_length for batch in batches for example in batch)
        model.zero_grad()
        for batch in batches:
            (summed_loss(model, batch, CPU) / tokens).backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert gradients[0].abs().max() > 0.01
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, atol=1e-6)


def test_whole_runs_agree_whatever_the_accumulation(spec: Callable[..., TuningSpec], tmp_path: Path) -> None:
    for size, accumulation in ((8, 1), (2, 4)):
        settings = spec(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_train_epochs=1,
            lora_dropout=0.0, learning_rate=1e-3,
        )  # fmt: skip
        tune(settings, tmp_path / str(size))
    one, other = weights(tmp_path / "8"), weights(tmp_path / "2")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_the_row_order_follows_the_seed_and_differs_by_epoch(spec: Callable[..., TuningSpec]) -> None:
    examples = [Example(line, (1, 2), 1) for line in range(40)]

    def order(seed: int) -> list[list[int]]:
        return [[e.line for b in batches for e in b] for _, (batches,) in steps(examples, spec(seed=seed), start=0)]

    assert order(1) == order(1) != order(2)
    assert order(1)[:5] != order(1)[5:]
    assert [n for n, _ in steps(examples, spec(), start=7)] == [8, 9, 10]


def test_the_learning_rate_warms_up_and_descends(spec: Callable[..., TuningSpec]) -> None:
    linear = [rate(spec(warmup_ratio=0.2), step, 10) for step in range(11)]
    assert linear == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0])
    cosine = spec(warmup_ratio=0, lr_scheduler_type="cosine")
    assert [rate(cosine, step, 4) for step in range(5)] == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    constant = spec(warmup_ratio=0, lr_scheduler_type="constant")
    assert {rate(constant, step, 4) for step in range(4)} == {1.0}


# What it refuses, and what it shows.


def test_a_loss_that_is_no_number_names_the_lines(
    spec: Callable[..., TuningSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = split(spec())[0][0][0]

    def broken(model: Any, batch: list[Example], device: torch.device) -> torch.Tensor:
        loss = summed_loss(model, batch, device)
        return loss * torch.nan if any(example.line == line for example in batch) else loss

    monkeypatch.setattr(module, "summed_loss", broken)
    with pytest.raises(
        SettingsError, match=rf"the loss became nan at step \d+ on lines (\d+, )*{line}(, \d+)* of .*rows\.jsonl; lower"
    ):
        tune(spec(per_device_train_batch_size=1, gradient_accumulation_steps=8), tmp_path)
    assert not (tmp_path / "tuning.json").exists()


def _dataset(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    write_jsonl(tmp_path / "d.jsonl", rows)
    return str(tmp_path / "d.jsonl")


def test_over_long_rows_are_left_out_and_counted(spec: Callable[..., TuningSpec], tmp_path: Path) -> None:
    tuning = [row for _, row in split(spec())[0]]
    rows = [row | {"output": "pods " * 200} if row in tuning[:3] else row for row in ROWS]
    summary = tune(spec(dataset=_dataset(tmp_path, rows), num_train_epochs=1), tmp_path / "out")
    assert (summary["dropped"], summary["examples"]) == (3, len(tuning) - 3)


def test_a_limit_that_drops_every_row_is_an_error(spec: Callable[..., TuningSpec], tmp_path: Path) -> None:
    data = _dataset(tmp_path, [row | {"output": "pods " * 200} for row in ROWS])
    with pytest.raises(SettingsError, match=r"max_seq_length: 128 drops all \d+ rows"):
        tune(spec(dataset=data), tmp_path / "out")


@pytest.mark.parametrize("fraction", [1e-9, 0.999999999])
def test_neither_side_of_the_split_is_ever_silently_empty(
    spec: Callable[..., TuningSpec], fraction: float, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"both need some: add rows"):
        tune(spec(held_out_fraction=fraction), tmp_path / "out")


def test_a_split_on_which_nothing_could_pass_is_refused_before_the_tuning(
    spec: Callable[..., TuningSpec], tmp_path: Path
) -> None:
    held_out = len(split(spec())[1])
    told = rf"54 rows with held_out_fraction = 0.2 give {held_out} held out, .* fewer than gate.min_examples = 30: add rows"
    with pytest.raises(SettingsError, match=told):
        tune(spec(gate={}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_a_dataset_that_is_wrong_throughout_the_first_problems_are_told(
    spec: Callable[..., TuningSpec], tmp_path: Path
) -> None:
    data = _dataset(tmp_path, [{"prompt": f"p{number}", "completion": "c"} for number in range(300)])
    with pytest.raises(SettingsError) as caught:
        tune(spec(dataset=data), tmp_path / "out")
    assert len(caught.value.problems) == SHOWN_PROBLEMS + 1
    assert caught.value.problems[0] == f"{data}:1: found no key 'instruction'; expected the keys instruction, input, output, or messages alone"  # fmt: skip
    assert caught.value.problems[-1] == f"{data}: 1,400 more problems: python -m training check {data}"


def test_a_full_gpu_is_told_with_the_pass_and_what_would_lower_it(
    spec: Callable[..., TuningSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    monkeypatch.setattr(module, "summed_loss", full)
    with pytest.raises(SettingsError) as caught:
        tune(spec(gradient_checkpointing=True), tmp_path)
    (told,) = caught.value.problems
    assert told.startswith("the GPU's memory is full at step 1, in a pass of ") and "GPU 0 has" not in told
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.); lower it by load_in_4bit: true, or a per_device_" in told


def test_all_problems_of_the_dataset_stop_the_run_with_their_lines(
    spec: Callable[..., TuningSpec], tmp_path: Path
) -> None:
    data = _dataset(tmp_path, [*ROWS[:3], ROWS[0], ROWS[4] | {"output": ""}])
    with pytest.raises(SettingsError) as caught:
        tune(spec(dataset=data), tmp_path / "out")
    assert [problem.split(" found ")[0] for problem in caught.value.problems] == [f"{data}:4:", f"{data}:5:"]
    assert not (tmp_path / "out").exists()


def test_absent_data_and_layers_that_the_base_lacks_are_named(spec: Callable[..., TuningSpec], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"dataset: .*none\.jsonl: No such file"):
        tune(spec(dataset=str(tmp_path / "none.jsonl")), tmp_path / "out")
    with pytest.raises(SettingsError, match=r"lora_target_modules: c_attn not in this base; it has .*q_proj"):
        tune(spec(lora_target_modules=("c_attn", "q_proj")), tmp_path / "out")


def test_prometheus_sees_the_run_while_it_runs(
    spec: Callable[..., TuningSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_ports(1)[0]
    scraped: list[str] = []

    def scrape() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            scraped.append(response.read().decode())

    at_step(3, scrape, monkeypatch)
    summary = tune(spec(num_train_epochs=1), tmp_path, metrics_address=("127.0.0.1", port))
    values = dict(line.rsplit(" ", 1) for line in scraped[0].splitlines() if not line.startswith("#"))
    assert float(values['drydock_tuning_step{adapter="kubectl"}']) == 2, "measured after the second step"
    assert float(values['drydock_tuning_total_steps{adapter="kubectl"}']) == summary["steps"]
    second = list(read_jsonl(tmp_path / "events.jsonl"))[1]
    for name in (
        "loss",
        "tokens_per_second",
        "eta_seconds",
        "epoch",
        "learning_rate",
        "gradient_norm",
        "elapsed_seconds",
    ):
        assert float(values[f'drydock_tuning_{name}{{adapter="kubectl"}}']) == pytest.approx(second[name]), name
    assert float(values['drydock_tuning_dropped_rows{adapter="kubectl"}']) == 0
    with pytest.raises(OSError, match="refused"):
        scrape()


# The command.


@pytest.fixture
def spec_file(spec: Callable[..., TuningSpec], tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(spec(num_train_epochs=1).model_dump(mode="json")))
    return path


def test_the_command_ends_with_143_after_sigterm_and_resumes_to_0(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "--spec", str(spec_file), "--out", str(tmp_path / "run"), "--metrics-address", "off"]
    with monkeypatch.context() as patch:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert main(command) == exits.TERMINATED
    assert "run again to resume" in capsys.readouterr().err
    assert main(command) == exits.OK
    assert "tokens/s" in capsys.readouterr().out


def test_the_check_tells_a_split_on_which_nothing_could_pass(
    spec: Callable[..., TuningSpec], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "spec.yaml"
    for gate, code in (({"min_examples": 5}, exits.OK), ({}, exits.INPUT)):
        write_json(file, spec(gate=gate).model_dump(mode="json"))
        assert main(["check", str(rows_file), "--spec", str(file)]) == code
        told = capsys.readouterr().out
        assert "54 good rows, no problems" in told and ("gate.min_examples = 30" in told) == (code == exits.INPUT)


@pytest.mark.parametrize("address", ["0.0.0.0", "localhost:99999", "9401", "a:b"])
def test_a_mistyped_metrics_address_is_told_before_anything_loads(
    address: str, spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "--spec", str(spec_file), "--out", str(tmp_path / "run"), "--metrics-address", address]
    assert main(command) == exits.INPUT
    assert f"--metrics-address: '{address}': not an address such as 127.0.0.1:" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_ends_with_2_for_what_a_person_must_mend(
    spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec_file.write_text(spec_file.read_text().replace('"lora_r": 4', '"lora_r": 0'))
    assert main(["tune", "--spec", str(spec_file), "--out", str(tmp_path / "run")]) == exits.INPUT
    assert "lora_r: should be greater than or equal to 1, found 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
