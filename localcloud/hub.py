"""Stands in for the Hugging Face hub: models whose files lie in folders, each at the one revision that they make."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from common.files import file_digest
from localcloud.loopback import LoopbackServer

WEIGHTS = (".safetensors", ".bin")  # what the hub keeps by SHA-256, outside of git


@dataclass(frozen=True)
class File:
    """`sha256`: 64 hex digits."""

    path: Path
    size: int
    sha256: str


class Model:
    """The files of one folder, as they are when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def files(self) -> dict[str, File]:
        return {
            path.name: File(path, path.stat().st_size, file_digest(path).removeprefix("sha256:"))
            for path in sorted(self._folder.iterdir())
            if path.is_file()
        }

    @cached_property
    def revision(self) -> str:
        """The commit (40 hex digits) that stands for the files: another content is another revision."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, file in self.files.items():
            digest.update(f"{name}\0sha256:{file.sha256}\n".encode())
        return digest.hexdigest()

    def described(self, name: str) -> dict[str, Any]:
        """What `/api/models/NAME/revision/SHA` answers."""
        siblings: list[dict[str, Any]] = []
        for file_name, file in self.files.items():
            entry: dict[str, Any] = {"rfilename": file_name, "size": file.size, "blobId": "0"}
            if file_name.endswith(WEIGHTS):
                entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 1}
            siblings.append(entry)
        return {"id": name, "sha": self.revision, "siblings": siblings}


def revision_of(folder: Path) -> str:
    """`Model.revision` of the files of `folder`."""
    return Model(folder).revision


def answer(handler: BaseHTTPRequestHandler, models: Mapping[str, Model]) -> None:
    """Answer a GET or HEAD of the hub's API for `models` by OWNER/NAME."""
    path = unquote(urlsplit(handler.path).path)
    name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
    model = models.get(name)
    if model is None:
        _reply(handler, 404, headers={"X-Error-Code": "RepoNotFound"})
    elif f"/{model.revision}" not in path:
        _reply(handler, 404, headers={"X-Error-Code": "RevisionNotFound"})
    elif path == f"/api/models/{name}/revision/{model.revision}":
        body = json.dumps(model.described(name)).encode()
        _reply(handler, 200, body, {"Content-Type": "application/json"})
    elif file := model.files.get(path.removeprefix(f"/{name}/resolve/{model.revision}/")):
        headers = {"ETag": f'"{file.sha256}"', "X-Repo-Commit": model.revision, "Content-Length": str(file.size)}
        _reply(handler, 200, headers=headers)
        if handler.command != "HEAD":
            with file.path.open("rb") as source:
                shutil.copyfileobj(source, handler.wfile)
    else:
        _reply(handler, 404, headers={"X-Error-Code": "EntryNotFound"})


def _reply(
    handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> None:
    handler.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(key, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


class Hub(LoopbackServer):
    """Serves `model` (OWNER/NAME); `url` is for HF_ENDPOINT."""

    def __init__(self, model: str, folder: Path, port: int = 0) -> None:
        self.models = {model: Model(folder)}
        self.revision = self.models[model].revision
        super().__init__(_Handler, port)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: whoever asks tells what failed."""

    def _do(self) -> None:
        answer(self, self.server.models)

    do_GET = do_HEAD = _do
