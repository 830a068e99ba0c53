"""One request to the front and its answer: bodies pass as streams, and no trouble leaves a client waiting."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from email.message import Message
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler
from io import BufferedIOBase
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

PIECE_BYTES = 2**18
FORM_BYTES = 2**18  # a form holds a token or two
IDLE_SECONDS = 300.0  # for a client's next word
UPSTREAM_SECONDS = 60.0  # for that of what is behind the front
# Of one connection only (RFC 9110, 7.6.1).
HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
}  # fmt: skip


class ClientGone(Exception):
    """The client left, or what it sends is no HTTP: there is nobody to answer."""


class Away(Exception):
    """What is behind the front gives no answer."""


class Body:
    """A request's body, read as it comes. `go_on` tells the client to send it, where it waits for that.

    Raises ValueError for a length that is none.
    """

    def __init__(self, stream: BufferedIOBase, headers: Message, go_on: Callable[[], object] | None) -> None:
        self._stream, self._go_on = stream, go_on
        self.chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        given = headers.get("Content-Length")
        self.length = int(given) if given is not None and not self.chunked else None
        self._left = self.length or 0  # of all, or of the chunk that is being read
        self._ended = not self.chunked and self._left == 0

    @property
    def awaited(self) -> bool:
        """Whether the client still waits for the word to send it."""
        return self._go_on is not None and not self._ended

    def read(self) -> bytes:
        """The next piece; empty at the end. Raises `ClientGone`."""
        if self._ended:
            return b""
        if self._go_on:
            go_on, self._go_on = self._go_on, None
            go_on()
        try:
            if self.chunked and not self._left:
                self._left = int(self._stream.readline(256).partition(b";")[0], 16)
                if not self._left:
                    while self._stream.readline(2**16).strip():
                        pass  # trailers
                    self._ended = True
                    return b""
            piece = self._stream.read(min(PIECE_BYTES, self._left))
            self._left -= len(piece)
            if self.chunked and not self._left:
                self._stream.readline(2)
        except (OSError, ValueError) as error:
            raise ClientGone from error
        if not piece:
            raise ClientGone
        self._ended = not self.chunked and not self._left
        return piece


class Exchange(BaseHTTPRequestHandler):
    """A request, and the ways to answer it. A subclass says what is asked in `respond`."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True  # head and body of an answer are two writes, the second of which would wait
    body: Body
    host: str
    """As the client said it, in lower case; `name` is the same without its port."""
    name: str
    url: SplitResult

    def respond(self) -> None:
        """Answer. May raise `ClientGone`, and `Away` as long as nothing was answered."""
        raise NotImplementedError

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: whoever asks tells what failed."""

    def handle_expect_100(self) -> bool:
        return True  # `Body` tells the client to go on, if the body is wanted at all

    def _do(self) -> None:
        waits = self.headers.get("Expect", "").lower() == "100-continue"
        try:
            self.body = Body(self.rfile, self.headers, super().handle_expect_100 if waits else None)
        except ValueError:
            self.close_connection = True
            return
        self.host, self.url = self.headers.get("Host", "").lower(), urlsplit(self.path)
        self.name = self.host.partition(":")[0]
        try:
            if re.fullmatch(r"/[\x21-\x7e]*", self.path):
                self.respond()
            else:
                self.reply(HTTPStatus.BAD_REQUEST)
            while not self.close_connection and self.body.read():
                pass  # a client that sends before it reads would not see the answer, and its next request begins behind
        except ClientGone:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = do_OPTIONS = _do

    def form(self) -> dict[str, list[str]]:
        """The fields of the form that is the body; raises `ClientGone` for one without end."""
        data = b""
        while piece := self.body.read():
            data += piece
            if len(data) > FORM_BYTES:
                raise ClientGone
        return parse_qs(data.decode(errors="replace"))

    def reply(
        self, status: int, body: bytes | Mapping[str, Any] = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """A whole answer; a mapping is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if isinstance(body, bytes) else {"Content-Type": "application/json; charset=utf-8"}
        all_headers = {"Date": self.date_time_string(), "Content-Length": str(len(data)), **kind, **(headers or {})}
        self._head(status, HTTPStatus(status).phrase, list(all_headers.items()))
        if self.command != "HEAD":
            self.wfile.write(data)

    def pass_on(
        self,
        host: str,
        path: str,
        headers: Sequence[tuple[str, str]],
        changed: Callable[[str, str], str] = lambda name, value: value,
    ) -> None:
        """Let `host` (HOST:PORT, over plain HTTP) answer the request at `path`, sent there with `headers`.

        The body's length, or that it is chunked, is said besides. `changed` gives the value that the client gets of a
        header in the answer. Raises `Away`, `ClientGone`.
        """
        with contextlib.closing(HTTPConnection(host, timeout=UPSTREAM_SECONDS)) as upstream:
            try:
                upstream.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
                for name, value in [("Host", host), *headers, *self._framing()]:
                    upstream.putheader(name, value)
                upstream.endheaders()
                with contextlib.suppress(ConnectionError):  # it may have answered before it had all
                    self._send_body(upstream)
                answer = upstream.getresponse()
            except (OSError, HTTPException) as error:
                raise Away(f"{host}: {error}") from error
            self._pass_back(answer, changed)

    def passed_headers(self, *without: str) -> list[tuple[str, str]]:
        """The request's own, but for those that are between two neighbours, and those named (in lower case)."""
        left_out = HOP_BY_HOP | {"host", "expect", "content-length", "authorization", *without}
        return [(name, value) for name, value in self.headers.items() if name.lower() not in left_out]

    def _framing(self) -> list[tuple[str, str]]:
        if self.body.chunked:
            return [("Transfer-Encoding", "chunked")]
        return [] if self.body.length is None else [("Content-Length", str(self.body.length))]

    def _send_body(self, upstream: HTTPConnection) -> None:
        while piece := self.body.read():
            upstream.send(b"%x\r\n%b\r\n" % (len(piece), piece) if self.body.chunked else piece)
        if self.body.chunked:
            upstream.send(b"0\r\n\r\n")

    def _pass_back(self, answer: HTTPResponse, changed: Callable[[str, str], str]) -> None:
        without_body = self.command == "HEAD" or answer.status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
        left = answer.length  # None: it comes in chunks, or ends with the connection
        chunked = left is None and not without_body
        headers = [
            (name, changed(name, value)) for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP
        ]
        self._head(answer.status, answer.reason, [*headers, *([("Transfer-Encoding", "chunked")] if chunked else [])])
        if without_body:
            return
        try:
            while piece := answer.read(PIECE_BYTES):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                left = None if left is None else left - len(piece)
        except (OSError, HTTPException) as error:  # the client sees that by an end before the end
            raise ClientGone from error
        if left:
            raise ClientGone
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, reason: str, headers: Sequence[tuple[str, str]]) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        if self.body.awaited:  # it may come all the same, and could be taken for a request
            self.send_header("Connection", "close")
        self.end_headers()
