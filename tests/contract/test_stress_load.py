"""The load against a fake server: what it measured must be what the server did."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from common.files import read_json, read_jsonl
from stress import figures
from stress.arrivals import due_seconds
from tests.unit.test_stress_fake import ROOT, fake_server, stress, write_dataset


def test_measures_what_the_server_did(tmp_path: Path) -> None:
    data, log = write_dataset(tmp_path / "data.jsonl"), tmp_path / "log.jsonl"
    every = {"status": 10, "cut": 11, "no_done": 13, "error_event": 17, "empty": 19, "abort": 23}
    with fake_server(ttft_ms=60, itl_ms=15, tokens=2, every=every, log=str(log)) as url:
        done = stress(
            "run", "--target", url, "--dataset", data, "--out", tmp_path, "--scenario", "fake", "--models", "a=2", "b",
            "--users", 8, "--ramp-seconds", 0.2, "--duration-seconds", 30, "--max-requests", 72,
            "--prompt-tokens", 100, "--stream-share", 0.67, "--failure-pause-seconds", 0.01,
            "--max-tokens", 4, "--ignore-eos",
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
    assert all(len(row["itl_ms"]) == 3 for row in good), "four tokens, where the model would have stopped at two"
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


def loaded(out: Path, url: str, *arguments: object, **more: Any) -> tuple[subprocess.CompletedProcess[str], Any, Any]:
    """The load's process, its summary and its records."""
    data = write_dataset(out / "data.jsonl")
    done = stress("run", "--target", url, "--dataset", data, "--out", out, "--prompt-tokens", 100, *arguments, **more)
    folder = out / "stress" / "load"
    return done, read_json(folder / "summary.json"), list(read_jsonl(folder / "requests.jsonl"))


POISSON = ("--arrivals", "poisson", "--requests-per-second", 20, "--ramp-seconds", 1, "--duration-seconds", 2)


def test_an_open_loop_sends_what_is_due_whatever_the_server_does(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with fake_server(ttft_ms=1500, itl_ms=5, tokens=2, log=str(log)) as url:
        done, summary, rows = loaded(tmp_path, url, *POISSON, "--models", "a", "--seed", 5)
    assert done.returncode == 0, done.stderr
    due = list(takewhile(lambda at: at < 4, due_seconds(20, 1, 5)))
    assert 35 < sum(at < 3 for at in due) < 65  # 10 in the ramp and 40 after it, by chance
    assert sum(at < 3 for at in due) <= len(rows) < len(due)  # it may look at the clock somewhat late
    due = due[: len(rows)]
    starts = sorted(row["started_at"] for row in rows)
    for at, expected in zip(starts, due, strict=True):
        assert at - starts[0] == pytest.approx(expected - due[0], abs=0.005)  # when it was due, not when it was sent
    arrived = sorted(entry["at"] for entry in read_jsonl(log) if entry["max_tokens"] > 1)
    assert arrived[-1] - arrived[0] < due[-1] - due[0] + 0.8  # a closed loop would have waited for answers
    assert max(sum(a <= at < a + 1.5 for at in arrived) for a in arrived) > 15  # so many were unanswered at once

    assert summary["failed"] == 0 and "not_sent" not in summary
    assert all(row["late_ms"] >= 0 and row["ttft_ms"] >= 1500 + row["late_ms"] for row in rows)
    assert summary["ttft_ms"]["p50"] > summary["ttft_from_sending_ms"]["p50"] >= 1500
    assert json.loads(done.stdout)["late_ms"] == summary["late_ms"]


def test_what_the_bound_holds_back_is_told_and_counts_as_failed(tmp_path: Path) -> None:
    settings = tmp_path / "load.yaml"
    settings.write_text("slo: {error_rate: 0.1}\nmax_in_flight: 4\n")
    with fake_server(ttft_ms=1000, itl_ms=5, tokens=2) as url:
        done, summary, rows = loaded(tmp_path, url, *POISSON, "--models", "a", "--settings", settings)
    assert done.returncode == 3, done.stderr
    held_back = [row for row in rows if row["error"] == figures.NOT_SENT]
    assert summary["not_sent"] == summary["failed"] == len(held_back) > 10
    assert summary["failures_by_reason"] == {"not sent": len(held_back)}
    assert f"{len(held_back)} of {len(rows)} requests were due but not sent, as max_in_flight = 4" in done.stderr
    assert "error_rate" in done.stderr and "not held" in done.stderr
    ends = {(row["started_at"] + row["late_ms"] / 1000, row["started_at"] + row["latency_ms"] / 1000)
            for row in rows if row["error"] is None}  # fmt: skip
    for row in held_back:
        assert sum(start <= row["started_at"] + 0.3 and row["started_at"] < end for start, end in ends) >= 4


def test_clients_ask_with_their_own_keys_and_the_low_tier_is_shed(tmp_path: Path) -> None:
    log, settings = tmp_path / "log.jsonl", tmp_path / "load.yaml"
    settings.write_text(
        "models: [a, b]\nclients: {team: 3, batch: 3}\ntiers: {team: high, batch: low}\nusers: 6\n"
        "slo: {error_rate: 0, shed_rate: 0.9, goodput: {ttft_ms: 2000, min_share: 0.2, min_rps: 900}}\n"
    )
    environment = os.environ | {"DRYDOCK_API_KEYS": json.dumps({"team": "k-team", "batch": "k-batch"})}
    with fake_server(ttft_ms=100, itl_ms=5, tokens=3, limits={"k-batch": 1}, log=str(log)) as url:
        done, summary, rows = loaded(
            tmp_path, url, "--settings", settings, "--ramp-seconds", 0, "--duration-seconds", 2.5, env=environment
        )
    assert done.returncode == 3, done.stderr
    shed = [row for row in rows if row["status"] == 429]
    assert summary["shed"] == len(shed) > 0 and summary["failed"] == 0 and summary["failures_by_reason"] == {}
    assert {row["client"] for row in shed} == {"batch"}
    assert summary["retry_after_seconds"]["p50"] == 1 and summary["retry_after_obeyed"] is True
    # three users share room for one: each refusal costs a second, so there can be two every second, and two at first
    assert len(shed) <= 2 * 4

    truth = list(read_jsonl(log))
    asked = Counter(entry["key"] for entry in truth if entry["max_tokens"] > 1)
    assert asked == {f"k-{name}": part["requests"] for name, part in summary["by_client"].items()}
    assert {entry["key"] for entry in truth if entry["max_tokens"] == 1} == {"k-team", "k-batch"}  # before the clock
    assert summary["by_tier"]["low"] == summary["by_client"]["batch"]
    assert summary["by_client"]["team"]["goodput_share"] == 1 > summary["by_client"]["batch"]["goodput_share"]
    assert set(summary["by_model"]) == {"a", "b"}
    assert sum(part["requests"] for part in summary["by_model"].values()) == summary["requests"]
    verdicts = {bound["name"]: bound["held"] for bound in summary["bounds"]}
    assert verdicts == {"error_rate": True, "shed_rate": True, "goodput_rps": False, "goodput_share": True}
    assert "goodput_rps" in done.stderr and "at least 900: not held" in done.stderr
    assert "k-team" not in (tmp_path / "stress" / "load" / "requests.jsonl").read_text() + done.stderr + str(summary)


def test_a_wrong_key_ends_it_before_the_clock_starts(tmp_path: Path) -> None:
    environment = os.environ | {"DRYDOCK_API_KEYS": json.dumps({"team": "k-team", "batch": "k-batch"})}
    data = write_dataset(tmp_path / "data.jsonl")
    with fake_server(limits={"k-batch": 0}) as url:
        common = ["--target", url, "--dataset", data, "--out", tmp_path, "--models", "a"]
        done = stress("run", *common, "--clients", "team", "batch", env=environment)
    assert done.returncode == 1
    assert "does not serve 'a' to client batch" in done.stderr and "status 429" in done.stderr


OBJECTIVES = ("ttft_ms", "tpot_ms", "e2e_ms")


def test_goodput_is_what_vllm_bench_counts() -> None:
    """Its own function on the same requests, whose role came with the first text and whose last chunk had text."""
    from vllm.benchmarks import serve
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    chance = random.Random(1)
    rows, outputs = [], []
    for number in range(200):
        gaps = [chance.uniform(5, 40) for _ in range(chance.randrange(0, 9))]
        ttft, tokens = chance.uniform(20, 150), len(gaps) + 1
        latency = ttft + sum(gaps)
        times = {"ttft_ms": ttft, "itl_ms": gaps, "latency_ms": latency}
        counted = {"completion_tokens": tokens, "prompt_tokens": 100, "stream": True, "error": None, "status": 200}
        rows.append({"started_at": float(number % 10), **counted, **times})
        outputs.append(
            RequestFuncOutput(
                success=True, latency=latency / 1000, output_tokens=tokens, ttft=ttft / 1000, prompt_len=100,
                itl=[gap / 1000 for gap in gaps], start_time=float(number % 10),
            )
        )  # fmt: skip
    limits = {"ttft": 100.0, "tpot": 25.0, "e2el": 220.0}
    theirs, _ = serve.calculate_metrics([], outputs, 20.0, None, [50.0, 95.0], limits)
    ours = figures.summary(rows, (0.0, 20.0), objectives=dict(zip(OBJECTIVES, limits.values(), strict=True)))
    assert 0 < theirs.request_goodput < 10
    assert ours["goodput_rps"] == pytest.approx(theirs.request_goodput, abs=1e-4)
    assert ours["rps"] == pytest.approx(theirs.request_throughput)
    assert ours["output_tokens_per_second"] == pytest.approx(theirs.output_throughput, abs=1e-3)
    for name, values in (("ttft_ms", theirs.percentiles_ttft_ms), ("itl_ms", theirs.percentiles_itl_ms)):
        assert ours[name]["p50"] == pytest.approx(values[0][1], abs=0.001)
        assert ours[name]["p95"] == pytest.approx(values[1][1], abs=0.001)
