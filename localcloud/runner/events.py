"""Tells what happens to a pod as Kubernetes events, which `kubectl describe` shows."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from localcloud.api import Api, ApiError

AGAIN_SECONDS = 30.0  # the same words about a pod are not repeated sooner
log = logging.getLogger(__name__)


def now() -> str:
    """The time as Kubernetes writes it, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Events:
    """About one pod. That one cannot be written stops nothing."""

    def __init__(self, api: Api, pod: Mapping[str, Any]) -> None:
        self._api = api
        metadata = pod["metadata"]
        self._place, self._node = metadata["namespace"], pod["spec"]["nodeName"]
        self._about = {
            "apiVersion": "v1",
            "kind": "Pod",
            **{key: metadata[key] for key in ("name", "namespace", "uid")},
        }
        self._said: dict[tuple[str, str], float] = {}

    def say(self, reason: str, message: str, *, container: str = "", warning: bool = False) -> None:
        if time.monotonic() - self._said.get((reason, message), -AGAIN_SECONDS) < AGAIN_SECONDS:
            return
        self._said[reason, message] = time.monotonic()
        part = {"fieldPath": f"spec.containers{{{container}}}"} if container else {}
        event = {
            "metadata": {"name": f"{self._about['name']}.{uuid.uuid4().hex[:16]}", "namespace": self._place},
            "involvedObject": {**self._about, **part},
            "reason": reason,
            "message": message[:1000],
            "type": "Warning" if warning else "Normal",
            "source": {"component": "drydock-runner", "host": self._node},
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "count": 1,
        }
        try:
            self._api.post(f"/api/v1/namespaces/{self._place}/events", event)
        except (ApiError, OSError) as error:  # its namespace may be ending
            log.info("%s: %s: %s", self._about["name"], message, error)
