"""The storage account: datasets, models, checkpoints, reports, compiled graphs, reached by Entra identities alone."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
from pulumi_azure_native import storage

from infra.place import Place
from infra.roles import BLOB_DATA_CONTRIBUTOR, grant
from infra.settings import Retention

DATASETS, MODELS, CHECKPOINTS, REPORTS, COMPILED = CONTAINERS = (
    "datasets",
    "models",
    "checkpoints",
    "reports",
    "compiled",
)
# What KAITO tunes on and what it made, where it does (`Place.kaito_tunes`): its pods see nothing else of the account.
KAITO = "kaito"
KAITO_DATA, KAITO_OUT = "data", "out"  # folders of it
COMPILED_DAYS = 365  # some 100 MB for each image and setting that ever served; one that still does compiles again then


@dataclass(frozen=True)
class StorageArgs:
    """`zones`: whether the environment spreads over availability zones."""

    place: Place
    retention: Retention
    zones: bool


class Storage(pulumi.ComponentResource):
    """The account, its containers, how long deleted data stays, and the administrators' access."""

    id: pulumi.Output[str]
    name: pulumi.Output[str]
    container_ids: dict[str, pulumi.Output[str]]

    def __init__(self, name: str, args: StorageArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Storage", name, None, opts)
        place, days = args.place, args.retention.deleted_days
        child = pulumi.ResourceOptions(parent=self)
        kept = pulumi.ResourceOptions(parent=self, protect=place.protect)
        account = storage.StorageAccount(
            f"{name}-account",
            account_name=place.names.unique("st"),
            resource_group_name=place.group,
            location=place.location,
            kind="StorageV2",
            # Not geo-redundant: base models can be fetched again, and datasets lie beside the code that declares them.
            sku=storage.SkuArgs(name="Standard_ZRS" if args.zones else "Standard_LRS"),
            allow_shared_key_access=False,  # a key opens everything and names nobody
            default_to_o_auth_authentication=True,  # the portal, too, signs in by Entra
            allow_blob_public_access=False,
            allow_cross_tenant_replication=False,
            is_local_user_enabled=False,  # SFTP users have passwords
            minimum_tls_version="TLS1_2",  # the default still is 1.0
            enable_https_traffic_only=True,
            # Public: the deployer uploads from outside, and every request carries an Entra token.
            public_network_access="Disabled" if place.private else "Enabled",
            network_rule_set=storage.NetworkRuleSetArgs(
                default_action="Deny" if place.private else "Allow",
                bypass="None",  # no service of Azure has business in here
            ),
            opts=kept,
        )
        service = storage.BlobServiceProperties(
            f"{name}-blobs",
            blob_services_name="default",
            account_name=account.name,
            resource_group_name=place.group,
            is_versioning_enabled=True,  # an overwritten blob can be brought back
            delete_retention_policy=storage.DeleteRetentionPolicyArgs(enabled=True, days=days),
            container_delete_retention_policy=storage.DeleteRetentionPolicyArgs(enabled=True, days=days),
            opts=child,
        )
        names = (*CONTAINERS, KAITO) if place.kaito_tunes else CONTAINERS
        made_by_kaito = [f"{KAITO}/{KAITO_OUT}/"] if place.kaito_tunes else []
        containers = {
            container: storage.BlobContainer(
                f"{name}-{container}",
                container_name=container,
                account_name=account.name,
                resource_group_name=place.group,
                public_access=storage.PublicAccess.NONE,
                # After the service's properties: nothing is written before versions are kept. What comes again may go.
                opts=pulumi.ResourceOptions(
                    parent=self,
                    depends_on=[service],
                    protect=place.protect and container not in (CHECKPOINTS, COMPILED),
                ),
            )
            for container in names
        }
        storage.ManagementPolicy(
            f"{name}-lifecycle",
            management_policy_name="default",
            account_name=account.name,
            resource_group_name=place.group,
            policy=storage.ManagementPolicySchemaArgs(
                rules=[
                    *(
                        _rule(
                            f"old-{container}",
                            prefixes=prefixes,
                            actions=storage.ManagementPolicyActionArgs(
                                base_blob=storage.ManagementPolicyBaseBlobArgs(
                                    delete=storage.DateAfterModificationArgs(
                                        days_after_modification_greater_than=kept_days
                                    )
                                )
                            ),
                        )
                        for container, prefixes, kept_days in (
                            (CHECKPOINTS, [f"{CHECKPOINTS}/", *made_by_kaito], args.retention.checkpoint_days),
                            (COMPILED, [f"{COMPILED}/"], COMPILED_DAYS),
                        )
                    ),
                    # With versioning on, what is deleted or overwritten becomes an old version and would stay for ever.
                    _rule(
                        "old-versions",
                        prefixes=[f"{container}/" for container in names],
                        actions=storage.ManagementPolicyActionArgs(
                            version=storage.ManagementPolicyVersionArgs(
                                delete=storage.DateAfterCreationArgs(days_after_creation_greater_than=days)
                            )
                        ),
                    ),
                ]
            ),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[service]),
        )
        grant(
            f"{name}-admin",
            place,
            role=BLOB_DATA_CONTRIBUTOR,
            scope=account.id,
            principal_id=place.admin_id,
            principal_type=place.admin_type,
            key="admin writes the storage account",
            opts=child,
        )
        self.id = account.id
        self.name = account.name
        self.container_ids = {container: resource.id for container, resource in containers.items()}
        self.register_outputs({"id": self.id, "name": self.name, "container_ids": self.container_ids})


def _rule(
    name: str, *, prefixes: list[str], actions: storage.ManagementPolicyActionArgs
) -> storage.ManagementPolicyRuleArgs:
    return storage.ManagementPolicyRuleArgs(
        name=name,
        type="Lifecycle",
        enabled=True,
        definition=storage.ManagementPolicyDefinitionArgs(
            filters=storage.ManagementPolicyFilterArgs(blob_types=["blockBlob"], prefix_match=prefixes),
            actions=actions,
        ),
    )
