"""The Entra identity of this process, and what azure-identity says when it has none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from azure.identity import DefaultAzureCredential, WorkloadIdentityCredential


def entra_credential() -> DefaultAzureCredential | WorkloadIdentityCredential:
    """The pod's workload identity, or whatever a person is signed in with (az login, environment).

    Raises ValueError where workload identity is only half set up.
    """
    from azure.identity import DefaultAzureCredential, WorkloadIdentityCredential  # half a second to import

    # In a pod only the identity it was given: the default chain would go on to the node's, and list nine classes.
    if os.environ.get("AZURE_FEDERATED_TOKEN_FILE"):
        return WorkloadIdentityCredential()
    return DefaultAzureCredential()


def passing(error: Exception) -> bool:
    """Whether Entra could not answer, and did not refuse: azure-identity has one class for both."""
    status = getattr(error, "status_code", None) or 0
    return status in (408, 429) or status >= 500


def first_line(error: Exception) -> str:
    """What `error` says, without the further lines of request ids and advice that Azure's SDKs add."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
