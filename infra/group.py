"""The resource group of an environment, and with it the place where everything else is put."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pulumi
from pulumi_azure_native import authorization, resources

from infra.names import Names
from infra.place import Place
from infra.settings import Environment
from infra.tags import tag_everything


def prepare(env: Environment, *, organization: str, stack: str, location: str) -> Place:
    """The resource group of an environment, and the place in it; from here on, everything gets its tags."""
    deployer = authorization.get_client_config()
    names = Names(organization, deployer.subscription_id, f"{env.name}-{stack}")
    tag_everything({"project": env.name, "environment": stack, "owner": env.owner, "managed-by": "pulumi", **env.tags})
    group = resources.ResourceGroup(
        "group",
        resource_group_name=names.of("rg"),
        location=location,
        opts=pulumi.ResourceOptions(protect=env.protect),
    )
    return Place(
        names=names,
        location=location,
        group=group.name,
        group_id=group.id,
        subscription_id=deployer.subscription_id,
        tenant_id=deployer.tenant_id,
        admin_id=env.cluster.admin_group_id or deployer.object_id,
        admin_type="Group" if env.cluster.admin_group_id else _deployer_type(os.environ),
        protect=env.protect,
        private=env.network.private,
        kaito=env.kaito,
        kaito_tunes=env.tuning.runtime == "kaito",
    )


def _deployer_type(environment: Mapping[str, str]) -> str:
    """What the Azure provider signs in as: a service principal when its variables say so, else the `az login` user."""
    return "ServicePrincipal" if environment.get("ARM_CLIENT_ID") or environment.get("ARM_USE_MSI") else "User"
