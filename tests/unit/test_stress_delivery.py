"""The report's way into Blob Storage."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import exits

STUCK = """
import sys, time
if sys.argv[1] == "load":  # as `python -m stress run`; the drills do without gevent
    from gevent import monkey
    monkey.patch_all()
from pathlib import Path
from stress import delivery, report

class Folder:
    address = "az://account/container/x"
    def push(self, out, quiet):
        print("under way", flush=True)
        time.sleep(60)

report.main = lambda argv: 0
delivery.deliver(Path("out"), Folder())
"""


@pytest.mark.parametrize("who", ["load", "drills"])
def test_a_pod_that_is_told_to_end_does_not_wait_for_a_blob_service_that_hangs(who: str) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", STUCK, who], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "under way\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == exits.TERMINATED
