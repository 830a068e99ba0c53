"""Values as the engine sends them (protobuf structs with signatures and sentinels), and plain Python ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2

# github.com/pulumi/pulumi, sdk/go/common/resource/plugin/rpc.go and sdk/go/common/resource/sig
UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"  # of a string, and what we answer for any kind, as the provider does
_UNKNOWNS = frozenset(
    {
        UNKNOWN,
        "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7",  # boolean
        "3eeb2bf0-c639-47a8-9e75-3b44932eb421",  # number
        "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2",  # array
        "030794c1-ac77-496b-92df-f27374a8bd58",  # asset
        "e48ece36-62e2-4504-bad9-02848725956a",  # archive
        "dd056dcd-154b-4c76-9bd3-c8f88648b5ff",  # object
    }
)
_SIGNATURE = "4dabf18193072939515e22adb298388d"
_SECRET, _OUTPUT = "1b47061264138c4ac30d75fd1eb44270", "d0e6a833031e9bbcd3f4e8bde6ca49a4"


def is_unknown(value: Any) -> bool:
    return isinstance(value, str) and value in _UNKNOWNS


def has_unknown(value: Any) -> bool:
    """Whether `value` is unknown, or holds something unknown."""
    if isinstance(value, dict):
        return any(has_unknown(item) for item in value.values())
    if isinstance(value, list):
        return any(has_unknown(item) for item in value)
    return is_unknown(value)


def plain(message: struct_pb2.Struct) -> dict[str, Any]:
    """The struct as a dict: secrets and outputs are taken out of their wrapping, nulls left out, whole numbers ints."""
    return {key: _plain(value) for key, value in message.fields.items() if not value.HasField("null_value")}


def _plain(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        found = plain(value.struct_value)
        if found.get(_SIGNATURE) in (_SECRET, _OUTPUT):
            return found.get("value", UNKNOWN)  # an output without a value is unknown
        return found
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number
    if kind in ("string_value", "bool_value"):
        return getattr(value, kind)
    return None


def struct(values: Mapping[str, Any]) -> struct_pb2.Struct:
    message = struct_pb2.Struct()
    message.update(dict(values))
    return message
