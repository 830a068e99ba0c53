"""Artifact stores: named bundles of files, addressed by their content, in an OCI registry or in a folder.

`open_store("oci://host[:port]/prefix")` is a registry (`artifacts.registry`), `open_store("some/folder")` a
folder in which each repository is an OCI image layout of its own (`artifacts.layout`). Both behave the same.
An artifact is one OCI image manifest; each file is one uncompressed layer whose
`org.opencontainers.image.title` is the file's name, as ORAS writes it, so that other OCI tools read it too.
The manifest holds no time and no machine: the same content has the same digest everywhere.

Formats: OCI image-spec 1.1 (manifest, image-layout, annotations), OCI distribution-spec 1.1 (names, tags).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
FILE_TYPE = "application/octet-stream"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
IMAGE_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
TITLE = "org.opencontainers.image.title"
MANIFEST_LIMIT_BYTES = 4 * 2**20  # distribution-spec: what a registry must at least accept

_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class StoreError(RuntimeError):
    """The store cannot do what was asked; the text says where and why."""


class NotFound(StoreError):
    """The store answers, but has no such repository, tag or digest."""


class OutOfReach(StoreError):
    """Nobody answers there: whatever else is asked now will not be answered either."""


class Unusable(StoreError):
    """What is there is no artifact of ours, and will not be at the next try."""


class CorruptBlob(Unusable):
    """Bytes that do not match the digest or size under which they are known."""


class Artifact(NamedTuple):
    """One artifact: its manifest digest, the manifest, and the bytes of its config blob."""

    digest: str
    manifest: dict[str, Any]
    config: bytes


def _manifest(data: bytes, where: str) -> dict[str, Any]:
    """The manifest in `data`, whose config and layers can be followed. Raises `Unusable`."""
    try:
        manifest: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{where}: no JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("mediaType") != MANIFEST_TYPE:
        kind = manifest.get("mediaType") if isinstance(manifest, dict) else type(manifest).__name__
        raise Unusable(f"{where}: expected {MANIFEST_TYPE}, found {kind}")
    layers = manifest.get("layers")
    for each in [manifest.get("config"), *(layers if isinstance(layers, list) else [layers])]:
        if not isinstance(each, dict) or not _is_descriptor(each):
            raise Unusable(
                f"{where}: expected a config and layers with mediaType, digest and size, found {each!r:.200}"
            )
    return manifest


def _is_descriptor(found: Mapping[str, Any]) -> bool:
    """image-spec, descriptor.md; annotations are text to text."""
    said, size = found.get("annotations") or {}, found.get("size")
    texts = [found.get("mediaType"), found.get("digest"), *(said.values() if isinstance(said, dict) else [None])]
    return isinstance(size, int) and size >= 0 and all(isinstance(each, str) for each in texts)


def open_store(url: str | Path) -> Store:
    """The store at `url`: `oci://host[:port]/prefix` or the path of a folder (made at the first push).

    A registry is spoken to over HTTPS, a loopback one over HTTP. Raises `ValueError` for another scheme.
    """
    text = str(url)
    if text.startswith("oci://"):
        from artifacts.registry import RegistryStore  # requests is needed for a registry only

        return RegistryStore(text)
    if "://" in text or not text:
        raise ValueError(f"store {text!r}: write oci://HOST[:PORT]/PREFIX for a registry, or the path of a folder")
    from artifacts.layout import LayoutStore

    return LayoutStore(Path(text).expanduser())


class Store(ABC):
    """What both kinds of store do. `reference` is a tag or a `sha256:` digest. Errors are `StoreError`s."""

    url: str

    def push(
        self,
        repository: str,
        files: Mapping[str, Path],
        config: bytes | Mapping[str, Any],
        artifact_type: str,
        annotations: Mapping[str, str] | None = None,
        tag: str | None = None,
    ) -> str:
        """Store `files` (title to path) with `config` as one artifact and return its manifest digest.

        A mapping given as `config` is written as canonical JSON. The manifest is written last and the tag
        moves after it, so that nobody sees an artifact before it is whole. The same content may come again.
        """
        _check_repository(repository)
        if tag is not None:
            _check_tag(tag)
        check_titles(list(files))
        config_bytes = config if isinstance(config, bytes) else canonical_json(config)
        layers = [
            self._put_file(repository, files[title], FILE_TYPE) | {"annotations": {TITLE: title}}
            for title in sorted(files)
        ]
        said: dict[str, Any] = {"artifactType": artifact_type}
        if annotations:
            said["annotations"] = dict(annotations)
        return self._finish(repository, layers, config_bytes, artifact_type, said, tag)

    def push_image(
        self, repository: str, layers: Sequence[Path], annotations: Mapping[str, str], tag: str | None = None
    ) -> str:
        """Store a container image of these layers (uncompressed tars) and return its manifest digest."""
        _check_repository(repository)
        if tag is not None:
            _check_tag(tag)
        described = [self._put_file(repository, layer, LAYER_TYPE) for layer in layers]
        # Files for any machine; image-spec wants a platform named, and this is what every puller takes by default.
        config = {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in described]},
        }
        said = {"annotations": dict(annotations)}
        return self._finish(repository, described, canonical_json(config), IMAGE_CONFIG_TYPE, said, tag)

    def _put_file(self, repository: str, path: Path, media_type: str) -> dict[str, Any]:
        with path.open("rb") as file:
            descriptor = _describe(file, media_type)
            self._put_blob(repository, descriptor, file)
        return descriptor

    def _finish(
        self,
        repository: str,
        layers: list[dict[str, Any]],
        config: bytes,
        config_type: str,
        said: Mapping[str, Any],
        tag: str | None,
    ) -> str:
        """Store config and manifest of blobs that are there, then move the tag."""
        config_descriptor = _describe(io.BytesIO(config), config_type)
        self._put_blob(repository, config_descriptor, io.BytesIO(config))
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config_descriptor,
            "layers": layers,
            **said,
        }
        data = canonical_json(manifest)
        digest = _sha256(data)
        self._put_manifest(repository, digest, data)
        if tag is not None:
            self.tag(repository, digest, tag)
        return digest

    def find(self, repository: str, reference: str) -> str | None:
        """The manifest digest behind `reference`, None where nothing bears it: one request of a registry."""
        _check_repository(repository)
        _check_reference(reference)
        digest = self._find(repository, reference)
        if digest and _DIGEST.fullmatch(reference) and digest != reference:
            raise CorruptBlob(f"{self.url}: {repository}: expected {reference}, found {digest}")
        return digest

    def resolve(self, repository: str, reference: str) -> str:
        """As `find`; raises `NotFound`, which names the tags that do exist."""
        digest = self.find(repository, reference)
        if digest is None:
            names = self._tag_names(repository)
            have = f"its tags: {', '.join(sorted(names))}" if names else "the store has no tag in this repository"
            raise NotFound(f"{self.url}: {repository}: nothing is known as {reference!r}; {have}")
        return digest

    def _tag_names(self, repository: str) -> list[str]:
        return list(self.tags(repository))

    def tag(self, repository: str, digest: str, tag: str) -> None:
        """Point `tag` at the artifact `digest`, which must be in the repository. Readers see old or new."""
        _check_tag(tag)
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is no digest: expected sha256: and 64 hex digits")
        self._set_tag(repository, self.resolve(repository, digest), tag)

    def inspect(self, repository: str, reference: str) -> Artifact:
        """Manifest and config of an artifact, both verified, without its files. Raises `Unusable` for another thing."""
        digest = self.resolve(repository, reference)
        data = self._get_manifest(repository, digest)
        where = f"{self.url}: {repository}: manifest"
        if _sha256(data) != digest:
            raise CorruptBlob(f"{where}: expected {digest}, found {_sha256(data)} ({len(data)} bytes)")
        manifest = _manifest(data, f"{where} {digest}")
        if (size := manifest["config"]["size"]) > MANIFEST_LIMIT_BYTES:  # held in memory
            raise Unusable(f"{where} {digest}: a config of {size} bytes; the limit is {MANIFEST_LIMIT_BYTES}")
        config = io.BytesIO()
        self.fetch_blob(repository, manifest["config"], config, "config")
        return Artifact(digest, manifest, config.getvalue())

    def pull(self, repository: str, reference: str, target: Path) -> Artifact:
        """Write the artifact's files below `target`, which appears whole or not at all.

        Every blob's size and digest are verified. `target` must not exist, or be empty. Raises `CorruptBlob`
        with the digest expected and found, and `Unusable` for a title that would leave the folder.
        """
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise StoreError(f"{target}: already exists; pull into a folder of its own")
        artifact = self.inspect(repository, reference)
        titles = [(layer.get("annotations") or {}).get(TITLE, "") for layer in artifact.manifest["layers"]]
        try:
            check_titles(titles)
        except ValueError as error:
            raise Unusable(f"{self.url}: {repository}@{artifact.digest}: {error}") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as temporary:
            whole = Path(temporary) / "whole"  # made by umask: another user's vLLM may have to read it
            whole.mkdir()
            for title, layer in zip(titles, artifact.manifest["layers"], strict=True):
                path = whole / title
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w+b") as file:
                    self.fetch_blob(repository, layer, file, title)
                    file.flush()
                    os.fsync(file.fileno())
            try:
                os.rename(whole, target)  # replaces an empty folder, refuses a filled one
            except OSError as error:
                raise StoreError(f"{target}: another process made it meanwhile: {error}") from error
        return artifact

    def fetch_blob(self, repository: str, descriptor: Mapping[str, Any], file: BinaryIO, what: str) -> None:
        """Download one blob into `file` and verify it."""
        digest, size = descriptor["digest"], descriptor["size"]
        if not _DIGEST.fullmatch(digest):  # it becomes a path and an address
            raise Unusable(f"{self.url}: {repository}: {what}: cannot verify a digest such as {digest!r}")
        self._get_blob(repository, digest, size, file)
        file.seek(0)
        found = _describe(file, "")
        if (found["digest"], found["size"]) != (digest, size):
            raise CorruptBlob(
                f"{self.url}: {repository}: {what}: expected {digest} of {size} bytes, "
                f"found {found['digest']} of {found['size']} bytes"
            )

    @abstractmethod
    def tags(self, repository: str) -> dict[str, str]:
        """Every tag of the repository with its manifest digest; empty when nothing was pushed there."""

    @abstractmethod
    def repositories(self) -> list[str]:
        """The names of all repositories in the store, sorted."""

    @abstractmethod
    def _find(self, repository: str, reference: str) -> str | None:
        """The manifest digest behind a tag or digest, None when there is none."""

    @abstractmethod
    def _put_blob(self, repository: str, descriptor: Mapping[str, Any], file: BinaryIO) -> None:
        """Store one blob unless it is there already."""

    @abstractmethod
    def _get_blob(self, repository: str, digest: str, size: int, file: BinaryIO) -> None:
        """Write one blob into `file`, at most `size` + 1 bytes: enough to see that it is too long."""

    @abstractmethod
    def _put_manifest(self, repository: str, digest: str, data: bytes) -> None:
        """Store a manifest under its digest."""

    @abstractmethod
    def _get_manifest(self, repository: str, digest: str) -> bytes:
        """The bytes of a manifest that `_find` knows, not yet verified."""

    @abstractmethod
    def _set_tag(self, repository: str, digest: str, tag: str) -> None:
        """Point `tag` at a manifest that is there."""


def canonical_json(value: Any) -> bytes:
    """One spelling for one value, so that equal content has equal digests. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def check_titles(titles: list[str]) -> None:
    """Raise `ValueError` unless the titles are distinct relative file names that stay inside their folder."""
    problems = []
    for title in titles:
        parts = title.split("/")
        if not title or "\\" in title or "\0" in title or any(part in ("", ".", "..") for part in parts):
            problems.append(f"title {title!r}: expected a relative file name without '..'")
        if titles.count(title) > 1:
            problems.append(f"title {title!r}: given twice")
        problems += [
            f"title {title!r}: is also a folder"
            for other in titles
            if PurePosixPath(title) in PurePosixPath(other).parents
        ]
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))


def _describe(file: BinaryIO, media_type: str) -> dict[str, Any]:
    """The OCI descriptor of `file`, which is left at its beginning."""
    digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return {"mediaType": media_type, "digest": digest, "size": size}


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _check_repository(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"repository {repository!r}: expected lower-case words such as adapters/kubectl")


def _check_tag(tag: str) -> None:
    if not _TAG.fullmatch(tag):
        raise ValueError(
            f"tag {tag!r}: expected at most 128 letters, digits, '_', '.', '-', not beginning with '.' or '-'"
        )


def _check_reference(reference: str) -> None:
    if not _DIGEST.fullmatch(reference):
        _check_tag(reference)
