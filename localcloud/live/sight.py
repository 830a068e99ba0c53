"""What is seen of the stack in a running cluster: its tuning Jobs, its replicas, their processes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from localcloud.api import Api, ApiError
from localcloud.pods import pod_path
from localcloud.runner.logs import log_files
from stress.cluster import unseen_in

TUNING, SERVING = "drydock-tuning", "drydock-serving"
ROUTER = "drydock"  # the Service
ENGINE_PORT, SIDECAR_PORT = 8000, 9402
TAIL_BYTES = 8192


@dataclass(frozen=True)
class Job:
    """A Job: `state` is waiting, running, complete or failed; `doing` is the newest line of its newest container."""

    name: str
    state: str
    reason: str
    doing: str
    seconds: float | None = None
    """From its first start to its end."""

    @property
    def over(self) -> bool:
        return self.state in ("complete", "failed")


@dataclass(frozen=True)
class Replica:
    """A pod of the engine: which version answers for which adapter, and how often its engine was started again."""

    name: str
    node: str
    ready: bool
    leaving: bool
    restarts: int
    adapters: dict[str, str]
    refused: dict[str, str]


class Sight:
    """Looks through the API server; logs are read from the runner's files."""

    def __init__(self, api: Api, folder: Path) -> None:
        self.api, self._logs = api, folder / "runner"

    def job(self, namespace: str, name: str) -> Job | None:
        found = self.api.find(f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}")
        if found is None:
            return None
        for condition in found["status"].get("conditions", []):
            if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
                reason = condition.get("message", "") if condition["type"] == "Failed" else ""
                seconds = _instant(condition["lastTransitionTime"]) - _instant(found["status"]["startTime"])
                return Job(name, condition["type"].lower(), reason, self._newest_line(namespace, name), seconds)
        pods = [pod for pod in self.pods(namespace, f"batch.kubernetes.io/job-name={name}") if _alive(pod)]
        doing = _waits(pods) or self._newest_line(namespace, name)
        return Job(name, "running" if any(pod["spec"].get("nodeName") for pod in pods) else "waiting", "", doing)

    def pods(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        return self.api.list(f"/api/v1/namespaces/{namespace}/pods", labelSelector=selector)

    def log(self, namespace: str, pod: str, container: str) -> str:
        """All that a container's starts have said, one after the other."""
        files = log_files(self._logs, namespace, pod, container)
        return "".join(plain(path.read_text(errors="replace")) for path in files)

    def found(self, namespace: str, job: str, pattern: str) -> str | None:
        """The newest match in what the pods of a Job have said."""
        for path in self._newest_logs(namespace, job):
            if matches := re.findall(pattern, plain(path.read_text(errors="replace"))):
                return str(matches[-1])
        return None

    def replicas(self) -> list[Replica]:
        return [self._replica(pod) for pod in self.pods(SERVING, "app=engine")]

    def registry_unseen(self, replica: str) -> float | None:
        """Seconds for which its sidecar has not seen the registry; None where it does not answer."""
        try:
            _, body = self.api.proxied(f"{pod_path(SERVING, replica)}:{SIDECAR_PORT}/proxy/metrics")
        except OSError:
            return None
        return unseen_in(body.decode(errors="replace"))

    def _replica(self, pod: dict[str, Any]) -> Replica:
        name, status = pod["metadata"]["name"], pod["status"]
        engine: dict[str, Any] = next(
            (item for item in status.get("containerStatuses", []) if item["name"] == "engine"), {}
        )
        ready = any(item["type"] == "Ready" and item["status"] == "True" for item in status.get("conditions", []))
        said: dict[str, Any] = {}
        try:
            code, body = self.api.proxied(f"{pod_path(SERVING, name)}:{ENGINE_PORT}/proxy/ready")
            said = json.loads(body) if code in (200, 503) else {}
        except (ValueError, OSError, ApiError):  # it does not listen yet, or no more
            said = {}
        return Replica(
            name, pod["spec"].get("nodeName", ""), ready, "deletionTimestamp" in pod["metadata"],
            engine.get("restartCount", 0), said.get("adapters", {}), said.get("refused", {}),
        )  # fmt: skip

    def _newest_logs(self, namespace: str, job: str) -> list[Path]:
        files = (self._logs / "pods").glob(f"{namespace}_{job}-*/*/*.log")
        return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def _newest_line(self, namespace: str, job: str) -> str:
        for path in self._newest_logs(namespace, job):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                lines = [line for line in plain(file.read().decode(errors="replace")).splitlines() if line.strip()]
            if lines:
                return f"{path.parent.name}: {lines[-1].strip()}"
        return ""


def plain(text: str) -> str:
    """A log for people: of each line that is a record (common.logs) its message, other lines as they are."""
    return "".join(_message(line) for line in text.splitlines(keepends=True))


def _message(line: str) -> str:
    if not line.startswith("{"):
        return line
    try:
        record = json.loads(line)
    except ValueError:  # cut off, or somebody else's
        return line
    return f"{record['message']}\n" if isinstance(record, dict) and isinstance(record.get("message"), str) else line


def _instant(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def engine_processes(pod: str) -> list[int]:
    """The processes of the container `engine` of `pod`, as this machine counts; the server itself is the first."""
    return sorted(process.pid for process in _of_pod(pod) if "sidecar" not in process.cmdline())


def sidecar_processes(pod: str) -> list[int]:
    return sorted(process.pid for process in _of_pod(pod) if "sidecar" in process.cmdline())


def _of_pod(pod: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOSTNAME") == pod and process.cmdline():
                yield process
        except psutil.Error:
            continue


def _alive(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and pod["status"].get("phase") in ("Pending", "Running")


def _waits(pods: list[dict[str, Any]]) -> str:
    """Why the newest pod does not run, where it says so."""
    for pod in pods[-1:]:
        for condition in pod["status"].get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return "waits for a node with a free GPU"
        for item in [*pod["status"].get("initContainerStatuses", []), *pod["status"].get("containerStatuses", [])]:
            waiting = item["state"].get("waiting", {})
            if waiting.get("message"):
                return f"{item['name']}: {waiting['reason']}: {waiting['message']}"
    return ""
