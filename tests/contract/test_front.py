"""HAProxy as it stands before the router: what passes and how, what does not, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.processes import free_ports
from tests.contract.conftest import ROOT, wait_until
from tests.contract.test_router import CHAT, KEYS, REFUSAL, Quiet, Worker, serving

CONFIG = ROOT / "serving" / "front.cfg"
MISSING = [name for name in ("haproxy", "dumb-init") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no {' and no '.join(MISSING)} on PATH: install the Debian packages haproxy and dumb-init"
)
SERVED = {("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/liveness")}


@dataclass
class Heard:
    """What reached the router: lines before they were parsed, then what was made of them."""

    lines: list[bytes] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


class Recorder(Quiet):
    """Stands for the router: writes down what it hears, and answers when the test says so."""

    def parse_request(self) -> bool:
        self.server.heard.lines.append(self.raw_requestline)
        return super().parse_request()

    def do_POST(self) -> None:
        body = b""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.heard.requests.append((self.command, self.path, headers, body))
        if "wait-for-hangup" in self.headers:
            self.connection.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert self.connection.recv(1) == b""
            self.server.hung_up.set()
            self.close_connection = True
            return None
        silence = float(self.headers.get("silence") or 0)
        if "stream" not in self.headers:
            time.sleep(silence)
            return self.answer(200, {"answered": self.path})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for text in (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n", b""):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            if text == b"data: 1\n\n":
                assert silence or self.server.go.wait(20)
                time.sleep(silence)
        return None

    do_GET = do_HEAD = do_PUT = do_DELETE = do_OPTIONS = do_CONNECT = do_POST

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.do_POST
        raise AttributeError(name)


@dataclass
class Front:
    """A running front, and the router behind it."""

    port: int
    metrics_port: int
    process: subprocess.Popen[bytes]
    router: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def raw(self, data: bytes, *, seconds: float = 5) -> bytes:
        """Send `data` as it is, and read until the front closes or is silent for `seconds`."""
        received = b""
        with (
            contextlib.suppress(ConnectionError, TimeoutError),
            socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection,
        ):
            connection.sendall(data)
            while part := connection.recv(65536):
                received += part
        return received


@contextlib.contextmanager
def running_front(folder: Path, router_port: int, config: Path = CONFIG) -> Iterator[Front]:
    """The pod's own command before `router_port`."""
    port, metrics_port = free_ports(2)
    environment = os.environ | {
        "FRONT_HOST": "127.0.0.1", "FRONT_PORT": str(port), "FRONT_METRICS_PORT": str(metrics_port),
        "ROUTER_PORT": str(router_port),
    }  # fmt: skip
    command = ["dumb-init", "--rewrite", "15:10", "haproxy", "-db", "-f", str(config)]
    with (folder / "front.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def up() -> bool:
        assert process.poll() is None, (folder / "front.log").read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{metrics_port}/healthz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(up, 20, "haproxy")
        yield Front(port, metrics_port, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # dumb-init passes it on, and haproxy ends at once
        process.wait(10)


@pytest.fixture(scope="module")
def recorder() -> Iterator[Any]:
    with serving(Recorder, heard=Heard(), go=threading.Event(), hung_up=threading.Event()) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, recorder: Any) -> Iterator[Front]:
    with running_front(tmp_path_factory.mktemp("front"), recorder.server_port) as front:
        front.router = recorder
        yield front


@pytest.fixture
def front(shared: Front) -> Front:
    """With a router that has heard nothing yet."""
    shared.router.heard = Heard()
    shared.router.go.clear()
    shared.router.hung_up.clear()
    return shared


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory, recorder: Any) -> Iterator[Front]:
    """The same with a second where a client has half a minute, so that the test need not wait for it."""
    folder = tmp_path_factory.mktemp("hasty")
    text = CONFIG.read_text()
    for setting in ("timeout http-request", "timeout client", "http-request wait-for-body time"):
        text, count = re.subn(rf"{setting} \d+s", f"{setting} 1s", text)
        assert count == 1
    (folder / "front.cfg").write_text(text)
    with running_front(folder, recorder.server_port, folder / "front.cfg") as front:
        yield front


def test_haproxy_finds_nothing_to_say_against_the_configuration() -> None:
    checked = subprocess.run(["haproxy", "-c", "-f", str(CONFIG)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr
    assert "WARNING" not in checked.stdout


def request(method: str, target: str, *headers: str, body: str = "", version: str = "HTTP/1.1") -> bytes:
    lines = [f"{method} {target} {version}", "Host: x", *headers, "Connection: close"]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


TRICKS = {
    "add": request("POST", "/add_worker?url=http://evil:1"),
    "remove": request("POST", "/remove_worker?url=http://10.0.0.1:8000"),
    "flush": request("POST", "/flush_cache"),
    "list": request("GET", "/list_workers"),
    "workers": request("POST", "/workers", body="{}"),
    "health": request("GET", "/health"),
    "readiness": request("GET", "/readiness"),
    "metrics": request("GET", "/metrics"),
    "root": request("GET", "/"),
    "double slash": request("POST", "//add_worker"),
    "double slash before what is served": request("POST", "//v1/completions"),
    "double slash in what is served": request("POST", "/v1//completions"),
    "slash at the end": request("POST", "/v1/completions/"),
    "dots": request("POST", "/v1/models/../../add_worker"),
    "dots after what is served": request("POST", "/v1/chat/completions/../../flush_cache"),
    "dots that lead back": request("POST", "/v1/x/../completions"),
    "dot": request("POST", "/./v1/completions"),
    "encoded slash": request("POST", "/%2fadd_worker"),
    "encoded letter": request("POST", "/%61dd_worker"),
    "encoded dots": request("POST", "/v1/completions/%2e%2e/%2e%2e/add_worker"),
    "encoded question mark": request("POST", "/v1/completions%3f/../../add_worker"),
    "backslash": request("POST", "/v1/completions\\..\\..\\add_worker"),
    "parameter of a path": request("POST", "/v1/completions;/../../add_worker"),
    "fragment": request("POST", "/v1/completions#/../../add_worker"),
    "upper case": request("POST", "/V1/COMPLETIONS"),
    "absolute form": request("POST", "http://x/add_worker"),
    "absolute form of what is served": request("POST", "http://x/v1/completions"),
    "authority with a path": request("POST", "http://x/v1/completions@y/add_worker"),
    "no slash": request("POST", "add_worker"),
    "asterisk": request("OPTIONS", "*"),
    "lower-case method": request("post", "/v1/completions"),
    "GET where POST is served": request("GET", "/v1/completions"),
    "POST where GET is served": request("POST", "/v1/models"),
    "HEAD": request("HEAD", "/v1/models"),
    "OPTIONS": request("OPTIONS", "/v1/chat/completions", "Origin: http://evil"),
    "PUT": request("PUT", "/v1/completions"),
    "another method in a header": request("GET", "/v1/completions", "X-HTTP-Method-Override: POST"),
    "another path in a header": request("GET", "/", "X-Original-URL: /v1/models", "X-Rewrite-URL: /v1/models"),
    "CONNECT": b"CONNECT evil:443 HTTP/1.1\r\nHost: evil:443\r\nConnection: close\r\n\r\n",
    "CONNECT with a path": request("CONNECT", "/v1/completions"),
    "HTTP/1.0": request("POST", "/add_worker", version="HTTP/1.0"),
    "HTTP/0.9": b"GET /list_workers\r\n\r\n",
    "HTTP/2 at once": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "upgrade to HTTP/2": request("GET", "/list_workers", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
    "upgrade to a websocket": request("GET", "/v1/realtime", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    "headers too large": request("POST", "/v1/completions", "X-Large: " + "x" * 20_000),
    "target too large": request("POST", "/v1/completions?" + "x" * 20_000),
    "a deployment's other routes": request("POST", "/openai/deployments/a/embeddings", body="{}"),
    "a deployment without a name": request("POST", "/openai/deployments//completions", body="{}"),
    "dots for a deployment": request("POST", "/openai/deployments/../completions", body="{}"),
    "dots after a deployment": request("POST", "/openai/deployments/a/../../../add_worker", body="{}"),
    "an encoded slash in a deployment": request("POST", "/openai/deployments/a%2fb/completions", body="{}"),
    "a line end in a deployment": request("POST", "/openai/deployments/a%0d%0ab/completions", body="{}"),
    "the rest of OpenAI's below Azure's": request("POST", "/openai/v1/responses", body="{}"),
    "GET of a deployment": request("GET", "/openai/deployments/a/completions"),
    "two lengths": request("POST", "/v1/completions", "Content-Length: 3", "Content-Length: 4") + b"{} x",
    "negative length": request("POST", "/v1/completions", "Content-Length: -1"),
    "a space in a header's name": request("POST", "/v1/completions", "Content-Length : 3") + b"{} ",
    "unknown encoding": request("POST", "/v1/completions", "Transfer-Encoding: xchunked"),
    "zero byte": request("POST", "/v1/completions\0/../add_worker"),
    "body announced too large": request("POST", "/v1/completions", f"Content-Length: {5 << 20}"),
}  # fmt: skip


@pytest.mark.parametrize("data", TRICKS.values(), ids=TRICKS)
def test_what_is_not_served_never_reaches_the_router(front: Front, data: bytes) -> None:
    reply = front.raw(data)
    head, _, body = reply.partition(b"\r\n\r\n")
    status = int(re.match(rb"HTTP/1\.[01] (400|404|413) ", head)[1])  # type: ignore[index]
    assert front.router.heard.lines == []
    if status != 400 and not data.startswith(b"HEAD"):  # 400: not even HTTP, told by HAProxy's own page
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, "the shape that OpenAI's clients read"
        assert b"\r\ncontent-type: application/json" in head.lower()


SMUGGLED = b"POST /add_worker?url=http://evil HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
PAIRS = {
    "length, then chunks": request("POST", "/v1/completions", f"Content-Length: {5 + len(SMUGGLED)}", "Transfer-Encoding: chunked").replace(b"Connection: close\r\n", b"")
    + b"0\r\n\r\n" + SMUGGLED,
    "chunks, then length": request("POST", "/v1/completions", "Transfer-Encoding: chunked", "Content-Length: 4").replace(b"Connection: close\r\n", b"")
    + b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
    "a body of a GET": request("GET", "/v1/models", f"Content-Length: {len(SMUGGLED)}") + SMUGGLED,
    "one after the other": request("POST", "/v1/completions", body="{}").replace(b"Connection: close\r\n", b"") + SMUGGLED,
    "a line end in a chunk's size": request("POST", "/v1/completions", "Transfer-Encoding: chunked") + b"2;\n{}\r\n0\r\n\r\n" + SMUGGLED,
    "connection names the length": request("POST", "/v1/completions", "Connection: Content-Length", f"Content-Length: {len(SMUGGLED)}") + SMUGGLED,
}  # fmt: skip


@pytest.mark.parametrize("data", PAIRS.values(), ids=PAIRS)
def test_a_request_hidden_in_another_is_not_taken_for_one(front: Front, data: bytes) -> None:
    front.raw(data, seconds=1)
    heard = front.router.heard
    assert {(method, path) for method, path, _, _ in heard.requests} <= SERVED
    assert all(line.split()[1] in (b"/v1/completions", b"/v1/models") for line in heard.lines)


@pytest.mark.parametrize("route", sorted(SERVED), ids=lambda route: " ".join(route))
def test_what_is_served_arrives_as_it_was_sent(front: Front, route: tuple[str, str]) -> None:
    method, path = route
    sent = {"authorization": "Bearer key-a", "api-key": "key-b", "x-request-id": "r1", "traceparent": "00-1-2-01"}
    content = b'{"a": "\xc3\xa9"}' if method == "POST" else None
    reply = httpx.request(method, front.url + path, headers=sent, content=content, timeout=10)
    assert (reply.status_code, reply.json()) == (200, {"answered": path})
    [(heard_method, heard_path, headers, body)] = front.router.heard.requests
    assert (heard_method, heard_path, body) == (method, path, content or b"")
    assert sent.items() <= headers.items()


AZURE = {
    ("POST", "/openai/deployments/my-7B.v2/chat/completions?api-version=2024-10-21"): (
        "/v1/chat/completions",
        "my-7B.v2",
    ),
    ("POST", "/openai/deployments/kubectl/completions?api-version=2024-10-21"): ("/v1/completions", "kubectl"),
    ("POST", "/openai/v1/chat/completions?api-version=preview"): ("/v1/chat/completions", None),
    ("POST", "/openai/v1/completions"): ("/v1/completions", None),
    ("GET", "/openai/v1/models"): ("/v1/models", None),
    ("GET", "/openai/models?api-version=2024-10-21"): ("/v1/models", None),
}


@pytest.mark.parametrize("asked", AZURE, ids=lambda asked: " ".join(asked))
def test_azures_paths_arrive_as_openais(front: Front, asked: tuple[str, str]) -> None:
    path, deployment = AZURE[asked]
    forged = {"x-drydock-deployment": "forged", "api-key": "key-b"}
    assert httpx.request(asked[0], front.url + asked[1], headers=forged, timeout=10).json() == {"answered": path}
    [(method, heard_path, headers, _)] = front.router.heard.requests
    assert (method, heard_path) == (asked[0], path)
    assert headers.get("x-drydock-deployment") == deployment
    assert headers["api-key"] == "key-b"


def test_what_a_client_says_of_itself_and_of_other_protocols_stays_outside(front: Front) -> None:
    says = ["X-Forwarded-For: 1.2.3.4", "X-Forwarded-Host: evil", "X-Forwarded-Proto: https", "Forwarded: for=1.2.3.4"]
    says += ["X-Real-IP: 1.2.3.4", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk", "X-HTTP-Method-Override: DELETE"]
    reply = front.raw(request("POST", "/v1/completions?url=http://evil", *says, body="{}"))
    assert reply.startswith(b"HTTP/1.1 200 "), "Java's own client offers an upgrade with every first request"
    [(method, path, headers, body)] = front.router.heard.requests
    assert (method, path, body) == ("POST", "/v1/completions", b"{}"), "no query"
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert not {"x-forwarded-host", "x-forwarded-proto", "forwarded", "x-real-ip", "upgrade"} & set(headers)
    assert "upgrade" not in headers.get("connection", "").lower()


def test_an_old_client_is_served(front: Front) -> None:
    reply = front.raw(request("POST", "/v1/completions", body="{}", version="HTTP/1.0"))
    assert re.match(rb"HTTP/1\.[01] 200 ", reply) and b'{"answered": "/v1/completions"}' in reply


def test_one_connection_carries_many_requests(front: Front) -> None:
    both = request("GET", "/v1/models").replace(b"Connection: close\r\n", b"") + request("GET", "/liveness")
    assert front.raw(both).count(b"HTTP/1.1 200 ") == 2


def test_whoever_hangs_up_no_longer_occupies_the_router(front: Front) -> None:
    with socket.create_connection(("127.0.0.1", front.port), timeout=5) as connection:
        connection.sendall(request("POST", "/v1/completions", "Wait-For-Hangup: 1", body="{}"))
        wait_until(lambda: front.router.heard.requests, 5, "the request")
        assert not front.router.hung_up.is_set()
    assert front.router.hung_up.wait(5)


def test_slow_clients_are_told_and_closed(hasty: Front, recorder: Any) -> None:
    recorder.heard = Heard()
    for what, data in {
        "headers": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le",
        "body": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    }.items():
        started = time.monotonic()
        reply = hasty.raw(data)
        assert reply.startswith(b"HTTP/1.1 408 "), what
        assert 0.5 < time.monotonic() - started < 4, what
    assert recorder.heard.requests == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_may_wait_for_longer_than_it_may_dawdle(hasty: Front, stream: bool) -> None:
    headers = {"silence": "2.5"} | ({"stream": "1"} if stream else {})
    reply = httpx.post(f"{hasty.url}/v1/completions", json={}, headers=headers, timeout=10)
    assert reply.status_code == 200
    assert reply.text.endswith("data: [DONE]\n\n" if stream else "}")


def test_without_a_router_the_answer_says_so_and_haproxy_lives(tmp_path: Path) -> None:
    [nobody] = free_ports(1)
    with running_front(tmp_path, nobody) as front:
        reply = httpx.get(f"{front.url}/liveness", timeout=20)
        assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (
            503,
            "unavailable",
            "1",
        )
        assert httpx.get(f"http://127.0.0.1:{front.metrics_port}/healthz").status_code == 200


def test_prometheus_has_its_own_port_with_nothing_else(front: Front) -> None:
    url = f"http://127.0.0.1:{front.metrics_port}"
    assert 'haproxy_frontend_http_requests_total{proxy="clients"}' in httpx.get(f"{url}/metrics", timeout=10).text
    for path in ("/", "/v1/models", "/stats"):
        assert httpx.get(url + path).status_code == 404
    assert front.router.heard.lines == []


def test_at_sigterm_a_stream_ends_whole_and_nobody_new_comes_in(tmp_path: Path, recorder: Any) -> None:
    recorder.go.clear()
    with running_front(tmp_path, recorder.server_port) as front, httpx.Client() as client:
        client.get(f"{front.url}/liveness")  # an idle connection must hold up nothing
        with httpx.stream("POST", f"{front.url}/v1/completions", json={}, headers={"stream": "1"}) as stream:
            parts = stream.iter_raw()
            assert next(parts) == b"data: 1\n\n"
            front.process.terminate()

            def closed() -> bool:
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", front.port)) != 0

            wait_until(closed, 5, "the port is closed")
            assert front.process.poll() is None
            recorder.go.set()
            assert b"".join(parts) == b"data: 2\n\ndata: [DONE]\n\n"
        assert front.process.wait(10) == 0


class Replica(Worker):
    """Holds its streams after the first token until the test lets them go on, or sheds load, as a header says."""

    def do_GET(self) -> None:
        if "shed" in self.headers:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            return self.answer(429, REFUSAL, retry_after="7")
        if self.headers.get("hold") is None:
            return super().do_GET()
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for text in (b"data: 1\n\n", b"data: [DONE]\n\n", b""):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            if text == b"data: 1\n\n":
                assert self.server.go.wait(20)
        return None

    do_POST = do_GET


class Plain(Quiet):
    """Stands for a router that has lost its replicas, with the words of vllm-router 0.1.17."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b'No available workers (all "circuits" open or unhealthy)'
        self.send_response(503)
        self.send_header("content-type", "text/plain; charset=utf-8")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(200, {})


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Front, Any]]:
    """The front with the real router on loopback and two replicas, as in the pod."""
    folder = tmp_path_factory.mktemp("pod")
    state = {"refused": 0, "go": threading.Event()}
    with serving(Replica, **state) as first, serving(Replica, **state) as second:
        port, metrics_port = free_ports(2)
        command = [sys.executable, "-m", "serving.router", "--port", str(port), "--metrics-port", str(metrics_port)]
        command += [f"--replica=http://127.0.0.1:{server.server_port}" for server in (first, second)]
        with (folder / "router.log").open("wb") as log:
            router = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        try:
            with running_front(folder, port) as front:

                def up() -> bool:
                    assert router.poll() is None, (folder / "router.log").read_text()[-3000:]
                    return httpx.get(f"{front.url}/liveness", timeout=20).status_code == 200

                wait_until(up, 60, "router")
                yield front, state["go"]
        finally:
            router.kill()
            router.wait()


@pytest.mark.parametrize("key", KEYS, ids=["authorization", "api-key"])
def test_through_front_and_router_a_key_reaches_the_replica(pod: tuple[Front, Any], key: dict[str, str]) -> None:
    front, _ = pod
    for path in ("/v1/chat/completions", "/v1/completions"):
        reply = httpx.post(front.url + path, json=CHAT | {"prompt": "hi"}, headers=key, timeout=30)
        assert (reply.status_code, reply.json()) == (200, {"answered": path})
    reply = httpx.get(f"{front.url}/v1/models", headers=key, timeout=30)
    assert (reply.status_code, reply.json()) == (200, {"answered": "/v1/models"})


def test_through_front_and_router_the_first_token_does_not_wait_for_the_last(pod: tuple[Front, Any]) -> None:
    front, go = pod
    go.clear()
    body = CHAT | {"stream": True}
    with httpx.stream("POST", f"{front.url}/v1/chat/completions", json=body, headers={"hold": "1"}) as stream:
        parts = stream.iter_raw()
        assert next(parts) == b"data: 1\n\n"
        go.set()
        assert b"".join(parts) == b"data: [DONE]\n\n"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_through_front_and_router_a_429_arrives_as_it_is_and_shuts_nobody_out(
    pod: tuple[Front, Any], stream: bool
) -> None:
    front, _ = pod
    url = f"{front.url}/v1/chat/completions"
    for _ in range(4):
        started = time.monotonic()
        reply = httpx.post(url, json=CHAT | {"stream": stream}, headers={"shed": "1"}, timeout=30)
        assert time.monotonic() - started < 2
        assert (reply.status_code, reply.json(), reply.headers["retry-after"]) == (429, REFUSAL, "7")
        assert reply.headers["content-type"] == "application/json"
    assert [httpx.post(url, json=CHAT, headers=KEYS[0], timeout=30).status_code for _ in range(4)] == [200] * 4


@pytest.mark.parametrize("wrong", [{"stream": None}, {"n": -1}, {"seed": 2**64}, {"messages": 'x"\n\u00fc'}])
def test_what_the_router_itself_refuses_is_told_as_openai_tells_it(pod: tuple[Front, Any], wrong: Any) -> None:
    front, _ = pod
    reply = httpx.post(f"{front.url}/v1/chat/completions", json=CHAT | wrong, headers=KEYS[0], timeout=30)
    error = reply.json()["error"]
    assert (reply.status_code, reply.headers["content-type"]) == (400, "application/json")
    assert (error["code"], error["type"], error["param"]) == ("invalid_value", "invalid_request_error", None)
    assert len(error["message"]) > 20


def test_a_router_without_a_replica_says_so_as_openai_would(tmp_path: Path) -> None:
    with serving(Plain) as router, running_front(tmp_path, router.server_port) as front:
        reply = httpx.post(f"{front.url}/v1/chat/completions", json=CHAT, timeout=30)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
        assert reply.json()["error"]["message"] == 'No available workers (all "circuits" open or unhealthy)'
        assert reply.json()["error"]["type"] == "server_error"


def test_the_router_refuses_what_announced_no_length_and_is_too_large(pod: tuple[Front, Any]) -> None:
    front, _ = pod
    pieces = (b" " * 65536 for _ in range(80))
    with contextlib.suppress(httpx.WriteError):
        headers = {"content-type": "application/json"}
        reply = httpx.post(f"{front.url}/v1/completions", content=pieces, headers=headers, timeout=30)
        assert reply.status_code == 413
