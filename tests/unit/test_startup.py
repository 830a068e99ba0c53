"""The phases of a start are read from what vLLM logs, in whichever process, and told as metrics and in one line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from logging.config import dictConfig
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from serving import startup
from serving.startup import Phases, process_age

ROOT = Path(__file__).parents[2]

# As vLLM 0.32 writes them, of a GPU's start where the CPU says nothing.
API, CORE = "(APIServer pid=1) INFO 11-26 23:26:37 ", "(EngineCore pid=2) INFO 11-26 23:27:30 "
INIT = f"{CORE}[core.py:395] init engine (profile, create kv cache, warmup model) took 39.10 s"
IMPORTED = f"{API}[api_utils.py:286] non-default args: {{'model': 'base'}}\n"
ENGINE = f"{CORE}[core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: x\n"
WEIGHTS = f"{CORE}[default_loader.py:503] Loading weights took 3.21 seconds\n"
LOADED = f"{CORE}[model_runner.py:425] Model loading took 14.99 GiB memory and 4.500000 seconds\n"
CAPTURED = f"{CORE}[gpu_model_runner.py:6581] Graph capturing finished in 7 secs, took 0.41 GiB\n"
COMPILED, WARM = f"{INIT} (compilation: 21.75 s)\n", f"{INIT}\n"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a process that has been there for 100 s."""
    monkeypatch.setenv("DRYDOCK_STATE", str(tmp_path))
    monkeypatch.setattr(startup, "process_age", lambda: 100.0)
    return tmp_path


def log(*lines: str) -> None:
    for line in lines:
        startup.STREAM.write(line)


def metrics(phases: Phases) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(phases)
    lines = generate_latest(registry).decode().splitlines()
    told = [line for line in lines if line.startswith("drydock_startup_seconds")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in told}


def test_every_phase_of_a_gpus_start_is_told(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(startup, "process_age", lambda: 9.5)
    log(IMPORTED, ENGINE)
    log(WEIGHTS, LOADED, CAPTURED, COMPILED)
    monkeypatch.setattr(startup, "process_age", lambda: 100.0)
    known = {"import": 9.5, "engine_import": 9.5, "weights": 4.5, "compile": 21.75, "capture": 7.0}
    assert metrics(Phases(state)) == known | {"engine": 100.0 - sum(known.values())}
    assert capsys.readouterr().out == IMPORTED + ENGINE + WEIGHTS + LOADED + CAPTURED + COMPILED, "passed on as it is"


def test_what_did_not_happen_is_absent_and_not_0(state: Path) -> None:
    log(IMPORTED, WEIGHTS, WARM)
    assert metrics(Phases(state)).keys() == {"import", "weights", "engine"}


def test_a_start_says_nothing_of_the_one_before(state: Path) -> None:
    log(IMPORTED, ENGINE, WEIGHTS, CAPTURED, COMPILED)
    log(IMPORTED, WEIGHTS)
    assert metrics(Phases(state)).keys() == {"import", "weights", "engine"}


def test_a_vllm_that_logs_nothing_still_tells_the_whole(state: Path) -> None:
    assert metrics(Phases(state)) == {"engine": 100.0}


def test_lines_of_later_days_change_nothing(state: Path) -> None:
    log(IMPORTED)
    phases = Phases(state)
    log(WEIGHTS, IMPORTED)
    assert metrics(phases).keys() == {"import", "engine"}


@pytest.mark.parametrize("found", [True, False])
def test_looking_for_compiled_graphs_is_a_phase_of_its_own(
    state: Path, monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    monkeypatch.setattr(startup, "process_age", lambda: 9.5)
    log(IMPORTED)
    monkeypatch.setenv("DRYDOCK_COMPILED", str(startup.Fetched(found, 2.5)))
    phases = Phases(state)
    assert metrics(phases) == {"fetch": 2.5, "import": 7.0, "engine": 0.0}  # 9.5 s in all
    (family,) = [each for each in phases.collect() if each.name == "drydock_compiled_found"]
    assert [sample.value for sample in family.samples] == [found]
    monkeypatch.delenv("DRYDOCK_COMPILED")
    assert [family.name for family in Phases(state).collect()] == ["drydock_startup_seconds"]


def test_ready_is_told_once_with_all_phases_in_one_line(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log(IMPORTED.replace("\n", " and more\n"), WEIGHTS)
    phases = Phases(state)
    phases.seconds |= {"import": 9.5, "engine": 50.0}
    assert "adapters" not in metrics(phases)
    phases.mark_ready()
    took = metrics(phases)["adapters"]
    assert 0 <= took < 5
    phases.mark_ready()
    assert metrics(phases)["adapters"] == took
    (told,) = [record.getMessage() for record in caplog.records]
    whole, phases_told = told.split(": ")
    assert whole == f"ready {62.71 + took:.1f} s after the process began"
    assert phases_told == f"import 9.5, weights 3.2, engine 50.0, adapters {took:.1f}"


def test_the_age_of_a_process_counts_from_its_start_through_an_exec() -> None:
    again = (
        f"import os, sys, time; time.sleep(0.5); os.execv({sys.executable!r}, [{sys.executable!r}, '-c', sys.argv[1]])"
    )
    ask = "from serving.startup import process_age; print(process_age())"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", again, ask], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - started + 0.02
    assert process_age() > 0


def test_the_stream_is_found_as_vllm_looks_for_it(
    state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relevant part of vllm/logger.py: a StreamHandler by dictConfig, its stream by name."""
    handler = {"class": "logging.StreamHandler", "stream": "ext://serving.startup.STREAM"}
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"vllm": handler},
        "loggers": {"vllm-like": {"handlers": ["vllm"], "level": "INFO", "propagate": False}},
    }
    dictConfig(json.loads(json.dumps(settings)))
    logging.getLogger("vllm-like").info("Loading weights took %.2f seconds", 1.5)
    assert (state / "phases").read_text() == "weights 1.500\n"
    assert capsys.readouterr().out == "Loading weights took 1.50 seconds\n"


def test_vllm_still_says_it_in_these_words() -> None:
    """Read, not imported: importing vLLM takes ten seconds."""
    found = [Path(entry) / "vllm" for entry in sys.path if entry and (Path(entry) / "vllm" / "v1").is_dir()]
    if not found:
        pytest.skip("needs vLLM's source in this environment")
    words = {
        "entrypoints/serve/utils/api_utils.py": "non-default args: ",
        "v1/engine/core.py": "Initializing a V1 LLM engine ",
        "model_executor/model_loader/default_loader.py": "Loading weights took %.2f seconds",
        "v1/worker/gpu_model_runner.py": "Graph capturing finished in %.0f secs, ",
        "v1/worker/gpu/model_runner.py": "Model loading took %s GiB memory and %.6f seconds",
        "logger.py": '"stream": envs.VLLM_LOGGING_STREAM',
    }
    for path, text in words.items():
        assert text in (found[0] / path).read_text(), path
    assert '"%.2f s (compilation: %.2f s)"' in (found[0] / "v1/engine/core.py").read_text()
