"""Compiled graphs between pods: whole or not at all, only what was made for this start, and never a failed start."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blobs import store
from blobs.store import MARKER, Address, BlobFolder
from common import exits
from common.files import read_json, tree_digest, write_json
from serving import compiled
from serving.compiled import ARCHIVE, FACTS, fetch, make, pack, unpack
from serving.spec import ServingSpec
from serving.startup import Fetched
from tests.unit.blob_fakes import KEY, FakeAccount

ROOT = Path(__file__).parents[2]
HERE = "az://mystore/box/compiled/1a2b3c"
SPEC = ServingSpec(base_model="/models/base", store="s")


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAccount]:
    fake = FakeAccount()
    monkeypatch.setenv("DRYDOCK_BLOB_ENDPOINT", f"{fake.url}/mystore")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    monkeypatch.setattr(store, "POLL_SECONDS", 0.02)
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BACKOFF_SECONDS", 0.01)


def fill(cache: Path) -> Path:
    """A cache as a start leaves it, with what must not go along."""
    (cache / "vllm" / "torch_compile_cache" / "ab").mkdir(parents=True)
    (cache / "vllm" / "torch_compile_cache" / "ab" / "model").write_bytes(os.urandom(300_000))
    (cache / "inductor").mkdir()
    (cache / "inductor" / "kernel.so").write_bytes(b"\x7fELF")
    (cache / "inductor" / "kernel.so").chmod(0o775)
    (cache / ".triton" / "cache").mkdir(parents=True)
    (cache / ".triton" / "cache" / "k.cubin").write_bytes(b"cubin")
    (cache / "cuda").mkdir()
    (cache / "cuda" / "driver").write_bytes(b"of this driver")
    (cache / "inductor" / "link").symlink_to("/etc/passwd")
    return cache


def kept(cache: Path) -> set[str]:
    return {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}


WANTED = {"vllm/torch_compile_cache/ab/model", "inductor/kernel.so", ".triton/cache/k.cubin"}


def put(folder: Path, spec: ServingSpec = SPEC) -> None:
    """What the Job puts at HERE, without a vLLM."""
    out = folder / "out"
    out.mkdir()
    pack(fill(folder / "made"), out / ARCHIVE)
    write_json(out / FACTS, compiled.facts(spec))
    BlobFolder(Address.parse(HERE)).push(out)


# The archive


def test_what_was_packed_is_there_again_in_a_new_pod(tmp_path: Path) -> None:
    made, new = fill(tmp_path / "made"), tmp_path / "new"
    new.mkdir()
    pack(made, tmp_path / ARCHIVE)
    unpack(tmp_path / ARCHIVE, new)
    assert kept(new) == WANTED, "neither the driver's cache nor links"
    for name in WANTED:
        assert (new / name).read_bytes() == (made / name).read_bytes()
    assert (new / "inductor" / "kernel.so").stat().st_mode & 0o777 == 0o755
    assert (new / ".triton" / "cache" / "k.cubin").stat().st_mode & 0o111 == 0


def test_the_same_files_are_the_same_bytes(tmp_path: Path) -> None:
    made = fill(tmp_path / "made")
    pack(made, tmp_path / "one")
    again = tmp_path / "again"
    shutil.copytree(made, again, symlinks=True)
    os.utime(again / "inductor" / "kernel.so", (1, 1))
    pack(again, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nothing_compiled_is_nothing_to_keep(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    with pytest.raises(FileNotFoundError, match="no compiled graphs"):
        pack(tmp_path, tmp_path / ARCHIVE)


def item(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


def sparse() -> tarfile.TarInfo:
    found = item("vllm/huge")
    found.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**50), "GNU.sparse.name": "vllm/huge"}
    return found


@pytest.mark.parametrize(
    "bad",
    [
        item("/vllm/x"), item("vllm/../../x"), item("../vllm/x"), item("state/token"), item(""), item("."),
        item("vllm/x", tarfile.SYMTYPE, "/etc/passwd"), item("vllm/x", tarfile.LNKTYPE, "vllm/y"),
        item("vllm", tarfile.SYMTYPE, "/state"), item("vllm/d", tarfile.DIRTYPE), item("vllm/x", tarfile.FIFOTYPE),
        item("vllm/x", tarfile.CHRTYPE), sparse(),
    ],
    ids=lambda bad: f"{bad.name or 'none'}-{bad.type.decode()}",
)  # fmt: skip
def test_only_plain_files_of_these_folders_are_unpacked(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    (tmp_path / "cache").mkdir()
    with tarfile.open(tmp_path / ARCHIVE, "w", format=tarfile.PAX_FORMAT) as tar:
        good = item("vllm/good")
        good.size = 2
        tar.addfile(good, io.BytesIO(b"ok"))
        tar.addfile(bad, io.BytesIO(b""))
    with pytest.raises((ValueError, tarfile.TarError)):
        unpack(tmp_path / ARCHIVE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [], "nor what came before it"
    assert {path.name for path in tmp_path.iterdir()} == {"cache", ARCHIVE}


def test_one_file_does_not_stand_in_for_another(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    with tarfile.open(tmp_path / ARCHIVE, "w") as tar:
        for name in ("vllm/x", "vllm/x"):
            tar.addfile(item(name), io.BytesIO(b""))
    with pytest.raises(OSError, match="exists"):
        unpack(tmp_path / ARCHIVE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# A replica that starts


def test_a_replica_finds_what_the_job_put_there(
    account: FakeAccount, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serving.compiled")
    put(tmp_path)
    found = fetch(SPEC, HERE, tmp_path / "cache")
    assert found and found.found and 0 < found.seconds < 30
    assert kept(tmp_path / "cache") == WANTED, "and no file that was only on the way"
    assert [line.split(" after")[0] for line in caplog.messages] == [f"compiled graphs of {HERE} are in place"]
    assert fetch(SPEC, HERE, tmp_path / "cache") is None, "a restarted container has them"
    assert not account.writes()[3:], "it only reads"


Damage = Callable[[FakeAccount], None]
NAME = "compiled/1a2b3c"


def tampered(account: FakeAccount) -> None:
    data, metadata = account.blobs[f"{NAME}/{ARCHIVE}"]
    account.blobs[f"{NAME}/{ARCHIVE}"] = (data[:-1000] + bytes(byte ^ 1 for byte in data[-1000:]), metadata)


def truncated(account: FakeAccount) -> None:
    data, metadata = account.blobs[f"{NAME}/{ARCHIVE}"]
    account.blobs[f"{NAME}/{ARCHIVE}"] = (data[: len(data) // 2], metadata)


def garbled(account: FakeAccount) -> None:
    account.blobs[f"{NAME}/{MARKER}"] = (b"{", {})


def gone(account: FakeAccount) -> None:
    account.blobs.clear()


def half(account: FakeAccount) -> None:
    del account.blobs[f"{NAME}/{ARCHIVE}"]


def forbidden(account: FakeAccount) -> None:
    account.fault = lambda method, name: (403, "AuthorizationPermissionMismatch")


def broken(account: FakeAccount) -> None:
    account.fault = lambda method, name: (500, "InternalError")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (tampered, "expected"), (truncated, "expected"), (garbled, "not a marker"), (gone, "nobody has put them there"),
        (half, "put it again"), (forbidden, "needs the role Storage Blob Data Reader"), (broken, "as the test wants"),
    ],
)  # fmt: skip
def test_whatever_is_wrong_is_one_line_and_the_start_goes_on(
    account: FakeAccount, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage, said: str
) -> None:
    put(tmp_path)
    damage(account)
    found = fetch(SPEC, HERE, tmp_path / "cache")
    assert found and not found.found
    assert list((tmp_path / "cache").iterdir()) == []
    (line,) = [message for message in caplog.messages if message.startswith("no compiled graphs, vLLM compiles: ")]
    assert said in line and "\n" not in line


def test_what_was_made_for_another_start_is_left(
    account: FakeAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path)
    other = SPEC.model_copy(update={"max_num_seqs": 7})
    found = fetch(other, HERE, tmp_path / "cache")
    assert found and not found.found and "made for" in caplog.messages[-1]
    (tmp_path / "gpus" / "0000:01").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:01" / "information").write_text("Model: \t\t NVIDIA A100 80GB PCIe\nIRQ: 1\n")
    monkeypatch.setattr(compiled, "GPUS", tmp_path / "gpus")
    assert compiled.facts(SPEC)["gpus"] == ["NVIDIA A100 80GB PCIe"]
    found = fetch(SPEC, HERE, tmp_path / "cache")
    assert found and not found.found
    assert 'made for {"gpus": []}, this is {"gpus": ["NVIDIA A100 80GB PCIe"]}' in caplog.messages[-1]
    assert list((tmp_path / "cache").iterdir()) == []


def test_it_does_not_wait_for_a_service_that_is_silent(
    account: FakeAccount, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path)
    silent = threading.Event()

    def wait(method: str, name: str) -> None:
        silent.wait(20)

    account.fault = wait
    started = time.monotonic()
    found = fetch(SPEC, HERE, tmp_path / "cache", seconds=0.3)
    assert found and not found.found and time.monotonic() - started < 10
    assert "not here within 0 s" in caplog.messages[-1]
    assert not kept(tmp_path / "cache")
    silent.set()


# The Job


class Vllm:
    """Stands for vLLM: what it is started with, and a cache as it leaves one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.started: list[tuple[list[str], dict[str, str]]] = []
        self.cache = cache
        monkeypatch.setenv("DRYDOCK_CACHE", str(cache))
        monkeypatch.setattr(compiled, "running", self.running)

    def running(self, command: list[str], environment: dict[str, str], url: str, **_: Any) -> Vllm:
        self.started.append((command, environment))
        return self

    def __enter__(self) -> float:
        fill(self.cache)
        return 1.0

    def __exit__(self, *_: object) -> None:
        pass


def job(cache: Path) -> bool:
    return make(SPEC, HERE, cache, port=8000, timeout_seconds=60)


def test_what_the_job_makes_a_replica_finds(
    account: FakeAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = Vllm(monkeypatch, tmp_path / "job")
    assert job(tmp_path / "job") is True
    ((command, environment),) = vllm.started
    assert command[3:7] == ["--host", "127.0.0.1", "--port", "8000"] and "--lora-modules" not in command
    # vLLM hashes them with the graphs, and a replica has them.
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1" and environment["VLLM_PLUGINS"] == ""
    assert environment["VLLM_CACHE_ROOT"] == str(tmp_path / "job" / "vllm")
    found = fetch(SPEC, HERE, tmp_path / "new")
    assert found and found.found and kept(tmp_path / "new") == WANTED
    assert tree_digest(tmp_path / "new" / "vllm") == tree_digest(tmp_path / "job" / "vllm")


def test_what_is_there_is_not_compiled_again(
    account: FakeAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path)
    writes = len(account.writes())
    vllm = Vllm(monkeypatch, tmp_path / "job")
    assert job(tmp_path / "job") is False
    assert vllm.started == [] and len(account.writes()) == writes


def test_the_job_waits_for_its_role_after_it_has_compiled(
    account: FakeAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [(403, "AuthorizationPermissionMismatch")] * 3
    account.fault = lambda method, name: refused.pop() if refused else None
    vllm = Vllm(monkeypatch, tmp_path / "job")
    assert job(tmp_path / "job") is True
    assert len(vllm.started) == 1
    assert f"{NAME}/{MARKER}" in account.blobs


# The container


def test_the_engine_becomes_vllm_and_is_told_what_was_found(account: FakeAccount, tmp_path: Path) -> None:
    """The real command, up to the exec, in a process of its own: signal handlers and threads are part of it."""
    put(tmp_path, SPEC)
    write_json(tmp_path / "serving.json", SPEC.model_dump(mode="json"))
    become = (
        "import os, json, sys; os.execve = lambda path, command, environment: ("
        "print(json.dumps(dict(environment))), os._exit(0)); "
        "from serving.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["engine", "--spec", str(tmp_path / "serving.json"), "--state", str(tmp_path / "state")]
    command = [sys.executable, "-c", become, *arguments, "--compiled", HERE]
    environment = os.environ | {"DRYDOCK_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Fetched.parse(json.loads(done.stdout)["DRYDOCK_COMPILED"]).found
    assert kept(tmp_path / "cache") == WANTED
    del environment["DRYDOCK_CACHE"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == exits.INPUT and "--compiled: needs DRYDOCK_CACHE" in done.stderr


def test_a_pod_that_is_deleted_while_it_fetches_ends_at_once(
    account: FakeAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PID 1 of its container it would not hear a SIGTERM for which it has no handler."""
    write_json(tmp_path / "serving.json", SPEC.model_dump(mode="json"))
    asked, silent = threading.Event(), threading.Event()

    def wait(method: str, name: str) -> None:
        asked.set()
        silent.wait(30)

    account.fault = wait
    monkeypatch.setattr(account, "handle_error", lambda *_: None)  # nobody is there any more to be answered
    command = [sys.executable, "-m", "serving", "engine", "--spec", str(tmp_path / "serving.json")]
    command += ["--state", str(tmp_path / "state"), "--compiled", HERE]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"DRYDOCK_CACHE": str(tmp_path / "cache")})
    try:
        assert asked.wait(30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == exits.TERMINATED
    finally:
        silent.set()
        process.kill()
        process.wait()


def test_facts_are_json(tmp_path: Path) -> None:
    write_json(tmp_path / FACTS, compiled.facts(SPEC))
    assert read_json(tmp_path / FACTS) == compiled.facts(SPEC)
    assert "--host" in compiled.facts(SPEC)["arguments"] and "--middleware" not in compiled.facts(SPEC)["arguments"]
