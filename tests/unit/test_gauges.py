"""vLLM's figures are read from the registry under the names that vLLM 0.32 gives them."""

from __future__ import annotations

import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, Histogram

from serving import gauges

LABELS = ["model_name", "engine"]
BUCKETS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]  # vLLM's of the histogram


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """An empty registry in the place of the process's own."""
    made = CollectorRegistry(auto_describe=True)
    monkeypatch.setattr(gauges, "REGISTRY", made)
    return made


ALL: list[Callable[[], float]] = [gauges.waiting, gauges.kv_cache_usage, gauges.engine_steps]


def test_before_vllm_registered_its_figures_they_are_0(registry: CollectorRegistry) -> None:
    assert [read() for read in ALL] == [0.0] * 3
    assert all(isinstance(read(), float) for read in ALL)
    Gauge("vllm:num_requests_waiting", "No engine yet.", LABELS, registry=registry)
    assert gauges.waiting() == 0.0


def test_each_reads_its_own_figure(registry: CollectorRegistry) -> None:
    values = {"vllm:num_requests_waiting": 3, "vllm:kv_cache_usage_perc": 0.25}
    for name, value in values.items():
        Gauge(name, name, LABELS, registry=registry).labels("base", "0").set(value)
    steps = Histogram("vllm:iteration_tokens_total", "Steps.", LABELS, buckets=BUCKETS, registry=registry)
    for tokens in (700, 1):
        steps.labels("base", "0").observe(tokens)
    assert [read() for read in ALL] == [3.0, 0.25, 2.0]


def test_a_step_that_gives_no_token_is_progress_too(registry: CollectorRegistry) -> None:
    usage = Gauge("vllm:kv_cache_usage_perc", "KV", LABELS, registry=registry).labels("base", "0")
    before = gauges.progress()
    usage.set(0.1)
    assert gauges.progress() != before


def test_reading_is_cheap_enough_for_every_request(registry: CollectorRegistry) -> None:
    for number in range(60):  # about as many collectors as vLLM registers
        Histogram(f"vllm:other_{number}", "x", LABELS, registry=registry).labels("base", "0").observe(1)
    Gauge("vllm:num_requests_waiting", "x", LABELS, registry=registry).labels("base", "0").set(1)
    best = min(timeit.repeat(gauges.waiting, number=100, repeat=5)) / 100
    assert best < 200e-6, "7 us on a quiet machine: only the collector that is asked for may be read"


def test_vllm_names_them_so() -> None:
    """Read, not imported: importing vLLM takes ten seconds."""
    found = [Path(entry) / "vllm" / "v1" / "metrics" / "loggers.py" for entry in sys.path if entry]
    source = next((path for path in found if path.is_file()), None)
    if source is None:
        pytest.skip("needs vLLM's source in this environment")
    text = source.read_text()
    for name in ("num_requests_waiting", "kv_cache_usage_perc", "iteration_tokens_total"):
        assert f'name="vllm:{name}"' in text


def test_vllm_is_not_imported_for_it() -> None:
    code = "import sys, serving.gauges, serving.heartbeat; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
