"""Datasets: one upload for each distinct content, under its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pulumi
import pytest

from common.settings import SettingsError
from infra.datasets import Datasets, DatasetsArgs
from infra.settings import Retention
from infra.storage import Storage, StorageArgs
from tests.unit.pulumi_mocks import deploy, place
from tests.unit.registrations import deploy_with_requests


def declare(files: dict[str, Path]) -> Datasets:
    storage = Storage("storage", StorageArgs(place(), Retention(), zones=False))
    return Datasets("datasets", DatasetsArgs(place(), storage, files))


def test_equal_files_are_put_once_and_each_adapter_knows_its_own(tmp_path: Path) -> None:
    for name, text in {"a": "one\n", "b": "two\n", "c": "one\n"}.items():
        (tmp_path / name).write_text(text)
    found: list[dict[str, str]] = []
    digests: dict[str, str] = {}

    def program() -> pulumi.Output[None]:
        datasets = declare({name: tmp_path / name for name in "abc"})
        digests.update(datasets.digests)
        return pulumi.Output.all(**datasets.blobs).apply(found.append)

    seen, requests = deploy_with_requests(program)
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one\n", b"two\n"))
    account = place().names.unique("st")
    assert digests == {"a": one, "b": two, "c": one}
    assert found == [{name: f"az://{account}/datasets/{digests[name]}.jsonl" for name in "abc"}]
    uploads = {item.inputs["sha256"]: item.inputs for item in seen.of(":FileUpload")}
    assert set(uploads) == {one, two} and len(seen.of(":FileUpload")) == 2
    assert uploads[two]["path"] == str(tmp_path / "b") and uploads[two]["blob"] == f"{two}.jsonl"
    upload = requests["FileUpload", f"datasets-{one[:12]}"]
    assert any(":RoleAssignment::" in urn for urn in upload.dependencies)  # the right to write comes before


def test_missing_files_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x\n")
    with pytest.raises(SettingsError) as caught:
        deploy(lambda: declare({"x": tmp_path / "x", "y": tmp_path / "there", "z": tmp_path / "z"}))
    assert caught.value.problems == [
        f"adapters.x.dataset: {tmp_path / 'x'}: no such file",
        f"adapters.z.dataset: {tmp_path / 'z'}: no such file",
    ]
