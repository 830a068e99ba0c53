"""What surrounds a real build, without one: contexts, pip's settings, and a registry's words."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
import requests

from common.settings import SettingsError
from infra.context import pack
from localcloud import base, images
from localcloud.builder import BuildFailed, _machine, _pip_settings, _unpack


def archive(*names: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    return buffer.getvalue()


def test_a_context_is_unpacked_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "run.sh").chmod(0o700)
    _unpack(pack({"tools/run.sh": tmp_path / "run.sh"}), tmp_path / "room")
    found = tmp_path / "room/tools/run.sh"
    assert found.read_text() == "#!/bin/sh\n"
    assert (found.stat().st_mode & 0o777, found.stat().st_mtime) == (0o755, 0)


@pytest.mark.parametrize(
    ("context", "said"),
    [
        (archive("a/../../b"), "a/../../b leads out of it"),
        (archive("/b"), "/b leads out of it"),
        (archive("b", kind=tarfile.SYMTYPE), "b is neither file nor folder"),
        (b"no archive", "failed to download context"),
    ],
    ids=["outwards", "absolute", "a link", "no archive"],  # an archive holds the time: no name that two workers share
)
def test_a_context_stays_in_its_room(tmp_path: Path, context: bytes, said: str) -> None:
    with pytest.raises(BuildFailed, match=said):
        _unpack(context, tmp_path / "room")
    assert not list(tmp_path.rglob("b"))


def test_pip_finds_the_index_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex_url = https://file.example\ntimeout = 3\nrequire-virtualenv = 1\n")
    other = tmp_path / "other.conf"
    other.write_text("[install]\ntrusted-host = file.example\n")
    environment = {"PIP_INDEX_URL": "https://variable.example/%7E", "PIP_TARGET": "/x", "PIP_CONFIG_FILE": str(other)}
    assert _pip_settings(environment, [file, tmp_path / "none"]) == {
        "index-url": "https://variable.example/%7E",
        "timeout": "3",
        "trusted-host": "file.example",
    }


def test_pip_s_files_are_mounted_where_the_base_image_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "bundle.pem").touch()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "bundle.pem"))
    assert _machine(tmp_path) == [
        f"{tmp_path}/bundle.pem:/etc/ssl/certs/ca-certificates.crt:ro",
        f"{tmp_path}/wheels:/mnt:ro",
        f"{tmp_path}/pip.conf:/etc/pip.conf:ro",
    ]
    written = (tmp_path / "pip.conf").read_text()
    assert "find-links = /mnt\n" in written and "cert = /etc/ssl/certs/ca-certificates.crt\n" in written
    assert (tmp_path / "pip.conf").stat().st_mode & 0o777 == 0o600


def test_a_registry_s_words() -> None:
    answer = requests.Response()
    answer.status_code, answer.reason = 404, "Not Found"
    answer._content = b"<html>"
    assert images._words(answer) == "404 Not Found"
    answer._content = (
        b'{"errors":[{"code":"NAME_UNKNOWN","message":"repository name not known","detail":{"name":"a"}}]}'
    )
    assert images._words(answer) == '404 NAME_UNKNOWN: repository name not known {"name": "a"}'


def test_what_a_machine_lacks_is_told_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("localcloud.images.shutil.which", lambda name: None)
    monkeypatch.setattr("localcloud.images.os.geteuid", lambda: 1000)
    with pytest.raises(SettingsError) as caught:
        images.Store(tmp_path)
    assert [problem.split(":")[1].split()[0] for problem in caught.value.problems] == ["not", "needs"]


def test_the_base_image_is_of_the_debian_that_apt_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "Other main stable https://other.example\nDebian main trixie-updates http://a.example\n"
    monkeypatch.setattr("localcloud.base.shutil.which", lambda name: name)
    monkeypatch.setattr(
        "localcloud.base.subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=listed)
    )
    with pytest.raises(SettingsError, match="knows no source of Debian"):
        base._source()
    listed += "Debian contrib trixie http://c.example\nDebian main trixie http://b.example/debian\n"
    assert base._source() == ("trixie", "http://b.example/debian")
