"""Names of Azure resources: readable where Azure lets them be, unique in the world where it wants them so."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass

POOL_NAME_LIMIT = 12  # AKS: lower-case letters and digits, a Linux pool at most 12 of them

# Fixed so that the name of a role assignment follows from what it says: moved code never makes it anew.
_ROLE_NAMESPACE = uuid.UUID("6f1d7d9e-52a1-4b4e-9f0c-0d5a3c1c7b10")


@dataclass(frozen=True)
class Names:
    """Names below one `prefix` (project and environment), such as `drydock-dev`."""

    organization: str
    subscription: str
    prefix: str

    @property
    def scope(self) -> str:
        """Whose names these are. The organisation alone says little: without Pulumi Cloud it is `organization`."""
        return f"{self.organization}/{self.subscription.lower()}"

    def of(self, kind: str) -> str:
        """`drydock-dev-aks`: for names that must be unique in their resource group only."""
        return f"{self.prefix}-{kind}"

    def unique(self, kind: str, limit: int = 24) -> str:
        """`drydockdevst1a2b3c4d`: letters and digits only, for names that must be unique in all of Azure.

        Storage accounts want 3 to 24 of them, registries 5 to 50. The last eight are a hash of organisation,
        subscription and prefix: two teams with the same names do not meet, and one environment finds its own again.
        """
        mark = hashlib.sha256(f"{self.scope}/{self.prefix}".encode()).hexdigest()[:8]
        letters = "".join(character for character in self.prefix if character.isalnum())
        return f"{letters[: limit - len(kind) - len(mark)]}{kind}{mark}"


def pool_name(name: str, *immutable: object) -> str:
    """`a1003f2a`: the pool's name with a hash of what AKS cannot change in place.

    Another VM size is thus another pool, made before the old one goes (pulumi-azure-native #959, #2462).
    """
    mark = hashlib.sha256(repr(immutable).encode()).hexdigest()[:4]
    return f"{name[: POOL_NAME_LIMIT - len(mark)]}{mark}"


def role_assignment_name(*parts: str) -> str:
    """The GUID of a role assignment, the same for the same scope, principal and role."""
    return str(uuid.uuid5(_ROLE_NAMESPACE, "/".join(parts)))
