"""What a pod is given before it runs: AKS's workload identity, and this machine's way to Azure's names."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.identities import AUDIENCE
from localcloud.api import Api
from localcloud.azure.rules import TENANT
from localcloud.front.directory import REGISTRY_SUFFIX
from localcloud.live.places import AZURE_ADDRESS, REGISTRY_ADDRESS, TRUST

# azure.github.io/azure-workload-identity/docs/topics/service-account-labels-and-annotations.html
USE, CLIENT_ID, TENANT_ID = (f"azure.workload.identity/{name}" for name in ("use", "client-id", "tenant-id"))
TOKENS = "/var/run/secrets/azure/tokens"
TOKEN_VOLUME = TOKEN_FILE = "azure-identity-token"
TOKEN_SECONDS = 3600
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"  # where Debian has them, and who is built for it looks


class Dresser:
    """Changes pods as the workload identity webhook of AKS does, and lets all of them trust this machine's authority.

    `bundle`: the certificates that pods trust. `nodes`: the runner's folder with the nodes' disks. `hosts`: the names
    of Azure that there are now.
    """

    def __init__(self, api: Api, nodes: Path, bundle: Path, hosts: Callable[[], Sequence[str]]) -> None:
        self._api, self._nodes, self._bundle, self._hosts = api, nodes, bundle, hosts

    def __call__(self, pod: dict[str, Any]) -> dict[str, Any]:
        """A changed copy of `pod`, which has a node. Raises `ApiError`."""
        pod = copy.deepcopy(pod)
        disk = self._nodes / pod["spec"]["nodeName"] / TRUST
        disk.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._bundle, disk)
        _volume(pod, {"name": "drydock-local-trust", "hostPath": {"path": f"/{TRUST}", "type": "File"}}, AUTHORITIES)
        _variables(pod, {"SSL_CERT_FILE": AUTHORITIES, "REQUESTS_CA_BUNDLE": AUTHORITIES})
        pod["spec"].setdefault("hostAliases", []).extend(_aliases(self._hosts()))
        if (pod["metadata"].get("labels") or {}).get(USE) == "true":
            self._identify(pod)
        return pod

    def _identify(self, pod: dict[str, Any]) -> None:
        namespace, name = pod["metadata"]["namespace"], pod["spec"].get("serviceAccountName", "default")
        account = self._api.get(f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}")
        said = account["metadata"].get("annotations") or {}
        client = {"AZURE_CLIENT_ID": said[CLIENT_ID]} if CLIENT_ID in said else {}
        _variables(
            pod,
            {
                **client,
                "AZURE_TENANT_ID": said.get(TENANT_ID, TENANT),
                "AZURE_FEDERATED_TOKEN_FILE": f"{TOKENS}/{TOKEN_FILE}",
                "AZURE_AUTHORITY_HOST": "https://login.microsoftonline.com/",
            },
        )
        token = {"path": TOKEN_FILE, "expirationSeconds": TOKEN_SECONDS, "audience": AUDIENCE}
        _volume(pod, {"name": TOKEN_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}}, TOKENS)


def _aliases(names: Sequence[str]) -> list[dict[str, Any]]:
    registries = [name for name in names if name.endswith(REGISTRY_SUFFIX)]
    others = [name for name in names if name not in registries]
    lead = {AZURE_ADDRESS: others, REGISTRY_ADDRESS: registries}
    return [{"ip": address, "hostnames": found} for address, found in lead.items() if found]


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def _volume(pod: dict[str, Any], volume: dict[str, Any], path: str) -> None:
    pod["spec"].setdefault("volumes", []).append(volume)
    for container in _containers(pod):
        mounts = container.setdefault("volumeMounts", [])
        mounts.append({"name": volume["name"], "mountPath": path, "readOnly": True})


def _variables(pod: dict[str, Any], values: dict[str, str]) -> None:
    """First, so that the pod's own may refer to them; what the pod says itself stays."""
    for container in _containers(pod):
        own = container.setdefault("env", [])
        known = {item["name"] for item in own}
        own[:0] = [{"name": name, "value": value} for name, value in values.items() if name not in known]
