"""Blob Storage at ACCOUNT.blob.core.windows.net: roles decide as in Azure, the emulator keeps the bytes.

Containers are those of the world. All accounts' lie in the emulator's one account, by their names alone, as
`localcloud.azure.hands` makes them.
"""

from __future__ import annotations

import base64
import datetime
import email.utils
import hashlib
import hmac
import uuid
from collections.abc import Mapping
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import jwt

from localcloud.azure.rules import TENANT
from localcloud.front.directory import (
    BLOB_DATA_CONTRIBUTOR,
    BLOB_DATA_READER,
    BLOB_SUFFIX,
    LOGIN,
    Directory,
    container_id,
)
from localcloud.front.entra import Entra
from localcloud.front.exchange import Away, Exchange

RESOURCE = "https://storage.azure.com"
# In the order of what is signed (learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key).
SIGNED = (
    "Content-Encoding", "Content-Language", "Content-Length", "Content-MD5", "Content-Type", "Date",
    "If-Modified-Since", "If-Match", "If-None-Match", "If-Unmodified-Since", "Range",
)  # fmt: skip
SIGN_IN = "Server failed to authenticate the request. Please refer to the information in the www-authenticate header."


class Refused(Exception):
    """An answer of the service that is an error: HTTP status, code, words; more about a failed sign-in."""

    def __init__(self, status: int, code: str, words: str, detail: str = "") -> None:
        super().__init__(words)
        self.status, self.code, self.detail = status, code, detail


class Blob:
    """`endpoint`: of the emulator's account, http://HOST:PORT/ACCOUNT; `key`: that account's, in base64."""

    def __init__(self, directory: Directory, entra: Entra, endpoint: str, key: str) -> None:
        self._directory, self._entra, self._key = directory, entra, base64.b64decode(key)
        parts = urlsplit(endpoint)
        self._host, self._account = parts.netloc, parts.path.strip("/")

    def answer(self, exchange: Exchange) -> None:
        try:
            self._check(exchange)
            self._pass_on(exchange)
        except Away as away:
            _refuse(
                exchange, Refused(503, "ServerBusy", f"The server is currently unable to receive requests. ({away})")
            )
        except Refused as refused:
            _refuse(exchange, refused)

    def _check(self, exchange: Exchange) -> None:
        """Raise `Refused` for what Azure would refuse."""
        principal = self._principal(exchange)
        account = self._directory.account(exchange.name.removesuffix(BLOB_SUFFIX))
        if account is None:  # its name would not be in DNS
            raise Refused(404, "ResourceNotFound", "The specified resource does not exist.")
        batch = "batch" in parse_qs(exchange.url.query.lower()).get("comp", [])
        if batch or exchange.headers.get("x-ms-copy-source"):  # it speaks of what is not in its path
            raise Refused(501, "NotImplemented", "localcloud.front knows neither batches nor copies.")
        if exchange.command in ("PUT", "POST") and exchange.body.length is None:
            raise Refused(411, "MissingContentLengthHeader", "The Content-Length header was not specified.")
        roles = {BLOB_DATA_CONTRIBUTOR} | ({BLOB_DATA_READER} if exchange.command in ("GET", "HEAD") else set())
        container = unquote(exchange.url.path.split("/")[1])
        scope = container_id(account, container) if container else account.id
        if not self._directory.allowed(principal, roles, scope):
            raise Refused(
                403, "AuthorizationPermissionMismatch",
                "This request is not authorized to perform this operation using this permission.",
            )  # fmt: skip
        if container and not self._directory.container(account, container):
            raise Refused(404, "ContainerNotFound", "The specified container does not exist.")

    def _principal(self, exchange: Exchange) -> str:
        kind, _, token = exchange.headers.get("Authorization", "").partition(" ")
        if kind.lower().startswith("sharedkey"):
            raise Refused(
                403, "KeyBasedAuthenticationNotPermitted",
                "Key based authentication is not permitted on this storage account.",
            )  # fmt: skip
        if kind.lower() != "bearer":
            raise Refused(401, "NoAuthenticationInformation", SIGN_IN)
        try:
            return self._entra.principal(token, [RESOURCE, f"https://{exchange.name}"])
        except jwt.InvalidAudienceError:
            detail = "Audience validation failed. Audience did not match."
        except jwt.ExpiredSignatureError:
            detail = "Lifetime validation failed. The token is expired."
        except jwt.InvalidSignatureError:
            detail = "Signature validation failed."
        except jwt.InvalidTokenError as error:
            detail = str(error)
        raise Refused(401, "InvalidAuthenticationInfo", SIGN_IN, detail)

    def _pass_on(self, exchange: Exchange) -> None:
        path, query = f"/{self._account}{exchange.url.path}", exchange.url.query
        headers = exchange.passed_headers()
        if not exchange.headers.get("x-ms-date"):
            headers.append(("x-ms-date", email.utils.formatdate(usegmt=True)))
        known = {name.lower(): value for name, value in headers}
        if exchange.body.length:  # none of zero is signed
            known["content-length"] = str(exchange.body.length)
        headers.append(
            ("Authorization", f"SharedKey {self._account}:{self._sign(exchange.command, path, query, known)}")
        )
        exchange.pass_on(self._host, f"{path}?{query}" if query else path, headers)

    def _sign(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> str:
        """As Azurite's BlobSharedKeyAuthenticator reckons it; `headers` have names in lower case."""
        own = [name for name in headers if name.startswith("x-ms-")]
        own.sort(key=lambda name: name.replace("_", ","))  # JavaScript's localeCompare: "_" before "-" before digits
        # A value that is empty, or has a "=" in it, is none to Azurite.
        pairs = [pair.split("=") for pair in query.split("&")]
        asked = {
            pair[0].lower(): unquote(pair[1].replace("+", "%20")) for pair in pairs if len(pair) == 2 and all(pair)
        }
        text = "\n".join(
            [
                method,
                *(headers.get(name.lower(), "") for name in SIGNED),
                *(f"{name}:{headers[name].lstrip()}" for name in own),
                f"/{self._account}{path}",
                *(f"{name}:{asked[name]}" for name in sorted(asked)),
            ]
        )
        return base64.b64encode(hmac.digest(self._key, text.encode(), hashlib.sha256)).decode()


def _refuse(exchange: Exchange, refused: Refused) -> None:
    request, now = str(uuid.uuid4()), datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f0Z")
    detail = refused.detail and f"<AuthenticationErrorDetail>{escape(refused.detail)}</AuthenticationErrorDetail>"
    body = (
        f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{refused.code}</Code><Message>{escape(str(refused))}\n'
        f"RequestId:{request}\nTime:{now}</Message>{detail}</Error>"
    )
    headers = {
        "Content-Type": "application/xml",
        "x-ms-error-code": refused.code,
        "x-ms-request-id": request,
        "x-ms-version": exchange.headers.get("x-ms-version", "2019-12-12"),
    }
    if refused.status == 401:  # learn.microsoft.com/rest/api/storageservices/authorize-with-azure-active-directory
        headers["WWW-Authenticate"] = (
            f"Bearer authorization_uri=https://{LOGIN}/{TENANT}/oauth2/authorize resource_id={RESOURCE}"
        )
    exchange.reply(refused.status, body.encode(), headers)
