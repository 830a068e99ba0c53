"""How many replicas there are: KEDA asks managed Prometheus and sets the Deployment's number between two bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pulumi
from pulumi_kubernetes import apiextensions, meta

from infra.settings import Serving
from workloads.engine import startup_seconds
from workloads.metrics import NAMESPACE_LABEL
from workloads.namespaces import SERVING

IDLE_WINDOW = "10m"  # without a request, after which a pool that may sleep does
POLL_SECONDS = 15  # the interval of the metrics
NODE_SECONDS = 600  # a GPU node takes 3 to 8 minutes, the image 1 to 2 (KAITO)
HPA_LONGEST_PERIOD = 1800  # Kubernetes' limits (autoscaling/v2)
HPA_LONGEST_WINDOW = 3600

_HERE = f'{NAMESPACE_LABEL}="{SERVING}"'
WAITING = f"sum(vllm:num_requests_waiting{{{_HERE}}})"
RUNNING = f"sum(vllm:num_requests_running{{{_HERE}}})"


def asked() -> str:
    """1 when the router had a request within IDLE_WINDOW, otherwise 0: also for requests that found no replica.

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
            f"(sum(increase({counter}[{IDLE_WINDOW}])) or vector(0))",
            f"(sum({counter} unless {counter} offset {IDLE_WINDOW}) or vector(0))",
        )
    ]
    return f"clamp_max({' + '.join(terms)}, 1)"


def triggers(settings: Serving) -> list[tuple[str, str, Mapping[str, str]]]:
    """Name, query and further settings of each: KEDA takes the one that wants most."""
    # An engine's metric that is missing is an error, and then nothing is scaled: KEDA's default reads it as 0 and would
    # scale down blindly. Where no replica at all is normal, so is a missing metric.
    missing = {"ignoreNullValues": "true" if settings.min_replicas == 0 else "false"}
    found: list[tuple[str, str, Mapping[str, str]]] = [
        ("waiting", WAITING, {"threshold": str(settings.queue_target), **missing}),
        # Full replicas with an empty queue are needed too: without this they would be taken away, and come back.
        ("running", RUNNING, {"threshold": str(settings.max_num_seqs), **missing}),
    ]
    if settings.min_replicas == 0:
        # Without replicas there is no queue: the router alone knows that somebody asks (production-stack#679).
        found.append(("asked", asked(), {"threshold": "1", "ignoreNullValues": "false"}))
    return found


def behavior(parameters: int) -> dict[str, Any]:
    """The HPA's pace, from the time that a new replica takes until it helps (seconds).

    Up: at most twice as many within such a time, since the queue stays long until the new ones are there. Down: one at
    a time, and none before the queue was short for as long as it takes to get one back.
    """
    start = NODE_SECONDS + startup_seconds(parameters)
    period = min(start, HPA_LONGEST_PERIOD)
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "selectPolicy": "Max",
            "policies": [
                {"type": "Percent", "value": 100, "periodSeconds": period},
                {"type": "Pods", "value": 1, "periodSeconds": period},
            ],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": min(start, HPA_LONGEST_WINDOW),
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}],
        },
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
        if settings.min_replicas != settings.max_replicas:
            self._scaled(name, args)
        self.register_outputs({})

    def _scaled(self, name: str, args: ScalingArgs) -> None:
        settings, child = args.settings, pulumi.ResourceOptions(parent=self)
        authentication = apiextensions.CustomResource(
            f"{name}-authentication",
            api_version="keda.sh/v1alpha1",
            kind="TriggerAuthentication",
            metadata=meta.v1.ObjectMetaArgs(name="managed-prometheus", namespace=args.namespace),
            # The operator's own service account is federated with this identity (infra/identities.py).
            spec={"podIdentity": {"provider": "azure-workload", "identityId": args.keda_client_id}},
            opts=child,
        )
        apiextensions.CustomResource(
            f"{name}-scaled",
            api_version="keda.sh/v1alpha1",
            kind="ScaledObject",
            metadata=meta.v1.ObjectMetaArgs(name="engine", namespace=args.namespace),
            spec={
                "scaleTargetRef": {"name": args.deployment},
                "minReplicaCount": settings.min_replicas,
                "maxReplicaCount": settings.max_replicas,
                "pollingInterval": POLL_SECONDS,
                "cooldownPeriod": 300,  # from one replica to none, after the last trigger; the HPA paces the rest
                "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior(args.parameters)}},
                "triggers": [
                    {
                        "type": "prometheus",
                        "name": title,
                        "metadata": {"serverAddress": args.query_endpoint, "query": query, **further},
                        "authenticationRef": {"name": "managed-prometheus"},
                    }
                    for title, query, further in triggers(settings)
                ],
            },
            opts=pulumi.ResourceOptions(parent=self, depends_on=[authentication]),
        )
