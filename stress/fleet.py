"""The replicas of this machine as their supervisor wrote them, and killing one without ever hitting anything else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError, field_validator

from common.files import read_json
from common.settings import explain
from stress.client import is_loopback

# The supervisor notes `started_at` next to the fork; the kernel's own start time has a resolution of 10 ms and
# moves a little with clock corrections.
START_TOLERANCE_SECONDS = 5.0


class FleetError(Exception):
    """The fleet cannot be read, or a kill was refused; the text says what to change."""


class Replica(BaseModel):
    """One vLLM server: `pid` leads its process group, `started_at` is unix seconds."""

    name: str
    url: str
    pid: int
    started_at: float


class Fleet(BaseModel):
    """What the supervisor keeps in fleet.json."""

    router: str
    replicas: list[Replica]

    @field_validator("replicas")
    @classmethod
    def _distinct(cls, value: list[Replica]) -> list[Replica]:
        for key in ("name", "url", "pid"):
            found = [getattr(replica, key) for replica in value]
            if len(set(found)) != len(found):
                raise ValueError(f"two replicas have the same {key}")
        if not value:
            raise ValueError("lists no replica")
        return value

    def replica(self, name: str) -> Replica:
        """The replica `name`; raises `FleetError` with the known names."""
        for replica in self.replicas:
            if replica.name == name:
                return replica
        raise FleetError(f"no replica {name!r}; the fleet has: {', '.join(r.name for r in self.replicas)}")


def read_fleet(path: Path) -> Fleet:
    """The fleet file `path`. Raises `FleetError`."""
    try:
        return Fleet.model_validate(read_json(path))
    except FileNotFoundError:
        raise FleetError(f"{path}: no such file: start the fleet first, or give --fleet FILE") from None
    except ValidationError as error:
        raise FleetError("\n".join(explain(error, Fleet, path=path))) from None
    except (OSError, ValueError) as error:
        raise FleetError(f"{path}: not a fleet file: {error}") from None


def check_kill(replica: Replica) -> None:
    """Raise `FleetError` unless SIGKILL to `replica`'s process group would hit that replica and nothing else."""
    pid, name = replica.pid, replica.name
    if pid <= 1:
        raise FleetError(f"{name}: pid {pid} is not a replica's; refusing to kill it")
    if not is_loopback(replica.url):
        raise FleetError(f"{name}: {replica.url} is not on this machine, so pid {pid} is not this machine's either")
    try:
        process = psutil.Process(pid)
        created, owner = process.create_time(), process.uids().real
        group = os.getpgid(pid)
        gone = process.status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ProcessLookupError):
        gone = True
    if gone:
        raise FleetError(f"{name}: pid {pid} is not running; is the supervisor still restarting it?")
    if group == os.getpgid(0):
        raise FleetError(f"{name}: pid {pid} is in this drill's own process group; refusing to kill it")
    if group != pid:
        raise FleetError(
            f"{name}: pid {pid} does not lead its process group ({group} does): start it in its own session"
        )
    if any(ancestor.pid == pid for ancestor in psutil.Process().parents()):
        raise FleetError(f"{name}: pid {pid} started this drill; refusing to kill it")
    if owner != os.getuid():
        raise FleetError(f"{name}: pid {pid} belongs to user id {owner}, not to {os.getuid()}")
    if abs(created - replica.started_at) > START_TOLERANCE_SECONDS:
        raise FleetError(
            f"{name}: pid {pid} started at {created:.1f}, but the fleet file says {replica.started_at:.1f}: "
            "the number now belongs to another process"
        )


def kill(replicas: list[Replica]) -> float:
    """SIGKILL the process group of each replica, after all were checked; the unix time just before the first."""
    for replica in replicas:
        check_kill(replica)
    at = time.time()
    for replica in replicas:
        os.killpg(replica.pid, signal.SIGKILL)
    return at
