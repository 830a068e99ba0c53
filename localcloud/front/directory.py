"""Who and what there is in Azure, and who may do what there: its hosts look it up at every request."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

from localcloud.azure.world import Record, Resources, World

# learn.microsoft.com/azure/role-based-access-control/built-in-roles, as infra.roles has them
ACR_PULL = "7f951dda-4ed3-4680-a7ca-43fe172d538d"
ACR_PUSH = "8311e382-0749-4cb8-b61a-304f252e45ec"
BLOB_DATA_CONTRIBUTOR = "ba92f5b4-2d11-453d-a403-e96b0029c9fe"
BLOB_DATA_READER = "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1"

LOGIN, HUB = "login.microsoftonline.com", "huggingface.co"
BLOB_SUFFIX, REGISTRY_SUFFIX = ".blob.core.windows.net", ".azurecr.io"
_ASSIGNMENT = "/providers/microsoft.authorization/roleassignments/"


def hosts(world: World) -> list[str]:
    """Every name of Azure that pods may ask now."""
    directory = Directory(world)
    accounts = [f"{_name(record)}{BLOB_SUFFIX}" for record in directory.of("storage:StorageAccount")]
    registries = [f"{_name(record)}{REGISTRY_SUFFIX}" for record in directory.of("containerregistry:Registry")]
    return [LOGIN, HUB, *sorted(accounts), *sorted(registries)]


class Directory:
    """Looks into the world without waiting for whoever holds it: its file is always whole."""

    def __init__(self, world: World) -> None:
        self._file = world.folder / "resources.json"
        self._read: tuple[tuple[int, int], Resources] = ((0, 0), Resources({}))

    def of(self, kind: str) -> list[Record]:
        """`kind` is MODULE:TYPE."""
        return self._resources().of(f"azure-native:{kind}")

    def identity(self, client_id: str) -> Record | None:
        """The user-assigned identity with this client ID."""
        identities = self.of("managedidentity:UserAssignedIdentity")
        return next((each for each in identities if each.outputs["clientId"] == client_id.lower()), None)

    def federated_credentials(self, identity: Record) -> list[Record]:
        inside = f"{identity.id}/".lower()
        credentials = self.of("managedidentity:FederatedIdentityCredential")
        return [record for record in credentials if record.id.lower().startswith(inside)]

    def issuers(self) -> set[str]:
        """Whose service account tokens Azure's clusters say theirs are."""
        profiles = [
            record.outputs.get("oidcIssuerProfile") or {} for record in self.of("containerservice:ManagedCluster")
        ]
        return {profile["issuerURL"] for profile in profiles if "issuerURL" in profile}

    def account(self, name: str) -> Record | None:
        return _named(name, self.of("storage:StorageAccount"))

    def container(self, account: Record, name: str) -> Record | None:
        return self._resources().get(container_id(account, name))

    def registry(self, name: str) -> Record | None:
        return _named(name, self.of("containerregistry:Registry"))

    def allowed(self, principal: str, roles: Collection[str], id_: str) -> bool:
        """Whether the principal (an object ID) has one of `roles` on the resource, or on what it is in."""
        for record in self.of("authorization:RoleAssignment"):
            scope = record.id.lower().partition(_ASSIGNMENT)[0]
            if (
                record.inputs["principalId"].lower() == principal.lower()
                and record.inputs["roleDefinitionId"].rpartition("/")[2].lower() in roles
                and f"{id_}/".lower().startswith(f"{scope}/")
            ):
                return True
        return False

    def _resources(self) -> Resources:
        try:
            status = self._file.stat()
        except FileNotFoundError:
            return Resources({})
        version = (status.st_mtime_ns, status.st_ino)
        if self._read[0] != version:
            records = {key: Record(**value) for key, value in json.loads(self._file.read_text()).items()}
            self._read = version, Resources(records)
        return self._read[1]


def container_id(account: Record, name: str) -> str:
    return f"{account.id}/blobServices/default/containers/{name}"


def _name(record: Record) -> str:
    """As it is in DNS."""
    return record.id.rpartition("/")[2].lower()


def _named(name: str, records: Iterable[Record]) -> Record | None:
    return next((record for record in records if _name(record) == name), None)
