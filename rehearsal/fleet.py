"""The serving pool on this machine: replicas, sidecars and router, restarted when they die as by a kubelet."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from common.files import write_json
from common.processes import Processes, free_ports, python, wait_for
from serving.engine import is_ok

START_SECONDS = 600.0  # two vLLMs starting side by side on two slow cores


@dataclass
class _Member:
    """One replica: an engine and a sidecar that share a folder, as two containers of a pod do."""

    name: str
    port: int
    folder: Path
    engine: subprocess.Popen[bytes] | None = None
    sidecar: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    crashes: list[int] = field(default_factory=list)  # exit codes of ends that no drill caused

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Fleet:
    """Starts the pool that `spec` (a serving settings file) describes, and keeps `out/fleet.json` current."""

    def __init__(self, processes: Processes, spec: Path, out: Path, replicas: int) -> None:
        self._processes, self._spec, self._out = processes, spec, out
        ports = free_ports(replicas + 2)
        self.router = f"http://127.0.0.1:{ports[0]}"
        self._router_metrics_port = ports[1]
        self._members = [
            _Member(f"replica-{number}", port, out / "replicas" / f"replica-{number}")
            for number, port in enumerate(ports[2:])
        ]
        self._router: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True)

    @property
    def replicas(self) -> dict[str, str]:
        """Name to URL of every replica."""
        return {member.name: member.url for member in self._members}

    def start(self) -> float:
        """Start everything and return the seconds until every replica and the router are ready."""
        started = time.monotonic()
        for member in self._members:
            self._start_engine(member)
            self._start_sidecar(member)
        self._write()
        self._thread.start()
        for member in self._members:
            wait_for(lambda url=member.url: is_ok(f"{url}/ready"), START_SECONDS, f"{member.name} ready", self._check)  # type: ignore[misc]
        self._start_router()
        wait_for(lambda: is_ok(f"{self.router}/health"), 60, "router ready", self._check)
        return time.monotonic() - started

    def stop(self) -> None:
        """Stop restarting; the processes themselves end with `Processes`."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _check(self) -> None:
        for member in self._members:
            if member.crashes:
                tail = self._log(member, "engine").read_text(errors="replace").splitlines()[-12:]
                raise RuntimeError(
                    "\n".join([f"{member.name} ended with {member.crashes[-1]}; the end of its log:", *tail])
                )

    def _supervise(self) -> None:
        while not self._stop.wait(0.2):
            try:
                for member in self._members:
                    if member.engine and (code := member.engine.poll()) is not None:
                        if code != -signal.SIGKILL:
                            member.crashes.append(code)
                            self._stop.wait(len(member.crashes))  # back off, as a kubelet does
                        self._start_engine(member)
                        self._write()
                    if member.sidecar and member.sidecar.poll() is not None:
                        self._start_sidecar(member)
                if self._router and self._router.poll() is not None:
                    self._start_router()
            except RuntimeError:
                return  # the rehearsal is ending

    def _log(self, member: _Member, part: str) -> Path:
        return self._out / "logs" / f"{member.name}-{part}.log"

    def _start_engine(self, member: _Member) -> None:
        command = python(
            "serving", "engine", "--spec", self._spec, "--state", member.folder, "--port", str(member.port)
        )
        member.engine = self._processes.start(command, log=self._log(member, "engine"))
        member.started_at = psutil.Process(member.engine.pid).create_time()

    def _start_sidecar(self, member: _Member) -> None:
        command = python(
            "serving", "sidecar", "--spec", self._spec, "--state", member.folder, "--engine", member.url,
            "--metrics-address", "off",
        )  # fmt: skip
        member.sidecar = self._processes.start(command, log=self._log(member, "sidecar"))

    def _start_router(self) -> None:
        command = python("serving", "router", "--port", self.router.rpartition(":")[2])
        command += ["--metrics-port", str(self._router_metrics_port)]
        for member in self._members:
            command += ["--replica", member.url]
        self._router = self._processes.start(command, log=self._out / "logs" / "router.log")

    def _write(self) -> None:
        replicas = [
            {"name": member.name, "url": member.url, "pid": member.engine.pid, "started_at": member.started_at}
            for member in self._members
            if member.engine
        ]
        write_json(self._out / "fleet.json", {"router": self.router, "replicas": replicas})
