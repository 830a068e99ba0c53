"""Who asks: API keys and the tiers of their clients, in a file mounted from a Secret and read again when it changes.

{"tiers": {"batch": {"output_tokens": 512, "waiting": 16}},
 "clients": {"web": {"sha256": "64 hex digits"}, "nightly": {"sha256": "64 hex digits", "tier": "batch"}}}
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from serving.spec import STANDARD, Tier

log = logging.getLogger(__name__)

NONE_CONFIGURED = (
    "no API keys are configured: pulumi config set --secret --path 'drydock:api_keys.CLIENT' VALUE, then pulumi up; "
    "what is wrong with a file of keys is in the engine's log"
)
NONE_GIVEN = "an API key is needed here: send the header Authorization: Bearer KEY, or api-key: KEY"
UNKNOWN = "this API key is not known here"

_HEADERS = (b"authorization", b"api-key")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Headers = Iterable[tuple[bytes, bytes]]  # as ASGI gives them: names in lower case


class Caller(NamedTuple):
    """One client as a request shows it."""

    client: str
    tier: str
    limits: Tier


ANYONE = Caller("", STANDARD, Tier())
"""Who asks where no keys are asked for."""


class Keys:
    """The clients in `path` by the SHA-256 of their keys. No file, or one that cannot be read: no client is let in.

    One `stat` a request. It follows the links by which the kubelet swaps all of a Secret's files at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: Any = None
        self._callers: dict[str, Caller] = {}

    def caller(self, headers: Headers) -> Caller | str:
        """Who sends a request with these headers, or why it is not let in."""
        callers = self._current()
        if not callers:
            return NONE_CONFIGURED
        given = [key for name, value in headers if (key := _key(name, value))]
        if not given:
            return NONE_GIVEN
        caller = None
        for key in given:
            found = hashlib.sha256(key).hexdigest()
            for wanted in callers:  # all of them: the time taken tells nothing about which one came near
                if hmac.compare_digest(found, wanted):
                    caller = callers[wanted]
        return caller or UNKNOWN

    def _current(self) -> dict[str, Caller]:
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if stamp != self._seen:
                self._callers = _parse(self._path.read_text(encoding="utf-8"), self._path)
                self._seen = stamp
        except (OSError, UnicodeDecodeError) as error:
            if self._seen != str(error):
                log.error("API keys: %s: nobody is let in", error)
            self._seen, self._callers = str(error), {}
        return self._callers


def without_key(headers: Headers) -> list[tuple[bytes, bytes]]:
    """`headers` for those who have no use for the client's key."""
    return [(name, value) for name, value in headers if name not in _HEADERS]


def _key(name: bytes, value: bytes) -> bytes:
    """The key in one header, empty when it has none."""
    if name == b"api-key":
        return value.strip()
    kind, _, key = value.strip().partition(b" ")
    return key.strip() if name == b"authorization" and kind.lower() == b"bearer" else b""


def _parse(text: str, path: Path) -> dict[str, Caller]:
    """The callers in the file by the hash of their key.

    What is wrong is logged by name, never by value: it may be a key. A client whose entry or tier is wrong is not let
    in; the others are.
    """
    try:
        whole = json.loads(text) if text.strip() else {}
    except ValueError:
        whole = None
    parts = whole if isinstance(whole, dict) and set(whole) <= {"tiers", "clients"} else {"tiers": None}
    tiers, clients = parts.get("tiers", {}), parts.get("clients", {})
    if not isinstance(tiers, dict) or not isinstance(clients, dict):
        log.error('API keys: %s: expected {"clients": {"NAME": {"sha256": HEX}}, "tiers": {}}: nobody is let in', path)
        return {}
    limits = {STANDARD: Tier()}
    for name, values in tiers.items():
        try:
            limits[name] = Tier.model_validate(values)
        except ValidationError as error:
            limits.pop(name, None)
            for problem in error.errors():
                what = ".".join(map(str, problem["loc"]))
                log.error("API keys: %s: tier %r: %s: %s", path, name, what, problem["msg"])
    callers = {}
    for name, entry in clients.items():
        sha256, tier = (entry.get("sha256"), entry.get("tier", STANDARD)) if isinstance(entry, dict) else (None, None)
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            log.error("API keys: %s: client %r: expected sha256: that of its key, 64 lower-case hex digits", path, name)
        elif not isinstance(tier, str) or tier not in limits:
            log.error("API keys: %s: client %r: its tier is none of: %s", path, name, ", ".join(limits))
        else:
            callers[sha256] = Caller(name, tier, limits[tier])
    log.info("API keys: %s: %d clients, %d tiers", path, len(callers), len(limits))
    return callers
