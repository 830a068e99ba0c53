"""Builds a registry's images for real: buildah on the Dockerfile that Azure would get, pushed to a registry here."""

from __future__ import annotations

import configparser
import io
import os
import re
import tarfile
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from localcloud.images import Store

# An argument that names an image in the registry's cache of public ones, which nothing here can fill.
_CACHED = re.compile(r"[^/]+/cache/.+")
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"  # where Debian's ca-certificates puts its own, in base images too
# Of pip's settings, those by which it finds an index; others may not suit an image's build.
_PIP_SETTINGS = (
    "cert", "default-timeout", "extra-index-url", "find-links", "index-url", "no-index", "proxy", "retries", "timeout",
    "trusted-host",
)  # fmt: skip
_PIP_FILES = ("/etc/xdg/pip/pip.conf", "/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")


class BuildFailed(Exception):
    """A build that its context or its Dockerfile ended, in the words of Azure's builder."""


class Builder:
    """Builds one image after another into `store`, and pushes each to `registry`.

    `registry`: `127.0.0.1:PORT`. `base`: makes the image that stands in for every image of the registry's cache, once,
    and returns its name in the store (`localcloud.base.python_image`). `replace`: by Dockerfile, build arguments that
    are other ones here; a `Path` is a file that is put into the context, and the argument names it there.
    A store has one builder at a time: what an earlier one left that was killed is removed.
    """

    def __init__(
        self,
        store: Store,
        registry: str,
        base: Callable[[Store, Path], str],
        replace: Mapping[str, Mapping[str, str | Path]] | None = None,
    ) -> None:
        self._store, self._registry, self._base, self._replace = store, registry, base, dict(replace or {})
        # Builds share two or three cores and a disk, and the layers that an earlier one made.
        self._one = threading.Lock()
        store.tidy()

    def build(
        self, context: bytes, dockerfile: str, arguments: Mapping[str, str], images: Sequence[str], log: Path
    ) -> str:
        """Build `context`, a tar.gz, and push it as `images` (`REPOSITORY:TAG`); returns its manifest's digest.

        All that is said is added to `log` as it is said. Layers of earlier builds are used again. Raises `BuildFailed`,
        and `SettingsError` where this machine lacks something.
        """
        with self._one, tempfile.TemporaryDirectory(dir=self._store.folder / "tmp") as folder:
            room = Path(folder) / "context"
            _unpack(context, room)
            if not (room / dockerfile).is_file():
                raise BuildFailed(
                    "unable to prepare context: unable to evaluate symlinks in Dockerfile path: "
                    f"{dockerfile}: no such file"
                )
            given = self._arguments(room, dockerfile, arguments, log)
            name = f"localhost/{images[0]}"
            self._run(
                log,
                "bud", "--layers", "--force-rm", "--pull-never", "--network", "host",
                "--tag", name, "--file", room / dockerfile,
                *(word for key, value in sorted(given.items()) for word in ("--build-arg", f"{key}={value}")),
                *(word for volume in _machine(Path(folder)) for word in ("--volume", volume)),
                room,
            )  # fmt: skip
            digest = Path(folder) / "digest"
            for image in images:
                # As fast as it compresses: gzip takes twice as long, its default level longer than pip.
                self._run(
                    log,
                    "push", "--quiet", "--compression-format", "zstd", "--compression-level", "1",
                    "--tls-verify=false", "--digestfile", digest, name, f"docker://{self._registry}/{image}",
                )  # fmt: skip
            return digest.read_text().strip()

    def _arguments(self, room: Path, dockerfile: str, arguments: Mapping[str, str], log: Path) -> dict[str, str]:
        given = dict(arguments)
        for key, value in given.items():
            if _CACHED.fullmatch(value):
                given[key] = self._base(self._store, log)
        for key, other in self._replace.get(dockerfile, {}).items():
            if isinstance(other, Path):
                _put(room / ".replaced" / other.name, other.read_bytes(), 0o644)
                other = f".replaced/{other.name}"
            given[key] = other
        return given

    def _run(self, log: Path, command: str, *arguments: str | Path) -> None:
        code = self._store.run(command, *arguments, log=log)
        if code:
            raise BuildFailed(f"failed to run step ID: {'push' if command == 'push' else 'build'}: exit status {code}")


def _unpack(context: bytes, room: Path) -> None:
    """The files of `context`, without owners, links or times. Raises `BuildFailed`."""
    room.mkdir()
    try:
        with tarfile.open(fileobj=io.BytesIO(context), mode="r:gz") as archive:
            for entry in archive:
                path = PurePosixPath(entry.name)
                if path.is_absolute() or ".." in path.parts:
                    raise BuildFailed(f"failed to download context: {entry.name} leads out of it")
                if entry.isdir():
                    continue  # its files make it
                if not entry.isfile() or (data := archive.extractfile(entry)) is None:
                    raise BuildFailed(f"failed to download context: {entry.name} is neither file nor folder")
                _put(room / path, data.read(), entry.mode & 0o777)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BuildFailed(f"failed to download context: {error}") from None


def _put(file: Path, data: bytes, mode: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    file.chmod(mode)
    os.utime(file, (0, 0))  # the layer that it goes into is found again by its times too


def _machine(folder: Path) -> list[str]:
    """Volumes (SOURCE:TARGET:ro) by which pip reaches the index that this machine uses; no layer holds them.

    Proxies need none: buildah gives their variables to the steps, not to the image.
    """
    settings = _pip_settings(os.environ, [Path(file).expanduser() for file in _PIP_FILES])
    found = []
    ours = next((os.environ[name] for name in ("PIP_CERT", "SSL_CERT_FILE") if os.environ.get(name)), _CERTIFICATES)
    certificates = Path(settings.get("cert") or ours)
    if certificates.is_file():
        found.append(f"{certificates.resolve()}:{_CERTIFICATES}:ro")
        settings["cert"] = _CERTIFICATES
    wheels = settings.pop("find-links", "")
    if wheels.startswith("/") and Path(wheels).is_dir():
        found.append(f"{Path(wheels).resolve()}:/mnt:ro")
        settings["find-links"] = "/mnt"
    parser = configparser.RawConfigParser()
    parser["global"] = settings
    file = folder / "pip.conf"
    file.touch(mode=0o600)  # an index's address may hold a password
    with file.open("w") as output:
        parser.write(output)
    return [*found, f"{file}:/etc/pip.conf:ro"]


def _pip_settings(environment: Mapping[str, str], files: Sequence[Path]) -> dict[str, str]:
    """pip's own settings of this machine, as `[global]` has them: of its files, then of PIP_* (pip.pypa.io)."""
    found: dict[str, str] = {}
    named = [Path(environment["PIP_CONFIG_FILE"])] if environment.get("PIP_CONFIG_FILE") else []
    for file in (*files, *named):
        parser = configparser.RawConfigParser()
        parser.read(file)
        for section in ("global", "install"):
            if parser.has_section(section):
                found |= {key.replace("_", "-"): value for key, value in parser.items(section)}
    for key, value in environment.items():
        if key.startswith("PIP_") and key != "PIP_CONFIG_FILE":
            found[key.removeprefix("PIP_").lower().replace("_", "-")] = value
    return {key: value for key, value in found.items() if key in _PIP_SETTINGS}
