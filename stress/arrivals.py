"""When requests of an open loop are due, and what each request asks: seeded, and each share kept within the others."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping

from stress.prompts import Turns
from stress.spec import LoadSpec


def due_seconds(rate: float, ramp_seconds: float, seed: int | str) -> Iterator[float]:
    """Seconds from the start at which requests are due: a Poisson process, without end.

    Its rate rises evenly from 0 to `rate` (1/s) over `ramp_seconds` and then stays. Made from a process of rate 1 by
    the inverse of the expected count (Cinlar's time change), so the ramp is Poisson as well. Unlike `vllm bench serve`
    the times are not stretched afterwards to fit the mean rate exactly: in n arrivals it is off by about 1/sqrt(n).
    Processes with seeds of their own are independent, so several of them together are a Poisson process at the sum of
    their rates, in the ramp as well: that is how workers share one.
    """
    chance = random.Random(f"{seed}/arrivals")
    count, in_ramp = 0.0, rate * ramp_seconds / 2
    while True:
        count += chance.expovariate(1.0)
        if count < in_ramp:
            yield math.sqrt(2 * ramp_seconds * count / rate)
        else:
            yield ramp_seconds + (count - in_ramp) / rate


class Mix:
    """Client, model, length and kind of each request, in turn by their shares.

    Each share is kept within what was chosen before it: two of one half each would otherwise go in step, and one
    adapter would get all the long prompts.
    """

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self._turns: dict[tuple[object, ...], Turns] = {}

    def client(self) -> str | None:
        """The next client; None if there is none to choose."""
        return self._next(("client",), self.spec.clients) if self.spec.clients else None

    def users(self) -> Iterator[tuple[str | None, bool]]:
        """Of each user of a closed loop its client, and whether it streams; without end."""
        while True:
            client = self.client()
            yield client, self.stream(client)

    def model(self, client: str | None) -> str:
        """The next model of `client`."""
        return self._next(("model", client), self.spec.models)

    def stream(self, *within: str | None) -> bool:
        """Whether the next one streams."""
        return self._one_of(("stream", *within), self.spec.stream_share)

    def long(self, *within: str | bool | None) -> bool:
        """Whether the next one has a long prompt."""
        return self._one_of(("long", *within), self.spec.long_share)

    def _one_of(self, key: tuple[object, ...], share: float) -> bool:
        return share > 0 and self._next(key, {"no": 1 - share, "yes": share}) == "yes"

    def _next(self, key: tuple[object, ...], weights: Mapping[str, float]) -> str:
        return self._turns.setdefault(key, Turns(weights)).next()
