"""Child processes: each in a session of its own, none left behind whatever happens to the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # prctl(2)
# Loaded before the fork: after it, another thread may hold the loader's lock. prctl is Linux's alone.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
ENDING = tuple(number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP"))  # Windows has two
STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL: enough for a tuning step and its checkpoint


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """`preexec_fn`: this signal when the parent is killed outright and can clean nothing up."""
    if _libc:
        _libc.prctl(PR_SET_PDEATHSIG, number)


class Processes:
    """Starts processes and ends them all; use as a context manager."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_all()

    def start(
        self,
        command: Sequence[str],
        *,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
        at_our_death: int = signal.SIGTERM,
    ) -> subprocess.Popen[bytes]:
        """Start `command` in its own session; its output is added to `log`, or shown where there is none.

        `at_our_death` is the signal that it gets when we are killed outright.
        """
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab")
        try:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the processes are ending")
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=os.environ | dict(environment or {}),
                    start_new_session=True,
                    preexec_fn=partial(die_with_parent, at_our_death),
                )
                self._running.append(process)
                return process
        finally:
            if output is not None:
                output.close()

    def run(self, command: Sequence[str], *, stdout: Path | None = None) -> int:
        """Run `command` to its end and return its exit code; its standard output goes to `stdout` if given."""
        with self._lock:
            output = stdout.open("wb") if stdout else None
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True, preexec_fn=die_with_parent
            )
            self._running.append(process)
        try:
            return process.wait()
        finally:
            if output is not None:
                output.close()
            if process.poll() is not None:
                self._forget(process)

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        _signal_group(process, signal.SIGKILL)  # what it may have left in its group
        with self._lock:
            if process in self._running:
                self._running.remove(process)

    def stop_all(self) -> None:
        """SIGTERM to all groups, and SIGKILL to those that are not gone after `STOP_SECONDS`."""
        with uninterrupted():
            with self._lock:
                self._closed = True
                running, self._running = self._running, []
            for process in running:
                _signal_group(process, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
                _signal_group(process, signal.SIGKILL)
                process.wait()


def interrupt() -> None:
    """Have each signal that ends this process raise KeyboardInterrupt with its number, so that all is cleaned up."""

    def end(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    for number in ENDING:  # SIGINT too: a script may have left it ignored
        signal.signal(number, end)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A second signal must not leave half of them running; `timeout` before make sends two SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group is gone
        os.killpg(process.pid, number)


def python(module: str, *arguments: str | Path) -> list[str]:
    """The command that runs `python -m module` with this interpreter."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def wait_for(condition: Callable[[], bool], timeout_seconds: float, what: str, check: Callable[[], None]) -> float:
    """Seconds until `condition()`; `check` raises when waiting is pointless. Raises TimeoutError naming `what`."""
    started = time.monotonic()
    while not condition():
        check()
        if time.monotonic() - started > timeout_seconds:
            raise TimeoutError(f"{what}: not within {timeout_seconds:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - started


def free_ports(count: int) -> list[int]:
    """`count` ports of the loopback interface that nobody listens on now.

    None that Linux gives to a connection (32768 and up): a server that is started again must find its own free.
    """
    found: set[int] = set()
    numbers = random.SystemRandom()  # another's seed would give two processes the same ports
    for _ in range(1000 * count + 1):
        if len(found) == count:
            return list(found)
        port = numbers.randrange(12_000, 30_000)
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            found.add(port)
    raise OSError(f"no {count} free ports from 12000 to 29999 on 127.0.0.1")
