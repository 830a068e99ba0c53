"""The drills: longer prompts, the loss of one replica under load, the loss of all; in a cluster also a node drained, a
tuning pod evicted, and the registry out of the sidecars' sight. Each breaks, measures, and writes
`OUT/drills/NAME.json` and `OUT/drills/NAME.requests.jsonl`.

The load is `python -m stress run` in a process of its own: the same code as any other run, and its timing is not
disturbed by the watching done here. Times in `events` and in the records are unix seconds of this machine.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from common import exits
from common.files import read_json, read_jsonl, write_json, write_jsonl
from stress import figures
from stress.client import SURE_TIMES, Record, ask, check_target
from stress.cluster import Cluster, ClusterError
from stress.fleet import FleetError
from stress.prompts import PromptSource, Turns, read_rows
from stress.scenarios import NOTICED_SECONDS, Bounds, DrillSpec, Scenario, judged
from stress.sites import Processes, Site
from stress.spec import LoadSpec

POLL_SECONDS = 0.1  # resolution of every milestone below
PROBE_SECONDS = 0.25  # a probe starts this often, answered or not: resolution of the time to the first token
PROBE_TIMEOUT_SECONDS = 10.0
PROBES_UNDER_WAY = 8  # a router that holds requests back must not collect hundreds of them
DEFAULT_LONG_SHARE = 0.25
WAIT_POLL_SECONDS = 2.0
SHORT_PROMPT_CHARACTERS = 256
LOSS_MARGIN_SECONDS = 60.0  # by which a loss outlives the drill that ends it, should that have been killed


class NotMeasuredError(Exception):
    """The drill cannot give its figures; the text is the reason."""


class Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass(frozen=True)
class Plan:
    """What a drill is to do, to the `cluster` or, without one, to the `fleet` of this machine.

    `target` None means their router. With `bounds` the drill is judged.
    """

    out: Path
    dataset: Path
    fleet: Path
    spec: LoadSpec
    allow_remote: bool = False
    target: str | None = None
    replica: str | None = None
    before_seconds: float = 10.0
    after_seconds: float = 5.0
    timeout_seconds: float = 600.0
    cluster: Cluster | None = None
    bounds: Bounds | None = None

    def site(self) -> Site:
        """What is to be broken. Raises `FleetError` or `SettingsError`."""
        return self.cluster or Processes(self.fleet, self.allow_remote)

    def in_cluster(self) -> Cluster:
        if self.cluster is None:
            raise NotMeasuredError("this drill needs a cluster: python -m stress drills, in a pod of it")
        return self.cluster


@dataclass
class Result:
    """What a drill has found so far: kept, and written, even if the drill cannot finish."""

    values: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def event(self, name: str, at: float | None = None) -> float:
        """Note and print an event; its unix time."""
        at = time.time() if at is None else at
        self.events.append({"at": round(at, 3), "name": name})
        print(f"drill: {name}", file=sys.stderr, flush=True)
        return at

    def put(self, name: str, value: float | None, reason: str) -> None:
        """A figure, or why there is none."""
        if value is None:
            self.absent[name] = reason
        else:
            self.values[name] = round(value, 3)


def main(name: Scenario, plan: Plan) -> int:
    """Run the drill `name`, write its files, return the exit code. Raises `SettingsError` for a refused target."""
    drills: dict[Scenario, Callable[[Plan, Result, Path], None]] = {
        "long-prompts": long_prompts,
        "replica-loss": replica_loss,
        "node-drain": node_drain,
        "outage": outage,
        "tuning-eviction": tuning_eviction,
        "registry-unreachable": registry_unreachable,
    }
    drill = drills[name]
    folder = plan.out / "drills"
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".requests.jsonl"):
        (folder / (name + suffix)).unlink(missing_ok=True)  # never an old result for a new drill
    result = Result()
    failure: str | None = None
    try:
        with terminable(), tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as scratch:
            drill(plan, result, Path(scratch))
    except (NotMeasuredError, FleetError) as error:
        failure = str(error)
        print(f"drill {name}: {failure}", file=sys.stderr)
    except Terminated:
        return exits.TERMINATED
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    value = {"drill": name, **result.values, "events": sorted(result.events, key=lambda event: event["at"])}
    if failure:
        value["failure"] = failure
    bounds = judged(name, value, result.absent, plan.bounds) if plan.bounds else []
    if bounds:
        value["bounds"] = bounds
    for bound in bounds:
        print(f"drill {name}: {figures.told(bound)}", file=sys.stderr, flush=True)
    write_jsonl(folder / f"{name}.requests.jsonl", result.requests)
    write_json(folder / f"{name}.json", value | {"absent": result.absent, "percentiles": figures.PERCENTILES})
    if failure:
        return exits.FAILED
    return exits.OK if all(bound["held"] for bound in bounds) else exits.GATE


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside."""

    def terminate(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not keep a node from being uncordoned
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """SIGTERM inside raises `Terminated` at the end: what is under way is whole."""
    came: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if came else previous)
        if came:
            raise Terminated


def in_turn(plan: Plan, wanted: DrillSpec, wait_seconds: float) -> int:
    """Run the drills of `wanted` one after the other once all models answer; the exit code of the worst.

    Raises `SettingsError` for a refused target.
    """
    codes = []
    try:
        with terminable():
            _wait_answers(plan, wait_seconds)
            for name in wanted.scenarios:
                print(f"drill {name}", file=sys.stderr, flush=True)
                codes.append(main(name, replace(plan, timeout_seconds=wanted.bounds.timeout_seconds(name))))
                if codes[-1] in (exits.INTERRUPTED, exits.TERMINATED):
                    break
    except NotMeasuredError as error:
        print(f"drills: nothing was broken: {error}", file=sys.stderr)
        return exits.FAILED
    except Terminated:
        return exits.TERMINATED
    return max(codes)


def _wait_answers(plan: Plan, seconds: float) -> None:
    """Until each model of the load answers through the router: some may be in tuning yet, or all asleep."""
    router, rows = plan.site().router, read_rows(plan.dataset)
    said: dict[str, str | None] = {}

    def answers(number: int, model: str) -> bool:
        messages = PromptSource(rows, plan.spec.seed, 1.0).messages(-1 - number, SHORT_PROMPT_CHARACTERS)
        timeout = plan.spec.request_timeout_seconds
        said[model] = ask(router, model, messages, stream=False, max_tokens=1, timeout_seconds=timeout).error
        return said[model] in (None, "empty answer")  # one token may well be the end of turn

    shown = ""

    def all_answer() -> bool:
        nonlocal shown
        done = all(answers(number, model) for _ in range(SURE_TIMES) for number, model in enumerate(plan.spec.models))
        if not done and shown != (shown := why()):
            print(f"drills: waiting up to {seconds:g} s: {shown}", file=sys.stderr, flush=True)
        return done

    def why() -> str:
        told = [f"{model}: {error}" for model, error in said.items() if error not in (None, "empty answer")]
        return f"not all models answered through {router} ({', '.join(told)})"

    wait_until(all_answer, seconds, why, poll_seconds=WAIT_POLL_SECONDS)


# --- the load beside a drill ------------------------------------------------------------------------------------


@dataclass
class LoadProcess:
    """A running `python -m stress run`."""

    process: subprocess.Popen[bytes]
    folder: Path
    spec: LoadSpec

    def check(self) -> None:
        """Raise `NotMeasuredError` if the load has ended by itself."""
        if self.process.poll() is not None:
            raise NotMeasuredError(
                f"the load ended too early with exit code {self.process.returncode}; its reason is above"
            )

    def wait_started(self, timeout_seconds: float) -> None:
        """Until the first request has been answered (or has failed)."""
        path = self.folder / "requests.jsonl"
        wait_until(
            lambda: path.exists() and path.stat().st_size > 0, timeout_seconds, "the load sent no request", self.check
        )

    def finish(self, *, now: bool) -> list[dict[str, Any]]:
        """Wait for the end (`now`: ask for it) and for the requests under way; all records."""
        if now:
            self.check()
            self.process.send_signal(signal.SIGUSR1)
        limit = 2 * self.spec.request_timeout_seconds + 30
        if not now:
            limit += self.spec.ramp_seconds + self.spec.duration_seconds
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise NotMeasuredError(f"the load did not end within {limit:.0f} s") from None
        if not (self.folder / "summary.json").exists():
            raise NotMeasuredError(f"the load ended with exit code {code} and no summary; its reason is above")
        return list(read_jsonl(self.folder / "requests.jsonl"))

    def window_start(self) -> float:
        """Unix time at which the ramp was over."""
        return float(read_json(self.folder / "summary.json")["window"]["started_at"])


@contextlib.contextmanager
def load(
    plan: Plan, spec: LoadSpec, target: str, folder: Path, *, open_ended: bool = False, log: Path | None = None
) -> Iterator[LoadProcess]:
    """Start the load (`open_ended`: this drill will end it); whatever happens, it is gone at the end.

    Its progress goes to `log`, or is shown.
    """
    folder.mkdir()
    write_json(folder / "spec.json", spec.model_dump())
    command = [sys.executable, "-m", "stress", "run", "--follow-parent", "--target", target]
    command += ["--settings", str(folder / "spec.json"), "--dataset", str(plan.dataset)]
    command += ["--out", str(folder), "--folder", str(folder)]
    command += ["--allow-remote"] * plan.allow_remote + ["--open-ended"] * open_ended
    with contextlib.ExitStack() as opened:
        said = opened.enter_context(log.open("wb")) if log else None
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
    try:
        yield LoadProcess(process, folder, spec)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


def wait_until(
    condition: Callable[[], bool],
    timeout_seconds: float,
    reason: str | Callable[[], str],
    check: Callable[[], None] = lambda: None,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Poll until `condition` holds; `NotMeasuredError` after the timeout; `check` may raise earlier."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        check()
        if time.monotonic() > deadline:
            told = reason if isinstance(reason, str) else reason()
            raise NotMeasuredError(f"{told} within {timeout_seconds:g} s")
        time.sleep(poll_seconds)


def sleep_checked(seconds: float, check: Callable[[], None]) -> None:
    """Sleep, but notice it when `check` raises."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        check()
        time.sleep(min(left, POLL_SECONDS))


# --- watching replicas ------------------------------------------------------------------------------------------


class Watcher(threading.Thread):
    """Follows what replaces one killed replica until it is ready, noting when each stage was first seen.

    `restarted_at`: there is another process (container) instead; `engine_at`: its /health is 200; `ready_at`: its
    /ready is 200.
    """

    def __init__(self, site: Site, killed: str, result: Result) -> None:
        super().__init__(daemon=True)
        self.site, self.killed, self.result = site, killed, result
        self.restarted_at: float | None = None
        self.engine_at: float | None = None
        self.ready_at: float | None = None
        self.given_up = threading.Event()

    def run(self) -> None:
        while self.ready_at is None and not self.given_up.wait(self.site.poll_seconds):
            try:
                stage, name = self.site.reached(self.killed)
            except FleetError:  # the supervisor may be writing the file, the API server may be away for a moment
                continue
            if stage >= 1 and self.restarted_at is None:
                self.restarted_at = self.result.event(f"{name} restarted")
            if stage >= 2 and self.engine_at is None:
                self.engine_at = self.result.event(f"{name} engine answers")
            if stage >= 3:
                self.ready_at = self.result.event(f"{name} ready")

    def missing(self) -> str | None:
        """What has not been seen yet, for a reason."""
        if self.ready_at is not None:
            return None
        stage = "was not restarted by its supervisor"
        if self.restarted_at is not None:
            stage = "restarted, but its engine (/health) did not answer"
        if self.engine_at is not None:
            stage = "has its engine up, but is not ready (/ready): are all promoted adapters loadable?"
        return f"{self.killed} {stage}"


def ready_site(plan: Plan) -> Site:
    """The site, once all its replicas are ready: a drill on a broken one would measure something else."""
    site, unready = plan.site(), list[str]()

    def all_ready() -> bool:
        try:
            unready[:] = site.unready()
        except ClusterError as error:
            if error.status:
                raise
            unready[:] = [str(error)]  # a network policy takes some seconds to reach a new pod
        return not unready

    wait_until(
        all_ready,
        plan.timeout_seconds,
        lambda: f"before the drill: not every replica was ready ({', '.join(unready)})",
        poll_seconds=site.poll_seconds,
    )
    return site


def spread(rows: Iterable[figures.Row]) -> dict[str, Any] | None:
    """TTFT percentiles and how many requests they stand on; None if there are none."""
    values = figures.ttft_values(rows)
    return {**figures.percentiles(values, 50, 95), "requests": len(values)} if values else None


def ratio(numerator: dict[str, Any] | None, denominator: dict[str, Any] | None) -> float | None:
    """p95 over p95, if both are known."""
    return numerator["p95"] / denominator["p95"] if numerator and denominator and denominator["p95"] else None


# --- the drills -------------------------------------------------------------------------------------------------


def long_prompts(plan: Plan, result: Result, scratch: Path) -> None:
    """The same load twice, the second time with a share of prompts that are several times longer.

    `short_p95_ratio`: TTFT p95 of the normal prompts beside long ones, over that without long ones: what others'
    long prompts cost. `long_p95_ratio`: that of the long prompts over the same base.
    """
    target = plan.target or ready_site(plan).router
    check_target(target, plan.allow_remote)
    share = plan.spec.long_share or DEFAULT_LONG_SHARE
    measured: dict[str, list[dict[str, Any]]] = {}
    for number, (phase, long_share) in enumerate((("baseline", 0.0), ("mixed", share)), 1):
        # another seed, other prompts: the second phase must not find the first one's in the prefix cache
        spec = plan.spec.model_copy(update={"long_share": long_share, "seed": plan.spec.seed + 1000 * number})
        result.event(f"{phase} load started")
        with load(plan, spec, target, scratch / phase) as running:
            rows = running.finish(now=False)
            start = running.window_start()
        result.requests += [{**row, "phase": phase} for row in rows]
        measured[phase] = [row for row in rows if row["started_at"] >= start]
    result.event("load ended")

    short, long = ([row for row in measured["mixed"] if row["prompt"] == kind] for kind in ("normal", "long"))
    values = result.values
    values |= {"multiplier": plan.spec.long_multiplier, "long_share": share}
    spreads = {}
    for name, rows in (("baseline", measured["baseline"]), ("short", short), ("long", long)):
        spreads[name] = spread(rows)
        values[name] = {"requests": len(rows), "failed": figures.failed(rows)}
        if spreads[name]:
            values[name]["ttft_ms"] = spreads[name]
        else:
            result.absent[f"{name}.ttft_ms"] = "no streaming request succeeded"
    for name in ("short", "long"):
        result.put(
            f"{name}_p95_ratio",
            ratio(spreads[name], spreads["baseline"]),
            "needs TTFT of both loads; see the others absent",
        )
    values |= {
        "requests": len(result.requests),
        "failed": figures.failed(result.requests),
        "failed_short": figures.failed(
            row for row in result.requests if row["phase"] == "mixed" and row["prompt"] == "normal"
        ),
        "failures_by_reason": reasons(result.requests),
        "prompt_tokens": {},
    }
    for kind in ("normal", "long"):
        known = [r["prompt_tokens"] for r in result.requests if r["prompt"] == kind and r["prompt_tokens"] is not None]
        if known:
            values["prompt_tokens"][kind] = figures.percentile(known, 50)
        else:
            result.absent[f"prompt_tokens.{kind}"] = "no answer with usage"
    if not all(spreads.values()):
        raise NotMeasuredError("no TTFT for " + ", ".join(name for name, value in spreads.items() if not value))


def replica_loss(plan: Plan, result: Result, scratch: Path) -> None:
    """Kill one replica under load and wait until it, or the one in its place, is ready again; figures: `_loss`."""
    site = ready_site(plan)
    name = plan.replica or site.names()[0]
    site.check([name])
    result.values |= {"killed": name, "how": site.how}
    _loss(plan, site, [name], lambda check: site.kill([name]), f"{name} killed", result, scratch, seed=3000)


def node_drain(plan: Plan, result: Result, scratch: Path) -> None:
    """Cordon the node of one replica and evict all replicas there under load, as a drain does; figures: `_loss`.

    Whatever happens, the node takes pods again at the end.
    """
    cluster = plan.in_cluster()
    ready_site(plan)
    node, names = cluster.node_of(plan.replica or cluster.names()[0])
    result.values |= {"node": node, "killed": names}

    def drain(check: Callable[[], None]) -> float:
        cluster.cordon(node)
        result.event(f"node {node} cordoned")
        return cluster.drain(names, plan.timeout_seconds, check)

    try:
        _loss(plan, cluster, names, drain, f"{', '.join(names)} evicted", result, scratch, seed=6000)
    finally:
        with held_back():
            cluster.uncordon(node)
            result.event(f"node {node} uncordoned")


def _loss(
    plan: Plan,
    site: Site,
    names: Sequence[str],
    take: Callable[[Callable[[], None]], float],
    taken: str,
    result: Result,
    scratch: Path,
    *,
    seed: int,
) -> None:
    """`take` the replicas `names` under load and wait until as many are ready again.

    Half the users stream and half do not: a router can send a lost request again, but not an answer that has begun.
    `failed_not_begun`: without a first token when they failed.
    `recovery_seconds`: from the kill to 200 on the last one's /ready. `p95_ratio`: TTFT p95 of streamed requests
    started between the kill and the recovery, over that of those started before the kill (ramp left out).
    """
    longest = plan.before_seconds + 2 * plan.timeout_seconds + plan.after_seconds + 60
    spec = plan.spec.model_copy(
        update={
            "users": max(2, plan.spec.users),
            "stream_share": 0.5,
            "long_share": 0.0,
            "duration_seconds": longest,
            "seed": plan.spec.seed + seed,  # other prompts than another drill's, which would be in the prefix cache
        }
    )
    watchers = [Watcher(site, name, result) for name in names]
    with load(plan, spec, site.router, scratch / "load", open_ended=True) as running:
        running.wait_started(60 + spec.request_timeout_seconds)
        begun = result.event("load started")
        sleep_checked(spec.ramp_seconds + plan.before_seconds, running.check)
        killed_at = result.event(taken, take(running.check))
        for watcher in watchers:
            watcher.start()
        try:
            deadline = time.monotonic() + plan.timeout_seconds
            while any(watcher.is_alive() for watcher in watchers) and time.monotonic() < deadline:
                running.check()
                time.sleep(POLL_SECONDS)
            if all(watcher.ready_at is not None for watcher in watchers):
                sleep_checked(plan.after_seconds, running.check)
        finally:
            for watcher in watchers:
                watcher.given_up.set()
        result.requests = running.finish(now=True)
        result.event("load ended")

    times = [watcher.ready_at for watcher in watchers if watcher.ready_at is not None]
    ready_at = max(times) if len(times) == len(watchers) else None
    for row in result.requests:
        row["phase"] = "before" if row["started_at"] < killed_at else "lost"
        if ready_at is not None and row["started_at"] > ready_at:
            row["phase"] = "after"
    rows = result.requests
    before = spread(r for r in rows if r["phase"] == "before" and r["started_at"] >= begun + spec.ramp_seconds)
    lost = spread(r for r in rows if r["phase"] == "lost")
    result.values |= {
        "requests": len(rows),
        "failed": figures.failed(rows),
        "failed_streams": figures.failed(r for r in rows if r["stream"]),
        "failed_non_streams": figures.failed(r for r in rows if not r["stream"]),
        "failed_not_begun": figures.failed(r for r in rows if r["ttft_ms"] is None),
        "failed_before_kill": sum(r["error"] is not None and figures.ended_at(r) < killed_at for r in rows),
        "failures_by_reason": reasons(rows),
        "ttft_ms": {key: value for key, value in (("before", before), ("lost", lost)) if value},
    }
    missing = "; ".join(text for watcher in watchers if (text := watcher.missing()))
    result.put(
        "recovery_seconds", ready_at - killed_at if ready_at else None, f"{missing} within {plan.timeout_seconds:g} s"
    )
    result.put(
        "p95_ratio",
        ratio(lost, before),
        "no streamed request succeeded " + ("in between" if before else "before the kill"),
    )
    if missing:
        raise NotMeasuredError(result.absent["recovery_seconds"])
    if "p95_ratio" in result.absent:
        raise NotMeasuredError(f"p95_ratio: {result.absent['p95_ratio']}")


class Prober:
    """One client that asks through the router for one streamed token each `PROBE_SECONDS`."""

    def __init__(self, router: str, spec: LoadSpec, rows: list[dict[str, Any]]) -> None:
        self.router = router
        self.turns = Turns(spec.models)
        self.source = PromptSource(rows, spec.seed + 4000)
        self.records: list[Record] = []
        self.slots = threading.BoundedSemaphore(PROBES_UNDER_WAY)
        self.stopped = threading.Event()
        self.sent = 0
        self.ticker = threading.Thread(target=self._tick, daemon=True)

    def probe(self) -> Record:
        """Send one probe and keep its record."""
        number, self.sent = self.sent, self.sent + 1
        record = ask(
            self.router,
            self.turns.next(),
            self.source.messages(number, 1),
            stream=True,
            max_tokens=1,
            timeout_seconds=PROBE_TIMEOUT_SECONDS,
            prompt="probe",
        )
        # one token may be the end of turn or half a character: the whole stream arrived, the token had no text
        if record.error == "empty answer":
            record.error, record.ttft_ms = None, record.latency_ms
        self.records.append(record)
        return record

    def _tick(self) -> None:
        while not self.stopped.wait(PROBE_SECONDS):
            if self.slots.acquire(blocking=False):
                threading.Thread(target=self._one, daemon=True).start()

    def _one(self) -> None:
        try:
            self.probe()
        finally:
            self.slots.release()

    def first_token(self, after: float) -> float | None:
        """Unix time of the first token of a probe that was sent after `after`."""
        times = [
            record.started_at + record.ttft_ms / 1000
            for record in list(self.records)
            if record.started_at > after and record.error is None and record.ttft_ms is not None
        ]
        return min(times, default=None)


def _until_served(prober: Prober, timeout_seconds: float) -> None:
    """Wait for a first token; a refused key is told at once, since waiting heals none."""

    def refused() -> None:
        last = prober.records[-1]
        if last.status in (401, 403):
            raise NotMeasuredError(
                f"before the drill: {prober.router} refuses the key in DRYDOCK_API_KEY: {last.error}"
            )

    def reason() -> str:
        return f"before the drill: no token through {prober.router}, but {prober.records[-1].error},"

    wait_until(lambda: prober.probe().error is None, timeout_seconds, reason, refused)


def outage(plan: Plan, result: Result, scratch: Path) -> None:
    """Kill all replicas and time the way back to the first token through the router.

    Phases in seconds, each from the end of the one before: `restart` until there is a new process (container) of any
    replica, `engine` until any /health is 200, `adapters` until any /ready is 200, `routed` until the first token
    through the router. Their sum is `recovery_seconds`. A token that came before a milestone was seen (a router may
    send work to an engine that is not ready yet) ends the phases there.
    """
    site = ready_site(plan)
    names = site.names()
    site.check(names)
    prober = Prober(site.router, plan.spec, read_rows(plan.dataset))
    _until_served(prober, plan.timeout_seconds)
    watchers = [Watcher(site, name, result) for name in names]
    prober.ticker.start()
    token_at: float | None = None
    try:
        time.sleep(2 * PROBE_SECONDS)
        killed_at = result.event("all replicas killed", site.kill(names))
        dead_at = time.time()
        result.values |= {"killed": names, "how": site.how}
        for watcher in watchers:
            watcher.start()
        deadline = time.monotonic() + plan.timeout_seconds
        while time.monotonic() < deadline and (token_at is None or any(watcher.is_alive() for watcher in watchers)):
            time.sleep(POLL_SECONDS)
            if token_at is None:
                token_at = prober.first_token(after=dead_at)
                if token_at is not None:
                    result.event("first token through the router", token_at)
    finally:
        prober.stopped.set()
        for watcher in watchers:
            watcher.given_up.set()
    probes = [record for record in list(prober.records) if record.started_at >= killed_at]
    result.requests = [dict(vars(record)) for record in sorted(prober.records, key=lambda record: record.started_at)]
    until = token_at if token_at is not None else time.time()
    result.values |= {
        "probes": len(probes),
        "failed_probes": sum(record.error is not None and record.started_at <= until for record in probes),
        "failures_by_reason": reasons([vars(record) for record in probes]),
        "replicas": {watcher.killed: stages(watcher, killed_at, result.absent) for watcher in watchers},
    }
    result.put(
        "recovery_seconds",
        token_at - killed_at if token_at is not None else None,
        f"no token through the router within {plan.timeout_seconds:g} s",
    )
    if token_at is None:
        result.absent["phases"] = result.absent["recovery_seconds"]
    else:
        milestones = {
            "restart": [watcher.restarted_at for watcher in watchers],
            "engine": [watcher.engine_at for watcher in watchers],
            "adapters": [watcher.ready_at for watcher in watchers],
        }
        result.values |= {"phases": phases(killed_at, token_at, milestones), "phases_unit": "seconds"}
    missing = [text for watcher in watchers if (text := watcher.missing())]
    if token_at is None or missing:
        raise NotMeasuredError("; ".join([*missing, *([] if token_at else [result.absent["recovery_seconds"]])]))


def tuning_eviction(plan: Plan, result: Result, scratch: Path) -> None:
    """Evict a pod that tunes, as a spot node's end does, and follow its Job until another one goes on.

    One that has yet to tune, after a changed setting of an adapter say, is waited for.
    `recovery_seconds`: from the eviction until the next pod tunes; `lost_steps`: those told before the eviction that
    it makes again, its checkpoint being older.
    """
    cluster = plan.in_cluster()
    seconds, poll = plan.timeout_seconds, cluster.poll_seconds
    seen: dict[str, Any] = {}

    def found(key: str, look: Callable[[], Any]) -> bool:
        with contextlib.suppress(FleetError):  # a container that has yet to start has no log
            seen[key] = look()
        return seen.get(key) is not None

    def none_to_come() -> None:
        with contextlib.suppress(FleetError):
            if not cluster.tunes_or_will():
                raise NotMeasuredError(
                    f"nothing to evict: no pod in {cluster.tuning} tunes at present. Run this drill while a tuning Job "
                    "does, such as after a changed setting of an adapter"
                )

    wait_until(
        lambda: found("pods", lambda: cluster.tuners() or None),
        seconds,
        f"no pod in {cluster.tuning} came to tune",
        none_to_come,
        poll_seconds=poll,
    )
    pod = seen["pods"][0]
    name = pod["metadata"]["name"]

    def still_there() -> None:
        with contextlib.suppress(FleetError):
            if pod["metadata"]["uid"] not in {other["metadata"]["uid"] for other in cluster.tuners()}:
                raise NotMeasuredError(f"{name} ended, or was taken away, before it told a step")

    wait_until(
        lambda: found("step", lambda: cluster.step(pod)),
        seconds,
        f"{name} told no step",
        still_there,
        poll_seconds=poll,
    )
    step = seen["step"]
    result.values |= {"pod": name, "evicted_at_step": step}
    evicted_at = result.event(f"{name} evicted at step {step}", cluster.evict_tuner(pod))
    result.absent |= dict.fromkeys(("recovery_seconds", "lost_steps"), f"no pod in place of {name} tunes")
    wait_until(
        lambda: found("next", lambda: cluster.tuner_after(pod)),
        seconds,
        f"no pod in place of {name} tunes",
        poll_seconds=poll,
    )
    after = seen["next"]
    result.values["recovery_seconds"] = round(result.event(f"{after['metadata']['name']} tunes") - evicted_at, 3)
    del result.absent["recovery_seconds"]
    result.absent["lost_steps"] = f"{after['metadata']['name']} does not say that it goes on from a checkpoint"
    wait_until(
        lambda: found("resumed", lambda: cluster.resumed_at(after)),
        seconds,
        result.absent["lost_steps"],
        poll_seconds=poll,
    )
    del result.absent["lost_steps"]
    result.event(f"{after['metadata']['name']} goes on from step {seen['resumed']}")
    result.values |= {"resumed_at_step": seen["resumed"], "lost_steps": max(0, step - seen["resumed"])}


def registry_unreachable(plan: Plan, result: Result, scratch: Path) -> None:
    """Tell the sidecars under load that the registry is out of reach, until `plan.after_seconds` after all say so.

    It is the loss as a sidecar sees it: the network is left alone, and each hears of it, as of its end, by a ConfigMap,
    which takes its kubelet up to some 90 s. `noticed_seconds`: until all replicas' metrics say so; `unready`: replicas
    that ceased to be ready meanwhile; `recovery_seconds`: from the withdrawal until all see the registry again.
    Whatever happens, the loss is taken back; where this process is killed outright it ends by itself.
    """
    cluster = plan.in_cluster()
    ready_site(plan)
    names = cluster.names()
    unseen: dict[str, float | None] = {}
    lapsed = set[str]()

    def look() -> None:
        with contextlib.suppress(FleetError):  # the API server may be away for a moment
            lapsed.update(cluster.lapsed(names))
            found = cluster.registry_unseen()
            unseen.clear()
            unseen.update(found)

    def wait_all(
        what: str, holds: Callable[[float], bool], seconds: float, check: Callable[[], None] = lambda: None
    ) -> None:
        def all_say() -> bool:
            look()
            return bool(unseen) and all(value is not None and holds(value) for value in unseen.values())

        def why() -> str:
            told = (f"{name}: {'no answer' if value is None else f'{value:.0f} s'}" for name, value in unseen.items())
            return f"not every sidecar said that it {what} the registry (not seen for: {', '.join(told)})"

        wait_until(all_say, seconds, why, check, poll_seconds=cluster.poll_seconds)

    wait_all("sees", lambda value: value == 0, plan.timeout_seconds)
    lapsed.clear()
    longest = NOTICED_SECONDS + plan.after_seconds + LOSS_MARGIN_SECONDS
    spec = plan.spec.model_copy(
        update={
            "long_share": 0.0,
            "duration_seconds": plan.before_seconds + longest + plan.timeout_seconds,
            "seed": plan.spec.seed + 5000,
        }
    )
    with load(plan, spec, cluster.router, scratch / "load", open_ended=True) as running:
        running.wait_started(60 + spec.request_timeout_seconds)
        result.event("load started")
        sleep_checked(spec.ramp_seconds + plan.before_seconds, running.check)
        try:
            lost_at = result.event("registry out of reach", cluster.lose_registry(longest))
            wait_all("misses", lambda value: value > 0, NOTICED_SECONDS, running.check)
            noticed_at = result.event("all replicas miss it")
            result.values["noticed_seconds"] = round(noticed_at - lost_at, 3)
            until = time.monotonic() + plan.after_seconds
            while time.monotonic() < until:
                look()
                sleep_checked(min(cluster.poll_seconds, plan.after_seconds), running.check)
        finally:
            with held_back():
                cluster.find_registry()
            found_at = result.event("registry in reach again")
        wait_all("sees", lambda value: value == 0, plan.timeout_seconds, running.check)
        seen_at = result.event("all replicas see it")
        result.requests = running.finish(now=True)
        result.event("load ended")

    for row in result.requests:
        row["phase"] = "before" if row["started_at"] < lost_at else "lost" if row["started_at"] < seen_at else "after"
    result.values |= {
        "replicas": len(names),
        "requests": len(result.requests),
        "failed": figures.failed(result.requests),
        "failures_by_reason": reasons(result.requests),
        "unready": len(lapsed),
        "unready_replicas": sorted(lapsed),
        "recovery_seconds": round(seen_at - found_at, 3),
    }


def phases(killed_at: float, token_at: float, milestones: dict[str, list[float | None]]) -> dict[str, float]:
    """Seconds of each phase from unix times; the first replica to reach a milestone counts; they sum to the whole."""
    found: dict[str, float] = {}
    last = killed_at
    for name, times in milestones.items():
        reached = max(last, min((at for at in times if at is not None and at <= token_at), default=token_at))
        found[name] = round(reached - last, 3)
        last = reached
    found["routed"] = round(token_at - last, 3)
    return found


def stages(watcher: Watcher, killed_at: float, absent: dict[str, str]) -> dict[str, float]:
    """Seconds of each stage of one replica, and the whole until it was ready."""
    found: dict[str, float] = {}
    last = killed_at
    for name, at in (("restart", watcher.restarted_at), ("engine", watcher.engine_at), ("adapters", watcher.ready_at)):
        if at is None:
            absent[f"replicas.{watcher.killed}.{name}_seconds"] = str(watcher.missing())
            return found
        found[f"{name}_seconds"] = round(at - last, 3)
        last = at
    return found | {"ready_seconds": round(last - killed_at, 3)}


def reasons(rows: Iterable[figures.Row]) -> dict[str, int]:
    """Failures by reason, the most frequent first."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["error"] is not None:
            counts[row["error"]] = counts.get(row["error"], 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
