"""What runs where in a local cloud's cluster."""

from __future__ import annotations

from localcloud.cloud import LocalCloud
from localcloud.pods import wait_for

UNSCHEDULED_SECONDS = 60.0


def placements(cloud: LocalCloud) -> dict[str, set[str]]:
    """The pools (`system` for the system pool) on which our pods are, by what made them: `engine`, `router`, ...

    Fails when a pod of ours has no node after a minute.
    """
    with cloud.control_plane.client() as api:
        wait_for(
            api,
            "/api/v1/pods",
            lambda found: all(pod["spec"].get("nodeName") for pod in found["items"]),
            UNSCHEDULED_SECONDS,
        )
        nodes = {node["metadata"]["name"]: node["metadata"]["labels"] for node in api.list("/api/v1/nodes")}
        found: dict[str, set[str]] = {}
        for pod in api.list("/api/v1/pods"):
            if pod["metadata"]["namespace"].startswith("drydock-"):
                pool = nodes[pod["spec"]["nodeName"]].get("drydock/pool", "system")
                found.setdefault(maker(pod), set()).add(pool)
    return found


def maker(pod: dict) -> str:
    """The name of what made a pod, without the hash that a Job's and a ReplicaSet's end in."""
    owner = pod["metadata"]["ownerReferences"][0]
    return owner["name"] if owner["kind"] == "DaemonSet" else owner["name"].rpartition("-")[0]


def gpu_nodes(cloud: LocalCloud) -> dict[str, str]:
    """The pool of each node with GPUs, by the node's name."""
    with cloud.control_plane.client() as api:
        nodes = api.list("/api/v1/nodes")
    return {
        node["metadata"]["name"]: node["metadata"]["labels"]["drydock/pool"]
        for node in nodes
        if "nvidia.com/gpu" in node["status"]["capacity"]
    }
