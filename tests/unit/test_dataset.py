"""The dataset check: every problem with its line, what was found and what is expected; and a split that stays put."""

from __future__ import annotations

import codecs
import hashlib
import json
import random
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from training import dataset
from training.__main__ import main
from training.dataset import Checked, Limits, Problem, Row, is_held_out, read

GOOD = {"instruction": "list pods", "input": "in prod", "output": "kubectl get pods -n prod"}
CHAT = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
}


def line(**change: Any) -> str:
    return json.dumps(GOOD | change)


def look(
    tmp_path: Path, data: str | bytes, limits: Limits | None = None
) -> tuple[list[tuple[int, Row]], list[Problem], Checked]:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    checked, rows, problems = Checked(), [], []
    for item in read(path, limits or Limits(1024), checked):
        if isinstance(item, Problem):
            problems.append(item)
        else:
            rows.append(item)
    assert checked.rows == len(rows)
    assert checked.rejected == len({problem.line for problem in problems})
    return rows, problems, checked


def problem(tmp_path: Path, second_line: str | bytes, limits: Limits | None = None) -> Problem:
    """The only problem of a file whose second line is `second_line` between two good ones."""
    middle = second_line.encode() if isinstance(second_line, str) else second_line
    data = line(input="1").encode() + b"\n" + middle + b"\n" + line(input="3").encode() + b"\n"
    rows, (found,), _ = look(tmp_path, data, limits)
    assert [number for number, _ in rows] == [1, 3], "the lines around it are good"
    assert found.line == 2
    return found


def turns(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]})


ORDER = "system (optional), then user and assistant in turn, assistant last"
KEYS = "the keys instruction, input, output, or messages alone"


@pytest.mark.parametrize(
    ("bad", "found", "expected"),
    [
        ("{not json}", "no JSON (Expecting property name enclosed in double quotes at column 2): {not json}", "one JSON object a line"),
        (line()[:-1], "no JSON (Expecting ',' delimiter at column", "one JSON object a line"),
        ("[1, 2", "no JSON", "a JSON array over several lines is not JSON Lines"),
        (f"[{line()}]", "a JSON array", "an object"),
        ("7", "a JSON number", "an object"),
        ("null", "a JSON null", "an object"),
        ('"text"', "a JSON string", "an object"),
        ("true", "a JSON boolean", "an object"),
        ("NaN", "a JSON number", "an object"),
        ('{"instruction": "a", "output": "b"}', "no key 'input'", KEYS + ' ("input" may be "")'),
        ('{"instruction": "a", "input": ""}', "no key 'output'", KEYS),
        ('{"input": "", "output": "b"}', "no key 'instruction'", KEYS),
        (line(category="x"), "unknown key 'category'", KEYS),
        (line(output=7), "output of type number", "a string"),
        (line(output=None), "output of type null", "a string"),
        (line(input=["a"]), "input of type array", "a string"),
        (line(instruction={"a": 1}), "instruction of type object", "a string"),
        (line(output=True), "output of type boolean", "a string"),
        (line(output=""), "an empty output", "some text"),
        (line(output=" \n\t "), "an empty output", "some text"),
        (line(instruction=""), "an empty instruction", "some text"),
        (line(output="a\x00b"), "control character U+0000 in output", "tab and newline are the only controls"),
        (line(instruction="a\x1b[31m"), "control character U+001B in instruction", "tab and newline"),
        (line(input="\x85"), "control character U+0085 in input", "tab and newline"),
        (line(output="a\ud800b"), "control character U+D800 in output", "text"),
        ('{"instruction": "a", "input": "", "output": "b", "output": "c"}', "key 'output' twice", "each key once"),
        (b'{"instruction": "a\xff", "input": "", "output": "b"}', "bytes that are not UTF-8 at byte 19", "UTF-8 text"),
        (line(input="1"), "a duplicate of line 1", "each example once"),
        (line(input="1 ", output=f"\n{GOOD['output']}"), "a duplicate of line 1", "each example once"),
        (json.dumps(CHAT | {"id": 1}), "unknown key 'id' beside messages", "messages alone"),
        ('{"messages": []}', "messages = []", "at least one user turn and the answer"),
        ('{"messages": "hi"}', 'messages = "hi"', "a list"),
        (turns("user", "user"), "turns user, user", ORDER),
        (turns("assistant", "user"), "turns assistant, user", ORDER),
        (turns("user", "assistant", "user"), "turns user, assistant, user", ORDER),
        (turns("system", "assistant"), "turns system, assistant", ORDER),
        (turns("user", "system", "assistant"), "turns user, system, assistant", ORDER),
        (turns("user", "tool"), 'messages[1].role = "tool"', "system, user or assistant"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}', 'messages[1] = {"role": "assistant"}', "exactly role and content"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}', "an empty messages[1].content", "some text"),
        ('{"messages": [{"role": "user", "content": [1]}, {"role": "assistant", "content": "x"}]}', "messages[0].content of type array", "a string"),
        ('{"messages": [{"role": ["user"], "content": "x"}, {"role": "assistant", "content": "x"}]}', 'messages[0].role = ["user"]', "system, user or assistant"),
        ("[" * 100_000, "no JSON", "one JSON object a line"),
        ('{"a":' * 5_000, "no JSON", "one JSON object a line"),
        (f'{{"instruction": {"9" * 5000}}}', "no JSON", "one JSON object a line"),
    ],
)  # fmt: skip
def test_each_problem_names_its_line_what_was_found_and_what_is_expected(
    tmp_path: Path, bad: str | bytes, found: str, expected: str
) -> None:
    told = problem(tmp_path, bad)
    assert told.found.startswith(found)
    assert expected in told.expected
    assert len(str(told)) < 400, "a line of a terminal or few, whatever the row holds"
    assert str(told).isprintable()


def test_no_depth_of_nesting_breaks_the_check(tmp_path: Path) -> None:
    nested = ["[" * depth + "]" * depth for depth in range(800, 1001)]  # around Python's recursion limit
    for row in ('{"messages": %s}', '{"messages": [%s, 1]}', '{"instruction": "a", "input": %s, "output": "b"}'):
        rows, problems, _ = look(tmp_path, "\n".join(row % each for each in nested))
        assert not rows
        assert {p.line for p in problems} == set(range(1, len(nested) + 1))


def test_every_problem_of_a_row_is_told_and_the_row_counts_once(tmp_path: Path) -> None:
    _, problems, checked = look(tmp_path, '\n{"instruction": "", "output": 1, "extra": 0}\n')
    assert [str(p).split("; ")[0] for p in problems] == [
        "2: found an empty instruction",
        "2: found no key 'input'",
        "2: found output of type number",
        "2: found unknown key 'extra'",
    ]
    assert checked.rejected == 1


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_bom_crlf_blank_lines_and_a_missing_last_newline_change_nothing(
    tmp_path: Path, start: bytes, end: bytes, last: bool
) -> None:
    lines = [line(input="ü"), "", "   ", json.dumps(CHAT), ""]
    data = start + end.join(text.encode() for text in lines)
    rows, problems, _ = look(tmp_path, data + end if last else data.rstrip())
    assert not problems
    assert rows == [(1, GOOD | {"input": "ü"}), (4, CHAT)]


def test_tab_newline_and_any_script_are_text(tmp_path: Path) -> None:
    text = "a\tb\nc\r\nd é 漢字 🚀 \u2028\xa0"
    rows, problems, _ = look(
        tmp_path, line(output=text) + "\n" + json.dumps(GOOD | {"input": text}, ensure_ascii=False)
    )
    assert not problems
    assert (rows[0][1]["output"], rows[1][1]["input"]) == (text, text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_in_words(tmp_path: Path, encoding: str) -> None:
    rows, problems, _ = look(tmp_path, (line() + "\n").encode(encoding))
    assert not rows
    assert problems[0].line == 1
    assert "UTF-16" in problems[0].found or encoding != "utf-16"
    assert all(str(p).isprintable() for p in problems)


def test_a_json_array_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    rows, problems, _ = look(tmp_path, json.dumps([GOOD, CHAT], indent=1))
    assert not rows
    assert "not JSON Lines" in problems[0].expected


@pytest.mark.parametrize("data", ["", "\n\r\n  \n"])
def test_a_file_without_rows_is_a_problem_that_shows_a_row(tmp_path: Path, data: str) -> None:
    _, (told,), _ = look(tmp_path, data)
    assert told.found == "no rows"
    assert '"instruction"' in told.expected


def test_repeated_rows_are_found_across_formats_and_key_orders(tmp_path: Path) -> None:
    chat = {
        "messages": [
            {"content": "list pods\nin prod", "role": "user"},
            {"role": "assistant", "content": GOOD["output"]},
        ]
    }
    turned = json.dumps(dict(reversed(GOOD.items())))
    _, problems, _ = look(tmp_path, "\n".join([line(), line(output="other"), json.dumps(chat), "", turned]))
    assert [(p.line, p.found) for p in problems] == [(3, "a duplicate of line 1"), (5, "a duplicate of line 1")]


def test_a_rejected_row_is_no_original_to_be_a_duplicate_of(tmp_path: Path) -> None:
    _, problems, _ = look(tmp_path, "\n".join([line(output=""), line(output="")]))
    assert [p.found for p in problems] == ["an empty output", "an empty output"]


@pytest.mark.parametrize(("excess", "refused"), [(-1, False), (0, True), (1, True), (5000, True)])
def test_an_over_long_line_is_refused_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: int, refused: bool
) -> None:
    monkeypatch.setattr(dataset, "MAX_LINE_BYTES", 1000)
    empty = len(line(output=""))
    long = line(output="x" * (1000 + excess - empty))
    rows, problems, checked = look(tmp_path, f"{long}\n{line()}\n{long}")
    assert [number for number, _ in rows] == ([2] if refused else [1, 2])
    assert [p.line for p in problems] == [1, 3] if refused else [3]
    assert ("more than" in problems[0].found) == refused
    data = (tmp_path / "data.jsonl").read_bytes()
    assert checked.digest == _digest(data), "the digest is of every byte, read or skipped"


def prompt_of(row: Row) -> str:
    return str(row["instruction"])


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(("words", "refused"), [(249, False), (250, True), (900, True)])
def test_a_prompt_that_leaves_no_answer_token_is_refused_by_the_bases_own_count(
    tmp_path: Path, words: int, refused: bool
) -> None:
    limits = Limits(256, prompt_of, lambda prompt: 6 + len(prompt.split()))
    row = line(instruction=" ".join(["w"] * words), input="")
    if not refused:
        assert not look(tmp_path, row, limits)[1]
        return
    told = problem(tmp_path, row, limits)
    assert told.found == f"a prompt of {words + 6} tokens, which leaves no room for the answer"
    assert told.expected.startswith("fewer than max_seq_length = 256")


def test_without_a_base_only_a_surely_too_long_prompt_is_refused(tmp_path: Path) -> None:
    assert not look(tmp_path, line(instruction="x" * 1000, input=""), Limits(256))[1]
    told = problem(tmp_path, line(instruction="x" * 8 * 256, input=""), Limits(256))
    assert "256 tokens or more (at 8 bytes a token)" in told.found


def test_a_short_limit_counts_every_prompt(tmp_path: Path) -> None:
    limits = Limits(8, prompt_of, len)
    assert not look(tmp_path, line(instruction="x" * 7, input=""), limits)[1]
    _, (told,), _ = look(tmp_path, line(instruction="x" * 8, input=""), limits)
    assert "prompt of 8 tokens" in told.found


@pytest.mark.parametrize("where", ["instruction", "input", "output"])
def test_the_bases_control_tokens_are_no_text(tmp_path: Path, where: str) -> None:
    limits = Limits(1024, special_tokens=("<|end|>", "<|user|>"))
    told = problem(tmp_path, line(**{where: "a <|end|> b"}), limits)
    assert told.found == "the base's control token <|end|>"
    assert not look(tmp_path, line(**{where: "a <|stop|> b"}), limits)[1]


# The command.


def test_the_command_lists_all_problems_and_exits_2_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{line()}\n{line(output='')}\n\n{line()}\n")
    assert main(["check", str(path)]) == 2
    told = capsys.readouterr()
    assert told.out.splitlines()[:2] == [
        f"{path}:2: found an empty output; expected some text",
        f"{path}:4: found a duplicate of line 1; expected each example once: delete one of the two",
    ]
    assert re.search(r"1 good rows, 2 with problems", told.out)
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


def test_the_command_exits_0_on_a_clean_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(line() + "\n")
    assert main(["check", str(path)]) == 0
    assert "1 good rows, no problems" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


def test_the_summary_as_json_stands_alone_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{line()}\n{line(output='')}\n")
    assert main(["check", str(path), "--json"]) == 2
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert (summary["examples"], summary["rejected"]) == (1, 1)
    assert summary["digest"] == _digest(path.read_bytes())
    assert "found an empty output" in told.err


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_the_command_names_a_file_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["check", str(tmp_path / name)]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err


def test_the_command_wants_a_base_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(line())
    assert main(["check", str(path), "--base", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["check", str(path), "--base", str(tmp_path)]) == 2
    assert "lacks config.json, weights (*.safetensors), tokenizer.json" in capsys.readouterr().err


def test_wrong_arguments_exit_with_2_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["check"])
    assert stopped.value.code == 2


def test_a_large_file_is_streamed_fast_and_in_little_memory(tmp_path: Path) -> None:
    """14,000 rows in about a second and a million in under 300 MB, scaled down, with room for a busy machine."""
    count = 14_000
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for number in range(count):
            file.write(line(instruction=f"do {number} things " + "x" * 200) + "\n")
    started = time.process_time()
    assert sum(1 for _ in read(path, Limits(1024))) == count
    assert time.process_time() - started < count / 7_000

    rows = 5_000
    small = tmp_path / "small.jsonl"
    small.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read(small, Limits(1024))) == rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (peak - 200_000) / rows < 250, "bytes a row: 250 MB for a million"


# The split.


def _rows(count: int) -> list[Row]:
    return [GOOD | {"instruction": f"question {number}"} for number in range(count)]


def test_the_split_of_a_row_depends_on_nothing_but_its_prompt() -> None:
    rows = _rows(300)
    sides = [is_held_out(row, 0.2) for row in rows]
    assert any(sides) and not all(sides)
    shuffled = rows + [GOOD | {"instruction": f"later {n}"} for n in range(50)]
    random.Random(1).shuffle(shuffled)
    again = {row["instruction"]: is_held_out(row, 0.2) for row in shuffled}
    assert [again[row["instruction"]] for row in rows] == sides, "whatever the order and whatever is added"
    assert [is_held_out(row | {"output": "another answer"}, 0.2) for row in rows] == sides, "one prompt, one side"
    chat = [
        {
            "messages": [
                {"role": "user", "content": f"{row['instruction']}\nin prod"},
                {"role": "assistant", "content": "x"},
            ]
        }
        for row in rows
    ]
    assert [is_held_out(row, 0.2) for row in chat] == sides, "in either format"
    # Llama's template cuts it off: to the model it is the same prompt, seen in tuning and asked by the gate.
    padded = [row | {"instruction": f" {row['instruction']}", "input": f"{row['input']}\n"} for row in rows]
    assert [is_held_out(row, 0.2) for row in padded] == sides, "whatever space is around it"


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_the_held_out_share_is_about_what_was_asked(fraction: float) -> None:
    share = sum(is_held_out(row, fraction) for row in _rows(4000)) / 4000
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5


def test_a_larger_fraction_only_adds_to_the_held_out_side() -> None:
    rows = _rows(500)
    small, large = ({row["instruction"] for row in rows if is_held_out(row, f)} for f in (0.1, 0.2))
    assert small < large
