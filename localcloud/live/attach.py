"""Starts the process that a running local cloud lives in, reaches it, and ends it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

from common.files import private
from common.processes import python, wait_for
from common.settings import SettingsError
from localcloud.api import Api
from localcloud.cli import prepare
from localcloud.cloud import Cloud
from localcloud.live.places import DAEMON_FILE, REGISTRY_ADDRESS
from localcloud.tools import locate

START_SECONDS = 180.0
STOP_SECONDS = 30.0
INTERRUPT_SECONDS = 120.0  # for `pulumi up` to end what it has begun
INSIDE = "localcloud.live.inside"
AWAY = "drydock-registry-away"  # table of nftables


class NotUp(Exception):
    """It did not start, or is not there; the text says where to look."""


class LiveCloud(Cloud):
    """A running one, in `folder`. Raises `NotUp` where none is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        said = _running(self.folder)
        if said is None:
            raise NotUp(f"{folder}: no local cloud is up here: make local")
        self.router: str = said["router"]
        self.registry: str = said["registry"]
        self.environment: dict[str, str] = said["environment"]
        self.pid: int = said["pid"]
        self.cli = prepare(self.folder, locate(), self.environment)

    def api(self) -> Api:
        access = json.loads((self.folder / "cluster.json").read_text())
        return Api(access["server"], access["token"], Path(access["ca_file"]))

    def reach_registry(self, reachable: bool) -> None:
        """Let pods reach the registries, or have every packet on its way there answered by a reset.

        Images come another way: those that a node has are there, as in a cluster. Raises `NotUp` where it is gone.
        """
        rules = f"add table ip {AWAY}\ndelete table ip {AWAY}\n"  # also where there is none
        if not reachable:
            rule = f"ip daddr {REGISTRY_ADDRESS} reject with tcp reset"
            rules += f"table ip {AWAY} {{ chain input {{ type filter hook input priority 0; {rule}; }}; }}\n"
        command = ["nsenter", f"--net=/proc/{self._inside()}/ns/net", "nft", "-f", "-"]
        done = subprocess.run(command, input=rules, capture_output=True, text=True)
        if done.returncode:
            raise NotUp(f"the registry's address could not be {'opened' if reachable else 'shut'}: {done.stderr}")

    def _inside(self) -> int:
        """A process in the cluster's network namespace: never one in ours, whose tables are not to be touched."""
        ours = os.readlink("/proc/self/ns/net")
        with contextlib.suppress(psutil.Error, OSError):
            for process in psutil.Process(self.pid).children(recursive=True):
                if INSIDE in process.cmdline() and os.readlink(f"/proc/{process.pid}/ns/net") != ours:
                    return process.pid
        raise NotUp(f"{self.folder}: the local cloud has ended: make local")


def start(folder: Path, images: Path) -> LiveCloud:
    """Start it where none is up. Raises `NotUp` with the end of its log, TimeoutError."""
    folder = folder.resolve()
    if _running(folder) is None:
        private(folder)
        (folder / DAEMON_FILE).unlink(missing_ok=True)  # of one that was killed
        log = folder / "logs" / "daemon.log"
        log.parent.mkdir(exist_ok=True)
        log.unlink(missing_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                python("localcloud.live.daemon", folder, images.resolve()),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

        def alive() -> None:
            if process.poll() is not None:
                raise NotUp(f"the local cloud did not start; the end of {log}:\n{log.read_text()[-3000:]}")

        try:
            wait_for((folder / DAEMON_FILE).exists, START_SECONDS, "the local cloud", alive)
        except BaseException:
            stop_process(process.pid)
            process.wait()
            raise
    return LiveCloud(folder)


@contextlib.contextmanager
def alone(folder: Path, *, end_other: bool = False) -> Iterator[bool]:
    """While entered, no other `up` or `down` works on `folder`. Yields whether another one was ended for that.

    Raises `SettingsError` where one does; with `end_other` that one is ended first, as Ctrl-C would.
    """
    path = folder.resolve().with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + (INTERRUPT_SECONDS if end_other else 0)
        told = False
        while not _locked(file):
            file.seek(0)
            other = file.read().strip()
            if end_other and not told and other.isdigit():
                told = True
                os.kill(int(other), signal.SIGTERM)
            if time.monotonic() >= deadline:
                raise SettingsError([f"{folder}: process {other} is at work on it: wait for it, or end it by Ctrl-C"])
            time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield told


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def stop(folder: Path) -> bool:
    """End it; what it has written stays. Whether one was up."""
    said = _running(folder.resolve())
    if said is None:
        return False
    stop_process(said["pid"])
    return True


def remove(folder: Path) -> None:
    """Take away all that a cloud which is down has written. Raises `SettingsError` for a folder of something else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "lock").exists():
        raise SettingsError([f"{folder}: not the folder of a local cloud: nothing was removed"])
    shutil.rmtree(folder, ignore_errors=True)


def stop_process(pid: int) -> None:
    """SIGTERM, then SIGKILL; it is gone when this returns, and with it all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            if not _alive(pid):
                return
            time.sleep(0.1)
    raise TimeoutError(f"process {pid} does not end")


def _running(folder: Path) -> dict[str, Any] | None:
    """What the daemon in `folder` says of itself; None where none lives."""
    try:
        said: dict[str, Any] = json.loads((folder / DAEMON_FILE).read_text())
    except FileNotFoundError:
        return None
    return said if _alive(said["pid"]) and _is_daemon(said["pid"]) else None


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_daemon(pid: int) -> bool:
    """Its number may be another's by now."""
    with contextlib.suppress(psutil.Error):
        return "localcloud.live.daemon" in psutil.Process(pid).cmdline()
    return False
