"""Every request counted by alias, tier and outcome, and timed: vLLM's own metrics know only the base model."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from serving.errors import Refusal, from_vllm

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# The bounds of vLLM's own histograms (vllm/v1/metrics/loggers.py), so that both can be laid over each other.
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

REQUESTS = Counter(
    "drydock_requests",
    "Requests by alias, tier and outcome: ok, client_gone, error, or the code of the refusal.",
    ["model", "tier", "outcome"],
)
TTFT = Histogram(
    "drydock_time_to_first_token_seconds",
    "From the request to the first part of a streamed answer.",
    ["model", "tier"],
    buckets=_TTFT,
)
SECONDS = Histogram(
    "drydock_request_seconds", "From the request to the end of a whole answer.", ["model", "tier"], buckets=_SECONDS
)
IN_FLIGHT = Gauge("drydock_requests_in_flight", "Requests that are being answered.", ["tier"])
STALLED = Gauge(
    "drydock_engine_stalled_seconds", "For how long requests have been in flight without a step of the engine."
)


EVENT = b"data: "
_ERROR_EVENT = EVENT + b'{"error"'  # vLLM's word for a stream that it cannot go on with


class Answer:
    """A `send` that passes vLLM's answer on, errors in OpenAI's shape, and notes how it went.

    The head of a stream waits for its first event: vLLM says 200 before it has looked at the request as a whole, and an
    error that comes first is an answer with that error's status.
    """

    def __init__(self, send: Send, tier: str = "") -> None:
        self.tier, self.model, self.grammar = tier, "", False
        self.outcome: str | None = None
        self.awaited: Callable[[int], None] = lambda _: None  # told -1 and +1 around the time a client takes to read
        self.refine: Callable[[Refusal], Awaitable[Refusal]] | None = None  # says more about an error, where it can
        self._send, self._started = send, time.perf_counter()
        self._head: Message | None = None  # what waits to be sent
        self._body = b""
        self._streams = self._broken = self._over = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
            )
            self._head = message
            return
        if message["type"] != "http.response.body" or self._over:
            return
        part, last = message.get("body", b""), not message.get("more_body")
        head = self._head
        if head is not None and head["status"] >= 400:
            self._body += part
            if last:
                await self._tell(head, from_vllm(head["status"], self._body, grammar=self.grammar))
            return
        if head is not None:
            if self._streams and not part and not last:
                return
            if self._streams and part.startswith(_ERROR_EVENT):
                return await self._tell(head, self._refusal_in(part))
            if self._streams:
                TTFT.labels(self.model, self.tier).observe(time.perf_counter() - self._started)
            self._head = None
            await self._pass(head)
        elif self._streams and part.startswith(_ERROR_EVENT):
            self._broken = True
            message = {**message, "body": EVENT + self._refusal_in(part).body + b"\n\n"}
        if last:
            self.outcome = "error" if self._broken else "ok"
        await self._pass(message)

    async def _pass(self, message: Message) -> None:
        self.awaited(-1)
        try:
            await self._send(message)
        finally:
            self.awaited(+1)

    def _refusal_in(self, event: bytes) -> Refusal:
        """The error that an event of a stream tells."""
        text = event[len(EVENT) :].split(b"\n", 1)[0]
        try:
            status = json.loads(text)["error"]["code"]
        except (ValueError, LookupError, TypeError):
            status = 500
        known = isinstance(status, int) and 400 <= status < 600
        return from_vllm(status if known else 500, text, grammar=self.grammar)

    async def _tell(self, head: Message, refusal: Refusal) -> None:
        self._over = True
        if self.refine:
            refusal = await self.refine(refusal)
        self.outcome = "error" if refusal.status >= 500 else refusal.code
        body = refusal.body
        ours = {b"content-type": b"application/json", b"content-length": str(len(body)).encode()}
        headers = [
            (name, value) for name, value in head["headers"] if name not in ours and name != b"transfer-encoding"
        ]
        await self._pass({**head, "status": refusal.status, "headers": [*headers, *ours.items()]})
        await self._pass({"type": "http.response.body", "body": body})

    def count(self, gone: bool = False) -> None:
        """Note the outcome, once, at the end. `gone`: the client left before."""
        outcome = self.outcome or ("client_gone" if gone else "error")
        REQUESTS.labels(self.model, self.tier, outcome).inc()
        if outcome == "ok":
            SECONDS.labels(self.model, self.tier).observe(time.perf_counter() - self._started)
