"""Checkpoints of a tuning run: whole or absent, tied to their settings, the newest good one found again."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common.files import file_digest, read_json, write_json

log = logging.getLogger(__name__)

KEEP = 2  # the newest, and the one before it in case the newest is damaged


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimiser steps done, and what the finished report needs of the time before."""

    step: int
    seconds: float
    tokens: int


def save(folder: Path, fingerprint: str, position: Position, adapter: dict[str, torch.Tensor], rest: Any) -> Path:
    """Write checkpoint `step-N` below `folder`: adapter weights, optimiser, schedule and random state.

    It is written beside its place and renamed, and `state.json` (written last) holds the digests of the others, so
    that a half-written or damaged one is recognised.
    """
    target = folder / f"step-{position.step:08d}"
    work = folder / f".writing-{target.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, work / "adapter.safetensors")
    torch.save(rest, work / "trainer.pt")
    files = {path.name: file_digest(path) for path in sorted(work.iterdir())}
    write_json(work / "state.json", {"fingerprint": fingerprint, "position": asdict(position), "files": files})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(work, target)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)
    return target


def newest(folder: Path, fingerprint: str) -> tuple[Position, dict[str, torch.Tensor], Any] | None:
    """`(position, adapter weights, rest)` of the newest whole checkpoint of this very run, or None.

    Damaged ones are passed over with a warning. Raises ValueError when the folder holds another run's checkpoint.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            state = read_json(path / "state.json")
            damaged = [name for name, digest in state["files"].items() if file_digest(path / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            log.warning("checkpoint %s is incomplete (%s); trying the one before", path, error)
            continue
        if damaged:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, ", ".join(damaged))
            continue
        if state["fingerprint"] != fingerprint:
            raise ValueError(f"{path} was written by a run with other settings, data or base")
        rest = torch.load(path / "trainer.pt", weights_only=True)
        return Position(**state["position"]), load_file(path / "adapter.safetensors"), rest
    return None
