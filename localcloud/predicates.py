"""Whether a pod would fit on a node, by those of the scheduler's rules that our pods use; no cluster is asked.

Known: node selector, required node affinity, taints, resources, required pod anti-affinity. Not known: pod affinity,
spreading that must be, host ports, volumes bound to a zone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from localcloud.runner.fields import quantity
from localcloud.runner.status import is_sidecar

Amounts = dict[str, Decimal]  # by the resource's name; one that is missing is 0
ONE_POD = {"pods": Decimal(1)}
OVER = ("Succeeded", "Failed")


class Room:
    """A node and the pods that are, or would be, on it; those that are over count for nothing."""

    def __init__(self, node: Mapping[str, Any], pods: Iterable[Mapping[str, Any]] = ()) -> None:
        metadata, spec = node["metadata"], node.get("spec") or {}
        self.name: str = metadata["name"]
        self.labels: Mapping[str, str] = metadata.get("labels") or {}
        self.taints = spec.get("taints") or []
        self.pods: list[Mapping[str, Any]] = []
        self.free = _amounts(node["status"].get("allocatable"))
        for pod in pods:
            self.add(pod)

    def add(self, pod: Mapping[str, Any]) -> None:
        if (pod.get("status") or {}).get("phase") not in OVER:
            self.pods.append(pod)
            self.free = _plus(self.free, {name: -amount for name, amount in requests(pod["spec"]).items()})

    def has(self, wanted: Amounts) -> bool:
        return all(self.free.get(name, 0) >= amount for name, amount in wanted.items() if amount > 0)


def fits(pod: Mapping[str, Any], room: Room, rooms: Iterable[Room]) -> bool:
    """Whether the scheduler could put `pod` into `room`; `rooms` are all nodes, `room` among them or not."""
    return belongs(pod, room) and room.has(requests(pod["spec"])) and not _repelled(pod, room, [*rooms, room])


def belongs(pod: Mapping[str, Any], room: Room) -> bool:
    """Whether `pod` may be on this node, however full it is: what DaemonSets go by."""
    spec = pod["spec"]
    if any(room.labels.get(key) != value for key, value in (spec.get("nodeSelector") or {}).items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required and not any(_term(term, room) for term in required["nodeSelectorTerms"]):
        return False
    tolerations = spec.get("tolerations") or []
    return all(
        any(_tolerates(item, taint) for item in tolerations)
        for taint in room.taints
        if taint["effect"] in ("NoSchedule", "NoExecute")
    )


def requests(spec: Mapping[str, Any]) -> Amounts:
    """What a pod asks of its node: its containers and sidecars together, or an init container (beside the sidecars that
    started before it) that asks for more; for the whole pod where that is said; its overhead; and one of the pods."""
    sidecars: Amounts = {}
    peak: Amounts = {}
    for item in spec.get("initContainers") or []:
        together = _plus(sidecars, _requests(item))
        peak = _most(peak, together)
        if is_sidecar(item):
            sidecars = together
    total = sidecars
    for item in spec["containers"]:
        total = _plus(total, _requests(item))
    return _plus(_plus(_most(total, peak) | _requests(spec), _amounts(spec.get("overhead"))), ONE_POD)


def _requests(item: Mapping[str, Any]) -> Amounts:
    return _amounts((item.get("resources") or {}).get("requests"))


def _amounts(given: Mapping[str, Any] | None) -> Amounts:
    return {name: quantity(amount) for name, amount in (given or {}).items()}


def _plus(one: Amounts, other: Amounts) -> Amounts:
    return {name: one.get(name, Decimal(0)) + other.get(name, Decimal(0)) for name in one | other}


def _most(one: Amounts, other: Amounts) -> Amounts:
    return {name: max(one.get(name, Decimal(0)), other.get(name, Decimal(0))) for name in one | other}


def _term(term: Mapping[str, Any], room: Room) -> bool:
    """A node selector term; an empty one chooses nothing."""
    labels, fields = term.get("matchExpressions") or [], term.get("matchFields") or []
    return bool(labels or fields) and all(
        [_holds(item, room.labels) for item in labels] + [_holds(item, {"metadata.name": room.name}) for item in fields]
    )


def _holds(requirement: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    found, values = labels.get(requirement["key"]), requirement.get("values") or []
    match requirement["operator"]:
        case "In":
            return found in values
        case "NotIn":
            return found not in values
        case "Exists":
            return found is not None
        case "DoesNotExist":
            return found is None
        case "Gt" | "Lt" as operator:
            if found is None or not found.lstrip("-").isdigit():
                return False
            return int(found) > int(values[0]) if operator == "Gt" else int(found) < int(values[0])
    return False


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return bool(toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", ""))


def _repelled(pod: Mapping[str, Any], room: Room, rooms: Iterable[Room]) -> bool:
    """Whether a pod in the same domain may not be together with this one; either of them may say so."""
    return any(
        _repels(pod, other, room, there) or _repels(other, pod, there, room) for there in rooms for other in there.pods
    )


def _repels(pod: Mapping[str, Any], other: Mapping[str, Any], room: Room, there: Room) -> bool:
    affinity = (pod["spec"].get("affinity") or {}).get("podAntiAffinity") or {}
    for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or []:
        key = term["topologyKey"]
        together = key in room.labels and room.labels[key] == there.labels.get(key)
        places = term.get("namespaces") or [pod["metadata"]["namespace"]]
        everywhere = term.get("namespaceSelector") == {}
        if together and (everywhere or other["metadata"]["namespace"] in places) and _selects(term, other):
            return True
    return False


def _selects(term: Mapping[str, Any], pod: Mapping[str, Any]) -> bool:
    """By its label selector, into which the API server has put `matchLabelKeys`; without one, none is chosen."""
    selector, labels = term.get("labelSelector"), pod["metadata"].get("labels") or {}
    if selector is None:
        return False
    equal = (selector.get("matchLabels") or {}).items()
    return all(labels.get(key) == value for key, value in equal) and all(
        _holds(item, labels) for item in selector.get("matchExpressions") or []
    )
