"""Reads a dataset in JSON Lines, finds every problem with its line number, and splits off what tuning never sees."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from common.chat import answer, prompt_messages

INSTRUCTION_KEYS = ("instruction", "input", "output")
ROLES = ("system", "user", "assistant")
MAX_LINE_BYTES = 16 * 2**20  # one row of 16 MiB is a mistake, and reading on would fill the memory
# C0, DEL and C1 control characters other than tab, newline and carriage return; unpaired surrogates cannot be UTF-8.
UNWANTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# No tokenizer packs ordinary text denser than this, so a prompt past it is too long for certain.
MOST_BYTES_PER_TOKEN = 8

Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line: what was found and what is expected."""

    line: int
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.line}: found {self.found}; expected {self.expected}"


class Refused(Exception):
    """A row that the base cannot be given: what was `found` and what is `expected`."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}; expected {expected}")
        self.found, self.expected = found, expected


@dataclass
class Limits:
    """What the base model demands of a row; where it is known, `render` and `count` ask its template and tokenizer.

    `render` gives a row's prompt as the base reads it, or raises `Refused`; `count` that text's tokens.
    """

    max_seq_length: int
    render: Callable[[Row], str] | None = None
    count: Callable[[str], int] | None = None
    special_tokens: tuple[str, ...] = ()
    _special: re.Pattern[str] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.special_tokens:
            self._special = re.compile("|".join(re.escape(token) for token in self.special_tokens))

    def problems(self, row: Row) -> list[tuple[str, str]]:
        """`(found, expected)` for each reason why `row` cannot be used with this base."""
        wrong = []
        messages = prompt_messages(row)
        texts = [message["content"] for message in messages]
        if self._special and (hit := next((m for m in map(self._special.search, [*texts, answer(row)]) if m), None)):
            wrong.append((f"the base's control token {hit.group()}", "text that cannot be mistaken for a turn"))
        try:
            prompt = self.render(row) if self.render else "".join(texts)
        except Refused as error:
            return [*wrong, (error.found, error.expected)]
        size = len(prompt.encode())
        if size >= self.max_seq_length:  # a token is at least one byte
            tokens = self.count(prompt) if self.count else size // MOST_BYTES_PER_TOKEN
            kind = "tokens" if self.count else f"tokens or more (at {MOST_BYTES_PER_TOKEN} bytes a token)"
            if tokens >= self.max_seq_length:
                expected = f"fewer than max_seq_length = {self.max_seq_length}: shorten it or raise the setting"
                wrong.append((f"a prompt of {tokens} {kind}, which leaves no room for the answer", expected))
        return wrong


@dataclass
class Checked:
    """Sums up a dataset: `rows` good ones, `rejected` lines with a problem, `digest` of the file's bytes."""

    rows: int = 0
    rejected: int = 0
    digest: str = ""


def read(path: Path, limits: Limits, checked: Checked | None = None) -> Iterator[tuple[int, Row] | Problem]:
    """Yield `(line number, row)` for each good line of `path` and a `Problem` for each bad one, in order.

    Streams: memory grows only by a hash a row (about 150 bytes) for finding duplicates. UTF-8, with or without a
    byte order mark, LF or CRLF; blank lines are passed over. Raises OSError when the file cannot be opened.
    """
    checked = checked if checked is not None else Checked()
    seen: dict[int, int] = {}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number, line in _lines(file, digest):
            row, problems = _parse(line, number, limits)
            if row is not None and (first := seen.setdefault(_key(row), number)) != number:
                problems = [Problem(number, f"a duplicate of line {first}", "each example once: delete one of the two")]
            if problems:
                checked.rejected += 1
                yield from problems
            elif row is not None:
                checked.rows += 1
                yield number, row
    checked.digest = "sha256:" + digest.hexdigest()
    if not checked.rows and not checked.rejected:
        checked.rejected = 1
        yield Problem(1, "no rows", 'at least one line such as {"instruction": "...", "input": "", "output": "..."}')


def _lines(file: BinaryIO, digest: Any) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their ends; None for a line beyond `MAX_LINE_BYTES`."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        digest.update(line)
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                digest.update(rest)
            digest.update(rest)
            yield number, None
        else:
            yield number, line.strip(b"\r\n")


def _parse(line: bytes | None, number: int, limits: Limits) -> tuple[Row | None, list[Problem]]:
    """`(row, [])`, `(None, problems)`, or `(None, [])` for a blank line."""

    def bad(found: str, expected: str) -> tuple[None, list[Problem]]:
        return None, [Problem(number, found, expected)]

    if line is None:
        return bad(f"a line of more than {MAX_LINE_BYTES // 2**20} MiB", "one example a line")
    if not line.strip():
        return None, []
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        hint = " (UTF-16? save the file as UTF-8)" if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return bad(f"bytes that are not UTF-8 at byte {error.start + 1}{hint}", "UTF-8 text")
    try:
        value = json.loads(text, object_pairs_hook=_object)
        wrong = list(_shape(value))  # quotes what it found, which for a deeply nested value may be too deep as well
    except _Repeated as error:
        return bad(f"key {error} twice", "each key once")
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        array = " (a JSON array over several lines is not JSON Lines)" if text[0] == "[" else ""
        return bad(f"no JSON ({what}): {_shown(text)}", f"one JSON object a line{array}")
    wrong = wrong or limits.problems(value)
    return (None, [Problem(number, *each) for each in wrong]) if wrong else (value, [])


class _Repeated(Exception):
    """A JSON object names a key twice; the standard decoder would silently keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(next(repr(name) for name in names if names.count(name) > 1))
    return result


Wrong = tuple[str, str]  # found, expected


def _shape(value: Any) -> Iterator[Wrong]:
    """What keeps `value` from being a row."""
    if not isinstance(value, dict):
        yield f"a JSON {_kind(value)}", 'an object {"instruction": ..., "input": ..., "output": ...}'
    elif "messages" in value:
        yield from _messages(value)
    else:
        expected = "the keys instruction, input, output, or messages alone"
        for key in INSTRUCTION_KEYS:
            if key in value:
                yield from _text(value[key], key, may_be_empty=key == "input")
            else:
                yield f"no key {key!r}", expected + (' ("input" may be "")' if key == "input" else "")
        for key in value:
            if key not in INSTRUCTION_KEYS:
                yield f"unknown key {key!r}", expected


def _messages(value: dict[str, Any]) -> Iterator[Wrong]:
    for key in value:
        if key != "messages":
            yield f"unknown key {key!r} beside messages", "messages alone"
    messages = value["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        yield f"messages = {_shown(json.dumps(messages))}", "a list of at least one user turn and the answer"
        return
    roles = []
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            yield f"{name} = {_shown(json.dumps(message))}", "an object with exactly role and content"
        elif message["role"] not in ROLES:
            yield f"{name}.role = {_shown(json.dumps(message['role']))}", "system, user or assistant"
        else:
            roles.append(message["role"])
            yield from _text(message["content"], f"{name}.content")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(roles) == len(messages) and (not turns or turns != ["user", "assistant"] * (len(turns) // 2)):
        yield f"turns {', '.join(roles)}", "system (optional), then user and assistant in turn, assistant last"


def _text(value: Any, name: str, *, may_be_empty: bool = False) -> Iterator[Wrong]:
    if not isinstance(value, str):
        yield f"{name} of type {_kind(value)}", "a string"
    elif not may_be_empty and not value.strip():
        yield f"an empty {name}", "some text"
    elif hit := UNWANTED.search(value):
        yield f"control character U+{ord(hit.group()):04X} in {name}", "text; tab and newline are the only controls"


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")


def _shown(text: str) -> str:
    text = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text[:61])
    return text if len(text) <= 60 else text[:57] + "..."


def _canonical(row: Row, *, prompt_only: bool = False) -> bytes:
    """What makes `row` this one and no other: without the space around its texts, which Llama's template cuts off."""
    messages = [message | {"content": message["content"].strip()} for message in prompt_messages(row)]
    return json.dumps([messages] if prompt_only else [messages, answer(row).strip()], sort_keys=True).encode()


def _key(row: Row) -> int:
    return int.from_bytes(hashlib.blake2b(_canonical(row), digest_size=8).digest())


def is_held_out(row: Row, fraction: float) -> bool:
    """Whether `row` belongs to the held-out split: decided by its prompt alone.

    So the split is the same whatever the order of the file or the rows added later, and one prompt with several
    answers stands on one side only.
    """
    number = int.from_bytes(hashlib.sha256(b"held-out\0" + _canonical(row, prompt_only=True)).digest()[:8])
    return number < fraction * 2**64


def split_problem(tuning: int, held_out: int, fraction: float, min_examples: int) -> str | None:
    """Why such a split leads to no adapter that may be served, None where it may.

    `tuning` and `held_out` rows at `held_out_fraction` = `fraction`, with `gate.min_examples` = `min_examples`.
    """
    split = f"{tuning + held_out:,} rows with held_out_fraction = {fraction:g} give"
    if not tuning or not held_out:
        return f"{split} {tuning:,} to tune on and {held_out:,} held out; both need some: add rows"
    if held_out < min_examples:
        return (
            f"{split} {held_out:,} held out, and nothing passes the gate on fewer than gate.min_examples = "
            f"{min_examples}: add rows, raise held_out_fraction, or lower gate.min_examples"
        )
    return None
