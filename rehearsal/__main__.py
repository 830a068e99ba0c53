"""Command line of the rehearsal: `make rehearse` calls it."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import shlex
import sys
import time
from pathlib import Path

import httpx

from common import exits, logs
from common.chat import prompt_messages
from common.files import read_jsonl
from common.processes import Processes, interrupt
from common.settings import SettingsError
from rehearsal.chain import Chain, StageFailed, default_specs
from stress import report


def main(argv: list[str] | None = None) -> int:
    """Run the chain, write the report, and leave no process behind. Exit 0: promoted, served, stressed, drilled."""
    parser = argparse.ArgumentParser("python -m rehearsal", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="output folder [%(default)s]")
    parser.add_argument(
        "--adapter", type=Path, action="append", metavar="SPEC",
        help="tuning settings of an adapter to rehearse, may be repeated; the first is the report's main one "
        "[the rehearsal's own two]",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="leave the replicas up at the end, until Ctrl-C")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    os.environ.setdefault(logs.CHOICE, "text")  # people read it, through a pipe too
    interrupt()

    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        lock = (arguments.out / ".lock").open("w")
    except OSError as error:
        print(f"--out: {arguments.out}: cannot be written to: {error}", file=sys.stderr)
        return exits.INPUT
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"another rehearsal is writing to {arguments.out}; wait for it, or choose another --out",
                file=sys.stderr,
            )
            return exits.INPUT
        with Processes() as processes:
            chain = Chain(arguments.adapter or list(default_specs()), arguments.out, processes)
            try:
                return _rehearse(chain, keep=arguments.keep)
            except KeyboardInterrupt as stop:
                print("\ninterrupted: stopping every process (the next run resumes the tuning)", file=sys.stderr)
                return exits.stopped(stop)


def _rehearse(chain: Chain, *, keep: bool) -> int:
    started = time.monotonic()
    code, message = exits.OK, ""
    try:
        chain.run()
    except SettingsError as error:  # nothing ran: there is nothing to report
        print(error, file=sys.stderr)
        return exits.INPUT
    except StageFailed as error:
        code, message = error.code, str(error)
    except (RuntimeError, TimeoutError, OSError, httpx.HTTPError) as error:
        code, message = exits.FAILED, str(error)
    chain.save()
    if written := report.main([str(chain.out)]):
        return code or int(written)
    minutes = (time.monotonic() - started) / 60
    if code:
        print(f"\nREHEARSAL STOPPED after {minutes:.1f} min: {message}", file=sys.stderr)
    else:
        print(f"\nREHEARSAL PASSED in {minutes:.1f} min", file=sys.stderr)
    print(f"report: {chain.out / 'report.html'}  figures: {chain.out / 'report.json'}", file=sys.stderr)
    if keep and chain.fleet and not code:
        _keep(chain)
    if chain.fleet:
        chain.fleet.stop()
    return code


def _keep(chain: Chain) -> None:
    """Leave the replicas up until Ctrl-C, with a question that they can be asked: one that tuning never saw."""
    assert chain.fleet
    main = chain.tuning[0]
    row = next(read_jsonl(chain.run_folder(main) / "held_out.jsonl"))
    body = json.dumps({"model": main.adapter, "messages": prompt_messages(row), "temperature": 0})
    print("\nThe replicas stay up until Ctrl-C. Try:", file=sys.stderr)
    print(f"  curl {chain.fleet.router}/v1/chat/completions -H 'Content-Type: application/json' \\", file=sys.stderr)
    print(f"    -d {shlex.quote(body)}", file=sys.stderr)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    sys.exit(main())
