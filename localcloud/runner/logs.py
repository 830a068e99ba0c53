"""Where the output of containers is kept: one file for each start, also after the pod is gone."""

from __future__ import annotations

import bisect
import struct
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

_TIME = struct.Struct("<Qd")  # how large a log was, and when (seconds since 1970)


def log_file(folder: Path, namespace: str, pod: str, uid: str, container: str, number: int) -> Path:
    """Of the `number`th start of a container (from 0), below the runner's `folder`."""
    return folder / "pods" / f"{namespace}_{pod}_{uid}" / container / f"{number}.log"


def log_files(folder: Path, namespace: str, pod: str, container: str) -> list[Path]:
    """All of this container of the pods of that name, the oldest first."""
    found = (folder / "pods").glob(f"{namespace}_{pod}_*/{container}/*.log")
    return sorted(found, key=lambda path: (path.parents[1].stat().st_ctime_ns, int(path.stem)))


def read_log(folder: Path, namespace: str, pod: str, container: str, *, previous: bool = False) -> str:
    """What a container's last start has said so far, or the start before it; as `kubectl logs` shows it.

    Raises FileNotFoundError where it has not been started (often enough).
    """
    files = log_files(folder, namespace, pod, container)
    if len(files) < 1 + previous:
        start = "an earlier start" if previous else "a start"
        raise FileNotFoundError(f"{namespace}/{pod}: no log of {start} of container {container} below {folder}")
    return files[-1 - previous].read_text(errors="replace")


def times_file(log: Path) -> Path:
    """Beside each log: an `entry` for each piece that was written to it."""
    return log.with_suffix(".times")


def entry(size: int) -> bytes:
    """For `times_file`: the log is this large now, in bytes."""
    return _TIME.pack(size, time.time())


class Log:
    """A log as it is read on, in whole lines with the times at which they began to be written.

    What has no entry (yet) counts as written when the log was last changed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0  # bytes

    def lines(self, *, to_the_end: bool = True) -> Iterator[tuple[float, bytes]]:
        """(seconds since 1970, line with its end) of those that were not read before. An unfinished line is the last
        one, or waits for the next call where the log goes on (`to_the_end` is False)."""
        if not self._path.exists():
            return
        sizes, moments = self._times()
        with self._path.open("rb") as file:
            changed = self._path.stat().st_mtime
            file.seek(self._read)
            for line in file:
                if not (line.endswith(b"\n") or to_the_end):
                    return
                place = bisect.bisect_right(sizes, self._read)
                self._read += len(line)
                yield moments[place] if place < len(moments) else changed, line

    def _times(self) -> tuple[list[int], list[float]]:
        times = times_file(self._path)
        found = times.read_bytes() if times.exists() else b""
        entries = list(_TIME.iter_unpack(found[: len(found) // _TIME.size * _TIME.size]))
        return [size for size, _ in entries], [moment for _, moment in entries]


def stamp(moment: float) -> bytes:
    """As a kubelet writes it before a line."""
    at = datetime.fromtimestamp(moment, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S.%f}000Z ".encode()
