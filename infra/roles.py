"""Azure's built-in roles that the stack gives, by their fixed GUIDs, and the one way to give one."""

from __future__ import annotations

import pulumi
from pulumi_azure_native import authorization

from infra.names import role_assignment_name
from infra.place import Place

# learn.microsoft.com/azure/role-based-access-control/built-in-roles
ACR_PULL = "7f951dda-4ed3-4680-a7ca-43fe172d538d"
ACR_PUSH = "8311e382-0749-4cb8-b61a-304f252e45ec"
BLOB_DATA_CONTRIBUTOR = "ba92f5b4-2d11-453d-a403-e96b0029c9fe"
BLOB_DATA_READER = "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1"
CLUSTER_ADMIN = "b1ff04bb-8a4e-4dc4-8eb5-8693973ce19b"  # Azure Kubernetes Service RBAC Cluster Admin
MANAGED_IDENTITY_OPERATOR = "f1a07417-d97a-45cb-824c-7a7467783830"
MONITORING_DATA_READER = "b0d8363b-8ddd-447d-831f-62ca05bff136"
NETWORK_CONTRIBUTOR = "4d97b98b-1d4f-4787-a291-c67834d212e7"
GRAFANA_ADMIN = "22926164-76b3-42b3-bc55-97df8dab3e41"
PRIVATE_DNS_ZONE_CONTRIBUTOR = "b12aa53e-6015-4669-85d0-8515ebb3ae7f"


def grant(
    name: str,
    place: Place,
    *,
    role: str,
    scope: pulumi.Input[str],
    principal_id: pulumi.Input[str],
    opts: pulumi.ResourceOptions,
    principal_type: str = "ServicePrincipal",
    key: str,
) -> authorization.RoleAssignment:
    """Give `role` (a GUID from above) on `scope` to a principal.

    `key` says in words whom and on what: the assignment's GUID follows from it, so it is known at preview. The type of
    the principal is stated because Entra may not know a new identity yet (PrincipalNotFound).
    """
    return authorization.RoleAssignment(
        name,
        role_assignment_name=role_assignment_name(place.names.scope, place.names.prefix, key, role),
        principal_id=principal_id,
        principal_type=principal_type,
        role_definition_id=place.role(role),
        scope=scope,
        opts=opts,
    )
