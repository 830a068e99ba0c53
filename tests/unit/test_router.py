"""The router's command: readiness decides who gets requests, and a dead replica is left quickly."""

from __future__ import annotations

from serving.router import router_command

REPLICAS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


def flags() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in router_command(REPLICAS, "0.0.0.0", 8080, 29000)[3:]:
        if word.startswith("--"):
            assert word not in found, "given twice"
            found[word] = []
        else:
            found[next(reversed(found))].append(word)
    return found


def test_every_replica_gets_requests_at_the_address_asked_for() -> None:
    given = flags()
    assert given["--worker-urls"] == REPLICAS
    assert (given["--host"], given["--port"]) == (["0.0.0.0"], ["8080"])
    assert (given["--prometheus-host"], given["--prometheus-port"]) == (["0.0.0.0"], ["29000"])


def test_a_replica_gets_requests_only_when_its_adapters_are_loaded() -> None:
    assert flags()["--health-check-endpoint"] == ["/ready"]


def test_a_dead_replica_is_noticed_and_a_returned_one_used_within_seconds() -> None:
    given = {name: values[0] for name, values in flags().items()}
    assert int(given["--health-check-interval-secs"]) * int(given["--health-failure-threshold"]) <= 5
    assert int(given["--health-check-interval-secs"]) * int(given["--health-success-threshold"]) <= 5
    assert int(given["--cb-timeout-duration-secs"]) <= 10
    assert int(given["--retry-max-retries"]) >= 1
    assert int(given["--retry-max-backoff-ms"]) <= 1000
