"""Azure Resource Manager as far as `infra.uploads` asks it: the runs by which a registry builds images.

Nothing is built. A context is taken as `az acr build` sends it, checked, and its image's digest follows from its bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import tarfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from localcloud.azure import faults
from localcloud.azure.errors import AzureError
from localcloud.azure.refusals import not_found
from localcloud.azure.world import World

_REGISTRY = re.compile(
    r"(?P<id>/subscriptions/[^/]+/resourceGroups/(?P<group>[^/]+)"
    r"/providers/Microsoft.ContainerRegistry/registries/(?P<name>[^/]+))/(?P<what>.+)"
)


@dataclass
class _Run:
    """One build: `failure` is why it fails, if it does; `ends` is in seconds of `time.monotonic`."""

    ends: float
    images: list[dict[str, str]]
    log: list[str]
    failure: str = ""

    def properties(self, run: str) -> dict[str, Any]:
        if time.monotonic() < self.ends:
            return {"runId": run, "status": "Running"}
        if self.failure:
            return {"runId": run, "status": "Failed", "runErrorMessage": self.failure}
        return {"runId": run, "status": "Succeeded", "outputImages": self.images}


@dataclass
class _Builds:
    sources: dict[str, bytes] = field(default_factory=dict)
    runs: dict[str, _Run] = field(default_factory=dict)


class ArmServer(ThreadingHTTPServer):
    """Serves on loopback from a thread of its own until `close`. `url` is for DRYDOCK_ARM_ENDPOINT."""

    daemon_threads = True

    def __init__(self, folder: Path, world: Path, build_seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.world, self.build_seconds = folder, World(world), build_seconds
        self.builds = _Builds()
        self.signature = f"sig={secrets.token_hex(16)}"
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def serve(folder: Path, world: Path, build_seconds: float = 0.0) -> ArmServer:
    """Answer for the registries of `world`, with the faults of the local cloud in `folder`.

    A run takes `build_seconds`; with none it is over at once.
    """
    return ArmServer(folder, world, build_seconds)


class _Handler(BaseHTTPRequestHandler):
    server: ArmServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: this is standard error of whoever runs Pulumi."""

    def _answer(self, status: int, body: bytes | Mapping[str, Any] = b"") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        try:
            if parts.path.startswith(("/sources/", "/logs/")):
                self._signed(parts.path, parts.query, body)
            else:
                self._answer(200, self._managed(parts.path, body))
        except AzureError as error:
            self._answer(error.status, {"error": {"code": error.code, "message": error.message}})

    do_GET = do_PUT = do_POST = _do

    def _signed(self, path: str, query: str, body: bytes) -> None:
        """Where sources go and logs come from: whoever has the signature may, and nobody else."""
        if query != self.server.signature:
            self._answer(403, b"<Error><Code>AuthenticationFailed</Code></Error>")
        elif self.command == "PUT" and self.headers.get("x-ms-blob-type") == "BlockBlob":
            self.server.builds.sources[path.removeprefix("/sources/")] = body
            self._answer(201)
        elif self.command == "GET" and (run := self.server.builds.runs.get(path.removeprefix("/logs/"))):
            self._answer(200, "\n".join(run.log).encode())
        else:
            self._answer(404, b"<Error><Code>BlobNotFound</Code></Error>")

    def _managed(self, path: str, body: bytes) -> dict[str, Any]:
        match = _REGISTRY.fullmatch(path)
        if not match:
            raise AzureError(404, "InvalidResourceType", f"{path}: localcloud.azure.arm answers for registries alone")
        with self.server.world.hold() as resources:
            if not resources.get(match["id"]):
                raise not_found("Microsoft.ContainerRegistry/registries", match["name"], match["group"])
            pools = {
                record.id.rpartition("/")[2]
                for record in resources.all()
                if record.token.endswith("containerregistry:AgentPool")
            }
        builds, url, signature = self.server.builds, self.server.url, self.server.signature
        what = match["what"]
        if self.command == "POST" and what == "listBuildSourceUploadUrl":
            place = f"source/{secrets.token_hex(8)}.tar.gz"
            return {"uploadUrl": f"{url}/sources/{place}?{signature}", "relativePath": place}
        if self.command == "POST" and what == "scheduleRun":
            run = f"ca{secrets.token_hex(4)}"
            builds.runs[run] = self._schedule(json.loads(body or b"{}"), match["name"], pools)
            return {"properties": {"runId": run, "status": "Queued"}}
        found = re.fullmatch(r"runs/(\w+)(/listLogSasUrl)?", what)
        if found and found[1] in builds.runs:
            if found[2]:
                return {"logLink": f"{url}/logs/{found[1]}?{signature}"}
            return {"properties": builds.runs[found[1]].properties(found[1])}
        raise AzureError(404, "RunNotFound", f"registry {match['name']} has no {what}")

    def _schedule(self, request: Mapping[str, Any], registry: str, pools: set[str]) -> _Run:
        """The run of a request that Azure would take. Raises what it answers to one that it would not."""
        dockerfile, images = str(request.get("dockerFilePath", "")), list(request.get("imageNames", []))
        context = self.server.builds.sources.get(str(request.get("sourceLocation")))
        pool = request.get("agentPoolName")
        problems = [
            *([] if request.get("type") == "DockerBuildRequest" else ["type is not DockerBuildRequest"]),
            *([] if images else ["imageNames is empty"]),
            *(
                []
                if request.get("platform") == {"os": "Linux", "architecture": "amd64"}
                else ["platform is not Linux, amd64"]
            ),
            *([] if context is not None else [f"nothing was uploaded to {request.get('sourceLocation')}"]),
            *([] if pool is None or pool in pools else [f"there is no agent pool {pool}"]),
        ]
        if problems or context is None:
            raise AzureError(400, "InvalidRequest", "; ".join(problems))
        fault = self._fault(images, registry)
        failure, log = _examine(context, dockerfile)
        if fault and fault.kind == "build_failed":
            failure = "failed to run step ID: build: exit status 1"
            log += [f"Step 3/9 : RUN pip install ({images[0]})", "ERROR: No matching distribution found", failure]
        digest = f"sha256:{hashlib.sha256(context).hexdigest()}"
        made = [
            {"registry": f"{registry.lower()}.azurecr.io", "repository": name, "tag": tag, "digest": digest}
            for name, _, tag in (image.partition(":") for image in images)
        ]
        slow = fault.seconds if fault and fault.kind == "slow" else 0.0
        return _Run(time.monotonic() + self.server.build_seconds + slow, made, log, failure)

    def _fault(self, images: list[str], registry: str) -> faults.Fault | None:
        names = (*images, *(image.partition(":")[0] for image in images), registry)
        fault = faults.take(self.server.folder, "build", "containerregistry:Registry", *names)
        if fault and fault.kind == "throttled":
            raise AzureError(429, "TooManyRequests", "too many runs were asked for; try again later")
        return fault


def _examine(context: bytes, dockerfile: str) -> tuple[str, list[str]]:
    """(why the build must fail, or nothing; its log) of a build context, a tar.gz."""
    try:
        with tarfile.open(fileobj=io.BytesIO(context), mode="r:gz") as archive:
            names = [name.removeprefix("./") for name in archive.getnames()]
    except (tarfile.TarError, EOFError, OSError) as error:
        failure = f"failed to download context: {error}"
        return failure, [failure]
    if dockerfile not in names:
        failure = (
            f"unable to prepare context: unable to evaluate symlinks in Dockerfile path: {dockerfile}: no such file"
        )
        return failure, [failure]
    return "", [
        f"Downloading source code: {len(names)} files",
        f"Setting up the builder configuration for {dockerfile}",
    ]
