"""A loss that a drill declares: it begins, ends by itself, is never long, and what cannot be read is no loss."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from artifacts.store import NotFound, OutOfReach, Store, StoreError, open_store
from serving import faults
from serving.faults import FILE, LONGEST_SECONDS, drilled


class Clock:
    """The time module as the faults see it, moved by hand."""

    now = 1_795_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(faults, "time", clock)
    return clock


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    (tmp_path / "faults").mkdir()
    return drilled(open_store(tmp_path / "store"), tmp_path / "faults")


def declare(folder: Path, text: str | None) -> None:
    """As the kubelet does: the whole content at once, or none."""
    path = folder / "faults" / FILE
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


def reached(store: Store) -> bool:
    """Whether the store answers; that it has no such tag is an answer."""
    try:
        store.resolve("kubectl", "promoted")
    except NotFound:
        return True
    except StoreError as error:
        assert type(error) is OutOfReach and "a drill" in str(error)
        return False
    raise AssertionError("there is no such tag")


def said(log: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in log.records]
    log.clear()
    return found


def test_it_begins_and_ends_by_itself_and_both_are_told_once(
    tmp_path: Path, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    assert reached(store) and reached(store) and not said(caplog)
    declare(tmp_path, f"{clock.now + 60:.0f}")
    assert not reached(store) and not reached(store)
    with pytest.raises(StoreError, match="out of reach until"):
        store.pull("kubectl", "sha256:" + "0" * 64, tmp_path / "target")
    (begun,) = said(caplog)
    assert begun.startswith("DRILL: the store counts as out of reach until") and FILE in begun
    clock.now += 61  # nobody withdrew it: whoever declared it is gone
    assert reached(store) and reached(store)
    assert said(caplog) == ["DRILL over: the store is asked again"]


def test_what_is_taken_back_is_over(tmp_path: Path, store: Store, clock: Clock) -> None:
    declare(tmp_path, f"{clock.now + 600}\n")
    assert not reached(store)
    declare(tmp_path, None)
    assert reached(store)
    declare(tmp_path, str(clock.now - 1))
    assert reached(store)


def test_half_an_hour_is_the_most_however_often_it_is_looked_at(
    tmp_path: Path, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    declare(tmp_path, "99999999999")
    assert not reached(store)
    cut, begun = said(caplog)
    assert "99999999999 is more than 1800 s ahead: cut to that" in cut and begun.startswith("DRILL:")
    clock.now += LONGEST_SECONDS - 1
    assert not reached(store)
    clock.now += 2
    assert reached(store) and reached(store)
    assert said(caplog) == ["DRILL over: the store is asked again"]


@pytest.mark.parametrize("content", [b"soon", b"nan", b"inf", b"-inf", b"\xff\xfe\x00", b"1e999", b'{"until": 1}'])
def test_what_is_no_time_is_told_once_and_ignored(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / "faults" / FILE).write_bytes(content)
    assert reached(store) and reached(store)
    (line,) = said(caplog)
    assert "is ignored: expected unix seconds, found" in line and len(line) < 400


def test_a_file_that_cannot_be_opened_is_no_loss(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "faults" / FILE).mkdir()
    assert reached(store)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_without_the_folder_the_store_is_as_it_was(tmp_path: Path, clock: Clock) -> None:
    assert reached(drilled(open_store(tmp_path / "store"), tmp_path / "nowhere"))
