"""The volumes of a pod as folders and files of this machine."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from localcloud.runner.fields import ConfigError, field, quantity, resource
from localcloud.runner.objects import TOKEN_SECONDS, Objects

RENEW_AT = 0.8  # of a token's life, as the kubelet does
SHM_BYTES = 64 * 1024 * 1024  # containerd's /dev/shm

Files = dict[str, tuple[bytes, int]]  # by the path in the volume: contents and mode


class Volumes:
    """Of one pod: `folder` holds them, `host` stands for the root of its node's own disk (hostPath).

    `clock` is `time.monotonic`, but for tests.
    """

    def __init__(
        self,
        pod: Mapping[str, Any],
        folder: Path,
        host: Path,
        objects: Objects,
        node: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pod, self._folder, self._host, self._objects, self._node = pod, folder, host, objects, node
        self._clock = clock
        self._volumes = {item["name"]: item for item in pod["spec"].get("volumes", [])}
        self._group = (pod["spec"].get("securityContext") or {}).get("fsGroup")
        self._tokens: dict[tuple[str, str], tuple[str, float]] = {}  # with the time at which to renew it

    def prepare(self) -> list[dict[str, Any]]:
        """Make them all; the volumes in memory are returned as `enter.sandbox` takes them: it mounts them.

        Raises `ConfigError` for what the cluster lacks, `ApiError` where it does not answer.
        """
        shm = self._folder / "shm"
        shm.mkdir(parents=True, exist_ok=True)
        memory = [{"path": str(shm), "size": SHM_BYTES, "mode": 0o1777, "group": -1}]
        for name, volume in self._volumes.items():
            if "hostPath" in volume:
                self._host_path(name, volume["hostPath"])
            elif "emptyDir" in volume:
                folder = self._own(name)
                folder.mkdir(parents=True, exist_ok=True)
                if (volume["emptyDir"] or {}).get("medium") == "Memory":
                    limit = volume["emptyDir"].get("sizeLimit")
                    group = -1 if self._group is None else self._group
                    mode = 0o777 if self._group is None else 0o2777
                    size = int(quantity(limit)) if limit else None
                    memory.append({"path": str(folder), "size": size, "mode": mode, "group": group})
                else:
                    self._share(folder, 0o777)
        self.refresh()
        return memory

    def refresh(self) -> None:
        """Bring what comes from the cluster up to date, tokens too; files change all at once, as in a cluster."""
        for name, volume in self._volumes.items():
            sources = volume.get("projected", {}).get("sources") or [volume]
            kinds = {"configMap", "secret", "downwardAPI", "serviceAccountToken"}
            if not any(kinds & source.keys() for source in sources):
                continue
            described = volume.get("projected") or next(volume[kind] for kind in kinds if kind in volume)
            mode = described.get("defaultMode", 0o644)
            files: Files = {}
            for source in sources:
                files |= self._files(name, source, mode)
            self._write(self._own(name), files)

    def source(self, name: str, sub_path: str = "") -> Path:
        """The folder or file of this machine to be mounted. Raises `ConfigError` for a subPath that leads outside."""
        volume = self._volumes[name]
        base = self._on_host(volume["hostPath"]["path"]) if "hostPath" in volume else self._own(name)
        if not sub_path:
            return base
        if self.in_memory(name):
            return base / sub_path  # `enter.run` makes it: only the pod sees into that volume
        found = Path(os.path.realpath(base / sub_path))
        if not found.is_relative_to(os.path.realpath(base)):
            raise ConfigError(f'subPath "{sub_path}" of volume {name} leads out of the volume')
        if not found.exists():
            if not ("emptyDir" in volume or "hostPath" in volume):
                raise ConfigError(f'subPath "{sub_path}" is not in volume {name}')
            found.mkdir(parents=True)
            if "emptyDir" in volume:
                self._share(found, 0o755 if self._group is None else 0o775)
        return found

    def from_cluster(self, name: str) -> bool:
        """Whether the cluster says what is in it: no container may write there."""
        return bool({"configMap", "secret", "downwardAPI", "projected"} & self._volumes[name].keys())

    def in_memory(self, name: str) -> bool:
        return (self._volumes[name].get("emptyDir") or {}).get("medium") == "Memory"

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _own(self, name: str) -> Path:
        return self._folder / "volumes" / name

    def _on_host(self, path: str) -> Path:
        return self._host / path.lstrip("/")

    def _host_path(self, name: str, described: Mapping[str, Any]) -> None:
        kind, path = described.get("type", ""), self._on_host(described["path"])
        if kind in ("", "DirectoryOrCreate"):
            path.mkdir(parents=True, exist_ok=True)
        elif kind == "FileOrCreate":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        checks = {"Directory": path.is_dir, "File": path.is_file, "Socket": path.is_socket}
        if kind in checks and not checks[kind]():
            raise ConfigError(
                f'volume "{name}": hostPath type check failed: {described["path"]} is not a {kind.lower()}'
            )

    def _share(self, folder: Path, mode: int) -> None:
        """What the pod's group may use belongs to it, and so does what is made in there later."""
        if self._group is not None:
            os.chown(folder, -1, self._group)
            mode |= 0o2070
        folder.chmod(mode)

    def _files(self, volume: str, source: Mapping[str, Any], mode: int) -> Files:
        if "serviceAccountToken" in source:
            described = source["serviceAccountToken"]
            return {described["path"]: (self._token(volume, described).encode(), 0o600)}
        if "downwardAPI" in source:
            return {
                item["path"]: (self._told(item).encode(), item.get("mode", mode))
                for item in source["downwardAPI"].get("items") or []
            }
        if "configMap" in source:
            return self._picked("configmaps", source["configMap"]["name"], source["configMap"], mode)
        if "secret" in source:
            secret = source["secret"]
            return self._picked("secrets", secret.get("secretName") or secret["name"], secret, mode)
        return {}

    def _told(self, item: Mapping[str, Any]) -> str:
        if "fieldRef" in item:
            return field(self._pod, item["fieldRef"]["fieldPath"])
        return resource(self._pod, "", item["resourceFieldRef"], self._node)

    def _picked(self, kind: str, name: str, described: Mapping[str, Any], mode: int) -> Files:
        found = self._objects.data(kind, name)
        if found is None:
            if described.get("optional"):
                return {}
            raise ConfigError(f'{kind[:-1]} "{name}" not found')
        if not described.get("items"):
            return {key: (value, mode) for key, value in found.items()}
        files: Files = {}
        for item in described["items"]:
            if item["key"] in found:
                files[item["path"]] = (found[item["key"]], item.get("mode", mode))
            elif not described.get("optional"):
                raise ConfigError(f'{kind[:-1]} "{name}" references non-existent key: {item["key"]}')
        return files

    def _token(self, volume: str, described: Mapping[str, Any]) -> str:
        known, renew = self._tokens.get((volume, described["path"]), ("", 0.0))
        if known and self._clock() < renew:
            return known
        seconds = int(described.get("expirationSeconds", TOKEN_SECONDS))
        known = self._objects.token(described.get("audience"), seconds)
        self._tokens[volume, described["path"]] = known, self._clock() + RENEW_AT * seconds
        return known

    def _write(self, folder: Path, files: Files) -> None:
        """As the kubelet lays them out: `..data` leads to a folder of all, and changes in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "..data"
        if data.is_symlink() and dict(_contents(data)) == {path: content for path, (content, _) in files.items()}:
            return
        before = folder / os.readlink(data) if data.is_symlink() else None
        new = folder / f"..{time.time_ns()}"
        new.mkdir()
        self._share(folder, 0o755)
        self._share(new, 0o755)
        for path, (content, mode) in files.items():
            file = new / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.write_bytes(content)
            self._owned(file, mode)
        link = folder / "..data.new"
        link.symlink_to(new.name)
        link.replace(data)
        names = {path.partition("/")[0] for path in files}
        for name in names:
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(Path("..data") / name)
        for gone in [item for item in folder.iterdir() if not item.name.startswith("..") and item.name not in names]:
            gone.unlink()
        if before is not None:
            shutil.rmtree(before)

    def _owned(self, file: Path, mode: int) -> None:
        """Readable for the pod's group; without one, what is for its owner alone is for the pod's user."""
        user = (self._pod["spec"].get("securityContext") or {}).get("runAsUser")
        if self._group is not None:
            os.chown(file, -1, self._group)
            mode |= 0o440
        elif mode == 0o600 and user is not None:
            os.chown(file, user, -1)
        elif mode == 0o600:
            mode = 0o644  # who will read it is not known
        file.chmod(mode)


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in folder.rglob("*"):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file.read_bytes()
