"""Real images in a store of buildah's, in a folder of its own, and the root file systems that pods get of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import requests

from common.processes import die_with_parent
from common.settings import SettingsError
from localcloud.runner.images import Image, ImageMissing

_REFERENCE = re.compile(r"(?P<host>[^/]+)/(?P<repository>[^@:]+)(?:@(?P<digest>sha256:[0-9a-f]{64})|:(?P<tag>[\w.-]+))")
_MOUNTED = "rootfs-"  # begins the names of the containers that are mounted for pods
_MANIFESTS = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"


class Store:
    """buildah on `folder`/store. What is mounted now is noted in `folder`/run.

    Nothing of this machine's own store, registries or sign-ins is used. Raises `SettingsError` where buildah or root
    is missing.
    """

    def __init__(self, folder: Path) -> None:
        if problems := missing():
            raise SettingsError(problems)
        self.folder = folder.resolve()
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        store, run = (json.dumps(str(self.folder / name)) for name in ("store", "run"))  # a JSON string is TOML's
        settings = f'[storage]\ndriver = "overlay"\ngraphroot = {store}\nrunroot = {run}\n'
        # Else the store itself becomes a mount, which stays.
        settings += '[storage.options.overlay]\nskip_mount_home = "true"\n'
        self._write("storage.conf", settings)
        self._write("registries.conf", "")
        self._write("policy.json", json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        self._write("auth.json", "{}")
        self._environment = {
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(self.folder / "registries.conf"),
            "REGISTRY_AUTH_FILE": str(self.folder / "auth.json"),
            # No runc, no crun: neither works below every cgroup hierarchy.
            "BUILDAH_ISOLATION": "chroot",
            # Whole layers go through it.
            "TMPDIR": str(self.folder / "tmp"),
        }

    def _write(self, name: str, text: str) -> None:
        """Replaced in one step: another process may be reading it."""
        with tempfile.NamedTemporaryFile("w", dir=self.folder / "tmp", delete=False) as new:
            new.write(text)
        Path(new.name).replace(self.folder / name)

    def run(self, command: str, *arguments: str | Path, log: Path) -> int:
        """`buildah COMMAND ARGUMENTS`; what it says is added to `log`. Returns its exit code."""
        trust = ("--signature-policy", str(self.folder / "policy.json")) if command in ("bud", "push", "pull") else ()
        # A build's mounts are its own: they go with it even when it is killed.
        alone = ("unshare", "--mount") if command == "bud" else ()
        words = [*alone, "buildah", command, *trust, *map(str, arguments)]
        with log.open("ab") as output, self._lock:
            if self._closed:
                raise SettingsError([f"{self.folder}: closed"])
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | self._environment,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGKILL),
            )
            self._live.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._live.discard(process)

    def ask(self, command: str, *arguments: str | Path) -> str:
        """What `buildah COMMAND ARGUMENTS` prints. Raises `SettingsError` with its words when it fails."""
        with tempfile.NamedTemporaryFile(dir=self.folder / "tmp") as log:
            code = self.run(command, *arguments, log=Path(log.name))
            said = log.read().decode(errors="replace").strip()
        if code:
            raise SettingsError([f"buildah {command}: {said[-2000:]}"])
        return said

    def has(self, image: str) -> bool:
        """Whether `image`, a name or an ID, is in the store."""
        return self.run("inspect", "--type", "image", image, log=Path(os.devnull)) == 0

    def tidy(self) -> None:
        """Remove what killed builds have left: gigabytes, perhaps. Nobody else may be at work in the store."""
        for left in (self.folder / "tmp").iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        for name in self.containers():
            if not name.startswith(_MOUNTED):
                self.ask("rm", name)

    def containers(self) -> list[str]:
        return self.ask("containers", "--all", "--format", "{{.ContainerName}}").splitlines()

    def close(self) -> None:
        """End what is running, builds too."""
        with self._lock:
            self._closed = True
            for process in self._live:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def missing() -> list[str]:
    """What this machine lacks for images of its own, as lines for a person."""
    return [
        *([] if shutil.which("buildah") else ["buildah: not on PATH: install the Debian package buildah"]),
        *([] if os.geteuid() == 0 else ["buildah: needs root: it mounts root file systems"]),
    ]


class BuildahImages:
    """The images of pods: asked of a registry, kept in a `Store`, mounted once each, for reading only."""

    def __init__(self, store: Store, registry: str) -> None:
        """`registry`: `127.0.0.1:PORT`, in place of every NAME.azurecr.io."""
        self._store, self._registry = store, registry
        self._lock = threading.Lock()

    def ensure(self, reference: str) -> Image:
        """The image of `NAME.azurecr.io/REPOSITORY@sha256:...` or `:TAG`, pulled if the store lacks it, and mounted.

        Whatever mounted it, a namespace that is gone included, it is mounted in the caller's own mount namespace.
        Raises `ImageMissing` with the registry's words.
        """
        match = _REFERENCE.fullmatch(reference)
        if not match or not match["host"].endswith(".azurecr.io"):
            raise ImageMissing(
                f'failed to resolve reference "{reference}": only NAME.azurecr.io is reachable from here'
            )
        repository, version = match["repository"], match["digest"] or match["tag"]
        try:
            digest, manifest = self._get(repository, f"manifests/{version}", _MANIFESTS)
            _, config = self._get(repository, f"blobs/{manifest['config']['digest']}", "*/*")
        except (requests.RequestException, _Refused, KeyError) as error:
            raise ImageMissing(f'failed to resolve reference "{reference}": {error}') from None
        identity = str(manifest["config"]["digest"]).removeprefix("sha256:")  # the image's ID in every store
        with self._lock:
            try:
                if not self._store.has(identity):
                    source = f"docker://{self._registry}/{repository}{'@' if match['digest'] else ':'}{version}"
                    self._store.ask("pull", "--quiet", "--tls-verify=false", source)
                rootfs = self._mount(identity)
            except SettingsError as error:
                raise ImageMissing(f'failed to pull image "{reference}": {error}') from None
        # github.com/opencontainers/image-spec, config.md
        process = config.get("config") or {}
        return Image(
            rootfs,
            id=f"{match['host']}/{repository}@{match['digest'] or digest}",
            user=process.get("User") or "",
            env=tuple(process.get("Env") or ()),
            entrypoint=tuple(process.get("Entrypoint") or ()),
            cmd=tuple(process.get("Cmd") or ()),
            working_dir=process.get("WorkingDir") or "",
            stop_signal=process.get("StopSignal") or "",
        )

    def release(self) -> None:
        """Unmount what `ensure` mounted, when no pod uses it any more."""
        with self._lock:
            for name in self._store.containers():
                if name.startswith(_MOUNTED):
                    self._store.ask("rm", name)

    def _mount(self, identity: str) -> Path:
        name = f"{_MOUNTED}{identity[:12]}"
        if name in self._store.containers():
            with suppress(SettingsError):  # it holds absolute paths, and the store may have been moved since
                return Path(self._store.ask("mount", name))
            self._store.ask("rm", name)
        self._store.ask("from", "--pull-never", "--name", name, identity)
        return Path(self._store.ask("mount", name))

    def _get(self, repository: str, what: str, accept: str) -> tuple[str, Any]:
        """(digest of a manifest, its JSON)."""
        with requests.Session() as session:
            session.trust_env = False  # a proxy cannot reach our loopback
            url = f"http://{self._registry}/v2/{repository}/{what}"
            answer = session.get(url, headers={"Accept": accept}, timeout=30)
        if answer.status_code != 200:
            raise _Refused(_words(answer))
        return answer.headers.get("Docker-Content-Digest", ""), answer.json()


class _Refused(Exception):
    """The registry's own words."""


def _words(answer: requests.Response) -> str:
    try:
        error = answer.json()["errors"][0]
        return f"{answer.status_code} {error['code']}: {error['message']} {json.dumps(error.get('detail'))}"
    except (requests.RequestException, ValueError, LookupError, TypeError):
        return f"{answer.status_code} {answer.reason}"
