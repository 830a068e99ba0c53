"""Sign-in to Azure Container Registry with an Entra identity, so that no registry password exists anywhere.

Protocol: docs/AAD-OAuth.md of github.com/Azure/acr. An Entra token becomes the registry's refresh token (about three
hours), and that one a bearer token for the scope that the registry asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import SplitResult

import requests

from artifacts.store import StoreError
from common.identity import entra_credential, first_line, passing

# The registry's own audience: tokens for Azure Resource Manager are refused where "authentication as ARM" is off.
AUDIENCE = "https://containerregistry.azure.net/.default"

Post = Callable[[str, Mapping[str, str | Sequence[str]]], requests.Response]  # path and form fields, to the registry


class Unreachable(Exception):
    """Entra gave no answer; another attempt may get one."""


class Credential(Protocol):
    """What is used of azure-identity's credentials."""

    def get_token(self, *scopes: str) -> Any: ...


class EntraSignIn:
    """Bearer tokens of the registry at `host` for the identity that runs this process."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._credential: Credential | None = None
        self._refresh_token: str | None = None

    def answers(self, realm: SplitResult) -> bool:
        """Whether a challenge with this realm is for Entra: the registry itself hands out tokens at /oauth2/token.

        At another host's word no Entra token is sent anywhere. A host that is not Azure's is believed only where an
        identity was configured on purpose, as AKS does in a pod.
        """
        known = self._host.endswith(".azurecr.io") or "AZURE_FEDERATED_TOKEN_FILE" in os.environ
        return known and realm.netloc == self._host and realm.path == "/oauth2/token"

    def bearer(self, post: Post, service: str, scope: str, method: str) -> str:
        """A bearer token for `scope`; raises `StoreError` that names the role which `method` needs, `Unreachable`."""
        fresh = self._refresh_token is None
        answer = self._ask_token(post, service, scope, method)
        if not answer.ok and not fresh:  # it ended, or knows nothing of a role that was granted since
            self.forget()
            answer = self._ask_token(post, service, scope, method)
        return self._taken(answer, "access_token", method, scope)

    def forget(self) -> None:
        """Begin anew with the next sign-in: the registry's tokens carry the roles of the time they were made."""
        self._refresh_token = None

    def lacking(self, method: str, scope: str) -> str:
        """What to grant to whom, for the request that was refused."""
        client = os.environ.get("AZURE_CLIENT_ID")
        who = f"the Entra identity with client id {client}" if client else "your Entra identity"
        if scope.startswith("registry:"):
            role, repository_role = "AcrPull", "Container Registry Repository Catalog Lister"
        elif method in ("GET", "HEAD"):
            role, repository_role = "AcrPull", "Container Registry Repository Reader"
        else:
            role, repository_role = "AcrPush", "Container Registry Repository Writer"
        return (
            f"{who} needs the role {role} on {self._host} ({repository_role!r} where the registry has ABAC repository "
            "permissions); a new assignment takes effect within ten minutes"
        )

    def _ask_token(self, post: Post, service: str, scope: str, method: str) -> requests.Response:
        if self._refresh_token is None:
            fields = {"grant_type": "access_token", "service": service, "access_token": self._entra_token()}
            if tenant := os.environ.get("AZURE_TENANT_ID"):
                fields["tenant"] = tenant
            self._refresh_token = self._taken(post("/oauth2/exchange", fields), "refresh_token", method, scope)
        return post(
            "/oauth2/token",
            {
                "grant_type": "refresh_token",
                "service": service,
                "scope": scope.split(),  # a challenge may name several; each is a field of its own
                "refresh_token": self._refresh_token,
            },
        )

    def _taken(self, answer: requests.Response, key: str, method: str, scope: str) -> str:
        """The token in `answer`. Of a refusal only status and codes are told: no text that may hold a token."""
        try:
            document = answer.json()
        except requests.RequestException:
            document = None
        if not isinstance(document, dict):
            document = {}
        if answer.ok and isinstance(document.get(key), str):
            return str(document[key])
        errors = document.get("errors")
        codes = [str(item.get("code")) for item in errors if isinstance(item, dict)] if isinstance(errors, list) else []
        told = " ".join([str(answer.status_code), answer.reason or "", *codes]).strip()
        step = "refused the Entra token" if key == "refresh_token" else f"refused a token for {scope}"
        if answer.ok:
            step = f"answered without a {key}"
        raise StoreError(f"{self._host}: the registry {step} ({told}): {self.lacking(method, scope)}")

    def _entra_token(self) -> str:
        from azure.core.exceptions import AzureError, ClientAuthenticationError

        self._credential = self._credential or credential()
        try:
            return str(self._credential.get_token(AUDIENCE).token)
        except ClientAuthenticationError as error:
            if passing(error):
                raise Unreachable(f"Entra: {_told(error)}") from None
            raise StoreError(f"{self._host}: no Entra token: {_told(error)}; {_REMEDY}") from None
        except AzureError as error:
            raise Unreachable(f"Entra: {_told(error)}") from None
        except OSError as error:  # the projected token file
            raise StoreError(f"{self._host}: no Entra token: {error}; {_REMEDY}") from None


_REMEDY = (
    "in a pod, its service account needs the label and annotation of workload identity and a federated credential; "
    "elsewhere run az login"
)


def credential() -> Credential:
    """The pod's workload identity, or whatever a person is signed in with (az login, environment)."""
    logging.getLogger("azure").setLevel(logging.ERROR)  # headers of each request, and a warning for each way it tried
    try:
        return entra_credential()
    except ValueError as error:
        raise StoreError(f"workload identity is not fully configured: {_told(error)}; {_REMEDY}") from None


def _told(error: Exception) -> str:
    return first_line(error)[:300]
