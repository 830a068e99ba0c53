"""What each resource type takes and gives: tables read from the source of the installed SDK's own classes.

The source is read and not imported: importing `pulumi_azure_native.network` takes seconds, and the engine waits for
this provider before it does anything. A class costs a millisecond, once, when it is first asked for.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from localcloud.azure.values import is_unknown

PACKAGE = "azure-native"


@dataclass(frozen=True)
class Failure:
    """One reason why inputs are refused: the path of the property, `a.b[0].c`, and what is wrong with it."""

    property: str
    reason: str


@dataclass(frozen=True)
class Kind:
    """What a value must be: string, integer, number, boolean, array, map, object or any.

    `item` is the kind of an array's or a map's elements, `objects` the SDK's classes that an object may be of, `enum`
    the SDK's values; `closed` says whether Azure refuses any other.
    """

    name: str
    item: Kind | None = None
    objects: tuple[str, ...] = ()
    enum: tuple[str, ...] = ()
    closed: bool = False


@dataclass(frozen=True)
class Property:
    """`name` as it travels (camelCase); `required` is the SDK's word, of an input."""

    name: str
    kind: Kind
    required: bool


ANY = Kind("any")
_PLAIN = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


@dataclass(frozen=True)
class ResourceType:
    """One resource type of the SDK, such as `azure-native:storage:BlobContainer`; KeyError where there is none."""

    token: str

    def __post_init__(self) -> None:
        _resource_file(self.module, self.name)

    @property
    def module(self) -> str:
        return self.token.split(":")[1]

    @property
    def name(self) -> str:
        return self.token.split(":")[2]

    @property
    def inputs(self) -> Mapping[str, Property]:
        path = _resource_file(self.module, self.name)
        # The SDK calls it so where `XArgs` is a nested class of the same module already.
        name = f"{self.name}InitArgs" if f"class {self.name}InitArgs" in _source(path) else f"{self.name}Args"
        return _arguments(self.module, name, path)

    @property
    def outputs(self) -> Mapping[str, Property]:
        return _outputs(self.module, self.name)

    @property
    def api_version(self) -> str:
        """The version of Azure's API that the provider speaks for this type, by the SDK's documentation of it."""
        found = re.search(r"Uses Azure REST API version ([0-9a-z-]+)", _source(_resource_file(self.module, self.name)))
        assert found, self.token
        return found[1]


def check(token: str, inputs: Mapping[str, Any]) -> list[Failure]:
    """Everything that the SDK's own types say against `inputs`; what is unknown is not judged."""
    kind = ResourceType(token)
    own = {key: value for key, value in inputs.items() if not key.startswith("__") and key != "azureApiVersion"}
    return list(_check_properties(kind.module, kind.inputs, own, ""))


def shaped(token: str, inputs: Mapping[str, Any], missing: Any = None) -> dict[str, Any]:
    """`inputs` in the shape of the outputs: without what Azure never gives back, and lists as maps where it does so.

    `missing` stands for everything else that the outputs have, at any depth; None leaves it out.
    """
    kind = ResourceType(token)
    return _shape_properties(kind.module, kind.outputs, inputs, missing)


def _check_properties(
    module: str, known: Mapping[str, Property], values: Mapping[str, Any], path: str
) -> Iterator[Failure]:
    inside = f"{path}." if path else ""
    for name, value in values.items():
        if name in known:
            yield from _check_value(module, known[name].kind, value, f"{inside}{name}")
        else:
            yield Failure(f"{inside}{name}", f"unknown property '{inside}{name}'{_nearest(name, known)}")
    for name, prop in known.items():
        if prop.required and name not in values:
            yield Failure(f"{inside}{name}", f"missing required property '{inside}{name}'")


def _check_value(module: str, kind: Kind, value: Any, path: str) -> Iterator[Failure]:
    if kind.name == "any" or is_unknown(value):
        return
    if not _fits(kind, value):
        yield Failure(path, f"'{path}' should be of type '{kind.name}' but is {_shown(value)}")
    elif kind.name == "array":
        for index, item in enumerate(value):
            yield from _check_value(module, kind.item or ANY, item, f"{path}[{index}]")
    elif kind.name == "map":
        for key, item in value.items():
            yield from _check_value(module, kind.item or ANY, item, f"{path}.{key}")
    elif kind.name == "object":
        choices = [list(_check_properties(module, arguments(module, name), value, path)) for name in kind.objects]
        yield from min(choices, key=len)
    elif kind.enum and kind.closed and value not in kind.enum:
        yield Failure(
            path, f"'{path}' is {_shown(value)}, not one of {', '.join(kind.enum)}{_nearest(str(value), kind.enum)}"
        )


def _fits(kind: Kind, value: Any) -> bool:
    if kind.name in ("object", "map"):
        return isinstance(value, dict)
    if kind.name == "array":
        return isinstance(value, list)
    if kind.name == "boolean":
        return isinstance(value, bool)
    if kind.name == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind.name == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else repr(value)


def _nearest(name: str, known: Any) -> str:
    lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower().replace("_", ""), lower, 1, 0.6)
    return f"; did you mean '{lower[found[0]]}'?" if found else ""


def _shape_properties(
    module: str, known: Mapping[str, Property], values: Mapping[str, Any], missing: Any
) -> dict[str, Any]:
    found = {}
    for name, prop in known.items():
        if name in values:
            found[name] = _shape(module, prop.kind, values[name], missing)
        elif missing is not None:
            found[name] = missing
    return found


def _shape(module: str, kind: Kind, value: Any, missing: Any) -> Any:
    if kind.name == "map" and isinstance(value, list):  # a set of names on its way in, such as of identities
        if missing is not None:
            return missing
        return {str(item): {} for item in value}
    if kind.name == "array" and isinstance(value, list):
        return [_shape(module, kind.item or ANY, item, missing) for item in value]
    if kind.name == "map" and isinstance(value, dict):
        return {key: _shape(module, kind.item or ANY, item, missing) for key, item in value.items()}
    if kind.name == "object" and isinstance(value, dict) and len(kind.objects) == 1:
        return _shape_properties(module, _response(module, kind.objects[0]), value, missing)
    return value


@cache
def _folder() -> Path:
    found = find_spec("pulumi_azure_native")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


@cache
def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


@cache
def _files(module: str) -> dict[str, Path]:
    return {path.stem.replace("_", ""): path for path in (_folder() / module).glob("[a-z]*.py")}


def _resource_file(module: str, name: str) -> Path:
    try:
        return _files(module)[name.lower()]
    except KeyError:
        raise KeyError(f"{PACKAGE}:{module}:{name}") from None


@cache
def arguments(module: str, name: str) -> Mapping[str, Property]:
    """The properties of the SDK's input class `name` of `module`, by the names that travel."""
    return _arguments(module, name, _folder() / module / "_inputs.py")


@cache
def _response(module: str, name: str) -> Mapping[str, Property]:
    return _arguments(module, name, _folder() / module / "outputs.py")


@cache
def _arguments(module: str, name: str, path: Path) -> Mapping[str, Property]:
    """Of a class whose constructor states kinds and what is required, and whose getters state the names."""
    body = _class(path, name)
    names = dict(_getters(body))
    constructor = next(item for item in body.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    found = {}
    for argument, default in zip(constructor.args.kwonlyargs, constructor.args.kw_defaults, strict=True):
        assert argument.annotation is not None
        travels = names[argument.arg]
        found[travels] = Property(travels, _kind(module, argument.annotation), default is None)
    return found


@cache
def _outputs(module: str, name: str) -> Mapping[str, Property]:
    """Of a resource class, whose getters state both names and kinds."""
    body = _class(_resource_file(module, name), name)
    returns = {item.name: item.returns for item in body.body if isinstance(item, ast.FunctionDef)}
    found = {}
    for own, travels in _getters(body):
        annotation = returns[own]
        assert annotation is not None
        found[travels] = Property(travels, _kind(module, annotation), True)
    return found


def _class(path: Path, name: str) -> ast.ClassDef:
    """The class `name` of a generated file, parsed alone: those files have up to two million characters."""
    source = _source(path)
    start = re.search(rf"^class {name}\b", source, re.MULTILINE)
    if not start:
        raise KeyError(f"{path.name}: {name}")
    end = re.compile(r"^\S", re.MULTILINE).search(source, start.end())
    parsed = ast.parse(source[start.start() : end.start() if end else None]).body[0]
    assert isinstance(parsed, ast.ClassDef)
    return parsed


def _getters(body: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """(Python's name, the name that travels) of each property."""
    for item in body.body:
        if not isinstance(item, ast.FunctionDef):
            continue
        for decorator in item.decorator_list:
            text = ast.unparse(decorator)
            if text == "pulumi.getter":
                yield item.name, item.name
            elif isinstance(decorator, ast.Call) and text.startswith("pulumi.getter("):
                yield item.name, str(ast.literal_eval(decorator.keywords[0].value))


def _kind(module: str, annotation: ast.expr) -> Kind:
    """The kind that an annotation means, such as `pulumi.Input[Optional[Sequence[pulumi.Input['XArgs']]]]`."""
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rpartition(".")[2]
        if outer in ("Input", "Output", "Optional"):
            return _kind(module, annotation.slice)
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if outer == "Sequence":
            return Kind("array", _kind(module, parts[0]))
        if outer == "Mapping":
            return Kind("map", _kind(module, parts[1]))
        assert outer == "Union", ast.unparse(annotation)
        return _union([_kind(module, part) for part in parts])
    if isinstance(annotation, ast.Constant):
        name = str(annotation.value).rpartition(".")[2]
        if not name.endswith("Args") and (values := _enum(module, name)):
            return Kind("string", enum=values, closed=_is_closed(name))
        return Kind("object", objects=(name,))
    return Kind(_PLAIN.get(ast.unparse(annotation).rpartition(".")[2], "any"))


def _union(kinds: list[Kind]) -> Kind:
    for kind in kinds:
        if kind.enum:
            return kind
    if all(kind.name == "object" for kind in kinds):
        return Kind("object", objects=tuple(name for kind in kinds for name in kind.objects))
    return kinds[0] if len(set(kinds)) == 1 else ANY


def _is_closed(enum: str) -> bool:
    """Whether Azure refuses what the SDK's enum does not list.

    Nearly all are called open in the SDK (`Union[str, Enum]`), for another version of the API may know more; the
    provider asks by the very version whose values the SDK lists, and Azure answers others with InvalidParameter. Data
    collection rules name streams: theirs are examples, to which each solution and each customer adds.
    """
    return not re.fullmatch(r"Known\w*Streams", enum)


@cache
def _enum(module: str, name: str) -> tuple[str, ...]:
    try:
        body = _class(_folder() / module / "_enums.py", name)
    except KeyError:
        return ()
    return tuple(str(ast.literal_eval(item.value)) for item in body.body if isinstance(item, ast.Assign))
