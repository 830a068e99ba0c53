"""The registry store: an OCI distribution API spoken with `requests`.

`requests` and not the `oras` package, because that one (0.2.43) verifies no digest, has no timeouts, retries
refusals for minutes, reads whole blobs into memory and cannot tag by digest. Sign-in, in this order: the name and
password (or token) that `docker login` keeps in `config.json` for the host (credential helpers are not run), the Entra
identity of this process where the registry is Azure's, anonymous.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from requests.utils import parse_dict_header

from artifacts.entra import EntraSignIn, Unreachable
from artifacts.store import (
    MANIFEST_LIMIT_BYTES,
    MANIFEST_TYPE,
    CorruptBlob,
    OutOfReach,
    Store,
    StoreError,
    _sha256,
)
from common.hosts import causes, is_loopback, retry_after

ATTEMPTS = 4
BACKOFF_SECONDS = 0.5  # doubled after each attempt: a dead registry is told after 3.5 s
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
LONGEST_WAIT_SECONDS = 30.0  # that a registry's Retry-After is heeded
# Indexes too: what a tag of one means is nothing to us, but then that is said, and not that there is no such tag.
ACCEPTED = ", ".join((
    MANIFEST_TYPE, "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
))  # fmt: skip

Result = TypeVar("Result")


class _Passing(Exception):
    """A trouble that another attempt may not meet, after `seconds`: no connection, a cut stream, 429 or 5xx."""

    def __init__(self, text: str, seconds: float = 0.0) -> None:
        super().__init__(text)
        self.seconds = seconds


class _Silent(_Passing):
    """No connection, or one that ended without an answer."""


class _Session(requests.Session):
    """Sends a sign-in to nobody but whom it was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = lambda request: request  # or requests would take a password from ~/.netrc

    def rebuild_auth(self, prepared_request: Any, response: requests.Response) -> None:
        """After a redirect: requests' own would look into ~/.netrc for the other host."""
        url = prepared_request.url
        if self.should_strip_auth(response.request.url, url):  # type: ignore[no-untyped-call]
            prepared_request.headers.pop("Authorization", None)


class RegistryStore(Store):
    """Repositories below `oci://host[:port]/prefix`; DRYDOCK_REGISTRY_ENDPOINT: what stands in for it on loopback."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if not parts.hostname or parts.username or parts.query or parts.fragment:
            raise ValueError(f"store {url!r}: expected oci://HOST[:PORT]/PREFIX")
        self.url = url.rstrip("/")
        self.host = parts.netloc.lower()  # as it stands in the addresses of answers
        self._prefix = parts.path.strip("/")
        local = is_loopback(parts.hostname)
        self._base = f"{'http' if local else 'https'}://{self.host}"
        if stand_in := os.environ.get("DRYDOCK_REGISTRY_ENDPOINT"):
            local = is_loopback(urlsplit(stand_in).hostname or "")
            if not local:  # nobody's token may go to another host because of a variable
                raise ValueError(f"DRYDOCK_REGISTRY_ENDPOINT={stand_in}: expected http://127.0.0.1:PORT")
            self._base = stand_in.rstrip("/")
        self._session = _Session()
        self._session.trust_env = not local  # a proxy cannot reach this machine's own loopback
        # By repository and whether it writes: a bearer token is for that much, and a registry may answer 403, without
        # saying what to ask for, to one that is good for less.
        self._authorization: dict[tuple[str, bool], str] = {}
        self._entra = EntraSignIn(self.host)
        self._entra_scopes: dict[tuple[str, bool], str] = {}  # what was asked of Entra, for the words of a refusal

    def tags(self, repository: str) -> dict[str, str]:
        found = {name: self._find(repository, name) for name in self._tag_names(repository)}
        return {name: digest for name, digest in found.items() if digest is not None}

    def _tag_names(self, repository: str) -> list[str]:
        return self._list(f"{self._api(repository)}/tags/list", "tags", repository)

    def repositories(self) -> list[str]:
        names = self._list(f"{self._base}/v2/_catalog", "repositories", "")
        inside = f"{self._prefix}/" if self._prefix else ""
        return sorted(name.removeprefix(inside) for name in names if name.startswith(inside))

    def _find(self, repository: str, reference: str) -> str | None:
        address = f"{self._api(repository)}/manifests/{reference}"
        response = self._request("HEAD", address, repository, allow=(404,), headers={"Accept": ACCEPTED})
        if response.status_code == 404:
            return None
        digest = response.headers.get("Docker-Content-Digest")
        return digest or _sha256(self._get_manifest(repository, reference))

    def _put_blob(self, repository: str, descriptor: Mapping[str, Any], file: BinaryIO) -> None:
        digest = descriptor["digest"]

        def upload() -> None:
            there = self._send("HEAD", f"{self._api(repository)}/blobs/{digest}", repository, allow=(404,))
            if there.status_code != 404:
                return
            # Each attempt opens a new upload: half an upload cannot be taken up again in every registry.
            opened = self._send("POST", f"{self._api(repository)}/blobs/uploads/", repository)
            if "Location" not in opened.headers:
                raise StoreError(f"{self.url}: {repository}: the registry named no address for an upload")
            address = urljoin(self._base, opened.headers["Location"])
            address += ("&" if urlsplit(address).query else "?") + f"digest={digest}"
            self._send("PUT", address, repository, body=file, headers={"Content-Type": "application/octet-stream"})

        _retrying(upload, self.url)

    def _get_blob(self, repository: str, digest: str, size: int, file: BinaryIO) -> None:
        def download() -> None:
            file.seek(0)
            file.truncate()
            address = f"{self._api(repository)}/blobs/{digest}"
            with self._send("GET", address, repository, stream=True, allow=(404,)) as response:
                if response.status_code == 404:
                    raise CorruptBlob(f"{self.url}: {repository}: blob {digest} is absent")
                try:
                    for piece in response.iter_content(2**20):
                        file.write(piece[: size + 1 - file.tell()])
                        if file.tell() > size:
                            break
                except requests.RequestException as error:
                    raise _Passing(f"blob {digest} of {size} bytes: the stream was cut: {_unsigned(error)}") from error

        _retrying(download, self.url)

    def _put_manifest(self, repository: str, digest: str, data: bytes) -> None:
        self._put_manifest_as(repository, digest, digest, data)

    def _set_tag(self, repository: str, digest: str, tag: str) -> None:
        data = self._get_manifest(repository, digest)
        if _sha256(data) != digest:
            raise CorruptBlob(f"{self.url}: {repository}: manifest: expected {digest}, found {_sha256(data)}")
        self._put_manifest_as(repository, tag, digest, data)

    def _put_manifest_as(self, repository: str, reference: str, digest: str, data: bytes) -> None:
        address = f"{self._api(repository)}/manifests/{reference}"
        response = self._request("PUT", address, repository, body=data, headers={"Content-Type": MANIFEST_TYPE})
        found = response.headers.get("Docker-Content-Digest", digest)
        if found != digest:
            raise CorruptBlob(f"{self.url}: {repository}: stored manifest: expected {digest}, found {found}")

    def _get_manifest(self, repository: str, digest: str) -> bytes:
        address = f"{self._api(repository)}/manifests/{digest}"
        response = self._request("GET", address, repository, headers={"Accept": ACCEPTED})
        if len(response.content) > MANIFEST_LIMIT_BYTES:
            raise StoreError(
                f"{address}: a manifest of {len(response.content)} bytes; the limit is {MANIFEST_LIMIT_BYTES}"
            )
        return response.content

    def _api(self, repository: str) -> str:
        return f"{self._base}/v2/{self._prefix}/{repository}" if self._prefix else f"{self._base}/v2/{repository}"

    def _list(self, address: str, key: str, repository: str) -> list[str]:
        """All pages of a listing; empty when the registry does not know the repository."""
        names: list[str] = []
        following: str | None = f"{address}?n=1000"
        while following:
            response = self._request("GET", following, repository, allow=(404,))
            if response.status_code == 404:
                if key == "repositories":
                    raise StoreError(f"{self.url}: this registry does not list its repositories; name the adapter")
                return []
            names += _answer(response).get(key) or []
            link = response.links.get("next", {}).get("url")
            following = urljoin(self._base, link) if link else None
        return names

    def _request(self, method: str, address: str, repository: str, **options: Any) -> requests.Response:
        return _retrying(lambda: self._send(method, address, repository, **options), self.url)

    def _send(
        self,
        method: str,
        address: str,
        repository: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | BinaryIO | None = None,
        stream: bool = False,
        allow: tuple[int, ...] = (),
    ) -> requests.Response:
        """One request, signed in if the registry asks for it. Raises `_Passing`, or `StoreError` for good."""
        purpose = (repository, method not in ("GET", "HEAD"))
        for signed_in in (False, True):
            if body is not None and not isinstance(body, bytes):
                body.seek(0)
            # An upload's address may lie on another host: the sign-in is for the registry alone.
            ours = urlsplit(address).netloc == self.host and purpose in self._authorization
            signed = {"Authorization": self._authorization[purpose]} if ours else {}
            try:
                response = self._session.request(
                    method,
                    address,
                    headers={**(headers or {}), **signed},
                    data=body,
                    stream=stream,
                    timeout=(CONNECT_SECONDS, READ_SECONDS),
                    allow_redirects=method in ("GET", "HEAD"),
                )
            except requests.ConnectionError as error:
                if any(isinstance(each, ssl.SSLCertVerificationError) for each in causes(error)):
                    raise StoreError(f"{self.url}: no trusted TLS connection: {_unsigned(error)}") from error
                raise self._lost(error, method, address) from error
            except (requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                raise _Passing(f"{method} {_unsigned(address)}: {_unsigned(error)}") from error
            # Only the registry itself may ask: not a storage host that it sent us to.
            if response.status_code == 401 and not signed_in and urlsplit(response.url).netloc == self.host:
                response.close()
                self._authorization[purpose] = self._sign_in(response, method, purpose)
                continue
            break
        if response.status_code < 300 or response.status_code in allow:
            return response
        text = f"{method} {_unsigned(address)}: {response.status_code} {response.reason}: {_told(response)}"
        response.close()
        if response.status_code == 429 or response.status_code >= 500:
            raise _Passing(text, retry_after(response.headers))
        at_home = ours and urlsplit(response.url).netloc == self.host
        if response.status_code in (401, 403) and at_home and purpose in self._entra_scopes:
            text += f": {self._entra.lacking(method, self._entra_scopes[purpose])}"
            self._entra.forget()
            del self._authorization[purpose], self._entra_scopes[purpose]
        raise StoreError(f"{self.url}: {text}")

    def _lost(self, error: requests.ConnectionError, method: str, address: str) -> _Passing:
        """`error` in words; of a storage host that the registry sent us to, it says nothing about the registry."""
        to = getattr(error.request, "url", None) or address
        kind = _Silent if urlsplit(to).netloc == urlsplit(self._base).netloc else _Passing
        return kind(f"{method} {_unsigned(address)}: {_unsigned(error)}")

    def _sign_in(self, refused: requests.Response, method: str, purpose: tuple[str, bool]) -> str:
        """The `Authorization` header that answers a 401: Basic, or a token got with Basic, by Entra or anonymously."""
        challenge = refused.headers.get("WWW-Authenticate", "")
        kind, _, rest = challenge.partition(" ")
        basic, source = _docker_login(self.host)
        if kind.lower() == "basic" and basic:
            return f"Basic {basic}"
        if kind.lower() == "bearer":
            wanted = parse_dict_header(rest)  # type: ignore[no-untyped-call]
            realm = urlsplit(wanted.get("realm") or "")
            if realm.scheme != "https" and not is_loopback(realm.hostname or ""):
                raise StoreError(f"{self.url}: will not send a sign-in to {realm.geturl()!r}: it is not HTTPS")
            if not basic and self._entra.answers(realm):
                scope = wanted.get("scope") or ""
                try:
                    bearer = self._entra.bearer(self._post_form, wanted.get("service") or self.host, scope, method)
                except Unreachable as error:
                    raise _Passing(f"sign-in: {error}") from error
                self._entra_scopes[purpose] = scope
                return f"Bearer {bearer}"
            asked = {key: wanted[key] for key in ("service", "scope") if wanted.get(key)}
            headers = {"Authorization": f"Basic {basic}"} if basic else {}
            try:
                answer = self._session.get(
                    realm.geturl(), params=asked, headers=headers, timeout=(CONNECT_SECONDS, READ_SECONDS)
                )
            except requests.RequestException as error:
                raise _Passing(f"sign-in at {realm.netloc}: {error}") from error
            if answer.ok:
                given = _answer(answer)
                if token := given.get("token") or given.get("access_token"):
                    return f"Bearer {token}"
        used = f"the sign-in in {source} was refused" if basic else f"{source} has no sign-in for {self.host}"
        raise StoreError(f"{self.url}: the registry asks for a sign-in ({kind or 'unnamed'}); {used}: run docker login")

    def _post_form(self, path: str, fields: Mapping[str, str | Sequence[str]]) -> requests.Response:
        """The registry's answer to a form, which holds a token: so it follows no redirect to another host."""
        try:
            answer = self._session.post(
                self._base + path, data=fields, timeout=(CONNECT_SECONDS, READ_SECONDS), allow_redirects=False
            )
        except requests.RequestException as error:
            raise _Passing(f"sign-in at {self.host}{path}: {error}") from error
        if answer.status_code == 429 or answer.status_code >= 500:
            raise _Passing(f"sign-in at {self.host}{path}: {answer.status_code} {answer.reason}")
        return answer


def _retrying(action: Callable[[], Result], where: str) -> Result:
    """`action`'s result, tried `ATTEMPTS` times with growing pauses while it raises `_Passing`."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except _Passing as error:
            if attempt == ATTEMPTS:
                kind = OutOfReach if isinstance(error, _Silent) else StoreError
                raise kind(f"{where}: gave up after {ATTEMPTS} attempts: {error}") from error
            time.sleep(max(BACKOFF_SECONDS * 2 ** (attempt - 1), min(error.seconds, LONGEST_WAIT_SECONDS)))
    raise AssertionError("unreachable")


def _unsigned(told: object) -> str:
    """`told` without the queries of addresses: a storage host's bears the signature that opens it."""
    return re.sub(r"\?[^\s'\")]*", "?...", str(told))


def _answer(response: requests.Response) -> dict[str, Any]:
    """The JSON object that a registry answers with; a page of some proxy is an error."""
    try:
        value = response.json()
    except requests.RequestException:
        value = None
    if not isinstance(value, dict):
        raise StoreError(f"{response.url}: expected a registry's JSON, found {response.text[:80]!r}")
    return value


def _told(response: requests.Response) -> str:
    """What the registry itself says about its refusal (distribution-spec: `errors[].code/message`)."""
    try:
        return "; ".join(f"{item.get('code')} {item.get('message', '')}".strip() for item in response.json()["errors"])
    except (ValueError, KeyError, TypeError, AttributeError, requests.RequestException):
        return response.text[:200] or "no reason given"


def _docker_login(host: str) -> tuple[str | None, Path]:
    """The base64 `name:password` that Docker keeps for `host`, if any, and the file looked into."""
    # Not Path.home(): it fails for a container's user that has neither HOME nor an entry in /etc/passwd.
    path = Path(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")) / "config.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        entries = kept.get("auths") or {}
        if not isinstance(entries, dict):
            raise ValueError("auths is no object")
    except FileNotFoundError:
        return None, path
    except (OSError, ValueError, AttributeError) as error:
        raise StoreError(f"{path}: cannot be read as Docker's JSON settings: {error}") from None
    entry = entries.get(host) or entries.get(f"https://{host}") or {}
    if not isinstance(entry, dict):
        raise StoreError(f"{path}: auths.{host}: expected an object")
    if entry.get("identitytoken"):  # left by `az acr login` for three hours, beside a name without a password
        return None, path
    if entry.get("auth"):
        try:
            base64.b64decode(entry["auth"], validate=True)
        except (binascii.Error, ValueError):
            raise StoreError(f"{path}: auths.{host}.auth is not base64") from None
        return str(entry["auth"]), path
    if entry.get("username") and entry.get("password"):
        return base64.b64encode(f"{entry['username']}:{entry['password']}".encode()).decode(), path
    return None, path
