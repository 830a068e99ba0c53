"""What a child process does before it becomes its program."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None)  # loaded before the fork: after it, another thread may hold the loader's lock


def die_with_parent() -> None:
    """`preexec_fn`: SIGTERM when the parent is killed outright and can clean nothing up."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
