"""Nothing is lost: a run killed at random points, on a full disk, and before a Blob account that misbehaves ends with
the very bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from azure.storage.blob import BlobServiceClient

from common import exits
from common.files import file_digest, read_jsonl
from localcloud.azurite import ACCOUNT, AZURITE, KEY
from tests.contract.conftest import wait_until
from tests.contract.forked import start
from tests.contract.test_blobs import azurite
from tests.unit.conftest import rows_file, tiny_base
from tests.unit.flaky_proxy import Fault, FlakyProxy
from training import checkpoint

__all__ = ["azurite", "rows_file", "tiny_base"]  # fixtures of others

STEPS = 84
KILLS = 8


Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(tiny_base: Path, rows_file: Path) -> Arguments:
    """The command line of a run of `STEPS` steps, a checkpoint after each, into a folder."""

    def made(out: Path, **change: object) -> list[str]:
        settings = {
            "adapter": "kubectl", "base_model": str(tiny_base), "dataset": str(rows_file), "num_train_epochs": 14,
            "learning_rate": 5e-3, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "max_seq_length": 128,
            "save_steps": 1, "logging_steps": 1, "held_out_fraction": 0.2, "per_device_train_batch_size": 4,
            "gate": {"min_examples": 5},
            "gradient_accumulation_steps": 2,
        }  # fmt: skip
        spec = out.parent / f"{out.name}.json"
        spec.write_text(json.dumps(settings | change))
        return ["tune", "--spec", str(spec), "--out", str(out), "--metrics-address", "off"]

    return made


@pytest.fixture(scope="module")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    process = start(arguments(out), out / "log")
    process.join(240)  # the first of all: torch is imported now
    assert process.exitcode == exits.OK, (out / "log").read_text()
    return out


def newest_step(out: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")), default=0)


def assert_same(out: Path, whole: Path) -> None:
    one, other = (folder / "adapter" / "adapter_model.safetensors" for folder in (out, whole))
    assert file_digest(one) == file_digest(other)
    events, expected = (list(read_jsonl(folder / "events.jsonl")) for folder in (out, whole))
    assert [event["step"] for event in events] == list(range(1, STEPS + 1)), "each step once, in order"
    assert [event["loss"] for event in events] == [event["loss"] for event in expected]
    assert not list((out / "checkpoints").glob(".*")), "nothing half written stays"


def freeze_while_writing(process: ForkServerProcess, out: Path) -> None:
    """Stop the process (SIGSTOP) at a moment at which a checkpoint is half written."""
    assert process.pid
    state = Path(f"/proc/{process.pid}/stat")
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline and process.is_alive(), "no checkpoint was caught while it was written"
        if any((out / "checkpoints").glob(".writing-*")):
            os.kill(process.pid, signal.SIGSTOP)
            wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", 10, "stopped")
            if any((out / "checkpoints").glob(".writing-*")):
                return
            os.kill(process.pid, signal.SIGCONT)


def test_killed_at_random_points_it_ends_with_the_very_same_adapter(
    arguments: Arguments, whole: Path, tmp_path: Path
) -> None:
    dice, log = random.Random(20), tmp_path / "log"
    for number in range(KILLS):
        end = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        before = newest_step(tmp_path)
        process = start(arguments(tmp_path), log)
        assert process.pid
        wait_until(lambda: newest_step(tmp_path) > before or not process.is_alive(), 60, "a step")  # noqa: B023
        if number % 4 < 2:
            freeze_while_writing(process, tmp_path)
        else:
            time.sleep(dice.uniform(0, 0.15))
        os.kill(process.pid, end)
        os.kill(process.pid, signal.SIGCONT)
        process.join(30)
        assert process.exitcode == (-signal.SIGKILL if end == signal.SIGKILL else exits.TERMINATED), log.read_text()
        if number % 4 == 0:
            assert list((tmp_path / "checkpoints").glob(".writing-*")), "killed in the middle of a checkpoint"
    at = newest_step(tmp_path)
    assert KILLS < at < STEPS, "it was killed before its end"
    last = start(arguments(tmp_path), log)
    last.join(120)
    assert last.exitcode == exits.OK, log.read_text()
    assert f"resuming at step {at} of {STEPS}" in log.read_text()
    assert_same(tmp_path, whole)
    again = start(arguments(tmp_path), log)
    again.join(60)
    assert again.exitcode == exits.OK
    assert "already tuned" in log.read_text(), "a finished version is never trained again"


def test_a_disk_that_fills_up_ends_the_run_with_words_and_costs_one_step(
    arguments: Arguments, whole: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = start(arguments(tmp_path), log)
    assert process.pid
    wait_until(lambda: newest_step(tmp_path) > 1 or not process.is_alive(), 60, "two checkpoints")
    size = (tmp_path / "checkpoints" / f"step-{newest_step(tmp_path):08d}" / "adapter.safetensors").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size - 1, size - 1))
    process.join(60)
    assert process.exitcode == exits.FAILED, log.read_text()
    assert "this checkpoint cannot be written" in (told := log.read_text())
    assert "make room on that disk, then run again; it goes on from the checkpoint before" in told
    at = newest_step(tmp_path)
    assert f"step-{at + 1:08d}: this checkpoint cannot be written" in told
    last = start(arguments(tmp_path), log)
    last.join(120)
    assert last.exitcode == exits.OK, log.read_text()
    assert f"resuming at step {at} of {STEPS}" in log.read_text()
    assert_same(tmp_path, whole)


@pytest.mark.skipif(not AZURITE.exists(), reason="needs npm: make azurite")
def test_an_account_that_misbehaves_costs_copies_and_never_the_run(
    arguments: Arguments, whole: Path, tmp_path: Path, azurite: BlobServiceClient, rows_file: Path
) -> None:
    kinds: tuple[Fault, ...] = ("503", "cut", "500", "lost")
    proxy = FlakyProxy(azurite.url.rstrip("/"))
    proxy.fault = lambda number, method, path: kinds[number // 5 % 4] if number % 5 == 2 else None
    environment = {"DRYDOCK_BLOB_ENDPOINT": proxy.url, "AZURE_STORAGE_KEY": KEY}
    environment["DRYDOCK_CACHE"] = str(tmp_path / "cache")
    remote = ["--checkpoints", f"az://{ACCOUNT}/checkpoints/survives"]
    azurite.get_blob_client("datasets", "rows.jsonl").upload_blob(rows_file.read_bytes())
    data = {"dataset": f"az://{ACCOUNT}/datasets/rows.jsonl", "dataset_sha256": file_digest(rows_file)}

    def copied() -> list[int]:
        names = azurite.get_container_client("checkpoints").list_blob_names(name_starts_with="survives/")
        return sorted(
            int(name.split("/")[-2].removeprefix("step-")) for name in names if name.endswith(".complete.json")
        )

    def befallen() -> bool:
        return {fault.split()[0] for fault in proxy.faults} == set(kinds)

    def begin(node: str, seconds: float) -> ForkServerProcess:
        return start([*arguments(tmp_path / node, **data), *remote], tmp_path / f"{node}.log", seconds, **environment)

    try:
        one = begin("one", 60)
        wait_until(lambda: (befallen() and len(copied()) >= checkpoint.KEEP) or not one.is_alive(), 120, "each fault")
        assert one.pid
        os.kill(one.pid, signal.SIGKILL)
        one.join(10)
        assert one.exitcode == -signal.SIGKILL, (tmp_path / "one.log").read_text()
        shutil.rmtree(tmp_path / "one")
        at, earlier = copied()[-1], len(proxy.faults)
        proxy.fault = lambda number, method, path: kinds[number % 4] if number % 3 == 0 and method == "GET" else None
        two = begin("two", 1)
        wait_until(lambda: newest_step(tmp_path / "two") >= at or not two.is_alive(), 120, "the copy")
        assert len(proxy.faults) > earlier, "fetching met some too"
        # From here on nothing answers at all: a copy holds each step for a second, and so the end.
        proxy.fault = lambda number, method, path: "hang"
        seen, began = newest_step(tmp_path / "two"), time.monotonic()
        wait_until(lambda: newest_step(tmp_path / "two") >= seen + 4 or not two.is_alive(), 60, "steps without copies")
        assert two.pid
        os.kill(two.pid, signal.SIGTERM)
        two.join(30)
        assert two.exitcode == exits.TERMINATED
        steps = newest_step(tmp_path / "two") - seen
        assert time.monotonic() - began < (1 + 1.5) * (steps + 1), "a second a copy, and no wait for threads at the end"
        told = (tmp_path / "two.log").read_text()
        assert f"resuming at step {at} of {STEPS}" in told
        assert "is not copied: the copy before hangs" in told
    finally:
        proxy.close()
    last = start(arguments(tmp_path / "two"), tmp_path / "two.log")
    last.join(120)
    assert last.exitcode == exits.OK, (tmp_path / "two.log").read_text()
    assert_same(tmp_path / "two", whole)


def test_a_copy_fits_into_the_grace_period_beside_the_step_and_its_checkpoint() -> None:
    from workloads.tuning import GRACE_SECONDS

    assert checkpoint.COPY_SECONDS <= GRACE_SECONDS / 2
