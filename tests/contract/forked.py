"""`python -m training` in a process of its own that need not import torch again: a child of multiprocessing's forkserver.

A process as any other to signals, limits and files; seven of them start in the time that one import takes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["training.__main__", "training.tune", "blobs.store"])


def start(arguments: list[str], log: Path, copy_seconds: float = 60.0, **environment: str) -> ForkServerProcess:
    """`python -m training ARGUMENTS`; what it says goes to the end of `log`. A copy may hold it for `copy_seconds`."""
    process = _CONTEXT.Process(target=_run, args=(arguments, str(log), copy_seconds, environment), daemon=True)
    process.start()
    return process


def _run(arguments: list[str], log: str, copy_seconds: float, environment: dict[str, str]) -> None:
    from training import checkpoint
    from training.__main__ import main

    checkpoint.COPY_SECONDS = copy_seconds

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.exit(main(arguments))
