"""Where the components of one environment are put: told to each of them, read by none from the configuration."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi

from infra.names import Names


@dataclass(frozen=True)
class Place:
    """Names, region, resource group and tenant of an environment."""

    names: Names
    location: str
    group: pulumi.Input[str]  # name of the resource group
    group_id: pulumi.Input[str]
    subscription_id: pulumi.Input[str]
    tenant_id: pulumi.Input[str]
    admin_id: pulumi.Input[str]  # object ID of the Entra group, or of the deployer, that administers cluster and data
    admin_type: str  # "Group", "User" or "ServicePrincipal"
    protect: bool  # whether what holds data refuses to be deleted
    private: bool  # whether registry, storage and API server answer inside the virtual network alone
    kaito: bool = False  # whether the cluster has AKS's AI toolchain operator
    kaito_tunes: bool = False  # whether adapters are tuned by it, which mounts its data from Blob

    def role(self, guid: str) -> pulumi.Output[str]:
        """The resource ID of the built-in role with this GUID (`infra.roles`)."""
        return pulumi.Output.format(
            "/subscriptions/{0}/providers/Microsoft.Authorization/roleDefinitions/{1}", self.subscription_id, guid
        )
