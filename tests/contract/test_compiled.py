"""From the Job that compiles to a new replica, with real vLLM and a real Blob service. On a CPU vLLM keeps little."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import BlobServiceClient

from common import exits
from common.files import tree_digest
from common.processes import Processes, free_ports, wait_for
from localcloud.azurite import ACCOUNT, AZURITE, KEY, start
from serving.engine import is_ok
from tests.contract.conftest import BASE, ROOT

pytestmark = [
    pytest.mark.skipif(not AZURITE.exists(), reason="needs npm: make azurite"),
    pytest.mark.timeout(900),
]
HERE = f"az://{ACCOUNT}/compiled/1a2b3c4d5e"


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a short name: vLLM's sockets lie below it, whose paths may have 107 characters."""
    return tmp_path_factory.mktemp("pod")


@pytest.fixture
def environment(folder: Path) -> Iterator[dict[str, str]]:
    """That of a pod: a Blob service with the container `compiled`, and one folder to write to."""
    with Processes() as processes:
        endpoint = start(processes, folder, folder / "azurite.log")
        service = BlobServiceClient(endpoint, AzureNamedKeyCredential(ACCOUNT, KEY), use_env_settings=False)
        service.create_container("compiled")
        blob = {"DRYDOCK_BLOB_ENDPOINT": endpoint, "AZURE_STORAGE_KEY": KEY}
        yield os.environ | blob | {"DRYDOCK_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}


def test_what_the_job_keeps_a_new_pod_starts_with(environment: dict[str, str], folder: Path) -> None:
    spec, cache, port = folder / "serving.json", folder / "cache", free_ports(1)[0]
    settings = {"base_model": str(BASE), "store": str(folder / "store"), "device": "cpu", "dtype": "float32"}
    spec.write_text(json.dumps(settings | {"max_model_len": 512, "max_num_seqs": 4, "cpu_kv_cache_mib": 32}))
    compiling = [sys.executable, "-m", "serving", "compile", "--spec", str(spec), "--into", HERE, "--port", str(port)]

    def compiled() -> subprocess.CompletedProcess[str]:
        return subprocess.run(compiling, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    done = compiled()
    assert done.returncode == exits.OK, (done.stdout + done.stderr)[-3000:]
    assert f"{HERE}: compiled graphs are there" in done.stdout
    assert not is_ok(f"http://127.0.0.1:{port}/health"), "its vLLM has ended"
    made = tree_digest(cache / "vllm")
    shutil.rmtree(cache)
    again = compiled()
    assert (again.returncode, again.stdout) == (exits.OK, f"{HERE}: compiled graphs were there already\n")
    assert not (cache / "vllm").exists(), "nothing was started"

    command = [sys.executable, "-m", "serving", "engine", "--spec", str(spec), "--state", str(folder / "state")]
    with (folder / "engine.log").open("wb") as log:
        engine = subprocess.Popen(
            [*command, "--port", str(port), "--compiled", HERE],
            cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:

        def check() -> None:
            assert engine.poll() is None, (folder / "engine.log").read_text()[-3000:]

        wait_for(lambda: is_ok(f"http://127.0.0.1:{port}/health"), 600, "the engine", check)
        told = dict(
            line.rsplit(" ", 1)
            for line in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text.splitlines()
            if not line.startswith("#")
        )
    finally:
        os.killpg(engine.pid, signal.SIGKILL)
        engine.wait()
    assert float(told["drydock_compiled_found"]) == 1
    assert 0 < float(told['drydock_startup_seconds{phase="fetch"}']) < 60
    assert float(told['drydock_startup_seconds{phase="import"}']) > 0
    assert f"compiled graphs of {HERE} are in place" in (folder / "engine.log").read_text()
    assert tree_digest(cache / "vllm") == made, "vLLM found what it would have written"
