"""What clients reach: the router before the replicas, its Service, and who may ask it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pulumi
from pulumi_kubernetes import apps, core, meta, networking, policy, rbac

from infra.outputs import CLIENT_LABEL
from workloads.engine import LABELS as ENGINE_LABELS
from workloads.engine import PORT as ENGINE_PORT
from workloads.engine import ROUTER_LABELS
from workloads.metrics import FRONT_PORT, scraped
from workloads.namespaces import SERVING
from workloads.placement import apps_node_selector
from workloads.pods import container_security, http_probe, mount, pod_security, resources, scratch, spread
from workloads.policies import (
    egress_https,
    egress_to,
    ingress_from,
    ingress_from_addresses,
    ingress_scrape,
    network_policy,
)

SERVICE = "drydock"
ACCOUNT = "router"
PORT = 8080
METRICS = 29000
ROUTER_PORT = 8081  # inside the pod alone
FRONT_METRICS = 8405
REPLICAS = 2

REQUEST_SECONDS = 600  # what serving/router.py allows one request
PRE_STOP_SECONDS = 10  # SIGTERM closes the port at once (seen with 0.1.17): Service and load balancer must know before
# Running requests end; the processes exit as soon as they have. The front ends what is left 5 s after that (front.cfg).
GRACE_SECONDS = PRE_STOP_SECONDS + REQUEST_SECONDS + 15


@dataclass(frozen=True)
class Replicas:
    """The pods that the router leads to: those with `labels`, at `port`. `health`: the path that is asked of each.

    In another `namespace` than the router's, whoever makes them lets it read the pods there, and reach them.
    """

    labels: Mapping[str, str]
    namespace: pulumi.Input[str]
    port: int
    health: str


@dataclass(frozen=True)
class RouterArgs:
    """`vnet_ranges`: who may ask from outside the cluster, with expose `vnet`; `nodes`: the most of pool `apps`.

    `replicas`: other ones than the pods of our Deployment. `after`: what must be there before it leads to them.
    """

    image: pulumi.Input[str]  # by digest
    expose: Literal["cluster", "vnet"]
    vnet_ranges: tuple[str, ...]
    nodes: int
    namespace: pulumi.Input[str] = SERVING
    replicas: Replicas | None = None
    after: Sequence[pulumi.Resource] = ()


class Router(pulumi.ComponentResource):
    """Two routers on nodes without GPU, which find the replicas by watching pods, behind the Service `drydock`."""

    url: pulumi.Output[str]
    """Base of the OpenAI API, without /v1: inside the cluster, or inside the virtual network when exposed to it."""

    def __init__(self, name: str, args: RouterArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Router", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        account = self._account(name, args, child)
        network_policy(
            "router",
            args.namespace,
            labels=ROUTER_LABELS,
            ingress=[_from_clients(args), ingress_scrape(METRICS, FRONT_METRICS)],
            egress=[egress_to(ENGINE_LABELS, ENGINE_PORT), egress_https()],  # HTTPS: the API server
            resource_name=f"{name}-network",
            opts=child,
        )
        policy.v1.PodDisruptionBudget(
            f"{name}-disruption",
            metadata=meta.v1.ObjectMetaArgs(name="router", namespace=args.namespace),
            spec=policy.v1.PodDisruptionBudgetSpecArgs(
                max_unavailable=1,
                selector=meta.v1.LabelSelectorArgs(match_labels=ROUTER_LABELS),
                unhealthy_pod_eviction_policy="AlwaysAllow",
            ),
            opts=child,
        )
        # Awaited, unlike the engine: neither a GPU nor a model is needed for it, only an image of some gigabytes.
        patient = pulumi.ResourceOptions(parent=self, custom_timeouts=pulumi.CustomTimeouts(create="30m", update="30m"))
        apps.v1.Deployment(
            f"{name}-deployment",
            metadata=meta.v1.ObjectMetaArgs(name="router", namespace=args.namespace, labels=ROUTER_LABELS),
            spec=apps.v1.DeploymentSpecArgs(
                replicas=REPLICAS,
                selector=meta.v1.LabelSelectorArgs(match_labels=ROUTER_LABELS),
                strategy=apps.v1.DeploymentStrategyArgs(
                    type="RollingUpdate",
                    rolling_update=apps.v1.RollingUpdateDeploymentArgs(max_surge=1, max_unavailable=0),
                ),
                progress_deadline_seconds=1800,  # as long as Pulumi waits
                template=core.v1.PodTemplateSpecArgs(
                    metadata=meta.v1.ObjectMetaArgs(labels=ROUTER_LABELS, annotations=scraped(METRICS)),
                    spec=_pod(args, account),
                ),
            ),
            opts=pulumi.ResourceOptions.merge(patient, pulumi.ResourceOptions(depends_on=list(args.after))),
        )
        vnet = args.expose == "vnet"
        service = core.v1.Service(
            f"{name}-service",
            metadata=meta.v1.ObjectMetaArgs(
                name=SERVICE,
                namespace=args.namespace,
                labels=ROUTER_LABELS,
                annotations={"service.beta.kubernetes.io/azure-load-balancer-internal": "true"} if vnet else None,
            ),
            spec=core.v1.ServiceSpecArgs(
                type="LoadBalancer" if vnet else "ClusterIP",
                # Local keeps the client's address, which the network policy asks for; Cluster would show a node's.
                external_traffic_policy="Local" if vnet else None,
                selector=ROUTER_LABELS,
                ports=[core.v1.ServicePortArgs(name="http", port=80, target_port=PORT)],
            ),
            opts=patient,
        )
        inside = inside_url(args.namespace)
        self.url = pulumi.Output.all(inside, service.status.apply(_given)).apply(_address) if vnet else inside
        self.register_outputs({"url": self.url})

    def _account(self, name: str, args: RouterArgs, child: pulumi.ResourceOptions) -> pulumi.Output[str]:
        """Service account `router`, the only one of ours with a token for the API server: it may read pods."""
        metadata = meta.v1.ObjectMetaArgs(name=ACCOUNT, namespace=args.namespace)
        account = core.v1.ServiceAccount(
            f"{name}-account", metadata=metadata, automount_service_account_token=True, opts=child
        )
        watch_pods(name, args.namespace, account.metadata.name, args.namespace, child)
        name_made: pulumi.Output[str] = account.metadata.apply(lambda made: str(made.name))
        return name_made


def watch_pods(
    name: str,
    namespace: pulumi.Input[str],
    account: pulumi.Input[str],
    account_namespace: pulumi.Input[str],
    opts: pulumi.ResourceOptions,
) -> None:
    """Let the router's account, of `account_namespace`, see which pods there are in `namespace`."""
    metadata = meta.v1.ObjectMetaArgs(name=ACCOUNT, namespace=namespace)
    role = rbac.v1.Role(
        f"{name}-role",
        metadata=metadata,
        rules=[rbac.v1.PolicyRuleArgs(api_groups=[""], resources=["pods"], verbs=["get", "list", "watch"])],
        opts=opts,
    )
    rbac.v1.RoleBinding(
        f"{name}-binding",
        metadata=metadata,
        role_ref=rbac.v1.RoleRefArgs(api_group="rbac.authorization.k8s.io", kind="Role", name=role.metadata.name),
        subjects=[rbac.v1.SubjectArgs(kind="ServiceAccount", name=account, namespace=account_namespace)],
        opts=opts,
    )


def inside_url(namespace: pulumi.Input[str]) -> pulumi.Output[str]:
    """Base of the OpenAI API, without /v1, for pods of this cluster."""
    return pulumi.Output.format("http://{0}.{1}.svc.cluster.local", SERVICE, namespace)


def _given(status: core.v1.outputs.ServiceStatus | None) -> str | None:
    """The load balancer's address, which the service has once Pulumi has waited for it."""
    ingress = status.load_balancer.ingress if status and status.load_balancer else None
    return ingress[0].ip if ingress else None


def _address(inside_and_given: list[Any]) -> str:
    inside, given = inside_and_given
    return f"http://{given}" if given else str(inside)


def _from_clients(args: RouterArgs) -> networking.v1.NetworkPolicyIngressRuleArgs:
    """From this namespace (the stress test), namespaces that are labelled as clients, and what is exposed to."""
    rule = ingress_from({}, PORT)
    peers = [
        *rule.from_,
        networking.v1.NetworkPolicyPeerArgs(namespace_selector=meta.v1.LabelSelectorArgs(match_labels=CLIENT_LABEL)),
    ]
    if args.expose == "vnet":
        peers += ingress_from_addresses(args.vnet_ranges, PORT).from_
    return networking.v1.NetworkPolicyIngressRuleArgs(from_=peers, ports=rule.ports)


def _pod(args: RouterArgs, account: pulumi.Input[str]) -> core.v1.PodSpecArgs:
    behind = args.replicas or Replicas(ENGINE_LABELS, args.namespace, ENGINE_PORT, "/ready")
    return core.v1.PodSpecArgs(
        service_account_name=account,
        automount_service_account_token=True,  # it watches pods
        enable_service_links=False,
        security_context=pod_security(),
        node_selector=apps_node_selector(),
        topology_spread_constraints=spread(ROUTER_LABELS),
        affinity=_apart() if args.nodes > 1 else None,
        termination_grace_period_seconds=GRACE_SECONDS,
        containers=[
            core.v1.ContainerArgs(
                name="front",
                image=args.image,
                # The router's port has routes that change its replicas, without a key: only this container reaches it.
                # SIGUSR1 (10) is HAProxy's orderly end; SIGTERM (15) would cut running streams.
                command=["dumb-init", "--rewrite", "15:10", "haproxy", "-db", "-f", "/app/serving/front.cfg"],
                env=[
                    core.v1.EnvVarArgs(name=name, value=value)
                    for name, value in (
                        ("FRONT_HOST", "0.0.0.0"),
                        ("FRONT_PORT", str(PORT)),
                        ("ROUTER_PORT", str(ROUTER_PORT)),
                        ("FRONT_METRICS_PORT", str(FRONT_METRICS)),
                    )
                ],
                ports=[
                    core.v1.ContainerPortArgs(name="http", container_port=PORT),
                    core.v1.ContainerPortArgs(name=FRONT_PORT, container_port=FRONT_METRICS),
                ],
                resources=resources(cpu="250m", cpu_limit="2", memory="256Mi", storage="256Mi"),
                # Not /readiness, which is 503 without replicas: a Service without endpoints answers nobody, where the
                # router says 503, retries, and counts the requests that wake a pool up. It lists the pods within a
                # second of its start (seen with 0.1.17), hence the delay.
                readiness_probe=http_probe("/liveness", PORT, period=5, failures=2, delay=5),
                liveness_probe=http_probe("/healthz", FRONT_METRICS, period=10, failures=6, delay=30),
                lifecycle=_leave_first(),
                security_context=container_security(),
            ),
        ],
        init_containers=[
            core.v1.ContainerArgs(
                name="router",
                image=args.image,
                restart_policy="Always",  # a native sidecar: there before the front, and until its last request is done
                command=[
                    *("python", "-m", "serving.router", "--host", "127.0.0.1", "--port", str(ROUTER_PORT)),
                    *("--metrics-host", "0.0.0.0", "--metrics-port", str(METRICS)),
                    *(word for key, value in behind.labels.items() for word in ("--selector", f"{key}={value}")),
                    *("--namespace", behind.namespace, "--replica-port", str(behind.port)),
                    *(("--replica-health", behind.health) if args.replicas else ()),
                ],
                ports=[core.v1.ContainerPortArgs(name="metrics", container_port=METRICS)],
                resources=resources(cpu="500m", cpu_limit="2", memory="1Gi", storage="1Gi"),
                # Through the front: the kubelet does not reach the pod's own loopback.
                liveness_probe=http_probe("/liveness", PORT, period=10, failures=6, delay=30),
                security_context=container_security(),
                volume_mounts=[mount("tmp", "/tmp")],
            ),
        ],
        volumes=[scratch("tmp", "1Gi")],
    )


def _leave_first() -> core.v1.LifecycleArgs:
    """Service and load balancer take the pod out before its port closes."""
    return core.v1.LifecycleArgs(
        pre_stop=core.v1.LifecycleHandlerArgs(sleep=core.v1.SleepActionArgs(seconds=PRE_STOP_SECONDS))
    )


def _apart() -> core.v1.AffinityArgs:
    """Not two on one node, so that the pool grows to a second one; a rollout's old pods do not count."""
    return core.v1.AffinityArgs(
        pod_anti_affinity=core.v1.PodAntiAffinityArgs(
            required_during_scheduling_ignored_during_execution=[
                core.v1.PodAffinityTermArgs(
                    topology_key="kubernetes.io/hostname",
                    label_selector=meta.v1.LabelSelectorArgs(match_labels=ROUTER_LABELS),
                    match_label_keys=["pod-template-hash"],
                )
            ]
        )
    )
