"""The load: Locust as a library, one record a request, bounded in count and time.

Import this only after gevent patched the standard library (`stress.__main__` does, before anything else).
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import shutil
import signal
import sys
import time
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import gevent
from locust import User, constant, task
from locust.env import Environment
from locust.exception import StopUser

from common import exits
from common.files import read_jsonl, write_json
from stress import figures
from stress.client import Record, ask
from stress.prompts import PromptSource, Turns
from stress.spec import LoadSpec

PROGRESS_SECONDS = 2.0
WAIT_POLL_SECONDS, WAIT_LINE_SECONDS = 2.0, 30.0  # between two attempts of a load that waits, and between its log lines
CALIBRATION_CHARACTERS = 256  # short enough for any context length, long enough to average over words


class TargetError(Exception):
    """The target did not answer as a chat endpoint should; nothing was loaded. `lasting`: waiting would not help."""

    def __init__(self, text: str, *, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting


def preflight(target: str, spec: LoadSpec, rows: list[dict[str, Any]]) -> float:
    """Ask each alias for one token, and the first also with the longest prompt; return characters per token.

    Finds a wrong alias, a dead server and a prompt beyond the context length before the clock starts. The factor is
    measured on one short prompt, chat template included, unless the spec gives it. Raises `TargetError`.
    """
    factor = spec.chars_per_token

    def one(model: str, source: PromptSource, number: int, tokens: int) -> tuple[int, Record]:
        messages = source.messages(number, tokens)
        record = ask(target, model, messages, stream=False, max_tokens=1, timeout_seconds=spec.request_timeout_seconds)
        # one token may well be the end of turn: an empty answer proves the path as well
        if record.error not in (None, "empty answer"):
            what = record.error + (f": {record.error_detail}" if record.error_detail else "")
            raise TargetError(
                f"{target} does not serve {model!r} with a prompt of about {tokens} tokens: {what}",
                lasting=record.status in (400, 413, 422),  # the request itself is refused
            )
        return sum(len(message["content"]) for message in messages), record

    for number, model in enumerate(spec.models):
        characters, record = one(model, PromptSource(rows, spec.seed, 1.0), -1 - number, CALIBRATION_CHARACTERS)
        if factor is None:
            if not record.prompt_tokens:
                raise TargetError(
                    f"{target} sends no usage.prompt_tokens: give chars_per_token in the settings", lasting=True
                )
            factor = characters / record.prompt_tokens
    assert factor is not None
    longest = spec.prompt_tokens * (spec.long_multiplier if spec.long_share else 1)
    one(next(iter(spec.models)), PromptSource(rows, spec.seed, factor), -100, longest)
    return factor


class Load:
    """One run: its users, its records, its end."""

    def __init__(self, target: str, spec: LoadSpec, source: PromptSource, records: TextIO) -> None:
        self.target = target
        self.spec = spec
        self.source = source
        self.records = records
        self.turns = Turns(spec.models)
        self.user_numbers = itertools.count()
        self.sent = self.done = self.failed = 0
        self.recent: deque[tuple[float, bool, float | None]] = deque(maxlen=5000)  # ended, failed, ttft_ms
        self.end: str | None = None
        self.exit_code: int | None = None
        self.window_start: float | None = None

    def request(self, user: int) -> Record:
        """Send the next request on behalf of `user`, and write its record."""
        number, spec = self.sent, self.spec
        self.sent += 1
        # spread by number, not by chance: any stretch of requests has the wanted share
        long = int((number + 1) * spec.long_share) > int(number * spec.long_share)
        stream = int((user + 1) * spec.stream_share) > int(user * spec.stream_share)
        tokens = spec.prompt_tokens * (spec.long_multiplier if long else 1)
        record = ask(
            self.target,
            self.turns.next(),
            self.source.messages(number, tokens),
            stream=stream,
            max_tokens=spec.max_tokens,
            timeout_seconds=spec.request_timeout_seconds,
            prompt="long" if long else "normal",
        )
        self.records.write(record.as_json() + "\n")
        self.records.flush()
        self.done += 1
        self.failed += record.error is not None
        self.recent.append((time.time(), record.error is not None, record.ttft_ms))
        return record

    def stop(self, reason: str, exit_code: int | None = None) -> None:
        """End the run; the first reason counts, but a signal's exit code always does."""
        self.end = self.end or reason
        self.exit_code = exit_code or self.exit_code


def _user_class(load: Load) -> type[User]:
    class ChatUser(User):  # type: ignore[misc]
        """Sends, waits for the answer, thinks, sends again."""

        wait_time = constant(load.spec.think_seconds)

        def on_start(self) -> None:
            self.number = next(load.user_numbers)

        @task  # type: ignore[untyped-decorator]
        def chat(self) -> None:
            if load.sent >= load.spec.max_requests:
                load.stop(f"{load.spec.max_requests} requests sent")
                raise StopUser
            record = load.request(self.number)
            self.environment.events.request.fire(
                request_type="chat",
                name=record.model,
                response_time=record.latency_ms,
                response_length=0,
                exception=RuntimeError(record.error) if record.error else None,
                context={},
            )
            if record.error and load.end is None:
                gevent.sleep(load.spec.failure_pause_seconds)

    return ChatUser


def run(
    target: str,
    spec: LoadSpec,
    rows: list[dict[str, Any]],
    folder: Path,
    *,
    wait_seconds: float = 0.0,
    follow_parent: bool = False,
    open_ended: bool = False,
) -> int:
    """Run the load, write `requests.jsonl` as it happens and `summary.json` at the end; return the exit code.

    `wait_seconds` is for models that do not answer yet. Each bound of `spec.slo` is told; one not held is exit code 3.
    SIGUSR1 ends it as if the time were up (requests under way are awaited); SIGINT and SIGTERM end it at once, with
    130 and 143 and without a summary. With `follow_parent` it also ends when the process that started it is gone;
    `open_ended` only says that a SIGUSR1 is expected, so the time left is not foretold.
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

    check = gevent.spawn(_preflight_within, wait_seconds, target, spec, rows)
    while not check.ready():
        gevent.sleep(0.05)
        if interrupts:
            return interrupts[0]
    if isinstance(check.value, TargetError):
        print(f"stress: {check.value}", file=sys.stderr)
        return exits.FAILED
    if check.value is None:  # a bug: gevent printed its traceback
        return exits.FAILED

    source = PromptSource(rows, spec.seed, check.value)
    with (folder / "requests.jsonl").open("w", encoding="utf-8") as file:
        load = Load(target, spec, source, file)
        progress = Progress(load, open_ended)
        environment = Environment(user_classes=[_user_class(load)], stop_timeout=spec.request_timeout_seconds * 2 + 5)
        environment.events.user_error.add_listener(
            lambda exception, **_: load.stop(f"a bug in the load itself: {exception!r}", exits.FAILED)
        )
        spawned: list[int] = []
        environment.events.spawning_complete.add_listener(lambda user_count: spawned.append(user_count))
        runner = environment.create_local_runner()
        began = time.time()
        runner.start(spec.users, spawn_rate=spec.users / spec.ramp_seconds if spec.ramp_seconds else spec.users)
        drain: gevent.Greenlet | None = None
        ended = began
        while drain is None or not drain.ready():
            gevent.sleep(0.05)
            now = time.time()
            if interrupts or (follow_parent and os.getppid() != parent):
                code = interrupts[0] if interrupts else exits.TERMINATED
                progress.close()
                print(f"stress: stopped; {load.done} requests are in {file.name}, no summary", file=sys.stderr)
                return code
            if load.window_start is None and spawned and now >= began + spec.ramp_seconds:
                load.window_start = now
            if load.window_start is not None and now >= load.window_start + spec.duration_seconds:
                load.stop(f"{spec.duration_seconds:g} s are over")
            if early_end:
                load.stop("asked to end")
            if load.end and drain is None:
                ended = now
                drain = gevent.spawn(runner.stop)
            progress.tick(now)
        progress.close()
    if load.exit_code:
        print(f"stress: {load.end}", file=sys.stderr)
        return load.exit_code
    # stopped by count inside the ramp: there is no window, and the figures say so
    window = (load.window_start or ended, ended)
    summary = {
        "scenario": folder.name,
        "target": target,
        "spec": spec.model_dump(exclude_none=True),
        "chars_per_token": round(source.chars_per_token, 3),
        "started_at": round(began, 3),
        "window": {"started_at": round(window[0], 3), "ended_at": round(window[1], 3), "excludes": "ramp"},
        "ended_because": load.end,
        **figures.summary(read_jsonl(folder / "requests.jsonl"), window),
        "percentiles": figures.PERCENTILES,
        "versions": {"locust": version("locust"), "python": platform.python_version()},
    }
    bounds = figures.bounds(summary, spec.slo)
    if bounds:
        summary["bounds"] = bounds
    write_json(folder / "summary.json", summary)
    shown = {
        key: summary[key]
        for key in ("requests", "failed", "rps", "ttft_ms", "itl_ms", "tokens_per_second")
        if key in summary
    }
    print(json.dumps(shown), flush=True)
    if load.done == load.failed:
        print(f"stress: no request succeeded: {summary['failures_by_reason']}", file=sys.stderr)
        return exits.FAILED
    for bound in bounds:
        print(f"stress: {figures.told(bound)}", file=sys.stderr)
    return exits.OK if all(bound["held"] for bound in bounds) else exits.GATE


def _preflight_within(seconds: float, target: str, spec: LoadSpec, rows: list[dict[str, Any]]) -> float | TargetError:
    """Characters per token, or what was still wrong after so many seconds: a model may be in tuning, or asleep."""
    began = next_line = time.monotonic()
    while True:
        try:
            return preflight(target, spec, rows)
        except TargetError as error:
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
        if now > since:
            parts.append(f"{len(good) / (now - since):.1f} RPS")
        if ttft:
            parts.append(f"TTFT p95 {figures.percentile(ttft, 95):.0f} ms")
        if load.end:
            parts.append(f"{load.sent - load.done} under way")
        elif not self.open_ended:
            start = load.window_start or self.began + spec.ramp_seconds
            parts.append(f"ETA {max(0.0, start + spec.duration_seconds - now):.0f} s")
        return "  ".join(parts)

    def close(self) -> None:
        """End the line on a terminal."""
        if self.terminal:
            self.file.write("\n")
            self.file.flush()
