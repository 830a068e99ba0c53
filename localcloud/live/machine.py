"""What a machine must have for a local cloud whose pods run: said all at once, before anything is started."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import psutil

from common.settings import SettingsError
from localcloud import azurite
from localcloud.live.places import sockets
from localcloud.tools import ToolsMissing, locate

# Debian's packages by the program that is looked for.
PROGRAMS = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "docker-registry": "docker-registry",
    "dumb-init": "dumb-init",
    "ip": "iproute2",
    "nft": "nftables",
    "unshare": "util-linux",
    "git": "git",
}
MEMORY_GIB = 12  # see docs/testing.md for what was measured
SOCKET_LENGTH = 107  # unix(7)
FIRST_GIB, LATER_GIB = 26, 8  # disk: with four images to build, their layers and copies; without


def check(folder: Path, images: Path) -> None:
    """Raise `SettingsError` with everything that this machine lacks."""
    lines = [] if os.geteuid() == 0 else ["root is needed: namespaces, mounts and nftables are made"]
    absent = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if absent:
        lines.append(f"not installed: apt-get install {' '.join(absent)}")
    if "overlay" not in Path("/proc/filesystems").read_text():
        lines.append("the kernel offers no overlayfs: modprobe overlay")
    memory = psutil.virtual_memory().total / 2**30
    if memory < MEMORY_GIB:
        lines.append(f"{memory:.0f} GiB of memory: {MEMORY_GIB} are needed")
    lines += disk_problems(images)
    if (length := max(len(str(path)) for path in sockets(folder).values())) > SOCKET_LENGTH:
        lines.append(f"{folder}: {length - SOCKET_LENGTH} characters too long for Unix sockets in it: give --out PATH")
    for needed in (locate, azurite.check):
        try:
            needed()
        except (ToolsMissing, SettingsError) as error:
            lines += error.problems
    if lines:
        raise SettingsError(lines)


def disk_gib(images: Path) -> int:
    """The most GiB that a run will write below the folder of `images`."""
    return LATER_GIB if are_built(images) else FIRST_GIB


def are_built(images: Path) -> bool:
    """Whether an earlier run has built each of the stack's images into the folder of `images`, of any code."""
    from infra.images import IMAGES  # with all of Pulumi's SDK

    try:
        kept = json.loads((images / "store" / "overlay-images" / "images.json").read_text())
    except (OSError, ValueError):  # none, or one that was being written
        return False
    names = {name.partition(":")[0] for image in kept for name in image.get("names") or ()}
    return names >= {f"localhost/drydock/{name}" for name in IMAGES}


def disk_problems(images: Path) -> list[str]:
    place = next(path for path in (images, *images.parents) if path.exists())
    free, wanted = shutil.disk_usage(place).free / 2**30, disk_gib(images)
    if free >= wanted:
        return []
    return [f"{images}: {free:.1f} GiB of disk are free, {wanted} may be needed: make room, or give --images PATH"]
