"""Prompts of a wanted length from dataset rows, each one different, so that the prefix cache cannot flatter."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.chat import Message, answer, prompt_messages
from common.settings import SettingsError


def read_rows(path: Path, limit: int = 20_000) -> list[dict[str, Any]]:
    """The first `limit` rows of the dataset `path`, or of all `*.jsonl` in the folder `path`, as many of each.

    Raises `SettingsError` naming up to ten bad lines of a file.
    """
    if not path.is_dir():
        return _rows(path, limit)
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise SettingsError([f"{path}: holds no *.jsonl to make prompts from"])
    return [row for file in files for row in _rows(file, max(1, limit // len(files)))]


def _rows(path: Path, limit: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if not prompt_messages(row):
                        raise ValueError("no message before the answer")
                    answer(row)
                except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                    problems.append(f"{path}:{number}: not a dataset row ({type(error).__name__}: {error})")
                    if len(problems) == 10:
                        break
                    continue
                rows.append(row)
                if len(rows) == limit:
                    break
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: cannot be read as a dataset: {error}"]) from None
    if problems:
        raise SettingsError([*problems, "see all problems with: python -m training check FILE"])
    if not rows:
        raise SettingsError([f"{path}: has no rows to make prompts from"])
    return rows


class PromptSource:
    """Makes the messages of request `number`.

    The last user turn is `[marker]`, other rows of the dataset as context until the wanted length is reached, and
    then the question. The marker comes first and differs in each request: vLLM's prefix cache keys blocks by all
    tokens before them, so only what precedes the marker (a system message, the chat template's opening) can be found
    in the cache. Without it, a small dataset would repeat itself and prompts would seem cheaper than they are.
    Lengths are in characters: `tokens * chars_per_token`. The question is never cut, so a prompt can be longer than
    wanted; context is cut at the wanted length.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], seed: int, chars_per_token: float = 4.0) -> None:
        if not rows:
            raise ValueError("no rows to make prompts from")
        self.rows = rows
        self.seed = seed
        self.chars_per_token = chars_per_token

    def messages(self, number: int, tokens: int) -> list[Message]:
        """The messages of request `number`, about `tokens` long; the same arguments give the same messages."""
        chance = random.Random(f"{self.seed}/{number}")
        marker = f"[{chance.getrandbits(40):010x}]"
        messages = prompt_messages(chance.choice(self.rows))
        question = messages[-1]["content"]
        fixed = sum(len(message["content"]) for message in messages) + len(marker) + 1
        room = int(tokens * self.chars_per_token) - fixed
        context = self._context(chance, room)
        messages[-1]["content"] = "\n".join(part for part in (marker, context, question) if part)
        return messages

    def _context(self, chance: random.Random, room: int) -> str:
        """Rows with their answers, at most `room` characters."""
        parts: list[str] = []
        length = 0
        while length < room:
            row = chance.choice(self.rows)
            part = "\n".join([*(message["content"] for message in prompt_messages(row)), answer(row)])
            parts.append(part)
            length += len(part) + 1
        return "\n".join(parts)[: max(0, room - 1)].rstrip()


class Turns:
    """Gives aliases in turn by weight: smooth weighted round robin, so any stretch keeps the proportions."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self.credit = dict.fromkeys(self.weights, 0.0)

    def next(self) -> str:
        """The next alias."""
        for name, weight in self.weights.items():
            self.credit[name] += weight
        chosen = max(self.credit, key=lambda name: self.credit[name])
        self.credit[chosen] -= sum(self.weights.values())
        return chosen
