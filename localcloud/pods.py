"""What befalls pods in tests and drills: they end with exit codes of one's choice, or are evicted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from localcloud.api import Api

POLL_SECONDS = 0.1


def pod_path(namespace: str, pod: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods/{pod}"


def finish(api: Api, namespace: str, pod: str, exit_codes: Mapping[str, int]) -> None:
    """End `pod` as a kubelet would report it when its containers left with `exit_codes`; those not named leave with 0.

    Init containers run one after the other: after one that failed, the containers have never started. (Later init
    containers stay as KWOK reported them, as ended: the API server lets no container that has ended be unstarted.)
    The pod must be bound to a node and have `restartPolicy: Never`, as a Job's with a pod failure policy has. In a
    control plane with `complete_jobs=False`: otherwise KWOK is faster. Raises ValueError for another restart policy,
    and for names that are no container of the pod.
    """
    found = api.get(pod_path(namespace, pod))
    spec, status = found["spec"], found["status"]
    if spec["restartPolicy"] != "Never":
        raise ValueError(f"pod {pod}: restartPolicy = {spec['restartPolicy']}: its containers would start again")
    first, then = spec.get("initContainers", []), spec["containers"]
    if unknown := set(exit_codes) - {container["name"] for container in [*first, *then]}:
        raise ValueError(f"pod {pod}: no container named {', '.join(sorted(unknown))}")

    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    started = status.get("startTime", now)
    reported = {item["name"]: item for item in status.get("initContainerStatuses", [])}
    init_statuses, failed = [], False
    for container in first:
        name = container["name"]
        code = exit_codes.get(name, 0)
        if failed:
            init_statuses.append(reported.get(name) or _waiting(container))
        else:
            init_statuses.append(_ended(container, code, started, now))
            failed = code != 0
    statuses = [
        _waiting(container) if failed else _ended(container, exit_codes.get(container["name"], 0), started, now)
        for container in then
    ]
    phase = "Failed" if any(exit_codes.values()) else "Succeeded"
    reason = "PodFailed" if phase == "Failed" else "PodCompleted"
    api.patch(
        f"{pod_path(namespace, pod)}/status",
        {
            "status": {
                "phase": phase,
                "startTime": started,
                "conditions": [
                    {"type": "Initialized", "status": "False" if failed else "True", "lastTransitionTime": now},
                    *(
                        {"type": kind, "status": "False", "reason": reason, "lastTransitionTime": now}
                        for kind in ("ContainersReady", "Ready")
                    ),
                ],
                "initContainerStatuses": init_statuses,
                "containerStatuses": statuses,
            }
        },
        "strategic",
    )


def _ended(container: dict[str, Any], code: int, started: str, now: str) -> dict[str, Any]:
    reason = "Error" if code else "Completed"
    terminated = {"exitCode": code, "reason": reason, "startedAt": started, "finishedAt": now}
    return _status(container, {"terminated": terminated})


def _waiting(container: dict[str, Any]) -> dict[str, Any]:
    return _status(container, {"waiting": {"reason": "PodInitializing"}})


def _status(container: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    names = {"name": container["name"], "image": container["image"], "imageID": ""}
    return {**names, "ready": False, "started": False, "restartCount": 0, "state": state}


def evict(api: Api, namespace: str, pod: str) -> None:
    """Ask the Eviction API to take `pod` away, as a drain does. Raises `ApiError` 429 where a PDB forbids it now."""
    api.post(
        f"{pod_path(namespace, pod)}/eviction",
        {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}},
    )


def wait_for(
    api: Api, path: str, predicate: Callable[[dict[str, Any]], object], seconds: float = 30.0
) -> dict[str, Any]:
    """The object (or list) at `path` once `predicate` holds for it; `{}` stands for an object that is not there.

    Raises TimeoutError with what it last looked like.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = api.find(path) or {}
        if predicate(found):
            return found
        if time.monotonic() > deadline:
            last = json.dumps(found.get("status", found))[:2000]
            raise TimeoutError(f"{path}: not as expected within {seconds:.0f} s; last seen: {last}")
        time.sleep(POLL_SECONDS)
