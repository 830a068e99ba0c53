"""The folder store: round trip, determinism, corruption, titles that escape, concurrent taggers."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from artifacts.layout import LayoutStore
from artifacts.store import (
    MANIFEST_TYPE,
    TITLE,
    CorruptBlob,
    NotFound,
    Store,
    StoreError,
    canonical_json,
    open_store,
)

REPOSITORY, KIND = "adapters/kubectl", "application/vnd.test.v1+json"
CONTENT = {"a.json": b"{}\n", "weights.bin": bytes(range(256)) * 5000, "empty": b""}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "source"
    folder.mkdir()
    for title, data in CONTENT.items():
        (folder / title).write_bytes(data)
    return {title: folder / title for title in CONTENT}


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _blob(store: Store, digest: str) -> Path:
    return Path(store.url) / REPOSITORY / "blobs" / "sha256" / digest.removeprefix("sha256:")


def test_round_trip_by_tag_and_by_digest(store: Store, files: dict[str, Path], tmp_path: Path) -> None:
    digest = store.push(REPOSITORY, files, {"b": 1, "a": [2]}, KIND, {"org.example.k": "v"}, tag="one")
    for number, reference in enumerate(("one", digest)):
        artifact = store.pull(REPOSITORY, reference, tmp_path / f"out{number}")
        assert artifact.digest == digest
        assert artifact.config == b'{"a":[2],"b":1}'
        assert artifact.manifest["annotations"] == {"org.example.k": "v"}
        assert _contents(tmp_path / f"out{number}") == CONTENT
    assert (tmp_path / "out0").stat().st_mode & 0o777 == 0o777 & ~_umask()


def test_the_folder_is_an_oci_image_layout(store: Store, files: dict[str, Path]) -> None:
    digest = store.push(REPOSITORY, files, b"{}", KIND, tag="one")
    folder = Path(store.url) / REPOSITORY
    assert json.loads((folder / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((folder / "index.json").read_bytes())["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "one"}
    manifest = _blob(store, entry["digest"]).read_bytes()
    assert (entry["mediaType"], entry["digest"], entry["size"]) == (MANIFEST_TYPE, digest, len(manifest))
    assert [layer["annotations"][TITLE] for layer in json.loads(manifest)["layers"]] == sorted(CONTENT)
    for blob in (folder / "blobs" / "sha256").iterdir():
        assert blob.name == hashlib.sha256(blob.read_bytes()).hexdigest()


def test_same_content_has_the_same_digest(files: dict[str, Path], tmp_path: Path) -> None:
    first = open_store(tmp_path / "x").push(REPOSITORY, files, {"a": 1, "b": 2}, KIND)
    for path in files.values():
        os.utime(path, (1, 1))
    backwards = dict(reversed(files.items()))
    assert open_store(tmp_path / "y").push("other/place", backwards, {"b": 2, "a": 1}, KIND, tag="t") == first
    files["a.json"].write_bytes(b"{ }\n")
    assert open_store(tmp_path / "z").push(REPOSITORY, files, {"a": 1, "b": 2}, KIND) != first


def test_a_tag_moves_and_the_old_version_stays(store: Store, files: dict[str, Path]) -> None:
    assert store.tags(REPOSITORY) == {}
    old = store.push(REPOSITORY, files, b"1", KIND, tag="promoted")
    new = store.push(REPOSITORY, files, b"2", KIND, tag="v2")
    store.tag(REPOSITORY, new, "promoted")
    assert store.tags(REPOSITORY) == {"promoted": new, "v2": new}
    assert store.resolve(REPOSITORY, old) == old
    store.tag(REPOSITORY, old, "promoted")
    store.tag(REPOSITORY, old, "promoted")  # again: nothing changes
    assert store.tags(REPOSITORY) == {"promoted": old, "v2": new}
    entries = json.loads((Path(store.url) / REPOSITORY / "index.json").read_bytes())["manifests"]
    assert len(entries) == 2
    assert store.repositories() == [REPOSITORY]


@pytest.mark.parametrize("index", ["{}", "[]", '{"manifests": 3}', '{"manifests": ["a"]}', '{"manifests": [{}]}', "{"])
def test_a_damaged_index_of_a_folder_is_told(tmp_path: Path, index: str) -> None:
    (tmp_path / "adapters" / "kubectl").mkdir(parents=True)
    (tmp_path / "adapters" / "kubectl" / "index.json").write_text(index)
    with pytest.raises(CorruptBlob, match=r"index\.json: no index of an OCI layout"):
        open_store(tmp_path).find("adapters/kubectl", "promoted")


def test_not_found_names_everything(store: Store, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no tag in this repository"):
        store.resolve(REPOSITORY, "one")
    with pytest.raises(NotFound, match="no such folder"):
        store.repositories()
    digest = store.push(REPOSITORY, files, b"{}", KIND, tag="one")
    with pytest.raises(NotFound) as caught:
        store.pull(REPOSITORY, "two", tmp_path / "out")
    assert all(part in str(caught.value) for part in (store.url, REPOSITORY, "'two'", "its tags: one"))
    assert not (tmp_path / "out").exists()
    layer = store.inspect(REPOSITORY, digest).manifest["layers"][0]["digest"]
    with pytest.raises(NotFound):  # a blob is no artifact
        store.tag(REPOSITORY, layer, "wrong")
    assert store.tags(REPOSITORY) == {"one": digest}


@pytest.mark.parametrize("damage", ["altered", "truncated", "longer", "absent"])
@pytest.mark.parametrize("part", ["layer", "config", "manifest"])
def test_damage_is_told_and_leaves_no_folder(
    store: Store, files: dict[str, Path], tmp_path: Path, part: str, damage: str
) -> None:
    digest = store.push(REPOSITORY, files, b'{"n": 1}', KIND, tag="one")
    manifest = store.inspect(REPOSITORY, digest).manifest
    layer = next(layer for layer in manifest["layers"] if layer["annotations"][TITLE] == "weights.bin")
    wanted = {"layer": layer["digest"], "config": manifest["config"]["digest"], "manifest": digest}[part]
    blob = _blob(store, wanted)
    data = blob.read_bytes()
    if damage == "absent":
        blob.unlink()
    else:
        changed = {"altered": data[:-1] + b"#", "truncated": data[:-2], "longer": data + b"#"}[damage]
        blob.write_bytes(changed)
    with pytest.raises(CorruptBlob) as caught:
        store.pull(REPOSITORY, "one", tmp_path / "out")
    assert wanted in str(caught.value)
    if damage in ("altered", "truncated"):
        assert "sha256:" + hashlib.sha256(blob.read_bytes()).hexdigest() in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "store"]

    assert store.push(REPOSITORY, files, b'{"n": 1}', KIND) == digest  # the same push repairs it
    store.pull(REPOSITORY, "one", tmp_path / "out")
    assert _contents(tmp_path / "out") == CONTENT


@pytest.mark.parametrize(
    "titles",
    [["../x"], ["a/../../x"], ["/etc/x"], [""], ["a\\..\\x"], ["a/./b"], ["a//b"], ["x", "x"], ["x", "x/y"]],
)
def test_titles_cannot_escape(store: Store, files: dict[str, Path], tmp_path: Path, titles: list[str]) -> None:
    # An honest push refuses; a manifest made by somebody else is refused at the pull.
    if len(set(titles)) == len(titles):
        with pytest.raises(ValueError, match="title"):
            store.push(REPOSITORY, dict.fromkeys(titles, files["a.json"]), b"{}", KIND)
    manifest = store.inspect(REPOSITORY, store.push(REPOSITORY, files, b"{}", KIND)).manifest
    layers = [manifest["layers"][0] | {"annotations": {TITLE: title}} for title in titles]
    data = canonical_json(manifest | {"layers": layers})
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    store._put_manifest(REPOSITORY, digest, data)
    with pytest.raises(StoreError, match="title"):
        store.pull(REPOSITORY, digest, tmp_path / "inner" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "store"]


def test_nested_titles_are_kept(store: Store, files: dict[str, Path], tmp_path: Path) -> None:
    store.push(REPOSITORY, {"sub/a.json": files["a.json"]}, b"{}", KIND, tag="one")
    store.pull(REPOSITORY, "one", tmp_path / "out")
    assert _contents(tmp_path / "out") == {"sub/a.json": CONTENT["a.json"]}


def test_a_filled_target_is_left_alone(store: Store, files: dict[str, Path], tmp_path: Path) -> None:
    store.push(REPOSITORY, files, b"{}", KIND, tag="one")
    target = tmp_path / "out"
    target.mkdir()
    store.pull(REPOSITORY, "one", target)  # empty: taken
    (target / "mine").write_text("keep")
    with pytest.raises(StoreError, match="already exists"):
        store.pull(REPOSITORY, "one", target)
    assert (target / "mine").read_text() == "keep"


@pytest.mark.parametrize("name", ["Adapters/x", "adapters/../x", "/x", "", "adapters/x:y"])
def test_repository_names(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="repository"):
        store.resolve(name, "one")


@pytest.mark.parametrize("url", ["https://example.com/x", "s3://x", "", "oci://", "oci://user@host/x", "oci://h/x?y=1"])
def test_store_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="oci://HOST"):
        open_store(url)


def _tag_many(root: str, digests: list[str], worker: int, rounds: int) -> None:
    store = LayoutStore(Path(root))
    for number in range(rounds):
        store.tag(REPOSITORY, digests[number % 2], f"w{worker}-{number}")
        store.tag(REPOSITORY, digests[(number + worker) % 2], "promoted")


def test_concurrent_taggers_lose_nothing(store: Store, files: dict[str, Path]) -> None:
    workers, rounds = 4, 15
    digests = [store.push(REPOSITORY, files, data, KIND, tag="promoted") for data in (b"1", b"2")]
    context = multiprocessing.get_context("fork")
    arguments = [(store.url, digests, worker, rounds) for worker in range(workers)]
    processes = [context.Process(target=_tag_many, args=each) for each in arguments]
    for process in processes:
        process.start()
    reads = 0
    while any(process.is_alive() for process in processes):
        assert store.tags(REPOSITORY)["promoted"] in digests  # never half an index, never without the tag
        assert store.resolve(REPOSITORY, digests[0]) == digests[0]
        reads += 1
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * workers
    assert reads > 0
    tags = store.tags(REPOSITORY)
    wanted = {f"w{w}-{n}": digests[n % 2] for w in range(workers) for n in range(rounds)}
    assert {name: digest for name, digest in tags.items() if name != "promoted"} == wanted


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
