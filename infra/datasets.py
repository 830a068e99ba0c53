"""The adapters' datasets in Blob, each under the hash of its content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pulumi

from common.files import file_digest
from common.settings import SettingsError
from infra.place import Place
from infra.storage import DATASETS, Storage
from infra.uploads import FileUpload


@dataclass(frozen=True)
class DatasetsArgs:
    """`files`: the dataset of each adapter on this machine."""

    place: Place
    storage: Storage
    files: Mapping[str, Path]


class Datasets(pulumi.ComponentResource):
    """One upload for each distinct content; a changed file becomes another blob and the earlier one stays."""

    digests: dict[str, str]
    blobs: dict[str, pulumi.Output[str]]

    def __init__(self, name: str, args: DatasetsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Datasets", name, None, opts)
        missing = [
            f"adapters.{adapter}.dataset: {path}: no such file"
            for adapter, path in args.files.items()
            if not path.is_file()
        ]
        if missing:
            raise SettingsError(missing)
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
                    # The container and the deployer's right to write it must be there.
                    opts=pulumi.ResourceOptions(parent=self, depends_on=[args.storage]),
                )
        self.blobs = {adapter: uploads[digest].url for adapter, digest in self.digests.items()}
        self.register_outputs({"digests": self.digests, "blobs": self.blobs})
