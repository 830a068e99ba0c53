"""Server-sent events: timing, whole answers, and each way in which an answer can be broken."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from common.chat import Message
from stress.client import AnswerError, Record, ask, read_stream, read_whole
from tests.unit.test_stress_fake import fake_server

MESSAGES: list[Message] = [{"role": "user", "content": "x"}]
ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
STOP = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}


def text(value: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": value}}]}


def lines(*events: Any) -> list[bytes]:
    found = []
    for event in events:
        data = event if isinstance(event, bytes) else json.dumps(event).encode()
        found += [b"data: " + data + b"\n", b"\n"]
    return found


def read(stream: list[bytes], times: list[float] | None = None, deadline: float = 99.0) -> Record:
    """Read `stream`, its n-th line arriving at `times[n]` (the last time stays)."""
    record = Record(started_at=0.0, model="a", stream=True)
    ticks = iter(times or [])
    last = [0.0]

    def clock() -> float:
        last[0] = next(ticks, last[0])
        return last[0]

    read_stream(stream, record, 0.0, deadline, clock)
    return record


def reason(stream: list[bytes], **more: Any) -> str:
    with pytest.raises(AnswerError) as caught:
        read(stream, **more)
    return caught.value.reason


def test_times_of_a_whole_stream() -> None:
    stream = lines(ROLE, text("a"), text("b"), text("c"), STOP, USAGE, b"[DONE]")
    #         role      a         b         c          stop, usage, done
    times = [0.1, 0.1, 0.5, 0.5, 0.6, 0.6, 0.85, 0.85, 0.9, 0.9]
    record = read(stream, times)
    assert record.ttft_ms == 500.0  # the role alone is not a token
    assert record.itl_ms == [pytest.approx(100.0), pytest.approx(250.0)]
    assert (record.prompt_tokens, record.completion_tokens) == (12, 3)


def test_comments_and_carriage_returns_are_fine() -> None:
    stream = [
        b": keep-alive\n",
        b"event: x\r\n",
        b"data:" + json.dumps(text("a")).encode() + b"\r\n",
        b"data: [DONE]\n",
    ]
    assert read(stream, [0.2]).ttft_ms == 200.0
    reasoning = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    assert read(lines(reasoning, b"[DONE]"), [0.3]).ttft_ms == 300.0


def test_broken_streams() -> None:
    cut = "stream ended without [DONE]"
    assert reason(lines(ROLE, text("a"), text("b"))) == cut
    assert reason([]) == cut
    assert reason([*lines(text("a")), b"data: [DO"]) == cut
    assert reason([*lines(text("a")), b"data: [DONE]"]) == cut  # unterminated: the connection broke inside the line
    assert reason([*lines(text("a")), b'data: {"choices": [{"del']) == cut
    assert reason(lines(ROLE, STOP, USAGE, b"[DONE]")) == "empty answer"
    assert reason(lines(text("a"), {"error": {"message": "died"}}, b"[DONE]")) == "error event"
    assert reason(lines(text("a"), {"object": "error", "message": "x"}, b"[DONE]")) == "error event"
    assert reason(lines(text("a"), b"oops", b"[DONE]")) == "bad event"
    abort = {"choices": [{"delta": {}, "finish_reason": "abort"}]}
    assert reason(lines(text("a"), abort, b"[DONE]")) == "finish_reason abort"
    assert reason(lines(text("a"), text("b"), b"[DONE]"), times=[1.0, 1.0, 9.0], deadline=5.0) == "timeout"


def test_whole_answers() -> None:
    record = Record(started_at=0.0, model="a", stream=False)
    read_whole(json.dumps({"choices": [{"message": {"content": "hi"}}], "usage": USAGE["usage"]}).encode(), record)
    assert record.completion_tokens == 3
    for body, expected in (
        (b"<html>", "answer is not JSON"),
        (b"[]", "no choices"),
        (b'{"choices": []}', "no choices"),
        (b'{"choices": [{"message": {"content": ""}}]}', "empty answer"),
        (b'{"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}]}', "finish_reason abort"),
    ):
        with pytest.raises(AnswerError) as caught:
            read_whole(body, record)
        assert caught.value.reason == expected


@pytest.fixture
def once(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that sends fixed bytes to one client and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            received = b""
            while not received.endswith(b"}"):  # closing before the body was read would reset the connection
                received += connection.recv(65536)
            connection.sendall(request.param)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.join(5)
    listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
EVENT = lines(text("a"))[0] + b"\n"
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)


@pytest.mark.parametrize(
    ("once", "expected"),
    [
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNK, "stream ended without [DONE]"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNK + b"50\r\ndata: {", "stream ended without [DONE]"),
        (HEAD + b"Connection: close\r\n\r\n" + EVENT, "stream ended without [DONE]"),
        (HEAD + b"Connection: close\r\n\r\n" + EVENT + b"data: [DONE]\n\n", None),
        (b"", "connection reset"),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 9\r\n\r\nno worker", "status 503"),
        (b"nonsense\r\n\r\n", "connection error"),
    ],
    indirect=["once"],
)
def test_on_the_wire(once: str, expected: str | None) -> None:
    record = ask(once, "a", [{"role": "user", "content": "x"}], stream=True, max_tokens=5, timeout_seconds=5)
    assert record.error == expected
    assert record.latency_ms is not None
    if expected == "status 503":
        assert (record.status, record.error_detail) == (503, "no worker")
    assert json.loads(record.as_json())["error"] == expected


FULL = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: %s\r\nContent-Length: 4\r\n\r\nfull"


@pytest.mark.parametrize(
    ("once", "expected"),
    [(FULL % b"7", 7.0), (FULL % b"Wed, 21 Oct 2026 07:28:00 GMT", None), (FULL % b"-1", None)],
    indirect=["once"],
)
def test_retry_after_is_kept(once: str, expected: float | None) -> None:
    record = ask(once, "a", [{"role": "user", "content": "x"}], stream=True, max_tokens=5, timeout_seconds=5)
    assert (record.status, record.error, record.retry_after_seconds) == (429, "status 429", expected)


def test_times_count_from_when_it_was_due() -> None:
    with fake_server(ttft_ms=50, itl_ms=20, tokens=2) as url:
        due, now = time.perf_counter() - 0.4, time.time()
        record = ask(url, "a", MESSAGES, stream=True, max_tokens=5, timeout_seconds=5, client="x", key="k", due=due)
        plain = ask(url, "a", MESSAGES, stream=True, max_tokens=5, timeout_seconds=5)
    assert record.error is None and record.late_ms is not None and record.ttft_ms is not None and record.latency_ms
    assert 400 <= record.late_ms < 900
    assert record.started_at == pytest.approx(now - 0.4, abs=0.1)
    assert record.ttft_ms >= record.late_ms + 50 and record.latency_ms >= record.ttft_ms + sum(record.itl_ms)
    assert '"client": "x"' in record.as_json() and "retry_after" not in record.as_json()
    assert plain.late_ms is None and "late_ms" not in plain.as_json()


@pytest.mark.parametrize("stream", [True, False])
def test_answers_are_of_one_length_where_that_is_asked(stream: bool) -> None:
    with fake_server(tokens=2, ttft_ms=0, itl_ms=0) as url:
        found = [
            ask(url, "a", MESSAGES, stream=stream, max_tokens=5, ignore_eos=ignored, timeout_seconds=5)
            for ignored in (False, True)
        ]
    assert [each.completion_tokens for each in found] == [2, 5]


def test_nobody_listens_or_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        record = ask(url, "a", [], stream=True, max_tokens=5, timeout_seconds=0.2)
        assert record.error == "timeout"
        assert 190 < (record.latency_ms or 0) < 2000
    assert ask(url, "a", [], stream=False, max_tokens=5, timeout_seconds=1).error == "connection refused"
