"""All that comes before the model: rows, digests, and what is left of an earlier run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import read_json, write_json, write_jsonl
from common.settings import SettingsError
from training import checkpoint, preflight
from training.base import base_folder, base_limits, base_revision, load_tokenizer
from training.dataset import Checked, Limits, Problem, Row, is_held_out, read, split_problem
from training.encode import Example, encode_all
from training.source import local, public
from training.spec import TuningSpec

log = logging.getLogger(__name__)

SHOWN_PROBLEMS = 100  # of a dataset: wrong names of columns are several on each line


@dataclass(frozen=True)
class Start:
    """What the first process finds before the first step, and tells the others."""

    origin: dict[str, str]
    examples: list[Example]
    held_out: int
    dropped: int
    found: tuple[checkpoint.Position, dict[str, torch.Tensor], Any] | None

    @property
    def step(self) -> int:
        """The steps that are made already."""
        return self.found[0].step if self.found else 0


def begin(spec: TuningSpec, out: Path, *, fresh: bool, checkpoints: str | None) -> Start | dict[str, Any]:
    """Check and encode the data, and find where an earlier run stands; the summary of one that is finished.

    Raises `SettingsError` and `BlobError` as `training.tune.tune` says.
    """
    tuning_rows, held_out, checked = split(spec, preflight.problems(spec, out))
    folder = base_folder(spec.base_model)
    revision = base_revision(folder)
    origin = {
        "fingerprint": spec.fingerprint(dataset_digest=checked.digest, base_revision=revision),
        "dataset_digest": checked.digest,
        "base_revision": revision,
    }
    remote = checkpoint.Remote(checkpoints, origin["fingerprint"]) if checkpoints else None
    if fresh:
        forget(out)
        if remote:
            remote.forget()
    if (done := finished(out, origin["fingerprint"])) is not None:
        log.info("already tuned with these settings, data and base: %s", out / "adapter")
        _write_spec(spec, out)  # the gate may ask for more now
        return done

    examples, dropped = encode_all(tuning_rows, load_tokenizer(folder), spec.max_seq_length)
    if not examples:
        raise SettingsError(
            [f"max_seq_length: {spec.max_seq_length} drops all {len(dropped)} rows of {public(spec.dataset)}; raise it"]
        )
    if dropped:
        log.warning("%d rows exceed max_seq_length = %d and are left out", len(dropped), spec.max_seq_length)
    try:
        found = checkpoint.newest(out / "checkpoints", origin["fingerprint"])
    except ValueError as error:
        raise SettingsError([f"{error}; choose another --out, or discard that run with --fresh"]) from None
    if remote and remote.fetch_newer(out / "checkpoints", than=found[0].step if found else 0):
        found = checkpoint.newest(out / "checkpoints", origin["fingerprint"])

    out.mkdir(parents=True, exist_ok=True)
    _write_spec(spec, out)
    write_json(out / "run.json", origin)
    write_jsonl(out / "held_out.jsonl", (row for _, row in held_out))
    _keep_events(out / "events.jsonl", found[0].step if found else 0)
    return Start(origin, examples, len(held_out), len(dropped), found)


def _write_spec(spec: TuningSpec, out: Path) -> None:
    """Write the settings down; they go into the artifact, so that a signature in the dataset's address stays out."""
    write_json(out / "spec.json", spec.model_dump(mode="json") | {"dataset": public(spec.dataset)})


def split(spec: TuningSpec, found: Sequence[str] = ()) -> tuple[list[tuple[int, Row]], list[tuple[int, Row]], Checked]:
    """`(tuning rows, held-out rows, summary)`, rows with their line numbers.

    Raises `SettingsError` listing every problem of the dataset after those `found` before (training.preflight), or when
    the split leads to no adapter that may be served.
    """
    try:
        path, name, checked = local(spec.dataset, spec.dataset_sha256), public(spec.dataset), Checked()
    except SettingsError as error:
        raise SettingsError([*found, *(f"dataset: {problem}" for problem in error.problems)]) from None
    sides: tuple[list[tuple[int, Row]], list[tuple[int, Row]]] = ([], [])
    problems, more = [*found], 0
    limits = Limits(spec.max_seq_length) if found else base_limits(spec.base_model, spec.max_seq_length)
    try:
        for item in read(path, limits, checked):
            if isinstance(item, Problem):
                if len(problems) < len(found) + SHOWN_PROBLEMS:
                    problems.append(f"{name}:{item}")
                else:
                    more += 1
            else:
                sides[is_held_out(item[1], spec.held_out_fraction)].append(item)
    except OSError as error:
        raise SettingsError([*found, f"dataset: {name}: {error.strerror}"]) from None
    if more:
        problems.append(f"{name}: {more:,} more problems: python -m training check {name}")
    if problems:
        raise SettingsError(problems)
    least = spec.gate.min_examples
    if problem := split_problem(len(sides[0]), len(sides[1]), spec.held_out_fraction, least):
        raise SettingsError([f"dataset: {name}: {problem}"])
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
    for name in ("checkpoints", "adapter", "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (
        "tuning.json",
        "events.jsonl",
        "evaluation.json",
        "canaries.json",
        "held_out.jsonl",
        "spec.json",
        "run.json",
        "README.md",
        "curves.svg",
    ):
        (out / name).unlink(missing_ok=True)


def _keep_events(path: Path, step: int) -> None:
    """Drop measurements after `step`: the steps that a lost attempt made will be made and measured again."""
    if path.is_file():
        whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_jsonl(path, [event for event in map(json.loads, whole) if event["step"] <= step])
