"""Real parts, started once and shared: two tuned adapters, one vLLM replica with its sidecar, a folder store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from xdist.scheduler import LoadScopeScheduling

from common.files import write_json
from common.processes import free_ports
from serving.client import Engine
from serving.state import read_token
from training.__main__ import main as training

ROOT = Path(__file__).parents[2]
BASE = ROOT / "rehearsal" / "base"


LONGEST = ("replica", "test_ranks.py", "test_rehearsal.py")  # begun first, so that two workers end together


def together(file: str) -> str:
    """What has to run in one worker, in its order: a file, or all that share the replica."""
    return "replica" if "replica: Replica" in (ROOT / file).read_text() else Path(file).name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups = {file: together(file) for file in {item.nodeid.partition("::")[0] for item in items}}
    ranks = {file: LONGEST.index(group) if group in LONGEST else len(LONGEST) for file, group in groups.items()}
    items.sort(key=lambda item: ranks[item.nodeid.partition("::")[0]])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """`-n 2 --dist loadscope --no-loadscope-reorder`: by `together` (marks of xdist_group do nothing in pytest 9.2)."""

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid.partition("::")[0])

    return Scheduling(config, log)


def wait_until(condition, seconds: float, what: str) -> float:
    """Seconds until `condition()` is true; fails the test when it takes longer than `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - started


def tune(folder: Path, name: str, **settings: object) -> Path:
    """Tune a short run through the command line and return its folder."""
    spec = folder / f"{name}.yaml"
    defaults = {
        "adapter": name,
        "base_model": str(BASE),
        "dataset": str(folder / "rows.jsonl"),
        "learning_rate": 2e-3,
        "num_train_epochs": 1,
        "max_seq_length": 256,
        "held_out_fraction": 0.2,
    }
    write_json(spec, defaults | settings)
    run = folder / "runs" / name
    assert training(["tune", "--spec", str(spec), "--out", str(run), "--metrics-address", "off"]) == 0
    return run


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.jsonl`: the first 600 rows of the rehearsal's main dataset."""
    folder = tmp_path_factory.mktemp("contract")
    rows = (ROOT / "rehearsal" / "data" / "kubectl.jsonl").read_text().splitlines()[:600]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def good_run(work: Path) -> Path:
    """A tuning run that learnt something."""
    return tune(work, "kubectl", num_train_epochs=2)


@pytest.fixture(scope="session")
def useless_run(work: Path) -> Path:
    """A tuning run at a learning rate that changes nothing: its adapter is the base."""
    return tune(work, "useless", learning_rate=1e-9)


@dataclass
class Replica:
    """A running replica as its neighbours see it."""

    url: str
    state: Path
    store: Path
    spec: Path
    engine: subprocess.Popen[bytes]
    sidecar: subprocess.Popen[bytes]
    logs: Path

    def ready(self) -> dict:
        return httpx.get(f"{self.url}/ready", timeout=10).json()

    def inside(self) -> Engine:
        """A client with the sidecar's token."""
        return Engine(self.url, read_token(self.state))

    def chat(self, model: str, text: str, *, key: str = "any", **more: object) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 48}
        return self.post("/v1/chat/completions", body | more, key=key)

    def post(self, path: str, body: object, *, key: str = "any") -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)

    def models(self) -> dict[str, dict[str, object]]:
        """What clients see at /v1/models, by name."""
        listed = httpx.get(f"{self.url}/v1/models", headers={"api-key": "any"}, timeout=10).json()["data"]
        return {model["id"]: model for model in listed}

    def start_engine(self) -> None:
        command = [sys.executable, "-m", "serving", "engine", "--spec", str(self.spec), "--state", str(self.state)]
        command += ["--port", self.url.rpartition(":")[2], "--api-keys", str(self.spec.parent / "keys.json")]
        with (self.logs / "engine.log").open("ab") as log:
            self.engine = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT)

    def wait_ready(self) -> float:
        def up() -> bool:
            assert self.engine.poll() is None, (self.logs / "engine.log").read_text()[-3000:]
            try:
                return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        return wait_until(up, 240, "replica ready")


# Clients by their keys. `any` has the limits of who is in no tier.
KEYS: dict[str, dict[str, object]] = {
    "any": {},
    "low": {"prompt_tokens": 200, "output_tokens": 20, "n": 2, "concurrency": 2},
    "crowd": {"waiting": 2},
}


@contextlib.contextmanager
def running_replica(folder: Path, store: Path, **more: object) -> Iterator[Replica]:
    """One vLLM with the request layer, and its sidecar, ready; its files below `folder`."""
    spec, state, logs = folder / "serving.yaml", folder / "state", folder / "logs"
    logs.mkdir(parents=True)
    settings = {
        "base_model": str(BASE),
        "store": str(store),
        "adapters": ["kubectl", "useless", "second"],
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "poll_seconds": 0.3,
        "old_version_seconds": 1,
        "shutdown_timeout_seconds": 5,
    }
    spec.write_text(json.dumps(settings | more))
    entries = {key: {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tier": f"tier-{key}"} for key in KEYS}
    write_json(folder / "keys.json", {"tiers": {f"tier-{key}": tier for key, tier in KEYS.items()}, "clients": entries})
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "serving", "sidecar", "--spec", str(spec), "--state", str(state)]
    command += ["--engine", f"http://127.0.0.1:{port}", "--metrics-address", "off"]
    with (logs / "sidecar.log").open("ab") as log:
        sidecar = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT)
    running = Replica(f"http://127.0.0.1:{port}", state, store, spec, sidecar, sidecar, logs)
    try:
        running.start_engine()
        running.wait_ready()
        yield running
    finally:
        for process in (running.engine, running.sidecar):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def replica(work: Path) -> Iterator[Replica]:
    """One on an empty store."""
    with running_replica(work, work / "store") as replica:
        yield replica
