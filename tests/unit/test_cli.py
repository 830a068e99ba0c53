"""How a command ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import argparse, sys
from common import cli

def command(_):
    for number in range(int(sys.argv[1])):
        print(number)
    if sys.argv[2:]:
        raise BrokenPipeError("the store hung up")
    return 0

sys.exit(cli.run(command, argparse.Namespace(), failures=(OSError,) if sys.argv[2:] == ["known"] else ()))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [3, 100_000])  # of what one write takes, and far more
def test_a_reader_that_has_enough_is_no_error(lines: int, unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", SCRIPT, str(lines)]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, env=environment, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("kind", "traceback"), [("known", False), ("bug", True)])
def test_another_broken_pipe_is_told(kind: str, traceback: bool) -> None:
    command = [sys.executable, "-c", SCRIPT, "3", kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "0\n1\n2\n")
    assert "the store hung up" in done.stderr and ("Traceback" in done.stderr) == traceback
