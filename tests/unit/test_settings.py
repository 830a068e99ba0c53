"""Settings files and whole-or-absent files: every problem told at once, nothing half written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import Field

from common.chat import answer, prompt_messages
from common.files import read_json, read_jsonl, tree_digest, write_atomic, write_json, write_jsonl
from common.settings import Settings, SettingsError, load_settings


class Inner(Settings):
    depth: int = Field(1, ge=1)


class Outer(Settings):
    speed: float = Field(gt=0)
    label: str = "x"
    inner: Inner = Field(default_factory=Inner)
    words: tuple[str, ...] = ()


def load(tmp_path: Path, text: str | bytes, **overrides: object) -> Outer:
    path = tmp_path / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(path, Outer, **overrides)


def problems(tmp_path: Path, text: str | bytes) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    return [problem.removeprefix(str(tmp_path / "s.yaml")) for problem in caught.value.problems]


@pytest.mark.parametrize("written", ["2e-4", "2.0e-4", "0.0002", "'2e-4'", "2E-4"])
def test_a_number_in_any_notation_is_that_number(tmp_path: Path, written: str) -> None:
    assert load(tmp_path, f"speed: {written}\n").speed == 2e-4


def test_json_bom_and_crlf_are_read_as_well(tmp_path: Path) -> None:
    assert load(tmp_path, b'\xef\xbb\xbf{"speed": 2}').speed == 2
    assert load(tmp_path, b"speed: 2\r\nlabel: y\r\n").label == "y"


def test_overrides_win_and_none_leaves_the_file_alone(tmp_path: Path) -> None:
    outer = load(tmp_path, "speed: 1\nlabel: a\n", speed=3, label=None)
    assert (outer.speed, outer.label) == (3, "a")


def test_all_problems_are_told_together_each_with_its_line(tmp_path: Path) -> None:
    told = problems(tmp_path, "speed: -1\n\nlabl: y\ninner:\n  dept: 2\n  depth: 0\nwords: [a, 7]\n")
    assert len(told) == 5
    assert any(t.startswith(":1: speed: ") and t.endswith("found -1") and "greater than 0" in t for t in told)
    assert ":3: labl: unknown setting; did you mean label?" in told
    assert ":5: inner.dept: unknown setting; did you mean depth?" in told
    assert any(t.startswith(":6: inner.depth: ") and t.endswith("found 0") for t in told)
    assert any(t.startswith(":7: words.1: ") and t.endswith("found 7") for t in told)


def test_an_unknown_key_unlike_any_other_gets_the_list_of_known_ones(tmp_path: Path) -> None:
    (told,) = problems(tmp_path, "speed: 1\nzzzzzz: 1\n")
    assert told == ":2: zzzzzz: unknown setting; known here: speed, label, inner, words"


def test_a_required_key_that_is_absent_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, "label: y\n") == [": speed: required, but absent"]


def test_a_key_given_twice_is_a_problem_that_names_both_lines(tmp_path: Path) -> None:
    assert problems(tmp_path, "speed: 1\nlabel: a\nspeed: 2\n") == [":3: speed: given twice (first on line 1)"]
    told = problems(tmp_path, "speed: 1\ninner: {depth: 1,\n depth: 2}\nlabel: 3\n")
    assert told[0] == ":3: inner.depth: given twice (first on line 2)"
    assert len(told) == 2, "and the other problems come with it"


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("speed: [1\n", ":2: not YAML"),
        ("speed: 1\n\tlabel: x\n", ":2: not YAML"),
        ("speed: 2024-13-45\n", ": not YAML that can be read: month must be in 1..12"),
        ("speed: &a [*a]\n", ": not YAML that can be read: "),
        ("", ": expected `name: value` lines, found an empty file"),
        ("- a\n", ": expected `name: value` lines, found a list"),
        ("hello\n", ": expected `name: value` lines, found plain text"),
        (b"speed: \xff\n", ": cannot be read as UTF-8 text"),
    ],
)
def test_what_is_no_settings_file_says_so(tmp_path: Path, text: str | bytes, start: str) -> None:
    (told,) = problems(tmp_path, text)
    assert told.startswith(start)


@pytest.mark.parametrize("written", [".nan", ".inf"])
def test_nan_and_infinity_are_no_settings(tmp_path: Path, written: str) -> None:
    assert "finite" in problems(tmp_path, f"speed: {written}\n")[0]


def test_an_absent_file_and_a_folder_are_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: no such file"):
        load_settings(tmp_path / "none.yaml", Outer)
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path, Outer)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": math.nan})
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_lines_come_back_as_they_went(tmp_path: Path) -> None:
    rows = [{"a": "ü\u2028\n"}, [1, None], "x"]
    write_jsonl(tmp_path / "r.jsonl", iter(rows))
    assert list(read_jsonl(tmp_path / "r.jsonl")) == rows


def test_a_tree_digest_follows_names_and_contents_and_nothing_else(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            write_atomic(tmp_path / name / file, text)
        return tree_digest(tmp_path / name)

    first = tree("a", {"x": "1", "d/y": "2"})
    assert tree("b", {"d/y": "2", "x": "1", ".cache/z": "3", ".hidden": "4"}) == first
    assert tree("c", {"x": "1", "d/y": "3"}) != first
    assert tree("e", {"x": "1", "d/w": "2"}) != first
    assert first.startswith("sha256:")


def test_both_row_formats_become_the_same_conversation() -> None:
    plain = {"instruction": "Say hi", "input": "to Ann", "output": "hi Ann"}
    chat = {"messages": [{"role": "user", "content": "Say hi\nto Ann"}, {"role": "assistant", "content": "hi Ann"}]}
    assert prompt_messages(plain) == prompt_messages(chat) == [{"role": "user", "content": "Say hi\nto Ann"}]
    assert answer(plain) == answer(chat) == "hi Ann"
    assert prompt_messages({**plain, "input": ""}) == [{"role": "user", "content": "Say hi"}]
    assert json.dumps(chat) == json.dumps(chat | {"messages": chat["messages"]}), "the row itself stays untouched"
