"""The copy of the program that a local cloud works on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from common.settings import SettingsError
from localcloud.cloud import known_to
from localcloud.program import OURS, copy, for_here

ROOT = Path(__file__).parents[2]

SECRETS = """\
secretsprovider: azurekeyvault://vault
encryptedkey: abc
config:
  drydock:huggingface_token:
    secure: v1:hf
  drydock:api_keys:
    team-a:
      secure: v1:a
    team-b:
      secure: v1:b
  drydock:base:
    model: m
    token: {plain: 1}
encryptionsalt: v1:salt
"""


def test_what_another_backend_encrypted_is_blanked_and_every_line_stays_where_it_was() -> None:
    changed = for_here(SECRETS)
    assert yaml.safe_load(changed) == {"config": {"drydock:base": {"model": "m", "token": {"plain": 1}}}}
    before, after = SECRETS.splitlines(), changed.splitlines()
    assert len(before) == len(after)
    assert all(new in ("#", old) for old, new in zip(before, after, strict=True))


def test_a_key_beside_a_secret_stays() -> None:
    text = "config:\n  a:keys:\n    one:\n      secure: v1:x\n    two: plain\n  a:other:\n    first: 1\n    third:\n      secure: y\n"
    assert yaml.safe_load(for_here(text)) == {"config": {"a:keys": {"two": "plain"}, "a:other": {"first": 1}}}


def test_only_addresses_of_the_documentation_are_replaced() -> None:
    text = "config:\n  drydock:network: { authorized_ip_ranges: [203.0.113.7/32, 198.18.5.0/24] }\n"
    assert for_here(text) == text.replace("203.0.113.7/32", OURS)


@pytest.mark.parametrize("stack", ["dev", "prod"])
def test_committed_settings_change_in_nothing_but_addresses(stack: str) -> None:
    text = (ROOT / f"Pulumi.{stack}.yaml").read_text()
    changed = [
        (old, new) for old, new in zip(text.splitlines(), for_here(text).splitlines(), strict=True) if old != new
    ]
    assert len(changed) == (1 if stack == "dev" else 0)
    assert all(OURS in new for _, new in changed)


def test_a_copy_follows_its_source_and_leaves_the_same_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "room").mkdir(parents=True)
    for name, text in {"a.py": "1", "room/b.py": "2", "c.log": "3", ".gitignore": "*.log\n"}.items():
        (source / name).write_text(text)
    subprocess.run(["git", "init", "-q", source], check=True)
    copy(source, target)
    assert sorted(path.name for path in target.rglob("*") if path.is_file()) == [".gitignore", "a.py", "b.py"]
    untouched = (target / "a.py").stat().st_mtime_ns
    (source / "room/b.py").unlink()
    (source / "new.py").write_text("4")
    (target / "left.py").write_text("of an earlier program")
    copy(source, target)
    assert sorted(path.name for path in target.rglob("*") if path.is_file()) == [".gitignore", "a.py", "new.py"]
    assert (target / "a.py").stat().st_mtime_ns == untouched


def test_a_folder_that_git_does_not_know_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is copied as git lists it, but git says: fatal: not a git repository"):
        copy(tmp_path, tmp_path / "target")


def test_without_git_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match=r"^git is not on the PATH: .*; install git$"):
        copy(ROOT, tmp_path / "target")


@pytest.mark.parametrize("name", ["nope", "", ".", "..", "../dev", "/tmp", "dev/../dev"])
def test_only_a_stack_with_settings_gets_a_folder(name: str) -> None:
    known_to(ROOT, "dev")
    with pytest.raises(SettingsError, match=r"no such file; stacks with settings: dev, local, prod$"):
        known_to(ROOT, name)  # a path would lead to a folder in which a copy removes all that is not the program's
