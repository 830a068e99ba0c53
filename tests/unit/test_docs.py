"""What the documents tell people to type exists: links, make targets, commands with their options, settings."""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import yaml

from infra.settings import Environment, described

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SETTINGS = {line.split()[0] for line in described()}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(text: str) -> Iterator[str]:
    """Indented and fenced blocks, and what stands in backticks."""
    fenced = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    yield from fenced
    yield from (block for block in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE))
    yield from re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            if anchor and found.suffix == ".md":
                titles = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_make_targets_exist(page: Path) -> None:
    for block in code(page.read_text()):
        for target in re.findall(r"(?:^|sudo )\s*make ([a-z][a-z-]+)", block, re.MULTILINE):
            assert target in TARGETS, target


@cache
def taught(module: str, subcommand: str) -> str:
    """What `python -m MODULE SUBCOMMAND --help` prints, from the same functions in this process."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, module
    package = spec.submodule_search_locations is not None
    source = (Path(spec.origin).with_name("__main__.py") if package else Path(spec.origin)).read_text()
    assert '__name__ == "__main__"' in source, module
    if "def main()" in source or "def main(" not in source:  # it takes no options, and importing it may take long
        return ""
    found = importlib.import_module(f"{module}.__main__" if package else module)
    told = io.StringIO()
    with redirect_stdout(told), pytest.raises(SystemExit) as ended:
        found.main([subcommand, "--help"] if subcommand else ["--help"])
    assert ended.value.code == 0, f"{module} {subcommand}"
    return told.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_their_options_exist(page: Path) -> None:
    for block in code(page.read_text()):
        for module, rest in re.findall(r"python -m ([a-z_.]+)(.*)$", block, re.MULTILINE):
            if module in ("pytest", "pip", "venv"):
                continue
            words = rest.split("#")[0].split()
            first = words[0] if words and re.fullmatch("[a-z]+", words[0]) else ""
            subcommand = (
                first if re.search(rf"[{{,|]{first}[}},|]|^ +{first}\b", taught(module, ""), re.MULTILINE) else ""
            )
            for option in (word for word in words if re.fullmatch("--[a-z][a-z0-9-]+", word)):
                assert option in taught(module, subcommand), f"{module} {subcommand} {option}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_settings_exist(page: Path) -> None:
    keys = set(Environment.model_fields)
    text = page.read_text()
    for key, inner in re.findall(r"\bdrydock:([a-z_]+)(?:\.([a-zA-Z_0-9]+))?", text):
        assert key in keys or key in ("tuning",), f"drydock:{key}"
        assert inner is not None
    for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE):
        if "drydock:" not in block or not block.strip().startswith("drydock:"):
            continue
        values = yaml.safe_load(re.sub(r"^ {4}", "", block, flags=re.MULTILINE))
        for key, value in values.items():
            for place in places(value, key.removeprefix("drydock:")):
                assert place in SETTINGS, place


def places(value: object, at: str) -> Iterator[str]:
    """The settings that `value` names, as `python -m infra.settings` writes them: NAME for a key of one's own."""
    known = {line for line in SETTINGS if line == at or line.startswith(f"{at}.")}
    if at in known or not isinstance(value, dict):
        yield at
        return
    for key, inner in value.items():
        named_by_us = any(line.startswith(f"{at}.NAME") for line in known)
        yield from places(inner, f"{at}.NAME" if named_by_us else f"{at}.{key}")


def test_the_pages_are_read_as_meant() -> None:
    blocks = list(code("text `make unit` and\n\n    make test # x\n\n```\nmake lint\n```\n"))
    assert any("make test" in block for block in blocks) and "make unit" in blocks and "make lint\n" in blocks
    assert list(places({"batch": {"clients": ["a"], "n": 1}}, "tiers")) == ["tiers.NAME.clients", "tiers.NAME.n"]
    assert list(places({"pools": 1}, "nothing")) == ["nothing.pools"]
