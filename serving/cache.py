"""Adapter versions on a replica's own disk and which of them it last served: enough to start without a registry."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from artifacts.adapter import fetch_adapter, version
from artifacts.store import Store
from common.files import tree_digest, write_atomic
from serving.state import loaded_name

log = logging.getLogger(__name__)


class Kept(BaseModel):
    """The whole of `kept.json`."""

    served: dict[str, str | None] = Field(
        default_factory=dict, description="Adapter to the digest it served last; null: it is known to have none."
    )
    contents: dict[str, str] = Field(
        default_factory=dict, description="Folder to the digest of its files (common.files.tree_digest) once fetched."
    )


class Cache:
    """The folder of one replica's sidecar; no other process writes there."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "kept.json"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._kept = Kept.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            self._kept = Kept()
        except ValidationError as error:
            log.warning("%s cannot be read, so nothing counts as kept: %s", self._path, error)
            self._kept = Kept()

    @property
    def served(self) -> Mapping[str, str | None]:
        """Adapter to the digest of the version it served when the registry last answered, None: it had none."""
        return self._kept.served

    def remember(self, adapter: str, digest: str | None) -> None:
        """Note what `adapter` serves, for a start without a registry."""
        if adapter not in self._kept.served or self._kept.served[adapter] != digest:
            self._kept.served[adapter] = digest
            self._write()

    def fetch(self, store: Store, adapter: str, digest: str) -> Path:
        """The folder with the version's files: the one kept here if not a byte of it changed, else fetched.

        Raises what `artifacts.adapter.fetch_adapter` raises.
        """
        name = loaded_name(adapter, version(digest))
        folder = self._folder / name
        if folder.is_dir():
            if tree_digest(folder) == self._kept.contents.get(name):
                return folder
            log.warning("%s: the files kept on this disk are not those that were fetched: fetching them again", name)
            shutil.rmtree(folder)
        fetch_adapter(store, adapter, digest, folder)
        self._kept.contents[name] = tree_digest(folder)
        self._write()
        return folder

    def drop(self, name: str) -> None:
        """Free the disk of a version, unless a start without a registry would need it. A rollback fetches it again."""
        if name not in self._needed():
            shutil.rmtree(self._folder / name, ignore_errors=True)
            if self._kept.contents.pop(name, None):
                self._write()

    def prune(self, also: Collection[str]) -> None:
        """Free the disk of everything but what a start would need and the versions `also`: leftovers of a crash."""
        for path in self._folder.iterdir():
            if path.is_dir() and path.name not in also:
                self.drop(path.name)

    def _needed(self) -> set[str]:
        return {loaded_name(adapter, version(digest)) for adapter, digest in self._kept.served.items() if digest}

    def _write(self) -> None:
        write_atomic(self._path, self._kept.model_dump_json(indent=2))
