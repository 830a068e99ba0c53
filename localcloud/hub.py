"""Stands in for the Hugging Face hub: one model, whose files lie in a folder, at the one revision that they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from common.files import file_digest
from localcloud.loopback import LoopbackServer

WEIGHTS = (".safetensors", ".bin")  # what the hub keeps by SHA-256, outside of git


def revision_of(folder: Path) -> str:
    """The commit (40 hex digits) that stands for the files of `folder`: another content is another revision."""
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


class Hub(LoopbackServer):
    """Serves `model` (OWNER/NAME); `url` is for HF_ENDPOINT."""

    def __init__(self, model: str, folder: Path, port: int = 0) -> None:
        self.model, self.revision = model, revision_of(folder)
        self.files = {path.name: path for path in folder.iterdir() if path.is_file()}
        super().__init__(_Handler, port)

    def described(self) -> dict[str, Any]:
        """What `/api/models/MODEL/revision/SHA` answers."""
        siblings: list[dict[str, Any]] = []
        for name, path in sorted(self.files.items()):
            size = path.stat().st_size
            entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": "0"}
            if name.endswith(WEIGHTS):
                digest = file_digest(path).removeprefix("sha256:")
                entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 1}
            siblings.append(entry)
        return {"id": self.model, "sha": self.revision, "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: whoever asks tells what failed."""

    def _do(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if not path.startswith((f"/api/models/{hub.model}/", f"/{hub.model}/")):
            self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif f"/{hub.revision}" not in path:
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/{hub.model}/revision/{hub.revision}":
            self._answer(200, json.dumps(hub.described()).encode(), {"Content-Type": "application/json"})
        elif (name := path.removeprefix(f"/{hub.model}/resolve/{hub.revision}/")) in hub.files:
            file = hub.files[name]
            etag = file_digest(file).removeprefix("sha256:")
            self._answer(200, file.read_bytes(), {"ETag": f'"{etag}"', "X-Repo-Commit": hub.revision})
        else:
            self._answer(404, headers={"X-Error-Code": "EntryNotFound"})

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = _do
