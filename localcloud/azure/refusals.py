"""What keeps Azure from doing what it is asked: missing parents and references, taken names, things in use, quota."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.catalog import SKUS
from localcloud.azure.errors import AzureError
from localcloud.azure.rules import parent_of, rule, type_of
from localcloud.azure.world import Record, Resources, references

ASSIGNMENT = "azure-native:authorization:RoleAssignment"
NETWORK = "azure-native:network:VirtualNetwork"
POOL = "azure-native:containerservice:AgentPool"


def put(resources: Resources, token: str, id_: str, inputs: Mapping[str, Any]) -> None:
    """Raise `AzureError` where this resource cannot be made, or changed to `inputs`."""
    parent = parent_of(id_)
    if parent and not resources.exists(parent):
        raise _missing_parent(id_, parent)
    for other in references({key: value for key, value in inputs.items() if key not in ("scope", "resourceUri")}):
        if not resources.exists(other):
            raise AzureError(
                400,
                "InvalidResourceReference",
                f"Resource {other} referenced by resource {id_} was not found. Please make sure that the referenced "
                "resource exists, and that both resources are in the same region.",
            )
    _taken(resources, token, id_)
    if token == ASSIGNMENT:
        _assignment(resources, id_, inputs)
    elif token == POOL:
        _pool(resources, parent, inputs)
    elif token == NETWORK:
        _removed_subnets(resources, id_, inputs)


def delete(resources: Resources, record: Record) -> None:
    """Raise `AzureError` where the resource cannot be deleted yet."""
    held = rule(record.token).held
    if not held:
        return
    code, why = held
    if why == "children":
        users = [other.id for other in resources.all() if other.id.lower().startswith(f"{record.id.lower()}/")]
    else:
        users = [other.id for other in resources.users(f"{record.id}/subnets" if why == "subnets" else record.id)]
        users = [id_ for id_ in users if not id_.lower().startswith(f"{record.id.lower()}/")]
    if users:
        raise AzureError(400, code, f"{record.id} is in use by {users[0]} and cannot be deleted: delete that before.")


def conflict(id_: str) -> AzureError:
    return AzureError(
        409, "Conflict", f"Another operation on {id_} is in progress, or changed it in the meantime; try again later."
    )


def not_found(kind: str, name: str, group: str) -> AzureError:
    return AzureError(
        404,
        "ResourceNotFound",
        f"The Resource '{kind}/{name}' under resource group '{group}' was not found. For more details please go to "
        "https://aka.ms/ARMResourceNotFoundFix",
    )


def quota(token: str, id_: str, inputs: Mapping[str, Any]) -> AzureError:
    """learn.microsoft.com/troubleshoot/azure/azure-kubernetes, code InsufficientVCPUQuota; else the general one."""
    pools = [inputs, *(inputs.get("agentPoolProfiles") or [])]
    size = next((pool["vmSize"] for pool in pools if pool.get("vmSize")), None)
    if size is None:
        return AzureError(409, "QuotaExceeded", f"The subscription has reached its quota of {type_of(id_)}.")
    known = SKUS.get(size)
    family = known.quota_family if known else f"standard{str(size).removeprefix('Standard_')}Family"
    return AzureError(
        400,
        "ErrCode_InsufficientVCPUQuota",
        f"Insufficient vcpu quota requested {known.vcpus if known else 4}, remaining 0 for family {family} of {size}. "
        "If you want to increase the quota, please follow this instruction: "
        "https://learn.microsoft.com/en-us/azure/quotas/view-quotas.",
    )


def _missing_parent(id_: str, parent: str) -> AzureError:
    name = parent.rpartition("/")[2]
    if "/providers/" not in parent:
        return AzureError(404, "ResourceGroupNotFound", f"Resource group '{name}' could not be found.")
    if id_.rpartition("/providers/")[0].lower() == parent.lower():  # an extension of something that is not there
        return not_found(type_of(parent), name, parent.split("/")[4])
    return AzureError(
        404,
        "ParentResourceNotFound",
        f"Failed to perform 'write' on resource(s) of type '{type_of(id_)}', because the parent resource '{parent}' "
        "could not be found.",
    )


def _taken(resources: Resources, token: str, id_: str) -> None:
    worldwide = rule(token).worldwide
    if not worldwide:
        return
    code, message = worldwide
    name = id_.rpartition("/")[2]
    for record in resources.of(token):
        if record.id.lower() != id_.lower() and record.id.rpartition("/")[2].lower() == name.lower():
            raise AzureError(409, code, message.format(name=name))


def _assignment(resources: Resources, id_: str, inputs: Mapping[str, Any]) -> None:
    what = ("scope", "principalId", "roleDefinitionId")
    for record in resources.of(ASSIGNMENT):
        if record.id.lower() == id_.lower():
            continue
        if all(str(record.inputs.get(key)).lower() == str(inputs.get(key)).lower() for key in what):
            raise AzureError(409, "RoleAssignmentExists", "The role assignment already exists.")
        if record.id.rpartition("/")[2].lower() == id_.rpartition("/")[2].lower():  # a GUID is one in the whole tenant
            raise AzureError(
                400,
                "RoleAssignmentUpdateNotPermitted",
                "Tenant ID, application ID, principal ID, and scope are not allowed to be updated.",
            )


def _pool(resources: Resources, parent: str, inputs: Mapping[str, Any]) -> None:
    """Nodes may not be newer than their control plane."""
    cluster = resources.get(parent)
    wanted = inputs.get("orchestratorVersion")
    has = cluster.inputs.get("kubernetesVersion") if cluster else None
    if wanted and has and _minor(wanted) > _minor(has):
        raise AzureError(
            400,
            "NodePoolMcVersionIncompatible",
            f"Node pool version {wanted} and control plane version {has} are incompatible. Minor version of node pool "
            "cannot be bigger than control plane version.",
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor, *_ = [int(part) for part in str(version).split(".")]
    return major, minor


def _removed_subnets(resources: Resources, id_: str, inputs: Mapping[str, Any]) -> None:
    before = resources.get(id_)
    wanted = [subnet.get("name") for subnet in inputs.get("subnets", [])]
    for subnet in before.inputs.get("subnets", []) if before else []:
        if subnet["name"] in wanted:
            continue
        place = f"{id_}/subnets/{subnet['name']}"
        users = [other.id for other in resources.users(place) if not other.id.lower().startswith(f"{id_.lower()}/")]
        if users:
            raise AzureError(
                400,
                "InUseSubnetCannotBeDeleted",
                f"Subnet {subnet['name']} is in use by {users[0]} and cannot be deleted. In order to delete the "
                "subnet, delete all the resources within the subnet.",
            )
