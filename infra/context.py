"""Build contexts: what a Dockerfile copies, its hash, and the archive that the registry's builder is given.

Only what a COPY names travels, so that an image is built anew when something in it changed, and never otherwise.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from common.files import file_digest
from common.settings import SettingsError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_NEEDS_BUILDKIT = "needs BuildKit, which the registry's builder lacks"


def context_files(root: Path, dockerfile: str, arguments: Mapping[str, str] | None = None) -> dict[str, Path]:
    """The Dockerfile and every file that its COPY instructions name, by path below `root` (with /), sorted.

    `arguments`: build arguments that are given, in place of the Dockerfile's defaults.
    Left out inside of folders: names that begin with a dot, `__pycache__`, `*.pyc`. Raises `SettingsError` with every
    line that cannot be built from such a context.
    """
    problems: list[str] = []
    files = {dockerfile: root / dockerfile}
    defaults = _defaults(root / dockerfile) | dict(arguments or {})
    for line, name, text in _instructions(root / dockerfile):
        where = f"{dockerfile}:{line}"
        if name == "ADD":
            problems.append(f"{where}: ADD: use COPY; what ADD fetches or unpacks is in no hash")
        elif name == "RUN" and text.startswith("--"):
            problems.append(f"{where}: RUN {text.split()[0]}: {_NEEDS_BUILDKIT}")
        elif name == "COPY":
            sources, complaint = _sources(text, defaults)
            if complaint:
                problems.append(f"{where}: {complaint}")
            for source in sources:
                found, complaint = _below(root, source)
                files |= found
                if complaint:
                    problems.append(f"{where}: COPY {source}: {complaint}")
    if problems:
        raise SettingsError(problems)
    return dict(sorted(files.items()))


def base_images(dockerfile: Path) -> dict[str, str]:
    """The build arguments that a FROM consists of, with their defaults: `{"PYTHON_IMAGE": "public.ecr.aws/..."}`."""
    defaults = _defaults(dockerfile)
    found = {}
    for _, name, text in _instructions(dockerfile):
        if name == "FROM" and (variable := _VARIABLE.fullmatch(text.split()[0])):
            key = variable[1] or variable[2]
            if key in defaults:
                found[key] = defaults[key]
    return found


def context_hash(files: Mapping[str, Path]) -> str:
    """SHA-256 (64 hex digits) over names, contents and executable bits: the same on every machine."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{_mode(path):o}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def pack(files: Mapping[str, Path]) -> bytes:
    """A gzipped tar of `files`, the same bytes for the same files: no times, no owners, two modes, sorted by name."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as archive,
    ):
        for name, path in sorted(files.items()):
            data = path.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), _mode(path)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _mode(path: Path) -> int:
    """What git keeps of a mode: a umask changes the rest from machine to machine."""
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


def _instructions(dockerfile: Path) -> Iterator[tuple[int, str, str]]:
    """`(line, NAME, text)` of each instruction, continued lines joined, comments left out."""
    try:
        lines = dockerfile.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise SettingsError([f"{dockerfile}: no such file"]) from None
    first, parts = 0, []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        first = first or number
        parts.append(text.removesuffix("\\").strip())
        if not text.endswith("\\"):
            name, _, rest = " ".join(parts).partition(" ")
            yield first, name.upper(), rest.strip()
            first, parts = 0, []


def _defaults(dockerfile: Path) -> dict[str, str]:
    """The ARG instructions that have a default."""
    pairs = (text.partition("=") for _, name, text in _instructions(dockerfile) if name == "ARG")
    return {key.strip(): value.strip().strip("\"'") for key, equals, value in pairs if equals}


def _sources(text: str, defaults: Mapping[str, str]) -> tuple[list[str], str | None]:
    """The sources of a COPY, and what is wrong with it; none for `--from`, which copies from another stage."""
    while text.startswith("--"):
        flag, _, text = text.partition(" ")
        text = text.strip()
        if flag.startswith("--from="):
            return [], None
        if not flag.startswith("--chown="):
            return [], f"COPY {flag}: {_NEEDS_BUILDKIT}"
    if "<<" in text:
        return [], f"COPY {text}: {_NEEDS_BUILDKIT}"
    unknown = [a or b for a, b in _VARIABLE.findall(text) if (a or b) not in defaults]
    if unknown:
        return [], f"COPY {text}: ARG {', '.join(unknown)} has no default, so what is copied is unknown here"
    text = _VARIABLE.sub(lambda match: defaults[match[1] or match[2]], text)
    if text.startswith("["):
        try:
            words = [str(word) for word in json.loads(text)]
        except ValueError:
            return [], f"COPY {text}: is not a JSON list"
    else:
        words = text.split()
    if len(words) < 2:
        return [], f"COPY {text}: names no source and destination"
    return words[:-1], None


def _below(root: Path, source: str) -> tuple[dict[str, Path], str | None]:
    """The files of one COPY source by their path below `root`, and what is wrong with it."""
    relative = PurePosixPath(source)
    if any(sign in source for sign in "*?["):
        return {}, "a pattern: name the file or folder"
    if relative.is_absolute() or ".." in relative.parts:
        return {}, "leads out of the repository"
    if not relative.parts:
        return {}, "the whole repository: every change of any file would build this image anew; name its folders"
    start = root / relative
    if start.is_file() and not start.is_symlink():
        return {relative.as_posix(): start}, None
    if not start.is_dir():
        return {}, "no such file or folder (below the repository's root)"
    found = {}
    for path in start.rglob("*"):
        inside = path.relative_to(start).parts
        if any(part.startswith(".") or part == "__pycache__" for part in inside) or path.suffix == ".pyc":
            continue
        if path.is_symlink():
            return {}, f"{path.relative_to(root).as_posix()} is a link: a build context holds files only"
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path
    return found, None if found else "holds no files"
