"""Tunes a LoRA adapter: one loop from rows to PEFT files, read from top to bottom.

    rows of an optimiser step = batch x accumulation
    tokens of a forward pass <= batch x max_seq_length, without padding (training.packing)
    loss of a step            = sum of the answer tokens' cross entropy / number of those tokens

The division is by the tokens of the whole step, not of each forward pass, so that the size of a pass changes the
memory needed and nothing else (the mean of means weighs short answers too much: transformers issue 34242).
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from common.files import read_json, write_json, write_jsonl
from common.settings import SettingsError
from training import checkpoint
from training.base import base_folder, base_limits, base_revision, load_tokenizer
from training.dataset import Checked, Problem, Row, is_held_out, read
from training.encode import Example, encode_all
from training.fused import fuse
from training.packing import ATTENTION, pack, summed_loss
from training.progress import Measurement, Progress
from training.spec import TuningSpec

log = logging.getLogger(__name__)

CPU_PASS_TOKENS = 1024
"""The more tokens a pass has the faster is a GPU, but not a CPU. Of 4 layers of 512, tokens a CPU second forward and
backward by one thread: 918 in passes of one row (128 tokens), 1,220 of 512, 1,260 of 1,024, 1,180 of 2,048."""


class Terminated(Exception):
    """SIGTERM came; a checkpoint of the last whole step is written."""


def tune(
    spec: TuningSpec,
    out: Path,
    *,
    metrics_address: str | None = None,
    fresh: bool = False,
    checkpoints: str | None = None,
) -> dict[str, Any]:
    """Tune by `spec` into folder `out`; returns the summary that it also writes as `tuning.json`.

    `out` gets `spec.json`, `run.json`, `held_out.jsonl`, `events.jsonl`, `checkpoints/`, `adapter/` and at the end
    `tuning.json`. A finished run of the same settings, data and base is not done again; an unfinished one goes on
    from its newest whole checkpoint. `fresh` discards both. `checkpoints` is a folder az://ACCOUNT/CONTAINER/PATH that
    gets a copy of each checkpoint, and gives back the newest where `out` has none so new: the run survives its node.
    Raises `SettingsError` for what only a person can mend, `BlobError` when the copies cannot be looked at,
    `Terminated` after SIGTERM.
    """
    folder = base_folder(spec.base_model)
    revision = base_revision(folder)
    tuning_rows, held_out, checked = split(spec)
    fingerprint = spec.fingerprint(dataset_digest=checked.digest, base_revision=revision)
    remote = checkpoint.Remote(checkpoints, fingerprint) if checkpoints else None
    if fresh:
        forget(out)
        if remote:
            remote.forget()
    if (done := finished(out, fingerprint)) is not None:
        log.info("already tuned with these settings, data and base: %s", out / "adapter")
        write_json(out / "spec.json", spec.model_dump(mode="json"))  # the gate may ask for more now
        return done

    examples, dropped = encode_all(tuning_rows, load_tokenizer(folder), spec.max_seq_length)
    if not examples:
        raise SettingsError(
            [f"max_seq_length: {spec.max_seq_length} drops all {len(dropped)} rows of {spec.dataset}; raise it"]
        )
    if dropped:
        log.warning("%d rows exceed max_seq_length = %d and are left out", len(dropped), spec.max_seq_length)
    try:
        found = checkpoint.newest(out / "checkpoints", fingerprint)
    except ValueError as error:
        raise SettingsError([f"{error}; choose another --out, or discard that run with --fresh"]) from None
    if remote and remote.fetch_newer(out / "checkpoints", than=found[0].step if found else 0):
        found = checkpoint.newest(out / "checkpoints", fingerprint)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(spec.seed)
    model = load_model(spec, folder, device)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    rows_per_step = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(examples) / rows_per_step)
    total_steps = steps_per_epoch * spec.num_train_epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(spec, step, total_steps))

    done_before = checkpoint.Position(0, 0.0, 0)
    if found:
        done_before, adapter, rest = found
        set_peft_model_state_dict(model, adapter)
        optimizer.load_state_dict(rest["optimizer"])
        schedule.load_state_dict(rest["schedule"])
        _set_random_state(rest["random"])
        log.info("resuming at step %d of %d", done_before.step, total_steps)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "spec.json", spec.model_dump(mode="json"))
    origin = {"fingerprint": fingerprint, "dataset_digest": checked.digest, "base_revision": revision}
    write_json(out / "run.json", origin)
    write_jsonl(out / "held_out.jsonl", (row for _, row in held_out))
    events = out / "events.jsonl"
    _keep_events(events, done_before.step)

    log.info(
        "%d rows to tune on, %d held out; %d rows x %d steps x %d epochs; %s of %s parameters are trained",
        len(examples), len(held_out), rows_per_step, steps_per_epoch, spec.num_train_epochs,
        f"{sum(w.numel() for w in weights):,}", f"{sum(p.numel() for p in model.parameters()):,}",
    )  # fmt: skip

    def save(step: int) -> None:
        path = checkpoint.save(
            out / "checkpoints",
            fingerprint,
            checkpoint.Position(step, done_before.seconds + time.monotonic() - started, tokens),
            get_peft_model_state_dict(model),
            {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "random": _random_state()},
        )
        if remote:
            remote.copy(path)

    with (
        Progress(spec.adapter, total_steps, events, metrics_address) as progress,
        _Sigterm() as sigterm,
        own_precision(model),
    ):
        progress.dropped(len(dropped))
        progress.resumed(done_before.step)
        started = window_started = saved = time.monotonic()
        tokens = window_tokens = done_before.tokens
        loss_sum, loss_tokens, last_loss = 0.0, 0, math.nan
        for step, batches in steps(examples, spec, start=done_before.step):
            answer_tokens = sum(example.answer_length for batch in batches for example in batch)
            losses = []
            for batch in batches:
                loss = summed_loss(model, batch, device)
                (loss / answer_tokens).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
                tokens += sum(len(example.ids) for example in batch)
            # Read here once: reading a number after each pass would have the GPU wait for this process.
            for value, batch in zip(torch.stack(losses).tolist(), batches, strict=True):
                if not math.isfinite(value):
                    lines = ", ".join(str(number) for number in sorted(example.line for example in batch))
                    raise SettingsError(
                        [f"the loss became {value} at step {step} on lines {lines} of {spec.dataset}; lower "
                         f"learning_rate (now {spec.learning_rate:g}) or look at those lines"]
                    )  # fmt: skip
                loss_sum += value
            loss_tokens += answer_tokens
            norm = torch.nn.utils.clip_grad_norm_(weights, spec.max_grad_norm).item()
            learning_rate = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.step()
            if step % spec.logging_steps == 0 or step == total_steps:
                now = time.monotonic()
                last_loss = loss_sum / loss_tokens
                speed = (tokens - window_tokens) / (now - window_started)
                left = (total_steps - step) * (now - started) / (step - done_before.step)
                elapsed = done_before.seconds + now - started
                progress.show(
                    Measurement(
                        step, total_steps, step / steps_per_epoch, last_loss, learning_rate, norm, speed, elapsed, left
                    )
                )
                window_started, window_tokens, loss_sum, loss_tokens = now, tokens, 0.0, 0
            due = time.monotonic() - saved >= 60 * spec.save_minutes
            due = due or (spec.save_steps is not None and step % spec.save_steps == 0)
            if sigterm.came or (due and step < total_steps):
                save(step)
                saved = time.monotonic()
            if sigterm.came and step < total_steps:
                raise Terminated(f"stopped at step {step} of {total_steps}; run again to resume")
        seconds = done_before.seconds + time.monotonic() - started

    model.peft_config["default"].base_model_name_or_path = spec.base_model
    model.save_pretrained(out / "adapter")
    summary = {
        "adapter": spec.adapter,
        **origin,
        "examples": len(examples),
        "held_out": len(held_out),
        "dropped": len(dropped),
        "steps": total_steps,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "final_loss": round(last_loss, 5),
        "device": str(device),
        "seed": spec.seed,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    write_json(out / "tuning.json", summary)
    return summary


def split(spec: TuningSpec) -> tuple[list[tuple[int, Row]], list[tuple[int, Row]], Checked]:
    """`(tuning rows, held-out rows, summary)`, rows with their line numbers.

    Raises `SettingsError` listing every problem of the dataset, or when a side of the split would be empty.
    """
    path, checked = Path(spec.dataset), Checked()
    problems, sides = [], ([], [])  # type: tuple[list[str], tuple[list[tuple[int, Row]], list[tuple[int, Row]]]]
    try:
        for item in read(path, base_limits(spec.base_model, spec.max_seq_length), checked):
            if isinstance(item, Problem):
                problems.append(f"{path}:{item}")
            else:
                sides[is_held_out(item[1], spec.held_out_fraction)].append(item)
    except OSError as error:
        raise SettingsError([f"dataset: {path}: {error.strerror}"]) from None
    if problems:
        raise SettingsError(problems)
    if not all(sides):
        raise SettingsError(
            [f"dataset: {path}: {checked.rows} rows with held_out_fraction = {spec.held_out_fraction} give "
             f"{len(sides[0])} to tune on and {len(sides[1])} held out; both need some: add rows"]
        )  # fmt: skip
    return *sides, checked


def finished(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The summary of a run in `out` that ended, if it was this very run. It is written last, so it vouches for all."""
    path = out / "tuning.json"
    if not path.is_file():
        return None
    summary: dict[str, Any] = read_json(path)
    if summary["fingerprint"] != fingerprint:
        raise SettingsError(
            [f"{path} is of a finished run with other settings, data or base; choose another --out, or discard it "
             "with --fresh"]
        )  # fmt: skip
    return summary


def forget(out: Path) -> None:
    """Remove what an earlier run left in `out`, and nothing else that may lie there."""
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (
        "tuning.json",
        "events.jsonl",
        "evaluation.json",
        "canaries.json",
        "held_out.jsonl",
        "spec.json",
        "run.json",
    ):
        (out / name).unlink(missing_ok=True)


def load_model(spec: TuningSpec, folder: Path, device: torch.device) -> Any:
    """The base with a fresh adapter on it, in bf16 where the GPU computes in it and fp32 elsewhere.

    The adapter itself stays in fp32: its updates are too small for bf16's 8 bits of mantissa.
    """
    disable_progress_bar()  # one bar is enough, and loading takes a moment
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if half else torch.float32
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION)
    _check_targets(spec, base)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora_r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=list(spec.lora_target_modules),
        bias="none",  # vLLM refuses adapters with biases
    )
    model = get_peft_model(base.to(device), config, autocast_adapter_dtype=True)
    fuse(model)
    return model.train()


def own_precision(model: Any) -> AbstractContextManager[None]:
    """While entered, no adapter copies its input to fp32: autocast brings its weights to the base's bf16 instead.

    peft casts the other way, and autograd keeps a copy for each adapted layer: for Llama 3.1 8B at 4 x 1,024
    tokens 9.5 GiB beside the 31.3 that are kept without.
    """
    return disable_input_dtype_casting(model, active=model.dtype == torch.bfloat16)  # type: ignore[no-any-return]


def _check_targets(spec: TuningSpec, base: Any) -> None:
    layers = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    if unknown := sorted(set(spec.lora_target_modules) - layers):
        raise SettingsError(
            [f"lora_target_modules: {', '.join(unknown)} not in this base; it has {', '.join(sorted(layers))}"]
        )


def rate(spec: TuningSpec, step: int, total_steps: int) -> float:
    """Factor on learning_rate at optimiser step `step` (from 0): linear warm-up, then the schedule's descent to 0."""
    warmup = math.ceil(spec.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    left = (total_steps - step) / max(1, total_steps - warmup)
    return {"linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))), "constant": 1.0}[
        spec.lr_scheduler_type
    ]


def steps(examples: list[Example], spec: TuningSpec, *, start: int) -> Iterator[tuple[int, list[list[Example]]]]:
    """Yield `(step number from 1, forward passes)` after step `start`.

    The rows of a step depend on seed and epoch alone, so a resumed run sees what an uninterrupted one would. They share
    as few forward passes as hold them, none with more tokens than batch x max_seq_length: what infra.fit counts on. So
    short rows take fewer passes than gradient_accumulation_steps, and the step's gradient is the same sum. On a CPU a
    pass stays below `CPU_PASS_TOKENS`.
    """
    size = spec.per_device_train_batch_size
    rows_per_step = size * spec.gradient_accumulation_steps
    budget = size * spec.max_seq_length
    if not torch.cuda.is_available():
        budget = min(budget, CPU_PASS_TOKENS)
    step = 0
    for epoch in range(spec.num_train_epochs):
        order = list(range(len(examples)))
        random.Random(f"{spec.seed}/{epoch}").shuffle(order)
        for first in range(0, len(order), rows_per_step):
            step += 1
            if step > start:
                rows = [examples[i] for i in order[first : first + rows_per_step]]
                yield step, pack(rows, budget)


class _Sigterm:
    """While entered, SIGTERM sets `came` instead of ending the process: the step in progress is finished first."""

    came = False

    def __enter__(self) -> _Sigterm:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True


def _random_state() -> dict[str, Any]:
    """The state of every generator that the loop draws from (dropout); the row order needs none."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _keep_events(path: Path, step: int) -> None:
    """Drop measurements after `step`: the steps that a lost attempt made will be made and measured again."""
    if path.is_file():
        whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_jsonl(path, [event for event in map(json.loads, whole) if event["step"] <= step])
