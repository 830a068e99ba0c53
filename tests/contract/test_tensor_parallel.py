"""A replica of two processes that hold the model together, as two GPUs would: real vLLM, split, on a CPU."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from artifacts.adapter import promoted_digest, version
from artifacts.store import open_store
from common.files import read_json
from serving.state import read_aliases
from tests.contract.conftest import Replica, running_replica, wait_until
from tests.contract.test_serving import judge, question
from training.__main__ import main as training


@pytest.fixture(scope="module")
def split(good_run: Path, replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """It serves what was evaluated on a replica that was not split."""
    folder = tmp_path_factory.mktemp("split")
    assert judge(replica, good_run)["passed"]
    assert training(["publish", "--run", str(good_run), "--store", str(folder / "store")]) == 0
    with running_replica(folder, folder / "store", adapters=["kubectl"], gpus=2) as running:
        yield running


def workers(replica: Replica) -> list[psutil.Process]:
    below = psutil.Process(replica.engine.pid).children(recursive=True)
    return [each for each in below if "VLLM::Worker" in each.name() or "Worker_TP" in " ".join(each.cmdline())]


def test_each_process_has_a_part_and_the_adapter_proves_itself_as_on_one(split: Replica, good_run: Path) -> None:
    assert len(workers(split)) == 2
    digest = promoted_digest(open_store(split.store), "kubectl")
    assert digest and split.ready()["adapters"] == {"kubectl": version(digest)}
    aliases = read_aliases(split.state)
    assert aliases and aliases.aliases["kubectl"].parity_difference < 0.01, "sums in another order, and no more"
    sample = read_json(good_run / "evaluation.json")["samples"][0]
    for model, wanted in (("kubectl", sample["adapter"]), ("base", sample["base"])):
        assert split.chat(model, question(good_run)).json()["choices"][0]["message"]["content"] == wanted


def test_without_one_of_its_processes_the_replica_is_no_replica(split: Replica) -> None:
    workers(split)[1].send_signal(signal.SIGKILL)

    def gone() -> bool:
        if split.engine.poll() is not None:
            return True
        try:
            return httpx.get(f"{split.url}/health", timeout=5).status_code != 200
        except httpx.HTTPError:
            return True

    wait_until(gone, 30, "the kubelet is told")
