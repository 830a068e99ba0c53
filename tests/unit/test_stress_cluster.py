"""What the drills ask of an API server, against a fake one: whom they take, whom they leave, and how far things are."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import ValidationError

from stress import cluster
from stress.cluster import Api, Cluster, ClusterError
from stress.drills import Terminated, held_back, terminable
from stress.scenarios import Bounds, DrillSpec, judged

Object = dict[str, Any]
SERVING, TUNING = "drydock-serving", "drydock-tuning"


class FakeKubernetes:
    """Pods, their logs, and nodes; an evicted or deleted pod is handed to `taken`, and gone unless that keeps it."""

    def __init__(self, folder: Path) -> None:
        self.account = folder / "account"
        self.account.mkdir()
        (self.account / "token").write_text("first\n")
        self.pods: dict[str, Callable[[], list[Object]]] = {}
        self.logs: dict[str, str] = {}
        self.nodes: dict[str, Object] = {}
        self.config: dict[str, dict[str, str]] = {}  # the data of ConfigMaps
        self.told: Callable[[dict[str, str]], None] = lambda data: None  # hears of it when one of these changes
        self.taken: Callable[[str, str], None] = lambda namespace, name: None
        self.forbidden: dict[str, int] = {}  # pods whose eviction is refused so many times
        self.asked: list[tuple[str, str, Any]] = []
        self.tokens: list[str] = []
        self.failing = 0  # so many answers are 500

    def __enter__(self) -> FakeKubernetes:
        world = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                world.tokens.append(self.headers["Authorization"])
                status, value = world.answer(self.command, self.path, body)
                text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text)

            do_DELETE = do_POST = do_PATCH = do_GET

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, url: str, body: Any) -> tuple[int, Any]:
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        self.asked.append((method, path, body))
        if self.failing:
            self.failing -= 1
            return 500, {"message": "etcdserver: leader changed"}
        parts = path.strip("/").split("/")
        if parts[2] == "nodes":
            node = self.nodes.get(parts[3])
            if node is None:
                return 404, {"message": f'nodes "{parts[3]}" not found'}
            if method == "PATCH":
                node["spec"] |= body["spec"]
            return 200, node
        namespace, rest = parts[3], parts[5:]
        if parts[4] == "configmaps":
            if rest[0] not in self.config:
                return 404, {"message": f'configmaps "{rest[0]}" not found'}
            data = self.config[rest[0]] | body["data"]
            self.config[rest[0]] = {key: value for key, value in data.items() if value is not None}
            self.told(self.config[rest[0]])
            return 200, {}
        if not rest:
            wanted = query["labelSelector"][0].split("=")
            found = [pod for pod in self.pods[namespace]() if pod["metadata"]["labels"].get(wanted[0]) == wanted[1]]
            return 200, {"items": found}
        name = rest[0]
        there = {pod["metadata"]["name"]: pod for pod in self.pods[namespace]()}
        if name not in there:
            return 404, {"message": f'pods "{name}" not found'}
        if rest[1:] == ["log"]:
            return (200, self.logs[name]) if name in self.logs else (400, {"message": "is waiting to start"})
        if rest[1:] == ["eviction"] and self.forbidden.get(name, 0) > 0:
            self.forbidden[name] -= 1
            return 429, {"message": "Cannot evict pod as it would violate the pod's disruption budget."}
        if method == "DELETE" and body["preconditions"]["uid"] != there[name]["metadata"]["uid"]:
            return 409, {"message": "the UID in the precondition does not match"}
        self.taken(namespace, name)
        return 200, {}


def pod(
    name: str, *, age: int = 0, stage: int = 3, node: str = "gpu-0", labels: Object | None = None, **more: Any
) -> Object:
    """An engine's pod: 0 without its container, 1 started, 2 its engine answers, 3 ready."""
    status: Object = {"phase": "Running" if stage else "Pending", "conditions": []}
    if stage:
        status["containerStatuses"] = [{"name": "engine", "state": {"running": {}}, "started": stage > 1}]
        status["conditions"] = [{"type": "Ready", "status": "True" if stage == 3 else "False"}]
    metadata = {"name": name, "uid": f"uid-{name}", "creationTimestamp": f"2026-01-01T00:00:{age:02}Z"}
    return {
        "metadata": {**metadata, "labels": labels or {"app": "engine"}, **more},
        "spec": {"nodeName": node},
        "status": status,
    }


def tuner(name: str, index: int = 0, *, job: str = "tune-a", works: bool = True) -> Object:
    labels = {"app": "tune", cluster.JOB_LABEL: job, cluster.INDEX_LABEL: str(index)}
    found = pod(name, stage=0, labels=labels)
    if works:
        found["status"]["initContainerStatuses"] = [{"name": "tune", "state": {"running": {}}}]
    return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[FakeKubernetes]:
    with FakeKubernetes(tmp_path) as fake:
        yield fake


@pytest.fixture
def engines(world: FakeKubernetes) -> list[Object]:
    """The replicas that the fake lists: a test changes them."""
    found = [pod("a", age=1), pod("b", age=2, node="gpu-1"), pod("c", age=3)]
    world.pods[SERVING] = lambda: found
    world.nodes = {"gpu-0": {"spec": {}}, "gpu-1": {"spec": {}}}
    world.taken = lambda _, name: found.remove(next(item for item in found if item["metadata"]["name"] == name))
    return found


@pytest.fixture
def found(world: FakeKubernetes) -> Cluster:
    return Cluster(Api(world.url, world.account), "http://router", SERVING, TUNING)


def test_a_replica_is_deleted_with_the_least_grace_and_by_its_uid(
    world: FakeKubernetes, engines: list[Object], found: Cluster
) -> None:
    before = time.time()
    assert before <= found.kill(["b"]) <= time.time()
    (deletion,) = [item for item in world.asked if item[0] == "DELETE"]
    assert deletion[1].endswith(f"/namespaces/{SERVING}/pods/b")
    assert deletion[2]["gracePeriodSeconds"] == 1 and deletion[2]["preconditions"] == {"uid": "uid-b"}
    assert found.names() == ["a", "c"]


def test_a_replica_counts_as_killed_once_its_kubelet_has_ended_it(
    world: FakeKubernetes, engines: list[Object], found: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it ends it may answer, and its answers are not those of what comes in its place."""
    found.poll_seconds, listed = 0.01, iter(range(10))

    def ending() -> list[Object]:
        left = [] if next(listed) > 5 else [pod("b", node="gpu-1", deletionTimestamp="2026-01-01T00:00:09Z")]
        return [engines[0], *left, engines[2]]

    world.taken = lambda _, name: world.pods.update({SERVING: ending})
    before = time.time()
    assert found.kill(["b"]) - before < 1 and next(listed) == 7
    world.taken = lambda _, name: None  # its node is dead, say
    world.pods[SERVING] = lambda: engines
    monkeypatch.setattr(cluster, "GONE_SECONDS", 0.1)
    with pytest.raises(ClusterError, match=r"b: not gone 0\.1 s after the deletion"):
        found.kill(["b"])


def test_the_one_in_its_place_is_followed_stage_by_stage(engines: list[Object], found: Cluster) -> None:
    found.kill(["b"])
    assert found.reached("b") == (0, "b")
    for stage in (0, 1, 2, 3):
        engines[2:] = [pod("d", age=9, stage=stage)]
        assert found.reached("b") == (stage, "d")


def test_after_an_outage_each_new_pod_counts_for_one_that_was_lost(engines: list[Object], found: Cluster) -> None:
    found.kill(["a", "b", "c"])
    assert engines == []
    engines += [pod("z", age=5, stage=1), pod("y", age=4)]
    assert [found.reached(name) for name in ("a", "b", "c")] == [(3, "y"), (1, "z"), (0, "c")]


def test_ready_means_all_there_and_none_leaving(engines: list[Object], found: Cluster) -> None:
    assert found.unready() == []
    engines.append(pod("d", stage=2))
    engines[0]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert found.unready() == ["a", "d"] and found.names() == ["b", "c", "d"]
    engines[1]["status"]["phase"] = "Failed"  # evicted for its disk, say: it stays listed
    assert "b" not in found.names()
    engines.clear()
    assert found.unready() == ["(there is no pod)"]
    with pytest.raises(ClusterError, match=r"no replica 'a' in drydock-serving, which has: none"):
        found.check(["a"])


def test_a_drain_waits_for_the_disruption_budget(
    world: FakeKubernetes, engines: list[Object], found: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "EVICTION_POLL_SECONDS", 0.01)
    node, names = found.node_of("a")
    assert (node, names) == ("gpu-0", ["a", "c"])
    found.cordon(node)
    assert world.nodes["gpu-0"]["spec"]["unschedulable"] is True
    world.forbidden = {"c": 2}
    checked: list[bool] = []
    found.drain(names, 5, lambda: checked.append(True))
    assert len(checked) == 2 and found.names() == ["b"]
    evictions = [item for item in world.asked if item[1].endswith("/eviction")]
    assert [item[2]["metadata"]["name"] for item in evictions] == ["a", "c", "c", "c"]
    world.forbidden = {"b": 1000}
    with pytest.raises(ClusterError, match=r"b: its disruption budget did not allow"):
        found.drain(["b"], 0.05, lambda: None)


def test_a_node_is_uncordoned_whatever_it_takes_and_never_somebody_elses(
    world: FakeKubernetes, engines: list[Object], found: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    found.cordon("gpu-0")
    with pytest.raises(ClusterError, match="cordoned already"):
        found.node_of("a")
    world.failing = 1
    found.uncordon("gpu-0")
    assert not world.nodes["gpu-0"]["spec"]["unschedulable"]
    assert [item[2] for item in world.asked if item[0] == "PATCH"][-1] == {"spec": {"unschedulable": None}}
    monkeypatch.setattr(cluster, "MEND_SECONDS", 0)
    world.failing = 1
    with pytest.raises(ClusterError, match=r"node gpu-0 stays cordoned: kubectl uncordon gpu-0"):
        found.uncordon("gpu-0")
    world.nodes.clear()
    found.uncordon("gpu-0")  # taken away by the autoscaler meanwhile


def test_a_loss_of_the_registry_is_declared_with_its_end_and_taken_back_whatever_it_takes(
    world: FakeKubernetes, engines: list[Object], found: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.config = {"drill-faults": {"another": "1"}}
    before = time.time()
    at = found.lose_registry(90)
    assert before <= at <= time.time()
    assert world.config == {"drill-faults": {"another": "1", "registry_unreachable_until": f"{at + 90:.0f}"}}
    assert found.registry_unseen() == {"a": None, "b": None, "c": None}  # these have no sidecar
    world.failing = 1
    found.find_registry()
    assert world.config == {"drill-faults": {"another": "1"}}
    monkeypatch.setattr(cluster, "MEND_SECONDS", 0)
    world.failing = 1
    with pytest.raises(ClusterError, match="drill-faults: registry_unreachable_until stays there until it is over"):
        found.find_registry()
    world.config.clear()
    found.find_registry()  # the stack has taken it away meanwhile
    with pytest.raises(ClusterError, match="404"):
        found.lose_registry(90)


def test_replicas_that_stay_and_are_not_ready_have_lapsed(engines: list[Object], found: Cluster) -> None:
    engines[0] = pod("a", stage=2)
    engines[1] = pod("b", stage=2, deletionTimestamp="2026-01-01T00:00:09Z")  # KEDA takes it, say
    engines.append(pod("new", stage=1))
    assert found.lapsed(["a", "b", "c"]) == ["a"]


def test_of_a_sidecars_metrics_the_one_counts_whose_name_it_is() -> None:
    text = "# HELP drydock_registry_unreachable_seconds Since\ndrydock_registry_unreachable_seconds 12.5\nother 1\n"
    assert cluster.unseen_in(text) == 12.5 and cluster.unseen_in("other 1\n") is None


def test_of_tuning_pods_one_at_work_is_taken_and_its_successor_found(world: FakeKubernetes, found: Cluster) -> None:
    tuners = [tuner("late", works=False, job="tune-b"), tuner("two", 1), tuner("one", 0)]
    world.pods[TUNING] = lambda: tuners
    first, second = found.tuners()
    assert (first["metadata"]["name"], second["metadata"]["name"]) == ("one", "two")
    world.logs = {"one": 'step 4/90  loss 2\n{"message": "step 6/90  loss 1"}\n'}
    assert found.step(first) == 6
    world.forbidden = {"one": 1}
    with pytest.raises(ClusterError, match="forbids its eviction"):
        found.evict_tuner(first)
    found.evict_tuner(first)
    assert found.tuner_after(first) is None  # its neighbour of the same Job is not it
    tuners[2:] = [tuner("other", job="tune-c"), tuner("three", works=False)]
    assert found.tuner_after(first) is None
    tuners[3:] = [tuner("three")]
    after = found.tuner_after(first)
    assert after is not None and after["metadata"]["name"] == "three"
    with pytest.raises(ClusterError, match="waiting to start"):
        found.resumed_at(after)
    world.logs["three"] = '{"message": "resuming at step 6 of 90"}\nstep 8/90\n'
    assert found.resumed_at(after) == 6


def test_the_token_is_read_for_each_question_and_refusals_are_told(
    world: FakeKubernetes, engines: list[Object], found: Cluster
) -> None:
    found.names()
    (world.account / "token").write_text("second")
    found.names()
    assert world.tokens == ["Bearer first", "Bearer second"]
    world.failing = 1
    with pytest.raises(ClusterError, match="500: etcdserver: leader changed") as refused:
        found.names()
    assert refused.value.status == 500
    gone = Cluster(Api("http://127.0.0.1:9", world.account), "http://router", SERVING, TUNING)
    with pytest.raises(ClusterError, match="no answer of the API server") as silent:
        gone.names()
    assert silent.value.status == 0


def test_a_pod_that_has_yet_to_tune_is_worth_waiting_for(world: FakeKubernetes, found: Cluster) -> None:
    ended = tuner("ended")
    ended["status"]["initContainerStatuses"][0]["state"] = {"terminated": {"exitCode": 0}}
    failed = tuner("failed", works=False)
    failed["status"]["phase"] = "Failed"
    tuners = [ended, tuner("going", works=False), failed]
    tuners[1]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:09Z"
    world.pods[TUNING] = lambda: tuners
    assert not found.tunes_or_will()
    tuners.append(tuner("waits for a node", works=False))
    assert found.tunes_or_will() and found.tuners() == []
    tuners[3:] = [tuner("one")]
    assert found.tunes_or_will()


def test_a_drill_is_not_held_by_those_alone_who_were_answered() -> None:
    values = {"short_p95_ratio": 1.0, "failed_short": 195}
    assert [item["held"] for item in judged("long-prompts", values, {}, Bounds())] == [True, False]


def test_a_scenario_is_named_once() -> None:
    with pytest.raises(ValidationError, match="outage: named twice"):
        DrillSpec.model_validate({"scenarios": ["outage", "replica-loss", "outage"]})


def test_sigterm_while_something_is_put_right_waits_for_it() -> None:
    done: list[str] = []
    with terminable():
        with pytest.raises(Terminated), held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            done.append("uncordoned")
        with held_back():
            done.append("nothing came")
    assert done == ["uncordoned", "nothing came"]


def test_bounds_hold_at_their_limit_and_not_without_a_figure() -> None:
    bounds = Bounds(lost_requests=2, recovery_seconds=60)
    held = judged("replica-loss", {"failed_not_begun": 2, "recovery_seconds": 60.5}, {}, bounds)
    assert [(item["name"], item["held"]) for item in held] == [
        ("failed_not_begun", True),
        ("recovery_seconds", False),
    ]
    (absent,) = judged("outage", {}, {"recovery_seconds": "no token"}, bounds)
    assert absent == {"name": "recovery_seconds", "at_most": 60, "reason": "no token", "held": False}
    assert bounds.timeout_seconds("outage") == 120 and Bounds().timeout_seconds("node-drain") == 5400
