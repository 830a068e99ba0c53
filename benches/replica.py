"""A real replica on this machine and an adapter for it: what the serving bench measures and the fuzz attacks."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from artifacts.adapter import repository
from benches.around import MIDDLEWARE
from common.files import read_json, write_json
from common.processes import Processes, free_ports, python, wait_for
from serving.client import Engine
from serving.engine import is_ok, vllm_command, vllm_environment
from serving.evaluate import evaluate, open_run
from serving.spec import ServingSpec
from serving.state import loaded_name, prepare, read_token
from training.publish import publish

ROOT = Path(__file__).parents[1]
BASE = ROOT / "rehearsal" / "base"
DATASET = ROOT / "rehearsal" / "data" / "kubectl.jsonl"
ADAPTER = "kubectl"
TUNED_ROWS = 600  # enough to beat the base by far, in half a minute on two cores
START_SECONDS = 600.0
STOP_SECONDS = 60.0
SWITCH_SECONDS = 60.0  # far beyond what a hot load takes; then something is wrong


@dataclass
class Server:
    """One server, its files below `folder`: our engine with its sidecar, or vLLM alone at the same flags."""

    processes: Processes
    folder: Path
    spec: ServingSpec
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=lambda: free_ports(1)[0])
    engine: subprocess.Popen[bytes] | None = None
    sidecar: subprocess.Popen[bytes] | None = None

    @property
    def groups(self) -> list[int]:
        """Process groups of the engine and, after it, of the sidecar."""
        return [each.pid for each in (self.engine, self.sidecar) if each]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start_engine(self, tiers: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Our engine, which asks for `key`; its one client belongs to the first of the `tiers`, if there are any."""
        keys = self.write_keys(tiers)
        self.start(python("serving", "engine", *self._shared(), "--port", str(self.port), "--api-keys", keys))

    def start_engine_with_way_around(self) -> None:
        """Our engine likewise, for those who ask for it without the request layer (benches/around.py)."""
        prepare(self.folder / "state")
        command = vllm_command(self.spec, host="127.0.0.1", port=self.port)
        environment = vllm_environment(self.spec, state=self.folder / "state", api_keys=self.write_keys())
        self.start([*command, "--middleware", MIDDLEWARE], environment)

    def write_keys(self, tiers: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """The file of API keys and tiers."""
        client = {"sha256": hashlib.sha256(self.key.encode()).hexdigest()}
        if tiers:
            client["tier"] = next(iter(tiers))
        write_json(self.folder / "keys.json", {"tiers": dict(tiers or {}), "clients": {"bench": client}})
        return self.folder / "keys.json"

    def start_sidecar(self) -> None:
        """The sidecar beside our engine."""
        command = python("serving", "sidecar", *self._shared(), "--engine", self.url, "--metrics-address", "off")
        self.sidecar = self.processes.start(command, log=self.folder / "sidecar.log")

    def start_bare(self, adapters: Mapping[str, Path]) -> None:
        """vLLM without our layer; `adapters` (name to PEFT folder) are loaded at start."""
        command = vllm_command(self.spec, host="127.0.0.1", port=self.port, adapters=adapters, middleware=False)
        self.start(command, vllm_environment(self.spec))

    def wait(self, path: str) -> float:
        """Seconds until GET `path` is answered with 200. Raises RuntimeError with the log's end if it never is."""
        return wait_for(lambda: is_ok(self.url + path), START_SECONDS, f"{self.url}{path}", self.check)

    def stop(self) -> None:
        """End the engine; the sidecar stays."""
        assert self.engine
        self.engine.terminate()
        try:
            self.engine.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:  # it hangs: its engine processes must not outlive it
            os.killpg(self.engine.pid, signal.SIGKILL)
            self.engine.wait()

    def _shared(self) -> list[str]:
        spec = self.folder / "serving.json"
        write_json(spec, self.spec.model_dump(mode="json"))
        return ["--spec", str(spec), "--state", str(self.folder / "state")]

    def start(self, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        """Start `command` as this server's engine."""
        self.engine = self.processes.start(command, log=self.folder / "engine.log", environment=environment)

    def check(self) -> None:
        """Raise RuntimeError with the end of its log if the server is gone."""
        assert self.engine
        if (code := self.engine.poll()) is not None:
            log = self.folder / "engine.log"
            tail = log.read_text(errors="replace").splitlines()[-12:]
            raise RuntimeError("\n".join([f"the server ended with {code}; the end of {log}:", *tail]))


def cpu_seconds(pid: int) -> float:
    """CPU time that a server and its processes have taken, those that still run."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def spec_of(store: Path, adapters: tuple[str, ...] = (ADAPTER,), **more: Any) -> ServingSpec:
    """The rehearsal's base and `adapters` from the folder `store`, on the CPU."""
    settings = {
        "base_model": str(BASE), "store": str(store), "adapters": adapters, "device": "cpu", "dtype": "float32",
        "max_model_len": 2048, "max_num_seqs": 32, "poll_seconds": 0.3, "old_version_seconds": 1,
        "shutdown_timeout_seconds": 5,
    }  # fmt: skip
    return ServingSpec.model_validate(settings | more)


def tune(processes: Processes, folder: Path) -> Path:
    """A run of the rehearsal's first rows, short, but better than the base; the folder of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = DATASET.read_text(encoding="utf-8").splitlines(keepends=True)[:TUNED_ROWS]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    settings = {
        "adapter": ADAPTER, "base_model": str(BASE), "dataset": str(folder / "rows.jsonl"), "learning_rate": 2e-3,
        "num_train_epochs": 2, "max_seq_length": 256, "held_out_fraction": 0.2,
    }  # fmt: skip
    write_json(folder / "tuning.json", settings)
    run = folder / "runs" / ADAPTER
    command = python("training", "tune", "--spec", folder / "tuning.json", "--out", run, "--metrics-address", "off")
    if code := processes.run(command):
        raise RuntimeError(f"the tuning ended with exit code {code}")
    return run


def prove(server: Server, run: Path) -> None:
    """Evaluate `run` on our engine through the sidecar's door. Raises RuntimeError unless it passes its gate."""
    opened = open_run(run)
    with Engine(server.url, read_token(server.folder / "state")) as engine:
        engine.load(opened.name, run / "adapter")
        result = evaluate(opened, engine, server.spec.base_name, context=server.spec.max_model_len)
        engine.unload(opened.name)
    if not result["passed"]:
        raise RuntimeError(f"the adapter of this measurement is no better than its base: {result['verdict']}")


def promote(run: Path, store: Path, note: int = 0) -> tuple[str, float]:
    """Publish the proven `run`: its version, and the unix time at which the tag moved. Each `note` is a new version.

    All have the same weights: what is timed is the road to traffic, not the tuning.
    """
    copy = run.parent / f"{run.name}-{note}"
    shutil.copytree(run, copy)
    write_json(copy / "evaluation.json", read_json(copy / "evaluation.json") | {"note": note})
    published = publish(copy, str(store))
    return published.version, (store / repository(ADAPTER) / "index.json").stat().st_mtime


def wait_traffic(server: Server, version: str) -> None:
    """Wait until a client's request to the alias is answered by `version`."""
    body = {"model": ADAPTER, "prompt": "a", "max_tokens": 1}
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}, timeout=60) as client:

        def look() -> bool:
            answer = client.post("/v1/completions", json=body)
            return answer.status_code == 200 and answer.json()["model"] == loaded_name(ADAPTER, version)

        wait_for(look, SWITCH_SECONDS, f"{ADAPTER} {version} in traffic", server.check)
