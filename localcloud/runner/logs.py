"""Where the output of containers is kept: one file for each start, also after the pod is gone."""

from __future__ import annotations

from pathlib import Path


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
