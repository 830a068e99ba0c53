"""How every command ends: a problem told in words, and the exit code that goes with it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

from common import exits
from common.settings import SettingsError


def run(
    command: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    *,
    log_format: str = "%(message)s",
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """Run `command` and return its exit code; `failures` are errors of others (a store, a server) without traceback."""
    logging.basicConfig(format=log_format, level=logging.INFO, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    try:
        return command(arguments)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return exits.INPUT
    except failures as error:
        print(error, file=sys.stderr)
        return exits.FAILED
    except KeyboardInterrupt:
        return exits.INTERRUPTED
