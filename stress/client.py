"""One chat completion, streamed or not, timed and judged: the same code for Locust's users and for the drills' probe.

Plain `http.client`: its `readline` gives a line of a chunked answer as soon as it is there (Locust's own sessions
hand out blocks of a fixed size, which delays the first token), it never retries, takes no proxy from the
environment, and is cooperative once gevent has patched the sockets. Each request opens its own connection, so
`ttft_ms` and `latency_ms` include connecting, and a Service in front of several routers spreads the requests.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from common.chat import Message
from common.settings import SettingsError

SURE_TIMES = 6
"""Good answers in a row after which a model counts as served by all replicas, whichever of them is asked."""


@dataclass
class Record:
    """One request as it goes to requests.jsonl. `None` is "not known", never zero.

    started_at: unix seconds; of an open loop, when the request was due. late_ms: how long after that it was sent, open
    loops only. ttft_ms: from started_at to the first chunk that carries text (a chunk with only the role does not
    count); streamed requests only. itl_ms: gaps between consecutive chunks that carry text. latency_ms: from started_at
    to the end of the answer or to the failure. prompt_tokens, completion_tokens: the server's own usage. status: HTTP
    status, if one came. retry_after_seconds: from that header. error: a short reason for counting; error_detail: what
    the server or system said.
    """

    started_at: float
    model: str
    stream: bool
    prompt: str = "normal"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_ms: float | None = None
    itl_ms: list[float] = field(default_factory=list)
    latency_ms: float | None = None
    status: int | None = None
    error: str | None = None
    error_detail: str | None = None
    client: str | None = None
    late_ms: float | None = None
    retry_after_seconds: float | None = None

    def as_json(self) -> str:
        """One line of JSON; what few requests have only where there is one."""
        rare = ("error_detail", "client", "late_ms", "retry_after_seconds")
        values = {name: value for name, value in asdict(self).items() if value is not None or name not in rare}
        return json.dumps(values, ensure_ascii=False)


class AnswerError(Exception):
    """A request that must be counted as failed: `reason` is short and countable, `detail` is for the reader."""

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(reason if detail is None else f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail[:300] if detail else None


def _checked(url: str) -> SplitResult:
    """The parts of `url`. Raises `ValueError` for an unusable one."""
    parts = urlsplit(url)
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or beyond 65535
        usable = False
    if not usable:
        raise ValueError(f"not a URL like http://127.0.0.1:8000, found {url!r}")
    return parts


def is_loopback(url: str) -> bool:
    """Whether every address of `url`'s host is this machine's loopback. Raises `ValueError` for an unusable URL."""
    parts = _checked(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{parts.hostname} has no address: {error}") from None
    return all(ipaddress.ip_address(str(item[4][0]).split("%")[0]).is_loopback for item in found)


def check_target(url: str, allow_remote: bool) -> None:
    """Raise `SettingsError` for a target that is not loopback, unless that was asked for.

    Then its name need not have an address yet: the Service may be younger than the Job that asks it.
    """
    try:
        if (allow_remote and _checked(url)) or is_loopback(url):
            return
    except ValueError as error:
        raise SettingsError([f"target: {error}"]) from None
    raise SettingsError([f"target: {url} is not this machine; give --allow-remote if you may load that server"])


def api_keys(clients: Collection[str]) -> dict[str, str]:
    """The keys of `clients` from DRYDOCK_API_KEYS. Raises `SettingsError` naming every client without one."""
    try:
        found = json.loads(os.environ.get("DRYDOCK_API_KEYS") or "{}")
    except ValueError:
        found = None  # what is in it must not be told
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found.values()):
        raise SettingsError(['DRYDOCK_API_KEYS: not JSON such as {"team-a": "KEY"}'])
    if missing := [name for name in clients if not found.get(name)]:
        raise SettingsError([f"clients: {', '.join(missing)}: no key of that name in DRYDOCK_API_KEYS"])
    return {name: found[name] for name in clients}


def connect(url: str, timeout_seconds: float) -> http.client.HTTPConnection:
    """A connection (not yet open) to the host of `url`."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=timeout_seconds)


def get_status(url: str, timeout_seconds: float = 2.0) -> int | None:
    """The HTTP status of GET `url`; None if nothing answered."""
    return _get(url, timeout_seconds)[0]


def get_text(url: str, timeout_seconds: float = 2.0) -> str | None:
    """What GET `url` answers with status 200; None for anything else."""
    status, text = _get(url, timeout_seconds)
    return text if status == 200 else None


def _get(url: str, timeout_seconds: float) -> tuple[int | None, str]:
    connection = connect(url, timeout_seconds)
    try:
        connection.request("GET", urlsplit(url).path or "/")
        response = connection.getresponse()
        body = response.read()  # always: closing on unread data would reset the server's side
        return response.status, body.decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None, ""
    finally:
        connection.close()


def read_stream(
    lines: Iterable[bytes],
    record: Record,
    started: float,
    deadline: float,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Read server-sent events into `record` until `[DONE]`; raise `AnswerError` for anything but a whole answer.

    `lines` yields each line with its newline as it arrives; an unterminated last line is a cut, as the SSE standard
    says (WHATWG HTML, 9.2.6: an incomplete event at the end is discarded). `started`, `deadline` and `clock()` are
    seconds on one clock.
    """
    last: float | None = None
    done = False
    for line in lines:
        now = clock()
        if now > deadline:
            raise AnswerError("timeout", f"answer unfinished after {now - started:.1f} s")
        if not line.startswith(b"data:") or not line.endswith(b"\n"):
            continue  # blank lines, comments (keep-alive), event and id fields, or a line that was cut
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            continue  # read to the end of the body
        try:
            chunk = json.loads(data)
        except ValueError:
            raise AnswerError("bad event", data[:200].decode(errors="replace")) from None
        if not isinstance(chunk, dict):
            raise AnswerError("bad event", data[:200].decode(errors="replace"))
        if chunk.get("error") is not None or chunk.get("object") == "error":
            raise AnswerError("error event", _message(chunk))
        _usage(chunk, record)
        if _text(chunk, "delta"):
            if last is None:
                record.ttft_ms = round((now - started) * 1000, 3)
            else:
                record.itl_ms.append(round((now - last) * 1000, 3))
            last = now
    if not done:
        raise AnswerError(
            "stream ended without [DONE]", f"after {len(record.itl_ms) + (last is not None)} chunks of text"
        )
    if last is None:
        raise AnswerError("empty answer")


def read_whole(body: bytes, record: Record) -> None:
    """Read a non-streamed answer into `record`; raise `AnswerError` unless it has choices with text."""
    try:
        value = json.loads(body)
    except ValueError:
        raise AnswerError("answer is not JSON", body[:200].decode(errors="replace")) from None
    if not isinstance(value, dict) or not value.get("choices"):
        raise AnswerError("no choices", _message(value))
    _usage(value, record)
    if not _text(value, "message"):
        raise AnswerError("empty answer")


def _text(value: dict[str, Any], part: str) -> bool:
    """Whether the first choice carries text (of the answer or of its reasoning)."""
    choices = value.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            raise AnswerError("unexpected answer", f"a choice that is {choice!r:.100}")
        # vLLM answers 200 with finish_reason "abort" when it shuts down under a request
        if choice.get("finish_reason") in ("abort", "error"):
            raise AnswerError(f"finish_reason {choice['finish_reason']}")
        message = choice.get(part) or {}
        if any(message.get(key) for key in ("content", "reasoning_content", "reasoning")):
            return True
    return False


def _usage(value: dict[str, Any], record: Record) -> None:
    usage = value.get("usage")
    if isinstance(usage, dict):
        record.prompt_tokens = usage.get("prompt_tokens")
        record.completion_tokens = usage.get("completion_tokens")


def _message(value: Any) -> str:
    inner = value.get("error", value) if isinstance(value, dict) else value
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)


def ask(
    target: str,
    model: str,
    messages: list[Message],
    *,
    stream: bool,
    max_tokens: int,
    ignore_eos: bool = False,
    timeout_seconds: float,
    prompt: str = "normal",
    client: str | None = None,
    key: str | None = None,
    due: float | None = None,
) -> Record:
    """Send one chat completion to `target` (the server's root or its /v1) and return its record; never raises for
    what the server or network does. `key`, or else `DRYDOCK_API_KEY`, if set, is sent as the bearer token.

    `ignore_eos` makes the answer as long as `max_tokens`; only vLLM knows it.

    `due` (`time.perf_counter()`, not after now): all times but the timeout count from then. A request that had to wait
    here has kept its person waiting as well; counted from sending, the waiting would be left out ("coordinated
    omission").
    """
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": stream}
    if ignore_eos:
        body["ignore_eos"] = True
    if stream:
        body["stream_options"] = {"include_usage": True}
    headers = {
        "Content-Type": "application/json",
        "Accept": "text/event-stream" if stream else "application/json",
        "Connection": "close",
    }
    if key := key or os.environ.get("DRYDOCK_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    path = urlsplit(target).path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    record = Record(started_at=time.time(), model=model, stream=stream, prompt=prompt, client=client)
    connection = connect(target, timeout_seconds)
    started = sent = time.perf_counter()
    if due is not None:
        started = due
        record.started_at -= sent - due
        record.late_ms = round((sent - due) * 1000, 3)
    try:
        connection.request("POST", path, json.dumps(body).encode(), headers)
        response = connection.getresponse()
        record.status = response.status
        if response.status != 200:
            record.retry_after_seconds = _seconds(response.headers.get("Retry-After"))
            text = response.read(4096).decode(errors="replace")
            raise AnswerError(f"status {response.status}", _server_said(text))
        if stream:
            read_stream(iter(response.readline, b""), record, started, sent + timeout_seconds)
        else:
            read_whole(response.read(), record)
    except AnswerError as failure:
        record.error, record.error_detail = failure.reason, failure.detail
    except TimeoutError:
        record.error, record.error_detail = "timeout", f"nothing for {timeout_seconds:g} s"
    except ConnectionRefusedError:
        record.error = "connection refused"
    except (ConnectionError, http.client.RemoteDisconnected):
        record.error = "connection reset"
    except http.client.IncompleteRead:
        record.error = "stream ended without [DONE]" if stream else "answer cut short"
    except (OSError, http.client.HTTPException) as error:
        record.error, record.error_detail = "connection error", f"{type(error).__name__}: {error}"
    finally:
        record.latency_ms = round((time.perf_counter() - started) * 1000, 3)
        connection.close()
    return record


def _seconds(header: str | None) -> float | None:
    """Retry-After where it counts seconds (RFC 9110, 10.2.3); a date, which no server of ours sends, is not read."""
    return float(header) if header and header.strip().isdecimal() else None


def _server_said(text: str) -> str | None:
    try:
        return _message(json.loads(text))
    except ValueError:
        return text.strip() or None
