"""The load: Locust as a library, one record a request, bounded in count and time.

Import this only after gevent patched the standard library (`stress.__main__` does, before anything else).
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import gevent
from gevent.event import Event
from gevent.pool import Group
from locust import User, constant, task
from locust.env import Environment
from locust.exception import StopUser

from common import exits
from common.files import read_jsonl, write_json
from stress import figures
from stress.arrivals import Mix, due_seconds
from stress.client import SURE_TIMES, Record, ask
from stress.prompts import PromptSource
from stress.spec import LoadSpec

if TYPE_CHECKING:
    from stress.workers import Workers

PROGRESS_SECONDS = 2.0
SURE_POLL_SECONDS = 0.5
WAIT_POLL_SECONDS, WAIT_LINE_SECONDS = 2.0, 30.0  # between two attempts of a load that waits, and between its log lines
CALIBRATION_CHARACTERS = 256  # short enough for any context length, long enough to average over words
SHOWN = (
    *("requests", "failed", "shed", "rps", "goodput_rps", "goodput_share", "ttft_ms", "itl_ms", "tokens_per_second"),
    "late_ms",
)
LATE_SHARE = 0.1  # of TTFT (else of latency), both p95: from there on an open loop measures this process as well
LONGEST_RETRY_AFTER_SECONDS = 120.0  # as OpenAI's Python client; our replicas say a minute at most


class NotLoadedError(Exception):
    """The load could not begin, and why."""


class TargetError(NotLoadedError):
    """The target did not answer as a chat endpoint should; nothing was loaded. `lasting`: waiting would not help."""

    def __init__(self, text: str, *, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting


def preflight(target: str, spec: LoadSpec, rows: list[dict[str, Any]], keys: Mapping[str, str]) -> float:
    """Ask each alias for one token, as each client the first, which also gets the longest prompt; characters per token.

    Finds a wrong alias or key, a dead server and a prompt beyond the context length before the clock starts. The factor
    is measured on one short prompt, chat template included, unless the spec gives it. Raises `TargetError`.
    """
    factor = spec.chars_per_token
    clients: list[str | None] = list(keys) or [None]
    first = next(iter(spec.models))

    def one(model: str, client: str | None, source: PromptSource, number: int, tokens: int) -> tuple[int, Record]:
        messages = source.messages(number, tokens)
        record = ask(
            target, model, messages, stream=False, max_tokens=1, timeout_seconds=spec.request_timeout_seconds,
            client=client, key=keys[client] if client else None,
        )  # fmt: skip
        # one token may well be the end of turn: an empty answer proves the path as well
        if record.error not in (None, "empty answer"):
            what = record.error + (f": {record.error_detail}" if record.error_detail else "")
            whom = f" to client {client}" if client else ""
            raise TargetError(
                f"{target} does not serve {model!r}{whom} with a prompt of about {tokens} tokens: {what}",
                lasting=record.status in (400, 413, 422),  # the request itself is refused
            )
        return sum(len(message["content"]) for message in messages), record

    short = PromptSource(rows, spec.seed, 1.0)
    for number, (model, client) in enumerate(
        [*((model, clients[0]) for model in spec.models), *((first, client) for client in clients[1:])]
    ):
        characters, record = one(model, client, short, -1 - number, CALIBRATION_CHARACTERS)
        if factor is None:
            if not record.prompt_tokens:
                raise TargetError(
                    f"{target} sends no usage.prompt_tokens: give chars_per_token in the settings", lasting=True
                )
            factor = characters / record.prompt_tokens
    assert factor is not None
    longest = spec.prompt_tokens * (spec.long_multiplier if spec.long_share else 1)
    source = PromptSource(rows, spec.seed, factor)
    for number, client in enumerate(clients):  # the tier of each has its own limits
        one(first, client, source, -1000 - number, longest)
    return factor


class Load:
    """One run: what came of its requests, and its end. `keep` puts away each record."""

    def __init__(self, spec: LoadSpec, keep: Callable[[Record], None]) -> None:
        self.spec = spec
        self.keep = keep
        self.sent = self.done = self.failed = self.shed = self.not_sent = 0
        self.recent: deque[tuple[float, bool, float | None]] = deque(maxlen=5000)  # ended, failed, ttft_ms
        self.end: str | None = None
        self.ended = Event()
        self.exit_code: int | None = None
        self.window_start: float | None = None

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered."""
        return self.sent - self.done

    def note(self, record: Record) -> None:
        """Count a request that has come to its end, or that was not sent."""
        self.keep(record)
        if record.error == figures.NOT_SENT:
            self.not_sent += 1
        else:
            self.done += 1
        refused = figures.shed(vars(record))
        self.shed += refused
        self.failed += record.error is not None and not refused
        self.recent.append((time.time(), record.error is not None, record.ttft_ms))

    def stop(self, reason: str, exit_code: int | None = None) -> None:
        """End the run; the first reason counts, but that of the first failure, which has an exit code, before it."""
        if self.end is None or (exit_code and not self.exit_code):
            self.end = reason
        self.exit_code = self.exit_code or exit_code
        self.ended.set()


class Sender:
    """Sends a load's requests; as worker `index` of `of` its own prompts, arrivals and users, by the same seed.

    The prompts are the load's, of which it takes every `of`-th, and so are the users' clients.
    """

    def __init__(
        self, load: Load, target: str, source: PromptSource, keys: Mapping[str, str], *, index: int = 0, of: int = 1
    ) -> None:
        self.load = load
        self.target = target
        self.source = source
        self.keys = keys
        self.index, self.of = index, of
        self.mix = Mix(load.spec)
        self.users = islice(self.mix.users(), index, None, of)

    @property
    def seed(self) -> int | str:
        """Of its arrivals."""
        return self.load.spec.seed if self.of == 1 else f"{self.load.spec.seed}/{self.index}"

    def request(self, client: str | None, stream: bool) -> Record:
        """Send the next request of `client`, whose model is the next in turn."""
        model = self.mix.model(client)
        return self._send(client, model, stream, None)

    def request_due(self, due: float) -> None:
        """Send the next request of an open loop, or note that it cannot be sent; `due` is a `time.perf_counter()`."""
        client = self.mix.client()
        model = self.mix.model(client)
        stream = self.mix.stream(client, model)
        if self.load.in_flight < self.load.spec.max_in_flight:
            self._send(client, model, stream, due)
            return
        at = time.time() - (time.perf_counter() - due)
        self.load.note(Record(at, model, stream, error=figures.NOT_SENT, client=client))

    def _send(self, client: str | None, model: str, stream: bool, due: float | None) -> Record:
        load, spec = self.load, self.load.spec
        number = load.sent * self.of + self.index
        load.sent += 1
        long = self.mix.long(client, model, stream)
        record = ask(
            self.target,
            model,
            self.source.messages(number, spec.prompt_tokens * (spec.long_multiplier if long else 1)),
            stream=stream,
            max_tokens=spec.max_tokens,
            ignore_eos=spec.ignore_eos,
            timeout_seconds=spec.request_timeout_seconds,
            prompt="long" if long else "normal",
            client=client,
            key=self.keys[client] if client else None,
            due=due,
        )
        load.note(record)
        return record


class Arrivals:
    """How a load's requests come about. Made by this process, they need no `check`, and none is left to `collect`."""

    all_started = False

    def start(self) -> None:
        """Begin with the ramp."""
        raise NotImplementedError

    def stop(self) -> None:
        """Wait for the requests under way."""
        raise NotImplementedError

    def check(self) -> None:
        """End the load as failed if somebody who makes it is gone."""

    def collect(self) -> None:
        """Get what has been answered, at once; what is under way is given up."""


class Closed(Arrivals):
    """Locust's users: each sends, waits for the answer, thinks, sends again."""

    def __init__(self, sender: Sender) -> None:
        self.spec = spec = sender.load.spec
        self.environment = Environment(user_classes=[user_class(sender)], stop_timeout=drain_seconds(spec))
        failed_by_users(self.environment, sender.load)
        self.environment.events.spawning_complete.add_listener(self._started)
        self.runner = self.environment.create_local_runner()

    def _started(self, **_: Any) -> None:
        self.all_started = True

    def start(self) -> None:
        """Start the users, evenly over the ramp."""
        self.runner.start(self.spec.users, spawn_rate=spawn_rate(self.spec))

    def stop(self) -> None:
        """Wait for the requests under way."""
        self.runner.stop()


class Poisson(Arrivals):
    """Requests at independent times: a greenlet for each, whatever became of the others."""

    all_started = True

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.load = sender.load
        self.requests: Group = Group()
        self.sending = gevent.Greenlet(self._send_all)
        self.sending.link_exception(self._broken)

    def _send_all(self) -> None:
        load, spec, began = self.load, self.load.spec, time.perf_counter()
        for number, seconds in enumerate(due_seconds(_rate(spec), spec.ramp_seconds, self.sender.seed)):
            due = began + seconds
            if load.ended.wait(max(0.0, due - time.perf_counter())):
                return
            if number >= spec.max_requests:
                load.stop(f"{spec.max_requests} requests were due")
                return
            request = gevent.Greenlet(self.sender.request_due, due)
            request.link_exception(self._broken)
            self.requests.start(request)

    def _broken(self, greenlet: gevent.Greenlet) -> None:
        self.load.stop(f"a bug in the load itself: {greenlet.exception!r}", exits.FAILED)

    def start(self) -> None:
        """Start sending."""
        self.sending.start()

    def stop(self) -> None:
        """Wait for the requests under way."""
        self.sending.join()
        self.requests.join(timeout=drain_seconds(self.load.spec))
        self.requests.kill()


def drain_seconds(spec: LoadSpec) -> float:
    """For the requests under way: connecting and the answer have a timeout each."""
    return spec.request_timeout_seconds * 2 + 5


def spawn_rate(spec: LoadSpec) -> float:
    """Users to start a second."""
    return spec.users / spec.ramp_seconds if spec.ramp_seconds else spec.users


def failed_by_users(environment: Environment, load: Load) -> None:
    """A user of ours raises nothing: what one raises is a bug, and the load has failed."""
    environment.events.user_error.add_listener(
        lambda exception, **_: load.stop(f"a bug in the load itself: {exception!r}", exits.FAILED)
    )


def _rate(spec: LoadSpec) -> float:
    assert spec.requests_per_second is not None  # the spec has seen to it
    return spec.requests_per_second


def user_class(sender: Sender) -> type[User]:
    """Locust's user of this load; `stress.workers` names it to the master."""
    load, spec = sender.load, sender.load.spec

    class ChatUser(User):  # type: ignore[misc]
        """Sends, waits for the answer, thinks, sends again."""

        wait_time = constant(spec.think_seconds)

        def on_start(self) -> None:
            self.client_name, self.stream = next(sender.users)

        @task  # type: ignore[untyped-decorator]
        def chat(self) -> None:
            if load.sent >= spec.max_requests:
                load.stop(f"{spec.max_requests} requests sent")
                raise StopUser
            record = sender.request(self.client_name, self.stream)
            self.environment.events.request.fire(
                request_type="chat",
                name=record.model,
                response_time=record.latency_ms,
                response_length=0,
                exception=RuntimeError(record.error) if record.error else None,
                context={},
            )
            if record.error:
                told = record.retry_after_seconds if figures.shed(vars(record)) else None
                load.ended.wait(max(min(told or 0.0, LONGEST_RETRY_AFTER_SECONDS), spec.failure_pause_seconds))

    return ChatUser


def run(
    target: str,
    spec: LoadSpec,
    rows: list[dict[str, Any]],
    folder: Path,
    *,
    keys: Mapping[str, str],
    wait_seconds: float = 0.0,
    follow_parent: bool = False,
    open_ended: bool = False,
    workers: Workers | None = None,
) -> int:
    """Run the load, write `requests.jsonl` as it happens and `summary.json` at the end; return the exit code.

    `keys` are the API keys of `spec.clients`. `wait_seconds` is for models that do not answer yet. Each bound of
    `spec.slo` is told; one not held is exit code 3.

    SIGUSR1 ends it as if the time were up (requests under way are awaited); SIGINT and SIGTERM end it at once, with
    130 and 143 and without a summary. With `follow_parent` it also ends when the process that started it is gone;
    `open_ended` only says that a SIGUSR1 is expected, so the time left is not foretold. `workers` make the load
    instead of this process, which asks the target beforehand, has the clock, writes and judges.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)  # never an old summary beside new requests
    parent = os.getppid()
    interrupts: list[int] = []
    early_end: list[int] = []
    gevent.signal_handler(signal.SIGINT, interrupts.append, exits.INTERRUPTED)
    gevent.signal_handler(signal.SIGTERM, interrupts.append, exits.TERMINATED)
    gevent.signal_handler(signal.SIGUSR1, early_end.append, 1)

    check = gevent.spawn(_prepared, workers, wait_seconds, target, spec, rows, keys)
    while not check.ready():
        gevent.sleep(0.05)
        if interrupts:
            return interrupts[0]
    if isinstance(check.value, NotLoadedError):
        print(f"stress: {check.value}", file=sys.stderr)
        return exits.FAILED
    if check.value is None:  # a bug: gevent printed its traceback
        return exits.FAILED

    with (folder / "requests.jsonl").open("w", encoding="utf-8") as file:

        def keep(record: Record) -> None:
            file.write(record.as_json() + "\n")
            file.flush()

        load = Load(spec, keep)
        progress = Progress(load, open_ended)
        arrivals: Arrivals
        if workers:
            arrivals = workers.of(load)
        else:
            sender = Sender(load, target, PromptSource(rows, spec.seed, check.value), keys)
            arrivals = Closed(sender) if spec.arrivals == "closed" else Poisson(sender)
        began = time.time()
        arrivals.start()
        drain: gevent.Greenlet | None = None
        ended = began
        while drain is None or not drain.ready():
            gevent.sleep(0.05)
            now = time.time()
            if interrupts or (follow_parent and os.getppid() != parent):
                code = interrupts[0] if interrupts else exits.TERMINATED
                progress.close()
                arrivals.collect()
                print(
                    f"stress: stopped; {load.done + load.not_sent} requests are in {file.name}, no summary",
                    file=sys.stderr,
                )
                return code
            if load.window_start is None and arrivals.all_started and now >= began + spec.ramp_seconds:
                load.window_start = now
            if load.window_start is not None and now >= load.window_start + spec.duration_seconds:
                load.stop(f"{spec.duration_seconds:g} s are over")
            if early_end:
                load.stop("asked to end")
            arrivals.check()
            if load.end and drain is None:
                ended = now
                drain = gevent.spawn(arrivals.stop)
            progress.tick(now)
        progress.close()
    if load.exit_code:
        print(f"stress: {load.end}", file=sys.stderr)
        return load.exit_code
    # stopped by count inside the ramp: there is no window, and the figures say so
    window = (load.window_start or ended, ended)
    by: dict[str, Callable[[figures.Row], str]] = {"model": itemgetter("model")} if len(spec.models) > 1 else {}
    if spec.clients:
        by["client"] = itemgetter("client")
    if tiers := spec.tiers:
        by["tier"] = lambda row: tiers[row["client"]]
    rows_read = read_jsonl(folder / "requests.jsonl")
    summary = {
        "scenario": folder.name,
        "target": target,
        "spec": spec.model_dump(exclude_none=True),
        "chars_per_token": round(check.value, 3),
        "started_at": round(began, 3),
        "window": {"started_at": round(window[0], 3), "ended_at": round(window[1], 3), "excludes": "ramp"},
        "ended_because": load.end,
        **figures.summary(rows_read, window, objectives=spec.slo.goodput.objectives, by=by),
        "percentiles": figures.PERCENTILES,
        "versions": {"locust": version("locust"), "python": platform.python_version()},
    }
    if load.shed:
        summary["retry_after_obeyed"] = spec.arrivals == "closed"
    bounds = figures.bounds(summary, spec.slo)
    if bounds:
        summary["bounds"] = bounds
    write_json(folder / "summary.json", summary)
    shown = {key: summary[key] for key in SHOWN if key in summary}
    print(json.dumps(shown), flush=True)
    if load.not_sent:
        print(
            f"stress: {load.not_sent} of {summary['requests']} requests were due but not sent, as max_in_flight = "
            f"{spec.max_in_flight} were unanswered: the load was smaller than asked for, and they count as failed",
            file=sys.stderr,
        )
    late = summary.get("late_ms", {}).get("p95", 0.0)
    if late > LATE_SHARE * summary.get("ttft_ms", summary.get("latency_ms", {})).get("p95", math.inf):
        print(
            f"stress: requests were sent up to {late:.0f} ms (p95) after they were due, which is in their times: "
            "what makes the load could not keep up: lower requests_per_second, or raise workers, with a core each",
            file=sys.stderr,
        )
    if load.failed + load.shed == summary["requests"]:
        shed = {"status 429": load.shed} if load.shed else {}
        print(f"stress: no request succeeded: {summary['failures_by_reason'] | shed}", file=sys.stderr)
        return exits.FAILED
    for bound in bounds:
        print(f"stress: {figures.told(bound)}", file=sys.stderr)
    return exits.OK if all(bound["held"] for bound in bounds) else exits.GATE


def _prepared(
    workers: Workers | None,
    wait_seconds: float,
    target: str,
    spec: LoadSpec,
    rows: list[dict[str, Any]],
    keys: Mapping[str, str],
) -> float | NotLoadedError:
    """Characters per token, once target and `workers` are ready; or why they are not."""
    try:
        if workers:
            workers.gather()  # before the target is asked, which may take long
        found = _preflight_within(wait_seconds, target, spec, rows, keys)
        if workers and not isinstance(found, TargetError):
            workers.prepare(rows, found)
        return found
    except NotLoadedError as error:
        return error


def _preflight_within(
    seconds: float, target: str, spec: LoadSpec, rows: list[dict[str, Any]], keys: Mapping[str, str]
) -> float | TargetError:
    """Characters per token, or what was still wrong after so many seconds: a model may be in tuning, or asleep.

    A load that waits wants `SURE_TIMES` good answers of each model in a row: after its first promotion one replica has
    an adapter some seconds before the others, and whichever is asked answers.
    """
    began = next_line = time.monotonic()
    good = 0
    while True:
        try:
            characters_per_token = preflight(target, spec, rows, keys)
            good += 1
            if good == SURE_TIMES or not seconds:
                return characters_per_token
            gevent.sleep(SURE_POLL_SECONDS)
            continue
        except TargetError as error:
            good = 0
            now = time.monotonic()
            if error.lasting or now - began >= seconds:
                return error
            if now >= next_line:
                next_line = now + WAIT_LINE_SECONDS
                print(f"stress: waiting, {now - began:.0f} of {seconds:g} s: {error}", file=sys.stderr, flush=True)
        gevent.sleep(WAIT_POLL_SECONDS)


class Progress:
    """A line each two seconds: rewritten in place on a terminal, one after the other in a log."""

    def __init__(self, load: Load, open_ended: bool = False, file: TextIO = sys.stderr) -> None:
        self.load = load
        self.open_ended = open_ended
        self.file = file
        self.began = self.next = time.time()
        self.terminal = file.isatty()

    def tick(self, now: float) -> None:
        """Print the line if it is time."""
        if now < self.next:
            return
        self.next = now + PROGRESS_SECONDS
        text = self.line(now)
        if self.terminal:
            width = shutil.get_terminal_size().columns
            self.file.write(f"\r\x1b[K{text[: width - 1]}")
        else:
            self.file.write(text + "\n")
        self.file.flush()

    def line(self, now: float) -> str:
        """Requests, failures, RPS and TTFT of the last ten seconds, time left."""
        load, spec = self.load, self.load.spec
        since = max(self.began, now - 10)
        if len(load.recent) == load.recent.maxlen:  # faster than it can remember for ten seconds
            since = max(since, load.recent[0][0])
        recent = [item for item in load.recent if item[0] >= since]
        good = [item for item in recent if not item[1]]
        ttft = [item[2] for item in good if item[2] is not None]
        parts = [f"stress {load.done} requests", f"{load.failed} failed"]
        parts += [f"{count} {what}" for count, what in ((load.shed, "shed"), (load.not_sent, "not sent")) if count]
        if now > since:
            parts.append(f"{len(good) / (now - since):.1f} RPS")
        if ttft:
            parts.append(f"TTFT p95 {figures.percentile(ttft, 95):.0f} ms")
        if load.end:
            parts.append(f"{load.in_flight} under way")
        elif not self.open_ended:
            start = load.window_start or self.began + spec.ramp_seconds
            parts.append(f"ETA {max(0.0, start + spec.duration_seconds - now):.0f} s")
        return "  ".join(parts)

    def close(self) -> None:
        """End the line on a terminal."""
        if self.terminal:
            self.file.write("\n")
            self.file.flush()
