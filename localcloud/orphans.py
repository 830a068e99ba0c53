"""Plugins end with the engine that started them: an engine that is killed outright cannot end them.

`python -m localcloud.orphans MODULE ARGUMENT...` runs a module of others, such as `pulumi.dynamic`, that way.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

SECONDS = 1.0  # between two looks


def end_with_parent() -> None:
    """From now on, end this process when its parent is gone.

    Not by prctl's signal at the parent's death: it comes when the thread ends that started us, and the engine's threads
    come and go.
    """
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os._exit(1)


if __name__ == "__main__":
    end_with_parent()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
