"""`make local` from the first process to the report, step by step; what each measured is in `local.json` at once."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml

from artifacts.adapter import promoted_digest, read_card
from artifacts.store import open_store
from common.chat import answer, prompt_messages
from common.files import read_json, read_jsonl, write_json
from common.memory import MemoryWatch
from common.processes import python
from localcloud.live import attach, drills, machine, report
from localcloud.live.drills import DrillFailed, Ground
from localcloud.live.sight import SERVING, TUNING, Job, Sight
from localcloud.tools import ROOT
from stress.spec import LoadSpec

STACK = "local"
# A load that two cores carry beside what else happens on them.
LOAD = {
    "users": 3,
    "think_seconds": 1.5,
    "ramp_seconds": 1,
    "duration_seconds": 7200,
    "prompt_tokens": 120,
    "max_tokens": 24,
    "request_timeout_seconds": 120,
}
DRILLS = ("build", "job", "retune", "rollout", "replica_kill", "node_loss", "outage")
# Learns nothing: its steps are too small to change an answer.
USELESS = {"learning_rate": 1e-9, "num_train_epochs": 1}


@dataclass
class Chain:
    """One run: where its cloud and its images are, and what has been found so far."""

    folder: Path
    images: Path
    out: Path
    record: dict[str, Any] = field(default_factory=dict)
    ground: Ground | None = None
    _opened: ExitStack = field(default_factory=ExitStack)
    _memory: MemoryWatch = field(default_factory=lambda: MemoryWatch(10))
    _started: float = field(default_factory=time.monotonic)

    def run(self, wanted: Collection[str] = DRILLS) -> bool:
        """All steps, and the drills that are `wanted`: whether all that was tried held.

        Raises what they raise; `local.json` says how far it came.
        """
        up_seconds = 40 if machine.are_built(self.images) else 700
        # Name, what it does, the step, and the seconds that it took on two cores: the ETA that is shown.
        steps: list[tuple[str, str, Callable[[], dict[str, Any]], float]] = [
            ("start", "control plane, pods' network, stand-ins for Azure", self.start, 7),
            ("up", "pulumi up: build the images, declare everything", self.up, up_seconds),
            ("tuning", "two adapters, tuned and held against the base", self.tuning, 300),
            ("serving", "two replicas with the promoted adapters", self.serving, 10),
            ("stress", "the stack's own stress test, which waited for them", self.stress, 45),
        ]
        choice: list[tuple[str, str, Callable[[], dict[str, Any]], float]] = [
            ("build", "an image that does not build", self.drill(drills.broken_build), 40),
            ("job", "the stack's own drills: their Job breaks what serves, and judges", self.job, 350),
            ("retune", "another learning rate, evicted in mid-run, promoted, rolled back", self.retune, 155),
            ("rollout", "new serving code under load, and an adapter that fails its gate", self.rollout, 310),
            ("replica_kill", "SIGKILL of a replica, no registry in reach", self.drill(drills.replica_kill), 70),
            ("node_loss", "a node deleted under load", self.drill(drills.node_loss), 170),
            ("outage", "SIGKILL of all engines", self.drill(drills.outage), 45),
        ]
        steps += [step for step in choice if step[0] in wanted]
        self.record = {
            "status": "interrupted",
            "started_at": time.time(),
            "machine": {
                "cpu_count": psutil.cpu_count(),
                "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
                "platform": platform.platform(),
            },
            "steps": [],
        }
        self._memory.start()
        with self._opened:
            for number, (name, text, step, _) in enumerate(steps, 1):
                left = sum(seconds for *_, seconds in steps[number - 1 :])
                self.say(f"[{number}/{len(steps)}] {name}: {text}  (to the end about {left / 60:.0f} min)")
                self._step(name, step)
        self.record["status"] = "finished"
        self.save()
        promises = [promise for promise in report.promises(self.record) if promise.held is not None]
        for promise in promises:
            self.say(f"{'held' if promise.held else 'BROKEN'}: {promise.text}")
        self.say(f"report: {self.out.with_suffix('.html')}  figures: {self.out}")
        self.say(f"it stays up (make local-down ends it); its API, key in {self.folder / f'{STACK}.key'}:")
        self.say(f'  curl -H "Authorization: Bearer $KEY" {self._cloud.router}/v1/models')
        return all(promise.held for promise in promises)

    def _step(self, name: str, step: Callable[[], dict[str, Any]]) -> None:
        began = time.monotonic()
        entry: dict[str, Any] = {"name": name, "status": "interrupted"}
        self.record["steps"].append(entry)
        try:
            self.record[name] = step()
            entry["status"] = "ok"
        except Exception as error:
            entry |= {"status": "failed", "error": str(error)}
            self.record["status"] = "failed"
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - began, 1)
            self.record["peak_memory_gib"] = round(self._memory.peak_bytes / 2**30, 2)
            self.record["seconds"] = round(time.monotonic() - self._started, 1)
            self.save()
            self._clear()

    def save(self) -> None:
        write_json(self.out, self.record)
        report.write(self.record, self.out.with_suffix(".html"))

    # The steps.

    def start(self) -> dict[str, Any]:
        began = time.monotonic()
        cloud = attach.start(self.folder, self.images)
        self._memory.others.append(cloud.pid)
        sudo = "sudo " * ("SUDO_UID" in os.environ)  # who reads this is root for the time of this command alone
        self.say(f"{sudo}kubectl --kubeconfig {self.folder / 'kubeconfig'} get pods -A")
        os.environ["DRYDOCK_REGISTRY_ENDPOINT"] = cloud.registry
        stack = cloud.stack(STACK)
        stack.unlock()
        os.environ["DRYDOCK_API_KEY"] = (self.folder / f"{STACK}.key").read_text()
        api = self._opened.enter_context(cloud.api())
        # What a drill that was killed outright has left.
        cloud.reach_registry(True)
        for node in api.list("/api/v1/nodes"):
            if node["spec"].get("unschedulable"):
                api.patch(f"/api/v1/nodes/{node['metadata']['name']}", {"spec": {"unschedulable": None}})
        self._cloud, self._stack, self._sight = cloud, stack, Sight(api, self.folder)
        return {"seconds": round(time.monotonic() - began, 1)}

    def up(self) -> dict[str, Any]:
        began = time.monotonic()
        if code := self._stack.show("up", "--yes", "--skip-preview", "--policy-pack", "policy"):
            raise DrillFailed(f"pulumi up: exit code {code}; the end is above")
        seconds = time.monotonic() - began
        shutil.rmtree(self.folder / "drills", ignore_errors=True)  # the loads of a run before
        (self.folder / "drills").mkdir()
        outputs = self._stack.outputs()
        self._jobs: dict[str, str] = dict(outputs["tuning_jobs"])
        running = [name for name in self._jobs.values() if (job := self._sight.job(TUNING, name)) and not job.over]
        self.ground = Ground(
            stack=self._stack, sight=self._sight, store=open_store(outputs["adapter_store"]),
            router=self._cloud.router, dataset=ROOT / "rehearsal" / "data" / "kubectl.jsonl",
            adapters=list(self._jobs), load=LoadSpec(**LOAD, models=list(self._jobs)),
            say=self.say, doing=self.doing, scratch=self.folder / "drills", reach_registry=self._cloud.reach_registry,
        )  # fmt: skip
        self.record["up_seconds"] = round(seconds, 1)
        return {"seconds": round(seconds, 1), "tuning_when_it_returned": running}

    def tuning(self) -> dict[str, Any]:
        assert self.ground
        found, failed = [], []
        ended = drills.follow(self.ground, *self._jobs.values())
        for adapter, job in zip(self._jobs, ended, strict=True):
            name = job.name
            digest = promoted_digest(self.ground.store, adapter)
            entry: dict[str, Any] = {"adapter": adapter, "job": name, "state": job.state, "seconds": job.seconds}
            entry["promoted_digest"] = digest
            if digest is None:
                failed.append(f"{name}: {job.state}: {job.reason}: {job.doing}")
            else:
                _, card = read_card(self.ground.store, adapter, digest)
                evaluation = card.evaluation
                entry |= {key: evaluation[key] for key in ("base", "gain", "gain_ci95") if key in evaluation}
                entry["score"] = evaluation.get("adapter")
            found.append(entry)
        self.record["adapters"] = found
        if failed:
            raise DrillFailed("; ".join(failed))
        return {"adapters": len(found)}

    def serving(self) -> dict[str, Any]:
        assert self.ground
        ground, began = self.ground, time.monotonic()
        drills.wait(ground, "all replicas with the promoted adapters", lambda: drills.ready(ground, 2), 600)
        seconds = time.monotonic() - began
        questions = {adapter: self._ask(adapter) for adapter in ground.adapters}
        return {
            "seconds": round(seconds, 1),
            "replicas": {item.name: item.adapters for item in self._sight.replicas()},
            "asked": questions,
        }

    def stress(self) -> dict[str, Any]:
        assert self.ground
        (job,) = self._sight.api.list(f"/apis/batch/v1/namespaces/{SERVING}/jobs", labelSelector="app=stress")
        (seen,) = drills.follow(self.ground, job["metadata"]["name"], namespace=SERVING)
        folder = self._fetched(self._stack.outputs()["stress_report"], "local-stress", seen)
        if seen.state != "complete":
            raise DrillFailed(f"{seen.name}: {seen.state}: {seen.reason}: {seen.doing}")
        (summary,) = (read_json(path) for path in folder.glob("**/summary.json"))
        self.record |= {"requests": summary["requests"], "failed": summary["failed"]}
        self.say(f"{summary['requests']} requests, {summary['failed']} failed; {folder / 'report.html'}")
        return {name: summary[name] for name in ("requests", "failed", "rps", "ttft_ms", "itl_ms") if name in summary}

    def job(self) -> dict[str, Any]:
        """Also where a bound was not kept, which ends the Job as failed: the report's verdicts are what counts."""
        assert self.ground
        ended = drills.stack_job(self.ground)
        folder = self._fetched(self._stack.outputs()["drills_report"], "local-drills", ended)
        found = read_json(folder / "report.json")["drills"]
        kept = (
            *("requests", "failed", "failed_streams", "recovery_seconds", "short_p95_ratio", "lost_steps", "phases"),
            *("noticed_seconds", "unready", "failure", "bounds"),
        )
        drilled = {}
        for name in (scenario.replace("-", "_") for scenario in drills.JOB["scenarios"]):
            drilled[name] = {key: value for key, value in found.get(name, {}).items() if key in kept}
        self.say(f"{ended.name}: {folder / 'report.html'}")
        return {"job": ended.name, "state": ended.state, "seconds": ended.seconds, "drills": drilled}

    def retune(self) -> dict[str, Any]:
        assert self.ground
        found = drills.retune(self.ground, "kubectl", 0.002)
        self.record |= {name: found[name] for name in ("switch_seconds", "eviction")}
        return found

    def rollout(self) -> dict[str, Any]:
        assert self.ground
        settings = self._settings()["drydock:adapters"]["triage"] | USELESS
        return drills.failed_gate_and_rollout(self.ground, "useless", settings)

    def drill(self, drill: Callable[[Ground], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            assert self.ground
            return drill(self.ground)

        return run

    # What they share.

    def _fetched(self, address: str, name: str, job: Job) -> Path:
        """The report that `job` has left in Blob Storage, as folder `name` beside our own."""
        folder = self.out.parent / name
        shutil.rmtree(folder, ignore_errors=True)
        fetch = python("blobs", "fetch", address, folder)
        done = subprocess.run(fetch, env=os.environ | self._cloud.environment, capture_output=True, text=True)
        if done.returncode:
            raise DrillFailed(f"{job.name}: {job.state}: {job.reason}: {job.doing}\n{done.stderr}")
        return folder

    def _ask(self, adapter: str) -> dict[str, Any]:
        """One question through the router, as a client: the thing that all this is for."""
        row = next(read_jsonl(ROOT / self._settings()["drydock:adapters"][adapter]["dataset"]))
        body = {"model": adapter, "messages": prompt_messages(row), "temperature": 0, "max_tokens": 128}
        assert self.ground
        with requests.Session() as session:
            session.trust_env = False
            reply = session.post(
                f"{self.ground.router}/v1/chat/completions", json=body, timeout=60,
                headers={"Authorization": f"Bearer {os.environ['DRYDOCK_API_KEY']}"},
            )  # fmt: skip
        if reply.status_code != 200:
            raise DrillFailed(f"the router answered {reply.status_code}: {reply.text[:300]}")
        text = reply.json()["choices"][0]["message"]["content"]
        question = prompt_messages(row)[-1]["content"]
        self.say(f"{adapter}: {question!r} -> {text!r}")
        return {"question": question, "answer": text, "expected": answer(row)}

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load((ROOT / f"Pulumi.{STACK}.yaml").read_text())["config"]
        return settings

    def say(self, text: str) -> None:
        self._clear()
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        print(f"{minutes:3d}:{seconds:02d} {text}", flush=True)

    def doing(self, text: str) -> None:
        if sys.stdout.isatty():
            print(f"\r\033[K       {text}", end="", flush=True)
        elif time.monotonic() - self._told > 20:
            self._told = time.monotonic()
            self.say(f"  {text}")

    _told: float = 0.0

    def _clear(self) -> None:
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)
