"""A small fake of an OpenAI-compatible replica (run as a script), for the load and the drills; and tests of it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, this folder would come first and the repository not at all

from common.files import write_json  # noqa: E402

DEFAULTS: dict[str, Any] = {
    "port": 0,
    "ttft_ms": 30.0,  # wait before the first token
    "itl_ms": 10.0,  # wait before each further token
    "tokens": 4,
    "every": {},  # {"status": 5} = each fifth chat request is answered with 503; see `KINDS`
    "engine_seconds": 0.0,  # connection refused for so long, as vLLM does while it loads the model
    "adapters_seconds": 0.0,  # then /health is 200, but /ready is 503 and no adapter is known yet
    "key": None,  # an API key without which a request is answered 401
    "limits": {},  # {"KEY": 1} = more requests at once with this API key are answered 429 with Retry-After: 1
    "log": None,  # JSONL of what was done to each request
}
KINDS = ("status", "cut", "no_done", "error_event", "empty", "abort")


class Handler(BaseHTTPRequestHandler):
    """Answers /health, /ready and /v1/chat/completions; one prompt token is four characters."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a token must not wait for the last one's acknowledgement
    config: dict[str, Any]
    started = time.monotonic()
    lock = threading.Lock()
    count = 0
    of_key: ClassVar[Counter[str]] = Counter()
    log: Any = None

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        value: dict[str, Any] = {"data": []} if self.path == "/v1/models" else {}
        self.plain(200 if self.path == "/health" or self.loaded() else 503, value)

    def loaded(self) -> bool:
        return time.monotonic() - self.started >= float(self.config["engine_seconds"] + self.config["adapters_seconds"])

    def plain(self, status: int, value: Any, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, value: Any) -> None:
        self.chunk(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")

    def do_POST(self) -> None:
        arrived = time.perf_counter()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            if body["max_tokens"] > 1:  # not the preflight, nor a drill's probe
                Handler.count += 1
            number = Handler.count
        kind = "ok"
        if body["max_tokens"] > 1:
            kind = next((k for k, n in self.config["every"].items() if number % n == 0), "ok")
        key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        done = {"kind": kind, "stream": body["stream"], "model": body["model"], "messages": body["messages"]}
        done |= {"key": key, "at": time.time(), "max_tokens": body["max_tokens"]}
        with self.lock:
            full = key in self.config["limits"] and Handler.of_key[key] >= self.config["limits"][key]
            Handler.of_key[key] += 1
        try:
            if self.config["key"] not in (None, key):
                self.plain(401, {"error": {"message": "no such key"}})
            elif full:
                done["kind"] = "shed"
                self.plain(429, {"error": {"message": "full"}}, Retry_After="1")
            else:
                self.answer(body, kind, arrived, done)
        finally:
            with self.lock:
                Handler.of_key[key] -= 1
            if self.log:
                with self.lock:
                    self.log.write(json.dumps(done) + "\n")
                    self.log.flush()

    def answer(self, body: dict[str, Any], kind: str, arrived: float, done: dict[str, Any]) -> None:
        tokens = body["max_tokens"] if body.get("ignore_eos") else min(self.config["tokens"], body["max_tokens"])
        usage = {
            "prompt_tokens": sum(len(m["content"]) for m in body["messages"]) // 4,
            "completion_tokens": tokens,
        }
        if kind == "status":
            return self.plain(503, {"error": {"message": "no replica left"}})
        if body["model"] == "nobody" or not self.loaded():
            return self.plain(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if not body["stream"]:
            time.sleep((self.config["ttft_ms"] + (tokens - 1) * self.config["itl_ms"]) / 1000)
            if kind == "cut":
                self.close_connection = True
                return None
            text = "" if kind == "empty" else "x " * tokens
            reason = "abort" if kind == "abort" else "stop"
            choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}]
            return self.plain(200, {"choices": choices, "usage": usage})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})  # no token yet
        times: list[float] = []
        for index in range(0 if kind == "empty" else tokens):
            time.sleep(self.config["itl_ms" if index else "ttft_ms"] / 1000)
            if index == 2 and kind == "cut":
                self.close_connection = True
                return None
            self.event({"choices": [{"index": 0, "delta": {"content": "x "}}]})
            times.append(time.perf_counter())
        done["ttft_ms"] = (times[0] - arrived) * 1000 if times else None
        done["itl_ms"] = [(b - a) * 1000 for a, b in itertools.pairwise(times)]
        if kind == "error_event":
            self.event({"error": {"message": "EngineCore died", "code": 500}})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "abort" if kind == "abort" else "stop"}]})
        if body.get("stream_options", {}).get("include_usage"):
            self.event({"choices": [], "usage": usage})
        if kind != "no_done":
            self.event(b"[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        return None


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def serve(config: dict[str, Any]) -> None:
    """Serve until killed; prints the port."""
    Handler.config = DEFAULTS | config
    if Handler.config["log"]:
        Handler.log = Path(Handler.config["log"]).open("a", encoding="utf-8")  # noqa: SIM115
    time.sleep(Handler.config["engine_seconds"])
    server = Server(("127.0.0.1", Handler.config["port"]), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def fake_server(**config: Any) -> Iterator[str]:
    """The URL of a fake replica in a process of its own."""
    command = [sys.executable, __file__, json.dumps(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FakeFleet:
    """Fake replicas, a supervisor that starts dead ones again, and a router that passes requests on.

    The router does what vLLM's does here: round robin, a request that no replica has begun to answer goes to the
    next one, and an answer that has begun is cut if its replica dies.
    """

    def __init__(self, folder: Path, replicas: int = 2, restart_seconds: float = 0.3, **config: Any) -> None:
        self.file = folder / "fleet.json"
        self.restart_seconds = restart_seconds
        self.configs = [{"port": free_port(), **config} for _ in range(replicas)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.started: list[float] = []
        self.stopping = threading.Event()
        self.restarts = 0

    def start(self, index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, json.dumps(self.configs[index])]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def write(self) -> None:
        rows = [
            {"name": f"replica-{i}", "url": f"http://127.0.0.1:{c['port']}", "pid": p.pid, "started_at": at}
            for i, (c, p, at) in enumerate(zip(self.configs, self.processes, self.started, strict=True))
        ]
        write_json(self.file, {"router": f"http://127.0.0.1:{self.router.server_address[1]}", "replicas": rows})

    def supervise(self) -> None:
        while not self.stopping.wait(0.02):
            for index, process in enumerate(self.processes):
                if process.poll() is not None and not self.stopping.wait(self.restart_seconds):
                    self.processes[index], self.started[index] = self.start(index), time.time()
                    self.restarts += 1
                    self.write()

    def __enter__(self) -> FakeFleet:
        ports = [config["port"] for config in self.configs]
        turn = itertools.count()

        class Router(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                first = next(turn)
                for offset in range(len(ports)):
                    port = ports[(first + offset) % len(ports)]
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                    try:
                        connection.request("POST", self.path, body)
                        response = connection.getresponse()
                        whole = None if response.headers.get("Content-Length") is None else response.read()
                    except (OSError, http.client.HTTPException):
                        continue
                    self.send_response(response.status)
                    self.end_headers()
                    if whole is not None:
                        self.wfile.write(whole)
                    else:
                        with contextlib.suppress(OSError, http.client.HTTPException):
                            while line := response.readline():
                                self.wfile.write(line)
                                self.wfile.flush()
                    return
                self.send_error(503, "no replica")

        self.router = Server(("127.0.0.1", 0), Router)
        threading.Thread(target=self.router.serve_forever, daemon=True).start()
        self.processes = [self.start(index) for index in range(len(self.configs))]
        self.started = [time.time()] * len(self.configs)
        self.write()
        self.thread = threading.Thread(target=self.supervise, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join(10)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        self.router.shutdown()
        self.router.server_close()


def stress(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m stress ...` as the container does."""
    command = [sys.executable, "-m", "stress", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **more)


def write_dataset(path: Path, rows: int = 60) -> Path:
    """A small dataset."""
    path.write_text(
        "".join(
            json.dumps(
                {"instruction": f"How do I restart pod number {n}?", "input": f"in shop-{n}", "output": f"kubectl {n}"}
            )
            + "\n"
            for n in range(rows)
        )
    )
    return path


def test_the_fake_waits_as_configured() -> None:
    from stress.client import ask

    with fake_server(ttft_ms=60, itl_ms=20, tokens=3) as url:
        began = time.perf_counter()
        record = ask(url, "a", [{"role": "user", "content": "x" * 40}], stream=False, max_tokens=9, timeout_seconds=5)
        assert time.perf_counter() - began >= 0.1
    assert (record.error, record.prompt_tokens, record.completion_tokens) == (None, 10, 3)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
