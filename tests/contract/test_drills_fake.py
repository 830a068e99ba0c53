"""The drills against fake replicas: real processes, really killed, started again by a small supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.files import read_json, read_jsonl
from tests.unit.test_stress_fake import ROOT, FakeFleet, stress, write_dataset


@pytest.fixture
def common(tmp_path: Path) -> list[Any]:
    data = write_dataset(tmp_path / "data.jsonl")
    return [
        "--dataset", data, "--out", tmp_path, "--models", "a", "b", "--users", 6, "--ramp-seconds", 0.3,
        "--duration-seconds", 1.5, "--prompt-tokens", 100, "--before-seconds", 1.5, "--after-seconds", 0.7,
        "--timeout-seconds", 15,
    ]  # fmt: skip


def test_outage_by_phase(tmp_path: Path, common: list[Any]) -> None:
    times: dict[str, Any] = {"restart_seconds": 0.6, "engine_seconds": 0.8, "adapters_seconds": 0.7}
    with FakeFleet(tmp_path, **times, ttft_ms=20, itl_ms=5) as fleet:
        before = {replica["pid"] for replica in read_json(fleet.file)["replicas"]}
        done = stress("drill", "outage", *common)
        after = {replica["pid"] for replica in read_json(fleet.file)["replicas"]}
    assert done.returncode == 0, done.stderr
    assert fleet.restarts == 2 and not before & after
    found = read_json(tmp_path / "drills" / "outage.json")
    assert found["killed"] == ["replica-0", "replica-1"] and found["absent"] == {}
    phases = found["phases"]
    assert sum(phases.values()) == pytest.approx(found["recovery_seconds"], abs=0.01)
    # what the fakes were told to take, plus polling (0.1 s), starting Python, and a busy machine
    assert 0.5 <= phases["restart"] <= 1.6
    assert 0.7 <= phases["engine"] <= 2.0
    assert 0.4 <= phases["adapters"] <= 1.3
    assert 0.0 <= phases["routed"] <= 1.3
    assert found["recovery_seconds"] >= 2.0
    assert found["failed_probes"] >= 5
    assert set(found["failures_by_reason"]) <= {
        "status 503",
        "status 404",
        "stream ended without [DONE]",
        "connection reset",
    }
    assert [event["at"] for event in found["events"]] == sorted(event["at"] for event in found["events"])
    assert {"all replicas killed", "replica-1 ready", "first token through the router"} <= {
        e["name"] for e in found["events"]
    }
    for stages in found["replicas"].values():
        assert stages["ready_seconds"] == pytest.approx(
            stages["restart_seconds"] + stages["engine_seconds"] + stages["adapters_seconds"], abs=0.01
        )
    probes = list(read_jsonl(tmp_path / "drills" / "outage.requests.jsonl"))
    assert probes[0]["error"] is None and any(probe["error"] for probe in probes)


def test_replica_loss(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, engine_seconds=0.3, adapters_seconds=0.5, ttft_ms=30, itl_ms=40, tokens=6) as fleet:
        done = stress("drill", "replica-loss", *common, "--replica", "replica-1")
    assert done.returncode == 0, done.stderr
    assert fleet.restarts == 1
    found = read_json(tmp_path / "drills" / "replica-loss.json")
    rows = list(read_jsonl(tmp_path / "drills" / "replica-loss.requests.jsonl"))
    assert found["killed"] == "replica-1"
    assert 1.0 <= found["recovery_seconds"] <= 6.0  # 0.3 to be noticed, 0.3 engine, 0.5 adapters, starting Python
    assert found["requests"] == len(rows) > 30
    assert {row["phase"] for row in rows} == {"before", "lost", "after"}
    # streams on the killed replica are cut; whole answers are asked for again by the router
    assert found["failed_streams"] >= 1
    assert found["failed_before_kill"] == 0
    assert (
        found["failed"]
        == found["failed_streams"] + found["failed_non_streams"]
        == sum(r["error"] is not None for r in rows)
    )
    assert {row["error"] for row in rows} <= {None, "stream ended without [DONE]", "connection reset", "status 404"}
    assert 0.3 <= found["p95_ratio"] <= 5
    streams = sum(row["stream"] for row in rows)
    assert 0.3 < streams / len(rows) < 0.7
    assert found["absent"] == {}


def test_long_prompts(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, ttft_ms=20, itl_ms=5, log=str(tmp_path / "log.jsonl")):
        done = stress("drill", "long-prompts", *common, "--long-share", 0.4)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "drills" / "long-prompts.json")
    assert found["multiplier"] == 4
    assert found["prompt_tokens"]["normal"] == pytest.approx(100, abs=3)
    assert found["prompt_tokens"]["long"] == pytest.approx(400, rel=0.03)
    for name in ("short_p95_ratio", "long_p95_ratio"):
        assert 0.3 < found[name] < 3  # the fake takes no longer for a long prompt
    assert found["long"]["requests"] / (found["long"]["requests"] + found["short"]["requests"]) == pytest.approx(
        0.4, abs=0.1
    )
    assert found["failed"] == 0
    sent = [json.dumps(entry["messages"]) for entry in read_jsonl(tmp_path / "log.jsonl")]
    assert len(set(sent)) == len(sent), "no prompt may come twice, or the prefix cache answers"


def test_a_replica_that_stays_away_is_told(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, ttft_ms=10, itl_ms=1) as fleet:
        fleet.configs[0]["adapters_seconds"] = 600  # after its restart, its adapters never load
        done = stress("drill", "replica-loss", *common[:-1], 2)
    assert done.returncode == 1
    assert "replica-0 has its engine up, but is not ready" in done.stderr
    found = read_json(tmp_path / "drills" / "replica-loss.json")
    assert "recovery_seconds" not in found
    assert "not ready" in found["absent"]["recovery_seconds"] and "not ready" in found["failure"]


def test_a_fleet_that_is_not_ready_is_left_alone(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, adapters_seconds=600) as fleet:
        done = stress("drill", "outage", *common[:-1], 1)
        assert done.returncode == 1
        assert "before the drill: not every replica" in done.stderr
        assert fleet.restarts == 0
    assert read_json(tmp_path / "drills" / "outage.json")["failure"]


@contextlib.contextmanager
def drill_under_load(common: list[Any]) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A replica-loss drill whose load has begun, and the processes below it."""
    command = [sys.executable, "-m", "stress", "drill", "replica-loss", *map(str, common), "--before-seconds", "30"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while "load started" not in process.stderr.readline():
            assert process.poll() is None
        yield process, psutil.Process(process.pid).children(recursive=True)


def test_sigterm_leaves_no_process(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, ttft_ms=20, itl_ms=5), drill_under_load(common) as (process, children):
        assert children
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == 143
        for child in children:
            child.wait(5)
    assert [path.name for path in (tmp_path / "drills").iterdir()] == []


def test_a_killed_drill_takes_its_load_with_it(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, ttft_ms=20, itl_ms=5), drill_under_load(common) as (process, children):
        process.kill()
        deadline = time.monotonic() + 5
        while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
            assert time.monotonic() < deadline, "the load outlived its drill"
            time.sleep(0.05)
