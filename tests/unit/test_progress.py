"""A run shows itself three ways at once, and no way of showing it can stop it."""

from __future__ import annotations

import logging
import math
import socket
from pathlib import Path

import pytest

from common.files import read_jsonl
from training.progress import Measurement, Progress


def measured(step: int, **change: float) -> Measurement:
    values = {
        "epoch": step / 5, "loss": 1.5, "learning_rate": 2e-4, "gradient_norm": 0.7, "tokens_per_second": 1234.5,
        "elapsed_seconds": 2.0 * step, "eta_seconds": 20.0 - 2 * step,
    }  # fmt: skip
    return Measurement(step=step, total_steps=10, **(values | change))


def test_each_measurement_becomes_one_event_at_once_and_earlier_ones_stay(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    for step in (1, 2):
        with Progress("a", 10, events, None) as progress:
            progress.show(measured(step))
            assert len(events.read_text().splitlines()) == step, "it is on disk before the run goes on"
    first = next(read_jsonl(events))
    assert first == {
        "step": 1, "total_steps": 10, "epoch": 0.2, "loss": 1.5, "learning_rate": 2e-4, "gradient_norm": 0.7,
        "tokens_per_second": 1234.5, "elapsed_seconds": 2.0, "eta_seconds": 18.0,
    }  # fmt: skip


def test_a_busy_metrics_port_is_told_and_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        with caplog.at_level(logging.WARNING), Progress("a", 10, tmp_path / "e.jsonl", address) as progress:
            progress.show(measured(1))
    assert f"no metrics: {address} is not free" in caplog.text
    assert len(list(read_jsonl(tmp_path / "e.jsonl"))) == 1


def test_without_a_terminal_a_line_tells_loss_speed_and_eta_but_not_at_every_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), Progress("a", 10, tmp_path / "e.jsonl", None) as progress:
        for step in (1, 2, 3, 10):
            progress.show(measured(step))
    assert [record.getMessage() for record in caplog.records] == [
        "step 1/10  epoch 0.20  loss 1.500  1234 tokens/s  ETA 18 s",
        "step 10/10  epoch 2.00  loss 1.500  1234 tokens/s  ETA 0 s",
    ]


def test_what_is_no_number_is_no_event(tmp_path: Path) -> None:
    with Progress("a", 10, tmp_path / "e.jsonl", None) as progress, pytest.raises(ValueError, match="JSON"):
        progress.show(measured(1, loss=math.nan))
    assert (tmp_path / "e.jsonl").read_text() == ""
