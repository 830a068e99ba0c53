"""How the engine's start and its hang look from outside: phases and stall on /metrics, /health and /ready."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.contract.conftest import Replica, wait_until


def metrics(replica: Replica, name: str) -> dict[str, float]:
    """The samples of one metric by their labels, as /metrics writes them."""
    lines = httpx.get(f"{replica.url}/metrics", timeout=10).text.splitlines()
    pairs = [line.rpartition(" ") for line in lines if re.match(rf"{name}[{{ ]", line)]
    return {labels.removeprefix(name): float(value) for labels, _, value in pairs}


def status(replica: Replica, path: str) -> int:
    return httpx.get(replica.url + path, timeout=10).status_code


@pytest.fixture
def core(replica: Replica) -> Iterator[psutil.Process]:
    """The process in which the engine computes; the API server is its parent. Runs again afterwards."""
    (found,) = [
        child
        for child in psutil.Process(replica.engine.pid).children()
        if any("EngineCore" in word for word in (child.name(), *child.cmdline()))
    ]
    yield found
    os.kill(found.pid, signal.SIGCONT)


def test_the_phases_of_the_start_are_told(replica: Replica) -> None:
    """On a CPU, without a compiler, there is no `compile` and no `capture`."""
    replica.wait_ready()
    wait_until(lambda: len(metrics(replica, "drydock_startup_seconds")) == 5, 5, "all phases")
    took = {labels.split('"')[1]: seconds for labels, seconds in metrics(replica, "drydock_startup_seconds").items()}
    assert took.keys() == {"import", "engine_import", "weights", "engine", "adapters"}
    assert 1 < took["import"] < 120 and 0 < took["weights"] < 60
    told = re.findall(r"ready ([\d.]+) s after the process began: (.*)", (replica.logs / "engine.log").read_text())
    assert float(told[-1][0]) == pytest.approx(sum(took.values()), abs=0.2)
    assert [phase.split()[0] for phase in told[-1][1].split(", ")] == list(took)


def test_a_hung_engine_is_unhealthy_and_not_ready_until_it_moves_again(replica: Replica, core: psutil.Process) -> None:
    replica.wait_ready()
    replies: list[int] = []

    def ask() -> None:
        body = {"model": "base", "prompt": "kubectl", "max_tokens": 200, "ignore_eos": True}
        answer = httpx.post(
            f"{replica.url}/v1/completions", json=body, headers={"authorization": "Bearer any"}, timeout=120
        )
        replies.append(answer.status_code)

    core.suspend()
    client = threading.Thread(target=ask)
    client.start()
    wait_until(lambda: status(replica, "/health") == 503, 30, "/health fails")
    assert status(replica, "/ready") == 503
    (seconds,) = metrics(replica, "drydock_engine_stalled_seconds").values()
    assert seconds >= 15
    core.resume()
    wait_until(lambda: status(replica, "/health") == 200 and status(replica, "/ready") == 200, 30, "well again")
    client.join(60)
    assert replies == [200]
    assert metrics(replica, "drydock_engine_stalled_seconds") == {"": 0.0}
