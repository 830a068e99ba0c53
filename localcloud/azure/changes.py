"""What a change of inputs means: the detailed diff of the real provider, and what Azure refuses to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from localcloud.azure.errors import AzureError
from localcloud.azure.rules import Rule


@dataclass(frozen=True)
class Change:
    """One changed input: its path, ADD, DELETE or UPDATE, and whether it makes the resource anew."""

    path: str
    kind: str
    replaces: bool


def changes(rule: Rule, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """As pulumi-azure-native's `calculateDetailedDiff`: a property replaces, and whatever lies within it."""
    keys = rule.replaces | set(rule.path_inputs)
    return [
        Change(path, kind, any(pattern == key or pattern.startswith((f"{key}.", f"{key}[")) for key in keys))
        for path, pattern, kind in _walk(old, new, "", "")
        if not (path == "location" and _same_location(old.get("location"), new.get("location")))
    ]


def refuse_frozen(rule: Rule, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise what Azure answers to an update of what it never changes."""
    for path, pattern, _ in _walk(*_same_pools(old, new), "", ""):
        key = next((key for key in rule.frozen if pattern == key or pattern.startswith((f"{key}.", f"{key}["))), None)
        if key == "location":
            raise AzureError(409, "InvalidResourceLocation", f"The resource is in {old['location']!r} and stays there.")
        if key:
            what = f"properties.{path}"
            raise AzureError(
                400, "PropertyChangeNotAllowed", f"Changing property '{what}' is not allowed. Target: {what}."
            )


def _walk(old: Any, new: Any, path: str, pattern: str) -> Iterator[tuple[str, str, str]]:
    """(path, the same without indexes, kind) of every difference."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        inside, within = f"{path}." if path else "", f"{pattern}." if pattern else ""
        for key in dict.fromkeys([*old, *new]):
            if key not in new or key not in old:
                yield f"{inside}{key}", f"{within}{key}", "DELETE" if key in old else "ADD"
            else:
                yield from _walk(old[key], new[key], f"{inside}{key}", f"{within}{key}")
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            at = f"{path}[{index}]", f"{pattern}[]"
            if index >= len(old) or index >= len(new):
                yield *at, "DELETE" if index < len(old) else "ADD"
            else:
                yield from _walk(old[index], new[index], *at)
    elif old != new:
        yield path, pattern, "UPDATE"


def _same_location(old: Any, new: Any) -> bool:
    """Azure writes `Sweden Central` and `swedencentral` alike."""
    return isinstance(old, str) and isinstance(new, str) and _normal(old) == _normal(new)


def _normal(location: str) -> str:
    return location.lower().replace(" ", "")


def _same_pools(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both with those pools of a cluster alone that both have, in one order: a pool is known by its name."""
    pools = [{pool.get("name"): pool for pool in inputs.get("agentPoolProfiles") or []} for inputs in (old, new)]
    both = sorted(set(pools[0]) & set(pools[1]))
    before, after = ([by_name[name] for name in both] for by_name in pools)
    return {**old, "agentPoolProfiles": before}, {**new, "agentPoolProfiles": after}
