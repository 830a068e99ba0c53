"""SIGTERM noted rather than obeyed, for those who have something to finish first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self


class Sigterm:
    """While entered, SIGTERM sets `came` instead of ending this process: what is in progress is finished first."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
