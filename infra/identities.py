"""The workloads' identities: who each pod is towards Azure, and the least that it may do there."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
from pulumi_azure_native import managedidentity

from infra.place import Place
from infra.registry import Registry
from infra.roles import ACR_PULL, ACR_PUSH, BLOB_DATA_CONTRIBUTOR, BLOB_DATA_READER, MONITORING_DATA_READER, grant
from infra.storage import CHECKPOINTS, COMPILED, DATASETS, KAITO, MODELS, REPORTS, Storage

AUDIENCE = "api://AzureADTokenExchange"  # the one that AKS puts into service account tokens for Entra

# Namespace and name of the service account that is each identity.
SERVICE_ACCOUNTS = {
    "tuning": ("drydock-tuning", "tuning"),
    "mirror": ("drydock-tuning", "mirror"),
    "serving": ("drydock-serving", "serving"),
    "stress": ("drydock-serving", "stress"),
    "keda": ("kube-system", "keda-operator"),  # AKS's own, of the KEDA add-on
    "compiler": ("drydock-serving", "compiler"),
}
# Where KAITO tunes (`Place.kaito_tunes`): its pods have the default account of their namespace, by which Blob is
# mounted for them, and who makes its Workspaces and waits for them has another.
KAITO_TUNING = "drydock-kaito-tuning"
KAITO_ACCOUNT, CONDUCTOR = "default", "conductor"


@dataclass(frozen=True)
class IdentitiesArgs:
    """`issuer_url`: of the cluster's service account tokens; `workspace_id`: the Azure Monitor workspace."""

    place: Place
    issuer_url: pulumi.Input[str]
    registry: Registry
    storage: Storage
    workspace_id: pulumi.Input[str]


@dataclass(frozen=True)
class Identity:
    """`client_id` goes into the service account's annotation, `principal_id` into role assignments."""

    client_id: pulumi.Output[str]
    principal_id: pulumi.Output[str]


@dataclass(frozen=True)
class _Role:
    role: str
    scope: pulumi.Input[str]
    verb: str  # what it allows, in words: part of the assignment's name


class Identities(pulumi.ComponentResource):
    """One user-assigned identity for each service account, its federated credential and its roles."""

    tuning: Identity
    mirror: Identity
    serving: Identity
    stress: Identity
    keda: Identity
    compiler: Identity
    kaito: Identity | None
    """Of KAITO's pods that tune, where it does."""

    def __init__(self, name: str, args: IdentitiesArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Identities", name, None, opts)
        place, containers = args.place, args.storage.container_ids
        roles = {
            "tuning": [
                _Role(BLOB_DATA_READER, containers[DATASETS], "reads datasets"),
                _Role(BLOB_DATA_READER, containers[MODELS], "reads models"),
                _Role(BLOB_DATA_CONTRIBUTOR, containers[CHECKPOINTS], "writes checkpoints"),
                _Role(ACR_PUSH, args.registry.id, "pushes adapters"),  # pulling is part of it
            ],
            "mirror": [_Role(BLOB_DATA_CONTRIBUTOR, containers[MODELS], "writes models")],
            "serving": [
                _Role(BLOB_DATA_READER, containers[MODELS], "reads models"),
                # Code that every replica runs: who serves must not write it.
                _Role(BLOB_DATA_READER, containers[COMPILED], "reads compiled graphs"),
                _Role(ACR_PULL, args.registry.id, "pulls adapters"),
            ],
            "stress": [
                _Role(BLOB_DATA_READER, containers[DATASETS], "reads datasets"),
                _Role(BLOB_DATA_CONTRIBUTOR, containers[REPORTS], "writes reports"),
            ],
            "keda": [_Role(MONITORING_DATA_READER, args.workspace_id, "reads metrics")],
            "compiler": [
                _Role(BLOB_DATA_READER, containers[MODELS], "reads models"),
                _Role(BLOB_DATA_CONTRIBUTOR, containers[COMPILED], "writes compiled graphs"),
            ],
        }
        accounts, further = dict(SERVICE_ACCOUNTS), dict[str, str]()
        if place.kaito_tunes:
            accounts["kaito"], further["kaito"] = (KAITO_TUNING, KAITO_ACCOUNT), CONDUCTOR
            roles["kaito"] = [_Role(BLOB_DATA_CONTRIBUTOR, containers[KAITO], "writes what it tunes")]
            roles["tuning"].append(_Role(BLOB_DATA_READER, containers[KAITO], "reads what KAITO tuned"))
        child = pulumi.ResourceOptions(parent=self)
        found: dict[str, Identity] = {}
        before: list[pulumi.Resource] = []
        for who, (namespace, service_account) in accounts.items():
            identity = managedidentity.UserAssignedIdentity(
                f"{name}-{who}",
                resource_name_=place.names.of(who),
                resource_group_name=place.group,
                location=place.location,
                opts=child,
            )
            for account in (service_account, *([further[who]] if who in further else [])):
                suffix = "" if account == service_account else f"-{account}"
                credential = managedidentity.FederatedIdentityCredential(
                    f"{name}-{who}-kubernetes{suffix}",
                    federated_identity_credential_resource_name=f"kubernetes{suffix}",
                    resource_name_=identity.name,
                    resource_group_name=place.group,
                    issuer=args.issuer_url,
                    subject=f"system:serviceaccount:{namespace}:{account}",
                    audiences=[AUDIENCE],
                    # One after the other: Azure answers 409 to concurrent writes (pulumi-azure-native #4343).
                    opts=pulumi.ResourceOptions(parent=self, depends_on=before),
                )
                before = [credential]
            for item in roles[who]:
                grant(
                    f"{name}-{who}-{item.verb.replace(' ', '-')}",
                    place,
                    role=item.role,
                    scope=item.scope,
                    principal_id=identity.principal_id,
                    key=f"{who} {item.verb}",
                    opts=child,
                )
            found[who] = Identity(identity.client_id, identity.principal_id)
        self.tuning, self.mirror = found["tuning"], found["mirror"]
        self.serving, self.stress, self.keda = found["serving"], found["stress"], found["keda"]
        self.compiler, self.kaito = found["compiler"], found.get("kaito")
        self.register_outputs({who: identity.client_id for who, identity in found.items()})
