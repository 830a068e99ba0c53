"""The Kubernetes API of a local cluster by plain HTTP: paths as kubectl shows with -v=6, objects as JSON has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import requests
from requests.adapters import HTTPAdapter

SECONDS = 30.0  # the longest that one answer may take
CONNECTIONS = 64  # kept open: the pod runner asks from a thread for each pod
MANAGER = "drydock-localcloud"  # who owns the fields that `apply` sets

PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",
}


class ApiError(RuntimeError):
    """An answer other than success: HTTP `status`, `reason` as Kubernetes names it, and the server's own words."""

    def __init__(self, what: str, status: int, reason: str, message: str) -> None:
        super().__init__(f"{what}: {status} {reason}: {message}")
        self.status, self.reason, self.message = status, reason, message


class Api:
    """Asks one API server as its administrator. Every method raises `ApiError` where the server refuses."""

    def __init__(self, server: str, token: str, ca_file: Path) -> None:
        self.server = server
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy, no other authorities: this machine's own server
        self._session.mount("https://", HTTPAdapter(pool_maxsize=CONNECTIONS))
        self._session.verify = str(ca_file)
        self._session.headers["Authorization"] = f"Bearer {token}"
        self._resources: dict[str, dict[str, dict[str, Any]]] = {}

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._session.close()

    def ready(self) -> bool:
        """Whether the server says of itself that it is; False while nobody answers."""
        try:
            return self._session.get(f"{self.server}/readyz", timeout=SECONDS).status_code == 200
        except requests.ConnectionError:
            return False

    def get(self, path: str, **query: str) -> dict[str, Any]:
        return self._ask("GET", path, query)

    def find(self, path: str) -> dict[str, Any] | None:
        """As `get`; None where there is no such object."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def proxied(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET that the server passes on to a pod (`.../pods/NAME:PORT/proxy/...`)."""
        answer = self._session.get(self.server + path, timeout=SECONDS)
        return answer.status_code, answer.content

    def list(self, path: str, **query: str) -> list[dict[str, Any]]:
        """The items at `path`; `labelSelector=` and `fieldSelector=` narrow them."""
        return [dict(item) for item in self.get(path, **query)["items"]]

    def post(self, path: str, body: dict[str, Any], **query: str) -> dict[str, Any]:
        return self._ask("POST", path, query, body)

    def patch(
        self, path: str, body: Any, kind: Literal["merge", "strategic", "apply"] = "merge", **query: str
    ) -> dict[str, Any]:
        return self._ask("PATCH", path, query, body, PATCH_TYPES[kind])

    def delete(self, path: str, **query: str) -> None:
        """Also where there is no such object (any more)."""
        try:
            self._ask("DELETE", path, query)
        except ApiError as error:
            if error.status != 404:
                raise

    def path_of(self, manifest: dict[str, Any]) -> str:
        """Where the object of `manifest` is; the server is asked for the plural of its kind. A namespaced one without
        a namespace is in `default`."""
        group, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
        root = f"/api/{group}" if "/" not in group else f"/apis/{group}"
        if kind not in self._resources.get(group, {}):
            found = self.get(root)["resources"]
            self._resources[group] = {item["kind"]: item for item in found if "/" not in item["name"]}
        resource = self._resources[group].get(kind)
        if resource is None:
            raise ApiError(f"GET {root}", 404, "NotFound", f"the server knows no kind {kind} in {group}")
        place = f"/namespaces/{metadata.get('namespace', 'default')}" if resource["namespaced"] else ""
        return f"{root}{place}/{resource['name']}/{metadata['name']}"

    def apply(self, manifest: dict[str, Any], subresource: str = "") -> dict[str, Any]:
        """Make or change the object so that it says what `manifest` does (server-side apply, all conflicts won)."""
        path = self.path_of(manifest) + (f"/{subresource}" if subresource else "")
        return self.patch(path, manifest, "apply", fieldManager=MANAGER, force="true", fieldValidation="Strict")

    def _ask(
        self, method: str, path: str, query: dict[str, str], body: Any = None, kind: str = "application/json"
    ) -> dict[str, Any]:
        answer = self._session.request(
            method,
            self.server + path,
            params=query,
            data=None if body is None else json.dumps(body),
            headers={} if body is None else {"Content-Type": kind},
            timeout=SECONDS,
        )
        if answer.ok:
            return dict(answer.json())
        try:
            said = answer.json()
        except requests.JSONDecodeError:
            said = {"message": answer.text[:500]}
        what = f"{method} {path}"
        raise ApiError(what, answer.status_code, said.get("reason") or answer.reason, said.get("message") or "")
