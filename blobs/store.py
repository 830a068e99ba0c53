"""Files and folders between this machine and a Blob container: whole or absent, each verified by its SHA-256.

A folder is complete when its marker `.complete.json` is there: it is written last and names every file with size and
SHA-256. A blob is put by one commit (Put Blob, or Put Block List after its blocks), so that none is ever seen half
written; its SHA-256 is kept in its metadata under `sha256`.

Sign-in is by Entra identity alone, for the storage accounts have shared keys off. A key counts only for an emulator
on this machine's loopback.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from azure.core.credentials import AccessToken, AzureNamedKeyCredential, TokenCredential
from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceNotFoundError
from azure.storage.blob import BlobClient, ContainerClient
from pydantic import ValidationError

from blobs import BlobError
from common.files import file_digest, write_atomic
from common.hosts import is_loopback
from common.identity import entra_credential, first_line, passing
from common.settings import Settings, SettingsError

log = logging.getLogger(__name__)
logging.getLogger("azure").setLevel(logging.WARNING)  # the SDK tells every request at INFO
logging.getLogger("azure.identity").setLevel(logging.ERROR)  # its warnings come again as the exception

MARKER = ".complete.json"
READER, CONTRIBUTOR = "Storage Blob Data Reader", "Storage Blob Data Contributor"

PIECE_BYTES = 8 * 2**20  # a range or block; the SDK's 4 MiB makes twice the requests for a model of 100 GB
PIECES_AT_ONCE = 5  # of one file
FILES_AT_ONCE = 2  # so that one is verified while another is fetched; 2 x 5 requests fill the SDK's pool of 10
RETRIES = 4  # after about 3, 5, 9 and 17 s: an account that throttles lets through again within that
BACKOFF_SECONDS = 1
POLL_SECONDS = 5.0  # between two looks for what is awaited
LINE_SECONDS, WAIT_LINE_SECONDS = 10.0, 30.0  # between two log lines while moving bytes, and while waiting

Result = TypeVar("Result")


class Refused(SettingsError):
    """The account refuses this identity. It may be waited for: a role just granted counts after some minutes."""


class Damaged(SettingsError):
    """What lies in Blob is not what its marker or its SHA-256 says: it must be put again."""


@dataclass(frozen=True)
class Address:
    """`az://ACCOUNT/CONTAINER/PATH`; `path` may be empty: the container itself."""

    account: str
    container: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises `SettingsError` when `text` is no such address."""
        found = re.fullmatch(r"az://([a-z0-9]{3,24})/([a-z0-9](?:-?[a-z0-9]){2,62})(?:/(.*))?", text)
        path = (found[3] or "").rstrip("/") if found else ""
        if not found or any(part in ("", ".", "..") for part in path.split("/")[bool(not path) :]):
            raise SettingsError([f"{text}: expected az://ACCOUNT/CONTAINER/PATH, such as az://mystore/models/llama"])
        return cls(found[1], found[2], path)

    def __str__(self) -> str:
        return f"az://{self.account}/{self.container}" + (f"/{self.path}" if self.path else "")

    def __truediv__(self, name: str) -> Address:
        return replace(self, path=f"{self.path}/{name}" if self.path else name)

    def split(self) -> tuple[Address, str]:
        """`(folder, name)` of a single blob. Raises `SettingsError` for a bare container."""
        if not self.path:
            raise SettingsError([f"{self}: names a whole container; add the path of a folder or a blob"])
        folder, _, name = self.path.rpartition("/")
        return replace(self, path=folder), name


class Entry(Settings):
    """One file of a folder: size in bytes, SHA-256 as 64 hex digits."""

    size: int
    sha256: str


class Marker(Settings):
    """What `.complete.json` says: every file by its path within the folder, and where it came from if that is known."""

    files: dict[str, Entry]
    origin: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


class Transfer:
    """Shows bytes as they move: a bar on a terminal, elsewhere a log line every 10 s. Any thread may `add`.

    `total` is 0 where the sender does not tell it.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._last_line = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Any = None
        if sys.stderr.isatty():
            with suppress(ImportError):  # not on a deployer's machine, which does without a bar
                from tqdm import tqdm

                self._bar = tqdm(total=total or None, unit="B", unit_scale=True, desc=what)

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._bar is not None:
                self._bar.update(size)
                return
            now = time.monotonic()
            if now - self._last_line >= LINE_SECONDS:
                self._last_line = now
                speed = self._done / (now - self._started)
                left = max(0.0, self._total - self._done) / speed if speed else 0
                of, eta = (f" of {shown(self._total)}", f", ETA {left:.0f} s") if self._total else ("", "")
                log.info("%s: %s%s, %s/s%s", self._what, shown(self._done), of, shown(speed), eta)

    def close(self) -> None:
        """End the bar; without one, tell what was moved and how fast."""
        if self._bar is not None:
            self._bar.close()
        elif self._done:
            seconds = time.monotonic() - self._started
            log.info("%s: %s in %.1f s", self._what, shown(self._done), seconds)


def shown(size: float) -> str:
    """`size` bytes as people read it: 4.98 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class BlobFolder:
    """A folder of Blob Storage, opened with this process's identity. Its client is kept for the folders below it.

    Every method raises `SettingsError` for what only a person can mend (no such container, a missing role, a wrong
    digest) and `BlobError` for what another attempt may heal, after `retries` further attempts of its own.
    """

    def __init__(
        self,
        address: Address,
        *,
        retries: int | None = None,
        at_once: int = PIECES_AT_ONCE,
        client: ContainerClient | None = None,
    ) -> None:
        self.address = address
        self._at_once = at_once  # pieces of one file; a single one needs no threads of the SDK
        self._client = client or _open(address, RETRIES if retries is None else retries)

    def __truediv__(self, name: str) -> BlobFolder:
        return BlobFolder(self.address / name, at_once=self._at_once, client=self._client)

    def marker(self) -> Marker | None:
        """What the folder holds, or None when it is not complete."""
        with _explained(self.address / MARKER, READER):
            try:
                data = self._blob(MARKER).download_blob().readall()
            except ResourceNotFoundError as error:
                if _code(error) == "BlobNotFound":
                    return None
                raise
        try:
            return Marker.model_validate_json(data)
        except ValidationError as error:
            raise Damaged([f"{self.address / MARKER}: not a marker of this project ({error})"]) from None

    def push(self, source: Path, *, origin: str = "", quiet: bool = False) -> bool:
        """Make this folder hold the files below `source`, marker last; False when it already did.

        Files and folders that begin with a dot are left out: editors, hubs and this module keep their own state there.
        """
        files = {
            path.relative_to(source).as_posix(): Entry(size=path.stat().st_size, sha256=_sha256(path))
            for path in sorted(source.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts)
        }
        if not files:
            raise SettingsError([f"{source}: no files to push"])
        marker = Marker(files=files, origin=origin)
        if (before := self.marker()) == marker:
            return False
        if before:
            self.delete_blob(MARKER)  # while files are replaced, it would vouch for what is not there
        transfer = None if quiet else Transfer(f"push {self.address}", marker.size)
        for name, entry in files.items():
            self.push_file(source / name, name, entry, transfer)
        self.push_marker(marker)
        if transfer:
            transfer.close()
        return True

    def push_file(self, source: Path, name: str, entry: Entry | None = None, transfer: Transfer | None = None) -> bool:
        """Put the file `source` as blob `name`, in one commit; False when a blob of the same SHA-256 is there."""
        entry = entry or Entry(size=source.stat().st_size, sha256=_sha256(source))
        if self.entry(name) == entry:
            if transfer:
                transfer.add(entry.size)
            return False
        with _explained(self.address / name, CONTRIBUTOR), source.open("rb") as file:
            self._blob(name).upload_blob(
                file,
                length=entry.size,
                overwrite=True,
                metadata={"sha256": entry.sha256},
                max_concurrency=self._at_once,
                progress_hook=_ticks(transfer),
            )
        return True

    def push_marker(self, marker: Marker) -> None:
        """Declare the folder complete: every file of `marker` must have been put."""
        with _explained(self.address / MARKER, CONTRIBUTOR):
            self._blob(MARKER).upload_blob(marker.model_dump_json(indent=2).encode(), overwrite=True)

    def entry(self, name: str) -> Entry | None:
        """Size and SHA-256 of blob `name`, or None when it is absent; the SHA-256 is empty where none was recorded."""
        with _explained(self.address / name, READER):
            try:
                found = self._blob(name).get_blob_properties()
            except ResourceNotFoundError as error:
                if _code(error) == "BlobNotFound":
                    return None
                raise
        return Entry(size=found.size, sha256=(found.metadata or {}).get("sha256", ""))

    def fetch(self, target: Path, *, wait_seconds: float = 0.0, quiet: bool = False) -> bool:
        """Make folder `target` hold this folder's files; False when it already did.

        A file appears in `target` under its name only when its digest is right. The marker is kept there too, last: a
        later call that finds it with all sizes right does not read the files again. Waits `wait_seconds` for the
        marker to appear, and for a role just granted to count.
        """
        wanted = self.address / MARKER
        marker = wait_for(self.marker, wait_seconds, f"{wanted} (the mirror Job writes it)")
        if marker is None:
            raise SettingsError(
                [f"{wanted}: absent, so {self.address} is not complete or not there; write it with python -m blobs "
                 "mirror (or push), or wait for it with --wait-seconds"]
            )  # fmt: skip
        if target.exists() and not target.is_dir():
            raise SettingsError([f"{target}: is a file; {self.address} is a folder"])
        target.mkdir(parents=True, exist_ok=True)
        with alone(target):
            return self._fetch(marker, target, quiet)

    def _fetch(self, marker: Marker, target: Path, quiet: bool) -> bool:
        kept = target / MARKER
        text = marker.model_dump_json(indent=2)
        trusted = kept.is_file() and kept.read_text(encoding="utf-8") == text
        missing = {
            name: entry
            for name, entry in marker.files.items()
            if not _is(target / _inside(name), entry, by_size=trusted)
        }
        if trusted and not missing:
            log.info("%s: already whole, %s", target, shown(marker.size))
            return False
        kept.unlink(missing_ok=True)
        foreign = sorted(
            str(path.relative_to(target))
            for path in target.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(target).parts)
            and path.relative_to(target).as_posix() not in marker.files
        )
        if foreign:  # a loader takes every *.safetensors that it finds
            raise SettingsError(
                [f"{target}: holds {', '.join(foreign[:3])}{' ...' if foreign[3:] else ''}, which {self.address} does "
                 "not have; choose an empty folder"]
            )  # fmt: skip
        size = sum(entry.size for entry in missing.values())
        if (free := shutil.disk_usage(target).free) < size:
            raise SettingsError([f"{target}: {shown(size)} to fetch, but {shown(free)} free on that disk"])
        transfer = None if quiet else Transfer(f"fetch {self.address}", size)
        over = threading.Event()
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            jobs = [
                pool.submit(self._download, name, target / name, entry, transfer, over)
                for name, entry in missing.items()
            ]
            try:
                for job in as_completed(jobs):  # whichever fails first
                    job.result()
            except BaseException:
                over.set()  # who has begun ends with the piece that is on its way
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        write_atomic(kept, text)
        if transfer:
            transfer.close()
        return True

    def fetch_file(self, name: str, target: Path, *, sha256: str | None = None, wait_seconds: float = 0.0) -> bool:
        """Make file `target` hold blob `name`; False when it already did.

        Its SHA-256 must be `sha256` (64 hex digits), or without one what its metadata says.
        """
        place = self.address / name
        if target.is_dir():
            raise SettingsError([f"{target}: is a folder; name the file to write"])
        entry = wait_for(lambda: self.entry(name), wait_seconds, str(place))
        if entry is None:
            raise SettingsError([f"{place}: no such blob"])
        if sha256 and entry.sha256 and sha256 != entry.sha256:
            raise SettingsError([f"{place}: expected SHA-256 {sha256}, but it was put with {entry.sha256}"])
        entry = Entry(size=entry.size, sha256=sha256 or entry.sha256)
        if not entry.sha256:
            log.warning("%s: its metadata has no sha256 and none was given, so it is taken unverified", place)
        if _is(target, entry, by_size=False):
            log.info("%s: already whole, %s", target, shown(entry.size))
            return False
        transfer = Transfer(f"fetch {place}", entry.size)
        with tempfile.TemporaryDirectory(dir=_made(target.parent), prefix=f".{target.name}.") as room:
            # A folder of its own: two may fetch to one place at a time.
            self._download(name, Path(room) / target.name, entry, transfer)
            os.replace(Path(room) / target.name, target)
        transfer.close()
        return True

    def complete_children(self) -> list[str]:
        """The names of the complete folders directly below this one, sorted."""
        inside = f"{self.address.path}/" if self.address.path else ""
        with _explained(self.address, READER):
            names = [name.removeprefix(inside) for name in self._client.list_blob_names(name_starts_with=inside)]
        return sorted(name.removesuffix(f"/{MARKER}") for name in names if re.fullmatch(rf"[^/]+/{MARKER}", name))

    def delete(self) -> None:
        """Remove every blob below this folder, the marker first: from then on it counts as absent."""
        with _explained(self.address, CONTRIBUTOR):
            names = list(self._client.list_blob_names(name_starts_with=f"{self.address.path}/"))
        for name in sorted(names, key=lambda name: not name.endswith(f"/{MARKER}")):
            self.delete_blob(name.removeprefix(f"{self.address.path}/"))

    def delete_blob(self, name: str) -> None:
        """Remove blob `name`; it may be absent."""
        with _explained(self.address / name, CONTRIBUTOR):
            try:
                self._blob(name).delete_blob()
            except ResourceNotFoundError as error:
                if _code(error) != "BlobNotFound":
                    raise

    def _blob(self, name: str) -> BlobClient:
        return self._client.get_blob_client((self.address / name).path)

    def _download(
        self, name: str, target: Path, entry: Entry, transfer: Transfer | None, over: threading.Event | None = None
    ) -> None:
        """Fetch blob `name` beside `target`, verify it, and rename it into place, unless it is `over` before."""
        _made(target.parent)
        part = target.with_name(f".{target.name}.part")
        with part.open("wb") as file:
            with _explained(self.address / name, READER):
                hook = _ticks(transfer, over)
                self._blob(name).download_blob(max_concurrency=self._at_once, progress_hook=hook).readinto(file)
            file.flush()
            os.fsync(file.fileno())  # a later start trusts the name and the size, even after the node lost power
        if part.stat().st_size != entry.size or (entry.sha256 and _sha256(part) != entry.sha256):
            found = f"{part.stat().st_size} bytes with SHA-256 {_sha256(part)}"
            part.unlink()
            raise Damaged(
                [f"{self.address / name}: expected {entry.size} bytes with SHA-256 {entry.sha256}, found {found}; put "
                 "it again"]
            )  # fmt: skip
        os.replace(part, target)


def wait_for(attempt: Callable[[], Result | None], seconds: float, what: str) -> Result | None:
    """The first result of `attempt` that is not None, or None when there is none within `seconds`.

    A refusal or a passing trouble is waited out as well, and raised only at the end: a pod starts within seconds of
    its role assignment, which counts after up to ten minutes.
    """
    started = time.monotonic()
    next_line = started
    while True:
        trouble: Exception | None = None
        try:
            if (result := attempt()) is not None:
                return result
        except (Refused, BlobError) as error:
            trouble = error
        now = time.monotonic()
        if now - started >= seconds:
            if trouble:
                raise trouble
            return None
        if now >= next_line:
            next_line += WAIT_LINE_SECONDS
            log.info("waiting for %s: %.0f s%s", what, now - started, f" ({trouble})" if trouble else "")
        time.sleep(min(POLL_SECONDS, seconds - (now - started)))


def _open(address: Address, retries: int) -> ContainerClient:
    endpoint = os.environ.get("DRYDOCK_BLOB_ENDPOINT") or f"https://{address.account}.blob.core.windows.net"
    local = is_loopback(urlsplit(endpoint).hostname or "")
    return ContainerClient(
        endpoint.rstrip("/"),
        address.container,
        credential=_key(endpoint) if local else _identity(),
        use_env_settings=not local,  # a proxy cannot reach this machine's own loopback
        connection_timeout=10,  # seconds, as the next; the SDK's 20 and 60 add up over the retries
        read_timeout=30,
        initial_backoff=BACKOFF_SECONDS,  # seconds; the SDK's 15 are long for a pod that waits
        increment_base=2,
        random_jitter_range=1,
        retry_total=retries,
        retry_connect=retries,
        retry_read=retries,
        retry_status=retries,
        max_block_size=PIECE_BYTES,
        max_single_put_size=PIECE_BYTES,
        max_single_get_size=PIECE_BYTES,
        max_chunk_get_size=PIECE_BYTES,
    )


def _identity() -> TokenCredential:
    """This process's Entra identity."""
    try:
        return _Identity(entra_credential())
    except ValueError as error:
        raise SettingsError(
            [f"workload identity is half set up: {error}; the service account needs the annotation "
             "azure.workload.identity/client-id"]
        ) from None  # fmt: skip


class _Identity:
    """A credential whose refusal ends the request: the SDK would ask it again for every retry, a minute in all."""

    def __init__(self, credential: TokenCredential) -> None:
        self._credential = credential

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        try:
            return self._credential.get_token(*scopes, **options)
        except ClientAuthenticationError as error:
            if passing(error):
                raise BlobError(f"Entra: {first_line(error)}") from error
            raise Refused(
                [f"no Entra token: {first_line(error)}; in a pod: the label azure.workload.identity/use and a "
                 "federated credential for its service account; elsewhere: az login"]
            ) from error  # fmt: skip


def _key(endpoint: str) -> AzureNamedKeyCredential:
    """The account key of an emulator on loopback, which takes no Entra token over plain HTTP."""
    key = os.environ.get("AZURE_STORAGE_KEY")
    account = urlsplit(endpoint).path.strip("/")
    if not key or not account:
        raise SettingsError(
            [f"DRYDOCK_BLOB_ENDPOINT={endpoint}: an emulator needs its account as the path, and AZURE_STORAGE_KEY"]
        )
    return AzureNamedKeyCredential(account, key)


@contextmanager
def _explained(place: Address, role: str) -> Iterator[None]:
    """Turn the SDK's errors at `place`, where `role` is needed, into words and into the class that says who acts."""
    try:
        yield
    except AzureError as error:
        raise _explanation(error, place, role) from error


def _explanation(error: AzureError, place: Address, role: str) -> Exception:
    status, code = getattr(error, "status_code", None), _code(error)
    told = first_line(error)
    if code == "ContainerNotFound":
        return SettingsError([f"{place}: account {place.account} has no container {place.container}"])
    if status == 404:
        return Damaged([f"{place}: no such blob, though it was there or its marker names it; put it again"])
    if code == "AuthorizationFailure":
        return Refused(
            [f"{place}: refused (403 {code}): the network rules of account {place.account} do not let this machine "
             f"in, or its identity lacks the role {role}"]
        )  # fmt: skip
    if status in (401, 403):
        return Refused(
            [f"{place}: refused ({status} {code or told}): this identity needs the role {role} on account "
             f"{place.account}; a role just granted counts after up to 10 minutes"]
        )  # fmt: skip
    if status is None or status in (408, 429) or status >= 500:
        return BlobError(f"{place}: {told}")
    return SettingsError([f"{place}: {status} {code or ''}: {told}"])


def _code(error: AzureError) -> str:
    """The service's own name of the error, such as BlobNotFound."""
    code: Any = getattr(error, "error_code", None)
    return str(getattr(code, "value", code) or "")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _ticks(transfer: Transfer | None, over: threading.Event | None = None) -> Callable[[int, int | None], None]:
    """A progress hook of the SDK (bytes so far, bytes in all) that adds to `transfer`, and raises once it is `over`."""
    seen = 0

    def tick(done: int, total: int | None) -> None:
        nonlocal seen
        if over and over.is_set():
            raise BlobError("another file's trouble has ended this fetch")
        if transfer and done > seen:
            transfer.add(done - seen)
            seen = done

    return tick


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` against another fetch on this node; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ModuleNotFoundError:  # on Windows, where a deployer alone fetches a dataset for its check
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another fetch into %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _inside(name: str) -> str:
    """`name`, a path of a marker. Raises `SettingsError` when it would lead out of the folder."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise Damaged([f"{MARKER}: the file name {name!r} leads out of its folder"])
    return name


def _is(path: Path, entry: Entry, *, by_size: bool) -> bool:
    """Whether `path` is the file of `entry`."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    return by_size or _sha256(path) == entry.sha256


def _sha256(path: Path) -> str:
    """64 hex digits."""
    return file_digest(path).removeprefix("sha256:")
