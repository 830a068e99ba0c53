"""A dataset from elsewhere arrives whole, is proved, is fetched once, and no signature is ever told."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blobs import BlobError
from blobs.store import alone
from common import exits
from common.settings import SettingsError
from tests.unit.blob_fakes import KEY, FakeAccount
from tests.unit.conftest import ROWS
from tests.unit.file_server import FileServer, authority
from training import source
from training.__main__ import main
from training.source import local, public
from training.spec import TuningSpec

DATA = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
DIGEST = hashlib.sha256(DATA).hexdigest()
SIGNED = "?sv=2026-01-01&sig=S3CR3T%3D"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The waits between attempts, which are noted and not made; and a cache of the test's own."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(source, "PIECE_BYTES", 500)
    monkeypatch.setenv("DRYDOCK_CACHE", str(tmp_path / "cache"))
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    return waits


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer(DATA)
    yield server
    server.close()


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FileServer, Path]]:
    """A server by HTTPS, and the file with the certificate of who signed its own."""
    known, certificate = authority(tmp_path_factory.mktemp("tls"))
    server = FileServer(DATA, certificate=certificate)
    yield server, known
    server.close()


def refused(url: str, sha256: str | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        local(url, sha256)
    return str(caught.value)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_by_https_with_an_authority_of_ones_own(
    secure: tuple[FileServer, Path], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    server, known = secure
    url = f"{server.url}/rows.jsonl{SIGNED}"
    told = refused(url)
    assert told.startswith(
        f"{server.url}/rows.jsonl: no trusted TLS connection: unable to get local issuer certificate;"
    )
    assert "REQUESTS_CA_BUNDLE or SSL_CERT_FILE" in told and "S3CR3T" not in told
    monkeypatch.setenv(variable, str(known))
    assert local(url, DIGEST).read_bytes() == DATA
    monkeypatch.setenv(variable, "/nowhere.pem")
    assert "/nowhere.pem: no certificates there" in refused(f"{server.url}/other")


def test_an_unchanged_file_is_fetched_once_and_a_proved_one_not_even_asked_for(server: FileServer) -> None:
    url = f"{server.url}/rows.jsonl"
    first = local(url)
    stamp = first.stat().st_mtime_ns
    assert local(url) == first and first.stat().st_mtime_ns == stamp
    asked = len(server.seen)
    assert local(url, f"sha256:{DIGEST}") == first and len(server.seen) == asked
    server.data, server.etag = DATA[: DATA.index(b"\n") + 1], '"2"'
    again = local(url)
    assert again.read_bytes() == server.data
    assert [path for path in again.parent.iterdir() if path.suffix == ".jsonl"] == [again], "the former one is removed"
    assert DIGEST in (told := refused(url, DIGEST)) and hashlib.sha256(server.data).hexdigest() in told
    server.etag = ""
    server.data = b"other\n"
    assert local(url).read_bytes() == b"other\n", "without an ETag it is fetched each time"


def test_a_cut_download_goes_on_where_it_was(server: FileServer, quick: list[float]) -> None:
    server.fault = lambda number: {"bytes": 1000} if number < 2 else {}
    assert local(f"{server.url}/rows.jsonl").read_bytes() == DATA
    assert server.seen == ["all", "bytes=1000-", "bytes=2000-"]
    assert quick == [1, 2]


@pytest.mark.parametrize("etag", ["", 'W/"weak"', "changing"])
def test_a_cut_download_begins_anew_where_the_rest_may_be_of_another_file(server: FileServer, etag: str) -> None:
    server.etag = '"1"' if etag == "changing" else etag

    def fault(number: int) -> dict[str, object]:
        if number == 1 and etag == "changing":
            server.etag, server.data = '"2"', DATA[::-1]
        return {"bytes": 1000} if number == 0 else {}

    server.fault = fault
    assert local(f"{server.url}/rows.jsonl").read_bytes() == server.data
    assert server.seen == ["all", "bytes=1000-" if etag == "changing" else "all"]


def test_a_busy_server_is_asked_again_when_it_says_and_given_up_at_last(server: FileServer, quick: list[float]) -> None:
    url = f"{server.url}/rows.jsonl{SIGNED}"
    answers: list[dict[str, object]] = [
        {"status": 503, "headers": {"Retry-After": "7"}},
        {"status": 429, "headers": {"Retry-After": "86400"}},
    ]
    server.fault = lambda number: answers[number] if number < 2 else {}
    assert local(url).read_bytes() == DATA
    assert quick == [7, source.RETRY_AFTER_SECONDS]
    server.fault = lambda number: {"status": 500}
    with pytest.raises(BlobError, match=r"rows\.jsonl: 500 Internal Server Error, at 4 attempts") as caught:
        local(url)
    assert "S3CR3T" not in str(caught.value) and caught.value.__cause__ is None
    server.fault = lambda number: {"bytes": 700, "headers": {"ETag": ""}}
    with pytest.raises(BlobError, match=f"cut after 500 bytes of {len(DATA):,}, at 4 attempts"):
        local(url)


def test_who_does_not_answer_is_named(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "READ_SECONDS", 0.05)
    monkeypatch.setattr(source, "ATTEMPTS", 1)
    server.fault = lambda number: {"seconds": 0.5}
    with pytest.raises(BlobError, match=r"rows\.jsonl: 127\.0\.0\.1 does not answer within 0\.05 s, at 1 attempts"):
        local(f"{server.url}/rows.jsonl{SIGNED}")
    server.close()
    with pytest.raises(BlobError, match=r"no connection to 127\.0\.0\.1 \(Connection refused\), at 1 attempts"):
        local(f"{server.url}/rows.jsonl{SIGNED}")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 404}, "no such file (404 Not Found): look at the address"),
        ({"status": 403}, "refused (403 Forbidden): it is not public, or its signature has ended; give a blob as az://"),
        ({"status": 405}, "405 Method Not Allowed: expected the file itself"),
        ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "a web page, and not a file"),
        ({"headers": {"Content-Encoding": "gzip"}}, "a compressed answer"),
        ({"headers": {"Content-Length": str(11 * 2**30)}}, "11,811,160,064 bytes, more than the 10,737,418,240"),
        ({"status": 302, "headers": {"Location": "http://example.org/x?sig=S3CR3T"}}, "leads to http://example.org/x: only https"),
        ({"status": 302, "headers": {"Location": "https://a:S3CR3T@example.org/x"}}, "leads to https://example.org/x: holds a user"),
    ],
)  # fmt: skip
def test_what_a_person_must_mend_is_told_without_the_signature(
    server: FileServer, fault: dict[str, object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = lambda number: fault
    with caplog.at_level(logging.DEBUG, "training"):
        told = refused(f"{server.url}/rows.jsonl{SIGNED}")
    assert told.startswith(f"{server.url}/rows.jsonl: {words}")
    assert "S3CR3T" not in told + caplog.text
    assert len(server.seen) == 1


def test_redirects_by_https_are_followed_up_to_a_number(
    server: FileServer, secure: tuple[FileServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    safe, known = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(known))
    server.fault = lambda number: {"status": 307, "headers": {"Location": f"{safe.url}/rows.jsonl{SIGNED}"}}
    assert local(f"{server.url}/here").read_bytes() == DATA
    safe.fault = lambda number: {"status": 301, "headers": {"Location": "/again"}}
    try:
        assert "more than 5 redirects" in refused(f"{safe.url}/round")
    finally:
        safe.fault = lambda number: {}


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://me:S3CR3T@host/rows.jsonl", "https://host/rows.jsonl: holds a user or a password"),
        ("http://example.org/rows.jsonl", "http://example.org/rows.jsonl: anyone on the way could read and change it"),
        ("ftp://host/rows.jsonl", "expected a local path, https://HOST/PATH or az://ACCOUNT/CONTAINER/PATH"),
        ("https:///rows.jsonl", "expected a local path, https://HOST/PATH"),
        ("az://mystore/box/rows.jsonl?sig=S3CR3T", "az://mystore/box/rows.jsonl: az:// takes no query"),
        ("az://mystore", "expected az://ACCOUNT/CONTAINER/PATH"),
        ("az://mystore/box", "names a whole container"),
    ],
)
def test_addresses_that_are_never_asked(address: str, words: str) -> None:
    told = refused(address)
    assert words in told and "S3CR3T" not in told


def test_a_blob_comes_by_identity_and_is_fetched_again_only_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    account = FakeAccount()
    monkeypatch.setenv("DRYDOCK_BLOB_ENDPOINT", f"{account.url}/mystore")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    try:
        account.blobs["rows.jsonl"] = (DATA, {"sha256": DIGEST})
        address = "az://mystore/box/rows.jsonl"
        assert local(address).read_bytes() == DATA
        gets = account.seen.count("GET rows.jsonl")
        assert local(address, DIGEST).read_bytes() == local(address).read_bytes()
        assert account.seen.count("GET rows.jsonl") == gets
        account.blobs["rows.jsonl"] = (b"new\n", {"sha256": hashlib.sha256(b"new\n").hexdigest()})
        assert local(address).read_bytes() == b"new\n"
        assert f"dataset_sha256 is {'0' * 64}, but the file's SHA-256 is" in refused(address, "0" * 64)
        assert refused("az://mystore/box/none").endswith("no such blob: look at the address")
        monkeypatch.setattr(source, "MAX_BYTES", 3)
        assert refused(address).startswith(f"{address}: 4 bytes, more than the 3 that")
    finally:
        account.close()


def test_a_local_path_stays_what_it_is_and_is_proved(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(DATA)
    assert local("rows.jsonl", root=tmp_path) == tmp_path / "rows.jsonl"
    assert local(str(tmp_path / "rows.jsonl"), DIGEST.upper()) == tmp_path / "rows.jsonl"
    assert local("nowhere.jsonl", DIGEST, root=tmp_path) == tmp_path / "nowhere.jsonl"
    assert f"dataset_sha256 is {'0' * 64}, but the file's SHA-256 is {DIGEST}" in refused(
        str(tmp_path / "rows.jsonl"), "0" * 64
    )
    assert public("C:/data?x") == "C:/data?x"


def test_two_fetches_of_one_address_take_turns(server: FileServer) -> None:
    folder = local(f"{server.url}/rows.jsonl").parent
    with ThreadPoolExecutor(1) as pool:
        with alone(folder):
            other = pool.submit(local, f"{server.url}/rows.jsonl")
            with pytest.raises(TimeoutError):
                other.result(0.2)
        assert other.result(5).read_bytes() == DATA


def test_check_takes_an_address_and_settings_keep_no_signature(
    server: FileServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = f"{server.url}/rows.jsonl"
    assert main(["check", url + SIGNED]) == exits.OK
    assert f"{url}: {len(ROWS)} good rows, no problems" in (told := capsys.readouterr()).out
    server.data, server.etag = b"{}\n", '"2"'
    assert main(["check", url + SIGNED]) == exits.INPUT
    assert f"{url}:1: found no key 'instruction'" in (found := capsys.readouterr()).out
    spec = TuningSpec(adapter="a", base_model="b", dataset=url + SIGNED, dataset_sha256=DIGEST)
    assert spec.model_dump()["dataset"] == url
    (tmp_path / "spec.json").write_text(json.dumps(spec.model_dump(mode="json") | {"dataset": url + SIGNED}))
    assert main(["check", url + SIGNED, "--spec", str(tmp_path / "spec.json"), "--base", "nowhere"]) == exits.INPUT
    assert f"dataset_sha256 is {DIGEST}, but" in (last := capsys.readouterr()).err
    assert "S3CR3T" not in "".join(text for pair in (told, found, last) for text in pair)
    same = TuningSpec(adapter="a", base_model="b", dataset="elsewhere")
    assert [each.fingerprint(dataset_digest="d", base_revision="r") for each in (spec, same)] == [
        same.fingerprint(dataset_digest="d", base_revision="r")
    ] * 2, "where it lies and what it must be decide nothing"
