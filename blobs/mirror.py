"""Copies a base model from the Hugging Face hub into Blob once, so that no pod depends on the hub."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from blobs import BlobError
from blobs.store import Address, BlobFolder, Entry, Marker, Transfer, shown, wait_for
from common.files import file_digest
from common.settings import SettingsError

log = logging.getLogger(__name__)

# What transformers and vLLM load, at the top of the repository. Not weights as pickles (*.bin, *.pth), nor the copies
# of the weights in other layouts (original/, consolidated*.safetensors, *.gguf).
WANTED = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
)  # fmt: skip
UNWANTED = ("consolidated*", "adapter_*")
REQUIRED = ("config.json", "tokenizer.json", "*.safetensors")


def mirror(model: str, revision: str, target: Address, *, wait_seconds: float = 0.0) -> bool:
    """Make `target` hold `model` (ORGANISATION/NAME) at `revision` (40 hex digits); False when it already did.

    One file at a time passes over the local disk (TMPDIR), which needs room for the largest alone; a mirror that was
    cut short goes on after the files that are there. `wait_seconds` is for a role that was just granted. Raises
    `SettingsError` for what only a person can mend, `BlobError` for what another attempt may heal.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise SettingsError(
            [f"revision {revision!r}: expected a full commit of 40 hex digits; a branch or tag may move under a run"]
        )
    origin = f"{model}@{revision}"
    folder = BlobFolder(target)
    found = wait_for(lambda: (folder.marker(),), wait_seconds, str(target))  # in a tuple: None is an answer here
    before = found[0] if found else None
    if before and before.origin == origin:
        log.info("%s: already holds %s, %d files, %s", target, origin, len(before.files), shown(before.size))
        return False
    if before:
        raise SettingsError(
            [f"{target}: already holds {before.origin or 'something else'}; give {origin} a folder of its own"]
        )
    files = _listed(model, revision)
    transfer = Transfer(f"mirror {origin}", sum(file.size or 0 for file in files))
    entries = {}
    for number, file in enumerate(files, 1):
        log.info("file %d of %d: %s, %s", number, len(files), file.rfilename, shown(file.size or 0))
        entries[file.rfilename] = _copy(model, revision, file, folder, transfer)
    folder.push_marker(Marker(files=entries, origin=origin))
    transfer.close()
    return True


def _listed(model: str, revision: str) -> list[RepoSibling]:
    """The files to copy, small ones first: a missing right or file shows before gigabytes are moved."""
    with _explained(model, revision):
        siblings = HfApi(endpoint=_endpoint()).model_info(model, revision=revision, files_metadata=True).siblings
    names = {file.rfilename: file for file in siblings or [] if _matches(file.rfilename, WANTED)}
    files = [file for name, file in names.items() if "/" not in name and not _matches(name, UNWANTED)]
    absent = [wanted for wanted in REQUIRED if not any(fnmatchcase(file.rfilename, wanted) for file in files)]
    if absent:
        raise SettingsError(
            [f"{model}@{revision} lacks {', '.join(absent)}; choose a revision or a copy of it in the form of "
             "transformers: safetensors weights and a tokenizer.json"]
        )  # fmt: skip
    return sorted(files, key=lambda file: (file.size or 0, file.rfilename))


def _copy(model: str, revision: str, file: RepoSibling, folder: BlobFolder, transfer: Transfer) -> Entry:
    """Bring one file from the hub to `folder`; what the hub keeps by its SHA-256 and is there is not moved again."""
    name, there = file.rfilename, folder.entry(file.rfilename)
    if file.lfs and there == Entry(size=file.lfs.size, sha256=file.lfs.sha256):
        transfer.add(there.size)
        return there
    with tempfile.TemporaryDirectory(prefix="mirror-") as scratch:
        with _explained(model, revision):
            path = Path(hf_hub_download(model, name, revision=revision, local_dir=scratch, endpoint=_endpoint()))
        entry = Entry(size=path.stat().st_size, sha256=file_digest(path).removeprefix("sha256:"))
        if file.lfs and entry.sha256 != file.lfs.sha256:
            raise BlobError(f"{model}@{revision}: {name}: the hub names SHA-256 {file.lfs.sha256}, got {entry.sha256}")
        folder.push_file(path, name, entry, transfer)
    return entry


@contextmanager
def _explained(model: str, revision: str) -> Iterator[None]:
    """Turn the hub's errors about `model` at `revision` into words, and into the class that says who acts."""
    page = f"{_endpoint() or 'https://huggingface.co'}/{model}"
    token = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "a request without a token (HF_TOKEN is not set)"
    try:
        yield
    except GatedRepoError:
        raise SettingsError(
            [f"{model} is gated, and the hub did not let {token} in: accept its licence at {page} and give a token of "
             "that account as HF_TOKEN"]
        ) from None  # fmt: skip
    except RevisionNotFoundError:
        raise SettingsError([f"{model} has no revision {revision}; its commits: {page}/commits/main"]) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise SettingsError([f"{model}: no such model, or a private one that {token} does not open: {page}"]) from None
    except (httpx2.HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise SettingsError(
                [f"{model}: the hub refused {token} ({error.response.status_code}); give one that may read it"]
            ) from None
        raise BlobError(f"{page}: {str(error).strip().splitlines()[0] if str(error) else repr(error)}") from error


def _endpoint() -> str | None:
    """The hub's address where it is not the public one; huggingface_hub reads this variable only when imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
