"""Checkpoints are whole or passed over, and belong to one run."""

from __future__ import annotations

import logging
import resource
import shutil
import threading
import time
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


def test_what_a_gpu_wrote_is_read_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each process of a resumed run would keep the optimiser of all on the first GPU; and here, none could."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        checkpoint.save(tmp_path, "f", Position(1, 1.0, 1), {}, {"optimizer": {"exp_avg": torch.ones(3)}})
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "step-00000001" / "trainer.pt", weights_only=True)
    found = checkpoint.newest(tmp_path, "f")
    assert found and found[2]["optimizer"]["exp_avg"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_trouble_of_the_gpu_is_not_taken_for_a_full_disk(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise kind("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(kind, match="illegal memory"):
        save(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 100_000_000):
        save(tmp_path, step)
    assert found_step(tmp_path) == 100_000_000
    assert len(list(tmp_path.iterdir())) == 2


FILES = ("adapter.safetensors", "trainer.pt", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut to 0", "cut to 1", "cut to half", "cut by 2", "longer", "absent", "flipped", "of the one before", "of a neighbour"])  # fmt: skip
def test_a_damaged_newest_falls_back_to_the_one_before_with_a_warning(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = save(tmp_path, 1) / name
    path = save(tmp_path, 2) / name
    data = path.read_bytes()
    cut = {"cut to 0": 0, "cut to 1": 1, "cut to half": len(data) // 2, "cut by 2": len(data) - 2}
    if damage == "absent":
        path.unlink()
    elif damage == "of the one before":
        shutil.copy(before, path)
    elif damage == "of a neighbour":
        shutil.copy(path.with_name(FILES[FILES.index(name) - 1]), path)
    elif damage == "longer":
        path.write_bytes(data + b"x")
    else:
        flipped = data[:-9] + bytes([data[-9] ^ 255]) + data[-8:]
        path.write_bytes(data[: cut[damage]] if damage in cut else flipped)
    with caplog.at_level(logging.WARNING):
        assert found_step(tmp_path) == 1
    assert "trying the one before" in caplog.text
    assert (
        f"step-00000002 is damaged ({name if damage != 'of the one before' or name != 'state.json' else ''}"
        in caplog.text
    )


def test_no_flipped_bit_of_the_state_goes_unseen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "state.json"
    data = path.read_bytes()
    for at in range(0, len(data) - 1, 3):  # the last byte is a newline
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert found_step(tmp_path) == 1, f"byte {at} of {data!r}"
    for text in ("[]", "3", "null", "{}", '{"digest": 1, "files": []}'):
        path.write_text(text)
        assert found_step(tmp_path) == 1, text


def test_all_damaged_or_none_at_all_means_from_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert found_step(tmp_path / "nowhere") is None
    assert not caplog.text
    (save(tmp_path, 1) / "state.json").write_text("{")
    (save(tmp_path, 2) / "trainer.pt").unlink()
    (tmp_path / ".writing-step-00000003").mkdir()
    assert found_step(tmp_path) is None
    assert "step-00000002 is damaged (trainer.pt: No such file or directory)" in caplog.text
    assert "step-00000001 is damaged (state.json: cut or garbled)" in caplog.text
    assert f"no checkpoint in {tmp_path} is whole: without a copy elsewhere, tuning starts anew" in caplog.text


def test_what_an_ended_process_left_and_what_is_damaged_makes_room(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "trainer.pt").write_bytes(b"")
    for left in (".writing-step-00000004", ".fetching-step-00000005"):
        (tmp_path / left).mkdir()
    save(tmp_path, 2)  # the run went on from 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002"], "1 had gone when 3 was written"
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_another_runs_checkpoint_is_refused_by_path(tmp_path: Path) -> None:
    save(tmp_path, 1, "other")
    with pytest.raises(ValueError, match="step-00000001 was written by a run with other settings"):
        checkpoint.newest(tmp_path, "f")


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    (save(tmp_path, 3) / "trainer.pt").write_bytes(b"")
    save(tmp_path, 3)
    assert found_step(tmp_path) == 3


@pytest.mark.parametrize("room", [10, 400, 2000], ids=["adapter", "adapter's middle", "optimiser"])
def test_a_full_disk_while_writing_leaves_the_earlier_ones_and_says_what_to_do(tmp_path: Path, room: int) -> None:
    save(tmp_path, 1)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # the kernel refuses each byte beyond
    try:
        with pytest.raises(
            OSError, match=r"step-00000002: this checkpoint cannot be written \(.*MiB free\): make room"
        ) as caught:
            adapter = {"a": torch.ones(300)}
            checkpoint.save(tmp_path, "f", Position(2, 1.0, 1), adapter, {"s": torch.ones(3000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.__cause__ is not None
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole
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
    tmp_path, events = tmp_path / "checkpoints", tmp_path / "events.jsonl"
    for step in (1, 2, 3):
        with events.open("a") as file:
            file.write(f'{{"step": {step}}}\n')
        assert remote().copy(save(tmp_path, step))
    assert copies(account) == {"kubectl/f/step-00000002", "kubectl/f/step-00000003"}, "no more than are kept here"
    assert not any("step-00000001" in name for name in account.blobs)
    before = {path.name: path.read_bytes() for path in (tmp_path / "step-00000003").iterdir()}
    shutil.rmtree(tmp_path.parent)
    assert remote().fetch_newer(tmp_path, than=0)
    assert found_step(tmp_path) == 3
    assert events.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n', "the measurements come along"
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


def test_a_copy_of_what_was_damaged_before_is_passed_over_too(
    account: FakeAccount, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert remote().copy(save(tmp_path, 1))
    second = save(tmp_path, 2)
    (second / "trainer.pt").write_bytes(b"damaged on the node")
    assert remote().copy(second), "whole as far as Blob can know"
    shutil.rmtree(tmp_path)
    assert remote().fetch_newer(tmp_path, than=0)
    assert found_step(tmp_path) == 1
    assert "copy step-00000002 is damaged (trainer.pt: not as it was written)" in caplog.text
    third = save(tmp_path, 2)
    (account.blobs["kubectl/f/step-00000009/.complete.json"],) = [
        account.blobs["kubectl/f/step-00000002/.complete.json"]
    ]
    assert remote().copy(third)
    assert copies(account) == {"kubectl/f/step-00000001", "kubectl/f/step-00000002"}, "those beyond were passed over"


def test_fetching_outlasts_a_trouble_that_passes(
    account: FakeAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "ROLE_SECONDS", 5)
    remote().copy(save(tmp_path, 1))
    shutil.rmtree(tmp_path)
    asked = iter(range(10**6))
    account.fault = lambda method, name: (503, "ServerBusy") if next(asked) < 8 and "trainer" in name else None
    assert remote().fetch_newer(tmp_path, than=0)
    assert found_step(tmp_path) == 1


def test_an_account_that_hangs_holds_the_tuning_no_longer_than_promised(
    account: FakeAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "COPY_SECONDS", 0.5)
    hanging, released = threading.Event(), threading.Event()

    def hang(method: str, name: str) -> None:
        if method == "PUT":
            hanging.set()
            released.wait(20)

    account.fault = hang
    to, started = remote(), time.monotonic()
    assert not to.copy(save(tmp_path, 1))
    assert hanging.is_set()
    assert time.monotonic() - started < 0.9
    assert "checkpoint step-00000001 is not copied after 0.5 s; tuning goes on" in caplog.text
    started = time.monotonic()
    assert not to.copy(save(tmp_path, 2))
    assert time.monotonic() - started < 0.9, "nor does the next, which waits for the one before"
    assert "checkpoint step-00000002 is not copied: the copy before hangs" in caplog.text
    released.set()
    monkeypatch.setattr(checkpoint, "COPY_SECONDS", 10)
    assert to.copy(save(tmp_path / "later", 3)), "once it answers again, copying goes on"
    assert copies(account) == {"kubectl/f/step-00000001", "kubectl/f/step-00000003"}
