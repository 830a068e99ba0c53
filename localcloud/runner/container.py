"""One container of a pod: its process, its probes, how it is stopped, and what is seen of it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from localcloud.runner import probes
from localcloud.runner.events import Events, now
from localcloud.runner.images import Image
from localcloud.runner.probes import Prober
from localcloud.runner.process import Namespaced, StartError, execute
from localcloud.runner.status import Seen, is_sidecar

MINIMUM_SECONDS = 2.0  # between SIGTERM and SIGKILL, also where a preStop hook has used up the grace (the kubelet's)
STABLE_SECONDS = 600.0  # after running for so long, the next end of it counts as its first
MAX_BACKOFF_SECONDS = 300.0
MESSAGE_BYTES = 4096  # of a termination message
POLL_SECONDS = 0.05


class Container:
    """Its fields are read by the pod's thread; probes and stopping run in threads of their own and `wake` that one."""

    def __init__(self, spec: dict[str, Any], init: bool, seen: Seen, events: Events, wake: Callable[[], None]) -> None:
        self.spec, self.seen, self._events, self._wake = spec, seen, events, wake
        self.name: str = spec["name"]
        self.sidecar = init and is_sidecar(spec)
        self.init = init and not self.sidecar
        ran = bool(seen.last) or "terminated" in seen.state
        self.starts = seen.restarts + 1 if ran else 0
        self.process: Namespaced | None = None
        self.pull: Future[Image] | None = None
        self.not_before = 0.0  # by time.monotonic()
        self.delay = 0.0
        self.deadline: float | None = None  # while it is being stopped: SIGKILL then
        self._began = 0.0
        self._probers: list[Prober] = []
        self._condemned: tuple[str, float | None] | None = None
        self._exec: dict[str, Any] = {}
        self._folder = Path()
        self._address = ""
        self._signal = signal.SIGTERM

    @property
    def running(self) -> bool:
        process = self.process
        return process is not None and process.ended() is None

    def wait(self, reason: str, message: str = "", seconds: float = 0.0) -> None:
        """Nothing runs, because of `reason`; the next try is in so many seconds."""
        self.seen.state = {"waiting": {"reason": reason, **({"message": message} if message else {})}}
        self.not_before = time.monotonic() + seconds

    def back_off(self, first: float) -> float:
        """Seconds until it is started again: 0, then `first`, then twice as long each time."""
        if self._began and time.monotonic() - self._began > STABLE_SECONDS:
            self.delay = 0.0
        self._began = 0.0  # counted once: an image that cannot be pulled starts nothing
        seconds, self.delay = self.delay, min(max(2 * self.delay, first), MAX_BACKOFF_SECONDS)
        return seconds

    def start(self, run: dict[str, Any], image: Image, folder: Path, log: Path, address: str) -> None:
        """Run it: `run` as `enter.run` takes it. Where that fails, it has ended with exit code 128."""
        seen, self._folder, self._address = self.seen, folder, address
        seen.restarts, seen.image_id = self.starts, image.id
        self.starts += 1
        self._began, self._condemned, self.deadline = time.monotonic(), None, None
        self._signal = _signal(image.stop_signal)
        try:
            self.process = Namespaced("run", run, folder / "run.json", log)
        except StartError as error:
            self._events.say("Failed", f"Error: {error}", container=self.name, warning=True)
            seen.state = {
                "terminated": {"exitCode": 128, "reason": "StartError", "message": str(error), "startedAt": now(),
                               "finishedAt": now()}
            }  # fmt: skip
            return
        self._exec = {**run, "pid": self.process.pid}
        seen.state = {"running": {"startedAt": now()}}
        seen.started = "startupProbe" not in self.spec
        seen.ready = seen.started and "readinessProbe" not in self.spec
        self._events.say("Started", f"Started container {self.name}", container=self.name)
        if not seen.started:
            self._probe("startupProbe", self.process)
        else:
            self._probe_on(self.process)

    def reap(self) -> bool:
        """Whether its process has ended since the last call; then `seen` says how."""
        code = self.process.ended() if self.process is not None else None
        if code is None:
            return False
        for prober in self._probers:
            prober.stop()
        self._probers = []
        self.process = None
        seen = self.seen
        seen.started = seen.ready = False
        since = seen.state.get("running", {}).get("startedAt", now())
        ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "startedAt": since,
                 "finishedAt": now()}  # fmt: skip
        if message := self._message(code):
            ended["message"] = message
        seen.state = {"terminated": ended}
        return True

    def condemned(self) -> tuple[str, float | None] | None:
        """Why a probe wants it killed, and within how many seconds if the probe says so."""
        return self._condemned if self.deadline is None else None

    def stop(self, seconds: float, later: Callable[[], bool] = lambda: False) -> None:
        """preStop, then (when `later` says so no more) SIGTERM, then SIGKILL, all within so many seconds.

        Called again it only shortens the time. 0: SIGKILL at once.
        """
        deadline = time.monotonic() + seconds
        if self.process is None:
            return
        if self.deadline is not None:
            self.deadline = min(self.deadline, deadline)
            return
        self.deadline = deadline  # it stays ready as long as its probe says so: it may still answer what comes
        self._events.say("Killing", f"Stopping container {self.name}", container=self.name)
        threading.Thread(target=self._stop, args=(self.process, seconds, later), daemon=True).start()

    def kill(self) -> None:
        """It is gone when this returns."""
        for prober in self._probers:
            prober.stop()
        if self.process is not None:
            self.process.kill()

    def _stop(self, process: Namespaced, seconds: float, later: Callable[[], bool]) -> None:
        def left() -> float:
            return (self.deadline or 0.0) - time.monotonic() if process.ended() is None else 0.0

        hook = (self.spec.get("lifecycle") or {}).get("preStop")
        if hook and "sleep" in hook:
            until = time.monotonic() + hook["sleep"]["seconds"]
            while left() > 0 and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
        elif hook and left() > 0 and (wrong := self._ask(hook, left())):
            self._events.say("FailedPreStopHook", f"PreStopHook failed: {wrong}", container=self.name, warning=True)
        while left() > 0 and later():
            time.sleep(POLL_SECONDS)
        if seconds > 0:
            process.signal(self._signal)
            least = time.monotonic() + MINIMUM_SECONDS
            while process.ended() is None and time.monotonic() < max(least, self.deadline or 0.0):
                time.sleep(POLL_SECONDS)
        process.signal(signal.SIGKILL)
        self._wake()

    def _ask(self, handler: dict[str, Any], seconds: float) -> str:
        return probes.ask(handler, self.spec, self._address, self._execute, seconds)

    def _execute(self, command: list[str], seconds: float) -> tuple[int, str]:
        number = threading.get_ident()
        return execute({**self._exec, "command": command}, self._folder / f"exec-{number}.json", seconds)

    def _probe(self, kind: str, process: Namespaced) -> None:
        def report(good: bool, message: str) -> None:
            if self.process is process:
                self._verdict(kind, good, message, process)
                self._wake()

        probe = self.spec[kind]
        prober = Prober(probe, lambda seconds: self._ask(probe, seconds), report, once=kind == "startupProbe")
        self._probers.append(prober)
        prober.start()

    def _probe_on(self, process: Namespaced) -> None:
        for kind in ("livenessProbe", "readinessProbe"):
            if kind in self.spec:
                self._probe(kind, process)

    def _verdict(self, kind: str, good: bool, message: str, process: Namespaced) -> None:
        name = kind.removesuffix("Probe").capitalize()
        if not good:
            self._events.say("Unhealthy", f"{name} probe failed: {message}", container=self.name, warning=True)
        if kind == "readinessProbe":
            self.seen.ready = good
        elif not good:
            grace = self.spec[kind].get("terminationGracePeriodSeconds")
            self._condemned = f"Container {self.name} failed {name.lower()} probe, will be restarted", grace
        elif kind == "startupProbe":
            self.seen.started = True
            self.seen.ready = "readinessProbe" not in self.spec
            self._probe_on(process)

    def _message(self, code: int) -> str:
        with contextlib.suppress(OSError):
            said = (self._folder / "termination").read_bytes()[-MESSAGE_BYTES:].decode(errors="replace")
            if said or code == 0 or self.spec.get("terminationMessagePolicy") != "FallbackToLogsOnError":
                return said
            return Path(self._exec["log"]).read_text(errors="replace")[-2048:]
        return ""


def _signal(name: str) -> signal.Signals:
    if not name:
        return signal.SIGTERM
    return signal.Signals(int(name)) if name.isdigit() else signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"]
