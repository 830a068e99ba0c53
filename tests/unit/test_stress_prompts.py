"""Prompts: length, determinism, variety."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from common.settings import SettingsError
from stress.prompts import PromptSource, Turns, read_rows

ROWS = [{"instruction": f"How do I restart pod {n}?", "input": "", "output": f"kubectl restart {n}"} for n in range(20)]
CHAT = [{"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"},
                      {"role": "assistant", "content": "Because."}]}]  # fmt: skip


def length(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)


@pytest.mark.parametrize("tokens", [50, 200, 800, 3200])
def test_length_is_met(tokens: int) -> None:
    source = PromptSource(ROWS, seed=1, chars_per_token=3.5)
    for number in range(20):
        assert length(source.messages(number, tokens)) == pytest.approx(tokens * 3.5, abs=2)


def test_the_question_is_never_cut() -> None:
    content = PromptSource(ROWS, seed=1).messages(0, 1)[-1]["content"]
    assert content.split("\n")[-1] in {row["instruction"] for row in ROWS}
    assert content.count("\n") == 1  # the marker and the question, no context


def test_same_seed_same_prompts() -> None:
    first, second = PromptSource(ROWS, seed=7), PromptSource(ROWS, seed=7)
    assert [first.messages(n, 100) for n in range(10)] == [second.messages(n, 100) for n in reversed(range(10))][::-1]
    assert first.messages(0, 100) != PromptSource(ROWS, seed=8).messages(0, 100)


def test_prompts_differ_from_the_first_characters_on() -> None:
    """Otherwise vLLM's prefix cache would answer for the model."""
    source = PromptSource(ROWS[:2], seed=1)
    starts = {source.messages(number, 400)[-1]["content"][:12] for number in range(500)}
    assert len(starts) == 500


def test_chat_rows_keep_their_system_message() -> None:
    messages = PromptSource(CHAT, seed=1).messages(3, 100)
    assert messages[0] == {"role": "system", "content": "Be short."}
    assert messages[-1]["role"] == "user" and messages[-1]["content"].endswith("Why?")
    assert length(messages) == pytest.approx(400, abs=2)
    assert CHAT[0]["messages"][1]["content"] == "Why?"  # the dataset itself is untouched


def test_turns_keep_the_proportions_in_any_stretch() -> None:
    turns = Turns({"kubectl": 3, "triage": 1})
    given = [turns.next() for _ in range(400)]
    assert Counter(given) == {"kubectl": 300, "triage": 100}
    assert all(given[n : n + 4].count("triage") == 1 for n in range(0, 400, 4))
    equal = Turns({"a": 1, "b": 1})
    assert [equal.next() for _ in range(4)] == ["a", "b", "a", "b"]


def test_the_files_of_a_folder_give_rows_in_equal_parts(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"holds no \*\.jsonl"):
        read_rows(tmp_path)
    for name, count in (("a", 5), ("b", 3)):
        lines = [json.dumps({"instruction": f"{name}{n}", "input": "", "output": "x"}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "notes.txt").write_text("no dataset")
    assert [row["instruction"] for row in read_rows(tmp_path)] == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
    assert [row["instruction"] for row in read_rows(tmp_path, limit=4)] == ["a0", "a1", "b0", "b1"]
