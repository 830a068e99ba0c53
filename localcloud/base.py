"""The Python base image of the local cloud, made of this machine's own Debian packages: no public registry is asked."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from common.processes import die_with_parent
from common.settings import SettingsError
from localcloud.images import Store

# What python:3.12-slim-bookworm gives the Dockerfiles: venv, and Python's headers, for what compiles at run time.
PACKAGES = ("ca-certificates", "libpython3-dev", "python3", "python3-venv")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def python_image(store: Store, log: Path) -> str:
    """The name of the base image in `store`; it is made where the store lacks it, in about a minute.

    The name holds a digest of the recipe: another release of Debian or other packages make another image.
    Raises `SettingsError` where debootstrap or a Debian package source is missing, or debootstrap fails.
    """
    suite, mirror = _source()
    recipe = {"suite": suite, "packages": PACKAGES, "path": PATH, "version": 1}
    name = f"localhost/drydock-python:{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}"
    if store.has(name):
        return name
    with tempfile.TemporaryDirectory(dir=store.folder / "tmp") as folder:
        root, archive = Path(folder) / "root", Path(folder) / "root.tar"
        with log.open("ab") as output:
            done = subprocess.run(
                # It mounts /proc and /sys below its root: killed, it must not leave them to whoever tidies up.
                ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}",
                 suite, str(root), mirror],
                stdout=output,
                stderr=output,
                check=False,
                preexec_fn=die_with_parent,
            )  # fmt: skip
        if done.returncode:
            said = "\n".join(log.read_text().splitlines()[-5:])
            raise SettingsError([f"debootstrap {suite}: exit status {done.returncode}: {said}"])
        _clean(root)
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.add(root, ".")
        container = store.ask("from", "scratch")
        try:
            store.ask("add", "--quiet", container, archive, "/")
            store.ask("config", "--env", f"PATH={PATH}", "--cmd", "python3", container)
            store.ask("commit", "--quiet", container, name)
        finally:
            store.ask("rm", container)
    return name


def _source() -> tuple[str, str]:
    """(release, address) of the Debian that this machine's apt knows."""
    tools = [tool for tool in ("debootstrap", "apt-get") if not shutil.which(tool)]
    if tools:
        raise SettingsError(
            [f"{tool}: not on PATH: the base image needs Debian and its package {tool}" for tool in tools]
        )
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(CODENAME) $(SITE)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    for line in listed.splitlines():
        origin, component, suite, *site = line.split()
        # Not the release's own updates, which debootstrap cannot start from.
        if origin == "Debian" and component == "main" and "-" not in suite and site:
            return suite, site[0]
    raise SettingsError(["apt: knows no source of Debian's component main: run apt-get update"])


def _clean(root: Path) -> None:
    """Take out what is of this machine, and what no image needs."""
    for name in ("etc/hostname", "etc/resolv.conf", "etc/pip.conf"):
        # Empty: the builder and the pod runner mount their own over it.
        (root / name).write_bytes(b"")
        (root / name).chmod(0o644)
    for pattern in ("var/cache/apt/archives/*.deb", "var/lib/apt/lists/*_*", "var/log/*.log"):
        for file in root.glob(pattern):
            file.unlink()
