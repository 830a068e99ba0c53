"""Where replicas run, as the drills see it: what they may break, and how far what replaces it has come."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from stress.client import check_target, get_status
from stress.fleet import Replica, check_kill, kill, read_fleet

Stage = Literal[0, 1, 2, 3]
"""Of what replaces a killed replica: nothing yet, started, its engine answers, it is ready."""


class Site(Protocol):
    """Every method may raise `FleetError`."""

    poll_seconds: float
    """How often it may be asked: the resolution of the milestones."""
    how: str
    """What `kill` does, in words before the replica's name."""

    @property
    def router(self) -> str:
        """URL through which clients ask."""

    def names(self) -> list[str]:
        """Its replicas."""

    def unready(self) -> list[str]:
        """Those that are not ready, and those on their way out; something also if there are none at all."""

    def check(self, names: list[str]) -> None:
        """Raise if these could not be killed."""

    def kill(self, names: list[str]) -> float:
        """Kill them all at once; the unix time just before the first."""

    def reached(self, name: str) -> tuple[Stage, str]:
        """How far what replaces the killed `name` has come, and its own name."""


class Processes:
    """The processes of this machine that the fleet file `path` names: a killed one comes back under its name."""

    poll_seconds = 0.1
    how = "SIGKILL of"

    def __init__(self, path: Path, allow_remote: bool) -> None:
        self.path, self._killed = path, dict[str, Replica]()
        fleet = read_fleet(path)
        self.router = fleet.router
        for url in (fleet.router, *(replica.url for replica in fleet.replicas)):
            check_target(url, allow_remote)

    def names(self) -> list[str]:
        return [replica.name for replica in read_fleet(self.path).replicas]

    def unready(self) -> list[str]:
        fleet = read_fleet(self.path)
        return [replica.name for replica in fleet.replicas if get_status(_at(replica, "/ready")) != 200]

    def check(self, names: list[str]) -> None:
        fleet = read_fleet(self.path)
        for name in names:
            check_kill(fleet.replica(name))

    def kill(self, names: list[str]) -> float:
        fleet = read_fleet(self.path)
        self._killed = {name: fleet.replica(name) for name in names}
        return kill(list(self._killed.values()))

    def reached(self, name: str) -> tuple[Stage, str]:
        """Each stage is looked for only after the one before, so an answer of the killed process cannot count."""
        new, killed = read_fleet(self.path).replica(name), self._killed[name]
        if (new.pid, new.started_at) == (killed.pid, killed.started_at):
            return 0, name
        if get_status(_at(new, "/health")) != 200:
            return 1, name
        return (3 if get_status(_at(new, "/ready")) == 200 else 2), name


def _at(replica: Replica, path: str) -> str:
    return replica.url.rstrip("/") + path
