"""A copy of the program with settings for this machine: a stack's file is never written by what is tried here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from common.settings import SettingsError

OURS = "198.18.0.7/32"  # RFC 2544, for tests of networks: no address of the documentation, and nobody's
BLANK = "#"  # `pulumi config set` writes the file anew and keeps comments where they are, but no empty lines
EXAMPLES = re.compile(r"\b(192\.0\.2|198\.51\.100|203\.0\.113)\.\d+/\d+")  # RFC 5737


def copy(source: Path, target: Path) -> None:
    """Make `target` hold what git knows below `source`, new files included; what is the same is left alone.

    Raises `SettingsError` where `source` is no git checkout, or git is absent.
    """
    command = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        raise SettingsError(["git is not on the PATH: the program is copied as git lists it; install git"]) from None
    if listed.returncode:
        said = listed.stderr.decode().strip()
        raise SettingsError([f"{source}: the program is copied as git lists it, but git says: {said}"])
    wanted = {name for name in listed.stdout.decode().split("\0") if name and (source / name).is_file()}
    for path in [path for path in target.rglob("*") if path.is_file() and str(path.relative_to(target)) not in wanted]:
        path.unlink()
    for name in sorted(wanted):
        here, there = source / name, target / name
        if not there.is_file() or here.read_bytes() != there.read_bytes():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here, there)


def for_here(text: str) -> str:
    """A `Pulumi.STACK.yaml` (its text) that works with this machine's backend, each line where it was.

    What only its own backend can decrypt is blanked, and so are addresses of the documentation's ranges replaced, with
    which `pulumi up` refuses to work.
    """
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if re.match(r"(encryptionsalt|encryptedkey|secretsprovider):", line):
            lines[at] = BLANK
        elif re.match(r"\s+secure:", line):
            _blank(lines, at)
    return "\n".join(EXAMPLES.sub(OURS, line) for line in lines) + "\n"


def _blank(lines: list[str], at: int) -> None:
    """Blank a line and then the key above it, where nothing else stands under that."""
    depth = _indentation(lines[at])
    lines[at] = BLANK
    above = next((n for n in range(at - 1, -1, -1) if _says_something(lines[n])), None)
    below = next((line for line in lines[at + 1 :] if _says_something(line)), "")
    if above is not None and _indentation(lines[above]) < depth > _indentation(below):
        _blank(lines, above)


def _says_something(line: str) -> bool:
    return line.strip() not in ("", BLANK)


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())
