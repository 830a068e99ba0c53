"""The real router before replicas: who gets requests, how often, what arrives of them, and what is counted."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.processes import free_ports
from tests.contract.conftest import ROOT, wait_until

SECONDS = 20  # each change is seen within two; the rest is for a busy machine
KEYS = ({"Authorization": "Bearer key-a"}, {"api-key": "key-a"})
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
REFUSAL = {"error": {"message": "no place for tier é", "type": "rate_limit_error", "param": None, "code": "busy"}}
TRIES = 3


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def answer(self, status: int, value: Any, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Worker(Quiet):
    """Stands for a replica: ready, and lets in only who sends the key."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path in ("/ready", "/health"):
            return self.answer(200, {})
        if self.path not in ("/v1/models", "/v1/chat/completions", "/v1/completions"):
            return self.answer(404, {})
        key = self.headers.get("api-key") or (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if key != "key-a":
            self.server.refused += 1
            return self.answer(401, {"error": {"code": "invalid_api_key"}})
        if not body or not json.loads(body).get("stream"):
            return self.answer(200, {"answered": self.path})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for text in (b"data: 1\n\n", b"data: [DONE]\n\n", b""):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        return None

    do_POST = do_GET


class Told(Quiet):
    """Stands for a replica: ready, whatever else it answers. The test says what, by the model that is asked for."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path in ("/ready", "/health"):
            return self.answer(200, {})
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            return self.answer(404, {})
        self.server.bodies.append(body)
        status = self.server.statuses.get(json.loads(body).get("model"), 200)
        if status == "wait":
            assert self.server.go.wait(20)
        elif status == "lost":
            self.close_connection = True
            return None
        elif status != 200:
            return self.answer(status, REFUSAL, retry_after="7")
        return self.answer(200, {})

    do_POST = do_GET


class Kubernetes(Quiet):
    """Stands for the API server: lists and watches pods, and knows nothing else."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path.partition("?")[0] + (" watch" if "watch=true" in self.path else " list"))
        if not self.path.startswith(f"/api/v1/namespaces/{self.server.namespace}/pods?"):
            return self.answer(403, {"kind": "Status", "code": 403})
        if "watch=true" not in self.path:
            listed = {"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": []}
            return self.answer(200, listed)
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        while event := self.server.events.get():
            data = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        return None


@dataclass
class Cluster:
    """The router with what is around it."""

    url: str
    metrics_url: str
    worker: Any
    kubernetes: Any
    number: int = 1

    def pod(
        self, name: str, *, ready: bool, host: str = "127.0.0.1", label: str = "app=engine", gone: bool = False
    ) -> None:
        """Tell the router of a pod as it is now."""
        self.number += 1
        metadata: dict[str, Any] = {"name": name, "namespace": self.kubernetes.namespace}
        metadata |= {"resourceVersion": str(self.number), "labels": dict([label.split("=")])}
        if gone:
            metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        status = {"phase": "Running", "podIP": host, "conditions": conditions}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}, "status": status}
        self.kubernetes.events.put({"type": "MODIFIED", "object": pod})

    def replicas(self) -> list[str]:
        return httpx.get(f"{self.url}/list_workers", timeout=10).json()["urls"]

    def counted(self, name: str, *labels: str) -> float:
        """The sum over the series of a counter that have all of these labels."""
        lines = httpx.get(f"{self.metrics_url}/metrics", timeout=10).text.splitlines()
        found = [line for line in lines if re.match(name + r"[{ ]", line) and all(label in line for label in labels)]
        return sum(float(line.rpartition(" ")[2]) for line in found)


@contextlib.contextmanager
def serving(handler: type[Quiet], **state: object) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(state)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def running_router(folder: Path, *arguments: str, probe: str, **environment: str) -> Iterator[tuple[str, str]]:
    """Where it answers clients, and Prometheus, once `probe` is answered."""
    port, metrics_port = free_ports(2)
    command = [sys.executable, "-m", "serving", "router", "--port", str(port), "--metrics-port", str(metrics_port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *arguments], stdout=log, stderr=log, cwd=ROOT, env=os.environ | environment
        )

    def up() -> bool:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        try:
            return httpx.get(f"http://127.0.0.1:{port}{probe}", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(up, 60, "router")
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def running_cluster(
    folder: Path, handler: type[Quiet], namespace: str, label: str, *more: str, **state: object
) -> Iterator[Cluster]:
    """The router before the pods of `namespace` with `label`, behind all of which is one `handler`."""
    watched = {"asked": [], "events": queue.Queue(), "namespace": namespace}
    with serving(handler, **state) as worker, serving(Kubernetes, **watched) as kubernetes:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{kubernetes.server_port}"}}],
            "users": [{"name": "me", "user": {"token": "x"}}],
        }
        (folder / "kubeconfig").write_text(json.dumps(config))
        arguments = ["--selector", label, "--namespace", namespace, *more]
        arguments += ["--replica-port", str(worker.server_port)]
        config_path = str(folder / "kubeconfig")
        with running_router(folder, *arguments, probe="/liveness", KUBECONFIG=config_path) as (url, metrics_url):
            yield Cluster(url, metrics_url, worker, kubernetes)
        kubernetes.events.put(None)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("router")
    with running_cluster(folder, Worker, "drydock-serving", "app=engine", refused=0) as cluster:
        yield cluster


def test_without_a_replica_a_request_is_counted_where_autoscaling_looks(cluster: Cluster) -> None:
    """From zero replicas nothing else tells that somebody waits: the scaler's trigger is this counter."""
    assert cluster.replicas() == []
    assert httpx.post(f"{cluster.url}/v1/chat/completions", json=CHAT, timeout=30).status_code == 503
    labels = ('error_type="no_available_workers"', 'route="/v1/chat/completions"')
    assert cluster.counted("vllm_router_request_errors_total", *labels) >= 1
    assert cluster.counted("vllm_router_requests_total") == 0, "counts only what reached a replica"


def test_it_stays_alive_without_replicas_but_is_not_ready(cluster: Cluster) -> None:
    """A readiness probe on /readiness would close the Service at zero replicas, and nothing would scale up again."""
    assert httpx.get(f"{cluster.url}/liveness").status_code == 200
    assert httpx.get(f"{cluster.url}/readiness").status_code == 503


def test_it_asks_kubernetes_to_list_and_watch_pods_of_the_namespace_and_nothing_more(cluster: Cluster) -> None:
    wait_until(lambda: len(cluster.kubernetes.asked) >= 2, SECONDS, "list and watch")
    pods = "/api/v1/namespaces/drydock-serving/pods"
    assert set(cluster.kubernetes.asked) == {f"{pods} list", f"{pods} watch"}


def test_a_pod_gets_requests_while_it_is_ready(cluster: Cluster) -> None:
    url = f"http://127.0.0.1:{cluster.worker.server_port}"
    cluster.pod("other", ready=True, label="app=something-else", host="127.0.0.2")
    cluster.pod("a", ready=False)
    cluster.pod("a", ready=True)
    wait_until(lambda: cluster.replicas() == [url], SECONDS, "a ready pod")
    cluster.pod("a", ready=False)
    wait_until(lambda: cluster.replicas() == [], SECONDS, "a pod that is no longer ready")
    cluster.pod("a", ready=True)
    wait_until(lambda: cluster.replicas() == [url], SECONDS, "a pod that is ready again")
    cluster.pod("a", ready=True, gone=True)  # what `kubectl delete pod` does first: it drains, ready as before
    wait_until(lambda: cluster.replicas() == [], SECONDS, "a pod that is being deleted")


class Kaitos(Quiet):
    """Stands for a replica of KAITO's: vLLM without our request layer, which asks for no key and has no /ready."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.asked.add(self.path)
        known = self.path in ("/health", "/v1/chat/completions")
        return self.answer(200 if known else 404, {"answered": self.path})

    do_POST = do_GET


def test_pods_that_kaito_makes_get_requests_by_their_own_health(tmp_path: Path) -> None:
    label, health = "kaito.sh/workspace=engine-1a2b3c4d", ("--replica-health", "/health")
    with running_cluster(tmp_path, Kaitos, "drydock-kaito", label, *health, asked=set()) as cluster:
        cluster.pod("engine-1a2b3c4d-0", ready=True, label=label)
        wait_until(lambda: len(cluster.replicas()) == 1, SECONDS, "a ready pod")
        wait_until(lambda: "/health" in cluster.worker.asked, SECONDS, "its health")
        reply = httpx.post(f"{cluster.url}/v1/chat/completions", json=CHAT, timeout=30)
        assert (reply.status_code, reply.json()) == (200, {"answered": "/v1/chat/completions"})
        assert cluster.worker.asked == {"/health", "/v1/chat/completions"}


@pytest.fixture
def replica(cluster: Cluster) -> None:
    cluster.pod("b", ready=True)
    wait_until(lambda: len(cluster.replicas()) == 1, SECONDS, "a ready pod")


@pytest.mark.parametrize("key", KEYS, ids=["authorization", "api-key"])
@pytest.mark.usefixtures("replica")
def test_a_clients_key_reaches_the_replica_on_every_route(cluster: Cluster, key: dict[str, str]) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"model": "base", "prompt": "hi"})):
        reply = httpx.post(cluster.url + path, json=body, headers=key, timeout=30)
        assert (reply.status_code, reply.json()) == (200, {"answered": path})
        with httpx.stream("POST", cluster.url + path, json=body | {"stream": True}, headers=key, timeout=30) as stream:
            assert (stream.status_code, stream.read()) == (200, b"data: 1\n\ndata: [DONE]\n\n")
    reply = httpx.get(f"{cluster.url}/v1/models", headers=key, timeout=30)
    assert (reply.status_code, reply.json()) == (200, {"answered": "/v1/models"})


@pytest.mark.usefixtures("replica")
def test_a_refusal_of_the_replica_comes_back_as_it_is_and_is_not_tried_again(cluster: Cluster) -> None:
    before = cluster.worker.refused
    reply = httpx.post(f"{cluster.url}/v1/chat/completions", json=CHAT, headers={"api-key": "wrong"}, timeout=30)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert cluster.worker.refused == before + 1


@pytest.mark.usefixtures("replica")
def test_a_ready_pod_that_does_not_answer_holds_up_the_others_for_seconds_only(cluster: Cluster) -> None:
    cluster.pod("deaf", ready=True, host="127.0.0.9")
    cluster.pod("b", ready=True, gone=True)
    waited = wait_until(lambda: cluster.replicas() == [], 40, "the deletion behind it")
    assert waited > 1, "or the router has learnt to wait beside its other work: then the flags may go"


@dataclass
class Pair:
    """The router before two replicas of which the test decides what they answer."""

    url: str
    replicas: tuple[Any, Any]

    def tell(self, **statuses: object) -> None:
        """What both answer to each model from now on."""
        for replica in self.replicas:
            replica.statuses = statuses

    def ask(self, model: str, **more: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=CHAT | {"model": model} | more, timeout=30)

    def tries(self) -> int:
        return sum(len(replica.bodies) for replica in self.replicas)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    go = threading.Event()
    with (
        serving(Told, bodies=[], statuses={}, go=go) as first,
        serving(Told, bodies=[], statuses={}, go=go) as second,
    ):
        arguments = [f"--replica=http://127.0.0.1:{replica.server_port}" for replica in (first, second)]
        with running_router(tmp_path_factory.mktemp("pair"), *arguments, probe="/readiness") as (url, _):
            yield Pair(url, (first, second))


@pytest.fixture
def pair(shared: Pair) -> Pair:
    """Both replicas answer, neither is shut out, and they have heard nothing yet."""
    shared.tell()

    def both() -> bool:
        return shared.ask("base").status_code == 200 and all(replica.bodies for replica in shared.replicas)

    for replica in shared.replicas:
        replica.bodies.clear()
        replica.go.clear()
    wait_until(both, SECONDS, "both replicas")
    for replica in shared.replicas:
        replica.bodies.clear()
    return shared


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("status", "tries"), [(400, 1), (401, 1), (404, 1), (408, TRIES), (429, TRIES), (500, TRIES), (503, TRIES)]
)
def test_an_error_of_all_replicas_comes_back_as_it_is_and_soon(
    pair: Pair, status: int, tries: int, stream: bool
) -> None:
    pair.tell(low=status)
    started = time.monotonic()
    reply = pair.ask("low", stream=stream)
    assert time.monotonic() - started < 2, "two waits of 50 and 75 ms; the rest is for a busy machine"
    assert (reply.status_code, reply.json(), reply.headers["retry-after"]) == (status, REFUSAL, "7")
    assert pair.tries() == tries


def test_a_429_of_one_replica_is_tried_on_the_other(pair: Pair) -> None:
    pair.replicas[0].statuses = {"low": 429}
    answers = [pair.ask("low").status_code for _ in range(40)]
    # Idle replicas are chosen at random: three tries at the full one are one request in eight.
    assert answers.count(200) > 20
    assert len(pair.replicas[0].bodies) > answers.count(429) * TRIES, "some found the other at the second or third try"


def test_whoever_is_refused_again_and_again_shuts_nobody_else_out(pair: Pair) -> None:
    refusals = {"none": 401, "odd": 400, "old": 404, "slow": 408, "low": 429}
    pair.tell(**refusals)
    for model, status in refusals.items():
        for _ in range(4):
            assert pair.ask(model).status_code == status
        assert [pair.ask("base").status_code for _ in range(4)] == [200] * 4, model


def test_errors_of_all_replicas_shut_everybody_out_for_seconds(pair: Pair) -> None:
    """The price of the next test: no client should be able to make replicas answer 5xx."""
    pair.tell(bad=503)
    for _ in range(2):
        assert pair.ask("bad").status_code == 503
    failed = pair.tries()
    assert pair.ask("base").status_code == 503
    assert pair.tries() == failed, "no replica was asked"
    wait_until(lambda: pair.ask("base").status_code == 200, 10, "half-open")


def test_a_lost_replica_costs_no_request_even_if_the_other_is_busy(pair: Pair) -> None:
    """A lost one has no requests, so it is what the router chooses for every try until its breaker opens."""
    pair.tell(long="wait")
    with contextlib.ExitStack() as stack:
        busy = threading.Thread(target=pair.ask, args=("long",))
        busy.start()
        stack.callback(busy.join)
        stack.callback(pair.replicas[0].go.set)
        wait_until(pair.tries, 5, "a replica is busy")
        [lost] = [replica for replica in pair.replicas if not replica.bodies]
        lost.statuses = {"base": "lost"}
        assert [pair.ask("base").status_code for _ in range(4)] == [200] * 4
        assert len(lost.bodies) == TRIES - 1


ADDED = {"stream": False, "no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True}
ADDED_TO_CHAT = ADDED | {
    "logprobs": False, "continue_final_message": False, "separate_reasoning": True, "stream_reasoning": True,
    "include_reasoning": True, "return_hidden_states": False,
}  # fmt: skip
ADDED_TO_COMPLETIONS = ADDED | {"echo": False, "return_hidden_states": False}


def arrived(pair: Pair, path: str, body: dict[str, Any]) -> Any:
    assert httpx.post(f"{pair.url}/v1/{path}", json=body, timeout=30).status_code == 200
    [seen] = [replica.bodies.pop() for replica in pair.replicas if replica.bodies]
    return json.loads(seen)


def test_a_replica_sees_fields_that_no_client_sent(pair: Pair) -> None:
    """Whatever lists the fields that clients may send must let these pass, with these values."""
    assert arrived(pair, "chat/completions", CHAT) == CHAT | ADDED_TO_CHAT
    prompt = {"model": "base", "prompt": "hi"}
    assert arrived(pair, "completions", prompt) == prompt | ADDED_TO_COMPLETIONS


def test_unknown_fields_reach_the_replica_last_and_nulls_only_if_unknown(pair: Pair) -> None:
    unknown = {"zeta": {"deep": [1, None]}, "alpha": None}
    seen = arrived(pair, "chat/completions", unknown | CHAT | {"n": None, "stop": None, "max_tokens": 3})
    assert seen == CHAT | ADDED_TO_CHAT | {"max_tokens": 3} | unknown
    assert list(seen)[-2:] == ["zeta", "alpha"]
    seen = arrived(pair, "completions", unknown | {"model": "base", "prompt": "hi", "n": None, "logprobs": None})
    assert seen == {"model": "base", "prompt": "hi"} | ADDED_TO_COMPLETIONS | unknown


def test_what_is_within_messages_and_tools_loses_what_the_router_does_not_know(pair: Pair) -> None:
    messages = [
        {"role": "user", "content": "hi", "odd": 1},
        {"role": "user", "content": 5},
        {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": []},
        {"role": "developer", "content": "as it is", "odd": 1},
    ]
    function = {"name": "f", "parameters": {}, "strict": True}
    tools = [{"type": "function", "function": function}]
    seen = arrived(pair, "chat/completions", {"model": "base", "messages": messages, "tools": tools})
    assert seen["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "user", "content": ""},
        {"role": "assistant", "reasoning": "so", "tool_calls": []},
        {"role": "developer", "content": "as it is", "odd": 1},
    ]
    assert seen["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("wrong", [{"stream": None}, {"logprobs": None}, {"n": -1}, {"messages": None}], ids=str)
def test_the_router_itself_refuses_types_that_it_does_not_expect(pair: Pair, wrong: dict[str, Any]) -> None:
    """In plain text, before any key was looked at."""
    reply = httpx.post(f"{pair.url}/v1/chat/completions", json=CHAT | wrong, timeout=30)
    assert (reply.status_code, reply.headers["content-type"]) == (422, "text/plain; charset=utf-8")
    assert pair.tries() == 0
