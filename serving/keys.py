"""API keys of clients: a file of names and SHA-256 hashes, mounted from a Secret and read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NONE_CONFIGURED = (
    "no API keys are configured: pulumi config set --secret --path 'drydock:api_keys.CLIENT' VALUE, then pulumi up"
)
NONE_GIVEN = "an API key is needed here: send the header Authorization: Bearer KEY, or api-key: KEY"
UNKNOWN = "this API key is not known here"

_HEADERS = (b"authorization", b"api-key")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Headers = Iterable[tuple[bytes, bytes]]  # as ASGI gives them: names in lower case


class Keys:
    """The keys in `path`, a JSON object of client name to the SHA-256 of its key in hex. No file: no client is let in.

    One `stat` a request. It follows the links by which the kubelet swaps all of a Secret's files at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: Any = None
        self._hashes: tuple[str, ...] = ()

    def refusal(self, headers: Headers) -> str | None:
        """Why a request with these headers is not let in, None when its key is right."""
        hashes = self._current()
        if not hashes:
            return NONE_CONFIGURED
        given = [key for name, value in headers if (key := _key(name, value))]
        if not given:
            return NONE_GIVEN
        known = False
        for key in given:
            found = hashlib.sha256(key).hexdigest()
            for wanted in hashes:  # all of them: the time taken tells nothing about which one came near
                known |= hmac.compare_digest(found, wanted)
        return None if known else UNKNOWN

    def _current(self) -> tuple[str, ...]:
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if stamp != self._seen:
                self._hashes = _parse(self._path.read_text(encoding="utf-8"), self._path)
                self._seen = stamp
        except (OSError, UnicodeDecodeError) as error:
            if self._seen != str(error):
                log.error("API keys: %s: nobody is let in", error)
            self._seen, self._hashes = str(error), ()
        return self._hashes


def without_key(headers: Headers) -> list[tuple[bytes, bytes]]:
    """`headers` for those who have no use for the client's key."""
    return [(name, value) for name, value in headers if name not in _HEADERS]


def _key(name: bytes, value: bytes) -> bytes:
    """The key in one header, empty when it has none."""
    if name == b"api-key":
        return value.strip()
    kind, _, key = value.strip().partition(b" ")
    return key.strip() if name == b"authorization" and kind.lower() == b"bearer" else b""


def _parse(text: str, path: Path) -> tuple[str, ...]:
    """The hashes in the file. What is wrong is logged by client name, never by value: it may be a key."""
    try:
        entries = json.loads(text) if text.strip() else {}
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        log.error("API keys: %s: expected a JSON object of client name to SHA-256 in hex: nobody is let in", path)
        return ()
    good = {name: value for name, value in entries.items() if isinstance(value, str) and _SHA256.fullmatch(value)}
    for name in entries.keys() - good.keys():
        log.error("API keys: %s: client %r: expected the SHA-256 of its key, 64 lower-case hex digits", path, name)
    log.info("API keys: %s: %d clients", path, len(good))
    return tuple(good.values())
