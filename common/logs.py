"""The log of a command: plain lines where people read it, one JSON object a line where machines do."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any

from common.settings import SettingsError

CHOICE = "DRYDOCK_LOG"
FORMS = ("json", "text")


def wants_json() -> bool:
    """Whether the log is to be JSON: as the environment's `DRYDOCK_LOG` says, else when no terminal shows it.

    Raises `SettingsError` when it says something else than json or text.
    """
    chosen = os.environ.get(CHOICE)
    if chosen and chosen not in FORMS:
        raise SettingsError([f"{CHOICE}={chosen}: expected {' or '.join(FORMS)} in the environment, or nothing"])
    return chosen == "json" if chosen else not sys.stderr.isatty()


def line(level: str, message: str, figures: dict[str, Any] | None = None, *, at: float | None = None) -> str:
    """One line of the log as JSON: time (UTC), level, message, then the figures under their own names."""
    moment = datetime.fromtimestamp(time.time() if at is None else at, UTC)
    said = {"time": moment.isoformat(timespec="milliseconds"), "level": level, "message": message}
    return json.dumps(said | (figures or {}), ensure_ascii=False, default=str)


class JsonLines(logging.Formatter):
    """Each record as one line; `extra={"figures": {...}}` gives it figures, an exception its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        figures = dict(getattr(record, "figures", {}))
        if record.exc_info:
            figures["traceback"] = self.formatException(record.exc_info)
        return line(record.levelname.lower(), record.getMessage(), figures, at=record.created)
