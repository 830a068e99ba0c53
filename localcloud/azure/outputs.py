"""What Azure answers beyond the inputs. Everything follows from the ID, so that a second look sees the same."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from localcloud.azure import types
from localcloud.azure.rules import TENANT, rule

KUBERNETES_PATCH = "0"  # of a version that the stack gives as MAJOR.MINOR


def outputs(
    token: str, id_: str, inputs: Mapping[str, Any], identities: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """All outputs of a resource that is there.

    `identities`: outputs of the user-assigned identities that there are, by ID in lower case.
    """
    kind = types.ResourceType(token)
    found = types.shaped(token, inputs)
    found |= {
        "name": str(inputs[rule(token).own_name]),
        "type": rule(token).arm_type,
        "azureApiVersion": kind.api_version,
    }
    if "provisioningState" in kind.outputs:
        found["provisioningState"] = "Succeeded"
    if "location" in found:
        found["location"] = str(found["location"]).lower().replace(" ", "")
    _identity(found, id_, identities)
    own = _OWN.get(token.partition(":")[2])
    return _merged(found, own(id_, found, inputs)) if own else found


def guid(*parts: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(parts).lower()))


def mark(id_: str, length: int = 8) -> str:
    """A short hash, as Azure adds it to names in DNS."""
    return hashlib.sha256(id_.lower().encode()).hexdigest()[:length]


def _merged(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        old = base.get(key)
        base[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return base


def _identity(found: dict[str, Any], id_: str, identities: Mapping[str, Mapping[str, Any]]) -> None:
    """Who a resource is in Entra: of its own, and of the identities that were assigned to it."""
    identity = found.get("identity")
    if not isinstance(identity, dict):
        return
    if "SystemAssigned" in str(identity.get("type", "")):
        identity |= {"principalId": guid("principal", id_), "tenantId": TENANT}
    for other, values in (identity.get("userAssignedIdentities") or {}).items():
        known = identities.get(other.lower(), {})
        values |= {key: known[key] for key in ("principalId", "clientId") if key in known}


def _user_assigned(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"principalId": guid("principal", id_), "clientId": guid("client", id_), "tenantId": TENANT}


def _cluster(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    location, host = found["location"], f"{inputs.get('dnsPrefix', found['name'])}-{mark(id_)}"
    access = inputs.get("apiServerAccessProfile") or {}
    private = bool(access.get("enablePrivateCluster"))
    more: dict[str, Any] = {
        "nodeResourceGroup": found.get("nodeResourceGroup")
        or f"MC_{inputs['resourceGroupName']}_{found['name']}_{location}"[:80],
        "currentKubernetesVersion": _version(inputs.get("kubernetesVersion")),
        "azurePortalFQDN": f"{host}.portal.hcp.{location}.azmk8s.io",
        "powerState": {"code": "Running"},
        "maxAgentPools": 100,
        "resourceUID": mark(f"uid/{id_}", 24),
        "agentPoolProfiles": [
            {**pool, **_pool(id_, pool, pool), "provisioningState": "Succeeded"}
            for pool in found.get("agentPoolProfiles", [])
        ],
    }  # fmt: skip
    if not private or access.get("enablePrivateClusterPublicFQDN", True):
        more["fqdn"] = f"{host}.hcp.{location}.azmk8s.io"
    if private:
        more["privateFQDN"] = f"{host}.{guid('zone', id_)}.privatelink.{location}.azmk8s.io"
    if (inputs.get("oidcIssuerProfile") or {}).get("enabled"):
        issuer = f"https://{location}.oic.prod-aks.azure.com/{TENANT}/{guid('issuer', id_)}/"
        more["oidcIssuerProfile"] = {"issuerURL": issuer}
    return more


def _pool(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "currentOrchestratorVersion": _version(inputs.get("orchestratorVersion")),
        "powerState": {"code": "Running"},
    }


def _version(text: Any) -> str:
    version = str(text or "1.33")
    return version if version.count(".") > 1 else f"{version}.{KUBERNETES_PATCH}"


def _registry(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"loginServer": f"{str(found['name']).lower()}.azurecr.io"}


def _account(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    services = ("blob", "dfs", "file", "queue", "table")
    return {
        "primaryEndpoints": {each: f"https://{found['name']}.{each}.core.windows.net/" for each in services},
        "primaryLocation": found["location"],
        "statusOfPrimary": "available",
    }


def _metrics(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    host = f"{found['name']}-{mark(id_, 4)}.{found['location']}.prometheus.monitor.azure.com"
    return {
        "accountId": guid("account", id_),
        "metrics": {"internalId": f"mac_{guid('mac', id_)}", "prometheusQueryEndpoint": f"https://{host}"},
    }


def _collection_endpoint(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    host = f"{found['name']}-{mark(id_, 4)}.{found['location']}-1"
    return {
        "immutableId": f"dce-{mark(id_, 32)}",
        "configurationAccess": {"endpoint": f"https://{host}.handler.control.monitor.azure.com"},
        "logsIngestion": {"endpoint": f"https://{host}.ingest.monitor.azure.com"},
        "metricsIngestion": {"endpoint": f"https://{host}.metrics.ingest.monitor.azure.com"},
    }


def _collection_rule(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"immutableId": f"dcr-{mark(id_, 32)}"}


def _workspace(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"customerId": guid("workspace", id_)}


def _grafana(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "properties": {
            "endpoint": f"https://{found['name']}-{mark(id_)}.grafana.azure.com",
            "provisioningState": "Succeeded",
        }
    }


def _network(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    subnets = [{**item, "id": f"{id_}/subnets/{item['name']}"} for item in found.get("subnets", [])]
    return {"resourceGuid": guid("network", id_), "subnets": subnets}


def _address(id_: str, found: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(id_.lower().encode()).digest()
    return {"ipAddress": f"198.18.{digest[0]}.{digest[1]}", "resourceGuid": guid("address", id_)}  # RFC 2544: nobody's


_OWN: dict[str, Callable[[str, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "managedidentity:UserAssignedIdentity": _user_assigned,
    "containerservice:ManagedCluster": _cluster,
    "containerservice:AgentPool": _pool,
    "containerregistry:Registry": _registry,
    "storage:StorageAccount": _account,
    "monitor:AzureMonitorWorkspace": _metrics,
    "monitor:DataCollectionEndpoint": _collection_endpoint,
    "monitor:DataCollectionRule": _collection_rule,
    "operationalinsights:Workspace": _workspace,
    "dashboard:Grafana": _grafana,
    "network:VirtualNetwork": _network,
    "network:PublicIPAddress": _address,
}
