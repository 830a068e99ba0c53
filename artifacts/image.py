"""Adapters as container images with PEFT's files in /data: what KAITO serves, and what its tuning pushes.

The form is KAITO's (pkg/workspace/image/README.md, puller.sh and pusher.sh of v0.12.0): layers are unpacked one over
the other, and of what comes out /data alone counts.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from artifacts.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterCard,
    AdapterError,
    fetch_adapter,
    read_card,
    require_passed,
    version,
)
from artifacts.store import LAYER_TYPE, NotFound, Store, canonical_json, open_store

KAITO_MODEL = "sh.kaito.model.name"  # preset_tuning.go: the preset that was tuned
OURS = "drydock."
FOLDER = "data"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
LAYER_TYPES = (LAYER_TYPE, f"{LAYER_TYPE}+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip")
MOST_BYTES = 32 * 2**30  # unpacked; rank 512 on all linear layers of a 70B base, in fp32, is 26 GB
MOST_HEADER_BYTES = 2**20  # of a tar entry's extended header, which is read into memory
MOST_CONFIG_BYTES = 2**20
PIECE = 2**20


@dataclass(frozen=True)
class Pushed:
    """An image in its registry. `reference`: HOST/REPOSITORY@sha256:..., as `serving.kaito.adapter_images` wants it."""

    reference: str
    version: str
    there_before: bool


@dataclass(frozen=True)
class Pulled:
    """An adapter out of an image; `folder` holds its two files. `model`: what KAITO says that it tuned, if anything."""

    reference: str
    folder: Path
    model: str | None


def push(store: Store, name: str, reference: str, target: str, *, candidate: bool = False) -> Pushed:
    """Push a version of `name` as an image to `target` (oci://HOST/REPOSITORY), tagged with the version.

    The same version gives the same digest. Raises `NotProven` unless its evaluation passed, or `candidate` is set.
    """
    address, repository, tag = _split(target)
    if tag:
        raise ValueError(f"{target}: give the repository alone: the image's tag is the version")
    digest, card = read_card(store, name, reference)
    if not candidate:
        require_passed(name, digest, card, "made an image")
    place = open_store(address)
    with tempfile.TemporaryDirectory(prefix="drydock-image-") as temporary:
        folder, layer = Path(temporary) / "adapter", Path(temporary) / "layer.tar"
        fetch_adapter(store, name, digest, folder)
        _pack(folder, card, layer)
        try:
            before = place.resolve(repository, version(digest))
        except NotFound:
            before = None
        made = place.push_image(repository, [layer], _annotations(card, digest), tag=version(digest))
    return Pushed(f"{address.removeprefix('oci://')}/{repository}@{made}", version(digest), before == made)


def pull(url: str, target: Path) -> Pulled:
    """Take the adapter out of the image `url` (oci://HOST/REPOSITORY[:TAG|@sha256:...]) into the new folder `target`.

    Nothing else of the image is unpacked. Raises `AdapterError` with every problem of the image, `StoreError` where the
    registry fails.
    """
    address, repository, reference = _split(url)
    store = open_store(address)
    artifact = store.inspect(repository, reference or "latest")
    named = f"{address.removeprefix('oci://')}/{repository}@{artifact.digest}"
    layers = artifact.manifest["layers"]
    problems = [
        f"{named}: a layer of type {layer['mediaType']}: expected one of {', '.join(LAYER_TYPES)}"
        for layer in layers
        if layer["mediaType"] not in LAYER_TYPES
    ]
    if (size := sum(layer["size"] for layer in layers)) > MOST_BYTES:
        problems.append(f"{named}: {size} bytes: an adapter has {MOST_BYTES} at most")
    if problems:
        raise AdapterError(problems)
    target.mkdir(parents=True)
    left = MOST_BYTES
    for layer in layers:
        with tempfile.TemporaryFile(dir=target) as file:
            store.fetch_blob(repository, layer, file, "layer")
            file.seek(0)
            try:
                left = _unpack(file, layer["mediaType"] != LAYER_TYPE, target, left)
            except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, ValueError, IndexError) as error:
                raise AdapterError([f"{named}: layer {layer['digest']}: {error}"]) from error
    if missing := [name for name in FILES if not (target / name).is_file()]:
        raise AdapterError([f"{named}: no /{FOLDER}/{name} in the image; KAITO's adapters have it" for name in missing])
    return Pulled(named, target, (artifact.manifest.get("annotations") or {}).get(KAITO_MODEL))


def _split(url: str) -> tuple[str, str, str | None]:
    """`(oci://HOST/PREFIX, the last part of the repository, tag or digest)`."""
    found = re.fullmatch(r"(oci://[^/@]+(?:/[^/@:]+)*)/([^/@:]+)(?::([^/@:]+)|@(sha256:[0-9a-f]{64}))?", url)
    if found is None:
        raise ValueError(f"image {url!r}: expected oci://HOST[:PORT]/REPOSITORY, and perhaps :TAG or @sha256:...")
    return found[1], found[2], found[3] or found[4]


def _annotations(card: AdapterCard, digest: str) -> dict[str, str]:
    """What whoever has the image alone can know of it. Texts, as OCI's annotations are."""
    figures = {key: card.evaluation[key] for key in ("metric", "base", "adapter", "gain") if key in card.evaluation}
    return {
        KAITO_MODEL: card.base_model,
        "org.opencontainers.image.title": card.name,
        "org.opencontainers.image.version": version(digest),
        f"{OURS}adapter.digest": digest,
        f"{OURS}base.revision": card.base_revision,
        f"{OURS}dataset.digest": card.dataset_digest,
        f"{OURS}evaluation": canonical_json(figures | {"passed": card.passed}).decode(),
    }


def _pack(folder: Path, card: AdapterCard, layer: Path) -> None:
    """Write `layer`: a tar of /data, with no time and no owner in it.

    Uncompressed, since weights hardly shrink, and gzip's bytes differ from machine to machine.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = card.base_model  # was a path of the pod that tuned
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo(FOLDER)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(entry)
        for name in FILES:
            with io.BytesIO(text) if name == CONFIG_FILE else (folder / name).open("rb") as file:
                entry = tarfile.TarInfo(f"{FOLDER}/{name}")
                entry.size, entry.mode = file.seek(0, io.SEEK_END), 0o644
                file.seek(0)
                tar.addfile(entry, file)


class _Entry(tarfile.TarInfo):
    """An entry whose extended headers are no larger than their kind needs."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        # GNU's long names and POSIX's extended headers are held in memory whole, whatever size they claim.
        if self.type not in tarfile.REGULAR_TYPES and self.size > MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"an entry {self.name[:80]!r} of type {self.type!r} with {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:  # so is its list of holes, which may go on for ever
            self._proc_gnusparse_10()
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_gnusparse_10(self, *_: Any) -> Any:
        raise tarfile.ReadError(f"a sparse file {self.name[:80]!r}: no adapter has holes")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10


class _Counted(io.RawIOBase):
    """A stream that ends with an error beyond `most` bytes: a small layer can unpack to any size."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self._stream, self.left = stream, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.ReadError(f"more than {MOST_BYTES} bytes when unpacked")
        buffer[: len(data)] = data
        return len(data)


def _unpack(file: IO[bytes], compressed: bool, target: Path, left: int) -> int:
    """Copy the adapter's files out of one layer; returns how many more bytes the other layers may have."""
    plain: IO[bytes] = gzip.GzipFile(fileobj=file) if compressed else file  # type: ignore[assignment]
    stream = _Counted(plain, left)
    with tarfile.open(fileobj=io.BufferedReader(stream, PIECE), mode="r|", tarinfo=_Entry) as tar:
        for entry, name in _wanted(tar):
            source = tar.extractfile(entry) if entry.isreg() and not entry.issparse() else None
            if source is None:
                raise tarfile.ReadError(f"/{FOLDER}/{name} is no plain file; copy the file itself into the image")
            if name == CONFIG_FILE and entry.size > MOST_CONFIG_BYTES:
                raise tarfile.ReadError(f"/{FOLDER}/{name} has {entry.size} bytes: expected PEFT's settings")
            with (target / name).open("wb") as copy:
                shutil.copyfileobj(source, copy, PIECE)
    return stream.left


def _wanted(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The entries that are the adapter's files. No name of an entry ever becomes a path here."""
    for entry in tar:
        for name in FILES:
            if entry.name.removeprefix("./").lstrip("/") == f"{FOLDER}/{name}":
                yield entry, name
