"""How many replicas there are: KEDA asks managed Prometheus and sets the Deployment's number between two bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pulumi
from pulumi_kubernetes import apiextensions, meta

from infra.settings import Serving
from workloads.engine import startup_seconds
from workloads.metrics import NAMESPACE_LABEL
from workloads.namespaces import SERVING

IDLE_SECONDS = 600  # without a request, after which a pool that may sleep counts as unused
POLL_SECONDS = 15  # the interval of the metrics
FULL = 0.8  # of slots or KV cache in use: a replica more is due, since it comes only when a model's start is over
MOST_AT_ONCE = 1.5  # times the replicas that answer: what a queue may ask for, while it waits for those that start
NODE_SECONDS = 600  # a GPU node takes 3 to 8 minutes, the image 1 to 2 (KAITO)
UP_WINDOW = 60
STAY = 1.5  # starts, in which fewer must have been enough: what came last is there for half of one before it may go
DOWN_PERIOD = 300
HPA_LONGEST_WINDOW = 3600  # Kubernetes' limit (autoscaling/v2)
AUTHENTICATION = "managed-prometheus"

_HERE = f'{NAMESPACE_LABEL}="{SERVING}"'
RUNNING = f"sum(vllm:num_requests_running{{{_HERE}}})"
KV_CACHE = f"sum(vllm:kv_cache_usage_perc{{{_HERE}}})"


def waiting(queue_target: int) -> str:
    """The queue, at most as long as MOST_AT_ONCE times the replicas that answer would have it.

    A queue grows for as long as the new replicas take to start, and says nothing of how many are needed. Counted are
    replicas whose metrics are there: until the new ones help, it asks for no more. The HPA's policies could not say so:
    they know no readiness, and their longest period of 1800 s is shorter than the start of a 70B model.
    """
    queue = f"vllm:num_requests_waiting{{{_HERE}}}"
    return f"clamp_max(sum({queue}), {MOST_AT_ONCE * queue_target:g} * scalar(count({queue})))"


def asked() -> str:
    """1 when the router had a request within IDLE_SECONDS, otherwise 0: also for requests that found no replica.

    The router has a counter for either kind, which begins with its first event: a series that did not exist before the
    window counts as it stands, since `increase` sees no growth in it.
    """
    counters = (
        f"vllm_router_requests_total{{{_HERE}}}",
        f'vllm_router_request_errors_total{{{_HERE},error_type="no_available_workers"}}',
    )
    terms = [
        term
        for counter in counters
        for term in (
            f"(sum(increase({counter}[{IDLE_SECONDS}s])) or vector(0))",
            f"(sum({counter} unless {counter} offset {IDLE_SECONDS}s) or vector(0))",
        )
    ]
    return f"clamp_max({' + '.join(terms)}, 1)"


def triggers(settings: Serving) -> list[tuple[str, str, Mapping[str, str]]]:
    """Name, query and further settings of each: KEDA takes the one that wants most."""
    # An engine's metric that is missing is an error, and then nothing is scaled: KEDA's default reads it as 0 and would
    # scale down blindly. Where no replica at all is normal, so is a missing metric.
    missing = {"ignoreNullValues": "true" if settings.min_replicas == 0 else "false"}
    # All are sums against what one replica should have (metricType AverageValue, KEDA's default): ceil(sum / threshold)
    # replicas are wanted. An average over replicas as Value would be multiplied by the number of ready ones.
    found: list[tuple[str, str, Mapping[str, str]]] = [
        ("waiting", waiting(settings.queue_target), {"threshold": str(settings.queue_target), **missing}),
        # Before the slots are full, for then it is too late; and without this busy replicas with an empty queue would
        # be taken away, and come back.
        ("running", RUNNING, {"threshold": f"{FULL * settings.max_num_seqs:g}", **missing}),
        # Long contexts fill the cache before the slots: requests wait, or are preempted and begun anew.
        ("kv-cache", KV_CACHE, {"threshold": f"{FULL:g}", **missing}),
    ]
    if settings.min_replicas == 0:
        # Without replicas there is no queue: the router alone knows that somebody asks (production-stack#679).
        found.append(("asked", asked(), {"threshold": "1", "ignoreNullValues": "false"}))
    return found


def start_seconds(parameters: int) -> int:
    """From the wish for a replica to its first answer, at worst: a node, the image, the model."""
    return NODE_SECONDS + startup_seconds(parameters)


def behavior(parameters: int) -> dict[str, Any]:
    """The HPA's pace, from the time that a new replica takes until it helps (seconds).

    Up: not for a queue that is gone within UP_WINDOW, and otherwise at once: what triggers ask for is bounded. Down:
    one at a time, and none before fewer were enough for longer than it takes to get one back. By these numbers a day's
    load changes direction once, which it did not with a window of one start, or with a queue that asks for twice as
    many (tests/stack/test_scaling_simulation.py; try yours: python -m workloads.scaling_simulation).
    """
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": UP_WINDOW,
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": POLL_SECONDS}],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": min(math.ceil(STAY * start_seconds(parameters)), HPA_LONGEST_WINDOW),
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": DOWN_PERIOD}],
        },
    }


def scaled_object(
    settings: Serving, parameters: int, *, query_endpoint: pulumi.Input[str], deployment: pulumi.Input[str] = "engine"
) -> dict[str, Any]:
    """The ScaledObject's spec. `parameters`: of the base model."""
    return {
        "scaleTargetRef": {"name": deployment},
        "minReplicaCount": settings.min_replicas,
        "maxReplicaCount": settings.max_replicas,
        "pollingInterval": POLL_SECONDS,
        # From one replica to none, after the last trigger; the HPA paces the rest. Shorter than a start, it would take
        # away what a single request woke before that could answer anyone.
        "cooldownPeriod": start_seconds(parameters),
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior(parameters)}},
        "triggers": [
            {
                "type": "prometheus",
                "name": title,
                "metadata": {"serverAddress": query_endpoint, "query": query, **further},
                "authenticationRef": {"name": AUTHENTICATION},
            }
            for title, query, further in triggers(settings)
        ],
    }


@dataclass(frozen=True)
class ScalingArgs:
    """`deployment`: the name of what is scaled; `parameters`: of the base model; `keda_client_id`: may read metrics."""

    settings: Serving
    parameters: int
    query_endpoint: pulumi.Input[str]
    keda_client_id: pulumi.Input[str]
    deployment: pulumi.Input[str] = "engine"
    namespace: pulumi.Input[str] = SERVING


class Scaling(pulumi.ComponentResource):
    """KEDA's ScaledObject and how it signs in; nothing when the number is fixed."""

    def __init__(self, name: str, args: ScalingArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Scaling", name, None, opts)
        settings = args.settings
        if settings.scales:
            self._scaled(name, args)
        self.register_outputs({})

    def _scaled(self, name: str, args: ScalingArgs) -> None:
        settings, child = args.settings, pulumi.ResourceOptions(parent=self)
        authentication = apiextensions.CustomResource(
            f"{name}-authentication",
            api_version="keda.sh/v1alpha1",
            kind="TriggerAuthentication",
            metadata=meta.v1.ObjectMetaArgs(name=AUTHENTICATION, namespace=args.namespace),
            # The operator's own service account is federated with this identity (infra/identities.py).
            spec={"podIdentity": {"provider": "azure-workload", "identityId": args.keda_client_id}},
            opts=child,
        )
        apiextensions.CustomResource(
            f"{name}-scaled",
            api_version="keda.sh/v1alpha1",
            kind="ScaledObject",
            metadata=meta.v1.ObjectMetaArgs(name="engine", namespace=args.namespace),
            spec=scaled_object(
                settings, args.parameters, query_endpoint=args.query_endpoint, deployment=args.deployment
            ),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[authentication]),
        )
