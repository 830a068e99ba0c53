"""Checkpoints of a tuning run: whole or absent, tied to their settings, the newest good one found again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from blobs import BlobError
from common.files import file_digest, read_json, write_atomic, write_json
from common.settings import SettingsError

if TYPE_CHECKING:
    from blobs.store import BlobFolder

log = logging.getLogger(__name__)

KEEP = 2  # the newest, and the one before it in case the newest is damaged
STATE = "state.json"
EVENTS = "events.jsonl"  # the measurements so far lie beside the folder of the checkpoints; each takes them along

REMOTE_RETRIES = 2  # the next checkpoint is another attempt; they take about 8 s when the account answers
COPY_SECONDS = 60.0
"""A copy holds the tuning no longer, whatever the account does: half of the grace period after SIGTERM, in which the
running step and the local checkpoint must find room too. A copy that takes longer goes on beside the tuning."""
ROLE_SECONDS = 300.0
"""At the start: a role just granted counts after some minutes, and an account that throttles lets through again."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimiser steps done, and what the finished report needs of the time before.

    `loss_sum` in nats of `loss_tokens`: those since the last measurement, which the next one is of as well.
    """

    step: int
    seconds: float
    tokens: int
    loss_sum: float = 0.0
    loss_tokens: int = 0


class Unusable(Exception):
    """A checkpoint that is not what was written; the text names the file."""


def save(folder: Path, fingerprint: str, position: Position, adapter: dict[str, torch.Tensor], rest: Any) -> Path:
    """Write checkpoint `step-N` below `folder`: adapter weights, optimiser, schedule, random state, measurements.

    It is written beside its place and renamed, and `state.json` (written last) holds the digests of the others and its
    own, so that a half-written or damaged one is recognised. Raises OSError when it cannot be written (a full disk);
    the checkpoints before it are as they were.
    """
    target = folder / _name(position.step)
    for left in folder.glob(".*-step-*"):  # by a process that was killed while it wrote or fetched one
        shutil.rmtree(left, ignore_errors=True)
    work = folder / f".writing-{target.name}"
    try:
        work.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, work / "adapter.safetensors")
        torch.save(rest, work / "trainer.pt")
        if (folder.parent / EVENTS).is_file():
            shutil.copyfile(folder.parent / EVENTS, work / EVENTS)
        files = {path.name: file_digest(path) for path in sorted(work.iterdir())}
        state = {"fingerprint": fingerprint, "position": asdict(position), "files": files}
        write_json(work / STATE, state | {"digest": _digest(state)})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(work, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two: what torch and safetensors make of ENOSPC
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
            raise
        free = f", {shutil.disk_usage(folder).free / 2**20:,.0f} MiB free" if folder.is_dir() else ""
        raise OSError(
            f"{target}: this checkpoint cannot be written ({error}{free}): make room on that disk, then run again; it "
            "goes on from the checkpoint before"
        ) from error
    for name in _surplus([path.name for path in folder.glob("step-*")], target.name):
        shutil.rmtree(folder / name, ignore_errors=True)
    return target


def newest(folder: Path, fingerprint: str) -> tuple[Position, dict[str, torch.Tensor], Any] | None:
    """`(position, adapter weights, rest)` of the newest whole checkpoint of this very run, or None.

    Damaged ones are passed over with a warning. Raises ValueError when the folder holds another run's checkpoint.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        try:
            state = _state(path)
        except Unusable as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
            continue
        if state["fingerprint"] != fingerprint:
            raise ValueError(f"{path} was written by a run with other settings, data or base")
        # To the CPU: else all of it, in every process that the first sends it to, would stay on the first one's GPU.
        rest = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
        return Position(**state["position"]), load_file(path / "adapter.safetensors"), rest
    if found:
        log.warning("no checkpoint in %s is whole: without a copy elsewhere, tuning starts anew", folder)
    return None


def _state(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says, once all files of the checkpoint are what it says. Raises `Unusable`."""
    try:
        state: Any = read_json(checkpoint / STATE)
        digest = state.pop("digest")
    except OSError as error:
        raise Unusable(f"{STATE}: {error.strerror}") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise Unusable(f"{STATE}: cut or garbled") from None
    if digest != _digest(state):
        raise Unusable(f"{STATE}: not as it was written")
    wrong = []
    for name, expected in state["files"].items():
        try:
            if file_digest(checkpoint / name) != expected:
                wrong.append(f"{name}: not as it was written")
        except OSError as error:
            wrong.append(f"{name}: {error.strerror}")
    if wrong:
        raise Unusable(", ".join(wrong))
    return dict(state)


def _digest(state: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


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
        # One request at a time: the interpreter would wait at its end for the SDK's threads, however long they hang.
        self._folder: BlobFolder = BlobFolder(folder / fingerprint[:16], retries=REMOTE_RETRIES, at_once=1)
        self._copying: threading.Thread | None = None

    def copy(self, checkpoint: Path) -> bool:
        """Copy a whole local checkpoint and remove copies beyond `KEEP`; False, with a warning, when that failed.

        Returns within `COPY_SECONDS`; what takes longer goes on in a thread, and later copies wait for it as long.
        """
        end = time.monotonic() + COPY_SECONDS
        if self._copying is not None:
            self._copying.join(COPY_SECONDS)
            if self._copying.is_alive():
                log.warning(
                    "checkpoint %s is not copied: the copy before hangs; tuning goes on without", checkpoint.name
                )
                return False
        copied = threading.Event()
        self._copying = threading.Thread(target=self._copy, args=(checkpoint, copied), daemon=True)
        self._copying.start()
        self._copying.join(max(0.0, end - time.monotonic()))
        if self._copying.is_alive():
            log.warning("checkpoint %s is not copied after %g s; tuning goes on", checkpoint.name, COPY_SECONDS)
        return copied.is_set()

    def _copy(self, checkpoint: Path, copied: threading.Event) -> None:
        try:
            (self._folder / checkpoint.name).push(checkpoint, quiet=True)
            copied.set()
            for name in _surplus(self._folder.complete_children(), checkpoint.name):
                (self._folder / name).delete()
        except (BlobError, SettingsError, OSError) as error:
            what = "older copies are not removed" if copied.is_set() else f"checkpoint {checkpoint.name} is not copied"
            log.warning("%s (%s); tuning goes on without", what, error)

    def fetch_newer(self, folder: Path, than: int) -> bool:
        """Fetch the newest good copy beyond step `than` into `folder`, its measurements beside; False if there is none.

        Damaged ones are passed over with a warning. What may pass is waited out for `ROLE_SECONDS`; then it raises
        `SettingsError` when the place does not exist or is refused, and `BlobError` when it does not answer: starting
        from nothing would cost more than another attempt.
        """
        from blobs.store import Damaged, wait_for

        names = wait_for(lambda: (self._folder.complete_children(),), ROLE_SECONDS, str(self._folder.address))
        for name in reversed(names[0] if names else []):
            if name <= _name(than):
                break
            work, copy = folder / f".fetching-{name}", self._folder / name
            try:
                wait_for(lambda: (copy.fetch(work, quiet=True),), ROLE_SECONDS, str(copy.address))  # noqa: B023
                _state(work)  # it may have been damaged on its node before it was copied
            except (Damaged, Unusable) as error:
                log.warning("copy %s is damaged (%s); trying the one before", name, error)
                shutil.rmtree(work, ignore_errors=True)
                continue
            shutil.rmtree(folder / name, ignore_errors=True)  # a damaged one of that step
            os.replace(work, folder / name)
            if (folder / name / EVENTS).is_file():
                write_atomic(folder.parent / EVENTS, (folder / name / EVENTS).read_bytes())
            log.info("checkpoint %s fetched from %s", name, self._folder.address)
            return True
        return False

    def forget(self) -> None:
        """Remove every copy of this run."""
        self._folder.delete()


def _surplus(names: list[str], newest: str) -> list[str]:
    """Of the checkpoints `names`, those to remove once `newest` is written.

    Those beyond it among them: they were passed over as damaged, or the run would stand there.
    """
    return [name for name in names if name > newest] + sorted(name for name in names if name < newest)[: 1 - KEEP]


def _name(step: int) -> str:
    return f"step-{step:08d}"
