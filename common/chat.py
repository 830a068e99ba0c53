"""How a dataset row becomes chat messages: one definition for training, evaluation and load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = dict[str, str]


def prompt_messages(row: Mapping[str, Any]) -> list[Message]:
    """The messages that a client sends for `row`: everything before the answer.

    A row is either `{"instruction", "input", "output"}` or `{"messages": [...]}` whose last message is the
    assistant's answer. `instruction` and a non-empty `input` are joined by a newline into one user turn.
    """
    if "messages" in row:
        return [dict(message) for message in row["messages"][:-1]]
    instruction, extra = str(row["instruction"]), str(row.get("input", ""))
    return [{"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction}]


def answer(row: Mapping[str, Any]) -> str:
    """The text that the model should give for `row`."""
    return str(row["messages"][-1]["content"] if "messages" in row else row["output"])
