"""Checkpoints of a tuning run: whole or absent, tied to their settings, the newest good one found again."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from blobs import BlobError
from common.files import file_digest, read_json, write_json
from common.settings import SettingsError

if TYPE_CHECKING:
    from blobs.store import BlobFolder

log = logging.getLogger(__name__)

KEEP = 2  # the newest, and the one before it in case the newest is damaged

# A failed copy must not hold the GPU for long: the next checkpoint is another attempt. Nor may it outlast the grace
# period after SIGTERM. Two retries take about 8 s when the account answers.
REMOTE_RETRIES = 2
ROLE_SECONDS = 300.0  # at the start: a role just granted counts after some minutes


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
    target = folder / _name(position.step)
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


class Remote:
    """Copies of one run's checkpoints in Blob Storage, which outlive the node: `FOLDER/FINGERPRINT/step-N`.

    A copy counts once its marker is there. Runs with other settings, data or base lie in folders of their own.
    """

    def __init__(self, address: str, fingerprint: str) -> None:
        # Here and not above: the SDK takes most of a second to import, and a run on a laptop does without.
        from blobs.store import Address, BlobFolder

        folder = Address.parse(address)
        if not folder.path:
            raise SettingsError([f"{folder}: names a whole container; add a folder for this run"])
        self._folder: BlobFolder = BlobFolder(folder / fingerprint[:16], retries=REMOTE_RETRIES)

    def copy(self, checkpoint: Path) -> bool:
        """Copy a whole local checkpoint and remove copies beyond `KEEP`; False, with a warning, when that failed."""
        try:
            (self._folder / checkpoint.name).push(checkpoint, quiet=True)
            older = [name for name in self._folder.complete_children() if name < checkpoint.name]
            for name in older[: 1 - KEEP]:
                (self._folder / name).delete()
        except (BlobError, SettingsError, OSError) as error:
            log.warning("checkpoint %s is not copied (%s); tuning goes on without", checkpoint.name, error)
            return False
        return True

    def fetch_newer(self, folder: Path, than: int) -> bool:
        """Fetch the newest good copy beyond step `than` into `folder`; False when there is none.

        Damaged ones are passed over with a warning. Raises `SettingsError` when the place does not exist or is
        refused, and `BlobError` when it does not answer: starting from nothing would cost more than another attempt.
        """
        from blobs.store import Damaged, wait_for

        names = wait_for(lambda: (self._folder.complete_children(),), ROLE_SECONDS, str(self._folder.address))
        for name in reversed(names[0] if names else []):
            if name <= _name(than):
                break
            work = folder / f".fetching-{name}"
            try:
                (self._folder / name).fetch(work, quiet=True)
            except Damaged as error:
                log.warning("copy %s is damaged (%s); trying the one before", name, error)
                shutil.rmtree(work, ignore_errors=True)
                continue
            shutil.rmtree(folder / name, ignore_errors=True)  # a damaged one of that step
            os.replace(work, folder / name)
            log.info("checkpoint %s fetched from %s", name, self._folder.address)
            return True
        return False

    def forget(self) -> None:
        """Remove every copy of this run."""
        self._folder.delete()


def _name(step: int) -> str:
    return f"step-{step:08d}"
