"""What this machine already has: a Go that can build the tools, and released programs that serve as well."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from localcloud.tools.modules import ETCD, KUBERNETES, KUBERNETES_PROVIDER, KWOK, MODULES, PULUMI, Module, sdk_version

Version = tuple[int, ...]


@dataclass(frozen=True)
class Released:
    """A released program that serves as well as one built here."""

    path: Path
    version: str


def needed_go() -> str:
    """The oldest Go that builds every module."""
    return max((module.go for module in MODULES), key=version_in)


def go_problem() -> str:
    """Why Go cannot build here, or nothing. An old Go that fetches newer ones by itself is no problem."""
    go = shutil.which("go")
    if go is None:
        return "Go is not on the PATH"
    # Outside of any module: inside one, an old Go would fetch the newer one at once.
    said = subprocess.run([go, "env", "GOVERSION", "GOTOOLCHAIN"], capture_output=True, text=True, cwd="/")
    own, _, choice = said.stdout.strip().partition("\n")
    found = version_in(own)
    if said.returncode or not found:
        return f"{go} does not work ({(said.stderr or said.stdout).strip() or 'it says nothing'})"
    if found >= version_in(needed_go()) or re.search(r"auto|path", choice):
        return ""
    return f"Go {own.removeprefix('go')} is too old"


def released(module: Module, name: str) -> Released | None:
    """The program `name` of `module` where this machine has a released one of a suitable version."""
    if module is KUBERNETES_PROVIDER:  # it cannot tell its version, but the folder of an installed plugin does
        home = Path(os.environ.get("PULUMI_HOME") or Path.home() / ".pulumi")
        plugin = home / "plugins" / f"resource-kubernetes-v{sdk_version()}" / name
        return Released(plugin, sdk_version()) if plugin.is_file() and os.access(plugin, os.X_OK) else None
    path = shutil.which(name)
    if path is None:
        return None
    try:
        said = subprocess.run(
            [path, "version" if module is PULUMI else "--version"],
            capture_output=True, text=True, timeout=30,
            env=os.environ | {"PULUMI_SKIP_UPDATE_CHECK": "true"},  # asking must not go to the network
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = version_in(said.stdout)
    if said.returncode or not _SUITABLE[module.name](found, version_in(module.version)):
        return None
    return Released(Path(path).absolute(), ".".join(map(str, found)))


def wanted() -> list[str]:
    """The released programs that would be taken where they are on the PATH, in words."""
    return [
        f"pulumi {_minor(PULUMI)} or newer",
        f"etcd {'.'.join(map(str, OLDEST_ETCD))} or newer",
        f"{', '.join(KUBERNETES.binaries)} {_minor(KUBERNETES)}",
        f"kwok {_minor(KWOK)} (all on the PATH)",
        f"and what `pulumi plugin install resource kubernetes {sdk_version()}` brings",
    ]


def version_in(text: str) -> Version:
    """The first version in `text` as numbers, such as (1, 37, 2); empty where there is none."""
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def _minor(module: Module) -> str:
    return ".".join(module.version.split(".")[:2])


def _same_minor(found: Version, locked: Version) -> bool:
    return found[:2] == locked[:2]


OLDEST_ETCD = (3, 6)  # kubeadm of Kubernetes 1.37 asks for 3.5.24
_SUITABLE: dict[str, Callable[[Version, Version], bool]] = {
    PULUMI.name: lambda found, locked: found[:1] == locked[:1] and found >= locked[:2],
    ETCD.name: lambda found, locked: found[:1] == locked[:1] and found >= OLDEST_ETCD,
    KUBERNETES.name: _same_minor,  # its programs work with those of their own minor version
    KWOK.name: _same_minor,  # its Stage files are of one
}
