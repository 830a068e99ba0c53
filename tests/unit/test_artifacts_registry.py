"""The registry store against a scripted server: retries, cut and altered streams, sign-in."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from azure.core.exceptions import ClientAuthenticationError, ServiceRequestError

from artifacts import entra, registry
from artifacts.adapter import promoted_digest
from artifacts.store import (
    MANIFEST_TYPE,
    TITLE,
    CorruptBlob,
    NotFound,
    OutOfReach,
    StoreError,
    Unusable,
    canonical_json,
    open_store,
)
from common.processes import free_ports

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
    monkeypatch.delenv("AZURE_FEDERATED_TOKEN_FILE", raising=False)
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


def test_a_tag_that_is_not_there_costs_one_request(server: Server) -> None:
    """A replica asks for `promoted` every two seconds, and each run that failed its gate has left a tag."""
    server.script = lambda request: (
        request.answer(200, json.dumps({"tags": [f"{number:08x}" for number in range(50)]}).encode())
        if "/tags/list" in request.path
        else request.answer(404)
    )
    store = open_store(server.url)
    assert promoted_digest(store, "kubectl") is None
    assert [request.method for request in server.seen] == ["HEAD"]
    with pytest.raises(NotFound, match="its tags: 00000000, 00000001"):
        store.resolve("adapters/kubectl", "promoted")
    assert len(server.seen) == 3, "the names are told without a look at each"


def test_retry_after_is_heeded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    waits = ["7", "3600", "Fri, 27 Nov 2026 16:00:00 GMT"]
    server.script = lambda request: request.answer(429, Retry_After=waits.pop(0)) if waits else request.answer(404)
    assert promoted_digest(open_store(server.url), "kubectl") is None
    assert slept == [7, registry.LONGEST_WAIT_SECONDS, 0]


def test_a_storage_host_that_is_lost_is_not_the_registry_and_its_signature_is_not_told(
    server: Server, tmp_path: Path
) -> None:
    contents = Contents()
    port = free_ports(1)[0]
    contents.blob = lambda request: request.answer(307, Location=f"http://127.0.0.1:{port}/layer?se=2026&sig=TOPSECRET")
    server.script = contents
    with pytest.raises(StoreError, match=rf"port={port}.*/layer\?\.\.\. ") as caught:
        open_store(server.url).pull("adapters/kubectl", "promoted", tmp_path / "out")
    assert not isinstance(caught.value, OutOfReach) and "TOPSECRET" not in "".join(
        traceback.format_exception_only(caught.value)
    )


def test_a_storage_host_gets_no_password_of_netrc(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    contents = Contents()
    with _running() as storage:
        contents.blob = lambda request: request.answer(307, Location=f"http://{storage.host}/layer")
        storage.script = lambda request: request.answer(200, DATA)
        server.script = contents
        store = open_store(server.url)
        assert isinstance(store, registry.RegistryStore)
        store._session.trust_env = True  # as for any registry that is not on loopback
        store.pull("adapters/kubectl", "promoted", tmp_path / "out")
        assert [request.headers.get("Authorization") for request in storage.seen] == [None]


@pytest.mark.parametrize(
    ("cause", "tried", "told"),
    [
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), 4, "gave up after 4 attempts"),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), 1, "no trusted TLS connection"),
    ],
)
def test_of_tls_only_the_certificate_is_for_good(
    cause: ssl.SSLError, tried: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BACKOFF_SECONDS", 0.0)
    asked: list[str] = []

    def request(method: str, url: str, **_: object) -> None:
        asked.append(url)
        raise requests.exceptions.SSLError("cut") from cause

    store = open_store("oci://registry.test/team")
    assert isinstance(store, registry.RegistryStore)
    monkeypatch.setattr(store._session, "request", request)
    with pytest.raises(StoreError, match=told):
        store.find("adapters/kubectl", "promoted")
    assert len(asked) == tried


def test_a_host_in_capitals_is_the_same_host() -> None:
    store = open_store("oci://MyReg.azurecr.io/team")
    assert isinstance(store, registry.RegistryStore) and store.host == "myreg.azurecr.io"


@pytest.mark.parametrize("kept", ["[]", '{"auths": [1]}', '{"auths": {"127.0.0.1": "text"}}', "{"])
def test_a_docker_settings_file_that_is_none_is_told(server: Server, tmp_path: Path, kept: str) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(kept.replace("127.0.0.1", server.host))
    server.script = lambda request: request.answer(401, WWW_Authenticate='Basic realm="a"')
    with pytest.raises(
        StoreError, match=r"config\.json: (cannot be read as Docker's JSON|auths\..*: expected an object)"
    ):
        open_store(server.url).find("x", "promoted")


def test_an_index_of_images_is_called_that(server: Server) -> None:
    """As docker buildx pushes by default: a registry shows it to those alone who say that they know its kind."""
    kind = "application/vnd.oci.image.index.v1+json"
    data = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": []}).encode()
    server.script = lambda request: (
        request.answer(200, data, Content_Type=kind, Docker_Content_Digest=_sha(data))
        if kind in request.headers["Accept"]
        else request.answer(404)
    )
    with pytest.raises(Unusable, match=f"expected {re.escape(MANIFEST_TYPE)}, found {re.escape(kind)}"):
        open_store(server.url).inspect("adapters/kubectl", "v1")


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


# Entra.


class Azure:
    """A registry that lets in only whom its own token endpoint let in, as Azure's does, with its Entra beside it."""

    def __init__(self, server: Server, contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.contents = server, contents
        self.issued = 0  # a token is good for the scope it was made for, and only until the next `expire`
        self.good: dict[str, str] = {}
        self.refresh_tokens: set[str] = set()
        self.entra_asked: list[tuple[str, ...]] = []
        self.denied: set[str] = set()  # pull or push
        self.forms: list[tuple[str, dict[str, list[str]]]] = []
        self.error: Exception | None = None
        server.script = self
        monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", "/var/run/token")
        monkeypatch.setenv("AZURE_CLIENT_ID", "client-1")
        monkeypatch.setenv("AZURE_TENANT_ID", "tenant-1")
        monkeypatch.setattr(entra, "credential", lambda: self)

    def get_token(self, *scopes: str) -> SimpleNamespace:
        if self.error:
            raise self.error
        self.entra_asked.append(scopes)
        return SimpleNamespace(token=f"SECRET-entra-{len(self.entra_asked)}")

    def expire(self, *, refresh: bool) -> None:
        self.good.clear()
        if refresh:
            self.refresh_tokens.clear()

    def __call__(self, request: Request) -> None:
        host = self.server.host
        if request.path.startswith("/oauth2/"):
            if request.method == "GET":  # with a name and password
                return request.answer(401)
            form = parse_qs(request.body.decode())
            self.forms.append((request.path, form))
            if request.path == "/oauth2/exchange":
                if form["access_token"][0] != f"SECRET-entra-{len(self.entra_asked)}" or "exchange" in self.denied:
                    return self._unauthorized(request, form["access_token"][0])
                self.issued += 1
                self.refresh_tokens.add(f"SECRET-refresh-{self.issued}")
                return request.answer(200, json.dumps({"refresh_token": f"SECRET-refresh-{self.issued}"}).encode())
            if form["refresh_token"][0] not in self.refresh_tokens:
                return self._unauthorized(request, form["refresh_token"][0])
            self.issued += 1
            self.good[f"Bearer SECRET-bearer-{self.issued}"] = form["scope"][0].rpartition(":")[2]
            return request.answer(200, json.dumps({"access_token": f"SECRET-bearer-{self.issued}"}).encode())
        wanted = "pull" if request.method in ("GET", "HEAD") else "pull,push"
        scope = f"repository:team/x:{wanted}"
        given = self.good.get(request.headers.get("Authorization", ""))
        if given and given != wanted:
            return request.answer(403, b'{"errors": [{"code": "DENIED", "message": "this token is good for less"}]}')
        if not given:
            challenge = f'Bearer realm="http://{host}/oauth2/token",service="{host}",scope="{scope}"'
            return request.answer(401, WWW_Authenticate=challenge)
        if wanted in self.denied:
            return request.answer(403, b'{"errors": [{"code": "DENIED", "message": "not for you"}]}')
        if wanted == "pull":
            return self.contents(request)
        return request.answer(201)

    @staticmethod
    def _unauthorized(request: Request, token: str) -> None:
        """As bad as can be: what was sent comes back in the text."""
        request.answer(401, json.dumps({"errors": [{"code": "UNAUTHORIZED", "message": f"not {token}"}]}).encode())


@pytest.fixture
def azure(server: Server, monkeypatch: pytest.MonkeyPatch) -> Azure:
    return Azure(server, Contents(), monkeypatch)


def _tokens(azure: Azure) -> list[str]:
    return [path.rpartition("/")[2] for path, _ in azure.forms]


def test_entra_signs_in_to_azures_registry_for_what_was_asked(azure: Azure) -> None:
    assert open_store(azure.server.url).inspect("x", "promoted").digest == azure.contents.digest
    assert azure.entra_asked == [("https://containerregistry.azure.net/.default",)]
    host = azure.server.host
    assert azure.forms == [
        ("/oauth2/exchange", {"grant_type": ["access_token"], "service": [host], "access_token": ["SECRET-entra-1"],
                              "tenant": ["tenant-1"]}),
        ("/oauth2/token", {"grant_type": ["refresh_token"], "service": [host], "scope": ["repository:team/x:pull"],
                           "refresh_token": ["SECRET-refresh-1"]}),
    ]  # fmt: skip
    assert sum("Authorization" not in request.headers for request in azure.server.seen) == 3, "the rest is signed in"


def test_writing_asks_for_a_token_that_may_write(azure: Azure) -> None:
    store = open_store(azure.server.url)
    store.inspect("x", "promoted")
    store.tag("x", azure.contents.digest, "promoted")
    assert _tokens(azure) == ["exchange", "token", "token"]
    assert azure.forms[-1][1]["scope"] == ["repository:team/x:pull,push"]


def test_an_ended_token_is_renewed_from_the_refresh_token_and_that_one_from_entra(azure: Azure) -> None:
    store = open_store(azure.server.url)
    store.inspect("x", "promoted")
    azure.forms.clear()
    azure.expire(refresh=False)
    store.inspect("x", "promoted")
    assert _tokens(azure) == ["token"]
    azure.forms.clear()
    azure.expire(refresh=True)
    store.inspect("x", "promoted")
    assert _tokens(azure) == ["token", "exchange", "token"]
    assert len(azure.entra_asked) == 2


@pytest.mark.parametrize(
    ("denied", "act", "role"),
    [
        ("exchange", "read", r"refused the Entra token \(401 Unauthorized UNAUTHORIZED\)"),
        ("pull", "read", r"HEAD .* 403 Forbidden"),
        ("pull,push", "write", r"PUT .* 403 Forbidden: DENIED not for you"),
    ],
)
def test_a_refusal_names_the_role_and_never_a_token(
    azure: Azure, caplog: pytest.LogCaptureFixture, denied: str, act: str, role: str
) -> None:
    caplog.set_level("DEBUG")
    azure.denied = {denied}
    store = open_store(azure.server.url)
    with pytest.raises(StoreError, match=role) as caught:
        store.inspect("x", "promoted") if act == "read" else store.tag("x", azure.contents.digest, "promoted")
    needed = {"read": ("AcrPull", "Repository Reader"), "write": ("AcrPush", "Repository Writer")}[act]
    assert all(name in str(caught.value) for name in (*needed, "client id client-1", azure.server.host))
    chain = "".join(traceback.format_exception(caught.value))
    assert "SECRET" not in chain + caplog.text
    azure.denied, before = set(), len(azure.entra_asked)
    store.inspect("x", "promoted")  # the role was granted: tokens made before it are not used again
    store.tag("x", azure.contents.digest, "promoted")
    assert len(azure.entra_asked) == before + 1


def test_without_an_entra_token_the_remedy_is_told(azure: Azure) -> None:
    azure.error = ClientAuthenticationError(message="AADSTS70021: no matching federated identity\nmore\nand more")
    with pytest.raises(StoreError, match=r"AADSTS70021: no matching federated identity; in a pod, .* az login") as told:
        open_store(azure.server.url).inspect("x", "promoted")
    assert "and more" not in str(told.value)
    azure.error = ServiceRequestError("no route")
    with pytest.raises(StoreError, match=r"gave up after 4 attempts: sign-in: Entra: no route"):
        open_store(azure.server.url).inspect("x", "promoted")


def test_entra_that_cannot_answer_is_asked_again_and_mends_nobodys_settings(azure: Azure) -> None:
    azure.error = ClientAuthenticationError(message="AADSTS90033: a transient error")
    azure.error.status_code = 503
    with pytest.raises(StoreError, match=r"gave up after 4 attempts: sign-in: Entra: AADSTS90033") as told:
        open_store(azure.server.url).inspect("x", "promoted")
    assert "az login" not in str(told.value)


def test_dockers_own_sign_in_comes_first_unless_it_is_what_az_left(azure: Azure, tmp_path: Path) -> None:
    _docker_login(tmp_path, azure.server.host)
    with pytest.raises(StoreError, match=r"the sign-in in .* was refused"):
        open_store(azure.server.url).inspect("x", "promoted")
    assert not azure.entra_asked
    entry = {"auth": base64.b64encode(b"00000000-0000-0000-0000-000000000000:").decode(), "identitytoken": "ended"}
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {azure.server.host: entry}}))
    assert open_store(azure.server.url).inspect("x", "promoted").digest == azure.contents.digest


@pytest.mark.parametrize(
    ("host", "realm", "pod", "answers"),
    [
        ("a.azurecr.io", "https://a.azurecr.io/oauth2/token", False, True),
        ("r.test", "https://r.test/oauth2/token", True, True),
        ("r.test", "https://r.test/oauth2/token", False, False),
        ("a.azurecr.io", "https://b.azurecr.io/oauth2/token", True, False),
        ("a.azurecr.io", "https://a.azurecr.io/token", True, False),
        ("azurecr.io.test", "https://azurecr.io.test/oauth2/token", False, False),
    ],
)
def test_an_entra_token_goes_to_nobody_but_the_registry_itself(
    monkeypatch: pytest.MonkeyPatch, host: str, realm: str, pod: bool, answers: bool
) -> None:
    monkeypatch.delenv("AZURE_FEDERATED_TOKEN_FILE", raising=False)
    if pod:
        monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", "/var/run/token")
    assert entra.EntraSignIn(host).answers(urlsplit(realm)) is answers


def test_a_form_with_a_token_follows_no_redirect(azure: Azure) -> None:
    with _running() as elsewhere:
        plain = azure.server.script

        def script(request: Request) -> None:
            if request.path == "/oauth2/exchange":
                request.answer(307, Location=f"http://{elsewhere.host}/oauth2/exchange")
            else:
                plain(request)

        azure.server.script = script
        with pytest.raises(StoreError, match="307"):
            open_store(azure.server.url).inspect("x", "promoted")
        assert not elsewhere.seen


def test_in_a_pod_it_is_the_pods_identity_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import azure.identity

    made: list[str] = []
    for name in ("WorkloadIdentityCredential", "DefaultAzureCredential"):
        monkeypatch.setattr(azure.identity, name, lambda name=name: made.append(name))
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", "/var/run/token")
    entra.credential()
    monkeypatch.delenv("AZURE_FEDERATED_TOKEN_FILE")
    entra.credential()
    assert made == ["WorkloadIdentityCredential", "DefaultAzureCredential"]


def test_a_half_configured_pod_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_CLIENT_ID", "AZURE_TENANT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", "/var/run/token")
    with pytest.raises(StoreError, match=r"not fully configured: .*'tenant_id', 'client_id'"):
        entra.credential()


def test_a_user_without_a_home_has_no_docker_sign_in(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 10001)
    with pytest.raises(NotFound):
        open_store(server.url).resolve("x", "promoted")
    server.script = lambda request: request.answer(401, WWW_Authenticate='Basic realm="x"')
    with pytest.raises(StoreError, match="has no sign-in for"):
        open_store(server.url).resolve("x", "promoted")
