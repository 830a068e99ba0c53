"""The load against a fake server: what it measured must be what the server did."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from common.files import read_json, read_jsonl
from tests.unit.test_stress_fake import ROOT, fake_server, stress, write_dataset


def test_measures_what_the_server_did(tmp_path: Path) -> None:
    data, log = write_dataset(tmp_path / "data.jsonl"), tmp_path / "log.jsonl"
    every = {"status": 10, "cut": 11, "no_done": 13, "error_event": 17, "empty": 19, "abort": 23}
    with fake_server(ttft_ms=60, itl_ms=15, tokens=4, every=every, log=str(log)) as url:
        done = stress(
            "run", "--target", url, "--dataset", data, "--out", tmp_path, "--scenario", "fake", "--models", "a=2", "b",
            "--users", 8, "--ramp-seconds", 0.2, "--duration-seconds", 30, "--max-requests", 72,
            "--prompt-tokens", 100, "--stream-share", 0.67, "--failure-pause-seconds", 0.01,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "RPS" in done.stderr
    folder = tmp_path / "stress" / "fake"
    summary, rows = read_json(folder / "summary.json"), list(read_jsonl(folder / "requests.jsonl"))
    truth = list(read_jsonl(log))[3:]  # after the preflight: two aliases, one long prompt

    # every request is there once, and every failure has its reason
    assert len(rows) == len(truth) == summary["requests"] == 72
    kinds = Counter((entry["kind"], entry["stream"]) for entry in truth)
    assert {kind for kind, _ in kinds} == {"ok", *every}
    expected = Counter(
        {
            "status 503": kinds["status", True] + kinds["status", False],
            "stream ended without [DONE]": kinds["cut", True] + kinds["no_done", True],
            "connection reset": kinds["cut", False],
            "error event": kinds["error_event", True],
            "empty answer": kinds["empty", True] + kinds["empty", False],
            "finish_reason abort": kinds["abort", True] + kinds["abort", False],
        }
    )
    assert summary["failures_by_reason"] == {reason: count for reason, count in expected.items() if count}
    assert summary["failed"] == sum(expected.values()) == sum(row["error"] is not None for row in rows)

    # the client's times are the server's, plus what connecting and a busy machine cost
    good = [row for row in rows if row["error"] is None and row["stream"]]
    served = [entry for entry in truth if entry["kind"] == "ok" and entry["stream"]]
    assert len(good) == len(served) > 15
    client_ttft, server_ttft = (statistics.median(r["ttft_ms"] for r in part) for part in (good, served))
    assert server_ttft - 1 <= client_ttft <= server_ttft + 25
    client_itl, server_itl = (statistics.median(g for r in part for g in r["itl_ms"]) for part in (good, served))
    assert client_itl == pytest.approx(server_itl, abs=4)
    assert all(len(row["itl_ms"]) == 3 for row in good)
    assert all(row["latency_ms"] >= row["ttft_ms"] + sum(row["itl_ms"]) for row in good)

    # the prompts: length, variety, aliases two to one, users that do not stream
    assert all(abs(row["prompt_tokens"] - 100) <= 3 for row in good)
    assert len({json.dumps(entry["messages"]) for entry in truth}) == 72
    assert Counter(entry["model"] for entry in truth) == {"a": 48, "b": 24}
    assert any(not row["stream"] and row["error"] is None and row["ttft_ms"] is None for row in rows)
    assert summary["ended_because"] == "72 requests sent"


def test_stops_by_itself_and_says_when_nothing_works(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.jsonl")
    common = ["--dataset", data, "--out", tmp_path, "--ramp-seconds", 0, "--duration-seconds", 1, "--users", 2]
    dead = stress("run", "--target", "http://127.0.0.1:9", "--models", "a", *common)
    assert dead.returncode == 1
    assert "does not serve 'a'" in dead.stderr and "connection refused" in dead.stderr
    with fake_server(ttft_ms=5, itl_ms=1, tokens=3) as url:
        unknown = stress("run", "--target", url, "--models", "a", "nobody", *common)
        assert unknown.returncode == 1
        assert "The model `nobody` does not exist" in unknown.stderr
    assert not (tmp_path / "stress").joinpath("load", "requests.jsonl").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_promptly(tmp_path: Path, number: signal.Signals, code: int) -> None:
    data = write_dataset(tmp_path / "data.jsonl")
    with fake_server(ttft_ms=1, itl_ms=5000) as url:  # the preflight asks for one token, the load for more
        command = [sys.executable, "-m", "stress", "run", "--target", url, "--dataset", data, "--out", tmp_path]
        command += ["--models", "a", "--ramp-seconds", "0", "--chars-per-token", "4"]
        with subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            assert process.stderr.readline().startswith("stress 0 requests")
            time.sleep(0.2)  # every user waits for an answer now
            process.send_signal(number)
            began = time.monotonic()
            assert process.wait(10) == code
            assert time.monotonic() - began < 1.5
            told = process.stderr.read()
            assert "no summary" in told and "Traceback" not in told
    assert not (tmp_path / "stress" / "load" / "summary.json").exists()
