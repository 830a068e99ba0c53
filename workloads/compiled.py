"""The Job that compiles the graphs of the replicas once and keeps them in Blob: a new replica need not compile."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pulumi
from pulumi_kubernetes import core, meta

from infra.settings import Base, GpuPool
from infra.storage import COMPILED
from serving.engine import graph_arguments
from serving.spec import ServingSpec
from workloads.engine import (
    EngineArgs,
    deadline_seconds,
    engine_share,
    fetch_base,
    passed_on,
    spec_text,
    startup_seconds,
)
from workloads.jobs import REPLACE_ON_CHANGES, ROLE_WAIT_SECONDS, digest_of, inputs_hash, job, job_pod
from workloads.placement import gpu_node_selector, gpu_tolerations
from workloads.pods import config, container_security, mount, resources, scratch
from workloads.policies import egress_https, network_policy

LABELS = {"app": "compile"}
RETRIES = 2
SPECS = "/etc/drydock"


@dataclass(frozen=True)
class CompiledArgs:
    """The replicas for which is compiled: everything is as theirs. `address` is what they are told (compiled_address).

    `service_account`, the only one that may write what replicas run, as an output makes the Job wait for it.
    """

    replicas: EngineArgs
    address: pulumi.Output[str]
    service_account: pulumi.Input[str]


class Compiled(pulumi.ComponentResource):
    """Job `compile-<hash>` on the serving pool, with its settings and network policy. `pulumi up` does not wait.

    Its name follows from all that decides compiled graphs: image, vLLM's arguments, base model, GPU. Without a
    priority, it waits for a GPU that no replica wants, and leaves it to a replica that does. It holds one for the
    minutes of one start (on the first `up` it waits there for the base model, as the replicas do), and ends at its
    deadline if it gets none. No replica waits for it: those that start meanwhile compile.
    """

    job_name: pulumi.Output[str]

    def __init__(self, name: str, args: CompiledArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Compiled", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        replicas, gpus = args.replicas, args.replicas.settings.gpus
        title = args.address.apply(lambda address: f"compile-{address.rpartition('/')[2]}")
        specs = core.v1.ConfigMap(
            f"{name}-spec",
            # Not immutable and not of its content's name: what does not reach vLLM may change, and no Job runs for it.
            metadata=meta.v1.ObjectMetaArgs(name=title, namespace=replicas.namespace),
            data={"serving.json": spec_text(replicas)},
            opts=child,
        )
        network_policy(
            "compile",
            replicas.namespace,
            labels=LABELS,
            egress=[egress_https()],  # Entra and Blob
            resource_name=f"{name}-network",
            opts=child,
        )
        started = job(
            title,
            replicas.namespace,
            job_pod(
                args.service_account,
                [_container(args)],
                # As a replica's: the paths are part of what is compiled.
                [scratch("models"), scratch("cache"), scratch("tmp"), passed_on(gpus), config("specs", title)],
                node_selector=gpu_node_selector(replicas.settings.pool),
                init_containers=[fetch_base(replicas)],
                tolerations=gpu_tolerations(replicas.pool),
            ),
            labels=LABELS,
            retries=RETRIES,
            deadline_seconds=deadline_seconds(replicas.base) + ROLE_WAIT_SECONDS,
            resource_name=f"{name}-job",
            opts=pulumi.ResourceOptions(parent=self, replace_on_changes=REPLACE_ON_CHANGES, depends_on=[specs]),
        )
        self.job_name = started.metadata.name
        self.register_outputs({"job_name": self.job_name})


def compiled_address(replicas: EngineArgs, account: pulumi.Input[str]) -> pulumi.Output[str]:
    """az://ACCOUNT/compiled/HASH, where the graphs of `replicas` are once a Job has put them there."""
    hashed = pulumi.Output.all(spec_text(replicas), replicas.image).apply(
        lambda known: key(ServingSpec.model_validate_json(known[0]), replicas.base, replicas.pool, known[1])
    )
    return pulumi.Output.concat("az://", account, f"/{COMPILED}/", hashed)


def key(spec: ServingSpec, base: Base, pool: GpuPool, image: str) -> str:
    """Ten hex digits for all that decides compiled graphs; `image` by digest."""
    model = f"{base.model}@{base.revision}"
    return inputs_hash(digest_of(image), json.dumps(graph_arguments(spec)), model, ",".join(pool.sizes), length=10)


def _container(args: CompiledArgs) -> core.v1.ContainerArgs:
    gpus, base = args.replicas.settings.gpus, args.replicas.base
    share = engine_share(args.replicas.pool, gpus)
    return core.v1.ContainerArgs(
        name="compile",
        image=args.replicas.image,
        command=[
            *("python", "-m", "serving", "compile", "--spec", f"{SPECS}/serving.json", "--into", args.address),
            *("--timeout-seconds", str(startup_seconds(base.figures.parameters))),
        ],
        env=[core.v1.EnvVarArgs(name="DRYDOCK_CACHE", value="/cache")],
        resources=resources(cpu=share.cpu, memory=share.memory, storage=share.ephemeral_storage, gpus=gpus),
        security_context=container_security(),
        volume_mounts=[
            mount("models", "/models", read_only=True),
            mount("cache", "/cache"),
            mount("tmp", "/tmp"),
            mount("shm", "/dev/shm"),
            mount("specs", SPECS, read_only=True),
        ],
    )
