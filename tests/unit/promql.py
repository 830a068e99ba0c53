"""Which metrics a query asks: enough of PromQL's grammar for the queries that are written here."""

from __future__ import annotations

import re

WORDS = {
    "and",
    "or",
    "unless",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "offset",
    "bool",
    "inf",
    "nan",
}


def metrics(query: str) -> set[str]:
    """The names of metrics in `query`."""
    bare = re.sub(r'"(\\.|[^"\\])*"', "", query)
    bare = re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", " ", bare)  # labels, and ranges
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)", " ", bare)
    bare = re.sub(r"\boffset\s+\w+", " ", bare)
    names = re.finditer(r"(?<![\w:.])[a-zA-Z_:][\w:]*", bare)
    return {name[0] for name in names if name[0] not in WORDS and not re.match(r"\s*\(", bare[name.end() :])}
