"""The tuning Job of one adapter: fetch, tune, evaluate and publish in one pod, on one GPU or on several.

On several nodes the Job has a pod on each. They tune together; the first alone evaluates and publishes, and the Job
ends as it does. A pod that is taken from its node comes again and joins the others, which wait (`training.launch`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pulumi
from pulumi_kubernetes import core, meta

from infra.fit import evaluation_context, tuning_load
from infra.settings import Base, GpuPool, Tuning
from serving.spec import EngineSettings, ServingSpec
from training.spec import TuningSettings, TuningSpec
from workloads.jobs import INDEX, JOB_LABEL, REPLACE_ON_CHANGES, ROLE_WAIT_SECONDS, inputs_hash, job, job_pod, variables
from workloads.metrics import scraped
from workloads.mirror import BASE_WAIT_SECONDS
from workloads.placement import gpu_node_selector, gpu_share, gpu_tolerations
from workloads.pods import config, container_security, mount, one_a_node, resources, scratch, shared_memory
from workloads.policies import egress_https, egress_to, ingress_from, ingress_scrape, network_policy

ADAPTER_LABEL = "drydock/adapter"
METRICS = 9401
RENDEZVOUS = 29500  # torchrun's habit; any port would do
DATASET = "/work/dataset.jsonl"
RUN = "/work/run"
SPECS = "/etc/drydock"

NAME_LIMIT = 52  # a pod's name adds six characters, and five more are left for the index of a Job of several pods
HASH_LENGTH = 10
EVALUATION_IMAGE = "spec.template.spec.containers[0].image"

GRACE_SECONDS = 120  # for the running step, a checkpoint, and its copy in Blob

# Runs what follows it in the first pod of several; in the others there is nothing left to do.
_FIRST_ALONE = ("sh", "-c", f'test "${INDEX}" -ne 0 || exec "$@"', "first-alone")

# What all containers of the pod may write to, on a read-only root.
SCRATCH = [mount("work", "/work"), mount("cache", "/cache"), mount("tmp", "/tmp")]
ENVIRONMENT = variables(
    {
        "HOME": "/cache",
        "TMPDIR": "/tmp",
        "DRYDOCK_CACHE": "/cache",
        "HF_HUB_OFFLINE": "1",  # the base model comes from Blob: a mistyped path must fail, not be looked up on a hub
    }
)


@dataclass(frozen=True)
class TuningJobArgs:
    """One adapter and everything that decides it; images by digest.

    `serving` are the replicas' settings: the evaluation measures with the same kind of numbers (dtype) as they serve.
    `account` is the storage account's name. `namespace` and `service_account` as outputs of their component make the
    Job wait for them.
    """

    adapter: str
    settings: TuningSettings
    tuning: Tuning
    serving: EngineSettings
    pool: GpuPool
    base: Base
    base_address: pulumi.Input[str]  # az://ACCOUNT/models/OWNER/NAME/REVISION
    dataset_address: pulumi.Input[str]  # az://ACCOUNT/datasets/SHA256.jsonl
    dataset_digest: str  # hex SHA-256
    training_code: str  # hash of the training image's context: known in a preview, where the image's digest is not
    training_image: pulumi.Input[str]
    serving_image: pulumi.Input[str]
    store: pulumi.Input[str]  # oci://REGISTRY/adapters
    account: pulumi.Input[str]
    namespace: pulumi.Input[str]
    service_account: pulumi.Input[str]


class TuningJob(pulumi.ComponentResource):
    """Job `tune-<adapter>-<hash>` with its settings and network policy. `pulumi up` starts it and does not wait.

    On several nodes a headless Service of the same name makes its pods known to each other.

    Inputs that decide the adapter are in its name: changed ones make another Job, and the one before is deleted,
    running or not, since nobody wants its result any more (what it published stays published). Other changes of its
    pod, such as the pool, the number of GPUs or the gate, make the Job anew under its name: its new pod goes on from
    the checkpoints of that name. Retries and deadline change in place, and so does how often it logs and saves, and
    what of the replicas' settings decides no score, which its next pod reads. A finished Job stays, as the record of
    its verdict: no TTL, which would delete behind Pulumi's back what Pulumi then makes again. The deadline counts from
    the Job's start, the wait for a GPU included. To run a failed one again: `pulumi up --target-replace URN`.
    """

    job_name: pulumi.Output[str]

    def __init__(self, name: str, args: TuningJobArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:TuningJob", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        labels = {"app": "tune", ADAPTER_LABEL: args.adapter}
        gpus, nodes = args.tuning.gpus, args.tuning.nodes
        load = tuning_load(args.settings, args.base.figures, args.pool.sizes, gpus=gpus, nodes=nodes)
        spec = tuning_spec(args.adapter, args.settings, args.base, load.gradient_checkpointing)
        evaluation = pulumi.Output.from_input(args.store).apply(
            lambda store: evaluation_spec(spec, args.base, args.serving, store=store).model_dump_json(indent=2)
        )
        title = job_name(spec, dataset_digest=args.dataset_digest, base=args.base, code=args.training_code)
        specs = core.v1.ConfigMap(
            f"{name}-specs",
            metadata=meta.v1.ObjectMetaArgs(
                name=evaluation.apply(lambda text: _config_name(spec, text)), namespace=args.namespace
            ),
            data={"tuning.json": spec.model_dump_json(indent=2), "evaluate.json": evaluation},
            opts=child,
        )
        together = {JOB_LABEL: title}
        among = {**labels, **together}
        network_policy(
            f"tune-{args.adapter}",
            args.namespace,
            labels=labels,
            # gloo and NCCL listen wherever there is a free port.
            ingress=[ingress_scrape(METRICS), *([ingress_from(among)] if nodes > 1 else ())],
            egress=[egress_https(), *([egress_to(among)] if nodes > 1 else ())],  # Entra, Blob, registry
            resource_name=f"{name}-network",
            opts=child,
        )
        if nodes > 1:
            # The name of each pod; of one that is not ready as well, or none could find the first.
            core.v1.Service(
                f"{name}-pods",
                metadata=meta.v1.ObjectMetaArgs(
                    name=title, namespace=args.namespace, labels=labels, annotations={"pulumi.com/skipAwait": "true"}
                ),
                spec=core.v1.ServiceSpecArgs(
                    cluster_ip="None",
                    publish_not_ready_addresses=True,
                    selector=together,
                    ports=[core.v1.ServicePortArgs(name="rendezvous", port=RENDEZVOUS)],
                ),
                opts=child,
            )
        started = job(
            title,
            args.namespace,
            _pod(args, title, specs.metadata.name),
            pods=nodes,
            labels=labels,
            retries=args.tuning.retries,
            deadline_seconds=round(args.tuning.deadline_hours * 3600),
            resource_name=title,
            annotations={
                **scraped(METRICS),
                # No node is taken away from under a training to save its cost (autoscaler, Karpenter).
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
            },
            # New serving code must not tune again: a Job keeps the image with which it is to evaluate. Its resource has
            # the Job's name, or the Job that comes after it would keep that image too.
            opts=pulumi.ResourceOptions(
                parent=self, replace_on_changes=REPLACE_ON_CHANGES, ignore_changes=[EVALUATION_IMAGE]
            ),
        )
        self.job_name = started.metadata.name
        self.register_outputs({"job_name": self.job_name})


def tuning_spec(adapter: str, settings: TuningSettings, base: Base, gradient_checkpointing: bool) -> TuningSpec:
    """The settings with the places that base and dataset have in the pod, and with what was decided for its GPUs."""
    decided = {"adapter": adapter, "base_model": base_folder(base), "dataset": DATASET}
    return TuningSpec(**settings.model_dump() | decided | {"gradient_checkpointing": gradient_checkpointing})


def evaluation_spec(spec: TuningSpec, base: Base, serving: EngineSettings, *, store: str) -> ServingSpec:
    """How the candidate is served while it is measured: as the replicas do, at the context that its rows need."""
    return ServingSpec(
        **serving.model_dump(include=set(EngineSettings.model_fields) - {"max_model_len"}),
        max_model_len=evaluation_context(spec.max_seq_length, base.figures),
        base_model=spec.base_model,
        base_name=base.served_name,
        store=store,
        max_lora_rank=spec.lora_r,
    )


def job_name(spec: TuningSpec, *, dataset_digest: str, base: Base, code: str) -> str:
    """`tune-my-adapter-1a2b3c4d5e`: the same name for the same weights. Where it runs and its gate are not in it.

    `code` stands for the training code and its libraries.
    """
    inputs = (as_text(spec.result_settings()), dataset_digest, base.model, base.revision, code)
    return named(spec.adapter, inputs_hash(*inputs, length=HASH_LENGTH))


def named(adapter: str, mark: str) -> str:
    """`tune-<adapter>-<mark>`, within the length that a Job's name may have."""
    room = NAME_LIMIT - len("tune--") - HASH_LENGTH
    return f"tune-{adapter[:room].rstrip('-')}-{mark}"


DECIDES_SCORES = ("device", "dtype", "gpus", "max_model_len", "max_lora_rank", "base_model", "base_name", "store")
"""Of how the candidate is served. For any other setting of the replicas nothing is evaluated, and promoted, again."""


def _config_name(spec: TuningSpec, evaluation: str) -> str:
    """Another one, and with it another pod, for what a running pod would have to know; see `TuningJob`."""
    known = spec.result_settings() | spec.model_dump(mode="json", include={"gate", "gradient_checkpointing"})
    served = json.loads(evaluation)
    decides = {name: served[name] for name in DECIDES_SCORES}
    return named(spec.adapter, inputs_hash(as_text(known), as_text(decides), length=HASH_LENGTH))


def as_text(settings: dict[str, Any]) -> str:
    """The same text for the same settings, for a hash."""
    return json.dumps(settings, sort_keys=True)


def base_folder(base: Base) -> str:
    """Where the base lies in the pod."""
    return f"/work/models/{base.folder}"


def _pod(args: TuningJobArgs, title: str, specs: pulumi.Input[str]) -> core.v1.PodSpecArgs:
    nodes = args.tuning.nodes
    return job_pod(
        args.service_account,
        [
            on_gpu(
                args.pool,
                "evaluate",
                args.serving_image,
                [
                    *(_FIRST_ALONE if nodes > 1 else ()),
                    *("python", "-m", "serving", "evaluate", "--spec", f"{SPECS}/evaluate.json", "--run", RUN),
                    "--store",
                    args.store,
                ],
                gpus=args.serving.gpus,
            )
        ],
        [
            scratch("work"),
            scratch("cache"),
            scratch("tmp"),
            # For each GPU what torch's and vLLM's processes, and those of NCCL, pass to each other.
            shared_memory(f"{2 * max(args.tuning.gpus, args.serving.gpus)}Gi"),
            config("specs", specs),
        ],
        node_selector=gpu_node_selector(args.tuning.pool),
        tolerations=gpu_tolerations(args.pool),
        grace_seconds=GRACE_SECONDS,
        affinity=one_a_node({JOB_LABEL: title}) if nodes > 1 else None,
        subdomain=title if nodes > 1 else None,
        # One after the other, so that they share the GPUs and the weights on the disk.
        init_containers=[
            fetching(
                args.training_image,
                "fetch-base",
                args.base_address,
                base_folder(args.base),
                *("--wait-seconds", str(BASE_WAIT_SECONDS)),
            ),
            fetching(
                args.training_image,
                "fetch-dataset",
                args.dataset_address,
                DATASET,
                *("--sha256", args.dataset_digest, "--wait-seconds", str(ROLE_WAIT_SECONDS)),
            ),
            on_gpu(
                args.pool,
                "tune",
                args.training_image,
                [
                    *("python", "-m", "training", "tune", "--spec", f"{SPECS}/tuning.json", "--out", RUN),
                    "--checkpoints",
                    pulumi.Output.concat("az://", args.account, "/checkpoints/", title),
                    *("--metrics-address", f"0.0.0.0:{METRICS}"),
                    *(("--processes", str(args.tuning.gpus)) if args.tuning.gpus > 1 else ()),
                    *(_together(title, nodes) if nodes > 1 else ()),
                ],
                gpus=args.tuning.gpus,
                ports=[core.v1.ContainerPortArgs(name="metrics", container_port=METRICS)],
            ),
        ],
    )


def _together(title: str, nodes: int) -> tuple[str, ...]:
    """Options of `tune` that are the same in each pod: a Job has one template. Its number is in the environment."""
    # Kubernetes gives pod 0 of an Indexed Job this host name, and its Service makes that known.
    return ("--nodes", str(nodes), "--rendezvous", f"{title}-0.{title}:{RENDEZVOUS}", "--rejoin")


def fetching(
    image: pulumi.Input[str], name: str, source: pulumi.Input[str], target: str, *options: str
) -> core.v1.ContainerArgs:
    """A container of the training `image` that fetches `source` (az://...) into the pod's folder."""
    return core.v1.ContainerArgs(
        name=name,
        image=image,
        command=["python", "-m", "blobs", "fetch", source, target, *options],
        env=ENVIRONMENT,
        # The files lie in a volume, which counts against the disk of the whole pod: that of the containers below.
        resources=resources(cpu="1", cpu_limit="2", memory="2Gi", storage="1Gi"),
        security_context=container_security(),
        volume_mounts=SCRATCH,
    )


def on_gpu(
    pool: GpuPool,
    name: str,
    image: pulumi.Input[str],
    command: list[pulumi.Input[str]],
    gpus: int = 1,
    ports: list[core.v1.ContainerPortArgs] | None = None,
) -> core.v1.ContainerArgs:
    """A container with the share of the node that `gpus` have; of those that run in turn, the pod asks for the most."""
    share = gpu_share(pool, gpus)
    return core.v1.ContainerArgs(
        name=name,
        image=image,
        command=command,
        env=ENVIRONMENT,
        ports=ports,
        resources=resources(cpu=share.cpu, memory=share.memory, storage=share.ephemeral_storage, gpus=gpus),
        security_context=container_security(),
        volume_mounts=[*SCRATCH, mount("shm", "/dev/shm"), mount("specs", SPECS, read_only=True)],
    )
