"""Prompts: length, determinism, variety."""

from __future__ import annotations

from collections import Counter

import pytest

from stress.prompts import PromptSource, Turns

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
