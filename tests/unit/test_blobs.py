"""Files and folders in Blob: whole or absent, fetched once, refused in words. Against a fake account and a fake hub."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from azure.core.exceptions import ClientAuthenticationError
from azure.identity import WorkloadIdentityCredential

from blobs import BlobError, store
from blobs.__main__ import main
from blobs.store import MARKER, Address, BlobFolder, Damaged, Marker, Refused
from common import exits
from common.settings import SettingsError
from tests.unit.blob_fakes import KEY, FakeAccount, FakeHub

HERE = "az://mystore/box/models/tiny"
PREFIX = "models/tiny/"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAccount]:
    fake = FakeAccount()
    monkeypatch.setenv("DRYDOCK_BLOB_ENDPOINT", f"{fake.url}/mystore")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    monkeypatch.setattr(store, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(store, "RETRIES", 0)
    yield fake
    fake.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(range(256)) * 100)
    (folder / "deep" / "b.txt").write_text("two")
    (folder / "empty").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "state").write_text("an editor's own")
    return folder


def folder(retries: int = 0) -> BlobFolder:
    return BlobFolder(Address.parse(HERE), retries=retries)


def files(target: Path) -> dict[str, bytes]:
    found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".")}


# Addresses.


def test_an_address_is_taken_apart_and_put_together() -> None:
    address = Address.parse("az://mystore/models/llama/3.1/")
    assert (address.account, address.container, address.path) == ("mystore", "models", "llama/3.1")
    assert str(address / "x") == "az://mystore/models/llama/3.1/x"
    assert address.split() == (Address("mystore", "models", "llama"), "3.1")
    assert str(Address.parse("az://mystore/models")) == "az://mystore/models"


@pytest.mark.parametrize(
    "text", ["/mnt/x", "https://mystore/box/x", "az://My/box/x", "az://mystore", "az://mystore/b/x", "az://mystore/box/../x", "az://mystore/box/a//b"]
)  # fmt: skip
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match="expected az://ACCOUNT/CONTAINER/PATH"):
        Address.parse(text)


# Folders.


def test_a_folder_comes_back_whole_in_pieces_and_without_dot_files(
    account: FakeAccount, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PIECE_BYTES", 10_000)
    assert folder().push(source)
    assert len(account.blocks) == 3, "25 600 bytes in pieces of 10 000"
    assert account.writes()[-1] == f"PUT {PREFIX}{MARKER}", "the marker is written last"
    assert folder().fetch(tmp_path / "target")
    assert files(tmp_path / "target") == {k: v for k, v in files(source).items() if not k.startswith(".")}
    assert set(files(tmp_path / "target")) == {"a.bin", "deep/b.txt", "empty"}
    assert account.blobs[PREFIX + "a.bin"][1]["sha256"] == hashlib.sha256((source / "a.bin").read_bytes()).hexdigest()


def test_a_second_push_and_a_second_fetch_move_nothing(account: FakeAccount, source: Path, tmp_path: Path) -> None:
    folder().push(source)
    folder().fetch(tmp_path / "target")
    account.seen.clear()
    assert not folder().push(source)
    assert not folder().fetch(tmp_path / "target")
    assert account.seen == [f"GET {PREFIX}{MARKER}"] * 2


def test_a_changed_folder_is_not_complete_while_its_files_are_replaced(account: FakeAccount, source: Path) -> None:
    folder().push(source)
    (source / "deep" / "b.txt").write_text("three")
    account.seen.clear()
    assert folder().push(source)
    assert account.writes() == [f"DELETE {PREFIX}{MARKER}", f"PUT {PREFIX}deep/b.txt", f"PUT {PREFIX}{MARKER}"]


def test_a_folder_without_marker_is_not_fetched(account: FakeAccount, source: Path, tmp_path: Path) -> None:
    folder().push(source)
    del account.blobs[PREFIX + MARKER]
    with pytest.raises(SettingsError, match="not complete or not there"):
        folder().fetch(tmp_path / "target")


def test_a_fetch_cut_short_goes_on_after_the_files_that_are_there(
    account: FakeAccount, source: Path, tmp_path: Path
) -> None:
    folder().push(source)
    account.fault = lambda method, name: (503, "ServerBusy") if name.endswith("b.txt") else None
    with pytest.raises(BlobError):
        folder().fetch(tmp_path / "target")
    assert not (tmp_path / "target" / MARKER).exists()
    assert not (tmp_path / "target" / "deep" / "b.txt").exists()
    account.fault = lambda method, name: None
    account.seen.clear()
    assert folder().fetch(tmp_path / "target")
    assert f"GET {PREFIX}a.bin" not in account.seen
    assert files(tmp_path / "target")["deep/b.txt"] == b"two"


def test_a_file_that_was_cut_afterwards_is_fetched_again(account: FakeAccount, source: Path, tmp_path: Path) -> None:
    folder().push(source)
    folder().fetch(tmp_path / "target")
    (tmp_path / "target" / "a.bin").write_bytes(b"cut")
    assert folder().fetch(tmp_path / "target")
    assert files(tmp_path / "target")["a.bin"] == (source / "a.bin").read_bytes()


def test_wrong_bytes_never_appear_under_the_name(account: FakeAccount, source: Path, tmp_path: Path) -> None:
    folder().push(source)
    account.blobs[PREFIX + "deep/b.txt"] = (b"owt", {})
    with pytest.raises(Damaged, match=r"b.txt: expected 3 bytes with SHA-256 .*found"):
        folder().fetch(tmp_path / "target")
    assert not list((tmp_path / "target" / "deep").iterdir()), "nor does its part stay"


def test_a_leftover_of_another_model_is_not_mixed_in(account: FakeAccount, source: Path, tmp_path: Path) -> None:
    folder().push(source)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "model-00009.safetensors").touch()
    with pytest.raises(SettingsError, match=r"holds model-00009.safetensors, which .* does not have"):
        folder().fetch(tmp_path / "target")


def test_a_marker_cannot_write_outside_its_folder(account: FakeAccount, tmp_path: Path) -> None:
    marker = {"files": {"../outside": {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}}
    account.blobs |= {PREFIX + MARKER: (json.dumps(marker).encode(), {}), PREFIX + "../outside": (b"x", {})}
    with pytest.raises(SettingsError, match="leads out of its folder"):
        folder().fetch(tmp_path / "target")
    assert not (tmp_path / "outside").exists()


def test_what_does_not_fit_on_the_disk_is_told_before_a_byte_moves(account: FakeAccount, tmp_path: Path) -> None:
    marker = {"files": {"huge": {"size": 10**18, "sha256": "0" * 64}}}
    account.blobs[PREFIX + MARKER] = (json.dumps(marker).encode(), {})
    with pytest.raises(SettingsError, match=r"1000000.0 TB to fetch, but .*B free"):
        folder().fetch(tmp_path / "target")


def test_a_second_fetch_on_the_node_waits_for_the_first(account: FakeAccount, source: Path, tmp_path: Path) -> None:
    folder().push(source)
    target = tmp_path / "target"
    target.mkdir()
    with (target / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=folder().fetch, args=(target,))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert not files(target)
    thread.join(10)
    assert len(files(target)) == 3


def test_without_a_terminal_the_log_tells_bytes_speed_and_time_left(
    account: FakeAccount,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(store, "LINE_SECONDS", 0.0)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed where `pulumi up` runs
    caplog.set_level(logging.INFO)
    folder().push(source)
    folder().fetch(tmp_path / "target")
    for what in ("push", "fetch"):
        assert re.search(rf"{what} {HERE}: 25\.6 kB of 25\.6 kB, [0-9.]+ .?B/s, ETA 0 s", caplog.text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (183, "183 B"), (8_700, "8.7 kB"), (4_976_698_672, "4.977 GB"), (1.6e13, "16.0 TB")]
)
def test_sizes_are_told_as_people_read_them(size: float, text: str) -> None:
    assert store.shown(size) == text


# Waiting.


def test_waits_for_the_marker_and_for_a_role_just_granted(
    account: FakeAccount, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder().push(source)
    answers = itertools.chain([(403, "AuthorizationPermissionMismatch"), (404, "BlobNotFound")], itertools.repeat(None))
    account.fault = lambda method, name: next(answers)
    caplog.set_level(logging.INFO)
    assert folder().fetch(tmp_path / "target", wait_seconds=10)
    assert f"waiting for {HERE}/{MARKER} (the mirror Job writes it): 0 s (" in caplog.text
    assert store.READER in caplog.text, "the reason is told while waiting"


def test_waiting_ends_with_the_refusal_or_with_what_to_do(account: FakeAccount, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="write it with python -m blobs mirror"):
        folder().fetch(tmp_path / "target", wait_seconds=0.05)
    account.fault = lambda method, name: (403, "AuthorizationPermissionMismatch")
    with pytest.raises(Refused):
        folder().fetch(tmp_path / "target", wait_seconds=0.05)


# Troubles.


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "words"),
    [
        (
            403,
            "AuthorizationPermissionMismatch",
            exits.INPUT,
            "needs the role Storage Blob Data Reader on account mystore",
        ),
        (403, "AuthorizationFailure", exits.INPUT, "network rules of account mystore"),
        (404, "ContainerNotFound", exits.INPUT, "account mystore has no container box"),
        (400, "InvalidUri", exits.INPUT, "400 InvalidUri"),
        (503, "ServerBusy", exits.FAILED, "as the test wants"),
        (429, "TooManyRequests", exits.FAILED, "as the test wants"),
    ],
)
def test_each_trouble_has_its_words_and_its_exit_code(
    account: FakeAccount, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    status: int, code: str, exit_code: int, words: str,
) -> None:  # fmt: skip
    account.fault = lambda method, name: (status, code)
    assert main(["fetch", HERE, str(tmp_path / "target")]) == exit_code
    assert words in capsys.readouterr().err


def test_a_push_names_the_role_that_writes(
    account: FakeAccount, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    account.fault = lambda method, name: (403, "AuthorizationPermissionMismatch") if method == "PUT" else None
    assert main(["push", str(source), HERE]) == exits.INPUT
    assert "needs the role Storage Blob Data Contributor on account mystore" in capsys.readouterr().err


def test_a_passing_trouble_is_tried_again(
    account: FakeAccount, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BACKOFF_SECONDS", 0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    answers = itertools.cycle([(500, "InternalError"), (503, "ServerBusy"), None])
    account.fault = lambda method, name: next(answers)
    folder(retries=2).push(source)
    assert PREFIX + MARKER in account.blobs


def test_no_connection_is_a_passing_trouble(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, account: FakeAccount
) -> None:
    account.close()
    assert main(["fetch", HERE, str(tmp_path / "target")]) == exits.FAILED


# Single blobs.


def test_a_single_blob_is_fetched_once_and_verified(
    account: FakeAccount, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = hashlib.sha256((source / "a.bin").read_bytes()).hexdigest()
    where, target = f"az://mystore/box/{digest}.jsonl", tmp_path / "rows.jsonl"
    assert main(["push", str(source / "a.bin"), where]) == 0
    assert main(["push", str(source / "a.bin"), where]) == 0
    assert [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()] == ["pushed", "already there"]
    assert main(["fetch", where, str(target), "--sha256", digest]) == 0
    assert target.read_bytes() == (source / "a.bin").read_bytes()
    account.seen.clear()
    assert main(["fetch", where, str(target)]) == 0, "without a digest its metadata vouches"
    assert f"GET {digest}.jsonl" not in account.seen
    account.blobs[f"{digest}.jsonl"] = (b"other", {})
    target.unlink()
    assert main(["fetch", where, str(target), "--sha256", f"sha256:{digest}"]) == exits.INPUT
    assert not target.exists()


def test_a_digest_that_its_metadata_denies_is_told_without_fetching(
    account: FakeAccount, source: Path, tmp_path: Path
) -> None:
    folder().push_file(source / "a.bin", "a")
    account.seen.clear()
    with pytest.raises(SettingsError, match="expected SHA-256 0000"):
        folder().fetch_file("a", tmp_path / "a", sha256="0" * 64)
    assert account.seen == [f"HEAD {PREFIX}a"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fetch", HERE, "x", "--sha256", "abc"], "expected 64 hex digits"),
        (["fetch", HERE, "x", "--sha256", "0" * 64], "no such blob"),
        (["fetch", "az://mystore/box", "x"], "names a whole container"),
        (["push", "nowhere", HERE], "no such file or folder"),
        (["mirror", "org/tiny", "--revision", "main", HERE], "full commit of 40 hex digits"),
    ],
)
def test_wrong_arguments_end_with_2_and_the_remedy(
    account: FakeAccount, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == exits.INPUT
    assert words in capsys.readouterr().err


# Sign-in.


def test_a_pods_own_identity_comes_first_and_a_key_counts_on_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRYDOCK_BLOB_ENDPOINT", "https://mystore.blob.core.usgovcloudapi.net")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", "/nowhere/token")
    monkeypatch.delenv("AZURE_CLIENT_ID", raising=False)
    with pytest.raises(SettingsError, match=r"half set up.*'client_id'.*azure.workload.identity/client-id"):
        folder()
    monkeypatch.setenv("AZURE_TENANT_ID", "tenant")
    monkeypatch.setenv("AZURE_CLIENT_ID", "client")
    client = folder()._client
    assert client.url == "https://mystore.blob.core.usgovcloudapi.net/box"
    assert isinstance(client.credential._credential, WorkloadIdentityCredential)
    monkeypatch.setenv("DRYDOCK_BLOB_ENDPOINT", "http://localhost:1/mystore")
    assert folder()._client.credential.account_key == KEY
    monkeypatch.delenv("AZURE_STORAGE_KEY")
    with pytest.raises(SettingsError, match=r"needs .* AZURE_STORAGE_KEY"):
        folder()


def test_a_refused_token_is_asked_for_once_and_told_without_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Nobody:
        def get_token(self, *scopes: str, **_: object) -> None:
            asked.append(scopes)
            raise ClientAuthenticationError("AADSTS700213: no matching record\nTrace ID: 1")

    monkeypatch.delenv("DRYDOCK_BLOB_ENDPOINT", raising=False)
    monkeypatch.setattr(store, "_identity", lambda: store._Identity(Nobody()))  # type: ignore[arg-type]
    with pytest.raises(Refused, match="no Entra token: AADSTS700213: no matching record; in a pod") as caught:
        folder(retries=5).marker()
    assert "Trace" not in str(caught.value)
    assert asked == [("https://storage.azure.com/.default",)]


@pytest.mark.parametrize("status", [429, 502, 503])
def test_entra_that_cannot_answer_is_no_setting_to_mend(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    class Busy:
        def get_token(self, *scopes: str, **_: object) -> None:
            error = ClientAuthenticationError("AADSTS90055: throttled")
            error.status_code = status
            raise error

    monkeypatch.delenv("DRYDOCK_BLOB_ENDPOINT", raising=False)
    monkeypatch.setattr(store, "_identity", lambda: store._Identity(Busy()))  # type: ignore[arg-type]
    with pytest.raises(BlobError, match="Entra: AADSTS90055: throttled"):
        folder(retries=5).marker()


class Slow(store.BlobFolder):
    """Two files: `refused` at once, the other comes in pieces for far longer than anybody waits."""

    def __init__(self, refused: str) -> None:
        self.address, self.pieces, self.refused = store.Address("account", "box", "model"), 0, refused

    def _download(self, name: str, target: Path, entry: store.Entry, transfer: Any, over: Any = None) -> None:
        if name == self.refused:
            raise Refused([f"{name}: refused"])
        tick = store._ticks(transfer, over)
        for _ in range(1000):
            time.sleep(0.02)
            self.pieces += 1
            tick(1, 2)


@pytest.mark.parametrize("refused", ["a", "b"])
def test_a_failed_fetch_does_not_wait_for_the_other_files(tmp_path: Path, refused: str) -> None:
    entry = store.Entry(size=1, sha256="0" * 64)
    slow = Slow(refused)
    with pytest.raises(Refused, match=f"{refused}: refused"):
        slow._fetch(store.Marker(files={"a": entry, "b": entry}), tmp_path, True)
    assert slow.pieces < 100


def test_two_fetches_of_one_file_do_not_cut_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"rows" * 1000
    target = tmp_path / "rows.jsonl"
    first_is_verified, second_has_begun = threading.Event(), threading.Event()
    plain = store._sha256

    class Both(store.BlobFolder):
        def __init__(self, second: bool) -> None:
            self.address, self._at_once, self.second = store.Address("account", "box", "model"), 1, second

        def entry(self, name: str) -> store.Entry:
            return store.Entry(size=len(data), sha256=hashlib.sha256(data).hexdigest())

        def _blob(self, name: str) -> Any:
            return self

        def download_blob(self, **_: object) -> Any:
            return self

        def readinto(self, file: Any) -> None:
            file.write(data[:10] if self.second else data)
            file.flush()
            if self.second:
                second_has_begun.set()
                first.join(10)
                file.write(data[10:])

    def verify(path: Path) -> str:
        found = plain(path)
        if threading.current_thread() is first:
            first_is_verified.set()
            second_has_begun.wait(10)
        return found

    monkeypatch.setattr(store, "_sha256", verify)
    first = threading.Thread(target=lambda: Both(False).fetch_file("rows", target))
    first.start()
    assert first_is_verified.wait(10)
    Both(True).fetch_file("rows", target)
    assert target.read_bytes() == data and [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# The mirror.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(ROOT / "rehearsal" / "base")
    fake.files |= {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"copy", "merges.txt": b"#version"}
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield fake
    fake.close()


MIRROR = ["mirror", "org/tiny", "--revision", FakeHub.REVISION, HERE]


def test_a_mirror_holds_what_is_needed_and_is_made_once(
    account: FakeAccount,
    hub: FakeHub,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    assert main(MIRROR) == 0
    marker = Marker.model_validate_json(account.blobs[PREFIX + MARKER][0])
    assert marker.origin == f"org/tiny@{FakeHub.REVISION}"
    assert set(marker.files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "merges.txt",
    }  # fmt: skip
    assert account.writes()[-1] == f"PUT {PREFIX}{MARKER}"
    folder().fetch(tmp_path / "base")
    assert files(tmp_path / "base") == {name: hub.files[name] for name in marker.files}
    hub.seen.clear()
    assert main(MIRROR) == 0
    assert not hub.seen, "nothing is asked of the hub again"
    assert hub.tokens == {"Bearer hf_secret_of_mine"}
    told = capfd.readouterr()
    assert "hf_secret" not in told.out + told.err + caplog.text
    assert "was complete already" in told.out


def test_a_mirror_cut_short_does_not_move_the_weights_again(account: FakeAccount, hub: FakeHub) -> None:
    account.fault = lambda method, name: (503, "ServerBusy") if name.endswith(MARKER) and method == "PUT" else None
    assert main(MIRROR) == exits.FAILED
    assert "model.safetensors" in hub.downloads()
    account.fault = lambda method, name: None
    hub.seen.clear()
    assert main(MIRROR) == 0
    assert "model.safetensors" not in hub.downloads()


def test_another_revision_needs_a_folder_of_its_own(
    account: FakeAccount, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    account.blobs[PREFIX + MARKER] = (Marker(files={}, origin="org/tiny@" + "f" * 40).model_dump_json().encode(), {})
    assert main(MIRROR) == exits.INPUT
    assert f"already holds org/tiny@{'f' * 40}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "model", "revision", "exit_code", "words"),
    [
        (
            "gated",
            "org/tiny",
            FakeHub.REVISION,
            exits.INPUT,
            "org/tiny is gated.*accept its licence at http.*/org/tiny",
        ),
        (
            "",
            "org/nothing",
            FakeHub.REVISION,
            exits.INPUT,
            "no such model, or a private one that the token in HF_TOKEN",
        ),
        ("", "org/tiny", "f" * 40, exits.INPUT, "has no revision ffff.*its commits"),
        ("no tokenizer", "org/tiny", FakeHub.REVISION, exits.INPUT, "lacks tokenizer.json; choose"),
        ("wrong bytes", "org/tiny", FakeHub.REVISION, exits.FAILED, "model.safetensors: the hub names SHA-256"),
        ("closed", "org/tiny", FakeHub.REVISION, exits.FAILED, "http://127.0.0.1"),
    ],
)
def test_what_the_hub_does_not_give_is_told_with_the_remedy(
    account: FakeAccount, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    change: str, model: str, revision: str, exit_code: int, words: str,
) -> None:  # fmt: skip
    if change == "gated":
        hub.gated = True
    elif change == "no tokenizer":
        del hub.files["tokenizer.json"]
    elif change == "wrong bytes":
        monkeypatch.setattr("blobs.mirror.file_digest", lambda path: "sha256:" + "0" * 64)
    elif change == "closed":
        hub.close()
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert main(["mirror", model, "--revision", revision, HERE]) == exit_code
    assert re.search(words, capsys.readouterr().err)
    assert PREFIX + MARKER not in account.blobs
