"""What a start of the engine spends its time on: phases that vLLM tells only to its log, as one line and as metrics.

vLLM 0.32 starts in several processes that share nothing but their output, so each one's output is where the phases are
read: `VLLM_LOGGING_STREAM=ext://serving.startup.STREAM` makes each of them import this module and write its log here.
A logging configuration of our own (VLLM_LOGGING_CONFIG_PATH) would replace vLLM's, and uvicorn's with it. What is told
goes to a file in the state folder, where the API server reads it once it is up.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

FILE = "phases"
FETCHED = "DRYDOCK_COMPILED"
"""Variable by which vLLM's process is told what its own process did before it was vLLM: a `Fetched`."""

# vLLM's words for the end of each phase, with its seconds, or without: then it is the age of the process that says so.
_FIRST = "import"
_TOLD = {
    _FIRST: re.compile(r"non-default args: "),  # vllm/entrypoints/serve/utils/api_utils.py, the API server's first word
    "engine_import": re.compile(r"Initializing a V1 LLM engine "),  # vllm/v1/engine/core.py
    # The model loader's figure, then on a GPU the whole of it (v1/worker/gpu/model_runner.py); the last word counts.
    "weights": re.compile(r"(?:Loading weights took|Model loading took .* GiB memory and) ([\d.]+) seconds"),
    "compile": re.compile(r"init engine .* \(compilation: ([\d.]+) s"),  # vllm/v1/engine/core.py
    "capture": re.compile(r"Graph capturing finished in ([\d.]+) secs"),  # v1/worker/gpu/model_runner.py
}


@dataclass(frozen=True)
class Fetched:
    """What came of looking for compiled graphs (serving.compiled): found or not, and after how many seconds."""

    found: bool
    seconds: float

    def __str__(self) -> str:
        return f"{int(self.found)} {self.seconds:.3f}"

    @classmethod
    def parse(cls, text: str) -> Fetched:
        """Raises ValueError where `text` is none."""
        found, seconds = text.split()
        return cls(bool(int(found)), float(seconds))


class LogStream:
    """Standard output, with an eye on the lines that end a phase."""

    def write(self, text: str) -> None:
        """Pass `text` on; note the phase that it ends in the state folder (DRYDOCK_STATE)."""
        sys.stdout.write(text)
        for phase, words in _TOLD.items():
            if found := words.search(text):
                seconds = float(found[1]) if found.groups() else process_age()
                # The first word of a start wipes what the last one left; a short line is appended whole.
                with (Path(os.environ["DRYDOCK_STATE"]) / FILE).open("w" if phase == _FIRST else "a") as file:
                    file.write(f"{phase} {seconds:.3f}\n")

    def flush(self) -> None:
        sys.stdout.flush()


STREAM = LogStream()


class Phases:
    """The start of this API server, made as it begins to listen. A collector for prometheus_client.

    Phases, in seconds: `fetch` (of compiled graphs, found or not), `import` (of vLLM, until its arguments are known),
    `engine_import` (the same in the engine's process), `weights`, `compile`, `capture`, `engine` (the rest until it
    listens), `adapters` (until ready). What did not happen is absent, as are compile and capture with --enforce-eager.
    """

    def __init__(self, state: Path) -> None:
        self._listening = time.monotonic()
        self.seconds = _read(state / FILE)
        self.fetched = Fetched.parse(os.environ[FETCHED]) if FETCHED in os.environ else None
        if self.fetched:  # before vLLM's first word, in the same process
            if _FIRST in self.seconds:
                self.seconds[_FIRST] -= self.fetched.seconds
            self.seconds = {"fetch": self.fetched.seconds} | self.seconds
        self.seconds["engine"] = max(0.0, process_age() - sum(self.seconds.values()))

    def mark_ready(self) -> None:
        """The replica is ready; only the first time counts, and is logged."""
        if "adapters" not in self.seconds:
            self.seconds["adapters"] = time.monotonic() - self._listening
            told = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
            # Below vLLM's own logger: it is the only one whose INFO is seen in its processes.
            log = logging.getLogger("vllm.drydock")
            log.info("ready %.1f s after the process began: %s", sum(self.seconds.values()), told)

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("drydock_startup_seconds", "What the last start took, by phase.", labels=["phase"])
        for phase, seconds in self.seconds.items():
            family.add_metric([phase], seconds)
        yield family
        if self.fetched:
            said = "Whether the last start found compiled graphs where they are kept, or compiled."
            yield GaugeMetricFamily("drydock_compiled_found", said, value=self.fetched.found)


def process_age() -> float:
    """Seconds since this process began, which an exec does not change (proc(5): field 22 of stat)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _read(path: Path) -> dict[str, float]:
    """Phase to seconds, in the order of a start; empty where vLLM told nothing (VLLM_LOGGING_LEVEL above INFO)."""
    try:
        told = dict(line.split() for line in path.read_text().splitlines())
    except FileNotFoundError:
        return {}
    return {phase: float(told[phase]) for phase in _TOLD if phase in told}
