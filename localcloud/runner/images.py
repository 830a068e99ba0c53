"""What the runner needs of container images: a root file system and the image's own settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class ImageMissing(RuntimeError):
    """The image cannot be had; the text is what the registry said, shown as the message of ErrImagePull."""


@dataclass(frozen=True)
class Image:
    """An image that is here: `rootfs` is never written to, the rest is its OCI configuration."""

    rootfs: Path
    id: str = ""
    """As `kubectl` shows it: imageID, usually NAME@sha256:DIGEST."""
    user: str = ""
    """`UID`, `UID:GID`, or names that the image's /etc/passwd and /etc/group know; empty: root."""
    env: tuple[str, ...] = ()
    """`NAME=VALUE` each."""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""
    """A name such as SIGINT, or a number; empty: SIGTERM."""


class Images(Protocol):
    """Where images come from."""

    def ensure(self, reference: str) -> Image:
        """The image of that name, fetched if need be; may take minutes, is called from several threads.

        Raises `ImageMissing` with the registry's own words.
        """
        ...
