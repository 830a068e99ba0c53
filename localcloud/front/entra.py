"""Entra at login.microsoftonline.com: access tokens for pods that show the token of their service account.

Errors are told by the codes and words of learn.microsoft.com/entra/identity-platform/reference-error-codes and of
github.com/Azure/azure-workload-identity's issues (#340, #1200).
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from localcloud.azure.rules import TENANT
from localcloud.azure.world import Record
from localcloud.front.directory import LOGIN, Directory
from localcloud.front.exchange import Exchange
from localcloud.front.tokens import ALGORITHM, Tokens

ISSUER = f"https://sts.windows.net/{TENANT}/"
TOKEN_SECONDS = 3600
# What the local API server puts into its tokens (localcloud.control_plane): it runs before Azure gives its cluster an
# issuer's address. There is one local cluster, so this stands for whatever clusters there are in Azure.
LOCAL_ISSUER = "https://kubernetes.default.svc"
ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
CHECK = (
    "Check your federated identity credential Subject, Audience and Issuer against the presented assertion. "
    "https://learn.microsoft.com/entra/workload-id/workload-identity-federation"
)


class Refused(Exception):
    """An answer of Entra's that is no token: `error` of OAuth, AADSTS number, its words."""

    def __init__(self, error: str, code: int, words: str, status: int = 400) -> None:
        super().__init__(words)
        self.error, self.code, self.status = error, code, status


class Entra:
    """`issuer_key`: the PEM file of the key that signs service account tokens; it may come later."""

    def __init__(self, directory: Directory, tokens: Tokens, issuer_key: Path) -> None:
        self._directory, self._tokens, self._issuer_key = directory, tokens, issuer_key

    def principal(self, token: str, audiences: Collection[str]) -> str:
        """The object ID of whom an access token is. Raises `jwt.InvalidTokenError` for one that is not for these."""
        either = [audience.rstrip("/") + end for audience in audiences for end in ("", "/")]
        return str(self._tokens.read(token, ISSUER, either)["oid"])

    def answer(self, exchange: Exchange) -> None:
        path, base = exchange.url.path, f"https://{LOGIN}/{TENANT}"
        tenant, _, rest = path[1:].partition("/")
        if rest == "oauth2/v2.0/token" and exchange.command == "POST":
            try:
                exchange.reply(200, self._token(tenant, exchange.form()))
            except Refused as refused:
                exchange.reply(refused.status, _document(refused))
        elif path == "/common/discovery/instance":
            alias = {"preferred_network": LOGIN, "preferred_cache": "login.windows.net", "aliases": [LOGIN]}
            configuration = f"{base}/v2.0/.well-known/openid-configuration"
            exchange.reply(200, {"tenant_discovery_endpoint": configuration, "api-version": "1.1", "metadata": [alias]})
        elif path == f"/{TENANT}/v2.0/.well-known/openid-configuration":
            exchange.reply(
                200,
                {
                    "issuer": f"{base}/v2.0",
                    "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                    "token_endpoint": f"{base}/oauth2/v2.0/token",
                    "token_endpoint_auth_methods_supported": ["private_key_jwt"],
                    "jwks_uri": f"{base}/discovery/v2.0/keys",
                    "response_types_supported": ["token"],
                    "subject_types_supported": ["pairwise"],
                    "id_token_signing_alg_values_supported": [ALGORITHM],
                },
            )
        elif path == f"/{TENANT}/discovery/v2.0/keys":
            exchange.reply(200, {"keys": [self._tokens.public]})
        else:
            exchange.reply(404)

    def _token(self, tenant: str, form: dict[str, list[str]]) -> dict[str, Any]:
        fields = {key: values[0] for key, values in form.items()}
        if tenant.lower() != TENANT:
            raise Refused(
                "invalid_request", 90002, f"Tenant '{tenant}' not found. Check to make sure you have the correct "
                "tenant ID and are signing into the correct cloud. Check with your subscription administrator, this "
                "may happen if there are no active subscriptions for the tenant."
            )  # fmt: skip
        if fields.get("grant_type") != "client_credentials":
            raise Refused(
                "unsupported_grant_type", 70003, f"The app requested an unsupported grant type "
                f"'{fields.get('grant_type', '')}'."
            )  # fmt: skip
        if fields.get("client_assertion_type") != ASSERTION or "client_assertion" not in fields:
            raise Refused(
                "invalid_client", 7000218, "The request body must contain the following parameter: 'client_assertion' "
                "or 'client_secret'.", 401
            )  # fmt: skip
        client, scope = fields.get("client_id", ""), fields.get("scope", "")
        identity = self._directory.identity(client)
        if identity is None:
            raise Refused(
                "unauthorized_client", 700016, f"Application with identifier '{client}' was not found in the directory "
                f"'{TENANT}'. This can happen if the application has not been installed by the administrator of the "
                "tenant or consented to by any user in the tenant. You may have sent your authentication request to "
                "the wrong tenant."
            )  # fmt: skip
        self._match(identity, client, self._claims(fields["client_assertion"]))
        if not scope.endswith("/.default") or " " in scope:
            raise Refused(
                "invalid_scope", 1002012, f"The provided value for scope {scope} is not valid. Client credential flows "
                "must have a scope value with /.default suffixed to the resource identifier (application ID URI)."
            )  # fmt: skip
        principal = str(identity.outputs["principalId"])
        who = {"appid": client, "oid": principal, "sub": principal, "tid": TENANT, "idtyp": "app", "ver": "1.0",
               "xms_mirid": identity.id}  # fmt: skip
        token = self._tokens.issue(ISSUER, scope.removesuffix("/.default"), TOKEN_SECONDS, who)
        lasts = TOKEN_SECONDS - 1
        return {"token_type": "Bearer", "expires_in": lasts, "ext_expires_in": lasts, "access_token": token}

    def _claims(self, assertion: str) -> dict[str, Any]:
        """What the service account's token says, once it is known to be the API server's."""
        if not self._issuer_key.exists():
            raise Refused(
                "temporarily_unavailable", 90033, "A transient error has occurred. Please try again. "
                f"({self._issuer_key} is not there yet: the API server's start makes it.)", 503
            )  # fmt: skip
        pem = self._issuer_key.read_bytes()
        key = serialization.load_pem_private_key(pem, None)
        assert isinstance(key, RSAPrivateKey)
        options: Any = {"verify_aud": False, "require": ["exp", "iss", "sub", "aud"]}  # `_match` looks at the audience
        try:
            return jwt.decode(assertion, key.public_key(), [ALGORITHM], options=options)
        except (jwt.ExpiredSignatureError, jwt.ImmatureSignatureError):
            claims = jwt.decode(assertion, options={"verify_signature": False})
            start, end = (_time(claims.get(name, 0)) for name in ("nbf", "exp"))
            raise Refused(
                "invalid_client", 700024, "Client assertion is not within its valid time range. Current time: "
                f"{_time()}, assertion valid from {start}, expiry time of assertion {end}. Review the documentation at "
                "https://learn.microsoft.com/entra/identity-platform/certificate-credentials ."
            ) from None  # fmt: skip
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
            raise Refused(
                "invalid_client", 50013, "Assertion failed signature validation. [Reason - The key was not found.]"
            ) from None
        except jwt.InvalidTokenError as error:
            raise Refused("invalid_request", 50027, f"JWT token is invalid or malformed: {error}.") from None

    def _match(self, identity: Record, client: str, claims: dict[str, Any]) -> None:
        """Find the federated credential that these claims fit, or say which of them fits none."""
        found = [record.inputs for record in self._directory.federated_credentials(identity)]
        if not found:
            name = identity.id.rpartition("/")[2]
            raise Refused(
                "invalid_client", 70025, f"The client '{client}'({name}) has no configured federated identity "
                "credentials."
            )  # fmt: skip
        issuers = self._directory.issuers() if claims["iss"] == LOCAL_ISSUER else {claims["iss"]}
        said = [claims["aud"]] if isinstance(claims["aud"], str) else claims["aud"]
        for code, what, shown, fits in (
            (700211, "issuer", claims["iss"], lambda one: one["issuer"] in issuers),
            (700212, "audience", ", ".join(said), lambda one: not set(one["audiences"]).isdisjoint(said)),
            (700213, "subject", claims["sub"], lambda one: one["subject"] == claims["sub"]),
        ):
            found = [one for one in found if fits(one)]
            if not found:
                words = f"No matching federated identity record found for presented assertion {what} '{shown}'. {CHECK}"
                raise Refused("invalid_client", code, words)


def _document(refused: Refused) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    trace, correlation = str(uuid.uuid4()), str(uuid.uuid4())
    return {
        "error": refused.error,
        "error_description": f"AADSTS{refused.code}: {refused} Trace ID: {trace} Correlation ID: {correlation} "
        f"Timestamp: {now}",
        "error_codes": [refused.code],
        "timestamp": now,
        "trace_id": trace,
        "correlation_id": correlation,
        "error_uri": f"https://{LOGIN}/error?code={refused.code}",
    }


def _time(seconds: float | None = None) -> str:
    """In UTC; now without an argument."""
    found = (
        datetime.datetime.now(datetime.UTC)
        if seconds is None
        else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    )
    return found.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
