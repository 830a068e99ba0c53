"""A Blob account and a model hub on loopback, just enough of each for its client, with faults at will."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from localcloud.loopback import LoopbackServer

KEY = base64.b64encode(b"of no emulator").decode()


class Server(LoopbackServer):
    """`seen` lists `METHOD path` of every request."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.seen: list[str] = []
        super().__init__(handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class FakeAccount(Server):
    """A storage account with the container `box`. `fault(method, name)` may answer `(status, code)` instead."""

    def __init__(self) -> None:
        self.blobs: dict[str, tuple[bytes, dict[str, str]]] = {}  # name within `box` -> bytes, metadata
        self.blocks: dict[str, bytes] = {}
        self.fault: Callable[[str, str], tuple[int, str] | None] = lambda method, name: None
        super().__init__(_Blob)

    def writes(self) -> list[str]:
        return [line for line in self.seen if line.startswith(("PUT", "DELETE"))]


class _Blob(_Handler):
    server: FakeAccount

    def do(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        _, _, container, *rest = unquote(parts.path).split("/")
        name, body = "/".join(rest), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(f"{self.command} {name or '(list)'}")
        if trouble := self.server.fault(self.command, name):
            return self.refuse(*trouble)
        if container != "box":
            return self.refuse(404, "ContainerNotFound")
        if self.command == "PUT":
            return self.put(name, query, body)
        if query.get("comp") == ["list"]:
            inside = query.get("prefix", [""])[0]
            found = "".join(
                f"<Blob><Name>{escape(n)}</Name></Blob>" for n in sorted(self.server.blobs) if n.startswith(inside)
            )
            xml = f'<?xml version="1.0"?><EnumerationResults><Blobs>{found}</Blobs><NextMarker/></EnumerationResults>'
            return self.answer(200, xml.encode(), Content_Type="application/xml")
        if name not in self.server.blobs:
            return self.refuse(404, "BlobNotFound")
        if self.command == "DELETE":
            del self.server.blobs[name]
            return self.answer(202)
        data, metadata = self.server.blobs[name]
        headers = {f"x-ms-meta-{key}": value for key, value in metadata.items()} | {
            "ETag": f'"{hashlib.md5(data).hexdigest()}"', "Last-Modified": "Wed, 25 Nov 2026 00:00:00 GMT",
            "x-ms-blob-type": "BlockBlob",
        }  # fmt: skip
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("x-ms-range") or self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(200, data, **headers, Content_Length=str(len(data)))
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self.refuse(416, "InvalidRange")
        return self.answer(206, data[first : last + 1], **headers, Content_Range=f"bytes {first}-{last}/{len(data)}")

    def put(self, name: str, query: dict[str, list[str]], body: bytes) -> None:
        metadata = {
            key[10:].lower(): value for key, value in self.headers.items() if key.lower().startswith("x-ms-meta-")
        }
        if query.get("comp") == ["block"]:
            self.server.blocks[query["blockid"][0]] = body
        elif query.get("comp") == ["blocklist"]:
            ids = re.findall(r"<Latest>(.*?)</Latest>", body.decode())
            self.server.blobs[name] = (b"".join(self.server.blocks[i] for i in ids), metadata)
        else:
            self.server.blobs[name] = (body, metadata)
        self.answer(201, ETag='"1"', Last_Modified="Wed, 25 Nov 2026 00:00:00 GMT")

    def refuse(self, status: int, code: str) -> None:
        xml = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>as the test wants</Message></Error>'
        self.answer(status, xml.encode(), x_ms_error_code=code, Content_Type="application/xml")

    do_GET = do_PUT = do_HEAD = do_DELETE = do


class FakeHub(Server):
    """A hub with the one model `org/tiny` at `REVISION`, its files those of a folder; `gated` lets nobody fetch."""

    REVISION = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.large = {name for name in self.files if name.endswith((".safetensors", ".bin"))}  # kept by SHA-256
        self.gated = False
        self.tokens: set[str] = set()
        super().__init__(_Hub)

    def downloads(self) -> list[str]:
        return [line.rpartition("/")[2] for line in self.seen if line.startswith("GET") and "/resolve/" in line]


class _Hub(_Handler):
    server: FakeHub

    def do(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if not path.startswith(("/api/models/org/tiny/", "/org/tiny/")):
            return self.answer(404, x_error_code="RepoNotFound")
        if self.server.REVISION not in path:
            return self.answer(404, x_error_code="RevisionNotFound")
        if path == f"/api/models/org/tiny/revision/{self.server.REVISION}":
            files = [{"rfilename": name, "size": len(data), "blobId": "0"} for name, data in self.server.files.items()]
            for file in files:
                if file["rfilename"] in self.server.large:
                    digest = hashlib.sha256(self.server.files[str(file["rfilename"])]).hexdigest()
                    file["lfs"] = {"sha256": digest, "size": file["size"], "pointerSize": 1}
            told = {"id": "org/tiny", "sha": self.server.REVISION, "siblings": files}
            return self.answer(200, json.dumps(told).encode(), Content_Type="application/json")
        if "/resolve/" not in path:
            return self.answer(404)
        if self.server.gated:
            return self.answer(403, x_error_code="GatedRepo")
        data = self.server.files[path.rpartition("/")[2]]
        etag = hashlib.sha256(data).hexdigest()
        return self.answer(
            200, data, ETag=f'"{etag}"', X_Repo_Commit=self.server.REVISION, Content_Length=str(len(data))
        )

    do_GET = do_HEAD = do
