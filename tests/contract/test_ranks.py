"""Several processes tune one adapter: the result of one, the bytes of an uninterrupted run, and no process left over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import BlobServiceClient
from safetensors.torch import load_file

from common import exits
from common.files import file_digest, read_json, read_jsonl, write_jsonl
from common.processes import Processes, free_ports, python
from localcloud import azurite
from localcloud.azurite import AZURITE
from tests.contract.conftest import wait_until
from tests.unit.conftest import ROWS, rows_file, tiny_base  # noqa: F401  fixtures
from tests.unit.flaky_proxy import FlakyProxy
from training.begin import split
from training.spec import TuningSpec
from training.tune import tune

pytestmark = pytest.mark.timeout(900)

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DRYDOCK_LOG": "text"}
START_SECONDS = 300  # importing torch and transformers takes most of it, on a machine with other things to do
STEPS = 60
Spec = Callable[..., TuningSpec]


@pytest.fixture(scope="module")
def spec(tiny_base: Path, rows_file: Path) -> Spec:  # noqa: F811
    settings = {
        "adapter": "kubectl", "base_model": str(tiny_base), "dataset": str(rows_file), "learning_rate": 1e-3,
        "num_train_epochs": 10, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lora_r": 4,
        "lora_alpha": 8, "lora_dropout": 0.1, "max_seq_length": 128, "logging_steps": 1, "held_out_fraction": 0.2,
        "gate": {"min_examples": 5},
    }  # fmt: skip
    return lambda **change: TuningSpec.model_validate(settings | change)


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as running:
        yield running


def command(spec: TuningSpec, folder: Path, *options: str) -> list[str]:
    """The command that tunes by `spec` into `folder`/run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.yaml").write_text(json.dumps(spec.model_dump(mode="json")))
    where = ("--spec", folder / "spec.yaml", "--out", folder / "run", "--metrics-address", "off")
    return python("training", "tune", *where, *options)


def started(
    processes: Processes, spec: TuningSpec, folder: Path, *options: str, log: str = "log"
) -> subprocess.Popen[bytes]:
    return processes.start(command(spec, folder, *options), log=folder / log, environment=ENVIRONMENT)


def ended(process: subprocess.Popen[bytes], folder: Path, seconds: float = START_SECONDS, log: str = "log") -> str:
    """What it said, once it has ended with all processes that it had started."""
    ranks = psutil.Process(process.pid).children(recursive=True)
    wait_until(lambda: process.poll() is not None, seconds, "the end of the run")
    assert not psutil.wait_procs(ranks, timeout=5)[1], "processes are left over"
    return (folder / log).read_text()


def steps_of(folder: Path) -> int:
    events = folder / "run" / "events.jsonl"
    return events.read_text().count("\n") if events.is_file() else 0


def at_step(folder: Path, step: int) -> None:
    wait_until(lambda: steps_of(folder) >= step, START_SECONDS, f"step {step}")


def same_bits(one: Path, other: Path) -> bool:
    name = Path("run") / "adapter" / "adapter_model.safetensors"
    return file_digest(one / name) == file_digest(other / name)


@pytest.fixture(scope="module")
def whole(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of two processes, with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    with Processes() as running:
        process = started(running, spec(), folder, "--processes", "2")
        said = ended(process, folder)
    assert process.returncode == exits.OK, said
    return folder


def test_two_processes_learn_what_one_learns(spec: Spec, tmp_path: Path, processes: Processes) -> None:
    settings = spec(lora_dropout=0.0, num_train_epochs=3)
    process = started(processes, settings, tmp_path, "--processes", "2")
    alone = tune(settings, tmp_path / "alone")
    said = ended(process, tmp_path)
    assert process.returncode == exits.OK, said
    summary = read_json(tmp_path / "run" / "tuning.json")
    assert (summary["world_size"], alone["world_size"]) == (2, 1)
    assert (summary["tokens"], summary["steps"]) == (alone["tokens"], alone["steps"])
    curves = [
        [(event["loss"], event["gradient_norm"]) for event in read_jsonl(run / "events.jsonl")]
        for run in (tmp_path / "run", tmp_path / "alone")
    ]
    assert [number for pair in curves[0] for number in pair] == pytest.approx(
        [number for pair in curves[1] for number in pair], rel=1e-4
    )
    together, single = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (tmp_path / "run", tmp_path / "alone")
    )
    assert all(torch.allclose(together[name], single[name], atol=1e-5, rtol=0) for name in single)
    assert said.count("rows to tune on") == 1, "one process speaks for all"


def test_sigterm_to_the_one_that_started_them_stops_all_after_the_same_step_and_they_resume(
    spec: Spec, whole: Path, tmp_path: Path, processes: Processes
) -> None:
    first = started(processes, spec(), tmp_path, "--processes", "2")
    at_step(tmp_path, 5)
    first.terminate()
    said = ended(first, tmp_path)
    assert first.returncode == exits.TERMINATED, said
    assert said.count("run again to resume") == 1
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 5 <= stopped < STEPS
    shutil.copytree(tmp_path / "run", tmp_path / "by-one")

    again = started(processes, spec(), tmp_path, "--processes", "2", log="again")
    by_one = tune(spec(), tmp_path / "by-one")
    said = ended(again, tmp_path, log="again")
    assert again.returncode == exits.OK, said
    assert f"resuming at step {stopped} of {STEPS}" in said
    assert same_bits(tmp_path, whole)
    for run in (tmp_path / "run", tmp_path / "by-one"):
        assert [event["step"] for event in read_jsonl(run / "events.jsonl")] == list(range(1, STEPS + 1))
    expected = read_json(whole / "run" / "tuning.json")
    assert (by_one["world_size"], by_one["tokens"]) == (1, expected["tokens"])
    assert by_one["final_loss"] == pytest.approx(expected["final_loss"], rel=0.05), "another dropout, the same learning"


def test_two_nodes_without_a_shared_disk_give_the_bytes_of_two_processes_on_one(
    spec: Spec, whole: Path, tmp_path: Path, processes: Processes
) -> None:
    options = ("--nodes", "2", "--rendezvous", f"127.0.0.1:{free_ports(1)[0]}", "--node-rank")
    nodes = [started(processes, spec(), tmp_path / str(node), *options, str(node)) for node in (0, 1)]
    for node, process in enumerate(nodes):
        said = ended(process, tmp_path / str(node))
        assert process.returncode == exits.OK, said
    assert same_bits(tmp_path / "0", whole)
    assert not (tmp_path / "1" / "run").exists()


def test_a_node_that_goes_is_waited_for_and_the_others_need_not_be_started_again(
    spec: Spec, whole: Path, tmp_path: Path, processes: Processes
) -> None:
    options = ("--nodes", "2", "--rendezvous", f"127.0.0.1:{free_ports(1)[0]}", "--rejoin", "--node-rank")
    settings = spec(save_steps=5)

    def begun(node: int, log: str) -> subprocess.Popen[bytes]:
        return started(processes, settings, tmp_path / str(node), *options, str(node), log=log)

    first, other = begun(0, "log"), begun(1, "log")
    at_step(tmp_path / "0", 5)
    other.terminate()  # as an eviction does
    said = ended(other, tmp_path / "1")
    assert other.returncode == exits.TERMINATED, said
    wait_until(lambda: "joining again" in (tmp_path / "0" / "log").read_text(), 30, "the first to wait for it")
    stopped = steps_of(tmp_path / "0")
    other = begun(1, "again")
    at_step(tmp_path / "0", stopped + 7)
    assert first.poll() is None
    (rank,) = psutil.Process(first.pid).children()
    rank.kill()  # as a node that fails
    said = ended(first, tmp_path / "0")
    assert first.returncode == exits.FAILED, said
    wait_until(lambda: "joining again" in (tmp_path / "1" / "again").read_text(), 60, "the other to join again")
    newest = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "0" / "run").glob("checkpoints/step-*"))
    assert stopped < newest < STEPS
    again = begun(0, "again")
    said = ended(again, tmp_path / "0", log="again")
    assert again.returncode == exits.OK, said
    assert f"resuming at step {newest} of {STEPS}" in said
    said = ended(other, tmp_path / "1", 60, log="again")
    assert other.returncode == exits.OK, said
    assert same_bits(tmp_path / "0", whole)


@pytest.mark.skipif(not AZURITE.exists(), reason="needs npm: make azurite")
def test_the_first_node_is_never_left_alone_with_steps_to_make_and_needs_no_other_without(
    spec: Spec, tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pod is lost after the tuning, with its disk; then whatever of the steps is not in Blob is to be made again."""
    endpoint = azurite.start(processes, tmp_path / "azurite", tmp_path / "azurite.log")
    service = BlobServiceClient(endpoint, AzureNamedKeyCredential(azurite.ACCOUNT, azurite.KEY), use_env_settings=False)
    service.create_container("checkpoints")
    proxy = FlakyProxy(endpoint)
    monkeypatch.setenv("DRYDOCK_BLOB_ENDPOINT", proxy.url)
    monkeypatch.setenv("AZURE_STORAGE_KEY", azurite.KEY)
    settings = spec(num_train_epochs=1)
    options = ["--checkpoints", f"az://{azurite.ACCOUNT}/checkpoints/kubectl", "--nodes", "2", "--rejoin"]
    options += ["--rendezvous", f"127.0.0.1:{free_ports(1)[0]}", "--node-rank"]

    def finished(folder: str, *more: str) -> dict[str, Any]:
        process = started(processes, settings, tmp_path / folder, *options, "0", *more)
        said = ended(process, tmp_path / folder)
        assert process.returncode == exits.OK, said
        return read_json(tmp_path / folder / "run" / "tuning.json")

    try:
        proxy.fault = lambda number, method, path: "500" if method == "PUT" else None
        other = started(processes, settings, tmp_path / "other", *options, "1")
        finished("uncopied")
        wait_until(lambda: "joining again" in (tmp_path / "other" / "log").read_text(), 60, "the other to stay")
        proxy.fault = lambda number, method, path: None
        copied = finished("copied")
        said = ended(other, tmp_path / "other", 60)
        assert other.returncode == exits.OK, said
        alone = finished("alone", "--processes", "2")  # as many as in the other node's place: none of them takes part
    finally:
        proxy.close()
    differ = {"seconds", "tokens_per_second"}
    assert {key: copied[key] for key in copied.keys() - differ} == {key: alone[key] for key in alone.keys() - differ}
    assert alone["world_size"] == 2
    assert same_bits(tmp_path / "alone", tmp_path / "copied")
    assert same_bits(tmp_path / "uncopied", tmp_path / "copied")


def test_a_row_that_breaks_the_loss_of_one_process_ends_both_with_its_line_and_the_code_of_wrong_input(
    spec: Spec, tiny_base: Path, tmp_path: Path, processes: Processes  # noqa: F811
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuning = split(spec())[0]
    line = tuning[7][0]
    rows = [row | {"input": row["input"] + " ~"} if number == line else row for number, row in enumerate(ROWS, 1)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    head = model.get_output_embeddings().weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    (token,) = AutoTokenizer.from_pretrained(base)("~", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(base)

    settings = spec(
        dataset=str(tmp_path / "rows.jsonl"), base_model=str(base), held_out_fraction=0.2, gate={"min_examples": 5}
    )
    process = started(processes, settings, tmp_path, "--processes", "2")
    said = ended(process, tmp_path)
    assert process.returncode == exits.INPUT, said
    assert said.count("the loss became nan at step") == 1
    assert str(line) in said.partition("on lines ")[2].partition(" of ")[0].split(", ")
    assert not (tmp_path / "run" / "tuning.json").exists()


def test_when_one_is_killed_the_other_ends_within_seconds(spec: Spec, tmp_path: Path, processes: Processes) -> None:
    process = started(processes, spec(num_train_epochs=1000), tmp_path, "--processes", "2")
    at_step(tmp_path, 3)
    ranks = {int(each.environ()["RANK"]): each for each in psutil.Process(process.pid).children()}
    os.kill(ranks[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    said = ended(process, tmp_path, 30)
    assert process.returncode == exits.FAILED, said
    assert "the processes ended with the codes" in said
    assert time.monotonic() - killed < 20
