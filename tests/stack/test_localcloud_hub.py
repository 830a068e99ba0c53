"""The stand-in for the hub, as the hub's own client library sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from localcloud.hub import Hub, revision_of

BASE = Path(__file__).parents[2] / "rehearsal" / "base"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub("drydock/tiny", BASE)
    yield hub
    hub.close()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # read when imported, by whom ever


def test_the_model_is_listed_and_comes_as_it_is(hub: Hub, tmp_path: Path) -> None:
    told = HfApi(endpoint=hub.url).model_info("drydock/tiny", revision=hub.revision, files_metadata=True)
    assert {file.rfilename for file in told.siblings or []} == {path.name for path in BASE.iterdir()}
    (weights,) = [file for file in told.siblings or [] if file.lfs]
    assert weights.rfilename == "model.safetensors" and weights.size == (BASE / "model.safetensors").stat().st_size
    for name in ("model.safetensors", "config.json"):
        path = hf_hub_download("drydock/tiny", name, revision=hub.revision, endpoint=hub.url, local_dir=tmp_path)
        assert Path(path).read_bytes() == (BASE / name).read_bytes()


def test_what_it_lacks_is_told_as_the_hub_tells_it(hub: Hub) -> None:
    api = HfApi(endpoint=hub.url)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("drydock/other", revision=hub.revision)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("drydock/tiny", revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("drydock/tiny", "absent.json", revision=hub.revision, endpoint=hub.url)


def test_another_content_is_another_revision(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = revision_of(tmp_path)
    assert len(first) == 40 and int(first, 16)
    (tmp_path / "config.json").write_text("{ }")
    assert revision_of(tmp_path) != first
