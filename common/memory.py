"""The peak of the memory that a run takes, with all its processes."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import psutil


class MemoryWatch(threading.Thread):
    """Keeps the peak of the bytes that this process and all below it hold; shared pages count once (PSS).

    `others` are further processes that count, with all below them; it may grow.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.others: list[int] = []
        self._seconds = seconds

    def run(self) -> None:
        while True:
            total = 0
            for process in self._all():
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, OSError):
                    continue  # ended meanwhile
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(self._seconds)

    def _all(self) -> set[psutil.Process]:
        found: set[psutil.Process] = set()
        for number in (os.getpid(), *self.others):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(number)
                found |= {process, *process.children(recursive=True)}
        return found
