"""The replicas: one Deployment of pods with GPUs, in which vLLM and the adapter sidecar share a folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pulumi
from pulumi_kubernetes import apps, core, meta, policy, scheduling
from pydantic import SecretStr

from infra.settings import Base, ClientTier, GpuPool, Serving, replica_room
from serving.spec import STANDARD, EngineSettings, ServingSpec
from workloads.metrics import SIDECAR_PORT, scraped
from workloads.mirror import BASE_WAIT_SECONDS, BYTES_PER_PARAMETER
from workloads.namespaces import SERVING
from workloads.placement import GpuShare, gpu_node_selector, gpu_share, gpu_tolerations
from workloads.pods import (
    IDENTITY_LABEL,
    config,
    container_security,
    http_probe,
    mount,
    pod_security,
    resources,
    scratch,
    shared_memory,
    spread,
)
from workloads.policies import egress_https, ingress_from, ingress_scrape, network_policy

LABELS = {"app": "engine"}
ROUTER_LABELS = {"app": "router"}  # of the only pods that may ask an engine
PORT = 8000
SIDECAR_METRICS = 9402
PRIORITY = "drydock-serving"
FAULTS = "drill-faults"  # ConfigMap by which a drill tells the sidecars of a loss; nobody has it but who drills that
FAULTS_PATH = "/etc/drydock-faults"

NODE_SECONDS = 1800  # for a GPU node (up to 20 minutes with its driver) and the image on it

# A cold start of an 8B model took 294 s (Tensorfuse, L40S), of which 200 were imports, compilation and graph capture.
COMPILE_SECONDS = 600
READ_BYTES_PER_SECOND = 100e6  # an Azure P10 disk, the smallest that a GPU node has
STARTUP_PERIOD = 10

PRE_STOP_SECONDS = 10  # the router takes a pod out when it hears of its deletion; the rest is for requests on the way
EXIT_SECONDS = 20  # for vLLM's workers (5 s) and the sidecar to end

SIDECAR_MILLICORES = 250
SIDECAR_GIB = 1
SIDECAR_DISK_GIB = 10  # adapter versions: some 100 MB each


def startup_seconds(parameters: int) -> int:
    """Seconds from the process's start to the first answer, at worst: weights from disk, compilation, graph capture."""
    return math.ceil(COMPILE_SECONDS + parameters * BYTES_PER_PARAMETER / READ_BYTES_PER_SECOND)


def startup_failures(parameters: int) -> int:
    """Failed startup probes, one every STARTUP_PERIOD seconds, after which the engine counts as stuck."""
    return math.ceil(startup_seconds(parameters) / STARTUP_PERIOD)


def grace_seconds(settings: EngineSettings) -> int:
    """What a pod has from its deletion to SIGKILL: leave the router, end running requests, exit."""
    return PRE_STOP_SECONDS + settings.shutdown_timeout_seconds + EXIT_SECONDS


def engine_share(pool: GpuPool, gpus: int) -> GpuShare:
    """What the engine's container gets: its GPUs' share of the node less what the sidecar takes."""
    share = gpu_share(pool, gpus)
    return GpuShare(
        f"{int(share.cpu) * 1000 - SIDECAR_MILLICORES}m",
        f"{int(share.memory.removesuffix('Gi')) - SIDECAR_GIB}Gi",
        f"{int(share.ephemeral_storage.removesuffix('Gi')) - SIDECAR_DISK_GIB}Gi",
    )


def passed_on(gpus: int) -> core.v1.VolumeArgs:
    """/dev/shm for what vLLM's processes, and several GPUs, pass to each other; with one GPU that is little."""
    return shared_memory("1Gi" if gpus == 1 else f"{2 * gpus}Gi")


def rollout(settings: Serving, pool: GpuPool, others: int) -> apps.v1.RollingUpdateDeploymentArgs:
    """A new replica before an old one goes where the pool has room for it at full scale, else one after the other.

    `others`: replicas in whose place pods of others (tuning Jobs) may be in this pool. A surge that waits for a GPU
    which never comes would be a rollout that never ends.
    One after the other, the new pod exists as soon as the old one begins to leave: meanwhile it may preempt a tuning
    pod of the pool, which resumes from its checkpoint (seen with the real scheduler).
    """
    if settings.max_replicas + others < replica_room(settings, pool):
        return apps.v1.RollingUpdateDeploymentArgs(max_surge=1, max_unavailable=0)
    return apps.v1.RollingUpdateDeploymentArgs(max_surge=0, max_unavailable=1)


def serving_spec(settings: Serving, base: Base, *, store: str, adapters: Sequence[str], max_lora_rank: int) -> str:
    """The JSON that the containers parse: the settings and what the stack adds to them."""
    spec = ServingSpec(
        **settings.model_dump(include=set(EngineSettings.model_fields)),
        base_model=f"/models/{base.folder}",
        base_name=base.served_name,
        store=store,
        adapters=tuple(adapters),
        max_lora_rank=max_lora_rank,
    )
    return spec.model_dump_json(indent=2)


def keys_json(api_keys: Mapping[str, SecretStr], tiers: Mapping[str, ClientTier]) -> str:
    """What serving/keys.py reads: clients with the SHA-256 of their keys, which go no further than this, and tiers."""
    of_client = {client: name for name, tier in tiers.items() for client in tier.clients}
    clients = {
        client: {
            "sha256": hashlib.sha256(key.get_secret_value().encode()).hexdigest(),
            "tier": of_client.get(client, STANDARD),
        }
        for client, key in sorted(api_keys.items())
    }
    limits = {name: tier.model_dump(exclude={"clients"}, exclude_defaults=True) for name, tier in sorted(tiers.items())}
    return json.dumps({"tiers": limits, "clients": clients}, indent=2)


@dataclass(frozen=True)
class EngineArgs:
    """What every replica serves, from where, and on which nodes.

    `others`: replicas in whose place tuning Jobs may be (`rollout`). `compiled`: where graphs compiled for
    these replicas are or will be (workloads/compiled.py). `namespace` and `service_account` as outputs of their
    component make everything here wait for them.
    """

    settings: Serving
    pool: GpuPool
    base: Base
    base_address: pulumi.Input[str]  # az://ACCOUNT/models/OWNER/NAME/REVISION
    image: pulumi.Input[str]  # by digest
    store: pulumi.Input[str]  # oci://REGISTRY/adapters
    adapters: tuple[str, ...]
    max_lora_rank: int
    api_keys: Mapping[str, SecretStr]
    tiers: Mapping[str, ClientTier] = field(default_factory=dict)
    others: int = 0
    compiled: pulumi.Input[str] | None = None
    namespace: pulumi.Input[str] = SERVING
    service_account: pulumi.Input[str] = "serving"


def spec_text(args: EngineArgs) -> pulumi.Output[str]:
    """What the containers of these replicas parse."""
    return pulumi.Output.from_input(args.store).apply(
        lambda store: serving_spec(
            args.settings, args.base, store=store, adapters=args.adapters, max_lora_rank=args.max_lora_rank
        )
    )


class Engine(pulumi.ComponentResource):
    """Deployment `engine` with its settings, API keys, disruption budget, priority and network policy.

    A changed setting is a ConfigMap of another name and thus a rollout. Changed keys reach the running replicas.
    """

    deployment: pulumi.Output[str]
    """Name of the Deployment."""
    watch: str
    """Command that waits until all replicas answer: `pulumi up` itself does not."""

    def __init__(self, name: str, args: EngineArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Engine", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)

        text = spec_text(args)
        spec = core.v1.ConfigMap(
            f"{name}-spec",
            metadata=meta.v1.ObjectMetaArgs(
                name=text.apply(lambda content: f"engine-{hashlib.sha256(content.encode()).hexdigest()[:10]}"),
                namespace=args.namespace,
            ),
            data={"serving.json": text},
            immutable=True,
            # ReplicaSets of before mount it: those that a rollout still keeps, and those that `rollout undo` goes back
            # to. A few KB for each change, until the namespace goes.
            opts=pulumi.ResourceOptions(parent=self, retain_on_delete=True),
        )
        keys = core.v1.Secret(
            f"{name}-api-keys",
            metadata=meta.v1.ObjectMetaArgs(name="api-keys", namespace=args.namespace),
            string_data={"keys.json": pulumi.Output.secret(keys_json(args.api_keys, args.tiers))},
            opts=child,
        )
        priority = scheduling.v1.PriorityClass(
            f"{name}-priority",
            metadata=meta.v1.ObjectMetaArgs(name=PRIORITY),
            # Above the Jobs' 0: a replica without a GPU takes one from a tuning Job, which resumes later.
            value=1000,
            description="Replicas that serve; tuning Jobs make room for them.",
            opts=child,
        )
        network_policy(
            "engine",
            args.namespace,
            labels=LABELS,
            ingress=[ingress_from(ROUTER_LABELS, PORT), ingress_scrape(PORT, SIDECAR_METRICS)],
            egress=[egress_https()],  # Entra, base model, registry; names are open to the whole namespace
            resource_name=f"{name}-network",
            opts=child,
        )
        policy.v1.PodDisruptionBudget(
            f"{name}-disruption",
            metadata=meta.v1.ObjectMetaArgs(name="engine", namespace=args.namespace),
            spec=policy.v1.PodDisruptionBudgetSpecArgs(
                max_unavailable=1,  # not minAvailable: with one replica that would forbid every drain
                selector=meta.v1.LabelSelectorArgs(match_labels=LABELS),
                unhealthy_pod_eviction_policy="AlwaysAllow",  # a replica that cannot start must not hold up a drain
            ),
            opts=child,
        )
        deployment = apps.v1.Deployment(
            f"{name}-deployment",
            metadata=meta.v1.ObjectMetaArgs(
                name="engine",
                namespace=args.namespace,
                labels=LABELS,
                # A cold GPU node and a base model that is still being mirrored take up to hours, which `pulumi up`
                # would wait for or fail. `watch` waits instead, unless the settings say that it shall wait.
                annotations={
                    **({} if args.settings.new_first else {"pulumi.com/skipAwait": "true"}),
                    # Where KEDA set the number before, the API server refuses another owner of it without this.
                    **({"pulumi.com/patchForce": "true"} if not args.settings.scales else {}),
                },
            ),
            spec=apps.v1.DeploymentSpecArgs(
                # Also where it is KEDA's: absent from what was there before, it would fall to one.
                replicas=max(1, args.settings.min_replicas),
                selector=meta.v1.LabelSelectorArgs(match_labels=LABELS),
                strategy=apps.v1.DeploymentStrategyArgs(
                    type="RollingUpdate", rolling_update=rollout(args.settings, args.pool, args.others)
                ),
                # The default of ten minutes calls every first rollout failed.
                progress_deadline_seconds=deadline_seconds(args.base),
                template=core.v1.PodTemplateSpecArgs(
                    metadata=meta.v1.ObjectMetaArgs(labels={**LABELS, **IDENTITY_LABEL}, annotations=scraped(PORT)),
                    spec=_pod(args, spec=spec.metadata.name, keys=keys.metadata.name, priority=priority.metadata.name),
                ),
            ),
            opts=pulumi.ResourceOptions.merge(pulumi.ResourceOptions.merge(child, _patience(args)), _owned(args)),
        )
        self.deployment = deployment.metadata.name
        wait = f"--timeout={deadline_seconds(args.base)}s"
        self.watch = f"kubectl --namespace {SERVING} rollout status deployment/engine {wait}"
        self.register_outputs({"deployment": self.deployment, "watch": self.watch})


def _owned(args: EngineArgs) -> pulumi.ResourceOptions:
    """KEDA's number is left alone: where it is set, this program sends none, and else the one that is there."""
    return pulumi.ResourceOptions(ignore_changes=["spec.replicas"] if args.settings.scales else None)


def _patience(args: EngineArgs) -> pulumi.ResourceOptions:
    if not args.settings.new_first:
        return pulumi.ResourceOptions()
    longest = f"{deadline_seconds(args.base)}s"
    return pulumi.ResourceOptions(custom_timeouts=pulumi.CustomTimeouts(create=longest, update=longest))


def deadline_seconds(base: Base) -> int:
    """Seconds until an engine answers, at worst: the model is still mirrored, then a node, then the start itself."""
    return BASE_WAIT_SECONDS + NODE_SECONDS + startup_seconds(base.figures.parameters)


def _pod(
    args: EngineArgs, *, spec: pulumi.Input[str], keys: pulumi.Input[str], priority: pulumi.Input[str]
) -> core.v1.PodSpecArgs:
    return core.v1.PodSpecArgs(
        service_account_name=args.service_account,
        automount_service_account_token=False,  # workload identity projects its own; the API server is not asked
        enable_service_links=False,  # a Service named vllm would set VLLM_PORT=tcp://... and end vLLM (vllm#34199)
        security_context=pod_security(),
        priority_class_name=priority,
        node_selector=gpu_node_selector(args.settings.pool),
        tolerations=gpu_tolerations(args.pool),
        topology_spread_constraints=spread(LABELS),
        termination_grace_period_seconds=grace_seconds(args.settings),
        init_containers=[fetch_base(args), _sidecar(args)],
        containers=[_engine(args)],
        volumes=[
            scratch("models"),
            scratch("state"),
            scratch("cache"),
            scratch("tmp"),
            passed_on(args.settings.gpus),
            config("spec", spec),
            config("faults", FAULTS, optional=True),
            core.v1.VolumeArgs(
                name="keys", secret=core.v1.SecretVolumeSourceArgs(secret_name=keys, default_mode=0o440)
            ),
        ],
    )


def fetch_base(args: EngineArgs) -> core.v1.ContainerArgs:
    """Init container that brings the base model where the spec says it is."""
    return core.v1.ContainerArgs(
        name="fetch-base",
        image=args.image,
        command=[
            *("python", "-m", "blobs", "fetch"),
            args.base_address,
            f"/models/{args.base.folder}",
            *("--wait-seconds", str(BASE_WAIT_SECONDS)),
        ],
        resources=resources(cpu="1", cpu_limit="2", memory="2Gi", storage="1Gi"),
        security_context=container_security(),
        volume_mounts=[mount("models", "/models"), mount("tmp", "/tmp")],
    )


def _sidecar(args: EngineArgs) -> core.v1.ContainerArgs:
    return core.v1.ContainerArgs(
        name="sidecar",
        image=args.image,
        restart_policy="Always",  # a native sidecar: there before the engine, and still there while it drains
        command=[
            *("python", "-m", "serving", "sidecar", "--spec", "/etc/drydock/serving.json", "--state", "/state"),
            *("--engine", f"http://127.0.0.1:{PORT}", "--metrics-address", f"0.0.0.0:{SIDECAR_METRICS}"),
            *("--faults", FAULTS_PATH),
        ],
        ports=[core.v1.ContainerPortArgs(name=SIDECAR_PORT, container_port=SIDECAR_METRICS)],
        resources=resources(
            cpu=f"{SIDECAR_MILLICORES}m", cpu_limit="1", memory=f"{SIDECAR_GIB}Gi", storage=f"{SIDECAR_DISK_GIB}Gi"
        ),
        # The engine is started once this one answers.
        startup_probe=http_probe("/metrics", SIDECAR_METRICS, period=2, failures=60),
        liveness_probe=http_probe("/metrics", SIDECAR_METRICS, period=10, failures=6),
        security_context=container_security(),
        volume_mounts=[
            mount("state", "/state"),
            mount("tmp", "/tmp"),
            mount("spec", "/etc/drydock", read_only=True),
            mount("faults", FAULTS_PATH, read_only=True),
        ],
    )


def _engine(args: EngineArgs) -> core.v1.ContainerArgs:
    share = engine_share(args.pool, args.settings.gpus)
    return core.v1.ContainerArgs(
        name="engine",
        image=args.image,
        command=[
            *("python", "-m", "serving", "engine", "--spec", "/etc/drydock/serving.json", "--state", "/state"),
            *("--host", "0.0.0.0", "--port", str(PORT), "--api-keys", "/etc/drydock-keys/keys.json"),
            *(["--compiled", args.compiled] if args.compiled is not None else []),
        ],
        env=[core.v1.EnvVarArgs(name="DRYDOCK_CACHE", value="/cache")],
        ports=[core.v1.ContainerPortArgs(name="http", container_port=PORT)],
        resources=resources(
            cpu=share.cpu, memory=share.memory, storage=share.ephemeral_storage, gpus=args.settings.gpus
        ),
        startup_probe=http_probe(
            "/health", PORT, period=STARTUP_PERIOD, failures=startup_failures(args.base.figures.parameters)
        ),
        # False until every promoted adapter is loaded and proven. The router asks the same, every second.
        readiness_probe=http_probe("/ready", PORT, period=2, failures=2),
        # Generous: under load /health is slow, and a restart costs minutes (vllm#36960, kserve#6259). An engine that
        # hangs fails it from stall_seconds on: unready at once, it loses nothing by being restarted two minutes later.
        liveness_probe=http_probe("/health", PORT, period=10, failures=12, timeout=10),
        lifecycle=core.v1.LifecycleArgs(
            pre_stop=core.v1.LifecycleHandlerArgs(sleep=core.v1.SleepActionArgs(seconds=PRE_STOP_SECONDS))
        ),
        security_context=container_security(),
        volume_mounts=[
            mount("models", "/models", read_only=True),
            mount("state", "/state"),
            mount("cache", "/cache"),
            mount("tmp", "/tmp"),
            mount("shm", "/dev/shm"),
            mount("spec", "/etc/drydock", read_only=True),
            mount("keys", "/etc/drydock-keys", read_only=True),
        ],
    )
