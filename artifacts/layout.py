"""The folder store: each repository is an OCI image-layout folder, safe for several processes at once.

A repository such as `adapters/kubectl` holds `oci-layout`, `index.json` (its tags) and `blobs/sha256/`. A
writer of the index holds a lock file and replaces the index in one step; readers need no lock.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from artifacts.store import MANIFEST_TYPE, CorruptBlob, NotFound, Store, canonical_json
from common.files import file_digest, read_json, write_atomic

REF_NAME = "org.opencontainers.image.ref.name"


class LayoutStore(Store):
    """Repositories as OCI image-layout folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def tags(self, repository: str) -> dict[str, str]:
        named = ((_name(entry), entry["digest"]) for entry in self._index(repository))
        return {name: digest for name, digest in named if name is not None}

    def repositories(self) -> list[str]:
        if not self.root.is_dir():
            raise NotFound(f"{self.root}: no such folder; nothing was published there yet")
        found = []
        for folder, folders, files in os.walk(self.root):
            if "oci-layout" in files:
                found.append(Path(folder).relative_to(self.root).as_posix())
                folders.clear()  # a layout holds blobs, no further repositories
        return sorted(found)

    def _find(self, repository: str, reference: str) -> str | None:
        digests = {entry["digest"] for entry in self._index(repository)}
        return reference if reference in digests else self.tags(repository).get(reference)

    def _put_blob(self, repository: str, descriptor: Mapping[str, Any], file: BinaryIO) -> None:
        path = self._blob(repository, descriptor["digest"])
        if path.exists() and file_digest(path) == descriptor["digest"]:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "wb") as copy:
                shutil.copyfileobj(file, copy, 2**20)
                copy.flush()
                os.fsync(copy.fileno())
            if (found := file_digest(Path(name))) != descriptor["digest"]:
                raise CorruptBlob(f"a file changed while it was copied: expected {descriptor['digest']}, found {found}")
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)

    def _get_blob(self, repository: str, digest: str, size: int, file: BinaryIO) -> None:
        try:
            with self._blob(repository, digest).open("rb") as blob:
                while left := size + 1 - file.tell():
                    piece = blob.read(min(left, 2**20))
                    if not piece:
                        break
                    file.write(piece)
        except FileNotFoundError:
            raise CorruptBlob(f"{self.url}: {repository}: blob {digest} is absent") from None

    def _put_manifest(self, repository: str, digest: str, data: bytes) -> None:
        write_atomic(self._blob(repository, digest), data)
        with self._locked_index(repository) as entries:
            if all(entry["digest"] != digest for entry in entries):
                entries.append({"mediaType": MANIFEST_TYPE, "digest": digest, "size": len(data)})

    def _get_manifest(self, repository: str, digest: str) -> bytes:
        try:
            return self._blob(repository, digest).read_bytes()
        except FileNotFoundError:
            raise CorruptBlob(f"{self.url}: {repository}: blob {digest} is absent") from None

    def _set_tag(self, repository: str, digest: str, tag: str) -> None:
        with self._locked_index(repository) as entries:
            same = [entry for entry in entries if entry["digest"] == digest]
            if not same:
                raise NotFound(f"{self.url}: {repository}: {digest} was removed meanwhile")
            for entry in entries:  # what bore the tag stays listed, so that its digest still resolves
                if _name(entry) == tag:
                    entry["annotations"].pop(REF_NAME)
            unnamed = next((entry for entry in same if _name(entry) is None), None)
            if unnamed is None:
                unnamed = {key: same[0][key] for key in ("mediaType", "digest", "size")}
                entries.append(unnamed)
            unnamed["annotations"] = (unnamed.get("annotations") or {}) | {REF_NAME: tag}
            named = {entry["digest"] for entry in entries if _name(entry) is not None}
            entries[:] = [entry for entry in entries if _name(entry) is not None or entry["digest"] not in named]

    def _folder(self, repository: str) -> Path:
        return self.root / repository

    def _blob(self, repository: str, digest: str) -> Path:
        return self._folder(repository) / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def _index(self, repository: str) -> list[dict[str, Any]]:
        """The entries of `index.json`; none when nothing was pushed yet."""
        path = self._folder(repository) / "index.json"
        try:
            manifests: list[dict[str, Any]] = read_json(path)["manifests"]
            if not all(isinstance(entry["digest"], str) for entry in manifests):
                raise TypeError
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError):
            raise CorruptBlob(f"{path}: no index of an OCI layout") from None
        return manifests

    @contextmanager
    def _locked_index(self, repository: str) -> Iterator[list[dict[str, Any]]]:
        """The index entries, for this process alone to change; written back when the block ends well."""
        folder = self._folder(repository)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".index.lock").open("w") as lock:
            import fcntl  # absent on Windows, where such a folder can be read alone

            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when a process dies
            entries = self._index(repository)
            yield entries
            if not (folder / "oci-layout").exists():
                write_atomic(folder / "oci-layout", canonical_json({"imageLayoutVersion": "1.0.0"}))
            index = {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "manifests": entries,
            }
            write_atomic(folder / "index.json", canonical_json(index))


def _name(entry: Mapping[str, Any]) -> str | None:
    name: str | None = (entry.get("annotations") or {}).get(REF_NAME)
    return name
