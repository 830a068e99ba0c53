"""Checkpoints are whole or passed over, and belong to one run."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blobs import BlobError, store
from common.settings import SettingsError
from tests.unit.blob_fakes import KEY, FakeAccount
from training import checkpoint
from training.checkpoint import Position, Remote


def save(folder: Path, step: int, fingerprint: str = "f") -> Path:
    return checkpoint.save(
        folder, fingerprint, Position(step, 1.5, 10 * step), {"a": torch.full((2, 2), step)}, {"s": step}
    )


def found_step(folder: Path) -> int | None:
    found = checkpoint.newest(folder, "f")
    return found[0].step if found else None


def test_the_newest_comes_back_whole(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    found = checkpoint.newest(tmp_path, "f")
    assert found
    position, adapter, rest = found
    assert position == Position(10, 1.5, 100)
    assert adapter["a"].tolist() == [[10, 10], [10, 10]]
    assert rest == {"s": 10}


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 100_000_000):
        save(tmp_path, step)
    assert found_step(tmp_path) == 100_000_000
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["adapter.safetensors", "trainer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "absent", "empty", "flipped"])
def test_a_damaged_newest_falls_back_to_the_one_before_with_a_warning(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        flipped = data[:-9] + bytes([data[-9] ^ 255]) + data[-8:]
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING):
        assert found_step(tmp_path) == 1
    assert "trying the one before" in caplog.text
    assert "step-00000002" in caplog.text


def test_all_damaged_or_none_at_all_means_from_the_start(tmp_path: Path) -> None:
    assert found_step(tmp_path / "nowhere") is None
    (save(tmp_path, 1) / "state.json").write_text("{")
    (tmp_path / ".writing-step-00000002").mkdir()
    assert found_step(tmp_path) is None


def test_another_runs_checkpoint_is_refused_by_path(tmp_path: Path) -> None:
    save(tmp_path, 1, "other")
    with pytest.raises(ValueError, match="step-00000001 was written by a run with other settings"):
        checkpoint.newest(tmp_path, "f")


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    (save(tmp_path, 3) / "trainer.pt").write_bytes(b"")
    save(tmp_path, 3)
    assert found_step(tmp_path) == 3


def test_a_crash_while_writing_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, 2)
    assert found_step(tmp_path) == 1
    save(tmp_path, 2)
    assert found_step(tmp_path) == 2


# Copies in Blob, which outlive the node.


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAccount]:
    fake = FakeAccount()
    monkeypatch.setenv("DRYDOCK_BLOB_ENDPOINT", f"{fake.url}/mystore")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    monkeypatch.setattr(checkpoint, "REMOTE_RETRIES", 0)
    monkeypatch.setattr(checkpoint, "ROLE_SECONDS", 0.05)
    monkeypatch.setattr(store, "POLL_SECONDS", 0.02)
    yield fake
    fake.close()


def remote(fingerprint: str = "f") -> Remote:
    return Remote("az://mystore/box/kubectl", fingerprint)


def copies(account: FakeAccount) -> set[str]:
    return {name.removesuffix("/.complete.json") for name in account.blobs if name.endswith("/.complete.json")}


def test_the_newest_copy_comes_back_when_the_node_is_gone(account: FakeAccount, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        assert remote().copy(save(tmp_path, step))
    assert copies(account) == {"kubectl/f/step-00000002", "kubectl/f/step-00000003"}, "no more than are kept here"
    assert not any("step-00000001" in name for name in account.blobs)
    before = {path.name: path.read_bytes() for path in (tmp_path / "step-00000003").iterdir()}
    shutil.rmtree(tmp_path)
    assert remote().fetch_newer(tmp_path, than=0)
    assert found_step(tmp_path) == 3
    assert {name: (tmp_path / "step-00000003" / name).read_bytes() for name in before} == before


def test_a_copy_is_fetched_only_when_it_is_newer(account: FakeAccount, tmp_path: Path) -> None:
    assert not remote().fetch_newer(tmp_path, than=0)
    remote().copy(save(tmp_path, 5))
    assert not remote().fetch_newer(tmp_path, than=5)
    shutil.rmtree(tmp_path / "step-00000005")
    save(tmp_path, 4)
    assert remote().fetch_newer(tmp_path, than=4)
    assert found_step(tmp_path) == 5


def test_another_runs_copies_are_neither_taken_nor_removed(account: FakeAccount, tmp_path: Path) -> None:
    for step in (100, 200):
        remote("other").copy(save(tmp_path / "other", step, "other"))
    assert not remote().fetch_newer(tmp_path, than=0)
    for step in (1, 2, 3):
        remote().copy(save(tmp_path, step))
    remote().forget()
    assert copies(account) == {"kubectl/other/step-00000100", "kubectl/other/step-00000200"}
    assert not any(name.startswith("kubectl/f/") for name in account.blobs)


@pytest.mark.parametrize("damage", ["bytes", "absent", "marker absent", "marker cut"])
def test_a_damaged_copy_falls_back_to_the_one_before(
    account: FakeAccount, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        remote().copy(save(tmp_path, step))
    shutil.rmtree(tmp_path)
    newest = "kubectl/f/step-00000002/"
    if damage == "bytes":
        account.blobs[newest + "trainer.pt"] = (b"damaged", {})
    elif damage == "marker cut":
        account.blobs[newest + ".complete.json"] = (b'{"files"', {})
    else:
        del account.blobs[newest + ("trainer.pt" if damage == "absent" else ".complete.json")]
    assert remote().fetch_newer(tmp_path, than=0)
    assert found_step(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "nothing of the damaged one stays"
    assert ("copy step-00000002 is damaged" in caplog.text) == (damage != "marker absent")


@pytest.mark.parametrize("trouble", [(503, "ServerBusy"), (403, "AuthorizationPermissionMismatch")])
def test_a_copy_that_fails_is_a_warning_with_its_reason(
    account: FakeAccount, tmp_path: Path, trouble: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, 1)
    account.fault = lambda method, name: trouble if method == "PUT" else None
    assert not remote().copy(path)
    assert "checkpoint step-00000001 is not copied (az://mystore/box/kubectl/f/step-00000001/" in caplog.text
    account.fault = lambda method, name: None
    assert remote().copy(path)


def test_a_place_that_does_not_answer_or_refuses_stops_the_start(account: FakeAccount, tmp_path: Path) -> None:
    remote().copy(save(tmp_path, 1))
    account.fault = lambda method, name: (503, "ServerBusy")
    with pytest.raises(BlobError):
        remote().fetch_newer(tmp_path, than=0)
    account.fault = lambda method, name: (403, "AuthorizationPermissionMismatch")
    with pytest.raises(SettingsError, match="Storage Blob Data Reader"):
        remote().fetch_newer(tmp_path, than=0)
    account.fault = lambda method, name: (503, "ServerBusy") if name.endswith("trainer.pt") else None
    with pytest.raises(BlobError):
        remote().fetch_newer(tmp_path, than=0)
    for address, words in {"az://mystore/box": "add a folder for this run", "/mnt/x": "expected az://"}.items():
        with pytest.raises(SettingsError, match=words):
            Remote(address, "f")
