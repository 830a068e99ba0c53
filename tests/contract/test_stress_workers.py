"""One load by Locust's master and workers, all real processes: what one process would have made, or an error."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.files import read_json, read_jsonl
from stress import figures
from stress.arrivals import Mix, due_seconds
from stress.spec import LoadSpec
from tests.contract.test_stress_load import loaded
from tests.unit.test_stress_fake import ROOT, fake_server, free_port, write_dataset

LOAD = ("--models", "a", "--ramp-seconds", 0, "--prompt-tokens", 100, "--workers", 2, "--users", 4)


def asked(log: Path) -> list[dict[str, Any]]:
    """What the server was asked for, without the preflight."""
    return [entry for entry in read_jsonl(log) if entry["max_tokens"] > 1]


def most_at_once(rows: list[dict[str, Any]]) -> int:
    starts = [row["started_at"] for row in rows]
    ends = [row["started_at"] + row["latency_ms"] / 1000 for row in rows]
    return max(sum(start <= at < end for start, end in zip(starts, ends, strict=True)) for at in starts)


def test_a_closed_loop_by_two_is_that_of_one(tmp_path: Path) -> None:
    log, settings = tmp_path / "log.jsonl", tmp_path / "load.yaml"
    load = {
        "models": {"a": 2, "b": 1}, "clients": {"team": 2, "batch": 1}, "tiers": {"team": "high", "batch": "low"},
        "users": 7, "workers": 2, "ramp_seconds": 0.5, "duration_seconds": 2, "stream_share": 0.5, "long_share": 0.25,
        "slo": {"error_rate": 0, "goodput": {"ttft_ms": 9000, "min_share": 1, "min_rps": 900}},
    }  # fmt: skip
    settings.write_text(json.dumps(load))
    environment = os.environ | {"DRYDOCK_API_KEYS": json.dumps({"team": "k-team", "batch": "k-batch"})}
    with fake_server(ttft_ms=150, itl_ms=5, tokens=4, log=str(log)) as url:
        done, summary, rows = loaded(tmp_path, url, "--settings", settings, env=environment)
    assert done.returncode == 3, done.stderr
    verdicts = {bound["name"]: bound["held"] for bound in summary["bounds"]}
    assert verdicts == {"error_rate": True, "goodput_rps": False, "goodput_share": True}
    truth = asked(log)
    assert len(rows) == len(truth) == summary["requests"] > 40
    assert Counter(entry["key"] for entry in truth) == {
        f"k-{n}": p["requests"] for n, p in summary["by_client"].items()
    }
    assert summary["by_tier"]["low"] == summary["by_client"]["batch"]
    assert len({json.dumps(entry["messages"]) for entry in truth}) == len(truth)  # no worker repeats another's prompts

    # the users are those that one process would have, whoever of the two has them
    users = Mix(LoadSpec.model_validate(load)).users()
    expected = Counter(next(users) for _ in range(7))
    for (client, stream), count in expected.items():
        assert most_at_once([row for row in rows if (row["client"], row["stream"]) == (client, stream)]) == count
    # each client's models two to one, off by at most one in each worker
    for client in ("team", "batch"):
        models = Counter(row["model"] for row in rows if row["client"] == client)
        assert abs(models["a"] - 2 * models["b"]) <= 2 * 2
    # times are the server's, though they came as seconds since the beginning
    for started, arrived in zip(sorted(r["started_at"] for r in rows), sorted(e["at"] for e in truth), strict=True):
        assert -0.02 < arrived - started < 0.3
    assert sorted(row["started_at"] for row in rows)[0] == pytest.approx(summary["started_at"], abs=0.5)
    assert summary["window"]["started_at"] >= summary["started_at"] + 0.5
    assert summary["spec"]["workers"] == 2
    assert "k-team" not in (tmp_path / "stress" / "load" / "requests.jsonl").read_text() + done.stderr + str(summary)


def test_a_poisson_process_is_split_and_each_part_keeps_its_bound(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with fake_server(ttft_ms=1000, itl_ms=5, tokens=2, log=str(log)) as url:
        done, summary, rows = loaded(
            tmp_path, url, "--models", "a", "b", "--arrivals", "poisson", "--requests-per-second", 20, "--ramp-seconds", 1,
            "--duration-seconds", 2, "--seed", 5, "--workers", 2, "--max-in-flight", 9,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = [list(takewhile(lambda at: at < 3, due_seconds(10, 1, f"5/{index}"))) for index in (0, 1)]
    due = sorted(at for part in parts for at in part)
    assert len(due) <= len(rows) <= len(due) + 10  # the clock is looked at somewhat late
    starts = sorted(row["started_at"] - summary["started_at"] for row in rows)[: len(due)]
    for at, expected in zip(starts, due, strict=True):
        assert at == pytest.approx(expected, abs=0.1)
    sent = [row for row in rows if row["error"] is None]
    assert len(sent) == len(asked(log)) and all(row["late_ms"] >= 0 for row in sent)
    assert summary["not_sent"] == summary["failed"] == len(rows) - len(sent) > 5
    assert {row["error"] for row in rows if row not in sent} == {figures.NOT_SENT}
    late = {id(row): row["late_ms"] for row in sent}
    under_way = [
        row | {"started_at": row["started_at"] + late[id(row)] / 1000, "latency_ms": row["latency_ms"] - late[id(row)]}
        for row in sent
    ]
    assert 6 <= most_at_once(under_way) <= 9
    assert "requests were due but not sent, as max_in_flight = 9" in done.stderr


def test_the_first_that_has_sent_its_share_ends_it_for_all(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with fake_server(ttft_ms=20, itl_ms=1, tokens=2, every={"status": 5}, log=str(log)) as url:
        done, summary, rows = loaded(
            tmp_path, url, *LOAD, "--duration-seconds", 60, "--max-requests", 41, "--failure-pause-seconds", 0.01
        )
    assert done.returncode == 0, done.stderr
    assert "requests sent" in summary["ended_because"] and summary["ended_because"].startswith("worker ")
    assert 20 <= len(rows) == len(asked(log)) <= 41
    assert summary["failures_by_reason"] == {"status 503": len(rows) // 5}


@contextlib.contextmanager
def master(out: Path, url: str, *arguments: object, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A running load, whose requests have begun unless it is still waiting for its workers."""
    data = write_dataset(out / "data.jsonl")
    command = [
        sys.executable,
        "-m",
        "stress",
        "run",
        "--target",
        url,
        "--dataset",
        data,
        "--out",
        out,
        *LOAD,
        *arguments,
    ]
    with subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def begun(process: subprocess.Popen[str], out: Path) -> None:
    """Wait for the first answers."""
    path = out / "stress" / "load" / "requests.jsonl"
    until = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size) and time.monotonic() < until:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children()
    assert len(found) == 2
    return found


def said(process: subprocess.Popen[str]) -> str:
    assert process.stderr
    return process.stderr.read()


def test_a_worker_that_is_killed_ends_it_as_failed(tmp_path: Path) -> None:
    with fake_server(ttft_ms=20, itl_ms=1) as url, master(tmp_path, url, "--duration-seconds", 60) as process:
        begun(process, tmp_path)
        workers = children(process)
        workers[0].kill()
        began = time.monotonic()
        assert process.wait(20) == 1
        assert time.monotonic() - began < 10
        told = said(process)
        assert "a worker process ended by SIGKILL: what is left would be a smaller load" in told
        assert psutil.wait_procs(workers, 10)[1] == []
    assert list(read_jsonl(tmp_path / "stress" / "load" / "requests.jsonl"))
    assert not (tmp_path / "stress" / "load" / "summary.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_all_of_it_promptly(tmp_path: Path, number: signal.Signals, code: int) -> None:
    # all users wait for an answer when the signal comes
    with fake_server(ttft_ms=300, itl_ms=1, tokens=400) as url, master(tmp_path, url, "--max-tokens", 400) as process:
        begun(process, tmp_path)
        workers = children(process)
        process.send_signal(number)
        began = time.monotonic()
        assert process.wait(15) == code
        assert time.monotonic() - began < 4
        told = said(process)
        assert psutil.wait_procs(workers, 10)[1] == []
    rows = list(read_jsonl(tmp_path / "stress" / "load" / "requests.jsonl"))
    assert f"stopped; {len(rows)} requests are in" in told and "Traceback" not in told
    assert not (tmp_path / "stress" / "load" / "summary.json").exists()


def test_asked_to_end_it_waits_for_what_is_under_way(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with fake_server(ttft_ms=400, itl_ms=1, log=str(log)) as url, master(tmp_path, url) as process:
        begun(process, tmp_path)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 0, said(process)
    summary = read_json(tmp_path / "stress" / "load" / "summary.json")
    assert summary["ended_because"] == "asked to end"
    assert summary["requests"] == len(asked(log)) >= 8 and summary["failed"] == 0


def test_workers_do_not_outlive_a_master_that_is_killed(tmp_path: Path) -> None:
    with fake_server(ttft_ms=20, itl_ms=1) as url, master(tmp_path, url) as process:
        begun(process, tmp_path)
        workers = children(process)
        process.kill()
        assert psutil.wait_procs(workers, 10)[1] == []


@contextlib.contextmanager
def worker(port: int, url: str, *arguments: object, code: str = "", **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A worker as another machine would run it; `code` is run in it first."""
    options = [*map(str, ("worker", "--master", f"127.0.0.1:{port}", "--target", url, *arguments))]
    if code:
        begin = f"import sys; sys.argv[1:] = {options!r}; from stress import __main__ as main; {code}; sys.exit(main.main())"
        command = [
            sys.executable,
            "-c",
            begin.replace("from stress", "from gevent import monkey; monkey.patch_all(); from stress", 1),
        ]
    else:
        command = [sys.executable, "-m", "stress", *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def test_workers_of_elsewhere_and_one_too_many(tmp_path: Path) -> None:
    port, target, log = free_port(), free_port(), tmp_path / "log.jsonl"
    url, keys = f"http://127.0.0.1:{target}", os.environ | {"DRYDOCK_API_KEYS": json.dumps({"team": "k-team"})}
    options = ("--clients", "team", "--listen", f"127.0.0.1:{port}", "--duration-seconds", 2, "--wait-seconds", 60)
    with contextlib.ExitStack() as held:
        process = held.enter_context(master(tmp_path, url, *options, env=keys))
        three = [held.enter_context(worker(port, url, env=keys)) for _ in range(3)]
        until = time.monotonic() + 60
        while time.monotonic() < until and not all(known(each, port) for each in three):
            time.sleep(0.05)
        held.enter_context(fake_server(port=target, ttft_ms=20, itl_ms=1, log=str(log)))  # only now can it begin
        assert process.wait(60) == 0, said(process)
        assert [each.wait(20) for each in three] == [0, 0, 0]
    rows = list(read_jsonl(tmp_path / "stress" / "load" / "requests.jsonl"))
    assert len(rows) == len(asked(log)) == read_json(tmp_path / "stress" / "load" / "summary.json")["requests"] > 10


def known(process: subprocess.Popen[str], port: int) -> bool:
    """Whether a worker is connected to its master (or has been, and has left)."""
    if process.poll() is not None:
        return True
    return any(
        at.raddr and at.raddr.port == port and at.status == "ESTABLISHED"
        for at in psutil.Process(process.pid).net_connections()
    )


def test_a_worker_that_is_not_heard_of_ends_it_as_failed(tmp_path: Path) -> None:
    port = free_port()
    with (
        fake_server(ttft_ms=20, itl_ms=1) as url,
        master(tmp_path, url, "--listen", f"127.0.0.1:{port}", "--duration-seconds", 60) as process,
        worker(port, url) as one,
        worker(port, url) as two,
    ):
        begun(process, tmp_path)
        one.kill()  # its machine, for all that the master can know
        assert process.wait(40) == 1
        assert "was not heard of for 10 s" in said(process)
        assert two.wait(20) == 0
    assert not (tmp_path / "stress" / "load" / "summary.json").exists()


def test_a_worker_that_is_told_to_end_says_so(tmp_path: Path) -> None:
    port = free_port()
    with (
        fake_server(ttft_ms=20, itl_ms=1) as url,
        master(tmp_path, url, "--listen", f"127.0.0.1:{port}", "--duration-seconds", 60) as process,
        worker(port, url) as one,
        worker(port, url) as two,
    ):
        begun(process, tmp_path)
        one.terminate()
        assert (process.wait(20), one.wait(20), two.wait(20)) == (1, 143, 0)
        assert "was told to end by a signal" in said(process)


def test_a_worker_that_never_comes_is_told_and_nothing_is_loaded(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log.jsonl"
    with (
        fake_server(log=str(log)) as url,
        master(tmp_path, url, "--listen", f"127.0.0.1:{port}", "--join-seconds", 6) as process,
        worker(port, url) as one,
    ):
        assert process.wait(40) == 1
        assert "1 of 2 workers came within 6 s: nothing was loaded" in said(process)
        assert one.wait(20) == 0  # told that it is over
    assert not log.exists() or list(read_jsonl(log)) == []


def test_the_wait_for_workers_ends_by_a_signal(tmp_path: Path) -> None:
    port = free_port()
    with master(tmp_path, "http://127.0.0.1:9", "--listen", f"127.0.0.1:{port}") as process:
        until = time.monotonic() + 60
        while time.monotonic() < until and not listens(process, port):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert said(process) == ""


def listens(process: subprocess.Popen[str], port: int) -> bool:
    return any(at.laddr.port == port for at in psutil.Process(process.pid).net_connections() if at.status == "LISTEN")


def test_an_address_that_is_none_is_told(tmp_path: Path) -> None:
    with master(tmp_path, "http://127.0.0.1:9", "--listen", "here") as process:
        assert process.wait(60) == 2
        assert "'here': not an address such as" in said(process)


def test_a_master_that_never_comes_is_told(tmp_path: Path) -> None:
    port = free_port()
    with worker(port, "http://127.0.0.1:9", "--wait-seconds", 1) as alone:
        assert alone.wait(30) == 1
        assert f"no master at 127.0.0.1:{port} within 1 s" in said(alone)


def test_a_worker_without_the_clients_key_is_told(tmp_path: Path) -> None:
    port = free_port()
    keys = os.environ | {"DRYDOCK_API_KEYS": json.dumps({"team": "k-team"})}
    with (
        fake_server() as url,
        master(tmp_path, url, "--clients", "team", "--listen", f"127.0.0.1:{port}", env=keys) as process,
        worker(port, url, env=keys),
        worker(port, url),
    ):
        assert process.wait(40) == 1
        assert "clients: team: no key of that name in DRYDOCK_API_KEYS: nothing was loaded" in said(process)


DROPS = (
    "from stress import workers; "
    "flush = workers.Worker.flush; "
    "workers.Worker.flush = lambda self: (setattr(self, 'batch', self.batch[1:]), "
    "setattr(self, 'total', self.total + 1), setattr(workers.Worker, 'flush', flush)) if self.batch else None"
)


def test_a_record_that_is_lost_is_an_error(tmp_path: Path) -> None:
    port = free_port()
    with (
        fake_server(ttft_ms=20, itl_ms=1) as url,
        master(tmp_path, url, "--listen", f"127.0.0.1:{port}", "--duration-seconds", 60) as process,
        worker(port, url, code=DROPS),
        worker(port, url),
    ):
        assert process.wait(60) == 1
        assert "sent 1 records, of which 0 came: they are not whole" in said(process)
    assert not (tmp_path / "stress" / "load" / "summary.json").exists()
