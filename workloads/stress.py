"""The stress test: a Job that loads the replicas through the router, judges the figures and keeps the report.

With several `workers` a second Job has their pods, and the first one's is their master. Jobs end by themselves, where
Deployments would go on to knock at a master that is gone; and a Job of its own, rather than more pods of the first one,
gives the workers less: no identity, no way to Azure, and thus no right to the report.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pulumi
from pulumi_kubernetes import core, meta

from infra.datasets import Datasets
from infra.settings import Environment, Run, Stress
from infra.storage import REPORTS
from workloads.engine import ROUTER_LABELS
from workloads.jobs import JOB_LABEL, ROLE_WAIT_SECONDS, inputs_hash, job, job_pod, variables
from workloads.placement import apps_node_selector
from workloads.pods import config, container_security, mount, resources, scratch
from workloads.policies import egress_https, egress_to, ingress_from, network_policy
from workloads.router import PORT, inside_url

LABELS = {"app": "stress"}
WORKER_LABELS = {"app": "stress-worker"}
MASTER_PORT = 5557  # Locust's habit
DATASETS = "/work/datasets"
OUT = "/work/out"
SPECS = "/etc/drydock"

SETUP_SECONDS = 1800  # a node of the apps pool, the image on it, the datasets; and at the end the report
JOIN_SECONDS = 900  # once the master is there: nodes of the apps pool for the other workers
# Neither is moved to another node: the load would begin anew, or be one worker short.
STAYS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}

# What the containers may write to, on a read-only root; HOME and XDG_CACHE_HOME (matplotlib's font list) are /cache.
SCRATCH = [mount("work", "/work"), mount("cache", "/cache"), mount("tmp", "/tmp")]
ENVIRONMENT = variables({"HOME": "/cache", "TMPDIR": "/tmp"})


@dataclass(frozen=True)
class StressTestArgs:
    """The settings, in which a run is named, and what other components have made for it; the image by digest.

    `namespace` (that of the router) and `service_account` as outputs of their component make the Job wait for them.
    """

    env: Environment
    image: pulumi.Input[str]
    datasets: Datasets
    account: pulumi.Input[str]  # the storage account's name
    namespace: pulumi.Input[str]
    service_account: pulumi.Input[str]


class StressTest(pulumi.ComponentResource):
    """Job `stress-<hash>` on the apps pool, with its settings, API key and network policy. `pulumi up` does not wait.

    With several workers, a Service by which they find it and Job `stress-<hash>-workers` as well.

    Its name follows from what `drydock:stress` says: another `run`, or another setting there, is another Job, and
    nothing else starts one. Replicas that serve are not loaded because an image or a dataset has changed. A bound that
    was not kept, or a load that could not be measured, ends the Job as failed; its log has the figures.
    """

    job_name: pulumi.Output[str]
    report: pulumi.Output[str]
    """az://ACCOUNT/reports/stress/RUN, where report.html, report.json and every request are once the Job has ended."""
    follow: pulumi.Output[str]
    """Command that shows its log."""

    def __init__(self, name: str, args: StressTestArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:StressTest", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        env, title = args.env, job_name(args.env.stress)
        if not env.stress.clients and env.stress_key is None:
            raise ValueError("the settings name no API key for the stress test")  # infra.settings tells it before
        self.report = pulumi.Output.concat("az://", args.account, f"/{REPORTS}/stress/{env.stress.run}")
        specs = core.v1.ConfigMap(
            title,
            metadata=meta.v1.ObjectMetaArgs(name=title, namespace=args.namespace),
            data={"stress.json": env.stress_spec.model_dump_json(indent=2)},
            immutable=True,
            opts=pulumi.ResourceOptions(parent=self, ignore_changes=["data"]),
        )
        key = core.v1.Secret(
            f"{name}-key",
            metadata=meta.v1.ObjectMetaArgs(name="stress-key", namespace=args.namespace),
            string_data=pulumi.Output.secret(_keys(env)),
            opts=child,
        )
        network_policy(
            "stress",
            args.namespace,
            labels=LABELS,
            ingress=[ingress_from(WORKER_LABELS, MASTER_PORT)] if env.stress.workers > 1 else (),
            egress=[egress_to(ROUTER_LABELS, PORT), egress_https()],  # HTTPS: Entra and Blob
            resource_name=f"{name}-network",
            opts=child,
        )
        if env.stress.workers > 1:
            self._workers(name, args, title, key.metadata.name)
        started = job(
            title,
            args.namespace,
            _pod(args, specs.metadata.name, key.metadata.name, self.report),
            labels=LABELS,
            retries=0,  # another try would be another load, and nobody asked for it
            deadline_seconds=deadline_seconds(env.stress),
            resource_name=title,
            annotations=STAYS,
            # Its resource has the Job's name: what is ignored here is that of this run, never that of the one before.
            opts=pulumi.ResourceOptions(parent=self, ignore_changes=["spec"]),
        )
        self.job_name = started.metadata.name
        self.follow = pulumi.Output.format("kubectl -n {0} logs -f job/{1}", args.namespace, self.job_name)
        self.register_outputs({"job_name": self.job_name, "report": self.report})

    def _workers(self, name: str, args: StressTestArgs, title: str, key: pulumi.Input[str]) -> None:
        """What makes the load where that is not the Job's own pod."""
        child = pulumi.ResourceOptions(parent=self)
        network_policy(
            "stress-worker",
            args.namespace,
            labels=WORKER_LABELS,
            egress=[egress_to(ROUTER_LABELS, PORT), egress_to(LABELS, MASTER_PORT)],
            resource_name=f"{name}-worker-network",
            opts=child,
        )
        master = core.v1.Service(
            f"{name}-master",
            metadata=meta.v1.ObjectMetaArgs(
                name=title, namespace=args.namespace, labels=LABELS, annotations={"pulumi.com/skipAwait": "true"}
            ),
            spec=core.v1.ServiceSpecArgs(
                selector={JOB_LABEL: title},
                ports=[core.v1.ServicePortArgs(name="locust", port=MASTER_PORT, target_port=MASTER_PORT)],
            ),
            opts=child,
        )
        # The Job's name, and not that of the Service, whose resource is the same for every run.
        job(
            f"{title}-workers",
            args.namespace,
            _worker_pod(args, pulumi.Output.format("{0}:{1}", master.metadata.name, MASTER_PORT), key),
            labels=WORKER_LABELS,
            retries=0,
            deadline_seconds=deadline_seconds(args.env.stress),
            resource_name=f"{title}-workers",
            annotations=STAYS,
            pods=args.env.stress.workers,
            equal=True,
            identity=False,
            opts=pulumi.ResourceOptions(parent=self, ignore_changes=["spec"]),
        )


def job_name(settings: Run, kind: str = "stress") -> str:
    """`stress-1a2b3c4d`. Only what was written counts: a new default of ours starts nothing."""
    return f"{kind}-{inputs_hash(settings.model_dump_json(exclude_unset=True), length=8)}"


def deadline_seconds(settings: Stress) -> int:
    """Seconds from the Job's start after which something is stuck: all waits at their longest, and the load."""
    load = settings.ramp_seconds + settings.duration_seconds + 2 * settings.request_timeout_seconds
    join = JOIN_SECONDS if settings.workers > 1 else 0
    return math.ceil(SETUP_SECONDS + ROLE_WAIT_SECONDS + 2 * settings.wait_seconds + join + load)


def fetches(env: Environment, image: pulumi.Input[str], datasets: Datasets) -> list[core.v1.ContainerArgs]:
    """Init containers that bring every dataset of the adapters into DATASETS, for the prompts."""
    addresses = {datasets.digests[adapter]: datasets.blobs[adapter] for adapter in env.adapters}
    return [_fetch(image, digest, address) for digest, address in sorted(addresses.items())]


def key_variable(secret: pulumi.Input[str], *, several: bool = False) -> core.v1.EnvVarArgs:
    """The API key with which a load asks, or `several` by client, from `secret`."""
    name, key = ("DRYDOCK_API_KEYS", "keys") if several else ("DRYDOCK_API_KEY", "key")
    from_secret = core.v1.EnvVarSourceArgs(secret_key_ref=core.v1.SecretKeySelectorArgs(name=secret, key=key))
    return core.v1.EnvVarArgs(name=name, value_from=from_secret)


def _keys(env: Environment) -> dict[str, str]:
    if env.stress.clients:
        return {"keys": json.dumps({name: env.api_keys[name].get_secret_value() for name in env.stress.clients})}
    return {"key": env.stress_key.get_secret_value()} if env.stress_key else {}


def _pod(
    args: StressTestArgs, specs: pulumi.Input[str], key: pulumi.Input[str], report: pulumi.Output[str]
) -> core.v1.PodSpecArgs:
    return job_pod(
        args.service_account,
        [_load(args, key, report)],
        [scratch("work"), scratch("cache"), scratch("tmp"), config("specs", specs)],
        node_selector=apps_node_selector(),
        init_containers=fetches(args.env, args.image, args.datasets),
    )


def _worker_pod(args: StressTestArgs, master: pulumi.Input[str], key: pulumi.Input[str]) -> core.v1.PodSpecArgs:
    return job_pod(
        "default",  # towards Azure and the cluster it is nobody
        [
            core.v1.ContainerArgs(
                name="worker",
                image=args.image,
                command=[
                    *("python", "-m", "stress", "worker", "--master", master),
                    *("--target", inside_url(args.namespace), "--allow-remote"),
                    # Until the master listens: its node and datasets.
                    *("--wait-seconds", str(SETUP_SECONDS + ROLE_WAIT_SECONDS)),
                ],
                env=[*ENVIRONMENT, key_variable(key, several=bool(args.env.stress.clients))],
                resources=resources(cpu="1", memory="1Gi", storage="1Gi"),
                security_context=container_security(),
                volume_mounts=SCRATCH,
            )
        ],
        [scratch("work"), scratch("cache"), scratch("tmp")],
        node_selector=apps_node_selector(),
    )


def _fetch(image: pulumi.Input[str], digest: str, address: pulumi.Input[str]) -> core.v1.ContainerArgs:
    return core.v1.ContainerArgs(
        name=f"fetch-{digest[:12]}",
        image=image,
        command=[
            *("python", "-m", "blobs", "fetch", address, f"{DATASETS}/{digest[:12]}.jsonl"),
            *("--sha256", digest, "--wait-seconds", str(ROLE_WAIT_SECONDS)),
        ],
        env=ENVIRONMENT,
        resources=resources(cpu="250m", cpu_limit="1", memory="512Mi", storage="1Gi"),
        security_context=container_security(),
        volume_mounts=SCRATCH,
    )


def _load(args: StressTestArgs, key: pulumi.Input[str], report: pulumi.Output[str]) -> core.v1.ContainerArgs:
    several = args.env.stress.workers > 1
    return core.v1.ContainerArgs(
        name="stress",
        image=args.image,
        command=[
            *("python", "-m", "stress", "run", "--target", inside_url(args.namespace), "--allow-remote"),
            *("--settings", f"{SPECS}/stress.json", "--dataset", DATASETS, "--out", OUT),
            *("--wait-seconds", str(args.env.stress.wait_seconds), "--push", report),
            *(("--listen", f"0.0.0.0:{MASTER_PORT}", "--join-seconds", str(JOIN_SECONDS)) if several else ()),
        ],
        ports=[core.v1.ContainerPortArgs(name="locust", container_port=MASTER_PORT)] if several else None,
        env=[*ENVIRONMENT, key_variable(key, several=bool(args.env.stress.clients))],
        # One Python process: more than one core is of no use to it, two for what the report draws.
        resources=resources(cpu="1", cpu_limit="2", memory="2Gi", storage="4Gi"),
        security_context=container_security(),
        volume_mounts=[*SCRATCH, mount("specs", SPECS, read_only=True)],
    )
