"""Keeps the nodes of the runner Ready, as their kubelets would: conditions and leases."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from localcloud.api import Api
from localcloud.runner.events import now

LEASE_SECONDS = 40  # a kubelet's; renewed each quarter of it
ANNOTATION = "drydock.local/runner"  # with the value `true`: the runner is the kubelet of this node
GOOD = {
    "Ready": ("True", "KubeletReady", "the runner takes pods"),
    "MemoryPressure": ("False", "KubeletHasSufficientMemory", "not measured"),
    "DiskPressure": ("False", "KubeletHasNoDiskPressure", "not measured"),
    "PIDPressure": ("False", "KubeletHasSufficientPID", "not measured"),
}


def keep_ready(api: Api, node: Mapping[str, Any], kubelet_port: int = 0) -> None:
    """Renew the lease of `node`, and say that it is Ready and where its kubelet listens where it does not say so."""
    name = node["metadata"]["name"]
    if not is_ready(node, kubelet_port):
        conditions = [
            {"type": kind, "status": status, "reason": reason, "message": message, "lastHeartbeatTime": now(),
             "lastTransitionTime": now()}
            for kind, (status, reason, message) in GOOD.items()
        ]  # fmt: skip
        endpoints = {"kubeletEndpoint": {"Port": kubelet_port}}
        status = {"conditions": conditions, "daemonEndpoints": endpoints}
        api.patch(f"/api/v1/nodes/{name}/status", {"status": status}, "strategic")
    owner = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node["metadata"]["uid"]}
    api.apply(
        {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name, "namespace": "kube-node-lease", "ownerReferences": [owner]},
            "spec": {
                "holderIdentity": name,
                "leaseDurationSeconds": LEASE_SECONDS,
                "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            },
        }
    )


def is_ready(node: Mapping[str, Any], kubelet_port: int = 0) -> bool:
    """Whether it says all that `keep_ready` has it say."""
    status = node.get("status", {})
    given = {item["type"]: item["status"] for item in status.get("conditions", [])}
    port = status.get("daemonEndpoints", {}).get("kubeletEndpoint", {}).get("Port", 0)  # 0: none
    return port == kubelet_port and all(given.get(kind) == status for kind, (status, _, _) in GOOD.items())


def address(node: Mapping[str, Any]) -> str:
    """The node's own address, empty where it has none."""
    found = (item["address"] for item in node["status"].get("addresses", []) if item["type"] == "InternalIP")
    return next(found, "")
