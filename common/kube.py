"""Asks the cluster's API server from inside of a pod, by its service account's token; the standard library alone."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SERVER = "https://kubernetes.default.svc"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where pods have their account's token
ANSWER_SECONDS = 15.0

Object = dict[str, Any]


class ApiError(Exception):
    """The API server refused or did not answer; `status` is 0 in the latter case."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Api:
    """Asks the API server as the account whose token and authority are in the folder `account`."""

    error: type[ApiError] = ApiError

    def __init__(self, server: str = SERVER, account: Path = ACCOUNT) -> None:
        self.server, self._account = urlsplit(server), account

    def ask(self, method: str, path: str, body: Object | None = None, kind: str = "application/json") -> Object:
        """The object that comes back. Raises `error`."""
        return dict(json.loads(self.text(method, path, body, kind)))

    def text(self, method: str, path: str, body: Object | None = None, kind: str = "application/json") -> str:
        """What comes back, as text. Raises `error`."""
        what, host = f"{method} {path}", self.server.hostname or ""
        connection: http.client.HTTPConnection
        try:
            # Read each time: the kubelet changes the token within the hour.
            headers = {"Authorization": f"Bearer {(self._account / 'token').read_text().strip()}"}
            if self.server.scheme == "https":
                trusted = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
                connection = http.client.HTTPSConnection(
                    host, self.server.port, timeout=ANSWER_SECONDS, context=trusted
                )
            else:
                connection = http.client.HTTPConnection(host, self.server.port, timeout=ANSWER_SECONDS)
            try:
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, path, data, headers | ({"Content-Type": kind} if body is not None else {}))
                answer = connection.getresponse()
                text = answer.read().decode(errors="replace")
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise self.error(f"{what}: no answer of the API server: {type(error).__name__}: {error}") from None
        if answer.status >= 300:
            try:
                said = json.loads(text).get("message", text)
            except (ValueError, AttributeError):
                said = text[:500]
            raise self.error(f"{what}: {answer.status}: {said}", answer.status)
        return text
