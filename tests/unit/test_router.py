"""The router's command: readiness decides who gets requests, and a dead replica is left quickly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.router import Pods, main, router_command

ROOT = Path(__file__).parents[2]
REPLICAS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


def flags(replicas: list[str] | Pods = REPLICAS) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in router_command(replicas, ("127.0.0.1", 8081), ("0.0.0.0", 29000), 2048)[3:]:
        if word.startswith("--"):
            assert word not in found, "given twice"
            found[word] = []
        else:
            found[next(reversed(found))].append(word)
    return found


def test_every_replica_gets_requests_at_the_address_asked_for() -> None:
    given = flags()
    assert given["--worker-urls"] == REPLICAS
    assert (given["--host"], given["--port"]) == (["127.0.0.1"], ["8081"])
    assert (given["--prometheus-host"], given["--prometheus-port"]) == (["0.0.0.0"], ["29000"])


def test_the_policy_asks_the_replicas_nothing_that_they_refuse() -> None:
    assert flags()["--policy"] == flags(Pods(["app=engine"], "n", 8000))["--policy"] == ["power_of_two"]


def test_one_replica_is_enough() -> None:
    assert flags(["http://127.0.0.1:1"])["--policy"] == ["round_robin"]


def test_a_request_body_takes_no_more_memory_than_asked_for() -> None:
    assert flags()["--max-payload-size"] == [str(2 * 1024 * 1024)]


def test_a_replica_gets_requests_only_when_its_adapters_are_loaded() -> None:
    assert (
        flags()["--health-check-endpoint"]
        == flags(Pods(["app=engine"], "n", 8000))["--health-check-endpoint"]
        == ["/ready"]
    )
    others = Pods(["kaito.sh/workspace=engine-1"], "drydock-kaito", 5000, "/health")  # vLLM without our request layer
    assert flags(others)["--health-check-endpoint"] == ["/health"]


def test_a_dead_replica_is_noticed_and_a_returned_one_used_within_seconds() -> None:
    given = {name: values[0] for name, values in flags().items()}
    assert int(given["--health-check-interval-secs"]) * int(given["--health-failure-threshold"]) <= 5
    assert int(given["--health-check-interval-secs"]) * int(given["--health-success-threshold"]) <= 5
    assert int(given["--cb-timeout-duration-secs"]) <= 10
    assert int(given["--retry-max-retries"]) >= 1
    assert int(given["--retry-max-backoff-ms"]) <= 1000


def test_in_kubernetes_it_finds_its_replicas_by_label_in_one_namespace() -> None:
    given = flags(Pods(["app=engine", "pool=a"], "drydock-serving", 8000))
    assert given["--selector"] == ["app=engine", "pool=a"]
    assert given["--service-discovery"] == []
    assert given["--service-discovery-namespace"] == ["drydock-serving"], "without it, it asks for the whole cluster"
    assert given["--service-discovery-port"] == ["8000"]
    assert "--worker-urls" not in given
    common = {name: values for name, values in flags().items() if name != "--worker-urls"}
    assert common.items() <= given.items(), "health, retries and breakers are the same"


def test_a_pod_that_does_not_answer_does_not_hold_up_the_others_for_long() -> None:
    given = flags(Pods(["app=engine"], "n", 8000))
    assert int(given["--worker-startup-timeout-secs"][0]) <= 30
    assert int(given["--worker-startup-check-interval"][0]) <= 2
    assert "--worker-startup-timeout-secs" not in flags(), "at a laptop the router starts before its replicas"


def test_its_image_needs_nothing_but_this_file_to_start_it(tmp_path: Path) -> None:
    """As serving/router.Dockerfile has it."""
    (tmp_path / "serving").mkdir()
    for name in ("__init__.py", "router.py"):
        shutil.copy(ROOT / "serving" / name, tmp_path / "serving")
    # -S: no site-packages, like an image without ours.
    command = [sys.executable, "-S", "-m", "serving.router", "--help"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "8081", "--metrics-host", "0.0.0.0"], "--host 127.0.0.1 --port 8081 --prometheus-host 0.0.0.0 "),
        (["--host", "127.0.0.2"], "--host 127.0.0.2 --port 8080 --prometheus-host 127.0.0.2 "),
    ],
)
def test_metrics_may_be_where_clients_may_not(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    def execv(_: str, command: list[str]) -> None:
        raise InterruptedError(" ".join(command))

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(InterruptedError, match=expected):
        main(["--replica", "http://a:1", *arguments])
