"""The real router before replicas that Kubernetes names: who gets requests, which headers arrive, what is counted."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from common.processes import free_ports
from tests.contract.conftest import ROOT, wait_until

SECONDS = 20  # each change is seen within two; the rest is for a busy machine
KEYS = ({"Authorization": "Bearer key-a"}, {"api-key": "key-a"})
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
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


class Kubernetes(Quiet):
    """Stands for the API server: lists and watches pods, and knows nothing else."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path.partition("?")[0] + (" watch" if "watch=true" in self.path else " list"))
        if not self.path.startswith("/api/v1/namespaces/drydock-serving/pods?"):
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

    def pod(self, name: str, *, ready: bool, host: str = "127.0.0.1", app: str = "engine", gone: bool = False) -> None:
        """Tell the router of a pod as it is now."""
        self.number += 1
        metadata: dict[str, Any] = {"name": name, "namespace": "drydock-serving", "resourceVersion": str(self.number)}
        metadata["labels"] = {"app": app}
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("router")
    worker, kubernetes = (ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Worker, Kubernetes))
    worker.refused, kubernetes.asked, kubernetes.events = 0, [], queue.Queue()  # type: ignore[attr-defined]
    for server in (worker, kubernetes):
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{kubernetes.server_port}"}}],
        "users": [{"name": "me", "user": {"token": "x"}}],
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    port, metrics_port = free_ports(2)
    command = [sys.executable, "-m", "serving", "router", "--port", str(port), "--metrics-port", str(metrics_port)]
    command += ["--selector", "app=engine", "--namespace", "drydock-serving", "--replica-port", str(worker.server_port)]
    with (folder / "log").open("wb") as log:
        environment = os.environ | {"KUBECONFIG": str(folder / "kubeconfig")}
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
    running = Cluster(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}", worker, kubernetes)

    def up() -> bool:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        try:
            return httpx.get(f"{running.url}/liveness", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(up, 60, "router")
        yield running
    finally:
        process.kill()
        process.wait()
        kubernetes.events.put(None)  # type: ignore[attr-defined]
        for server in (worker, kubernetes):
            server.shutdown()
            server.server_close()


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
    cluster.pod("other", ready=True, app="something-else", host="127.0.0.2")
    cluster.pod("a", ready=False)
    cluster.pod("a", ready=True)
    wait_until(lambda: cluster.replicas() == [url], SECONDS, "a ready pod")
    cluster.pod("a", ready=False)
    wait_until(lambda: cluster.replicas() == [], SECONDS, "a pod that is no longer ready")
    cluster.pod("a", ready=True)
    wait_until(lambda: cluster.replicas() == [url], SECONDS, "a pod that is ready again")
    cluster.pod("a", ready=True, gone=True)  # what `kubectl delete pod` does first: it drains, ready as before
    wait_until(lambda: cluster.replicas() == [], SECONDS, "a pod that is being deleted")


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
