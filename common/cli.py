"""How every command ends: a problem told in words, and the exit code that goes with it."""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
from collections.abc import Callable

from common import exits, logs
from common.settings import SettingsError

log = logging.getLogger(__name__)


def run(
    command: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    *,
    log_format: str = "%(message)s",
    failures: tuple[type[Exception], ...] = (),
    machines_read: bool = False,
) -> int:
    """Run `command` and return its exit code; `failures` are errors of others (a store, a server) without traceback.

    `machines_read`: where no terminal shows it, all that is said on standard error is one JSON object a line.
    """
    try:
        as_json = machines_read and logs.wants_json()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return exits.INPUT
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logs.JsonLines() if as_json else logging.Formatter(log_format))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(as_json)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    try:
        code = command(arguments)
        sys.stdout.flush()  # here, where it is known what a failure means
        return code
    except SettingsError as error:
        for problem in error.problems if as_json else [str(error)]:
            tell(problem, as_json=as_json)
        return exits.INPUT
    except failures as error:
        if not (isinstance(error, BrokenPipeError) and _reader_left()):
            tell(str(error), as_json=as_json)
        return exits.FAILED
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return exits.FAILED
        if not as_json:
            raise
        log.critical("%s: %s", type(error).__name__, error, exc_info=True)
        return exits.FAILED


def host_port(text: str, option: str) -> tuple[str, int]:
    """`HOST:PORT`, given as `option`, as such. Raises `SettingsError`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise SettingsError([f"{option}: {text!r}: not an address such as 127.0.0.1:5557"])
    return host.strip("[]"), int(port)


def metrics_address(text: str) -> tuple[str, int] | None:
    """That of `--metrics-address`, None for `off`. Raises `SettingsError`."""
    return None if text == "off" else host_port(text, "--metrics-address")


def _reader_left() -> bool:
    """Whether nobody reads standard output any more, as after `| head`; what it still holds is dropped then."""
    left = True
    if hasattr(select, "poll"):  # not on Windows
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        left = any(event & select.POLLERR for _, event in output.poll(0))  # poll(2): a pipe whose reading end is closed
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def tell(problem: str, *, as_json: bool) -> None:
    """Say on standard error why the command ends."""
    print(logs.line("error", problem) if as_json else problem, file=sys.stderr)
