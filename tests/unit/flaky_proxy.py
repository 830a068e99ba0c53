"""A proxy before a Blob service that does to some requests what networks and busy accounts do."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Literal
from urllib.parse import urlsplit

from localcloud.loopback import LoopbackServer

Fault = Literal["500", "503", "cut", "lost", "hang"]
"""503 comes with Retry-After; cut: the answer ends in the middle of its body; lost: the request is done, and the answer
never comes; hang: nothing comes until the proxy is closed."""


class FlakyProxy(LoopbackServer):
    """`url` stands for `upstream`. `fault(number from 0, method, path)` says what befalls a request, None for nothing."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = parts.netloc
        self.closing = threading.Event()
        self.requests = 0
        self.faults: list[str] = []
        self.fault: Callable[[int, str, str], Fault | None] = lambda number, method, path: None
        super().__init__(_Proxied)
        self.url += parts.path

    def handle_error(self, *_: object) -> None:
        """Clients are killed and hang up: that is what the tests want."""

    def close(self) -> None:
        self.closing.set()
        super().close()


class _Proxied(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FlakyProxy

    def log_message(self, *_: object) -> None:
        pass

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        number, self.server.requests = self.server.requests, self.server.requests + 1
        fault = self.server.fault(number, self.command, self.path)
        if fault:
            self.server.faults.append(f"{fault} {self.command}")
        if fault == "hang":
            self.server.closing.wait()
            self.close_connection = True
            return
        if fault in ("500", "503"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            if fault == "503":
                self.send_header("Retry-After", "3600")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault == "lost":
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "keep-alive", "server", "date"):
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            self.close_connection = True
            data = data[: len(data) // 2]
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do
