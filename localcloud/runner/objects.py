"""What the runner reads of the cluster for one pod: ConfigMaps, Secrets, Services, tokens of its service account."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from localcloud.api import Api
from localcloud.runner.fields import ConfigError

TOKEN_SECONDS = 3607  # what the admission controller asks for; a projected volume that says nothing gets an hour


class Objects:
    """Of one pod. Every method may raise `ApiError`."""

    def __init__(self, api: Api, pod: Mapping[str, Any]) -> None:
        self._api = api
        self._name, self._uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        self._account = pod["spec"].get("serviceAccountName", "default")
        self._place = f"/api/v1/namespaces/{pod['metadata']['namespace']}"

    def data(self, kind: str, name: str) -> dict[str, bytes] | None:
        """The entries of a ConfigMap (`configmaps`) or Secret (`secrets`); None where there is no such object."""
        found = self._api.find(f"{self._place}/{kind}/{name}")
        if found is None:
            return None
        coded = found.get("data" if kind == "secrets" else "binaryData") or {}
        plain = (found.get("data") or {}) if kind == "configmaps" else {}
        return {key: base64.b64decode(value) for key, value in coded.items()} | {
            key: value.encode() for key, value in plain.items()
        }

    def text(self, kind: str, name: str) -> dict[str, str] | None:
        """As `data`, without the entries that are no text."""
        found = self.data(kind, name)
        if found is None:
            return None
        result = {}
        for key, value in found.items():
            try:
                result[key] = value.decode()
            except UnicodeDecodeError:
                continue
        return result

    def services(self) -> list[dict[str, Any]]:
        return self._api.list(f"{self._place}/services")

    def token(self, audience: str | None, seconds: int) -> str:
        """A new token of the pod's service account, bound to the pod: it ends with it, and after `seconds`."""
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                **({"audiences": [audience]} if audience else {}),
                "expirationSeconds": seconds,
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": self._name, "uid": self._uid},
            },
        }
        answer = self._api.post(f"{self._place}/serviceaccounts/{self._account}/token", request)
        token = answer.get("status", {}).get("token")
        if not token:
            raise ConfigError(f"serviceaccount {self._account}: the API server gave no token")
        return str(token)
