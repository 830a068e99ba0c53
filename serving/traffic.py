"""Every request counted by alias, tier and outcome, and timed: vLLM's own metrics know only the base model."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from serving.errors import from_vllm

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


class Answer:
    """A `send` that passes vLLM's answer on, errors in OpenAI's shape, and notes how it went."""

    def __init__(self, send: Send, tier: str = "") -> None:
        self.tier, self.model = tier, ""
        self.outcome: str | None = None
        self.awaited: Callable[[int], None] = lambda _: None  # told -1 and +1 around the time a client takes to read
        self._send, self._started = send, time.perf_counter()
        self._error: Message | None = None  # the head of an error answer, until its body is known
        self._body = b""
        self._streams = self._first = self._broken = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._error = message
                return
            self._streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
            )
        elif message["type"] == "http.response.body":
            part, last = message.get("body", b""), not message.get("more_body")
            if self._error is not None:
                return await self._tell(self._error, part, last)
            if self._streams and part:
                if not self._first:
                    self._first = True
                    TTFT.labels(self.model, self.tier).observe(time.perf_counter() - self._started)
                if part.startswith(b'data: {"error"'):  # vLLM's word for a stream that it cannot go on with
                    self._broken = True
            if last:
                self.outcome = "error" if self._broken else "ok"
        self.awaited(-1)
        try:
            await self._send(message)
        finally:
            self.awaited(+1)

    async def _tell(self, start: Message, part: bytes, last: bool) -> None:
        self._body += part
        if not last:
            return
        refusal = from_vllm(start["status"], self._body)
        self.outcome = "error" if refusal.status >= 500 else refusal.code
        body = refusal.body
        ours = {b"content-type": b"application/json", b"content-length": str(len(body)).encode()}
        headers = [(name, value) for name, value in start["headers"] if name not in ours]
        await self._send({**start, "headers": [*headers, *ours.items()]})
        await self._send({"type": "http.response.body", "body": body})

    def count(self, gone: bool = False) -> None:
        """Note the outcome, once, at the end. `gone`: the client left before."""
        outcome = self.outcome or ("client_gone" if gone else "error")
        REQUESTS.labels(self.model, self.tier, outcome).inc()
        if outcome == "ok":
            SECONDS.labels(self.model, self.tier).observe(time.perf_counter() - self._started)
