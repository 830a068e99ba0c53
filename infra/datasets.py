"""The adapters' datasets in Blob, each under the hash of its content."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pulumi

from common.chat import Message, answer, prompt_messages
from common.files import file_digest
from common.settings import SettingsError
from infra.place import Place
from infra.storage import DATASETS, KAITO, KAITO_DATA, Storage
from infra.uploads import FileUpload
from training.dataset import Limits, Problem, Row, is_held_out, read
from training.source import cache_folder
from training.spec import TuningSettings


@dataclass(frozen=True)
class DatasetsArgs:
    """`files`: the dataset of each adapter on this machine; `adapters`: their settings, which say what is held out.

    `ways`: what must be there before the account can be reached, such as its private endpoint.
    """

    place: Place
    storage: Storage
    files: Mapping[str, Path]
    adapters: Mapping[str, TuningSettings] = field(default_factory=dict)
    ways: Sequence[pulumi.Resource] = ()


@dataclass(frozen=True)
class Told:
    """The rows of a dataset that KAITO tunes on, in a file: `digest` is its SHA-256 in hex."""

    path: Path
    digest: str
    rows: int


class Datasets(pulumi.ComponentResource):
    """One upload for each distinct content; a changed file becomes another blob and the earlier one stays.

    Where KAITO tunes, the rows that it may see are put as well, into its own container: `for_kaito`, by adapter.
    """

    digests: dict[str, str]
    blobs: dict[str, pulumi.Output[str]]
    for_kaito: dict[str, Told]
    uploads_for_kaito: list[FileUpload]

    def __init__(self, name: str, args: DatasetsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Datasets", name, None, opts)
        missing = [
            f"adapters.{adapter}.dataset: {path}: no such file"
            for adapter, path in args.files.items()
            if not path.is_file()
        ]
        if missing:
            raise SettingsError(missing)
        # The container and the deployer's right to write it must be there.
        child = pulumi.ResourceOptions(parent=self, depends_on=[args.storage, *args.ways])
        self.digests = {
            adapter: file_digest(path).removeprefix("sha256:") for adapter, path in sorted(args.files.items())
        }
        uploads: dict[str, FileUpload] = {}
        for adapter, digest in self.digests.items():
            if digest not in uploads:
                uploads[digest] = FileUpload(
                    f"{name}-{digest[:12]}",
                    account=args.storage.name,
                    container=DATASETS,
                    blob=f"{digest}.jsonl",
                    path=args.files[adapter],
                    sha256=digest,
                    opts=child,
                )
        self.blobs = {adapter: uploads[digest].url for adapter, digest in self.digests.items()}
        self.for_kaito = {
            adapter: for_kaito(path, args.adapters[adapter])
            for adapter, path in sorted(args.files.items())
            if args.place.kaito_tunes
        }
        self.uploads_for_kaito = [
            FileUpload(
                f"{name}-kaito-{told.digest[:12]}",
                account=args.storage.name,
                container=KAITO,
                blob=f"{KAITO_DATA}/{told.digest}.jsonl",
                path=told.path,
                sha256=told.digest,
                opts=child,
            )
            for told in {told.digest: told for told in self.for_kaito.values()}.values()
        ]
        self.register_outputs({"digests": self.digests, "blobs": self.blobs})


def for_kaito(path: Path, settings: TuningSettings) -> Told:
    """The rows of `path` that tuning may see, as TRL reads conversations, in a file of this machine's cache.

    `training.begin.split` leaves the same rows out, for the gate. Raises `SettingsError` where that leaves none.
    """
    folder, digest, rows = cache_folder() / "kaito", hashlib.sha256(), 0
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=folder, delete=False) as part:
        for found in read(path, Limits(settings.max_seq_length)):
            # Its problems are told at the preview already (infra.preflight).
            if not isinstance(found, Problem) and not is_held_out(found[1], settings.held_out_fraction):
                line = (json.dumps({"messages": _conversation(found[1])}) + "\n").encode()
                part.write(line)
                digest.update(line)
                rows += 1
    if not rows:
        Path(part.name).unlink()
        raise SettingsError(
            [f"{path}: held_out_fraction = {settings.held_out_fraction} leaves no row to tune on: add rows"]
        )
    target = folder / f"{digest.hexdigest()}.jsonl"
    os.replace(part.name, target)
    return Told(target, digest.hexdigest(), rows)


def _conversation(row: Row) -> list[Message]:
    return [*prompt_messages(row), {"role": "assistant", "content": answer(row)}]
