"""The drills against fake replicas: real processes, really killed, started again by a small supervisor."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.files import read_json, read_jsonl, write_atomic, write_json
from common.processes import free_ports
from serving.state import new_boot, prepare
from stress.client import get_status
from tests.unit.blob_fakes import KEY, FakeAccount
from tests.unit.test_stress_cluster import FakeKubernetes, pod, tuner
from tests.unit.test_stress_fake import ROOT, FakeFleet, stress, write_dataset


@pytest.fixture
def common(tmp_path: Path) -> list[Any]:
    data = write_dataset(tmp_path / "data.jsonl")
    return [
        "--dataset", data, "--out", tmp_path, "--models", "a", "b", "--users", 6, "--ramp-seconds", 0.3,
        "--duration-seconds", 1.5, "--prompt-tokens", 100, "--before-seconds", 1.5, "--after-seconds", 0.7,
        "--timeout-seconds", 15,
    ]  # fmt: skip


def test_outage_by_phase(tmp_path: Path, common: list[Any]) -> None:
    times: dict[str, Any] = {"restart_seconds": 0.6, "engine_seconds": 0.8, "adapters_seconds": 0.7}
    with FakeFleet(tmp_path, **times, ttft_ms=20, itl_ms=5) as fleet:
        before = {replica["pid"] for replica in read_json(fleet.file)["replicas"]}
        done = stress("drill", "outage", *common)
        after = {replica["pid"] for replica in read_json(fleet.file)["replicas"]}
    assert done.returncode == 0, done.stderr
    assert fleet.restarts == 2 and not before & after
    found = read_json(tmp_path / "drills" / "outage.json")
    assert found["killed"] == ["replica-0", "replica-1"] and found["absent"] == {}
    phases = found["phases"]
    assert sum(phases.values()) == pytest.approx(found["recovery_seconds"], abs=0.01)
    # what the fakes were told to take, plus polling (0.1 s), starting Python, and a busy machine: 3.4 s were seen
    assert 0.5 <= phases["restart"] <= 8
    assert 0.7 <= phases["engine"] <= 8
    assert 0.4 <= phases["adapters"] <= 8
    assert 0.0 <= phases["routed"] <= 8
    assert found["recovery_seconds"] >= 2.0
    assert found["failed_probes"] >= 5
    assert set(found["failures_by_reason"]) <= {
        "status 503",
        "status 404",
        "stream ended without [DONE]",
        "connection reset",
    }
    assert [event["at"] for event in found["events"]] == sorted(event["at"] for event in found["events"])
    assert {"all replicas killed", "replica-1 ready", "first token through the router"} <= {
        e["name"] for e in found["events"]
    }
    for stages in found["replicas"].values():
        assert stages["ready_seconds"] == pytest.approx(
            stages["restart_seconds"] + stages["engine_seconds"] + stages["adapters_seconds"], abs=0.01
        )
    probes = list(read_jsonl(tmp_path / "drills" / "outage.requests.jsonl"))
    assert probes[0]["error"] is None and any(probe["error"] for probe in probes)


def test_replica_loss(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, engine_seconds=0.3, adapters_seconds=0.5, ttft_ms=30, itl_ms=40, tokens=12) as fleet:
        done = stress("drill", "replica-loss", *common, "--replica", "replica-1")
    assert done.returncode == 0, done.stderr
    assert fleet.restarts == 1
    found = read_json(tmp_path / "drills" / "replica-loss.json")
    rows = list(read_jsonl(tmp_path / "drills" / "replica-loss.requests.jsonl"))
    assert found["killed"] == "replica-1"
    assert 1.0 <= found["recovery_seconds"] <= 15  # 0.3 to be noticed, 0.3 engine, 0.5 adapters, starting Python
    assert found["requests"] == len(rows) > 30
    assert {row["phase"] for row in rows} == {"before", "lost", "after"}
    # streams on the killed replica are cut; whole answers are asked for again by the router
    assert found["failed_streams"] >= 1
    assert found["failed_before_kill"] == 0
    assert found["failed_non_streams"] <= found["failed_not_begun"] <= found["failed"]
    assert (
        found["failed"]
        == found["failed_streams"] + found["failed_non_streams"]
        == sum(r["error"] is not None for r in rows)
    )
    assert {row["error"] for row in rows} <= {None, "stream ended without [DONE]", "connection reset", "status 404"}
    assert found["p95_ratio"] > 0  # how much is the machine's: beside other work more than ten were seen
    streams = sum(row["stream"] for row in rows)
    assert 0.3 < streams / len(rows) < 0.7
    assert found["absent"] == {}


def test_long_prompts(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, ttft_ms=20, itl_ms=5, log=str(tmp_path / "log.jsonl")):
        done = stress("drill", "long-prompts", *common, "--long-share", 0.4)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "drills" / "long-prompts.json")
    assert found["multiplier"] == 4
    assert found["prompt_tokens"]["normal"] == pytest.approx(100, abs=3)
    assert found["prompt_tokens"]["long"] == pytest.approx(400, rel=0.03)
    p95 = {name: found[name]["ttft_ms"]["p95"] for name in ("baseline", "short", "long")}
    for name in ("short", "long"):
        assert found[f"{name}_p95_ratio"] == pytest.approx(p95[name] / p95["baseline"], abs=0.01)  # rounded
    assert found["long"]["requests"] / (found["long"]["requests"] + found["short"]["requests"]) == pytest.approx(
        0.4, abs=0.1
    )
    assert found["failed"] == 0
    sent = [json.dumps(entry["messages"]) for entry in read_jsonl(tmp_path / "log.jsonl")]
    assert len(set(sent)) == len(sent), "no prompt may come twice, or the prefix cache answers"


def test_a_replica_that_stays_away_is_told(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, ttft_ms=10, itl_ms=1) as fleet:
        fleet.configs[0]["adapters_seconds"] = 600  # after its restart, its adapters never load
        done = stress("drill", "replica-loss", *common[:-1], 2)
    assert done.returncode == 1
    assert "replica-0 has its engine up, but is not ready" in done.stderr
    found = read_json(tmp_path / "drills" / "replica-loss.json")
    assert "recovery_seconds" not in found
    assert "not ready" in found["absent"]["recovery_seconds"] and "not ready" in found["failure"]


def test_a_fleet_that_is_not_ready_is_left_alone(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, adapters_seconds=600) as fleet:
        done = stress("drill", "outage", *common[:-1], 1)
        assert done.returncode == 1
        assert "before the drill: not every replica" in done.stderr
        assert fleet.restarts == 0
    assert read_json(tmp_path / "drills" / "outage.json")["failure"]


def test_an_outage_is_not_begun_with_a_key_that_is_refused(tmp_path: Path, common: list[Any]) -> None:
    began = time.monotonic()
    with FakeFleet(tmp_path, key="k3y") as fleet:
        done = stress("drill", "outage", *common[:-1], 50, env=os.environ | {"DRYDOCK_API_KEY": "another"})
        assert done.returncode == 1 and fleet.restarts == 0
    assert "refuses the key in DRYDOCK_API_KEY: status 401" in done.stderr
    assert time.monotonic() - began < 25, "no wait heals a key"


@contextlib.contextmanager
def drill_under_load(common: list[Any]) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A replica-loss drill whose load has begun, and the processes below it."""
    command = [sys.executable, "-m", "stress", "drill", "replica-loss", *map(str, common), "--before-seconds", "30"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while "load started" not in process.stderr.readline():
            assert process.poll() is None
        yield process, psutil.Process(process.pid).children(recursive=True)


def test_sigterm_leaves_no_process(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, ttft_ms=20, itl_ms=5), drill_under_load(common) as (process, children):
        assert children
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == 143
        for child in children:
            child.wait(5)
    assert [path.name for path in (tmp_path / "drills").iterdir()] == []


def test_a_killed_drill_takes_its_load_with_it(tmp_path: Path, common: list[Any]) -> None:
    with FakeFleet(tmp_path, ttft_ms=20, itl_ms=5), drill_under_load(common) as (process, children):
        process.kill()
        deadline = time.monotonic() + 5
        while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
            assert time.monotonic() < deadline, "the load outlived its drill"
            time.sleep(0.05)


class Pods:
    """The fake fleet's processes as a cluster's pods: another process is another pod."""

    def __init__(self, fleet: FakeFleet) -> None:
        self.fleet = fleet
        self.metrics: list[int] = []  # the ports of the replicas' sidecars, where they have some

    def __call__(self) -> list[dict[str, Any]]:
        return [self.pod(index, process) for index, process in enumerate(self.fleet.processes)]

    def pod(self, index: int, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.fleet.configs[index]['port']}"
        stage = int(process.poll() is None)
        if stage and get_status(url + "/health") == 200:
            stage = 3 if get_status(url + "/ready") == 200 else 2
        found = pod(f"engine-{process.pid}", stage=stage, node=f"gpu-{index}")
        found["metadata"]["creationTimestamp"] = f"{self.fleet.started[index]:.3f}"
        if self.metrics:
            port = {"name": "sidecar-metrics", "containerPort": self.metrics[index]}
            found["spec"]["initContainers"] = [{"name": "fetch-base"}, {"name": "sidecar", "ports": [port]}]
            found["status"]["podIP"] = "127.0.0.1"
        return found

    def take(self, name: str) -> None:
        for process in self.fleet.processes:
            if name == f"engine-{process.pid}":
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def fake_cluster(folder: Path) -> Iterator[tuple[FakeKubernetes, list[Any]]]:
    """A fake cluster whose replicas are real processes, and the options by which `stress drills` finds it."""
    with FakeFleet(folder, ttft_ms=20, itl_ms=10, adapters_seconds=0.4) as fleet, FakeKubernetes(folder) as world:
        pods = Pods(fleet)
        world.pods = {"serving": pods, "tuning": list}
        world.nodes = {f"gpu-{index}": {"spec": {}} for index in range(2)}
        world.taken = lambda _, name: pods.take(name)
        options = [
            "--target",
            read_json(fleet.file)["router"],
            "--namespace",
            "serving",
            "--tuning-namespace",
            "tuning",
        ]
        yield world, [*options, "--api-server", world.url, "--account", world.account, "--out", folder / "out"]


@contextlib.contextmanager
def sidecars(folder: Path, world: FakeKubernetes) -> Iterator[list[Path]]:
    """A real sidecar beside each fake replica, which follows an adapter in an empty store; yields their logs.

    ConfigMap `drill-faults` is a folder of each, as a kubelet would have it.
    """
    pods: Pods = world.pods["serving"]  # type: ignore[assignment]
    write_json(folder / "serving.json", {"base_model": "b", "store": str(folder / "store"), "adapters": ["kubectl"]})
    pods.metrics = free_ports(2)
    faults, logs = [folder / f"faults-{index}" for index in range(2)], [folder / f"{index}.log" for index in range(2)]

    def told(data: dict[str, str]) -> None:
        for place in faults:
            for path in place.iterdir():
                path.unlink()
            for key, value in data.items():
                write_atomic(place / key, value)

    world.config, world.told = {"drill-faults": {}}, told
    with contextlib.ExitStack() as opened:
        for index, place in enumerate(faults):
            place.mkdir()
            state = folder / f"state-{index}"
            prepare(state)
            new_boot(state)
            command = [sys.executable, "-m", "serving", "sidecar", "--spec", str(folder / "serving.json")]
            command += ["--state", str(state), "--engine", f"http://127.0.0.1:{pods.fleet.configs[index]['port']}"]
            command += ["--metrics-address", f"127.0.0.1:{pods.metrics[index]}", "--faults", str(place)]
            log = opened.enter_context(logs[index].open("wb"))
            process = opened.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
            opened.callback(process.kill)
        yield logs


def test_a_loss_of_the_registry_is_noticed_hurts_nobody_and_ends(tmp_path: Path) -> None:
    settings = drill_settings(tmp_path, "registry-unreachable")
    with fake_cluster(tmp_path) as (world, options), sidecars(tmp_path, world) as logs:
        done = stress("drills", *settings, *options)
        patches = [body["data"] for method, _, body in world.asked if method == "PATCH"]
        assert done.returncode == 0, done.stderr
        assert world.config == {"drill-faults": {}}
        said = [[line for line in log.read_text().splitlines() if "DRILL" in line] for log in logs]
    declared, withdrawn = patches
    assert 300 < float(declared["registry_unreachable_until"]) - time.time() < 1800  # killed, it would end by then
    assert withdrawn == {"registry_unreachable_until": None}
    for begun, over in said:
        assert "out of reach until" in begun and "DRILL over" in over
    found = read_json(tmp_path / "out" / "drills" / "registry-unreachable.json")
    assert (found["failed"], found["unready"], found["replicas"]) == (0, 0, 2) and found["requests"] > 10
    assert 0 < found["noticed_seconds"] < 15 and 0 <= found["recovery_seconds"] < 15
    assert [bound["name"] for bound in found["bounds"] if bound["held"]] == ["failed", "unready", "recovery_seconds"]
    names = [event["name"] for event in found["events"]]
    assert names == [
        "load started", "registry out of reach", "all replicas miss it", "registry in reach again",
        "all replicas see it", "load ended",
    ]  # fmt: skip
    rows = read_jsonl(tmp_path / "out" / "drills" / "registry-unreachable.requests.jsonl")
    assert {"before", "lost"} <= {row["phase"] for row in rows}
    assert stress("report", tmp_path / "out").returncode == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The sidecars of 2 replicas were told" in page and "no replica ceased to be ready" in page
    assert read_json(tmp_path / "out" / "report.json")["absent"] == {}


def test_where_no_sidecar_answers_nothing_is_declared(tmp_path: Path) -> None:
    settings = drill_settings(tmp_path, "registry-unreachable", recovery_seconds=1)
    with fake_cluster(tmp_path) as (world, options):
        world.config = {"drill-faults": {}}
        done = stress("drills", *settings, *options)
    assert done.returncode == 1, done.stderr
    assert "not every sidecar said that it sees the registry" in done.stderr and "no answer" in done.stderr
    assert not [method for method, _, _ in world.asked if method == "PATCH"]


def test_a_drill_that_is_ended_gives_the_registry_back(tmp_path: Path) -> None:
    settings = drill_settings(tmp_path, "registry-unreachable")
    value = read_json(tmp_path / "drills.json")
    write_json(tmp_path / "drills.json", value | {"after_seconds": 60})
    with fake_cluster(tmp_path) as (world, options), sidecars(tmp_path, world):
        command = [sys.executable, "-m", "stress", "drills", *map(str, [*settings, *options])]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            while "all replicas miss it" not in process.stderr.readline():
                assert process.poll() is None
            assert world.config["drill-faults"]
            process.terminate()
            assert process.wait(20) == 143
        assert world.config == {"drill-faults": {}}


def drill_settings(folder: Path, *scenarios: str, **bounds: float) -> list[Any]:
    load = {"models": ["a", "b"], "users": 6, "ramp_seconds": 0.3, "duration_seconds": 1.5, "prompt_tokens": 100}
    value = {"load": load, "scenarios": scenarios, "before_seconds": 1.5, "after_seconds": 0.5}
    value["bounds"] = {"recovery_seconds": 20, "moved_seconds": 20, **bounds}
    write_json(folder / "drills.json", value)
    data = write_dataset(folder / "data.jsonl")
    return ["--settings", folder / "drills.json", "--dataset", data, "--wait-seconds", 20]


def test_in_a_cluster_each_drill_is_judged_and_reported(tmp_path: Path) -> None:
    scenarios = ("long-prompts", "replica-loss", "node-drain", "outage", "tuning-eviction")
    settings = drill_settings(tmp_path, *scenarios, lost_requests=1000, short_p95_ratio=100)
    tuners = [tuner("tune-1")]
    with fake_cluster(tmp_path) as (world, options):
        take = world.taken

        def taken(namespace: str, name: str) -> None:
            if namespace == "serving":
                return take(namespace, name)
            world.logs["tune-2"] = "resuming at step 40 of 90\n"
            tuners[:] = [tuner("tune-2")]
            return None

        world.taken, world.pods["tuning"] = taken, lambda: tuners
        world.logs["tune-1"] = "step 42/90  loss 1.5\n"
        done = stress("drills", *settings, *options)
        assert all(not node["spec"].get("unschedulable") for node in world.nodes.values())
        patches = [body["spec"]["unschedulable"] for method, _, body in world.asked if method == "PATCH"]
    assert done.returncode == 3, done.stderr  # two steps are made again, and none was allowed
    assert patches == [True, None]
    drills = tmp_path / "out" / "drills"
    loss, drain, outage, tuning = (
        read_json(drills / f"{name}.json") for name in ("replica-loss", "node-drain", "outage", "tuning-eviction")
    )
    for found in (loss, drain, outage):
        assert 0.4 < found["recovery_seconds"] < 15 and [bound["held"] for bound in found["bounds"]][-1] is True
    assert loss["how"].startswith("Deletion") and loss["failed_streams"] >= 1
    assert drain["node"].startswith("gpu-") and len(drain["killed"]) == 1
    names = [event["name"] for event in drain["events"]]
    assert [name for name in names if "cordon" in name] == [
        f"node {drain['node']} cordoned",
        f"node {drain['node']} uncordoned",
    ]
    assert sum(outage["phases"].values()) == pytest.approx(outage["recovery_seconds"], abs=0.01)
    assert (tuning["evicted_at_step"], tuning["resumed_at_step"], tuning["lost_steps"]) == (42, 40, 2)
    assert {bound["name"]: bound["held"] for bound in tuning["bounds"]} == {
        "recovery_seconds": True,
        "lost_steps": False,
    }
    made = stress("report", tmp_path / "out")
    assert made.returncode == 0 and "Not held: tuning eviction" in made.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Drain of node gpu-" in page and "Eviction of tune-1 at step 42" in page and 'id="stress"' not in page
    report = read_json(tmp_path / "out" / "report.json")
    assert set(report["drills"]) == {"long_prompts", "replica_loss", "node_drain", "outage", "tuning_eviction"}
    assert report["verdict"]["text"] == "4 of 5 drills held their bounds" and report["absent"] == {}


def test_with_nothing_to_evict_the_drill_has_not_passed_and_blob_has_the_report(tmp_path: Path) -> None:
    settings = drill_settings(tmp_path, "tuning-eviction")
    account = FakeAccount()
    env = {"DRYDOCK_BLOB_ENDPOINT": f"{account.url}/account", "AZURE_STORAGE_KEY": KEY}
    try:
        with fake_cluster(tmp_path) as (_, options):
            push = ["--push", "az://account/box/reports/drills/7"]
            done = stress("drills", *settings, *options, *push, env={**os.environ, **env})
    finally:
        account.close()
    assert done.returncode == 1, done.stderr
    assert "nothing to evict: no pod in tuning tunes at present" in done.stderr
    found = read_json(tmp_path / "out" / "drills" / "tuning-eviction.json")
    assert found["failure"] and not any(bound["held"] for bound in found["bounds"])
    assert {"report.html", "report.json", "drills/tuning-eviction.json"} <= {
        name.removeprefix("reports/drills/7/") for name in account.blobs
    }
    report = json.loads(account.blobs["reports/drills/7/report.json"][0])
    assert report["verdict"]["status"] == "not_held" and "nothing to evict" in report["verdict"]["notes"][0]


def test_a_tuning_pod_that_ends_by_itself_is_not_waited_for(tmp_path: Path) -> None:
    settings = drill_settings(tmp_path, "tuning-eviction")
    with fake_cluster(tmp_path) as (world, options):
        looks = itertools.count()
        world.pods["tuning"] = lambda: [tuner("tune-1")] if next(looks) < 2 else []
        done = stress("drills", *settings, *options)
    assert done.returncode == 1 and "tune-1 ended, or was taken away, before it told a step" in done.stderr


def test_nothing_is_broken_while_a_model_does_not_answer(tmp_path: Path) -> None:
    settings = drill_settings(tmp_path, "replica-loss")[:-1]
    load = read_json(tmp_path / "drills.json")
    write_json(tmp_path / "drills.json", load | {"load": load["load"] | {"models": ["a", "nobody"]}})
    with fake_cluster(tmp_path) as (world, options):
        done = stress("drills", *settings, 1, *options)
    assert done.returncode == 1
    assert "nothing was broken: not all models answered" in done.stderr and "nobody: status 404" in done.stderr
    assert world.asked == []


def test_a_drill_that_is_ended_uncordons_its_node(tmp_path: Path) -> None:
    settings = drill_settings(tmp_path, "node-drain")
    with fake_cluster(tmp_path) as (world, options):
        (first,) = [item["metadata"]["name"] for item in world.pods["serving"]() if item["spec"]["nodeName"] == "gpu-0"]
        world.forbidden = {first: 1000}  # the disruption budget keeps the drain waiting
        command = [sys.executable, "-m", "stress", "drills", *map(str, [*settings, *options])]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            while "cordoned" not in process.stderr.readline():
                assert process.poll() is None
            assert world.nodes["gpu-0"]["spec"]["unschedulable"] is True
            process.terminate()
            assert process.wait(20) == 143
        assert not world.nodes["gpu-0"]["spec"]["unschedulable"]
