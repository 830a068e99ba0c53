"""Faults that a test or a drill puts in Azure's way, each consumed by the request that it meets."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import write_json

ACTIONS = ("create", "read", "update", "delete", "build", "any")
KINDS = ("conflict", "throttled", "quota", "build_failed", "vanished", "slow", "half_made", "unanswered")
MEETS = {  # reading neither conflicts nor takes quota; what is not there yet cannot vanish
    "vanished": ("read", "update", "delete"),
    "conflict": ("create", "update", "delete"),
    "quota": ("create", "update"),
    "half_made": ("create", "update"),
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the next `times` requests that fit.

    `action` is what is asked for (`build`: a run of the registry). `type` is the resource's type as a program writes
    it, or its last part (`AgentPool`, `containerservice:AgentPool`); `name` its name in Azure or in the program, empty
    for any; of a build, the image's repository. The kinds:

    - `conflict`: 409, and nothing is done
    - `throttled`: 429; the provider waits and asks again, at most three times
    - `quota`: what a subscription without quota answers
    - `half_made`: it is done, but the answer is an error
    - `vanished`: somebody deletes it, with all that belongs to it, just before
    - `slow`: it takes `seconds` longer
    - `build_failed`: the image's build fails (a build may be `slow` or `throttled` too)

    Raises ValueError for a kind or an action that is none of these.
    """

    kind: str
    type: str = ""
    name: str = ""
    action: str = "any"
    times: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for what, value, known in (("kind", self.kind, KINDS), ("action", self.action, ACTIONS)):
            if value not in known:
                raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")

    def meets(self, action: str, token: str, names: tuple[str, ...]) -> bool:
        if action == "build":
            fits = self.action == "build" or self.kind == "build_failed"
        else:
            asked = MEETS.get(self.kind, ACTIONS)
            fits = self.action in ("any", action) and action in asked and self.kind != "build_failed"
        return (
            fits and (not self.type or f":{token}".endswith(f":{self.type}")) and (not self.name or self.name in names)
        )


def inject(folder: Path, *faults: Fault) -> None:
    """Add `faults` to those that wait in `folder`, that of one local cloud."""
    with _waiting(folder) as waiting:
        waiting += [asdict(fault) for fault in faults]


def waiting(folder: Path) -> list[Fault]:
    """Those that no request has met yet."""
    with _waiting(folder) as found:
        return [Fault(**item) for item in found]


def take(folder: Path, action: str, token: str, *names: str) -> Fault | None:
    """The first fault that this request meets; one of its `times` is spent."""
    if not (folder / "faults.json").exists():
        return None
    with _waiting(folder) as found:
        for index, item in enumerate(found):
            fault = Fault(**item)
            if fault.meets(action, token, names):
                found[index : index + 1] = [item | {"times": fault.times - 1}] if fault.times > 1 else []
                return fault
    return None


@contextmanager
def _waiting(folder: Path) -> Iterator[list[dict[str, Any]]]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "faults.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "faults.json"
        found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        before = json.dumps(found)
        yield found
        if json.dumps(found) != before:
            write_json(path, found)
