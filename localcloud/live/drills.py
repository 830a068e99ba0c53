"""What is done to a running stack under load, and what came of it: each drill changes one thing and measures.

The load is `python -m stress run` against the router's Service, as any client would send it. A drill returns figures
and raises `DrillFailed` where what must hold does not.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from artifacts.adapter import promote, promoted_digest
from artifacts.adapter import version as version_of
from artifacts.store import Store
from localcloud.cloud import Stack
from localcloud.live.sight import SERVING, TUNING, Job, Replica, Sight, engine_processes, sidecar_processes
from localcloud.pods import evict
from stress import drills as load_drills
from stress import figures
from stress.drills import LoadProcess
from stress.prompts import read_rows
from stress.spec import LoadSpec

POLL_SECONDS = 0.5
READY_SECONDS = 600.0  # for a replica to be back: one that starts beside a load on two cores needs three minutes
TUNED_SECONDS = 1200.0
SWITCH_SECONDS = 120.0
SETTLE_SECONDS = 5.0  # of load after what was waited for
NOTICED_SECONDS = 60.0  # for the sidecars to see that the registry is away, or back: some six
JOB_SECONDS = 1800.0
# The stack's own drills (`drydock:drills`), for two cores that carry replicas, cluster and load: what starts anew takes
# a minute there, and some thirty requests give a p95 that swings.
JOB: dict[str, Any] = {
    "scenarios": ["long-prompts", "replica-loss", "node-drain", "registry-unreachable"],
    "allow_outage": True,
    "users": 3,
    "think_seconds": 0.5,
    "ramp_seconds": 1,
    "duration_seconds": 15,
    "prompt_tokens": 120,
    "max_tokens": 24,
    "request_timeout_seconds": 60,
    "before_seconds": 6,
    "after_seconds": 2,
    "wait_seconds": 300,
    "bounds": {"short_p95_ratio": 6, "recovery_seconds": 300, "moved_seconds": 300},
}


class DrillFailed(Exception):
    """What must hold does not; the text says what was seen instead."""


@dataclass
class Ground:
    """What every drill works on. `say` shows a line, `doing` one that the next replaces; `reach_registry` opens the way
    from pods to the registry, or shuts it."""

    stack: Stack
    sight: Sight
    store: Store
    router: str
    dataset: Path
    adapters: Sequence[str]
    load: LoadSpec
    say: Callable[[str], None]
    doing: Callable[[str], None]
    scratch: Path
    reach_registry: Callable[[bool], None]

    @property
    def settings(self) -> Path:
        """Of the stack's copy: they may be edited."""
        return self.stack.folder / f"Pulumi.{self.stack.name}.yaml"


def wait(
    ground: Ground, what: str, condition: Callable[[], bool], seconds: float, check: Callable[[], None] = lambda: None
) -> float:
    """Seconds until `condition` holds. Raises `DrillFailed` after `seconds`."""
    started = time.monotonic()
    while not condition():
        check()
        if time.monotonic() - started > seconds:
            raise DrillFailed(f"{what}: not within {seconds:.0f} s")
        ground.doing(f"{what}: {time.monotonic() - started:.0f} s")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - started


@contextlib.contextmanager
def loaded(ground: Ground, name: str) -> Iterator[Load]:
    """Load for as long as the block lasts; its figures are in the yielded object afterwards."""
    folder = ground.scratch / name
    plan = load_drills.Plan(out=ground.scratch, dataset=ground.dataset, fleet=Path(), spec=ground.load)
    log = ground.scratch / f"{name}.log"
    with load_drills.load(plan, ground.load, ground.router, folder, open_ended=True, log=log) as process:
        process.wait_started(60)
        found = Load(process)
        yield found
        found.rows = process.finish(now=True)


@dataclass
class Load:
    """A load that runs; `rows` are the records of its requests once it has ended."""

    process: LoadProcess
    rows: list[dict[str, Any]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        summary = figures.summary(self.rows)
        kept = ("requests", "failed", "shed", "failures_by_reason", "ttft_ms")
        return {name: summary[name] for name in kept if name in summary}


def ready(ground: Ground, count: int | None = None) -> bool:
    """Whether all replicas are ready, none is leaving, and each answers with the promoted versions."""
    wanted = {name: version_of(digest) for name in ground.adapters if (digest := promoted_digest(ground.store, name))}
    found = ground.sight.replicas()
    enough = len(found) == count if count else bool(found)
    return enough and all(item.ready and not item.leaving and item.adapters == wanted for item in found)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a stack's settings; comments are lost, in a copy that nobody reads."""
    settings = yaml.safe_load(path.read_text())
    change(settings["config"])
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def up(ground: Ground) -> str:
    """`pulumi up`; what it said. Raises `DrillFailed` with that where it fails."""
    done = ground.stack.pulumi("up", "--yes", "--skip-preview", check=False)
    said = f"{done.stdout}\n{done.stderr}"
    if done.returncode:
        raise DrillFailed(f"pulumi up: exit code {done.returncode}\n{said[-3000:]}")
    return said


def jobs(ground: Ground) -> dict[str, str]:
    return dict(ground.stack.outputs()["tuning_jobs"])


def follow(
    ground: Ground,
    *names: str,
    each: Callable[[Job], None] = lambda job: None,
    namespace: str = TUNING,
    limit_seconds: float = TUNED_SECONDS,
) -> list[Job]:
    """The Jobs once all are over, in the order of `names`; `each` hears of every look at one."""
    seen: dict[str, Job] = {}
    started = time.monotonic()
    while len(seen) < len(names) or not all(job.over for job in seen.values()):
        for name in names:
            if name in seen and seen[name].over:
                continue
            job = ground.sight.job(namespace, name)
            if job is None:
                continue
            seen[name] = job
            each(job)
            if job.over:
                ground.say(f"{name}: {job.state}: {job.doing}")
        going = [job for job in seen.values() if not job.over]
        ground.doing("; ".join(f"{job.name}: {job.doing or job.state}" for job in going)[:150])
        if time.monotonic() - started > limit_seconds:
            told = "; ".join(f"{job.name}: {job.doing}" for job in going)
            raise DrillFailed(f"{', '.join(names)}: not over within {limit_seconds:.0f} s: {told or 'no such Job'}")
        time.sleep(POLL_SECONDS)
    return [seen[name] for name in names]


def switched(ground: Ground, adapter: str, version: str, replicas: Sequence[Replica]) -> float:
    """Seconds until all replicas answer for `adapter` with `version`; none may have been started again meanwhile."""

    def all_switched() -> bool:
        found = {item.name: item for item in ground.sight.replicas() if not item.leaving}
        for before in replicas:
            now = found.get(before.name)
            if now is None or now.restarts != before.restarts:
                raise DrillFailed(
                    f"{adapter} {version}: {before.name} was started again; the switch must not need that"
                )
            if reason := now.refused.get(adapter):
                raise DrillFailed(f"{adapter} {version}: {before.name} refuses it: {reason}")
        return all(item.adapters.get(adapter) == version for item in found.values())

    return wait(ground, f"{adapter} {version} on every replica", all_switched, SWITCH_SECONDS)


def retune(ground: Ground, adapter: str, learning_rate: float) -> dict[str, Any]:
    """Another learning rate, its pod evicted in mid-run, promotion and roll-back, all under load."""
    before, replicas = promoted_digest(ground.store, adapter), ground.sight.replicas()
    others = {name: job for name, job in jobs(ground).items() if name != adapter}
    edit(ground.settings, lambda config: config["drydock:adapters"][adapter].update(learning_rate=learning_rate))
    evicted: dict[str, Any] = {}
    with contextlib.ExitStack() as opened:
        loads: list[Load] = []

        def look(job: Job) -> None:
            _evict(ground, job, evicted)
            # From shortly before its end on: what is to be seen is the switch, and a load would double the wait for it.
            if re.search("adapter: .* answers in", job.doing) and not loads:
                loads.append(opened.enter_context(loaded(ground, f"retune-{adapter}")))

        up(ground)
        now = jobs(ground)
        if before is None or {name: now[name] for name in others} != others:
            raise DrillFailed(f"another learning_rate of {adapter} must start its Job alone, found {now}")
        (job,) = follow(ground, now[adapter], each=look)
        after = promoted_digest(ground.store, adapter)
        if job.state != "complete" or after == before or after is None:
            raise DrillFailed(f"{job.name}: {job.state}, {adapter} is {after}: {job.reason} {job.doing}")
        if not loads:
            raise DrillFailed(f"{job.name}: it ended before the load began")
        seconds = switched(ground, adapter, version_of(after), replicas)
        promote(ground.store, adapter, before)
        back = switched(ground, adapter, version_of(before), replicas)
        time.sleep(SETTLE_SECONDS)
    (load,) = loads
    if "resumed_at_step" not in evicted:
        raise DrillFailed(f"{job.name}: {evicted or 'was not evicted in mid-run'}: no sign of a resumed run in its log")
    return {
        "switch_seconds": round(seconds, 1),
        "rollback_seconds": round(back, 1),
        "eviction": evicted,
        **load.figures(),
    }


def _evict(ground: Ground, job: Job, evicted: dict[str, Any]) -> None:
    """Evict the pod of `job` once it has written a checkpoint, and note at which step the next one goes on."""
    pods = ground.sight.pods(TUNING, f"batch.kubernetes.io/job-name={job.name}")
    if "pod" not in evicted:
        for pod in pods:
            steps = re.findall(r"step (\d+)/(\d+)", ground.sight.log(TUNING, pod["metadata"]["name"], "tune"))
            if steps and int(steps[-1][0]) >= int(steps[-1][1]) // 3:
                evict(ground.sight.api, TUNING, pod["metadata"]["name"])
                evicted |= {"pod": pod["metadata"]["name"], "evicted_at_step": int(steps[-1][0])}
                ground.say(f"evicted {evicted['pod']} at step {steps[-1][0]} of {steps[-1][1]}")
        return
    for pod in pods:
        name = pod["metadata"]["name"]
        if name != evicted["pod"] and "resumed_at_step" not in evicted:
            found = re.search(r"resum\w* .*?step (\d+)", ground.sight.log(TUNING, name, "tune"))
            if found:
                evicted["resumed_at_step"] = int(found[1])
                ground.say(f"{name} goes on from step {found[1]}")


def failed_gate_and_rollout(ground: Ground, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """New serving code and an adapter that learns nothing: a rolling update under load, and a gate that closes."""
    replicas = ground.sight.replicas()
    code = ground.stack.folder / "serving" / "__init__.py"
    edit(ground.settings, lambda config: config["drydock:adapters"].update({name: settings}))
    code.write_text(code.read_text() + "\n# Another image.\n")
    with loaded(ground, "rollout") as load:
        up(ground)
        old = {item.name for item in replicas}
        started = time.monotonic()

        def replaced() -> bool:
            return not old & {item.name for item in ground.sight.replicas()} and ready(ground, len(replicas))

        wait(ground, "all replicas replaced", replaced, 2 * READY_SECONDS, load.process.check)
        seconds = time.monotonic() - started
        time.sleep(SETTLE_SECONDS)
    (job,) = follow(ground, jobs(ground)[name])
    verdict = ground.sight.found(TUNING, job.name, rf"{name}: FAILED: .*")
    if job.state != "failed" or verdict is None or promoted_digest(ground.store, name) is not None:
        raise DrillFailed(f"{job.name}: {job.state}; an adapter that learned nothing must not be promoted: {job.doing}")
    if not ready(ground, len(replicas)):
        raise DrillFailed(f"after {job.name} failed, the others do not answer as before: {ground.sight.replicas()}")
    return {
        "gate": {"adapter": name, "job": job.name, "reason": job.reason, "verdict": verdict},
        "seconds": round(seconds, 1),
        **load.figures(),
    }


def stack_job(ground: Ground) -> Job:
    """The stack's own drills Job once it is over, asked for as anybody would: by the settings and `pulumi up`.

    The run is out of the settings then; the next `pulumi up` takes the Job, its account and its rights away.
    """
    # Another name, another Job: that of an earlier `make local` is over. Adapters that are not promoted answer nobody.
    run = {"run": time.strftime("%Y%m%d-%H%M%S", time.gmtime()), "models": list(ground.adapters)}
    before = ground.settings.read_text()
    edit(ground.settings, lambda config: config.update({"drydock:drills": run | JOB}))
    try:
        up(ground)
    finally:
        ground.settings.write_text(before)
    (found,) = ground.sight.api.list(f"/apis/batch/v1/namespaces/{SERVING}/jobs", labelSelector="app=drills")
    (ended,) = follow(ground, found["metadata"]["name"], namespace=SERVING, limit_seconds=JOB_SECONDS)
    return ended


def replica_kill(ground: Ground) -> dict[str, Any]:
    """SIGKILL of one replica's engine and sidecar under load while no registry can be reached.

    What they serve again is from the replica's own disk; the others go on serving, and tell for how long they have not
    seen the registry.
    """
    replicas = ground.sight.replicas()
    victim, *others = replicas
    with loaded(ground, "replica-kill") as load:
        time.sleep(SETTLE_SECONDS)
        ground.reach_registry(False)
        try:
            began = time.monotonic()
            _registry(ground, others, "away", lambda unseen: unseen > 0)
            _kill(victim, sidecar=True)
            ground.say(f"killed the engine and the sidecar of {victim.name}, the registry out of reach")

            def back() -> bool:
                again = [item for item in ground.sight.replicas() if item.name == victim.name]
                return bool(again) and again[0].restarts > victim.restarts and ready(ground, len(replicas))

            seconds = wait(ground, f"{victim.name} ready again", back, READY_SECONDS, load.process.check)
            told = [ground.sight.registry_unseen(item.name) or 0.0 for item in others]
            away = time.monotonic() - began
        finally:
            ground.reach_registry(True)
        _registry(ground, replicas, "back", lambda unseen: unseen == 0)
        time.sleep(SETTLE_SECONDS)
    return {
        "recovery_seconds": round(seconds, 1),
        "failed_streams": _begun(load),
        "registry": {"away_seconds": round(away, 1), "told_seconds": round(min(told), 1)},
        **load.figures(),
    }


def _registry(ground: Ground, replicas: Sequence[Replica], how: str, holds: Callable[[float], bool]) -> None:
    """Wait until `holds` is true of the seconds for which each replica has not seen the registry."""

    def all_tell() -> bool:
        told = [ground.sight.registry_unseen(item.name) for item in replicas]
        return all(seconds is not None and holds(seconds) for seconds in told)

    wait(ground, f"replicas that see the registry {how}", all_tell, NOTICED_SECONDS)


def node_loss(ground: Ground) -> dict[str, Any]:
    """The node of one replica is switched off and deleted under load: its pod comes back on another."""
    replicas = ground.sight.replicas()
    victim = replicas[0]
    with loaded(ground, "node-loss") as load:
        time.sleep(SETTLE_SECONDS)
        ground.sight.api.delete(f"/api/v1/nodes/{victim.node}")
        ground.say(f"deleted {victim.node}, with {victim.name}")

        def elsewhere() -> bool:
            names = {item.name for item in ground.sight.replicas()}
            return victim.name not in names and ready(ground, len(replicas))

        seconds = wait(ground, "its successor ready on another node", elsewhere, READY_SECONDS, load.process.check)
        time.sleep(SETTLE_SECONDS)
    return {"recovery_seconds": round(seconds, 1), "failed_streams": _begun(load), **load.figures()}


def outage(ground: Ground) -> dict[str, Any]:
    """All engines killed at once: seconds of each phase until the first token, and until all adapters are back."""
    replicas = ground.sight.replicas()
    prober = load_drills.Prober(ground.router, ground.load, read_rows(ground.dataset))
    prober.ticker.start()
    try:
        wait(ground, "a token before the outage", lambda: prober.first_token(0) is not None, 60)
        killed_at = time.time()
        for replica in replicas:
            _kill(replica)
        dead_at = time.time()
        ground.say(f"killed the engines of {', '.join(item.name for item in replicas)}")
        before = {item.name: item.restarts for item in replicas}
        milestones: dict[str, list[float | None]] = {"restart": [None], "adapters": [None]}

        def token() -> bool:
            found = [item for item in ground.sight.replicas() if item.restarts > before.get(item.name, -1)]
            if found and milestones["restart"] == [None]:
                milestones["restart"] = [time.time()]
            if any(item.ready for item in found) and milestones["adapters"] == [None]:
                milestones["adapters"] = [time.time()]
            return prober.first_token(dead_at) is not None

        wait(ground, "the first token after the outage", token, READY_SECONDS)
        token_at = prober.first_token(dead_at)
        assert token_at is not None
        wait(ground, "all replicas with all adapters", lambda: ready(ground, len(replicas)), READY_SECONDS)
        whole = time.time() - killed_at
    finally:
        prober.stopped.set()
    return {
        "recovery_seconds": round(token_at - killed_at, 1),
        "all_replicas_seconds": round(whole, 1),
        "phases": load_drills.phases(killed_at, token_at, milestones),
    }


def broken_build(ground: Ground) -> dict[str, Any]:
    """An image that does not build fails `pulumi up` with the last lines of the build."""
    file = ground.stack.folder / "stress" / "Dockerfile"
    before, line = file.read_text(), "the-drill-of-a-broken-build"
    file.write_text(before.replace("USER 10001:10001", f"RUN echo {line} && false\nUSER 10001:10001"))
    try:
        done = ground.stack.pulumi("up", "--yes", "--skip-preview", check=False)
    finally:
        file.write_text(before)
    said = f"{done.stdout}\n{done.stderr}"
    if done.returncode == 0 or line not in said:
        raise DrillFailed(f"pulumi up ended with {done.returncode}, and does not show the build's end:\n{said[-2000:]}")
    up(ground)
    return {"exit_code": done.returncode, "shown": [text.strip() for text in said.splitlines() if line in text][-1]}


def _kill(replica: Replica, *, sidecar: bool = False) -> None:
    engine, beside = engine_processes(replica.name), sidecar_processes(replica.name) if sidecar else []
    if not engine or (sidecar and not beside):
        raise DrillFailed(f"{replica.name}: no process of its {'sidecar' if engine else 'engine'} was found")
    for pid in (*beside, *engine):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _begun(load: Load) -> int:
    """Streams that had begun when they were cut: a router can send nobody's second half from elsewhere."""
    return sum(row["error"] is not None and row["ttft_ms"] is not None for row in load.rows)
