"""Who may come in now: requests of one client at once, and room in the engine, low tiers turned away first.

The engine's figures are those of its last step. A burst arrives between two steps, so what this process itself let in
counts as well: whatever exceeds `max_num_seqs` must wait.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable

from serving import gauges
from serving.errors import Refusal
from serving.keys import Caller

RATE_SECONDS = 30.0
"""The time over which finished requests are counted, to say when there will be room again."""
LONGEST_RETRY = 60


class Admission:
    """Counts what is in flight. `enter` before a request is read, `leave` once it was answered."""

    def __init__(
        self,
        max_num_seqs: int,
        *,
        waiting: Callable[[], float] = gauges.waiting,
        kv_cache_usage: Callable[[], float] = gauges.kv_cache_usage,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_num_seqs, self._waiting, self._kv_cache_usage, self._clock = (
            max_num_seqs, waiting, kv_cache_usage, clock,
        )  # fmt: skip
        self._of_client: Counter[str] = Counter()
        self._finished: deque[float] = deque(maxlen=1000)
        self.in_flight = 0

    def enter(self, caller: Caller) -> None:
        """Count a request of `caller` in. Raises `Refusal` (429, with Retry-After) where there is no room for it."""
        limits = caller.limits
        if limits.concurrency is not None and self._of_client[caller.client] >= limits.concurrency:
            raise _full(
                f"{limits.concurrency} requests of {caller.client or 'one client'} at once are allowed on a replica "
                f"(tier {caller.tier}), and that many are being answered",
                "concurrency_limit_exceeded",
                1,
            )
        waiting = max(int(self._waiting()), self.in_flight - self._max_num_seqs)
        if waiting >= limits.waiting:
            raise _full(
                f"{waiting} requests are waiting on this replica; the limit of tier {caller.tier} is {limits.waiting}",
                "rate_limit_exceeded",
                self._until(waiting - limits.waiting + 1),
            )
        if (usage := self._kv_cache_usage()) >= limits.kv_cache:
            raise _full(
                f"{usage:.0%} of the KV cache of this replica are in use; the limit of tier {caller.tier} is "
                f"{limits.kv_cache:.0%}",
                "rate_limit_exceeded",
                self._until(1),
            )
        self._of_client[caller.client] += 1
        self.in_flight += 1

    def leave(self, caller: Caller) -> None:
        """Count a request out that `enter` counted in."""
        self._of_client[caller.client] -= 1
        if not self._of_client[caller.client]:
            del self._of_client[caller.client]
        self.in_flight -= 1
        self._finished.append(self._clock())

    def _until(self, requests: int) -> int:
        """Seconds until that many more requests will have ended, by the rate of the last ones; 1 to LONGEST_RETRY."""
        since = self._clock() - RATE_SECONDS
        recent = sum(1 for at in self._finished if at >= since)
        return min(LONGEST_RETRY, max(1, math.ceil(requests * RATE_SECONDS / recent))) if recent else LONGEST_RETRY // 6


def _full(message: str, code: str, seconds: int) -> Refusal:
    return Refusal(429, f"{message}; try again in {seconds} s", code, retry_after=seconds)
