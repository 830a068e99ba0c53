"""Whether the engine still moves: vLLM's own /health answers 200 while its engine process hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

from serving.gauges import progress as engine_progress


class Heartbeat:
    """Watches one engine. `look()` is one pass; the caller repeats it, each second or so.

    `progress` gives something that changes when the engine moves. A limit below what loading an adapter takes, for
    which the engine computes nothing, would call a healthy engine stalled.
    """

    def __init__(
        self,
        limit_seconds: float,
        progress: Callable[[], Hashable] = engine_progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit_seconds, self._progress, self._clock = limit_seconds, progress, clock
        self._seen = progress()
        self._since: float | None = None  # None: there was nothing to move for at the last look
        self._seconds = 0.0

    def look(self, in_flight: int) -> float:
        """Seconds for which requests have been in flight (`in_flight` of them now) without a move of the engine.

        Count only requests that the engine has: who is slow to send one must not look like a hang. A stalled engine
        stays so when its clients give up, until it moves: else it would look well until new ones have waited as long.
        """
        now, progress = self._clock(), self._progress()
        if progress != self._seen:
            self._seen, self._since = progress, None
        if not in_flight and not self.stalled:
            self._since = None
        elif in_flight and self._since is None:
            self._since = now
        self._seconds = 0.0 if self._since is None else now - self._since
        return self._seconds

    @property
    def stalled(self) -> bool:
        """Whether that had reached the limit at the last look."""
        return self._seconds >= self.limit_seconds
