"""Startup, readiness and liveness: what is asked, how often, and how many answers decide."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import Any

# (command, seconds) -> exit code and output; raises TimeoutError
Execute = Callable[[list[str], float], tuple[int, str]]


class Threshold:
    """Turns single answers into a verdict: so many successes in a row, or so many failures."""

    def __init__(self, success: int, failure: int) -> None:
        self._needed = {True: success, False: failure}
        self._last: bool | None = None
        self._count = 0

    def observe(self, good: bool) -> bool | None:
        """The verdict after this answer; None where it decides nothing."""
        self._count = self._count + 1 if good is self._last else 1
        self._last = good
        return good if self._count >= self._needed[good] else None


def ask(
    handler: Mapping[str, Any], container: Mapping[str, Any], address: str, execute: Execute, seconds: float
) -> str:
    """Try the httpGet, tcpSocket or exec of a probe or hook once; empty where all is well, else what was wrong."""
    try:
        if "exec" in handler:
            code, said = execute(list(handler["exec"]["command"]), seconds)
            return "" if code == 0 else said or f"exit code {code}"
        if "tcpSocket" in handler:
            target = handler["tcpSocket"]
            place = (target.get("host") or address, port_of(target["port"], container))
            socket.create_connection(place, seconds).close()
            return ""
        if "httpGet" in handler:
            return _get(handler["httpGet"], container, address, seconds)
    except (OSError, http.client.HTTPException, ValueError) as error:  # a timeout is an OSError
        return str(error) or type(error).__name__
    return f"{', '.join(handler)}: not supported by this runner"


def _get(target: Mapping[str, Any], container: Mapping[str, Any], address: str, seconds: float) -> str:
    host, port = target.get("host") or address, port_of(target["port"], container)
    connection: http.client.HTTPConnection
    if target.get("scheme", "HTTP") == "HTTPS":
        unchecked = ssl._create_unverified_context()  # as the kubelet does
        connection = http.client.HTTPSConnection(host, port, timeout=seconds, context=unchecked)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=seconds)
    headers = {"User-Agent": "kube-probe/1.37", "Accept": "*/*", "Connection": "close"}
    headers |= {item["name"]: item["value"] for item in target.get("httpHeaders") or []}
    try:
        connection.request("GET", target.get("path") or "/", headers=headers)
        status = connection.getresponse().status
    finally:
        connection.close()
    return "" if 200 <= status < 400 else f"HTTP probe failed with statuscode: {status}"


def port_of(port: int | str, container: Mapping[str, Any]) -> int:
    """The number of a port given by number or by the name that the container gave it. Raises ValueError."""
    if isinstance(port, int) or port.isdigit():
        return int(port)
    for item in container.get("ports", []):
        if item.get("name") == port:
            return int(item["containerPort"])
    raise ValueError(f"container {container['name']} has no port named {port}")


class Prober(threading.Thread):
    """Asks one probe of one running container until stopped (or, with `once`, until the first success).

    `report(good, message)` is called with each verdict that the thresholds allow.
    """

    def __init__(
        self,
        probe: Mapping[str, Any],
        try_once: Callable[[float], str],
        report: Callable[[bool, str], None],
        once: bool,
    ) -> None:
        super().__init__(daemon=True)
        self._probe, self._try, self._report, self._once = probe, try_once, report, once
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        threshold = Threshold(self._probe.get("successThreshold", 1), self._probe.get("failureThreshold", 3))
        wait = self._probe.get("initialDelaySeconds", 0)
        while not self._stopped.wait(wait):
            message = self._try(self._probe.get("timeoutSeconds", 1))
            if self._stopped.is_set():
                return
            verdict = threshold.observe(not message)
            if verdict is not None:
                self._report(verdict, message)
                if verdict and self._once:
                    return
            wait = self._probe.get("periodSeconds", 10)
