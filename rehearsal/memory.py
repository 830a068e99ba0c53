"""The peak of the memory that a rehearsal takes, with all its processes."""

from __future__ import annotations

import threading
import time

import psutil


class MemoryWatch(threading.Thread):
    """Keeps the peak of the bytes that this process and all below it hold; shared pages count once (PSS)."""

    def __init__(self, seconds: float = 5.0) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._seconds = seconds

    def run(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, OSError):
                    continue  # ended meanwhile
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(self._seconds)
