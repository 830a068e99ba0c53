"""Azure Container Registry at NAME.azurecr.io: its sign-in and roles, before a registry that asks nobody who he is.

By docs/AAD-OAuth.md of github.com/Azure/acr. The repositories of all registries lie in the one behind, by their names
alone, as `localcloud.builder` puts them there. Roles are looked up at every request, so one that is taken away is gone
at once, where Azure's tokens go on for a while.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import jwt

from localcloud.azure.rules import TENANT
from localcloud.azure.world import Record
from localcloud.front.directory import ACR_PULL, ACR_PUSH, REGISTRY_SUFFIX, Directory
from localcloud.front.entra import Entra
from localcloud.front.exchange import Away, Exchange
from localcloud.front.tokens import Tokens

ISSUER = "Azure Container Registry"
# The registry's own audience, and Azure Resource Manager's, which registries take unless told otherwise.
AUDIENCES = ("https://containerregistry.azure.net", "https://management.azure.com")
REFRESH_SECONDS, ACCESS_SECONDS = 3 * 3600, 75 * 60
# Who may do what; nobody of these may delete, which takes AcrDelete.
ROLES = {"pull": {ACR_PULL, ACR_PUSH}, "push": {ACR_PUSH}, "*": {ACR_PULL, ACR_PUSH}, "delete": set[str]()}
_REPOSITORY = re.compile(r"/v2/(?P<name>[a-z0-9._/-]+)/(?P<what>manifests|blobs|tags|referrers)/(?P<rest>[^?]+)")


class Registry:
    """`host`: HOST:PORT of the registry behind, over plain HTTP."""

    def __init__(self, directory: Directory, entra: Entra, tokens: Tokens, host: str) -> None:
        self._directory, self._entra, self._tokens, self._host = directory, entra, tokens, host

    def answer(self, exchange: Exchange) -> None:
        registry = self._directory.registry(exchange.name.removesuffix(REGISTRY_SUFFIX))
        path = exchange.url.path
        try:
            if registry is None:  # its name would not be in DNS
                exchange.reply(404, _error("NOT_FOUND", "no such registry"))
            elif path == "/oauth2/exchange" and exchange.command == "POST":
                self._exchange(exchange, registry)
            elif path == "/oauth2/token" and exchange.command == "POST":
                self._token(exchange, registry)
            elif path.startswith("/v2/"):
                self._api(exchange, registry)
            else:
                exchange.reply(404, _error("NOT_FOUND", "no such address"))
        except Away as away:
            exchange.reply(503, _error("UNAVAILABLE", str(away)))

    def _exchange(self, exchange: Exchange, registry: Record) -> None:
        """A refresh token for an access token of Entra."""
        form = exchange.form()
        try:
            if form.get("grant_type") != ["access_token"]:
                raise jwt.InvalidTokenError("grant_type is not access_token")
            principal = self._entra.principal(form.get("access_token", [""])[0], AUDIENCES)
        except jwt.InvalidTokenError as error:
            exchange.reply(401, _error("UNAUTHORIZED", f"authentication required: {error}"))
            return
        if not self._may(principal, "pull", registry):
            exchange.reply(401, _error("UNAUTHORIZED", "authentication required"))
            return
        exchange.reply(200, {"refresh_token": self._issue(exchange, "refresh_token", principal, REFRESH_SECONDS, {})})

    def _token(self, exchange: Exchange, registry: Record) -> None:
        """An access token for a refresh token: for what was asked, as far as the roles reach."""
        form = exchange.form()
        try:
            if form.get("grant_type") != ["refresh_token"]:
                raise jwt.InvalidTokenError("grant_type is not refresh_token")
            principal = self._read(exchange, "refresh_token", form.get("refresh_token", [""])[0])["sub"]
        except jwt.InvalidTokenError as error:
            exchange.reply(401, _error("UNAUTHORIZED", f"authentication required: {error}"))
            return
        access = []
        for scope in " ".join(form.get("scope", [])).split():
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            granted = [action for action in actions.split(",") if self._may(principal, action, registry)]
            access.append({"type": kind, "name": name, "actions": granted})
        token = self._issue(exchange, "access_token", principal, ACCESS_SECONDS, {"access": access})
        exchange.reply(200, {"access_token": token})

    def _api(self, exchange: Exchange, registry: Record) -> None:
        path = unquote(exchange.url.path)
        found = _REPOSITORY.fullmatch(path)
        if found and not {".", ".."} & {*path.split("/")} and "//" not in path:
            uploads = found["what"] == "blobs" and found["rest"].startswith("uploads/")
            reads = exchange.command in ("GET", "HEAD")
            action = "pull" if reads else "delete" if exchange.command == "DELETE" and not uploads else "push"
            needed = ("repository", found["name"], action)
        elif path == "/v2/_catalog":
            needed = ("registry", "catalog", "*")
        elif path == "/v2/":
            needed = ("", "", "")
        else:
            exchange.reply(404, _error("NAME_INVALID", "invalid repository name"))
            return
        trouble = self._trouble(exchange, registry, needed)
        if trouble is not None:
            _challenge(exchange, needed, trouble)
            return
        query = f"?{exchange.url.query}" if exchange.url.query else ""
        exchange.pass_on(self._host, quote(path, safe="/:@+,;=~") + query, exchange.passed_headers(), _here)

    def _trouble(self, exchange: Exchange, registry: Record, needed: tuple[str, str, str]) -> str | None:
        """Why the request's token is not enough, in OAuth's words; "" where there is none, None where it is enough."""
        scheme, _, token = exchange.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return ""
        try:
            claims = self._read(exchange, "access_token", token)
        except jwt.InvalidTokenError:
            return "invalid_token"
        kind, name, action = needed
        if not kind:
            return None
        granted = any(
            (each["type"], each["name"]) == (kind, name) and action in each["actions"] for each in claims["access"]
        )
        return None if granted and self._may(claims["sub"], action, registry) else "insufficient_scope"

    def _may(self, principal: str, action: str, registry: Record) -> bool:
        return self._directory.allowed(principal, ROLES.get(action, set()), registry.id)

    def _issue(self, exchange: Exchange, kind: str, principal: str, seconds: int, more: Mapping[str, Any]) -> str:
        claims = {"sub": principal, "grant_type": kind, "tenant": TENANT, "version": "1.0", **more}
        return self._tokens.issue(ISSUER, exchange.host, seconds, claims)

    def _read(self, exchange: Exchange, kind: str, token: str) -> dict[str, Any]:
        claims = self._tokens.read(token, ISSUER, [exchange.host])
        if claims["grant_type"] != kind:
            raise jwt.InvalidTokenError(f"not a {kind}")
        return claims


def _challenge(exchange: Exchange, needed: tuple[str, str, str], trouble: str) -> None:
    """401, and what to ask for a token. Who pushes looks first, and asks to pull and push at once."""
    kind, name, action = needed
    asked = "pull,push" if action == "push" else action
    said = {"realm": f"https://{exchange.host}/oauth2/token", "service": exchange.host}
    said |= {"scope": f"{kind}:{name}:{asked}"} if kind else {}
    said |= {"error": trouble} if trouble else {}
    detail = [{"Type": kind, "Name": name, "Action": action}] if kind else None
    words = "authentication required, visit https://aka.ms/acr/authorization for more information."
    exchange.reply(
        401,
        _error("UNAUTHORIZED", words, detail),
        {
            "WWW-Authenticate": "Bearer " + ",".join(f'{key}="{value}"' for key, value in said.items()),
            "Docker-Distribution-Api-Version": "registry/2.0",
        },
    )


def _here(header: str, value: str) -> str:
    """An address on the registry behind as one on this host."""
    if header.lower() != "location":
        return value
    parts = urlsplit(value)
    return parts._replace(scheme="", netloc="").geturl()


def _error(code: str, message: str, detail: object = None) -> dict[str, Any]:
    return {"errors": [{"code": code, "message": message, "detail": detail}]}
