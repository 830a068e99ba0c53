"""Compiled graphs that outlive a pod: a Job makes them and puts them into Blob, replicas take them before they start.

What vLLM, inductor and Triton keep is code, and who finds it runs it. A place that every replica may write would lead
from one replica that was taken over to all of them. So there is one writer, whose pod no client reaches, and replicas
may only read (infra/identities.py). What is there is named after all that decides it (workloads/compiled.py).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
import tempfile
import threading
import time
from pathlib import Path, PurePosixPath
from typing import Any

from common.files import read_json, write_json
from serving.engine import graph_arguments, running, vllm_command, vllm_environment
from serving.spec import ServingSpec
from serving.startup import Fetched

log = logging.getLogger(__name__)

FOLDERS = ("vllm", "inductor", ".triton")
"""What is kept of DRYDOCK_CACHE: vLLM's graphs with inductor's code, inductor's own before that, Triton's kernels.

Not `cuda`, the driver's own cache, which is none of other drivers' business."""
ARCHIVE, FACTS = "compiled.tar", "facts.json"
FETCH_SECONDS = 60.0  # within which it is there, or the replica compiles: a start without it takes minutes more
ROLE_WAIT_SECONDS = 900.0  # Azure needs minutes until a role just given counts

GPUS = Path("/proc/driver/nvidia/gpus")  # of NVIDIA's driver, in containers too


def facts(spec: ServingSpec) -> dict[str, Any]:
    """What is told with an archive, and must be the same where it is used: vLLM's arguments, and the kind of GPU."""
    names = [
        line.partition(":")[2].strip()
        for file in sorted(GPUS.glob("*/information"))
        for line in file.read_text().splitlines()
        if line.startswith("Model:")
    ]
    return {"arguments": graph_arguments(spec), "gpus": sorted(set(names))}


def make(spec: ServingSpec, address: str, cache: Path, *, port: int, timeout_seconds: float) -> bool:
    """Compile into `cache` as a replica does, with no adapter and no client, for `address`; False: it is there already.

    Raises `SettingsError` where vLLM does not start or Blob refuses, TimeoutError where vLLM takes too long, and
    `BlobError` for a passing trouble.
    """
    from blobs import BlobError
    from blobs.store import Address, BlobFolder, Refused, wait_for

    folder = BlobFolder(Address.parse(address))
    try:
        if folder.marker() is not None:
            return False
    except (BlobError, Refused) as error:
        log.info("%s; compiling meanwhile", error)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        place = Path(name)
        # With a state folder: the variables that a replica gets with it are part of vLLM's hash of the graphs.
        environment = os.environ | vllm_environment(spec, state=place)
        command = vllm_command(spec, host="127.0.0.1", port=port, middleware=False)
        url = f"http://127.0.0.1:{port}"
        with running(command, environment, url, timeout_seconds=timeout_seconds, output=None):
            pass  # ready is compiled: both come before the first answer
        (place / "kept").mkdir()
        pack(cache, place / "kept" / ARCHIVE)
        write_json(place / "kept" / FACTS, facts(spec))
        wait_for(lambda: (folder.marker(),), ROLE_WAIT_SECONDS, f"the right to write {address}")
        folder.push(place / "kept")
    return True


def fetch(spec: ServingSpec, address: str, cache: Path, *, seconds: float = FETCH_SECONDS) -> Fetched | None:
    """Bring what is at `address` into `cache`; None where the cache has graphs already (a restarted container).

    Never raises, and takes no longer than `seconds`: whatever keeps it from coming is told in one line of the log, and
    the replica compiles.
    """
    if any((cache / name).exists() for name in FOLDERS):
        return None
    cache.mkdir(parents=True, exist_ok=True)
    started, troubles = time.monotonic(), []

    def work() -> None:
        try:
            _fetch(spec, address, cache)
        except Exception as error:  # of any kind: without it the replica starts as well
            troubles.append(" ".join(str(error).split()) or type(error).__name__)
        else:
            troubles.append("")

    thread = threading.Thread(target=work, daemon=True)  # left alone at the end of `seconds`; the exec ends it
    thread.start()
    thread.join(seconds)
    took = time.monotonic() - started
    trouble = troubles[0] if troubles else f"{address}: not here within {seconds:.0f} s"
    if trouble:
        log.warning("no compiled graphs, vLLM compiles: %s", trouble)
    else:
        log.info("compiled graphs of %s are in place after %.1f s", address, took)
    return Fetched(not trouble, took)


def _fetch(spec: ServingSpec, address: str, cache: Path) -> None:
    from blobs.store import Address, BlobFolder  # Azure's SDK, for who has something to fetch alone

    folder = BlobFolder(Address.parse(address), retries=1)
    if folder.marker() is None:
        raise LookupError(f"{address}: nobody has put them there yet")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as place:
        folder.fetch(Path(place), quiet=True)  # verified: size and SHA-256 of both files
        theirs, ours = read_json(Path(place) / FACTS), facts(spec)
        if theirs != ours:
            raise LookupError(f"{address}: made for {_differing(theirs, ours)}, this is {_differing(ours, theirs)}")
        unpack(Path(place) / ARCHIVE, cache)


def _differing(facts: dict[str, Any], others: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in facts.items() if value != others.get(name)})


def pack(cache: Path, archive: Path) -> None:
    """Write FOLDERS of `cache` into the tar file `archive`: the same bytes for the same files.

    Raises FileNotFoundError where nothing was compiled.
    """
    files = sorted(
        path.relative_to(cache).as_posix()
        for name in FOLDERS
        for path in (cache / name).rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    if not files:
        raise FileNotFoundError(f"{cache}: no compiled graphs in {', '.join(FOLDERS)}")
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in files:
            item = tarfile.TarInfo(name)  # without owner and time
            item.size = (cache / name).stat().st_size
            item.mode = 0o755 if os.access(cache / name, os.X_OK) else 0o644
            with (cache / name).open("rb") as file:
                tar.addfile(item, file)


def unpack(archive: Path, cache: Path) -> None:
    """Put the files of `archive` into FOLDERS of `cache`, which has none of them yet; a folder is whole or absent.

    Raises ValueError for whatever `pack` does not write (links, devices, other places), and tarfile's and OSErrors.
    """
    with (
        tempfile.TemporaryDirectory(dir=cache, prefix=".unpack-") as place,
        tarfile.open(archive, "r:") as tar,
    ):
        for item in tar:
            path = PurePosixPath(item.name)
            inside = path.parts[:1] and path.parts[0] in FOLDERS and ".." not in path.parts
            if item.type != tarfile.REGTYPE or item.issparse() or not inside:
                raise ValueError(f"{archive.name}: {item.name!r} is not a plain file below {', '.join(FOLDERS)}")
            target, content = Path(place) / path, tar.extractfile(item)
            assert content  # a plain file
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                shutil.copyfileobj(content, file)
            target.chmod(item.mode & 0o755)
        for folder in sorted(Path(place).iterdir()):
            folder.rename(cache / folder.name)
