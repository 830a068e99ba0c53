"""The blobs room and a tuning run's checkpoints against a real Blob service: Azurite, Microsoft's emulator."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import BlobServiceClient

from common import exits
from common.files import file_digest, read_json, tree_digest
from common.processes import Processes
from localcloud.azurite import ACCOUNT, AZURITE, KEY, start
from tests.contract.conftest import BASE, ROOT, wait_until
from tests.unit.blob_fakes import FakeHub
from tests.unit.flaky_proxy import FlakyProxy

pytestmark = pytest.mark.skipif(not AZURITE.exists(), reason="needs npm: make azurite")


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlobServiceClient]:
    """A running Azurite with the containers `models`, `datasets` and `checkpoints`."""
    folder = tmp_path_factory.mktemp("azurite")
    with Processes() as processes:
        endpoint = start(processes, folder, folder / "log")
        service = BlobServiceClient(endpoint, AzureNamedKeyCredential(ACCOUNT, KEY), use_env_settings=False)
        for name in ("models", "datasets", "checkpoints"):
            service.create_container(name)
        yield service


def environment(azurite: BlobServiceClient) -> dict[str, str]:
    ours = {"DRYDOCK_BLOB_ENDPOINT": azurite.url.rstrip("/"), "AZURE_STORAGE_KEY": KEY, "PYTHONUNBUFFERED": "1"}
    return os.environ | ours | {"HF_HUB_OFFLINE": "1"}


def blobs(azurite: BlobServiceClient, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blobs", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(azurite) | more, capture_output=True, text=True, timeout=60
    )


def test_a_mirrored_model_reaches_a_pod_that_waited_for_it(azurite: BlobServiceClient, tmp_path: Path) -> None:
    address, target = f"az://{ACCOUNT}/models/tiny", tmp_path / "base"
    command = [sys.executable, "-m", "blobs", "fetch", address, str(target), "--wait-seconds", "60"]
    pod = subprocess.Popen(command, cwd=ROOT, env=environment(azurite), stderr=subprocess.PIPE, text=True)
    assert pod.stderr
    assert f"waiting for {address}/.complete.json (the mirror Job writes it): 0 s" in pod.stderr.readline()
    hub = FakeHub(BASE)
    try:
        mirror = ["mirror", "org/tiny", "--revision", hub.REVISION, address]
        open_hub = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret_of_mine"}
        made = blobs(azurite, *mirror, **open_hub)
        again = blobs(azurite, *mirror, **open_hub)
    finally:
        hub.close()
    assert made.returncode == 0, made.stderr
    assert "is complete" in made.stdout
    assert "was complete already" in again.stdout
    assert "hf_secret" not in made.stdout + made.stderr
    _, told = pod.communicate(timeout=30)
    assert pod.returncode == 0, told
    expected = tmp_path / "expected"
    shutil.copytree(BASE, expected, ignore=shutil.ignore_patterns("README.md"))
    assert tree_digest(target) == tree_digest(expected), "the base's revision is the same here and there"
    (target / "config.json").unlink()
    assert blobs(azurite, "fetch", address, target).returncode == 0
    assert tree_digest(target) == tree_digest(expected)


def test_a_file_in_blocks_and_ranges_comes_back_and_a_missing_container_is_told(
    azurite: BlobServiceClient, tmp_path: Path
) -> None:
    source, target = tmp_path / "rows.jsonl", tmp_path / "fetched.jsonl"
    source.write_bytes(os.urandom(2**20) * 20)  # 20 MiB: three pieces
    digest = file_digest(source).removeprefix("sha256:")
    address = f"az://{ACCOUNT}/datasets/{digest}.jsonl"
    assert blobs(azurite, "push", source, address).returncode == 0
    _, uncommitted = azurite.get_blob_client("datasets", f"{digest}.jsonl").get_block_list("all")
    assert not uncommitted
    assert blobs(azurite, "fetch", address, target, "--sha256", digest).returncode == 0
    assert target.read_bytes() == source.read_bytes()
    lost = blobs(azurite, "fetch", f"az://{ACCOUNT}/nowhere/x", target)
    assert lost.returncode == exits.INPUT
    assert f"account {ACCOUNT} has no container nowhere" in lost.stderr


def test_a_dataset_is_checked_where_it_lies(azurite: BlobServiceClient, work: Path, tmp_path: Path) -> None:
    address = f"az://{ACCOUNT}/datasets/of-a-person/rows.jsonl"
    azurite.get_blob_client("datasets", "of-a-person/rows.jsonl").upload_blob((work / "rows.jsonl").read_bytes())
    proxy = FlakyProxy(azurite.url.rstrip("/"))
    proxy.fault = lambda number, method, path: "cut" if method == "GET" and number < 3 else None

    def check(source: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "training", "check", source]
        ours = environment(azurite) | {"DRYDOCK_CACHE": str(tmp_path)} | more
        return subprocess.run(command, cwd=ROOT, env=ours, capture_output=True, text=True, timeout=60)

    try:
        found = check(address, DRYDOCK_BLOB_ENDPOINT=proxy.url)
    finally:
        proxy.close()
    assert found.returncode == 0, found.stderr
    assert f"{address}: 600 good rows, no problems" in found.stdout
    assert "cut GET" in proxy.faults
    assert "its metadata has no sha256 and none was given, so it is taken unverified" in found.stderr
    lost = check(f"az://{ACCOUNT}/datasets/none.jsonl")
    assert (lost.returncode, lost.stderr.splitlines()[-1]) == (
        exits.INPUT, f"az://{ACCOUNT}/datasets/none.jsonl: no such blob: look at the address",
    )  # fmt: skip


def test_a_run_that_lost_its_node_goes_on_from_blob_to_the_very_same_adapter(
    azurite: BlobServiceClient, work: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "spec.json"
    settings = {
        "adapter": "kubectl", "base_model": str(BASE), "dataset": str(work / "rows.jsonl"), "num_train_epochs": 1,
        "learning_rate": 2e-3, "max_seq_length": 256, "held_out_fraction": 0.9, "save_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "lora_dropout": 0.1,
    }  # fmt: skip
    spec.write_text(json.dumps(settings))

    def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "training", "tune", "--spec", str(spec), "--out", str(out)]
        with (tmp_path / f"{out.name}.log").open("wb") as log:
            command += ["--metrics-address", "off", *more]
            return subprocess.Popen(command, cwd=ROOT, env=environment(azurite), stdout=log, stderr=log)

    def copied() -> list[int]:
        names = azurite.get_container_client("checkpoints").list_blob_names()
        return sorted(
            int(name.split("/")[-2].removeprefix("step-")) for name in names if name.endswith(".complete.json")
        )

    whole = start(tmp_path / "whole")
    remote = ("--checkpoints", f"az://{ACCOUNT}/checkpoints/kubectl")
    for number, end in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
        before = max(copied(), default=0)
        node = tmp_path / f"node-{number}"
        process = start(node, *remote)
        wait_until(lambda seen=before: max(copied(), default=0) > seen or process.poll() is not None, 150, "a copy")  # noqa: B023
        process.send_signal(end)
        assert process.wait(30) == (-signal.SIGKILL if end == signal.SIGKILL else exits.TERMINATED), f"{node.name}"
        if end == signal.SIGTERM:
            local = max(int(path.name.removeprefix("step-")) for path in (node / "checkpoints").glob("step-*"))
            assert copied()[-1] == local, "the checkpoint written on SIGTERM is copied as well"
        shutil.rmtree(node)
    assert len(copied()) == 2
    at = copied()[-1]
    last = start(tmp_path / "node-3", *remote)
    assert last.wait(150) == 0, (tmp_path / "node-3.log").read_text()
    assert whole.wait(150) == 0, (tmp_path / "whole.log").read_text()
    total = read_json(tmp_path / "whole" / "tuning.json")["steps"]
    assert 0 < at < total
    assert f"resuming at step {at} of {total}" in (tmp_path / "node-3.log").read_text()
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "node-3"))
    assert file_digest(one) == file_digest(other)
