"""One local cloud: control plane, stand-in for Azure, Blob emulator and Pulumi's state, in one folder that lasts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
from pathlib import Path
from typing import Any

from common.files import private
from common.processes import Processes
from common.settings import SettingsError
from localcloud import azurite, program
from localcloud.azure import arm
from localcloud.cli import Cli, prepare
from localcloud.control_plane import ControlPlane
from localcloud.tools import ROOT, locate


class Cloud:
    """What a stack needs of a local cloud: its folder, and the CLI that meets it."""

    folder: Path
    cli: Cli

    def stack(self, name: str, source: Path = ROOT) -> Stack:
        """The program below `source` (a git checkout) as stack `name`, ready for `pulumi`; made anew or met again."""
        return Stack(self, name, source)


class LocalCloud(Cloud):
    """A context manager: what `pulumi up` brings up stays in `folder`, and is there when it is entered again.

    `complete_jobs`: Jobs' pods succeed by themselves after a second, as if they had tuned; else they run until told.
    `world`: where the stand-in for Azure keeps its resources, for several clouds in one subscription.
    Raises `ToolsMissing` where tools are not built, `SettingsError` where the folder is in use or Azurite is missing.
    """

    control_plane: ControlPlane

    def __init__(self, folder: Path, *, complete_jobs: bool = True, world: Path | None = None) -> None:
        self.folder, self.world = folder.resolve(), (world or folder / "azure").resolve()
        self._complete_jobs = complete_jobs
        self._open = contextlib.ExitStack()

    def __enter__(self) -> LocalCloud:
        tools = locate()
        azurite.check()
        private(self.folder)
        with contextlib.ExitStack() as opened:
            claim(self.folder, opened)
            processes = opened.enter_context(Processes())
            blobs = azurite.start(processes, self.folder / "blobs", self.folder / "logs" / "azurite.log")
            self.control_plane = opened.enter_context(
                ControlPlane(self.folder, tools, complete_jobs=self._complete_jobs)
            )
            runs = opened.enter_context(contextlib.closing(arm.serve(self.folder, self.world)))
            self.cli = prepare(self.folder, tools, environment(self.folder, self.world, blobs, runs.url))
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def environment(folder: Path, world: Path, blobs: str, runs: str) -> dict[str, str]:
    """By what the program and its providers meet the stand-ins; `blobs` and `runs` are addresses on loopback."""
    return {
        "DRYDOCK_LOCALCLOUD": str(folder),
        "DRYDOCK_LOCALCLOUD_WORLD": str(world),
        "DRYDOCK_BLOB_ENDPOINT": blobs,
        "AZURE_STORAGE_KEY": azurite.KEY,
        "DRYDOCK_ARM_ENDPOINT": runs,
    }


def claim(folder: Path, opened: contextlib.ExitStack) -> None:
    """Be alone in a cloud's folder until `opened` closes. Raises `SettingsError` where somebody else is in it."""
    lock = opened.enter_context((folder / "lock").open("a+"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SettingsError([f"{folder}: in use by another process: wait for it, or end it"]) from None


def known_to(source: Path, stack: str) -> None:
    """Raise `SettingsError` unless `source` has settings of `stack`: no folder is written, or cleared, for others."""
    known = sorted(path.name.removeprefix("Pulumi.").removesuffix(".yaml") for path in source.glob("Pulumi.*.yaml"))
    if stack not in known:
        raise SettingsError([f"Pulumi.{stack}.yaml: no such file; stacks with settings: {', '.join(known) or 'none'}"])


class Stack:
    """One stack of a local cloud. Its copy of the program lies in `self.folder` and may be edited."""

    def __init__(self, cloud: Cloud, name: str, source: Path) -> None:
        self.cloud, self.name, self.source = cloud, name, source
        known_to(source, name)
        self.folder = cloud.folder / "programs" / name
        self.copy()

    def copy(self) -> None:
        """Bring the copy up to date with `source`; settings and secrets of this machine are put in again."""
        program.copy(self.source, self.folder)
        settings = self.folder / f"Pulumi.{self.name}.yaml"
        text = program.for_here((self.source / settings.name).read_text())  # git may be told to ignore it
        salt = self.cloud.folder / f"{self.name}.salt"  # of the passphrase; Pulumi keeps it there
        settings.write_text(text + (salt.read_text() if salt.exists() else ""))
        if self.name not in [item["name"] for item in self.cloud.cli.json("stack", "ls", cwd=self.folder)]:
            self.pulumi("stack", "init", self.name, "--no-select", stack=False)
        self.pulumi("config", "set", "--secret", "--path", "drydock:api_keys.local", self._key())
        salted = [line for line in settings.read_text().splitlines() if line.startswith("encryptionsalt:")]
        salt.write_text("".join(f"{line}\n" for line in salted))

    def unlock(self) -> bool:
        """Take away the lock of an earlier run that was killed, and say whether there was one.

        Whoever has entered the cloud is alone in its folder, and no engine outlives its `localcloud`.
        """
        held = self.cloud.folder.glob(f"state/.pulumi/locks/**/{self.name}/*.json")
        if not any(held):
            return False
        self.pulumi("cancel", "--yes")
        return True

    def _key(self) -> str:
        """The API key of this stack, the same for as long as the cloud's folder lasts: a new one would be a change."""
        path = self.cloud.folder / f"{self.name}.key"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        return path.read_text()

    def pulumi(self, *arguments: str, stack: bool = True, check: bool = True) -> Any:
        """`pulumi ARGUMENTS` on this stack: a `CompletedProcess` of text."""
        chosen = ("--stack", self.name) if stack else ()
        return self.cloud.cli.run(*arguments, *chosen, cwd=self.folder, check=check)

    def show(self, *arguments: str) -> int:
        """`pulumi ARGUMENTS` on this stack before a person's eyes: its exit code."""
        return self.cloud.cli.show(*arguments, "--stack", self.name, cwd=self.folder)

    def outputs(self) -> dict[str, Any]:
        return dict(json.loads(self.pulumi("stack", "output", "--json").stdout))
