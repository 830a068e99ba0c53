"""vllm-router's command line: retries, health by readiness, the less loaded of two replicas.

`python -m serving.router` is `python -m serving router` for an image that has neither vLLM nor this room's other needs.
The router has routes that change its replicas, on the same port and without a key: see serving/front.cfg.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Pods:
    """Replicas that Kubernetes knows: the pods of `namespace` with all labels of `selector` (KEY=VALUE).

    The router lists and watches them (RBAC: `list` and `watch` on `pods` there). It takes a pod in when the pod is
    ready, and out when it is no longer or is being deleted. `health`: the path that is asked of each, every second.
    """

    selector: Sequence[str]
    namespace: str
    port: int
    health: str = "/ready"


def main(argv: list[str] | None = None) -> NoReturn:
    """Become the router that the command line asks for."""
    parser = argparse.ArgumentParser("python -m serving.router", description="become vllm-router before the replicas")
    add_arguments(parser)
    become_router(parser, parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let `parser` take what `become_router` needs."""
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--metrics-host", help="where Prometheus asks [as --host]")
    parser.add_argument("--metrics-port", type=int, default=29000)
    parser.add_argument("--max-request-kib", type=int, default=4096, help="of a request body [%(default)s]")
    replicas = parser.add_mutually_exclusive_group(required=True)
    replicas.add_argument("--replica", action="append", metavar="URL")
    replicas.add_argument(
        "--selector", action="append", type=_label, metavar="KEY=VALUE", help="a label of the pods, or several"
    )
    parser.add_argument("--namespace", help="of the pods")
    parser.add_argument("--replica-port", type=int, default=8000, help="of the pods [%(default)s]")
    parser.add_argument("--replica-health", default="/ready", metavar="PATH", help="asked of the pods [%(default)s]")


def become_router(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> NoReturn:
    """Replace this process, so that SIGTERM reaches the router; `parser` says what is wrong with `arguments`."""
    if bool(arguments.selector) != bool(arguments.namespace):
        parser.error("--selector and --namespace go together")
    command = router_command(
        arguments.replica
        or Pods(arguments.selector, arguments.namespace, arguments.replica_port, arguments.replica_health),
        (arguments.host, arguments.port),
        (arguments.metrics_host or arguments.host, arguments.metrics_port),
        arguments.max_request_kib,
    )
    os.execv(command[0], command)


def _label(text: str) -> str:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE, such as app=engine")
    return text


def router_command(
    replicas: Sequence[str] | Pods, clients: tuple[str, int], metrics: tuple[str, int], max_request_kib: int = 4096
) -> list[str]:
    """The command that routes to `replicas` (URLs, or pods), listening at two addresses (host, port).

    Each setting that is no default has its reason.
    """
    return [
        sys.executable, "-m", "vllm_router.launch_router",
        "--host", clients[0], "--port", str(clients[1]),
        "--prometheus-host", metrics[0], "--prometheus-port", str(metrics[1]),
        *(_discovery(replicas) if isinstance(replicas, Pods) else ["--worker-urls", *replicas]),
        # Seen with 0.1.17: cache_aware, the default, posts each request to /v1/chat/completions/render of every replica
        # first, which our request layer closes, and then sent 40 of 40 requests to one of two; this sent 26 and 14. It
        # does not start with one URL, but does with pods, even none.
        "--policy", "round_robin" if not isinstance(replicas, Pods) and len(replicas) == 1 else "power_of_two",
        # It holds a body in memory, for retries: up to 512 MiB each by default. The replicas have the exact limit.
        "--max-payload-size", str(max_request_kib * 1024),
        # /health is true before the adapters are loaded; /ready is not. Without our request layer there is no /ready.
        "--health-check-endpoint", replicas.health if isinstance(replicas, Pods) else "/ready",
        # The default of 60 s would send traffic to a dead replica for minutes.
        "--health-check-interval-secs", "1", "--health-failure-threshold", "2", "--health-success-threshold", "1",
        "--health-check-timeout-secs", "5",
        # Tries in all, the first one included. Seen with 0.1.17: it tries again after 408, 429, 500, 502, 503, 504 and
        # no answer, on whichever replica has fewest requests, be it the same. Three: a lost replica costs tries, and a
        # 429 comes back after 0.2 s and two more tries, not half a second and four.
        "--retry-max-retries", "3", "--retry-initial-backoff-ms", "50", "--retry-max-backoff-ms", "1000",
        # The breaker counts failures in a row: 5xx and no answer, no 4xx. Fewer than tries, since a lost replica has no
        # requests and is chosen before a busy one until its breaker opens: with 5 of 5, the first request failed, 4
        # times of 4. It half-opens soon: a client whose requests end in 5xx, two in a row at each replica, shuts all
        # others out until then.
        "--cb-failure-threshold", "2", "--cb-timeout-duration-secs", "2", "--cb-success-threshold", "1",
        "--request-timeout-secs", "600",
    ]  # fmt: skip


def _discovery(pods: Pods) -> list[str]:
    return [
        "--service-discovery", "--selector", *pods.selector,
        "--service-discovery-namespace", pods.namespace, "--service-discovery-port", str(pods.port),
        # While the router waits for a new pod, it hears of no other one, not even of deletions (seen with 0.1.17): ten
        # minutes by default. A ready pod answers at once.
        "--worker-startup-timeout-secs", "15", "--worker-startup-check-interval", "1",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
