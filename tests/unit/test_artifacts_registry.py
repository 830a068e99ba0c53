"""The registry store against a scripted server: retries, cut and altered streams, sign-in."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from artifacts import registry
from artifacts.store import (
    MANIFEST_TYPE,
    TITLE,
    CorruptBlob,
    NotFound,
    StoreError,
    canonical_json,
    open_store,
)

DATA = b"weights" * 10_000
KIND = "application/vnd.test.v1+json"


class Request:
    """One request that the scripted server has to answer."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self.method, self.path, self.headers = handler.command, handler.path, handler.headers
        self.body = handler.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._handler = handler

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        """Send a response whose Content-Length claims `length` bytes, then close the connection."""
        self._handler.send_response(status)
        for name, value in headers.items():
            self._handler.send_header(name.replace("_", "-"), value)
        self._handler.send_header("Content-Length", str(len(body) if length is None else length))
        self._handler.end_headers()
        if self.method != "HEAD":
            self._handler.wfile.write(body)
        self._handler.close_connection = True


class Server:
    """A registry that answers as `script` says and remembers what it was asked."""

    def __init__(self) -> None:
        self.script: Callable[[Request], None] = lambda request: request.answer(404)
        self.seen: list[Request] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self) -> None:
                request = Request(self)
                outer.seen.append(request)
                outer.script(request)

            do_GET = do_HEAD = do_POST = do_PUT = _any

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.http.server_port}"
        self.url = f"oci://{self.host}/team"


@contextmanager
def _running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setattr(registry, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with _running() as server:
        yield server


class Contents:
    """A script that serves one artifact; `blob` answers for its layer."""

    def __init__(self) -> None:
        layer = {"mediaType": "x/y", "digest": _sha(DATA), "size": len(DATA), "annotations": {TITLE: "w"}}
        config = {"mediaType": KIND, "digest": _sha(b"{}"), "size": 2}
        document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": [layer]}
        self.manifest = canonical_json(document)
        self.digest = _sha(self.manifest)
        self.blob: Callable[[Request], None] = lambda request: request.answer(200, DATA)

    def __call__(self, request: Request) -> None:
        if "/manifests/" in request.path:
            request.answer(200, self.manifest, Docker_Content_Digest=self.digest, Content_Type=MANIFEST_TYPE)
        elif request.path.endswith(_sha(b"{}")):
            request.answer(200, b"{}")
        else:
            self.blob(request)


def _sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_a_passing_trouble_is_retried(server: Server, tmp_path: Path) -> None:
    contents = Contents()
    troubles = [
        lambda request: request.answer(503),
        lambda request: request.answer(200, DATA[:1000], length=len(DATA)),  # the connection drops in the middle
        lambda request: request.answer(200, DATA),
    ]
    contents.blob = lambda request: troubles.pop(0)(request)
    server.script = contents
    artifact = open_store(server.url).pull("adapters/kubectl", "promoted", tmp_path / "out")
    assert (artifact.digest, artifact.config, troubles) == (contents.digest, b"{}", [])
    assert (tmp_path / "out" / "w").read_bytes() == DATA
    assert all(request.path.startswith("/v2/team/adapters/kubectl/") for request in server.seen)


@pytest.mark.parametrize(
    "sent",
    [DATA[:1000], DATA[:-1] + b"#", DATA + b"#"],
    ids=["truncated", "altered", "longer"],
)
def test_a_wrong_blob_names_both_digests(server: Server, tmp_path: Path, sent: bytes) -> None:
    contents = Contents()
    contents.blob = lambda request: request.answer(200, sent)
    server.script = contents
    with pytest.raises(CorruptBlob) as caught:
        open_store(server.url).pull("adapters/kubectl", "promoted", tmp_path / "out")
    assert f"expected {_sha(DATA)} of {len(DATA)} bytes, found {_sha(sent)} of {len(sent)} bytes" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_is_always_cut(server: Server, tmp_path: Path) -> None:
    contents = Contents()
    contents.blob = lambda request: request.answer(200, DATA[:1000], length=len(DATA))
    server.script = contents
    with pytest.raises(StoreError, match=rf"4 attempts: blob {_sha(DATA)} of 70000 bytes: the stream was cut: .*1000"):
        open_store(server.url).pull("adapters/kubectl", "promoted", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_altered_manifest_is_refused(server: Server, tmp_path: Path) -> None:
    contents = Contents()
    contents.manifest = contents.manifest.replace(b"x/y", b"x/z")
    server.script = contents
    with pytest.raises(CorruptBlob, match=f"expected {contents.digest}, found {_sha(contents.manifest)}"):
        open_store(server.url).pull("adapters/kubectl", "promoted", tmp_path / "out")


def test_it_gives_up_and_says_why(server: Server) -> None:
    told = json.dumps({"errors": [{"code": "UNAVAILABLE", "message": "disk is full"}]}).encode()
    server.script = lambda request: request.answer(500, told)
    with pytest.raises(StoreError, match=r"gave up after 4 attempts: GET .* 500 .*UNAVAILABLE disk is full"):
        open_store(server.url).tags("adapters/kubectl")
    assert len(server.seen) == registry.ATTEMPTS


def test_a_refusal_is_not_retried(server: Server) -> None:
    told = json.dumps({"errors": [{"code": "DENIED", "message": "read only"}]}).encode()
    server.script = lambda request: request.answer(403, told)
    with pytest.raises(StoreError, match=r"403 .*DENIED read only"):
        open_store(server.url).tags("adapters/kubectl")
    assert len(server.seen) == 1


def test_nobody_listens(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(StoreError, match="gave up after 4 attempts"):
        open_store(server.url).resolve("adapters/kubectl", "promoted")


def test_nothing_there(server: Server) -> None:
    with pytest.raises(NotFound, match="no tag in this repository"):
        open_store(server.url).resolve("adapters/kubectl", "promoted")


def test_a_registry_that_answers_with_something_else(server: Server, tmp_path: Path) -> None:
    server.script = lambda request: request.answer(200, b"<html>please sign in</html>")
    with pytest.raises(StoreError, match="expected a registry's JSON, found '<html>"):
        open_store(server.url).tags("x")
    contents = Contents()
    server.script = contents  # asked for another digest, it hands out this one
    with pytest.raises(CorruptBlob, match=f"expected {_sha(b'other')}, found {contents.digest}"):
        open_store(server.url).pull("x", _sha(b"other"), tmp_path / "out")


def test_a_listing_has_pages(server: Server) -> None:
    def script(request: Request) -> None:
        if request.method == "HEAD":
            request.answer(200, Docker_Content_Digest=_sha(request.path.encode()))
        elif "last=a" in request.path:
            request.answer(200, b'{"tags": ["b"]}')
        else:
            request.answer(200, b'{"tags": ["a"]}', Link='</v2/team/x/tags/list?n=1&last=a>; rel="next"')

    server.script = script
    assert sorted(open_store(server.url).tags("x")) == ["a", "b"]


def _docker_login(tmp_path: Path, host: str) -> str:
    secret = base64.b64encode(b"somebody:something").decode()
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {host: {"auth": secret}}}))
    return f"Basic {secret}"


def test_an_upload_starts_again_and_keeps_the_sign_in_at_home(server: Server, tmp_path: Path) -> None:
    basic = _docker_login(tmp_path, server.host)
    (tmp_path / "w").write_bytes(DATA)
    stored: dict[str, bytes] = {}
    with _running() as elsewhere:  # a registry may send the bytes to the host of its storage

        def home(request: Request) -> None:
            if request.headers.get("Authorization") != basic:
                request.answer(401, WWW_Authenticate='Basic realm="x"')
            elif request.method == "POST":
                request.answer(202, Location=f"http://{elsewhere.host}/upload?state=1")
            elif request.method == "PUT":
                stored[request.path.rpartition("/")[2]] = request.body
                request.answer(201)
            else:
                known = request.path.rpartition("/")[2] in stored
                request.answer(200 if known else 404)

        def away(request: Request) -> None:
            if len(elsewhere.seen) == 1:
                request.answer(503)
            else:
                stored[request.path.partition("?state=1&digest=")[2]] = request.body
                request.answer(201)

        server.script, elsewhere.script = home, away
        digest = open_store(server.url).push("x", {"w": tmp_path / "w"}, b"{}", KIND)
        assert all("Authorization" not in request.headers for request in elsewhere.seen)
    assert set(stored) == {_sha(DATA), _sha(b"{}"), digest}
    assert all(_sha(body) == name for name, body in stored.items())


def _guarded(server: Server, contents: Contents, challenge: str, wanted: str) -> Callable[[Request], None]:
    def script(request: Request) -> None:
        if request.path.startswith("/token"):
            request.answer(200, b'{"token": "letmein"}')
        elif request.headers.get("Authorization") == wanted:
            contents(request)
        else:
            request.answer(401, WWW_Authenticate=challenge)

    return script


def test_basic_sign_in(server: Server, tmp_path: Path) -> None:
    contents = Contents()
    server.script = _guarded(server, contents, 'Basic realm="x"', _docker_login(tmp_path, server.host))
    assert open_store(server.url).inspect("adapters/kubectl", "promoted").digest == contents.digest
    assert sum("Authorization" not in request.headers for request in server.seen) == 1  # asked once, kept after


@pytest.mark.parametrize("known", [True, False], ids=["signed in", "anonymous"])
def test_token_sign_in(server: Server, tmp_path: Path, known: bool) -> None:
    basic = _docker_login(tmp_path, server.host) if known else None
    challenge = f'Bearer realm="http://{server.host}/token",service="s",scope="repository:team/x:pull"'
    contents = Contents()
    server.script = _guarded(server, contents, challenge, "Bearer letmein")
    assert open_store(server.url).inspect("x", "promoted").digest == contents.digest
    (asked,) = [request for request in server.seen if request.path.startswith("/token")]
    assert asked.path == "/token?service=s&scope=repository%3Ateam%2Fx%3Apull"
    assert asked.headers.get("Authorization") == basic


def test_a_refused_sign_in_says_where_to_look(server: Server, tmp_path: Path) -> None:
    server.script = lambda request: request.answer(401, WWW_Authenticate='Basic realm="x"')
    with pytest.raises(StoreError, match=f"config.json has no sign-in for {server.host}: run docker login"):
        open_store(server.url).resolve("x", "promoted")


def test_only_the_registry_may_ask_for_a_sign_in(server: Server, tmp_path: Path) -> None:
    _docker_login(tmp_path, server.host)
    contents = Contents()
    with _running() as elsewhere:
        challenge = f'Bearer realm="http://{elsewhere.host}/token"'
        elsewhere.script = lambda request: request.answer(401, WWW_Authenticate=challenge)
        contents.blob = lambda request: request.answer(307, Location=f"http://{elsewhere.host}/blob")
        server.script = contents
        with pytest.raises(StoreError, match="401"):
            open_store(server.url).pull("x", "promoted", tmp_path / "out")
        assert [request.path for request in elsewhere.seen] == ["/blob"]
        assert "Authorization" not in elsewhere.seen[0].headers


def test_a_sign_in_is_never_sent_in_the_clear(server: Server, tmp_path: Path) -> None:
    _docker_login(tmp_path, server.host)
    server.script = lambda request: request.answer(401, WWW_Authenticate='Bearer realm="http://elsewhere.test/token"')
    with pytest.raises(StoreError, match="not HTTPS"):
        open_store(server.url).resolve("x", "promoted")


def test_only_loopback_is_plain() -> None:
    for host, scheme in (
        ("localhost:1", "http"),
        ("127.0.0.2", "http"),
        ("[::1]:5", "http"),
        ("reg.test", "https"),
    ):
        store = open_store(f"oci://{host}/p")
        assert isinstance(store, registry.RegistryStore)
        assert store._base == f"{scheme}://{host}"
