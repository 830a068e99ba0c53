"""What is known of other hosts: which are this machine itself, why one could not be reached, when it wants to be asked.

This machine itself is spoken to over plain HTTP, past any proxy, without an identity.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it came from: HTTP libraries wrap the system's own word several times."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds of an answer's Retry-After; 0 without one, or with a date."""
    wish = headers.get("Retry-After", "")
    return float(wish) if wish.isdecimal() else 0.0
