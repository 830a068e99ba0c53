"""A loss that a drill declares: until the time in a file, the sidecar's store counts as out of reach.

The network is left alone. What follows (what is served, what is told, the metric, the alert) is what an unreachable
registry brings about, since the sidecar gets the error that one gives; a real one only takes longer to fail.
"""

from __future__ import annotations

import logging
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from artifacts.store import OutOfReach, Store

FILE = "registry_unreachable_until"
"""In the folder: unix seconds. As a key of a ConfigMap, it is there some 90 s after it was written."""
LONGEST_SECONDS = 1800.0
"""A loss ends so long after it was first seen at the latest: whoever declared it may be gone."""

log = logging.getLogger(__name__)


def drilled(store: Store, folder: Path) -> Store:
    """`store`; while `folder` declares a loss, whatever is asked of it raises `OutOfReach`."""
    return cast(Store, _Drilled(store, folder))


class _Drilled:
    """Stands before a store and looks into the file each time that something is asked."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._path = store, folder / FILE
        self._text = ""  # what the file said last
        self._until = 0.0
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        self._read()
        lost = time.time() < self._until
        if lost != self._lost:
            self._lost = lost
            if lost:
                log.warning("DRILL: the store counts as out of reach until %s, by %s", _shown(self._until), self._path)
            else:
                log.warning("DRILL over: the store is asked again")
        if lost:
            raise OutOfReach(f"out of reach until {_shown(self._until)}: a drill ({self._path})")
        return getattr(self._store, name)

    def _read(self) -> None:
        """Bring `_until` up to date; the same content is judged, and complained of, once."""
        try:
            text = self._path.read_text().strip()
        except FileNotFoundError:
            text = ""
        except (OSError, ValueError) as error:
            text = f"cannot be read: {error}"
        if text == self._text:
            return
        self._text, self._until = text, 0.0
        if not text:
            return
        try:
            until = float(text)
        except ValueError:
            until = math.nan
        if not math.isfinite(until):
            log.warning("%s is ignored: expected unix seconds, found %.80r", self._path, text)
            return
        latest = time.time() + LONGEST_SECONDS
        if until > latest:
            log.warning("%s: %s is more than %g s ahead: cut to that", self._path, text[:80], LONGEST_SECONDS)
        self._until = min(until, latest)


def _shown(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S UTC")
