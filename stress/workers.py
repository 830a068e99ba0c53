"""One load made by several processes, on one machine or on many: Locust's master and workers, and what they tell.

The master asks the target beforehand, sends each worker its part and the prompts' rows, has the clock, writes every
record and judges. A worker needs the target, the API keys and the way to its master, and nothing else; it is given its
number, and what it asks follows from the seed and that number. The users of a closed loop are started by Locust's own
dispatch; a Poisson process is split into independent ones, whose sum is the one asked for.

Records come in batches, each saying how many came before it, and a worker ends by telling how many there were: a
record that is lost ends the load as failed. So does a worker that is gone, or not heard of for LOST_SECONDS: what is
left would be a smaller load than was asked for, and would look better than the target is.

No two clocks are compared. A worker's durations are its own; when a request started it tells in seconds since it was
told to begin, which the master adds to when it said so. Assumed: that word takes milliseconds on the way, and clocks
run equally fast. There is no authentication, as with any Locust: who reaches the master's port can be a worker.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import gevent
from locust import User, runners
from locust.env import Environment

from common import exits
from common.settings import SettingsError
from stress.client import Record, api_keys
from stress.load import (
    WAIT_LINE_SECONDS,
    Arrivals,
    Load,
    NotLoadedError,
    Poisson,
    Sender,
    drain_seconds,
    failed_by_users,
    spawn_rate,
    user_class,
)
from stress.prompts import PromptSource
from stress.spec import LoadSpec

LOST_SECONDS = 10  # without a heartbeat, which comes every second
MASTER_LOST_SECONDS = 30.0
PREPARE_SECONDS = 120.0  # for one worker to take its rows
COLLECT_SECONDS = 1.0  # for the last records of a load that is given up
END_SECONDS = 5.0  # for a process to end, and beside the drain
BATCH_SECONDS = 0.25
POLL_SECONDS = 0.05

# What master and workers say to each other beside what Locust's do.
HERE, PART, READY, BEGIN, RECORDS, SAID, END, DONE = (
    f"stress_{word}" for word in ("here", "part", "ready", "begin", "records", "said", "end", "done")
)

Address = tuple[str, int]


class ChatUser(User):  # type: ignore[misc]
    """What the workers' users are to the master, who counts them by this name and never makes one."""

    tasks = (print,)  # Locust warns of none


class Workers(Arrivals):
    """The master's side: brings all workers together, has them begin and end, and gathers what they tell.

    Without `listen` it starts the workers by `command`, as processes of this machine, and only they can reach it.
    """

    def __init__(
        self, spec: LoadSpec, *, command: Sequence[str], listen: Address | None = None, join_seconds: float
    ) -> None:
        self.spec = spec
        self.join_seconds = join_seconds
        self.load: Load | None = None
        self.began = 0.0
        self.ids: list[str] = []  # by number
        self.here: set[str] = set()
        self.ready: set[str] = set()
        self.refusal: str | None = None
        self.got: dict[str, int] = {}
        self.sent: dict[str, int] = {}
        self.done: set[str] = set()
        self.starting: gevent.Greenlet | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        runners.HEARTBEAT_LIVENESS = LOST_SECONDS  # Locust's own three seconds are a busy machine's pause
        self.environment = Environment(user_classes=[ChatUser], stop_timeout=drain_seconds(spec))
        self.environment.events.spawning_complete.add_listener(self._started)
        self.runner = self.environment.create_master_runner(*(listen or ("127.0.0.1", 0)))
        listeners = {HERE: self._here, READY: self._ready, RECORDS: self._records, SAID: self._said, DONE: self._done}
        for word, listener in listeners.items():
            self.runner.register_message(word, listener)
        if listen is None:
            master = ("--master", f"127.0.0.1:{self.runner.server.port}", "--follow-parent")
            for _ in range(spec.workers):
                # In a session of its own: Ctrl-C is for the master, who tells them.
                self.processes.append(
                    subprocess.Popen([*command, *master], stdin=subprocess.DEVNULL, start_new_session=True)
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody of the workers is left, however the load has ended."""
        self.collect()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.runner.greenlet.kill()
        _close(self.runner.server)

    # Before the load

    def gather(self) -> None:
        """Wait until all workers have come, and no others. Raises `NotLoadedError` after `join_seconds`."""
        began = time.monotonic()
        next_line = began + WAIT_LINE_SECONDS
        wanted = self.spec.workers
        while True:
            present = self._present()
            came = sorted(self.here & present)  # by which Locust shares out users as well
            if len(came) >= wanted:
                self.ids = came[:wanted]
                if present == set(self.ids):
                    return
            self._tell_end(came[wanted:], now=True)
            if ended := self._ended_process():
                raise NotLoadedError(f"{ended} before the load began")
            now = time.monotonic()
            if now > began + self.join_seconds:
                raise NotLoadedError(
                    f"{len(came)} of {wanted} workers came within {self.join_seconds:g} s: nothing was loaded"
                )
            if now > next_line:
                next_line = now + WAIT_LINE_SECONDS
                waited = f"{now - began:.0f} of {self.join_seconds:g} s"
                print(
                    f"stress: waiting, {waited}: {len(came)} of {wanted} workers are here", file=sys.stderr, flush=True
                )
            gevent.sleep(POLL_SECONDS)

    def prepare(self, rows: list[dict[str, Any]], chars_per_token: float) -> None:
        """Give each worker its part. Raises `NotLoadedError`."""
        self.gather()  # one may have gone meanwhile, and another come
        packed = zlib.compress(json.dumps(rows).encode(), 1)
        for index, node in enumerate(self.ids):  # one after the other: there is one copy of the rows on its way
            part = {"index": index, "spec": self.spec.model_dump_json(), "chars_per_token": chars_per_token}
            self._tell(PART, node, {**part, "rows": packed})
            began = time.monotonic()
            while node not in self.ready:
                problem = self.refusal or self._lost()
                if problem is None and time.monotonic() > began + PREPARE_SECONDS:
                    problem = f"{self._named(node)} has not taken its part within {PREPARE_SECONDS:g} s"
                if problem:
                    raise NotLoadedError(f"{problem}: nothing was loaded")
                gevent.sleep(POLL_SECONDS)

    def of(self, load: Load) -> Self:
        """From now on, what the workers tell goes to `load`."""
        self.load = load
        self.all_started = load.spec.arrivals == "poisson"
        return self

    # The load

    def start(self) -> None:
        """Have all begin; the users of a closed loop are started one by one over the ramp, as Locust does."""
        self.began = time.time()
        for node in self.ids:
            self._tell(BEGIN, node)
        if self.spec.arrivals == "closed":
            self.starting = gevent.spawn(self.runner.start, self.spec.users, spawn_rate(self.spec))
            self.starting.link_exception(lambda it: self._fail(f"a bug in the load itself: {it.exception!r}"))

    def check(self) -> None:
        """End the load as failed if one of the workers is gone."""
        if lost := self._lost():
            self._fail(f"{lost}: what is left would be a smaller load, so nothing was measured")

    def stop(self) -> None:
        """Wait for the requests under way and the last records."""
        self._halt()
        gevent.sleep(POLL_SECONDS)  # for what Locust's master was about to say
        self._tell_end(self.ids, now=False)
        self._await_done(drain_seconds(self.spec) + END_SECONDS)
        if late := [self._named(node) for node in self.ids if node not in self.done]:
            self._fail(f"{', '.join(late)} did not come to an end: records may be missing")

    def collect(self) -> None:
        """Get what has been answered, at once; what is under way is given up, and the workers end."""
        self._halt()
        self._tell_end([node for node in self._present() if node not in self.done], now=True)
        self._await_done(COLLECT_SECONDS, whatever=True)

    def _await_done(self, seconds: float, *, whatever: bool = False) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.done >= set(self.ids) & self._present():
            if not whatever and self.load and self.load.exit_code:
                return
            gevent.sleep(POLL_SECONDS)

    # Who there is

    def _present(self) -> set[str]:
        return {node for node, state in self.runner.clients.items() if state.state != runners.STATE_MISSING}

    def _named(self, node: str) -> str:
        host = node.rpartition("_")[0]
        return f"worker {self.ids.index(node)} ({host})" if node in self.ids else f"a worker ({host})"

    def _ended_process(self) -> str | None:
        """The first process of ours that has failed."""
        for process in self.processes:
            if code := process.poll():
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return f"a worker process ended by {how}"
        return None

    def _lost(self) -> str | None:
        """What has become of the first worker that is gone, or that nobody wanted."""
        if ended := self._ended_process():
            return ended
        present = self._present()
        for node in self.ids:
            if node not in present and node not in self.done:
                quiet = f"was not heard of for {LOST_SECONDS} s" if node in self.runner.clients else "has left"
                return f"{self._named(node)} {quiet}"
        if strangers := present - set(self.ids):
            return f"{self._named(min(strangers))} came to a load that had begun"
        return None

    def _fail(self, reason: str) -> None:
        assert self.load
        self._halt()
        self.load.stop(reason, exits.FAILED)

    def _halt(self) -> None:
        """No more users are started: Locust's master would give those of a worker that leaves to the others."""
        if self.starting is not None:
            self.starting.kill(block=False)
        self.runner.stop(send_stop_to_client=False)

    # What is said

    def _tell(self, word: str, node: str, data: dict[str, Any] | None = None) -> None:
        self.runner.send_message(word, data, client_id=node)

    def _tell_end(self, nodes: Sequence[str], *, now: bool) -> None:
        for node in nodes:
            self._tell(END, node, {"now": now})

    def _started(self, **_: Any) -> None:
        self.all_started = True

    def _here(self, msg: Any, **_: Any) -> None:
        self.here.add(msg.node_id)

    def _ready(self, msg: Any, **_: Any) -> None:
        self.ready.add(msg.node_id)

    def _records(self, msg: Any, **_: Any) -> None:
        node, data = msg.node_id, msg.data
        if self.load is None or node not in self.ids:
            return
        if not self._complete(node, data["first"]):
            return
        self.got[node] = data["first"] + len(data["rows"])
        self.sent[node] = data["sent"]
        self.load.sent = sum(self.sent.values())
        for row in data["rows"]:
            record = Record(**row)
            self.load.note(replace(record, started_at=record.started_at + self.began))

    def _said(self, msg: Any, **_: Any) -> None:
        reason = f"{self._named(msg.node_id)}: {msg.data['reason']}"
        if self.load is None:
            self.refusal = reason
        elif msg.data["failed"]:
            self._fail(reason)
        else:
            self.load.stop(reason)

    def _done(self, msg: Any, **_: Any) -> None:
        if self.load and msg.node_id in self.ids:
            self._complete(msg.node_id, msg.data["total"])
        self.done.add(msg.node_id)

    def _complete(self, node: str, told: int) -> bool:
        got = self.got.get(node, 0)
        if got != told:
            self._fail(f"{self._named(node)} sent {told} records, of which {got} came: they are not whole")
        return got == told


class Worker:
    """The other side: makes its part of the load, and hands on every record."""

    def __init__(self, target: str) -> None:
        self.target = target
        # With no options Locust would read those of a pyproject.toml or locust.conf that happens to be here.
        self.environment = Environment(parsed_options=argparse.Namespace(web_base_path=""))
        self.runner: Any = None
        self.load: Load | None = None
        self.make: Callable[[], None] | None = None
        self.drain: Callable[[], None] | None = None
        self.began = 0.0
        self.batch: list[dict[str, Any]] = []
        self.total = 0
        self.told_sent = 0
        self.end_now: bool | None = None  # the master's word that it is over; whether at once
        self.joined = 0.0

    def join(self, master: Address, wait_seconds: float) -> None:
        """Wait for the master, and say that this worker is there. Raises `NotLoadedError`."""
        began = time.monotonic()
        while True:
            # Locust would try for five minutes, and what it leaves behind would still knock after that.
            try:
                socket.create_connection(master, 2).close()
                break
            except OSError as error:
                if time.monotonic() - began >= wait_seconds:
                    where = f"{master[0]}:{master[1]}"
                    raise NotLoadedError(f"no master at {where} within {wait_seconds:g} s: {error}") from None
            gevent.sleep(0.5)
        self.runner = self.environment.create_worker_runner(*master)
        self.joined = time.time()
        for word, listener in {PART: self._part, BEGIN: self._begin, END: self._end}.items():
            self.runner.register_message(word, listener)
        self.say(HERE)  # only now is there somebody to listen

    def say(self, word: str, data: dict[str, Any] | None = None) -> None:
        """Tell the master."""
        self.runner.send_message(word, data)

    def flush(self) -> None:
        """Hand on the records that there are, and how many requests were sent."""
        if self.load and (self.batch or self.load.sent != self.told_sent):
            rows, self.batch, self.told_sent = self.batch, [], self.load.sent
            self.say(RECORDS, {"first": self.total, "sent": self.load.sent, "rows": rows})
            self.total += len(rows)

    def master_is_gone(self) -> bool:
        """Whether it has not answered a heartbeat for MASTER_LOST_SECONDS."""
        return bool(time.time() - (self.runner.last_heartbeat_timestamp or self.joined) > MASTER_LOST_SECONDS)

    def leave(self) -> None:
        """Say the last word, and see it out."""
        self.flush()
        self.say(DONE, {"total": self.total})
        self.environment.events.quitting.fire(environment=self.environment)  # by which Locust's master forgets it
        self.runner.greenlet.kill()
        _close(self.runner.client)

    def _keep(self, record: Record) -> None:
        self.batch.append(vars(record) | {"started_at": record.started_at - self.began})

    def _part(self, msg: Any, **_: Any) -> None:
        data = msg.data
        whole = LoadSpec.model_validate_json(data["spec"])
        try:
            keys = api_keys(whole.clients or ())
        except SettingsError as error:
            self.say(SAID, {"reason": "; ".join(error.problems), "failed": True})
            return
        spec = whole.part(data["index"], whole.workers)
        source = PromptSource(json.loads(zlib.decompress(data["rows"])), spec.seed, data["chars_per_token"])
        self.load = Load(spec, self._keep)
        sender = Sender(self.load, self.target, source, keys, index=data["index"], of=whole.workers)
        if spec.arrivals == "closed":
            self.environment.user_classes.append(user_class(sender))
            failed_by_users(self.environment, self.load)
            self.drain = self.runner.stop
        else:
            poisson = Poisson(sender)
            self.make, self.drain = poisson.start, poisson.stop
        self.say(READY)

    def _begin(self, **_: Any) -> None:
        self.began = time.time()
        if self.make:
            self.make()

    def _end(self, msg: Any, **_: Any) -> None:
        self.end_now = self.end_now or msg.data["now"]


def work(master: Address, target: str, *, wait_seconds: float, follow_parent: bool) -> int:
    """Be a worker of `master` until the load is over; the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    parent = os.getppid()
    interrupts: list[int] = []
    gevent.signal_handler(signal.SIGINT, interrupts.append, exits.INTERRUPTED)
    gevent.signal_handler(signal.SIGTERM, interrupts.append, exits.TERMINATED)
    worker = Worker(target)
    joining = gevent.spawn(_joined, worker, master, wait_seconds)
    drain: gevent.Greenlet | None = None
    said_failed: bool | None = None
    next_batch = 0.0
    while True:
        gevent.sleep(POLL_SECONDS)
        if follow_parent and os.getppid() != parent:
            return exits.TERMINATED
        if not joining.ready():
            if interrupts:
                return interrupts[0]
            continue
        if joining.value is not None:
            print(f"stress worker: {joining.value}", file=sys.stderr)
            return exits.FAILED
        load = worker.load
        if interrupts:
            if load:
                worker.say(SAID, {"reason": "was told to end by a signal", "failed": True})
            worker.leave()
            return interrupts[0]
        if worker.master_is_gone():
            print(f"stress worker: the master has not answered for {MASTER_LOST_SECONDS:g} s", file=sys.stderr)
            return exits.FAILED
        if time.monotonic() >= next_batch:
            next_batch = time.monotonic() + BATCH_SECONDS
            worker.flush()
        if load and load.end and said_failed is not bool(load.exit_code):
            said_failed = bool(load.exit_code)
            worker.say(SAID, {"reason": load.end, "failed": said_failed})
        if worker.end_now is None:
            continue
        if worker.end_now or load is None or (drain is not None and drain.ready()):
            worker.leave()
            return exits.OK
        if drain is None:
            said_failed = bool(said_failed)  # that it ends is no news to the master; a failure would be
            load.stop("the master ended it")
            drain = gevent.spawn(worker.drain)


def _joined(worker: Worker, master: Address, wait_seconds: float) -> str | None:
    try:
        worker.join(master, wait_seconds)
    except (NotLoadedError, ConnectionError) as error:
        return str(error) or "the master does not answer"
    return None


def _close(connection: Any) -> None:
    """Close a socket of Locust's, with a second for what has not gone out yet."""
    context = connection.socket.context
    connection.close(linger=1000)
    context.term()
