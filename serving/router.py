"""vllm-router's command line: retries, health by readiness, the least loaded replica with a warm prefix."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def router_command(replicas: Sequence[str], host: str, port: int, metrics_port: int) -> list[str]:
    """The command that routes to `replicas` (URLs). Each setting that differs from the default has its reason."""
    return [
        sys.executable, "-m", "vllm_router.launch_router",
        "--host", host, "--port", str(port),
        "--prometheus-host", host, "--prometheus-port", str(metrics_port),
        "--worker-urls", *replicas,
        "--policy", "cache_aware",
        # /health is true before the adapters are loaded; /ready is not.
        "--health-check-endpoint", "/ready",
        # The default of 60 s would send traffic to a dead replica for minutes.
        "--health-check-interval-secs", "1", "--health-failure-threshold", "2", "--health-success-threshold", "1",
        "--health-check-timeout-secs", "5",
        # A request that found its replica dead is tried on the next within a second.
        "--retry-max-retries", "5", "--retry-initial-backoff-ms", "50", "--retry-max-backoff-ms", "1000",
        # The breaker half-opens soon: a replica that is back, and ready, must not wait for a minute.
        "--cb-failure-threshold", "5", "--cb-timeout-duration-secs", "5", "--cb-success-threshold", "1",
        "--request-timeout-secs", "600",
    ]  # fmt: skip
