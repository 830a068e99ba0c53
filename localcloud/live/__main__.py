"""`python -m localcloud.live`: the whole stack on one machine, its pods really running (make local, make local-down).

    python -m localcloud.live up                    bring it up, tune, serve, drill; writes out/local.json, leaves it up
    python -m localcloud.live up --drills none      only bring it up
    python -m localcloud.live down                  end it and remove what it wrote; built images stay

Needs root on Linux; nothing outside of its own namespaces is changed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from artifacts.store import StoreError
from common import exits
from common.processes import interrupt, uninterrupted
from common.settings import SettingsError
from localcloud.api import ApiError
from localcloud.cli import PulumiFailed
from localcloud.live import attach, machine
from localcloud.live.chain import DRILLS, Chain
from localcloud.live.drills import DrillFailed
from localcloud.tools import ROOT
from stress.drills import NotMeasuredError

FAILURES = (  # TimeoutError is an OSError
    DrillFailed, NotMeasuredError, attach.NotUp, PulumiFailed, ApiError, StoreError, subprocess.TimeoutExpired, OSError,
)  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m localcloud.live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument(
        "--drills",
        default=",".join(DRILLS),
        metavar="NAME,NAME",
        help="which of them; none: only bring it up [%(default)s]",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="gets local/ and local.json (default: out)")
    parser.add_argument("--images", type=Path, default=ROOT / ".images", help="store of built images: .images")
    options = parser.parse_args(arguments)
    folder = options.out / "local"
    wanted = [name for name in options.drills.split(",") if name != "none"]
    if unknown := set(wanted) - set(DRILLS):
        parser.error(f"--drills: {', '.join(sorted(unknown))}: not among {', '.join(DRILLS)}, none")
    try:
        if options.command == "down":
            if os.geteuid():
                raise SettingsError(["root is needed: sudo make local-down"])
            with attach.alone(folder, end_other=True) as ended:
                return _down(folder, options.images, ended)
        machine.check(folder.resolve(), options.images)
        with attach.alone(folder):
            return _up(folder, options, wanted)
    except SettingsError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return exits.INPUT
    except FAILURES as error:
        print(f"{error}\nwhat is up stays up, to be looked at: make local-down ends it", file=sys.stderr)
        return exits.FAILED
    except KeyboardInterrupt as stop:  # before anything was started
        return exits.stopped(stop)


def _up(folder: Path, options: argparse.Namespace, wanted: list[str]) -> int:
    chain = Chain(folder.resolve(), options.images.resolve(), options.out.resolve() / "local.json")
    print(f"at most {machine.disk_gib(options.images)} GiB of disk will be used, in {options.images} and {folder}")
    try:
        return exits.OK if chain.run(wanted) else exits.FAILED
    except KeyboardInterrupt as stop:
        with uninterrupted():
            attach.stop(folder)
            print("interrupted: nothing is left running; what it wrote stays, and make local goes on", file=sys.stderr)
        return exits.stopped(stop)


def _down(folder: Path, images: Path, ended: bool) -> int:
    was_up = attach.stop(folder) or ended
    attach.remove(folder)
    left = f"; built images stay in {images}: rm -r {images} removes them" if images.exists() else ""
    print(f"{'ended' if was_up else 'nothing was up'}; {folder} is removed{left}")
    return exits.OK


if __name__ == "__main__":
    interrupt()
    sys.exit(main(sys.argv[1:]))
