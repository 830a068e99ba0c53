"""A dataset from elsewhere, https:// or az://, becomes a local file: of its full size, and of the digest asked for.

Not through fsspec, though it and adlfs are alive (2026.8, BSD-3): adlfs, aiohttp and seven more packages would come
into the training image and onto the deployer's machine, with a sign-in to Azure and a form of addresses beside those of
blobs.store, and with neither digests nor downloads that go on after a cut. blobs.store and `requests` are there.

A query may be a signature (a SAS token), so no message and no written settings show it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import ssl
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests

from blobs import BlobError
from common.files import file_digest
from common.hosts import causes, is_loopback, retry_after
from common.settings import SettingsError

log = logging.getLogger(__name__)

MAX_BYTES = 10 * 2**30  # more than two billion tokens of text: beyond, the address is a mistake
PIECE_BYTES = 2**20
ATTEMPTS = 4  # of one download, after 1, 2 and 4 s; it goes on where it was cut if the server can
CONNECT_SECONDS, READ_SECONDS = 10, 30  # the second is between two pieces
RETRY_AFTER_SECONDS = 30.0  # the longest wish of a server that is heeded
REDIRECTS = 5


def is_elsewhere(dataset: str) -> bool:
    """Whether `dataset` is an address and not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", dataset) is not None


def public(dataset: str) -> str:
    """`dataset` as it may be told: an address without user, password, query and fragment."""
    if not is_elsewhere(dataset):
        return dataset
    scheme, _, rest = re.split(r"[?#]", dataset, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def local(dataset: str, sha256: str | None = None, *, root: Path = Path()) -> Path:
    """The local file of `dataset`: a path (below `root`), https://..., or az://ACCOUNT/CONTAINER/PATH.

    What is fetched is kept below `cache_folder()` and fetched again only when its ETag, or a blob's digest, changed.
    `sha256`, hex, must be the file's. A local path need not exist. Raises `SettingsError` for what a person can mend,
    `BlobError` for what may pass.
    """
    wanted = (sha256 or "").removeprefix("sha256:").lower()
    if not is_elsewhere(dataset):
        path = root / dataset
    else:
        from blobs.store import alone  # the SDK takes most of a second to import

        if problem := _refusal(dataset):
            raise SettingsError([f"{public(dataset)}: {problem}"])
        fetch = _from_blob if dataset.lower().startswith("az:") else _download
        folder = cache_folder() / "datasets" / hashlib.sha256(dataset.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            kept = [each for each in folder.glob("*.jsonl") if wanted and _hex(each) == wanted]
            path = kept[0] if kept else fetch(dataset, folder)
    if wanted and path.is_file() and (found := _hex(path)) != wanted:
        raise SettingsError(
            [f"{public(dataset)}: dataset_sha256 is {wanted}, but the file's SHA-256 is {found}: another file, or a "
             "changed one; correct one of the two"]
        )  # fmt: skip
    return path


def cache_folder() -> Path:
    """`DRYDOCK_CACHE` (the one folder of a pod that may be written to), or this person's own cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DRYDOCK_CACHE") or Path(home) / "drydock")


def _hex(path: Path) -> str:
    return file_digest(path).removeprefix("sha256:")


def _refusal(address: str) -> str | None:
    """Why nothing is fetched from `address`."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return "is no address"
    scheme = parts.scheme.lower()
    if "@" in parts.netloc:
        return "holds a user or a password, which would be written into settings and logs: remove it"
    if scheme == "az":
        signed = "?" in address or "#" in address
        return "az:// takes no query: it signs in by Entra identity; remove it" if signed else None
    if scheme == "https" and host:
        return None
    if scheme == "http":
        return None if is_loopback(host) else "anyone on the way could read and change it: give an https:// address"
    return "expected a local path, https://HOST/PATH or az://ACCOUNT/CONTAINER/PATH"


# Blob


def _from_blob(dataset: str, folder: Path) -> Path:
    from blobs.store import Address, BlobFolder, shown

    address, name = Address.parse(dataset).split()
    place = BlobFolder(address)
    found = place.entry(name)
    if found is None:
        raise SettingsError([f"{dataset}: no such blob: look at the address"])
    if found.size > MAX_BYTES:
        raise SettingsError([_too_large(dataset, found.size)])
    if found.size > (free := shutil.disk_usage(folder).free):
        raise SettingsError([_no_room(dataset, folder, found.size, free)])
    log.info("%s: %s", dataset, shown(found.size))
    target = folder / "blob.jsonl"
    place.fetch_file(name, target)
    return target


def _too_large(dataset: str, size: int) -> str:
    return (
        f"{public(dataset)}: {size:,} bytes, more than the {MAX_BYTES:,} that a dataset may have: look at the "
        "address, or tune on a sample"
    )


def _no_room(dataset: str, folder: Path, size: int, free: int) -> str:
    return (
        f"{public(dataset)}: {size:,} bytes, but {free:,} free for {folder}: make room, or name another folder in "
        "DRYDOCK_CACHE"
    )


# HTTPS


class _Passing(Exception):
    """A trouble that another attempt may not meet; `seconds` is the server's own wish."""

    def __init__(self, text: str, seconds: float = 0.0) -> None:
        super().__init__(text)
        self.seconds = seconds


def _download(url: str, folder: Path) -> Path:
    """The file that `url` answers, below `folder`; the one that is there when its ETag is the same."""
    part, trouble = folder / ".part", _Passing("")
    part.unlink(missing_ok=True)
    tags: list[str] = [""]  # the ETag of what `part` holds
    for attempt in range(ATTEMPTS):
        if attempt:
            log.warning("%s: %s; trying again", public(url), trouble)
            time.sleep(min(RETRY_AFTER_SECONDS, max(2.0 ** (attempt - 1), trouble.seconds)))
        try:
            return _attempt(url, folder, part, tags)
        except _Passing as error:
            trouble = error
    part.unlink(missing_ok=True)
    raise BlobError(
        f"{public(url)}: {trouble}, at {ATTEMPTS} attempts: look at the address and the network, or run again"
    )


def _attempt(url: str, folder: Path, part: Path, tags: list[str]) -> Path:
    from blobs.store import Transfer, shown

    done = part.stat().st_size if part.is_file() and re.fullmatch(r'"[^"]*"', tags[0]) else 0
    # Compressed on the way, it would have another size than the server tells.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-", "If-Range": tags[0]} if done else {})
    with closing(_answer(url, headers)) as answer:
        if answer.status_code == 416 or (
            answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        ):
            part.unlink()
            raise _Passing("the server cannot go on where it was cut")
        if answer.status_code == 200:
            done = 0
        tags[0] = etag = answer.headers.get("ETag", "")
        target = folder / f"{hashlib.sha256(etag.encode()).hexdigest()[:16] if etag else 'latest'}.jsonl"
        length = answer.headers.get("Content-Length", "")
        size = done + int(length) if length.isdecimal() else 0
        if etag and target.is_file() and target.stat().st_size == size:
            log.info("%s: unchanged, %s", public(url), shown(size))
            return target
        if size > MAX_BYTES:
            raise SettingsError([_too_large(url, size)])
        if size - done > (free := shutil.disk_usage(folder).free):
            raise SettingsError([_no_room(url, folder, size - done, free)])
        log.info("%s: %s", public(url), shown(size) if size else "of a size that the server does not tell")
        transfer = Transfer(f"fetch {public(url)}", size)
        with part.open("ab" if done else "wb") as file:
            try:
                for piece in answer.iter_content(PIECE_BYTES):
                    file.write(piece)
                    done += len(piece)
                    transfer.add(len(piece))
                    if done > MAX_BYTES:
                        raise SettingsError([_too_large(url, done)])
            except requests.RequestException:
                raise _Passing(f"cut after {done:,} bytes{f' of {size:,}' if size else ''}") from None
            file.flush()
            os.fsync(file.fileno())
        transfer.close()
    if size and done != size:
        raise _Passing(f"{done:,} bytes came of {size:,}")
    for old in folder.glob("*.jsonl"):
        old.unlink()
    os.replace(part, target)
    return target


def _answer(url: str, headers: dict[str, str]) -> requests.Response:
    """The server's answer with the file, after redirects; its body is not read yet."""
    place = url
    for _ in range(REDIRECTS + 1):
        answer = _send(place, headers)
        if answer.is_redirect:
            answer.close()
            place = urljoin(place, answer.headers["Location"])
            refusal = _refusal(place) if urlsplit(place).scheme.lower() == "https" else "only https:// is followed"
            if refusal:
                raise SettingsError([f"{public(url)}: leads to {public(place)}: {refusal}"])
            continue
        if answer.status_code in (200, 206, 416):
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                problem = "a web page, and not a file: give the address of the file itself (raw, download)"
            elif answer.headers.get("Content-Encoding", "identity") != "identity":
                problem = "a compressed answer, though it was asked for none: give another address"
            else:
                return answer
        else:
            problem = _status(answer)
        answer.close()
        raise SettingsError([f"{public(place)}: {problem}"])
    raise SettingsError([f"{public(url)}: more than {REDIRECTS} redirects: give the address of the file itself"])


def _status(answer: requests.Response) -> str:
    """What a person must mend. Raises `_Passing` where another attempt may do."""
    status = answer.status_code
    told = f"{status} {answer.reason or ''}".strip()
    if status in (408, 425, 429) or status >= 500:
        answer.close()
        raise _Passing(told, retry_after(answer.headers))
    if status in (404, 410):
        return f"no such file ({told}): look at the address"
    if status in (401, 403):
        return (
            f"refused ({told}): it is not public, or its signature has ended; give a blob as "
            "az://ACCOUNT/CONTAINER/PATH with the role Storage Blob Data Reader, or a new SAS token in the address"
        )
    return f"{told}: expected the file itself: look at the address"


def _send(url: str, headers: dict[str, str]) -> requests.Response:
    """One GET without following redirects. No text of the library is told: it holds the whole address."""
    host = urlsplit(url).hostname or ""
    session = requests.Session()
    session.trust_env = not is_loopback(host)  # a proxy cannot reach this machine's own loopback
    session.auth = lambda request: request  # or requests would take a password from ~/.netrc
    authorities = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True
    timeout = (CONNECT_SECONDS, READ_SECONDS)
    try:
        return session.get(
            url, headers=headers, stream=True, timeout=timeout, allow_redirects=False, verify=authorities
        )
    except requests.Timeout as error:
        seconds = CONNECT_SECONDS if isinstance(error, requests.ConnectTimeout) else READ_SECONDS
        raise _Passing(f"{host} does not answer within {seconds} s") from None
    except requests.ConnectionError as error:
        reason = next((each for each in causes(error) if isinstance(each, OSError) and each.strerror), None)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise SettingsError(
                [f"{public(url)}: no trusted TLS connection: {reason.verify_message}; the certificates of an own "
                 "authority are named by REQUESTS_CA_BUNDLE or SSL_CERT_FILE"]
            ) from None  # fmt: skip
        through = "the proxy of HTTPS_PROXY" if isinstance(error, requests.exceptions.ProxyError) else host
        raise _Passing(f"no connection to {through} ({reason.strerror if reason else 'closed'})") from None
    except requests.RequestException as error:
        raise SettingsError(
            [f"{public(url)}: cannot be asked for ({type(error).__name__}): look at the address"]
        ) from None
    except OSError:
        raise SettingsError(
            [f"{authorities}: no certificates there: correct REQUESTS_CA_BUNDLE or SSL_CERT_FILE"]
        ) from None
