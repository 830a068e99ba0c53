"""The kubelet's HTTPS server, as far as the API server needs it for `kubectl logs`, and the nodes' addresses for it."""

from __future__ import annotations

import logging
import select
import ssl
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from localcloud.api import Api, ApiError
from localcloud.pods import pod_path
from localcloud.runner.logs import Log, log_file, stamp

POLL_SECONDS = 0.2  # how often a followed log is looked at
PIECE_BYTES = 32768
WAITING = {
    "ErrImagePull": "image can't be pulled",
    "ImagePullBackOff": "trying and failing to pull image",
}
log = logging.getLogger(__name__)


class NoLog(Exception):
    """The kubelet's answer where there is none: an HTTP status, and its words."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Kubelet:
    """A context manager: one server for all nodes of the runner, on `port` of all addresses of its network namespace.

    It answers who is in that namespace itself, as the API server is; pods, which have their own, are refused. `folder`:
    the runner's. `hold` gives the namespace the nodes' addresses, on `lo`, and takes them away at the end.
    """

    def __init__(self, api: Api, folder: Path, port: int) -> None:
        self._api, self._folder, self._port = api, folder, port
        self._held: set[str] = set()

    def __enter__(self) -> Kubelet:
        self._server = _Server(self._api, self._folder, self._port)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="kubelet", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.hold(())

    def hold(self, addresses: Iterable[str]) -> None:
        """Make these the nodes' addresses; where `ip` refuses one, its node has no logs."""
        wanted = set(addresses)
        for address in self._held - wanted:
            _ip("del", address)
        self._held = self._held & wanted | {address for address in wanted - self._held if _ip("replace", address)}


def _ip(verb: str, address: str) -> bool:
    done = subprocess.run(["ip", "addr", verb, f"{address}/32", "dev", "lo"], capture_output=True, text=True)
    if done.returncode != 0:
        log.warning("kubelet: ip addr %s %s: %s", verb, address, done.stderr.strip())
    return done.returncode == 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # whoever follows a log ends by `closing`

    def __init__(self, api: Api, folder: Path, port: int) -> None:
        self.api, self.folder, self.closing = api, folder, threading.Event()
        super().__init__(("0.0.0.0", port), _Handler)
        # The handshake is the handler's, in its own thread: a stranger that says nothing holds nobody up.
        self.socket = _tls().wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.info("kubelet: %s", client_address, exc_info=True)  # it went away


def _tls() -> ssl.SSLContext:
    """With a certificate that signs itself: an API server without --kubelet-certificate-authority takes any."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "drydock-runner")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:  # for us alone; the context takes no bytes
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        file.flush()
        context.load_cert_chain(file.name)
    return context


class _Handler(BaseHTTPRequestHandler):
    """GET /containerLogs/NAMESPACE/POD/CONTAINER, as the API server asks for it (kubernetes, pkg/kubelet/server)."""

    server: _Server
    protocol_version = "HTTP/1.1"  # for chunks

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        try:
            if self.client_address[0] != self.connection.getsockname()[0]:  # not from here to here
                raise NoLog(HTTPStatus.UNAUTHORIZED, "Unauthorized")
            match address.path.split("/"):
                case ["", "containerLogs", namespace, pod, container]:
                    wanted = _options(address.query)
                    start = _Start(self.server, namespace, pod, container, previous=wanted.previous)
                case _:
                    raise NoLog(HTTPStatus.NOT_FOUND, "404 page not found")
        except NoLog as none:
            self._begin(none.status, "Content-Length", str(len(str(none).encode())))
            self.wfile.write(str(none).encode())
            return
        self._begin(HTTPStatus.OK, "Transfer-Encoding", "chunked")
        self._left = wanted.limit
        self._tell(start, wanted)
        self.wfile.write(b"0\r\n\r\n")

    def _begin(self, status: HTTPStatus, header: str, value: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header(header, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _tell(self, start: _Start, wanted: _Options) -> None:
        said = Log(start.file)
        lines: Iterable[tuple[float, bytes]] = said.lines(to_the_end=not wanted.follow)
        self._send(lines if wanted.tail is None else deque(lines, wanted.tail), wanted)
        over = not wanted.follow
        while not over and self._left != 0 and not self._gone():
            over = start.over()  # asked before the rest is read
            self._send(said.lines(to_the_end=over), wanted)

    def _gone(self) -> bool:
        """Whether there is nobody to tell any more; returns after a while. A client has nothing else to say."""
        return bool(select.select([self.connection], [], [], POLL_SECONDS)[0]) or self.server.closing.is_set()

    def _send(self, lines: Iterable[tuple[float, bytes]], wanted: _Options) -> None:
        shown = ((stamp(at) if wanted.timestamps else b"") + line for at, line in lines if at >= wanted.since)
        for piece in _pieces(shown):
            cut = piece[: self._left]
            if cut:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(cut), cut))
            if self._left is not None:
                self._left -= len(cut)

    def log_message(self, format: str, *args: object) -> None: ...


@dataclass(frozen=True)
class _Options:
    """Of `PodLogOptions`, what a file has: which of its output is stdout is not known."""

    follow: bool
    previous: bool
    timestamps: bool
    since: float  # seconds since 1970
    tail: int | None  # lines
    limit: int | None  # bytes


def _options(query: str) -> _Options:
    given = {key: values[-1] for key, values in parse_qs(query).items()}
    try:
        since = time.time() - int(given["sinceSeconds"]) if "sinceSeconds" in given else 0.0
        if "sinceTime" in given:
            since = datetime.fromisoformat(given["sinceTime"]).timestamp()
        tail, limit = (int(given[key]) if key in given else None for key in ("tailLines", "limitBytes"))
    except ValueError:
        raise NoLog(HTTPStatus.BAD_REQUEST, "Unable to decode query.") from None
    flags = {key: given.get(key) == "true" for key in ("follow", "previous", "timestamps")}
    return _Options(**flags, since=since, tail=tail, limit=limit)


class _Start:
    """One start of a container: the last one, or with `previous` the one that ended before it. Raises `NoLog`."""

    def __init__(self, server: _Server, namespace: str, pod: str, container: str, *, previous: bool) -> None:
        self._api, self._path, self._container = server.api, pod_path(namespace, pod), container
        found = self._find()
        if found is None:
            raise NoLog(HTTPStatus.NOT_FOUND, f'pod "{pod}" does not exist')
        spec, self._uid = found["spec"], found["metadata"]["uid"]
        if container not in [item["name"] for item in [*spec.get("initContainers", []), *spec["containers"]]]:
            raise NoLog(HTTPStatus.NOT_FOUND, f'container "{container}" not found in pod "{pod}"')
        try:
            self._number = _number(_status(found, container), previous)
        except LookupError as error:
            raise NoLog(
                HTTPStatus.BAD_REQUEST, error.args[0].format(f'container "{container}" in pod "{pod}"')
            ) from None
        self.file = log_file(server.folder, namespace, pod, self._uid, container, self._number)

    def over(self) -> bool:
        """Whether nothing will be added. While the API server does not answer, something may be."""
        try:
            found = self._find()
        except NoLog:
            return False
        if found is None or found["metadata"]["uid"] != self._uid:
            return True
        item = _status(found, self._container)
        return item.get("restartCount") != self._number or "running" not in item.get("state", {})

    def _find(self) -> dict[str, Any] | None:
        try:
            return self._api.find(self._path)
        except (ApiError, OSError) as error:
            raise NoLog(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from None


def _status(pod: Mapping[str, Any], container: str) -> Mapping[str, Any]:
    """Of the container, as the API server has it; empty where nothing is known of it."""
    status = pod.get("status") or {}
    found = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return next((item for item in found if item["name"] == container), {})


def _number(item: Mapping[str, Any], previous: bool) -> int:
    """Which start of a container with this status has the log. Where none has: LookupError with the kubelet's words
    (kubelet_pods.go, validateContainerLogStatus), `{}` for the container."""
    if not item:
        raise LookupError("{} is not available")
    state, count = item.get("state") or {}, int(item.get("restartCount", 0))
    ended_before = "terminated" in (item.get("lastState") or {})
    if previous:
        if not ended_before:
            raise LookupError("previous terminated {} not found")
        return count if "waiting" in state else count - 1  # a container that waits to be started again has no other
    if not ended_before and not {"running", "terminated"} & state.keys():
        reason = state.get("waiting", {}).get("reason", "")
        raise LookupError(f"{{}} is waiting to start: {WAITING.get(reason, reason)}")
    return count


def _pieces(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Few large ones in place of many small ones."""
    piece = b""
    for line in lines:
        piece += line
        if len(piece) > PIECE_BYTES:
            yield piece
            piece = b""
    yield piece
