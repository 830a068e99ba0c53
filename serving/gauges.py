"""vLLM's own figures, read in the API server's process: what waits, how full the KV cache is.

vLLM 0.32 (vllm/v1/metrics/loggers.py) registers them with prometheus_client's default registry, as long as there is one
API server: with several it would set PROMETHEUS_MULTIPROC_DIR and keep them in files. The engine sends its figures
after each step, so between steps, and while it hangs, they are those of the last step.
"""

from __future__ import annotations

from prometheus_client import REGISTRY


def waiting() -> float:
    """Requests that wait in the engine to be computed."""
    return _read("vllm:num_requests_waiting")


def kv_cache_usage() -> float:
    """Share of the KV cache in use, 0 to 1."""
    return _read("vllm:kv_cache_usage_perc")


def engine_steps() -> float:
    """Steps of the engine, since it started, that gave at least one token to a request."""
    return _read("vllm:iteration_tokens_total_count")


def progress() -> tuple[float, float]:
    """Something that changes with every step of an engine at work.

    A step that computes a part of a long prompt gives no token, but takes more of the KV cache.
    """
    return engine_steps(), kv_cache_usage()


def _read(name: str) -> float:
    """Sum of the samples called `name`, which differ in `engine`; 0 as long as vLLM has not registered it."""
    metrics = REGISTRY.restricted_registry([name]).collect()
    return sum((sample.value for metric in metrics for sample in metric.samples), 0.0)
