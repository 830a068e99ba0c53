"""Which hosts are this machine itself: they are spoken to over plain HTTP, past any proxy, without an identity."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
