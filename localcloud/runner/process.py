"""A process in namespaces of its own, started through `enter.py`, and what it writes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from common.processes import die_with_parent
from localcloud.runner import enter
from localcloud.runner.logs import entry, times_file

START_SECONDS = 30.0  # a tenth of one on an idle machine
_dies = lambda: die_with_parent(signal.SIGKILL)  # noqa: E731


class StartError(RuntimeError):
    """The process could not be started; the text is for a person."""


class Namespaced:
    """Runs `enter.py KIND` with `spec`; `log` gets its output (else it is dropped).

    The process dies with the thread that makes this. Raises `StartError`.
    """

    pid: int
    """Of the process itself, as this machine counts."""

    def __init__(self, kind: str, spec: dict[str, Any], spec_file: Path, log: Path | None = None) -> None:
        spec_file.parent.mkdir(parents=True, exist_ok=True)
        spec_file.touch(mode=0o600)  # it has the values of Secrets
        spec_file.write_text(json.dumps(spec))
        told, telling = os.pipe()
        try:
            self._process = subprocess.Popen(
                command(kind, spec_file, telling),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if log else subprocess.DEVNULL,
                stderr=subprocess.STDOUT if log else subprocess.DEVNULL,
                pass_fds=[telling],
                start_new_session=True,
                preexec_fn=_dies,
            )
        finally:
            os.close(telling)
        self._copying = threading.Thread(target=self._copy, args=(log,), daemon=True)
        if log is not None:
            self._copying.start()
        try:
            self.pid = self._hear(told)
        except StartError:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            os.close(told)
            spec_file.unlink()

    def _hear(self, told: int) -> int:
        heard = b""
        while select.select([told], [], [], START_SECONDS)[0]:
            piece = os.read(told, 4096)
            if not piece:
                break
            heard += piece
        lines = [json.loads(line) for line in heard.splitlines()]
        errors = [line["error"] for line in lines if "error" in line]
        if errors or not lines:
            raise StartError(errors[0] if errors else "the process could not be prepared")
        return int(lines[0]["pid"])

    def _copy(self, log: Path | None) -> None:
        assert log is not None and self._process.stdout is not None
        log.parent.mkdir(parents=True, exist_ok=True)
        times_of = times_file(log)
        with (
            log.open("ab", buffering=0) as file,
            times_of.open("ab", buffering=0) as times,
            self._process.stdout as output,
        ):
            while piece := os.read(output.fileno(), 65536):
                file.write(piece)
                times.write(entry(file.tell()))

    def ended(self) -> int | None:
        """The exit code, 128 + the signal where it was killed by one; None while it runs. Then the log is whole."""
        code = self._process.poll()
        if code is None:
            return None
        if self._copying.is_alive():
            self._copying.join(1.0)
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """It is gone when this returns."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def command(kind: str, spec_file: Path, fd: int) -> list[str]:
    return [sys.executable, "-I", "-S", str(enter.__file__), kind, str(spec_file), str(fd)]


def execute(spec: dict[str, Any], spec_file: Path, seconds: float) -> tuple[int, str]:
    """Run a command in a running container: its exit code and the end of its output. Raises TimeoutError."""
    spec_file.parent.mkdir(parents=True, exist_ok=True)
    spec_file.touch(mode=0o600)
    spec_file.write_text(json.dumps(spec))
    told, telling = os.pipe()
    try:
        done = subprocess.run(
            command("exec", spec_file, telling),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[telling],
            start_new_session=True,
            preexec_fn=_dies,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f'command "{" ".join(spec["command"])}" timed out after {seconds:g}s') from None
    finally:
        os.close(told)
        os.close(telling)
        spec_file.unlink()
    return done.returncode, done.stdout.decode(errors="replace")[-1000:].strip()
