"""A load as the stack's Job runs it: waits for its models, keeps its bounds or not, and leaves its report in Blob."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blobs.store import MARKER
from common import exits
from tests.unit.blob_fakes import KEY, FakeAccount
from tests.unit.test_stress_fake import ROOT, fake_server, free_port, write_dataset

PLACE = "az://account/box/reports/stress/7"
INSIDE = "reports/stress/7"
LOAD = {"users": 3, "ramp_seconds": 0.1, "duration_seconds": 0.6, "prompt_tokens": 50, "models": ["base", "kubectl"]}


@pytest.fixture
def account() -> Iterator[FakeAccount]:
    server = FakeAccount()
    try:
        yield server
    finally:
        server.close()


class Pod:
    """The Job's main container: its arguments, its settings file, its datasets, its few writable folders."""

    def __init__(self, folder: Path, home: Path, account: FakeAccount) -> None:
        self.out = folder / "work" / "out"
        self.settings = folder / "stress.json"
        (folder / "work" / "datasets").mkdir(parents=True)
        write_dataset(folder / "work" / "datasets" / "a.jsonl")
        write_dataset(folder / "work" / "datasets" / "b.jsonl")
        self.base = [
            *(sys.executable, "-m", "stress", "run", "--allow-remote", "--settings", str(self.settings)),
            *("--dataset", str(folder / "work" / "datasets"), "--out", str(self.out), "--push", PLACE),
        ]
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home),
            "DRYDOCK_BLOB_ENDPOINT": f"{account.url}/account",
            "AZURE_STORAGE_KEY": KEY,
            "DRYDOCK_API_KEY": "k3y",
        }

    def start(self, target: str, *more: str, **load: Any) -> subprocess.Popen[str]:
        self.settings.write_text(json.dumps(LOAD | load))
        return subprocess.Popen(
            [*self.base, "--target", target, *more],
            cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, target: str, *more: str, **load: Any) -> tuple[int, str]:
        """Exit code, and everything that its log has."""
        process = self.start(target, *more, **load)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, or matplotlib would look for fonts in every test."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def pod(tmp_path: Path, home: Path, account: FakeAccount) -> Pod:
    return Pod(tmp_path, home, account)


def test_kept_bounds_end_well_and_the_report_is_in_blob(pod: Pod, account: FakeAccount) -> None:
    with fake_server(ttft_ms=10, itl_ms=2) as url:
        code, log = pod.run(url, slo={"ttft_p95_ms": 5000, "itl_p95_ms": 5000, "error_rate": 0})
    assert code == exits.OK, log
    assert "ttft_p95_ms" in log and "error_rate: 0, at most 0: held" in log
    names = {"report.html", "report.json", "stress/load/summary.json", "stress/load/requests.jsonl", MARKER}
    assert set(account.blobs) == {f"{INSIDE}/{name}" for name in names}
    assert account.writes()[-1] == f"PUT {INSIDE}/{MARKER}"
    report = json.loads(account.blobs[f"{INSIDE}/report.json"][0])
    assert report["verdict"]["headline"] == "The load kept its bounds: 3 of 3 bounds held"
    assert set(report["stress"]["spec"]["models"]) == {"base", "kubectl"}
    assert f"report: {PLACE}/report.html" in log
    assert "Traceback" not in log and "writable" not in log  # matplotlib warns of a home that it cannot write


def test_a_broken_bound_ends_it_as_failed_with_the_figures_and_the_report(pod: Pod, account: FakeAccount) -> None:
    with fake_server(ttft_ms=40, itl_ms=2, every={"status": 4}) as url:
        code, log = pod.run(url, slo={"ttft_p95_ms": 20, "error_rate": 0.01}, failure_pause_seconds=0.01)
    assert code == exits.GATE, log
    assert "at most 20: not held" in log and "at most 0.01: not held" in log
    assert "itl_p95_ms" not in log  # nobody gave a bound
    report = json.loads(account.blobs[f"{INSIDE}/report.json"][0])
    assert [bound["held"] for bound in report["stress"]["bounds"]] == [False, False]
    assert b"The load broke its bounds: 0 of 2 bounds held" in account.blobs[f"{INSIDE}/report.html"][0]


def test_it_waits_for_a_model_that_does_not_answer_yet(pod: Pod) -> None:
    port = free_port()
    with pod.start(f"http://127.0.0.1:{port}", "--wait-seconds", "60") as process:
        assert process.stderr
        line = process.stderr.readline()
        assert line.startswith("stress: waiting, 0 of 60 s: ") and "connection refused" in line
        with fake_server(port=port, ttft_ms=5, itl_ms=1):
            _, log = process.communicate(timeout=60)
    assert process.returncode == exits.OK, log


def test_a_model_that_never_answers_is_told_and_nothing_is_put(pod: Pod, account: FakeAccount) -> None:
    with fake_server(ttft_ms=5, itl_ms=1) as url:
        code, log = pod.run(url, "--wait-seconds", "1", models=["base", "nobody"])
    assert code == exits.FAILED
    assert "The model `nobody` does not exist" in log
    assert account.blobs == {}


def test_without_the_right_to_the_container_nobody_is_loaded(pod: Pod, account: FakeAccount) -> None:
    account.fault = lambda method, name: (403, "AuthorizationPermissionMismatch")
    code, log = pod.run("http://127.0.0.1:9")
    assert code == exits.INPUT
    assert f"{PLACE}/{MARKER}: refused (403 AuthorizationPermissionMismatch)" in log
    assert not pod.out.exists()


def test_a_report_that_cannot_be_put_is_told(pod: Pod, account: FakeAccount) -> None:
    account.fault = lambda method, name: (409, "BlobImmutableDueToPolicy") if method == "PUT" else None
    with fake_server(ttft_ms=5, itl_ms=1) as url:
        code, log = pod.run(url)
    assert code == exits.INPUT and f"stress: the report is not in {PLACE}: " in log


def test_sigterm_ends_the_wait_at_once(pod: Pod) -> None:
    with pod.start("http://127.0.0.1:9", "--wait-seconds", "60") as process:
        assert process.stderr
        assert process.stderr.readline().startswith("stress: waiting, 0 of 60 s")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(10) == exits.TERMINATED
        assert time.monotonic() - began < 3
