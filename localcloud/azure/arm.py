"""Azure Resource Manager as far as `infra.uploads` asks it: the runs by which a registry builds images.

A context is taken as `az acr build` sends it, and checked. A builder, where there is one, makes its image; without
one nothing is built, and the image's digest follows from the context's bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import secrets
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from localcloud.azure import faults
from localcloud.azure.errors import AzureError
from localcloud.azure.refusals import not_found
from localcloud.azure.world import World
from localcloud.loopback import LoopbackServer

_REGISTRY = re.compile(
    r"(?P<id>/subscriptions/[^/]+/resourceGroups/(?P<group>[^/]+)"
    r"/providers/Microsoft.ContainerRegistry/registries/(?P<name>[^/]+))/(?P<what>.+)"
)


class ImageBuilder(Protocol):
    """`localcloud.builder.Builder`."""

    def build(
        self, context: bytes, dockerfile: str, arguments: Mapping[str, str], images: Sequence[str], log: Path
    ) -> str:
        """The digest of what became of a context; what is said goes to `log` meanwhile. Raises when it fails."""
        ...


@dataclass
class _Run:
    """One build: `failure` is why it fails, if it does; `ends` is in seconds of `time.monotonic`.

    Its log is `log`, then what a builder writes into `file`.
    """

    ends: float
    images: list[dict[str, str]]
    log: list[str]
    failure: str = ""
    file: Path | None = None

    def text(self) -> str:
        said = self.file.read_text(errors="replace").splitlines() if self.file and self.file.exists() else []
        ending = [self.failure] if self.file and self.failure else []
        return "\n".join([*self.log, *said, *ending])

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


class ArmServer(LoopbackServer):
    """`url` is for DRYDOCK_ARM_ENDPOINT."""

    def __init__(self, folder: Path, world: Path, build_seconds: float, builder: ImageBuilder | None) -> None:
        self.folder, self.world, self.build_seconds, self.builder = folder, World(world), build_seconds, builder
        self.builds = _Builds()
        self.signature = f"sig={secrets.token_hex(16)}"
        super().__init__(_Handler)


def serve(folder: Path, world: Path, build_seconds: float = 0.0, builder: ImageBuilder | None = None) -> ArmServer:
    """Answer for the registries of `world`, with the faults of the local cloud in `folder`.

    With a `builder` a run is over when it is done, its log below `folder`/logs. Without one, a run takes
    `build_seconds`; with none it is over at once.
    """
    return ArmServer(folder, world, build_seconds, builder)


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
            self._answer(200, run.text().encode())
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
            builds.runs[run] = self._schedule(run, json.loads(body or b"{}"), match["name"], pools)
            return {"properties": {"runId": run, "status": "Queued"}}
        found = re.fullmatch(r"runs/(\w+)(/listLogSasUrl)?", what)
        if found and found[1] in builds.runs:
            if found[2]:
                return {"logLink": f"{url}/logs/{found[1]}?{signature}"}
            return {"properties": builds.runs[found[1]].properties(found[1])}
        raise AzureError(404, "RunNotFound", f"registry {match['name']} has no {what}")

    def _schedule(self, name: str, request: Mapping[str, Any], registry: str, pools: set[str]) -> _Run:
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
        slow = fault.seconds if fault and fault.kind == "slow" else 0.0
        if self.server.builder and not failure:
            run = _Run(math.inf, [], log, file=self.server.folder / "logs" / f"build-{name}.log")
            work = (self.server.builder, run, context, request, registry, slow)
            threading.Thread(target=_build, args=work, daemon=True).start()
            return run
        digest = f"sha256:{hashlib.sha256(context).hexdigest()}"
        ends = time.monotonic() + self.server.build_seconds + slow
        return _Run(ends, _made(registry, images, digest), log, failure)

    def _fault(self, images: list[str], registry: str) -> faults.Fault | None:
        names = (*images, *(image.partition(":")[0] for image in images), registry)
        fault = faults.take(self.server.folder, "build", "containerregistry:Registry", *names)
        if fault and fault.kind == "throttled":
            raise AzureError(429, "TooManyRequests", "too many runs were asked for; try again later")
        return fault


def _build(
    builder: ImageBuilder, run: _Run, context: bytes, request: Mapping[str, Any], registry: str, slow: float
) -> None:
    """Build what `run` is of; `run.ends` is set last, for until then others take it as running."""
    images = [str(image) for image in request["imageNames"]]
    arguments = {str(item["name"]): str(item["value"]) for item in request.get("arguments", [])}
    try:
        assert run.file is not None
        run.file.parent.mkdir(parents=True, exist_ok=True)
        digest = builder.build(context, str(request["dockerFilePath"]), arguments, images, run.file)
        run.images = _made(registry, images, digest)
    except Exception as error:  # whatever it is: a run that never ends would be waited for
        run.failure = str(error) or type(error).__name__
    run.ends = time.monotonic() + slow


def _made(registry: str, images: Sequence[str], digest: str) -> list[dict[str, str]]:
    return [
        {"registry": f"{registry.lower()}.azurecr.io", "repository": name, "tag": tag, "digest": digest}
        for name, _, tag in (image.partition(":") for image in images)
    ]


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
