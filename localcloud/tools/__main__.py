"""Command line: `python -m localcloud.tools` builds what is missing, `make tools` calls it; `--check` only says."""

from __future__ import annotations

import argparse
import fcntl
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import exits
from common.processes import interrupt
from localcloud.tools import DISK, ROOT, ToolsMissing, locate, missing, missing_line
from localcloud.tools.build import GIB, Build, BuildFailed
from localcloud.tools.machine import go_problem, released
from localcloud.tools.modules import MODULES, Module

QUIET_SECONDS = 60  # between two lines of progress where no terminal shows them
PRIOR_SECONDS = 60


def main(argv: list[str] | None = None) -> int:
    """Exit 0: all are there; 1: a build failed; 2: something is missing here, and one line says what."""
    parser = argparse.ArgumentParser("python -m localcloud.tools", description=__doc__)
    parser.add_argument("--check", action="store_true", help="build nothing, only say what is missing (exit code 2)")
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="DIR", help="the binaries go to DIR/.engine [the checkout]"
    )
    arguments = parser.parse_args(argv)
    root = arguments.root.resolve()
    interrupt()
    try:
        if not arguments.check:
            _build(root / ".engine")
        locate(root)
    except ToolsMissing as error:
        print(error, file=sys.stderr)
        return exits.INPUT
    except (BuildFailed, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return exits.FAILED
    except KeyboardInterrupt as stop:
        print("\ninterrupted: what is complete stays, the next run goes on from there", file=sys.stderr)
        return exits.stopped(stop)
    for module in MODULES:
        for name in module.binaries:
            if other := released(module, name):
                print(f"{name}: the released {other.version} at {other.path} is used")
    print(f"complete; built parts are in {root / '.engine'}")
    return exits.OK


def _build(engine: Path) -> None:
    """Build the missing modules into `engine`, one after the other."""
    engine.mkdir(parents=True, exist_ok=True)
    with (engine / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build into {engine}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        absent = missing(engine)
        if absent and go_problem():
            raise ToolsMissing([missing_line([name for _, names in absent for name in names])])
        todo = [module for module, _ in absent]
        if todo:
            print(_disk(), flush=True)
        progress = Progress(todo)
        build = Build(engine, progress.tick)
        for module in todo:
            progress.begin(module)
            build.module(module)
            progress.end()
        build.sweep()


def _disk() -> str:
    """What it takes, where it goes, and how much is free there."""
    said = subprocess.run(["go", "env", "GOCACHE", "GOMODCACHE"], capture_output=True, text=True, check=True, cwd="/")
    caches = said.stdout.splitlines()
    there = next(path for path in [Path(caches[0]), *Path(caches[0]).parents] if path.exists())
    free = shutil.disk_usage(there).free / GIB
    return (
        f"needs up to 5 GB of memory and {DISK}, nearly all of it for Go's caches ({', '.join(caches)}), which may be "
        f"emptied afterwards by `go clean -cache -modcache`; {free:.0f} GB of disk are free"
    )


class Progress:
    """One line: which module, how long so far, and what remains by the measured times of cold caches on two cores."""

    def __init__(self, modules: list[Module]) -> None:
        self._modules = modules
        self._at = -1
        self._started = self._begun = self._told = time.monotonic()

    def begin(self, module: Module) -> None:
        self._at = self._modules.index(module)
        self._begun = time.monotonic()
        self._tell()

    def tick(self) -> None:
        if sys.stdout.isatty() or time.monotonic() - self._told >= QUIET_SECONDS:
            self._tell()

    def end(self) -> None:
        took = time.monotonic() - self._begun
        self._line(f"{self._name()}: done in {_clock(took)}")
        if sys.stdout.isatty():
            print(flush=True)

    def remaining(self, now: float) -> float:
        """Seconds: the measured times of what is not done, by how fast this machine was with what is."""
        done = sum(module.seconds for module in self._modules[: self._at])
        # As if one more, of PRIOR_SECONDS, had gone as measured: the small ones alone tell little of the big ones.
        pace = (self._begun - self._started + PRIOR_SECONDS) / (done + PRIOR_SECONDS)
        left = max(0.0, self._modules[self._at].seconds * pace - (now - self._begun))
        return left + pace * sum(module.seconds for module in self._modules[self._at + 1 :])

    def _name(self) -> str:
        return f"[{self._at + 1}/{len(self._modules)}] {self._modules[self._at].name}"

    def _tell(self) -> None:
        now = self._told = time.monotonic()
        self._line(
            f"{self._name()}: {_clock(now - self._begun)} so far, about {_clock(self.remaining(now))} remain in all"
        )

    def _line(self, text: str) -> None:
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="", flush=True)  # one line, written over
        else:
            print(text, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    sys.exit(main())
