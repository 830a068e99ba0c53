"""What the engine plans and did, read from its own JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from localcloud.cloud import LocalCloud, Stack

SETTINGS = "Pulumi.dev.yaml"
QUIET = ("same", "read", "refresh")
REPLACED = {"replace", "create-replacement", "delete-replaced"}


@dataclass(frozen=True)
class Plan:
    """A preview. Resources are named as `TYPE NAME`, such as `AgentPool pools-apps`."""

    steps: list[dict[str, Any]]
    errors: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def changes(self) -> dict[str, set[str]]:
        """The operations on each resource that does not stay as it is."""
        found: dict[str, set[str]] = {}
        for step in self.steps:
            if step["op"] not in QUIET:
                found.setdefault(resource(step["urn"]), set()).add(step["op"])
        return found

    def order(self, name: str) -> list[str]:
        return [step["op"] for step in self.steps if resource(step["urn"]) == name]

    def new(self, name: str) -> dict[str, Any]:
        """The inputs that `name` would get."""
        return next(
            dict(s["newState"]["inputs"]) for s in self.steps if resource(s["urn"]) == name and s.get("newState")
        )


def resource(urn: str) -> str:
    kind, name = urn.split("::")[-2:]
    return f"{kind.rpartition('$')[2].rpartition(':')[2]} {name}"


def brought_up(cloud: LocalCloud, change: Callable[[str], str]) -> Stack:
    """The dev environment with its settings so changed, up."""
    stack = cloud.stack("dev")
    path = stack.folder / SETTINGS
    path.write_text(change(path.read_text()))
    done = stack.pulumi("up", "--yes", "--skip-preview", "--policy-pack", "policy", check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return stack


def preview(stack: Stack, *arguments: str) -> Plan:
    done = stack.pulumi("preview", "--json", "--show-replacement-steps", *arguments, check=False)
    assert done.stdout.lstrip().startswith("{"), f"{done.stdout}\n{done.stderr}"
    said = json.loads(done.stdout)
    told = said.get("diagnostics") or []
    errors, warnings = ([each["message"] for each in told if each["severity"] == kind] for kind in ("error", "warning"))
    # What is read (the stack's own outputs, by workloads/switching.py) is no resource of the stack.
    return Plan([step for step in said.get("steps") or [] if step["op"] != "read"], errors, warnings)


def last_update(stack: Stack) -> tuple[str, dict[str, int]]:
    """`(result, resources by operation)` of the newest update, refresh or destroy."""
    newest = json.loads(stack.pulumi("stack", "history", "--json", "--page-size", "1").stdout)[0]
    return newest["result"], dict(newest.get("resourceChanges") or {})


def state(stack: Stack) -> list[dict[str, Any]]:
    """The resources of the stack's state, secrets encrypted."""
    deployment = json.loads(stack.pulumi("stack", "export").stdout)["deployment"]
    return list(deployment.get("resources") or [])


@contextlib.contextmanager
def written(stack: Stack, name: str, text: str) -> Iterator[None]:
    """The stack's copy of the program with `text` as the content of file `name`."""
    path = stack.folder / name
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


@contextlib.contextmanager
def edited(stack: Stack, name: str, old: str, new: str) -> Iterator[None]:
    """The stack's copy of the program with `old` replaced by `new` in file `name`, once."""
    before = (stack.folder / name).read_text()
    assert before.count(old) == 1, f"{name}: {old!r} stands there {before.count(old)} times"
    with written(stack, name, before.replace(old, new)):
        yield
