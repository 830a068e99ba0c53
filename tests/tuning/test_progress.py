"""A run shows itself three ways at once, and no way of showing it can stop it."""

from __future__ import annotations

import json
import logging
import math
import socket
import struct
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from common.files import read_jsonl
from common.logs import JsonLines
from common.processes import free_ports
from training.progress import Measurement, Progress


def measured(step: int, **change: Any) -> Measurement:
    values: dict[str, Any] = {
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
        address = ("127.0.0.1", busy.getsockname()[1])
        with caplog.at_level(logging.WARNING), Progress("a", 10, tmp_path / "e.jsonl", address) as progress:
            progress.show(measured(1))
    assert f"no metrics: 127.0.0.1:{address[1]} is not free" in caplog.text
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


def test_the_same_line_for_a_machine_has_the_figures_as_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), Progress("a", 10, tmp_path / "e.jsonl", None) as progress:
        progress.show(measured(1, pass_fill=0.75))
    line = JsonLines().format(caplog.records[0])
    assert "\n" not in line
    record = json.loads(line)
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "level": "info", "message": "step 1/10  epoch 0.20  loss 1.500  1234 tokens/s  ETA 18 s",
        **next(read_jsonl(tmp_path / "e.jsonl")),
    }  # fmt: skip
    assert record["pass_fill"] == 0.75 and "gpu_memory_bytes" not in record, "what there is not is not told"


def metrics(address: tuple[str, int]) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=5) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    pairs = (line.rsplit(" ", 1) for line in lines)
    return {name.removeprefix("drydock_tuning_").removesuffix('{adapter="a"}'): float(value) for name, value in pairs}


def test_prometheus_is_told_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    address = ("127.0.0.1", free_ports(1)[0])
    with Progress("a", 10, tmp_path / "e.jsonl", address) as progress:
        progress.dropped(3)
        progress.show(measured(1))
        seen = metrics(address)
        assert set(seen) == {
            "step", "total_steps", "epoch", "loss", "learning_rate", "gradient_norm", "tokens_per_second",
            "elapsed_seconds", "eta_seconds", "dropped_rows",
        }  # fmt: skip
        assert (seen["loss"], seen["eta_seconds"], seen["dropped_rows"]) == (1.5, 18.0, 3)
        progress.saved(4)
        progress.show(measured(5, gpu_memory_bytes=7 * 2**30, pass_fill=0.5))
        seen = metrics(address)
        assert (seen["gpu_memory_bytes"], seen["pass_fill"], seen["checkpoint_step"]) == (7 * 2**30, 0.5, 4)
        assert seen["checkpoint_timestamp_seconds"] > 1.7e9


def tensorboard(path: Path) -> Iterator[Event]:
    """The records of one file: length, its checksum, the message, its checksum."""
    data = path.read_bytes()
    while data:
        length, of_length = struct.unpack("<QI", data[:12])
        message, (of_message,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert (masked_crc32c(data[:8]), masked_crc32c(message)) == (of_length, of_message)
        yield Event.FromString(message)
        data = data[16 + length :]


def test_tensorboard_gets_a_file_an_attempt_and_forgets_the_steps_of_a_lost_one(tmp_path: Path) -> None:
    for done_before, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with Progress("a", 10, tmp_path / "events.jsonl", None) as progress:
            progress.resumed(done_before)
            for step in steps:
                progress.show(measured(step, loss=10 * done_before + step))
    first, second = ([*tensorboard(path)] for path in sorted((tmp_path / "tensorboard").iterdir()))
    values = [(event.step, {v.tag: v.simple_value for v in event.summary.value}) for event in first + second]
    assert [(step, seen["loss"]) for step, seen in values if "loss" in seen] == [
        (1, 1), (2, 2), (3, 3), (3, 23), (4, 24),
    ]  # fmt: skip
    assert {tag for _, seen in values for tag in seen} == {
        "loss", "learning_rate", "gradient_norm", "tokens_per_second", "epoch",
    }  # fmt: skip
    assert [e.step for e in second if e.session_log.status == SessionLog.START] == [3], "from here on it counts anew"


def test_a_run_without_a_measurement_leaves_no_empty_file_of_tensorboard(tmp_path: Path) -> None:
    with Progress("a", 10, tmp_path / "events.jsonl", None):
        pass
    assert not (tmp_path / "tensorboard").exists()
