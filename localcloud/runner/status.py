"""What the status of a pod is, given what its containers do: no clock, no process, no API in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

State = dict[str, Any]  # {"waiting": {...}}, {"running": {...}} or {"terminated": {...}} as Kubernetes has it


@dataclass
class Seen:
    """One container as it is now."""

    state: State = field(default_factory=lambda: {"waiting": {"reason": "PodInitializing"}})
    last: State = field(default_factory=dict)
    """How it ended before, if this is not its first start."""
    restarts: int = 0
    image_id: str = ""
    started: bool = False
    """It runs and its startup probe has succeeded, if it has one."""
    ready: bool = False

    @property
    def exit_code(self) -> int | None:
        """None unless it has ended and waits for nothing."""
        return self.state["terminated"]["exitCode"] if "terminated" in self.state else None


@dataclass(frozen=True)
class Place:
    """Where a pod runs; empty where that is not known yet."""

    started: str = ""
    pod_ip: str = ""
    host_ip: str = ""


def is_sidecar(container: Mapping[str, Any]) -> bool:
    """Whether an init container is a native sidecar: it runs as long as the pod does."""
    return container.get("restartPolicy") == "Always"


def initialised(spec: Mapping[str, Any], seen: Mapping[str, Seen]) -> list[str]:
    """The init containers that are not done (a sidecar: not started), in order."""
    return [item["name"] for item in spec.get("initContainers", []) if not done(item, seen[item["name"]])]


def done(init: Mapping[str, Any], seen: Seen) -> bool:
    return seen.started if is_sidecar(init) else seen.exit_code == 0


def restarts(policy: str, code: int) -> bool:
    """Whether a container that ended with `code` is started again."""
    return policy == "Always" or (policy == "OnFailure" and code != 0)


def phase(spec: Mapping[str, Any], seen: Mapping[str, Seen], *, over: bool) -> str:
    """`over`: all processes are gone and none will be started, because the pod is deleted or its work is done."""
    codes = [seen[item["name"]].exit_code for item in spec["containers"]]
    if over:
        return "Succeeded" if all(code == 0 for code in codes) else "Failed"
    never = all("waiting" in one.state and not one.last for one in (seen[item["name"]] for item in spec["containers"]))
    sidecars = {item["name"] for item in spec.get("initContainers", []) if is_sidecar(item)}
    initialising = [name for name in initialised(spec, seen) if name not in sidecars or never]
    return "Pending" if initialising or never else "Running"


def status_of(
    pod: Mapping[str, Any], seen: Mapping[str, Seen], place: Place, now: str, *, over: bool = False
) -> dict[str, Any]:
    """The part of `pod["status"]` that a kubelet writes. Times of conditions that do not change are kept; conditions
    of others (PodScheduled, DisruptionTarget) are not in it: a strategic merge leaves them as they are."""
    spec, before = pod["spec"], pod.get("status", {})
    reached = phase(spec, seen, over=over)
    status: dict[str, Any] = {
        "phase": reached,
        "conditions": _conditions(pod, seen, place, reached, now),
        "containerStatuses": _containers(spec["containers"], seen),
    }
    if "initContainers" in spec:
        status["initContainerStatuses"] = _containers(spec["initContainers"], seen)
    if place.started:
        status["startTime"] = before.get("startTime") or place.started
    if place.host_ip:
        status |= {"hostIP": place.host_ip, "hostIPs": [{"ip": place.host_ip}]}
    if place.pod_ip:
        status |= {"podIP": place.pod_ip, "podIPs": [{"ip": place.pod_ip}]}
    return status


def _containers(containers: Sequence[Mapping[str, Any]], seen: Mapping[str, Seen]) -> list[dict[str, Any]]:
    return [
        {
            "name": item["name"],
            "image": item["image"],
            "imageID": seen[item["name"]].image_id,
            "state": seen[item["name"]].state,
            "lastState": seen[item["name"]].last,
            "ready": seen[item["name"]].ready,
            "started": seen[item["name"]].started,
            "restartCount": seen[item["name"]].restarts,
        }
        for item in containers
    ]


def _conditions(
    pod: Mapping[str, Any], seen: Mapping[str, Seen], place: Place, reached: str, now: str
) -> list[dict[str, Any]]:
    spec, given = pod["spec"], {item["type"]: item for item in pod.get("status", {}).get("conditions") or []}
    sidecars = [item for item in spec.get("initContainers", []) if is_sidecar(item)]
    waiting = initialised(spec, seen)
    unready = [item["name"] for item in [*sidecars, *spec["containers"]] if not seen[item["name"]].ready]
    completed = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(reached)
    ready: tuple[bool, str, str]
    if completed:
        ready = (False, completed, "")
    elif unready:
        ready = (False, "ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]")
    else:
        ready = (True, "", "")
    gates = [item["conditionType"] for item in spec.get("readinessGates") or []]
    shut = [name for name in gates if given.get(name, {}).get("status") != "True"]
    initialised_now = (
        (True, "PodCompleted" if reached == "Succeeded" else "", "")
        if not waiting
        or reached == "Succeeded"
        or (not set(waiting) - {item["name"] for item in sidecars} and completed)
        else (False, "ContainersNotInitialized", f"containers with incomplete status: [{' '.join(waiting)}]")
    )
    all_ready = (False, "ReadinessGatesNotReady", f"not True: {', '.join(shut)}") if ready[0] and shut else ready
    found = {
        "PodReadyToStartContainers": (bool(place.pod_ip) and not completed, "", ""),
        "Initialized": initialised_now,
        "ContainersReady": ready,
        "Ready": all_ready,
    }
    return [_condition(name, *verdict, given.get(name, {}), now) for name, verdict in found.items()]


def _condition(
    name: str, holds: bool, reason: str, message: str, before: Mapping[str, Any], now: str
) -> dict[str, Any]:
    status = "True" if holds else "False"
    since = before.get("lastTransitionTime") if before.get("status") == status else None
    # None takes away what was said before
    return {
        "type": name,
        "status": status,
        "reason": reason or None,
        "message": message or None,
        "lastTransitionTime": since or now,
    }


def changed(before: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
    """Whether writing `status` would change what the API server has."""
    given = {item["type"]: item for item in before.get("conditions") or []}
    for condition in status["conditions"]:
        old = given.get(condition["type"], {})
        if any(old.get(key) != value for key, value in condition.items()):
            return True
    names = ("containerStatuses", "initContainerStatuses")
    for key, value in status.items():
        if key in names:
            old_ones = [
                {name: item.get(name) for name in new} for item, new in zip(before.get(key) or [], value, strict=False)
            ]
            if _bare(old_ones) != _bare(value):
                return True
        elif key != "conditions" and before.get(key) != value:
            return True
    return False


def _bare(value: Any) -> Any:
    """Without what is empty: the server leaves that out."""
    if isinstance(value, Mapping):
        return {key: _bare(item) for key, item in value.items() if item not in (None, "", {}, [])}
    return [_bare(item) for item in value] if isinstance(value, list) else value


def lost(code: int = 137) -> State:
    """How a container ended whose process is gone while nobody watched; the words are the kubelet's."""
    message = "The container could not be located. The container used to be Running"
    return {"terminated": {"exitCode": code, "reason": "ContainerStatusUnknown", "message": message}}


def adopted(pod: Mapping[str, Any]) -> dict[str, Seen]:
    """The containers as the API server knows them from an earlier runner, whose processes are all gone."""
    result = {item["name"]: Seen() for item in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]}
    known = pod.get("status", {})
    for item in [*(known.get("initContainerStatuses") or []), *(known.get("containerStatuses") or [])]:
        state = dict(item.get("state") or {})
        if "running" in state:
            state = lost()
            state["terminated"]["startedAt"] = item["state"]["running"].get("startedAt")
            state["terminated"]["finishedAt"] = item["state"]["running"].get("startedAt")
        if state and item["name"] in result:
            result[item["name"]] = Seen(
                state, dict(item.get("lastState") or {}), item.get("restartCount", 0), item.get("imageID", "")
            )
    return result
