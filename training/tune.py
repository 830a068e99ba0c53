"""Tunes a LoRA adapter: one loop from rows to PEFT files, read from top to bottom.

    rows of an optimiser step = batch x accumulation, on any number of GPUs
    tokens of a forward pass <= batch x max_seq_length, without padding (training.packing)
    loss of a step            = sum of the answer tokens' cross entropy / number of those tokens

The division is by the tokens of the whole step, not of each forward pass, so that neither the size of a pass nor the
number of GPUs changes the gradient (the mean of means weighs short answers too much: transformers issue 34242).
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from common import exits
from common.files import read_jsonl, write_json
from common.settings import SettingsError
from common.sigterm import Sigterm
from training import checkpoint
from training.base import base_folder
from training.begin import Start, begin
from training.encode import Example
from training.launch import is_first
from training.model import load_model, own_precision
from training.packing import pack, summed_loss
from training.progress import Measurement, Progress
from training.ranks import PATIENCE, WITHOUT_LIMIT, Ranks, deal, join
from training.source import public
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
    metrics_address: tuple[str, int] | None = None,
    fresh: bool = False,
    checkpoints: str | None = None,
    rejoin: bool = False,
) -> dict[str, Any]:
    """Tune by `spec` into folder `out`; returns the summary that it also writes as `tuning.json`.

    `out` gets `spec.json`, `run.json`, `held_out.jsonl`, `events.jsonl`, `checkpoints/`, `adapter/` and at the end
    `tuning.json`. A finished run of the same settings, data and base is not done again; an unfinished one goes on
    from its newest whole checkpoint. `fresh` discards both. `checkpoints` is a folder az://ACCOUNT/CONTAINER/PATH that
    gets a copy of each checkpoint, the last step's among them, and gives back the newest where `out` has none so new:
    the run survives its node.

    One of several processes (training.launch, torchrun) takes its share of each step; the first alone reads data and
    writes. A run may go on with another number of them, but only the same number gives the same bytes (on a CPU).
    With `rejoin` the others are waited for without limit, and not at all where no step is left to make: they may have
    ended with the attempt that made the last one. Those of them who could still be needed end as after SIGTERM.
    Raises `SettingsError` for what only a person can mend, `BlobError` when the copies cannot be looked at,
    `Terminated` after SIGTERM.
    """

    def prepare() -> Start | dict[str, Any]:
        return begin(spec, out, fresh=fresh, checkpoints=checkpoints)

    ready: Start | None = None
    if rejoin and is_first():
        found = prepare()
        if isinstance(found, dict):
            return found
        ready = found
    alone = ready is not None and ready.step == step_count(len(ready.examples), spec)
    with join(alone=alone, come=WITHOUT_LIMIT if rejoin else PATIENCE) as ranks:
        start = ranks.from_first(lambda: ready or prepare())
        if isinstance(start, dict):
            return start
        summary, safe = train(spec, out, start, ranks, metrics_address, checkpoints)
    if rejoin and not (safe or ranks.first):
        # The next attempt of the first's machine would go on from the copy before, and not without this one.
        raise SystemExit(exits.TERMINATED)
    return summary


def train(
    spec: TuningSpec,
    out: Path,
    start: Start,
    ranks: Ranks,
    metrics_address: tuple[str, int] | None,
    checkpoints: str | None,
) -> tuple[dict[str, Any], bool]:
    """The loop, in each process of the run; the first shows and writes. The rest is said at `tune`.

    Returns the summary, and whether the last step is in `checkpoints`, where there are any.
    """
    device, examples = ranks.device, start.examples
    torch.manual_seed(spec.seed)
    model = load_model(spec, base_folder(spec.base_model), device)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    rows_per_step = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    total_steps = step_count(len(examples), spec)
    steps_per_epoch = total_steps // spec.num_train_epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(spec, step, total_steps))

    done_before, random_states = checkpoint.Position(0, 0.0, 0), []
    if start.found:
        done_before, adapter, rest = start.found
        set_peft_model_state_dict(model, adapter)
        optimizer.load_state_dict(rest["optimizer"])
        schedule.load_state_dict(rest["schedule"])
        random_states = rest["random"]
        log.info("resuming at step %d of %d", done_before.step, total_steps)
    if len(random_states) == ranks.world:
        ranks.set_random_state(random_states[ranks.rank])
    else:
        ranks.seed(spec.seed, done_before.step)
    ranks.copy_from_first(weights)

    log.info(
        "%d rows to tune on, %d held out; %d rows x %d steps x %d epochs; %s of %s parameters are trained%s",
        len(examples), start.held_out, rows_per_step, steps_per_epoch, spec.num_train_epochs,
        f"{sum(w.numel() for w in weights):,}", f"{sum(p.numel() for p in model.parameters()):,}",
        f" by {ranks.world} processes" if ranks.world > 1 else "",
    )  # fmt: skip
    budget = pass_tokens(spec)
    remote = checkpoint.Remote(checkpoints, start.origin["fingerprint"]) if checkpoints and ranks.first else None

    def save(step: int, random_states: list[Any]) -> bool:
        """Whether it is as safe as it is to be: copied, where there is a place for copies."""
        path = checkpoint.save(
            out / "checkpoints",
            start.origin["fingerprint"],
            checkpoint.Position(step, done_before.seconds + time.monotonic() - started, tokens, loss_sum, loss_tokens),
            # By itself PEFT adds the whole lm_head of the base where it is a target, which vLLM refuses.
            get_peft_model_state_dict(model, save_embedding_layers=False),
            {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "random": random_states},
        )
        copied = remote is None or remote.copy(path)
        if progress:
            progress.saved(step)
        return copied

    safe = True
    shown: AbstractContextManager[Progress | None] = nullcontext()
    if ranks.first:
        shown = Progress(spec.adapter, total_steps, out / "events.jsonl", metrics_address)
    with shown as progress, Sigterm() as sigterm, own_precision(model):
        if progress:
            progress.dropped(start.dropped)
            progress.resumed(done_before.step)
        started = window_started = saved = time.monotonic()
        tokens = window_tokens = done_before.tokens
        loss_sum, loss_tokens = done_before.loss_sum, done_before.loss_tokens
        last_loss, room = math.nan, 0
        for step, shares in steps(examples, spec, start=done_before.step, ranks=ranks.world):
            passes = [(rank, rows) for rank, share in enumerate(shares) for rows in share]
            answer_tokens = sum(row.answer_length for _, rows in passes for row in rows)
            losses = torch.zeros(len(passes), device=device)
            for number, (rank, rows) in enumerate(passes):
                if rank == ranks.rank:
                    try:
                        loss = summed_loss(model, rows, device)
                        (loss / answer_tokens).backward()  # type: ignore[no-untyped-call]
                    except torch.OutOfMemoryError as error:
                        raise _out_of_memory(error, step, rows, spec, ranks.gpu_memory()) from error
                    losses[number] = loss.detach()
            # Read here once: reading a number after each pass would have the GPU wait for this process.
            for value, (_, rows) in zip(ranks.add_up(weights, losses).tolist(), passes, strict=True):
                if not math.isfinite(value):
                    raise _no_number(value, step, rows, spec) if ranks.first else SystemExit(exits.INPUT)
                loss_sum += value
            loss_tokens += answer_tokens
            tokens += sum(len(row.ids) for _, rows in passes for row in rows)
            room += len(passes) * budget
            norm = torch.nn.utils.clip_grad_norm_(weights, spec.max_grad_norm).item()
            learning_rate = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if progress:
                progress.step()
            now = time.monotonic()
            if step % spec.logging_steps == 0 or step == total_steps:
                last_loss = loss_sum / loss_tokens
                if progress:
                    progress.show(
                        Measurement(
                            step=step,
                            total_steps=total_steps,
                            epoch=step / steps_per_epoch,
                            loss=last_loss,
                            learning_rate=learning_rate,
                            gradient_norm=norm,
                            tokens_per_second=(tokens - window_tokens) / (now - window_started),
                            elapsed_seconds=done_before.seconds + now - started,
                            eta_seconds=(total_steps - step) * (now - started) / (step - done_before.step),
                            pass_fill=min(1.0, (tokens - window_tokens) / room),
                            gpu_memory_bytes=ranks.gpu_memory(),
                        )
                    )
                window_started, window_tokens, loss_sum, loss_tokens, room = now, tokens, 0.0, 0, 0
            # The clock of the first process decides for all.
            due = ranks.first and now - saved >= 60 * spec.save_minutes
            due = due or (spec.save_steps is not None and step % spec.save_steps == 0)
            stop, due = ranks.any(sigterm.came, due)
            # That of the last step is for who comes after this machine: to find nothing left to tune.
            if (stop or due) if step < total_steps else checkpoints:
                states = ranks.gather(ranks.random_state())
                safe = ranks.from_first(lambda: save(step, states))  # noqa: B023  called at once
                saved = time.monotonic()
                if stop and step < total_steps:
                    end = Terminated(f"stopped at step {step} of {total_steps}; run again to resume")
                    raise end if ranks.first else SystemExit(exits.TERMINATED)
        seconds = done_before.seconds + time.monotonic() - started
    peaks = [peak for peak in ranks.gather(ranks.gpu_memory()) if peak is not None]
    world = ranks.world
    if done_before.step == total_steps:  # those who made the steps are gone, and so is their loss but for the event
        peaks, world = [], len(random_states)
        last_loss = [*read_jsonl(out / "events.jsonl")][-1]["loss"] if ranks.first else last_loss

    def finish() -> dict[str, Any]:
        model.peft_config["default"].base_model_name_or_path = spec.base_model
        model.save_pretrained(out / "adapter", save_embedding_layers=False)
        libraries = ("torch", "transformers", "peft", *(["bitsandbytes"] if spec.load_in_4bit else []))
        summary = {
            "adapter": spec.adapter,
            **start.origin,
            "examples": len(examples),
            "held_out": start.held_out,
            "dropped": start.dropped,
            "steps": total_steps,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "final_loss": round(last_loss, 5),
            "device": device.type,
            "world_size": world,
            **({"peak_gpu_bytes": max(peaks)} if peaks else {}),  # a figure that was not measured is absent
            "load_in_4bit": spec.load_in_4bit,
            "seed": spec.seed,
            "versions": {name: version(name) for name in libraries},
        }
        write_json(out / "tuning.json", summary)
        return summary

    return ranks.from_first(finish), safe


def step_count(examples: int, spec: TuningSpec) -> int:
    """Optimiser steps of a whole run over so many rows."""
    return spec.num_train_epochs * math.ceil(
        examples / (spec.per_device_train_batch_size * spec.gradient_accumulation_steps)
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


def pass_tokens(spec: TuningSpec) -> int:
    """The most tokens that a forward pass takes: what infra.fit counts on, and on a CPU fewer."""
    most = spec.per_device_train_batch_size * spec.max_seq_length
    return most if torch.cuda.is_available() else min(most, CPU_PASS_TOKENS)


def steps(
    examples: list[Example], spec: TuningSpec, *, start: int, ranks: int = 1
) -> Iterator[tuple[int, list[list[list[Example]]]]]:
    """Yield `(step number from 1, forward passes of each rank)` after step `start`.

    The rows of a step depend on seed and epoch alone, so a resumed run sees what an uninterrupted one would, on any
    number of ranks. They are dealt to the ranks by their tokens; those of a rank share as few forward passes as hold
    them, none above `pass_tokens`. So short rows take fewer passes than gradient_accumulation_steps, and the step's
    gradient is the same sum.
    """
    rows_per_step = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    budget = pass_tokens(spec)
    step = 0
    for epoch in range(spec.num_train_epochs):
        order = list(range(len(examples)))
        random.Random(f"{spec.seed}/{epoch}").shuffle(order)
        for first in range(0, len(order), rows_per_step):
            step += 1
            if step > start:
                rows = [examples[i] for i in order[first : first + rows_per_step]]
                shares = deal([len(row.ids) for row in rows], ranks)
                yield step, [pack([rows[i] for i in share], budget) for share in shares]


def _out_of_memory(
    error: Exception, step: int, rows: list[Example], spec: TuningSpec, most_bytes: int | None
) -> SettingsError:
    """The same rows come at the same step of every attempt: another one would end there too."""
    remedies = [
        *([] if spec.gradient_checkpointing else ["gradient_checkpointing: true"]),
        *([] if spec.load_in_4bit else ["load_in_4bit: true"]),
        f"a per_device_train_batch_size below {spec.per_device_train_batch_size}, and more "
        "gradient_accumulation_steps for it",
        f"a max_seq_length below {spec.max_seq_length}",
    ]
    most = f", at most {most_bytes / 2**30:.1f} GiB of it before" if most_bytes else ""
    return SettingsError(
        [f"the GPU's memory is full at step {step}, in a pass of {sum(len(row.ids) for row in rows):,} tokens{most} "
         f"({str(error).splitlines()[0]}); lower it by {', or '.join(remedies)}"]
    )  # fmt: skip


def _no_number(loss: float, step: int, rows: list[Example], spec: TuningSpec) -> SettingsError:
    lines = ", ".join(str(number) for number in sorted(row.line for row in rows))
    return SettingsError(
        [f"the loss became {loss} at step {step} on lines {lines} of {public(spec.dataset)}; lower learning_rate (now "
         f"{spec.learning_rate:g}) or look at those lines"]
    )  # fmt: skip
