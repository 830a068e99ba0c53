"""Checkpoints are whole or passed over, and belong to one run."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from training import checkpoint
from training.checkpoint import Position


def save(folder: Path, step: int, fingerprint: str = "f") -> Path:
    return checkpoint.save(
        folder, fingerprint, Position(step, 1.5, 10 * step), {"a": torch.full((2, 2), step)}, {"s": step}
    )


def found_step(folder: Path) -> int | None:
    found = checkpoint.newest(folder, "f")
    return found[0].step if found else None


def test_the_newest_comes_back_whole(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    found = checkpoint.newest(tmp_path, "f")
    assert found
    position, adapter, rest = found
    assert position == Position(10, 1.5, 100)
    assert adapter["a"].tolist() == [[10, 10], [10, 10]]
    assert rest == {"s": 10}


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 100_000_000):
        save(tmp_path, step)
    assert found_step(tmp_path) == 100_000_000
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["adapter.safetensors", "trainer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "absent", "empty", "flipped"])
def test_a_damaged_newest_falls_back_to_the_one_before_with_a_warning(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        flipped = data[:-9] + bytes([data[-9] ^ 255]) + data[-8:]
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING):
        assert found_step(tmp_path) == 1
    assert "trying the one before" in caplog.text
    assert "step-00000002" in caplog.text


def test_all_damaged_or_none_at_all_means_from_the_start(tmp_path: Path) -> None:
    assert found_step(tmp_path / "nowhere") is None
    (save(tmp_path, 1) / "state.json").write_text("{")
    (tmp_path / ".writing-step-00000002").mkdir()
    assert found_step(tmp_path) is None


def test_another_runs_checkpoint_is_refused_by_path(tmp_path: Path) -> None:
    save(tmp_path, 1, "other")
    with pytest.raises(ValueError, match="step-00000001 was written by a run with other settings"):
        checkpoint.newest(tmp_path, "f")


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    (save(tmp_path, 3) / "trainer.pt").write_bytes(b"")
    save(tmp_path, 3)
    assert found_step(tmp_path) == 3


def test_a_crash_while_writing_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, 2)
    assert found_step(tmp_path) == 1
    save(tmp_path, 2)
    assert found_step(tmp_path) == 2
