"""What the sidecar and the request layer of one replica share: a folder that both mount, nothing else.

token         secret that opens the adapter routes of the engine to the sidecar alone
boot          identity of the engine process; adapters loaded into an earlier process are gone
aliases.json  the sidecar's word to the request layer: which version answers for which name
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from common.files import write_atomic

TOKEN_HEADER = "x-drydock-sidecar"


class Served(BaseModel):
    """One adapter version that answers for an alias."""

    model_config = ConfigDict(frozen=True)

    version: str = Field(description="First 8 hex digits of the artifact's digest.")
    digest: str = Field(description="Digest of the artifact's manifest.")
    parity_difference: float = Field(description="Largest mean |log-probability difference| of a canary, in nats.")
    since: float = Field(description="Unix time at which it began to answer for the alias.")
    base: str | None = Field(None, description="The base it was tuned on: NAME@REVISION, or what of it is known.")
    metric: str | None = Field(None, description="What its evaluation measured, such as exact_match.")
    score: float | None = Field(None, description="Its score there, 0 to 1.")
    base_score: float | None = Field(None, description="The base's score on the same questions.")


class Aliases(BaseModel):
    """The whole of `aliases.json`."""

    model_config = ConfigDict(frozen=True)

    boot: str = Field(description="Engine process that these words are about.")
    ready: bool = Field(description="Every promoted adapter is loaded and proven, or refused for good.")
    aliases: dict[str, Served] = Field(default_factory=dict)
    refused: dict[str, str] = Field(default_factory=dict, description="Alias to the reason of its last refusal.")


def loaded_name(adapter: str, version: str) -> str:
    """The name under which vLLM holds a version: never reused, since vLLM keeps prefix caches by name."""
    return f"{adapter}.{version}"


def prepare(folder: Path) -> None:
    """Make the folder and its token where they do not exist; only this user may read the token."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "token").exists():
        handle, name = tempfile.mkstemp(dir=folder, prefix=".token.")  # mode 0600
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # engine and sidecar start together: the first whole token counts
            os.link(name, folder / "token")
        os.unlink(name)


def read_token(folder: Path) -> str:
    return (folder / "token").read_text()


def new_boot(folder: Path) -> str:
    """Called by each engine process as it starts: whatever the sidecar said before is about another process."""
    boot = secrets.token_hex(8)
    write_atomic(folder / "boot", boot)
    return boot


def read_boot(folder: Path) -> str | None:
    try:
        return (folder / "boot").read_text()
    except FileNotFoundError:
        return None


def write_aliases(folder: Path, aliases: Aliases) -> None:
    write_atomic(folder / "aliases.json", aliases.model_dump_json(indent=2))


def read_aliases(folder: Path) -> Aliases | None:
    """The sidecar's last word, None before the first."""
    try:
        return Aliases.model_validate_json((folder / "aliases.json").read_bytes())
    except FileNotFoundError:
        return None


class AliasReader:
    """Reads `aliases.json` again when it changed: one `stat` a request."""

    def __init__(self, folder: Path, boot: str) -> None:
        self._path, self._boot = folder / "aliases.json", boot
        self._seen: Any = None
        self._current = Aliases(boot=boot, ready=False)

    def current(self) -> Aliases:
        """What holds now; nothing is ready and no alias known until the sidecar spoke about this very process."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return Aliases(boot=self._boot, ready=False)
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp != self._seen:
            read = Aliases.model_validate_json(self._path.read_bytes())
            self._current = read if read.boot == self._boot else Aliases(boot=self._boot, ready=False)
            self._seen = stamp
        return self._current
