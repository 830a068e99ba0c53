"""What is taken out of an image's layers: two files and nothing else, bounded, whatever the tar says."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import image
from artifacts.__main__ import main
from artifacts.adapter import AdapterCard
from common import exits

CONFIG, WEIGHTS = b'{"r": 8}', b"weights" * 5000
CARD = AdapterCard(name="kubectl", base_model="tiny", base_revision="sha256:b", dataset_digest="sha256:d")


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, len(data)
    for key, value in more.items():
        setattr(made, key, value)
    return made, data


def packed(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for made, data in entries:
            tar.addfile(made, io.BytesIO(data))
    return out.getvalue()


GOOD = (entry("data/adapter_config.json", CONFIG), entry("data/adapter_model.safetensors", WEIGHTS))


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """All files below a folder of its own after one layer was unpacked into `target` in it."""

    def run(layer: bytes, compressed: bool = False, left: int = image.MOST_BYTES) -> dict[str, bytes]:
        target = tmp_path / "outer" / "target"
        target.mkdir(parents=True)
        image._unpack(io.BytesIO(layer), compressed, target, left)
        found = (path for path in tmp_path.rglob("*") if path.is_file())
        return {str(path.relative_to(target)): path.read_bytes() for path in found}

    return run


EXPECTED = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}


@pytest.mark.parametrize("spelled", ["", "./", "/"])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_two_files_are_taken_out(unpack: Callable[..., dict[str, bytes]], spelled: str, compressed: bool) -> None:
    layer = packed(*(entry(spelled + made.name, data) for made, data in GOOD))
    assert unpack(gzip.compress(layer) if compressed else layer, compressed) == EXPECTED


def test_nothing_else_is_written_anywhere(unpack: Callable[..., dict[str, bytes]]) -> None:
    others = [
        entry("data/../../escaped", b"x"),
        entry("../adapter_config.json", b"x"),
        entry("/etc/passwd", b"x"),
        entry("data/deeper/adapter_config.json", b"x"),
        entry("data/README.md", b"x"),
        entry("data/link", kind=tarfile.SYMTYPE, linkname="/"),
        entry("data/link/adapter_config.json", b"x"),
        entry("dev", kind=tarfile.CHRTYPE),
    ]
    assert unpack(packed(*others, *GOOD, *others)) == EXPECTED


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_link_in_the_place_of_a_file_is_refused(unpack: Callable[..., dict[str, bytes]], kind: bytes) -> None:
    with pytest.raises(tarfile.ReadError, match=r"data/adapter_config\.json is no plain file"):
        unpack(packed(entry("data/adapter_config.json", kind=kind, linkname="/etc/passwd")))


def test_a_small_layer_cannot_unpack_to_any_size(unpack: Callable[..., dict[str, bytes]]) -> None:
    zeros = packed(entry("data/adapter_model.safetensors", bytes(40 * 2**20)))
    small = gzip.compress(zeros)
    assert len(small) < 2**20
    with pytest.raises(tarfile.ReadError, match="bytes when unpacked"):
        unpack(small, True, 2**20)


def test_settings_and_extended_headers_are_bounded_for_they_are_held_in_memory(
    unpack: Callable[..., dict[str, bytes]],
) -> None:
    with pytest.raises(tarfile.ReadError, match="expected PEFT's settings"):
        unpack(packed(entry("data/adapter_config.json", bytes(image.MOST_CONFIG_BYTES + 1))))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_an_extended_header_is_bounded_too(unpack: Callable[..., dict[str, bytes]], kind: bytes) -> None:
    with pytest.raises(tarfile.ReadError, match=r"an entry .* of type"):
        unpack(packed(entry("long", bytes(image.MOST_HEADER_BYTES + 1), kind), *GOOD))


def sparse_by_pax() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        made, data = entry("other", b"1\n")
        made.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        tar.addfile(made, io.BytesIO(data))
    return out.getvalue()


def test_a_sparse_file_is_refused_before_its_list_of_holes_is_read(unpack: Callable[..., dict[str, bytes]]) -> None:
    """It may go on for ever, and is held in memory: 228 KiB of a layer took 360 MiB."""
    header = bytearray(tarfile.TarInfo("other").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[482] = 1  # "another block of holes follows"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = bytearray(512)
    more[504] = 1
    with pytest.raises(tarfile.ReadError, match="a sparse file 'other'"):
        unpack(gzip.compress(bytes(header) + bytes(more) * 2048), True)


def test_a_sparse_file_by_an_extended_header_is_refused_too(unpack: Callable[..., dict[str, bytes]]) -> None:
    with pytest.raises(tarfile.ReadError, match="a sparse file"):
        unpack(sparse_by_pax())


def test_what_is_cut_short_or_no_tar_is_told(unpack: Callable[..., dict[str, bytes]]) -> None:
    with pytest.raises(tarfile.TarError):
        unpack(packed(*GOOD)[:-20000])


def test_a_cut_or_false_gzip_is_told(unpack: Callable[..., dict[str, bytes]]) -> None:
    with pytest.raises((tarfile.TarError, EOFError)):
        unpack(gzip.compress(packed(*GOOD))[:200], True)


def test_a_packed_layer_is_the_same_every_time_and_names_the_public_base(
    tmp_path: Path, unpack: Callable[..., dict[str, bytes]]
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": "/models/tiny"}))
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    layers = [tmp_path / "one.tar", tmp_path / "two.tar"]
    for layer in layers:
        image._pack(folder, CARD, layer)
        (folder / "adapter_model.safetensors").touch()
    assert layers[0].read_bytes() == layers[1].read_bytes()
    with tarfile.open(layers[0]) as tar:
        assert [(each.name, each.mode, each.uid, each.mtime) for each in tar] == [
            ("data", 0o755, 0, 0), ("data/adapter_config.json", 0o644, 0, 0),
            ("data/adapter_model.safetensors", 0o644, 0, 0),
        ]  # fmt: skip
        config = tar.extractfile("data/adapter_config.json")
        assert config and json.load(config) == {"r": 8, "base_model_name_or_path": "tiny"}


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("oci://h/a", ("oci://h", "a", None)),
        ("oci://h:5000/team/a:v1", ("oci://h:5000/team", "a", "v1")),
        (f"oci://h/x/y/a@sha256:{'0' * 64}", ("oci://h/x/y", "a", f"sha256:{'0' * 64}")),
    ],
)
def test_addresses(url: str, parts: tuple[str, str, str | None]) -> None:
    assert image._split(url) == parts


@pytest.mark.parametrize("url", ["oci://h", "oci://h/", "h/a", "https://h/a", "oci://h/a@sha256:1", "oci://h/a:"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected oci://HOST"):
        image._split(url)


def test_the_command_refuses_a_target_with_a_tag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").mkdir()
    command = ["image", str(tmp_path / "store"), "kubectl", "--to", "oci://127.0.0.1:1/a:latest"]
    assert main(command) == exits.INPUT
    assert "the image's tag is the version" in capsys.readouterr().err
