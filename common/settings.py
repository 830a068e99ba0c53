"""Settings files: YAML read into frozen pydantic models, all problems told together with file, line and remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Base of every settings model: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SettingsError(ValueError):
    """One or more problems in a person's settings; `problems` are lines ready to print."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


Model = TypeVar("Model", bound=Settings)


def load_settings(path: Path, model: type[Model], **overrides: Any) -> Model:
    """Read the YAML (or JSON, a subset of it) file `path` into `model`.

    `overrides` that are not None replace the file's top-level values. YAML 1.1 reads `2e-4` as text; pydantic
    turns such text into the number. Raises `SettingsError` with every problem as `file:line: key: what to do`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SettingsError([f"{path}: no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: cannot be read as UTF-8 text: {error}"]) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
        lines: dict[tuple[str, ...], int] = {}
        problems = _index(node, (), lines, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SettingsError([f"{where}: not YAML: {getattr(error, 'problem', None) or error}"]) from None
    except ValueError as error:  # a date that is none
        raise SettingsError([f"{path}: not YAML that can be read: {error}"]) from None
    except RecursionError:
        raise SettingsError(
            [f"{path}: not YAML that can be read: a value that holds itself, or too deep a one"]
        ) from None
    if not isinstance(values, dict):
        raise SettingsError([f"{path}: expected `name: value` lines, found {_kind(values)}"])
    values |= {key: value for key, value in overrides.items() if value is not None}
    try:
        result = model.model_validate(values)
    except ValidationError as error:
        problems += explain(error, model, path=path, lines=lines)
        raise SettingsError(problems) from None
    if problems:
        raise SettingsError(problems)
    return result


def _index(node: yaml.Node | None, at: tuple[str, ...], lines: dict[tuple[str, ...], int], path: Path) -> list[str]:
    """Fill `lines` with the line of every key below `node`; the problems are keys given twice."""
    problems: list[str] = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*at, str(key.value))
            line = key.start_mark.line + 1
            if place in lines:
                problems.append(f"{path}:{line}: {'.'.join(place)}: given twice (first on line {lines[place]})")
            lines.setdefault(place, line)
            problems += _index(value, place, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*at, str(number))] = value.start_mark.line + 1
            problems += _index(value, (*at, str(number)), lines, path)
    return problems


def explain(
    error: ValidationError,
    model: type[BaseModel],
    *,
    path: Path | None = None,
    lines: dict[tuple[str, ...], int] | None = None,
    hidden: Collection[str] = (),
) -> list[str]:
    """One line a problem: where, what was found, what to write instead; values below keys `hidden` are not shown."""
    told = []
    for item in error.errors():
        place = tuple(str(part) for part in item["loc"])
        name = ".".join(place) or "settings"
        line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None) if lines else None
        where = f"{path}:{line}: " if path and line else f"{path}: " if path else ""
        if item["type"] == "extra_forbidden":
            text = f"{name}: unknown setting{_nearest(place[-1], _fields(model, place[:-1]))}"
        elif item["type"] == "missing":
            text = f"{name}: required, but absent"
        else:
            message, value = item["msg"].removeprefix("Value error, ").removeprefix("Input "), item["input"]
            if item["type"] != "value_error":  # pydantic's own words; ours may begin with a name
                message = message[0].lower() + message[1:]
            # Of a mapping as a whole, our own words name what is wrong in it.
            shown = isinstance(value, dict) or (isinstance(value, str) and value in message)
            if item["type"] == "value_error" and shown:
                text = f"{name}: {message}"
            else:
                text = f"{name}: {message}, found {'a secret' if place and place[0] in hidden else _shown(value)}"
        told.append(where + text)
    return told


def key_lines(path: Path) -> dict[tuple[str, ...], int]:
    """The line of every key in the YAML file `path`, by its place; empty when the file is not YAML."""
    lines: dict[tuple[str, ...], int] = {}
    try:
        _index(yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader), (), lines, path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return lines


def _fields(model: type[BaseModel], place: tuple[str, ...]) -> list[str]:
    """The names that may stand at `place` in `model`."""
    kind: Any = model
    for part in place:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(part)
            kind = field.annotation if field else None
        else:
            kind = _values_of(kind)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _values_of(kind: Any) -> Any:
    """What stands below a key of a `dict[str, Model]`, None for anything else."""
    arguments = get_args(kind)
    return arguments[1] if get_origin(kind) is dict and len(arguments) == 2 else None


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}" if known else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: Any) -> str:
    return {type(None): "an empty file", list: "a list", str: "plain text"}.get(type(value), type(value).__name__)
