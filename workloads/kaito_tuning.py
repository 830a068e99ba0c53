"""Tuning by KAITO: of each adapter a Job that has KAITO tune, and one that adopts, evaluates and publishes the result.

The first (`training.kaito`) holds no GPU: it makes the Workspace, waits, and takes it away again, and with it the node
that KAITO ordered. The second is suspended until the first lets it go on, so that no GPU waits for another.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import pulumi
import yaml
from pulumi_kubernetes import core, meta, rbac

from infra.datasets import Datasets, Told
from infra.fit import tuning_load
from infra.identities import CONDUCTOR, KAITO_TUNING, Identity
from infra.images import Images
from infra.kaito import TUNABLE
from infra.kaito_types import (
    API_VERSION,
    Data,
    LabelSelector,
    Preset,
    Tuning,
    Volume,
    VolumeClaim,
    Workspace,
    WorkspaceResource,
)
from infra.place import Place
from infra.settings import Environment
from infra.storage import KAITO, KAITO_DATA, KAITO_OUT
from serving.spec import ServingSpec
from training.spec import TuningSettings, TuningSpec
from workloads.jobs import ROLE_WAIT_SECONDS, inputs_hash, job, job_pod
from workloads.mirror import BASE_WAIT_SECONDS
from workloads.namespaces import Namespace, NamespaceArgs
from workloads.placement import apps_node_selector, gpu_node_selector, gpu_tolerations
from workloads.pods import (
    TOKEN,
    api_token,
    config,
    container_security,
    mount,
    resources,
    scratch,
    shared_memory,
)
from workloads.policies import egress_https, network_policy
from workloads.tuning import (
    ADAPTER_LABEL,
    DATASET,
    ENVIRONMENT,
    HASH_LENGTH,
    RUN,
    SCRATCH,
    SPECS,
    as_text,
    base_folder,
    evaluation_spec,
    fetching,
    named,
    on_gpu,
    tuning_spec,
)

Method = Literal["lora", "qlora"]

LABELS = {"app": "kaito"}
NODE_LABEL = "drydock/kaito"
CONFIG_FILE = "training_config.yaml"
OUTPUT = "/mnt/results"  # KAITO mounts the output volume there, as the config says; the input's place is fixed
SEED = 42
TRL_LENGTH = 1024
PEER = "/work/peer"  # KAITO's files as it left them
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MARGIN_SECONDS = 1800  # of the Job's own deadline beyond that of `training.kaito`, which takes the Workspace away
SKIP_AWAIT = {"pulumi.com/skipAwait": "true"}


def training_config(settings: TuningSettings, told: Told, *, gradient_checkpointing: bool | None) -> str:
    """KAITO's training_config.yaml: `settings` by the names of transformers, TRL and PEFT, which its parser takes.

    `gradient_checkpointing` None leaves that to KAITO: it does since v0.11, and before it does not.
    Sections and fields: presets/workspace/tuning/text-generation/cli.py and parser.py of v0.12 (its SFTConfig is TRL's,
    at least 1.0, on transformers 5.14).
    """
    steps = math.ceil(told.rows / settings.per_device_train_batch_size / settings.gradient_accumulation_steps)
    schedule = settings.lr_scheduler_type
    quantization: dict[str, Any] = {"load_in_4bit": settings.load_in_4bit}
    if settings.load_in_4bit:
        quantization |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": True,
        }
    sections = {
        "ModelConfig": {"torch_dtype": "bfloat16", "local_files_only": True, "device_map": "auto"},
        "QuantizationConfig": quantization,
        "LoraConfig": {
            "r": settings.lora_r,
            "lora_alpha": settings.lora_alpha,
            "lora_dropout": settings.lora_dropout,
            "target_modules": list(settings.lora_target_modules),
        },
        "TrainingArguments": {
            "output_dir": OUTPUT,
            "save_strategy": "no",
            "ddp_find_unused_parameters": False,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "constant_with_warmup" if schedule == "constant" else schedule,
            # In steps: as a share, releases of transformers know it by different names.
            "warmup_steps": math.ceil(settings.warmup_ratio * steps * settings.num_train_epochs),
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "num_train_epochs": settings.num_train_epochs,
            "per_device_train_batch_size": settings.per_device_train_batch_size,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            **({} if gradient_checkpointing is None else {"gradient_checkpointing": gradient_checkpointing}),
            # TRL's own default else: releases before v0.11 know no such field, and end at once where there is one.
            **({"max_length": settings.max_seq_length} if settings.max_seq_length != TRL_LENGTH else {}),
            "logging_steps": settings.logging_steps,
            "seed": SEED,
        },
        # `mlm` is on by default, and no such model has the token for it.
        "DataCollator": {"mlm": False},
        # Below /mnt. Without a path it would take whichever file it finds first. It shuffles without a seed: the
        # trainer's own sampler, which has one, shuffles as well. All rows are for tuning: others are held out by us.
        "DatasetConfig": {
            "dataset_path": f"data/{told.digest}.jsonl",
            "shuffle_dataset": False,
            "train_test_split": 1,
        },
    }
    return yaml.safe_dump({"training_config": sections}, sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """What is known of one adapter's tuning at the preview.

    `title`, of Workspace, volume and folder of the result, follows from all that decides the weights; `evaluation`, of
    the Job that judges them, from its gate as well, and `conductor` is that of the Job before it.
    """

    adapter: str
    title: str
    evaluation: str
    conductor: str
    config: str
    spec: TuningSpec
    serving: ServingSpec
    workspace: dict[str, Any]


def plan(env: Environment, adapter: str, told: Told, *, dataset_digest: str) -> Plan:
    """The tuning of `adapter` on the rows `told`. `dataset_digest`: of the whole dataset, held-out rows included."""
    settings, pool = env.adapters[adapter], env.pools[env.tuning.pool]
    preset, commit = TUNABLE[env.base.model.lower()]
    load = tuning_load(settings, env.base.figures, pool.sizes)
    # Asked for, or needed: elsewhere it is as KAITO likes.
    again = load.gradient_checkpointing or settings.gradient_checkpointing
    text = training_config(settings, told, gradient_checkpointing=again)
    method: Method = "qlora" if settings.load_in_4bit else "lora"
    title = named(adapter, inputs_hash(text, method, preset, commit, length=HASH_LENGTH))
    spec = tuning_spec(adapter, settings, env.base, load.gradient_checkpointing)
    serving = evaluation_spec(spec, env.base, env.serving, store="oci://")  # known later
    asked = as_text(spec.model_dump(mode="json", include={"gate", "held_out_fraction", "max_seq_length"}))
    judged = inputs_hash(title, dataset_digest, asked, serving.model_dump_json(exclude={"store"}), length=HASH_LENGTH)
    evaluation = named(adapter, judged)
    return Plan(
        adapter=adapter,
        title=title,
        evaluation=evaluation,
        conductor=evaluation.replace("tune-", "kaito-", 1),
        config=text,
        spec=spec,
        serving=serving,
        workspace=_workspace(title, preset, method, pool.vm_size),
    )


def _workspace(title: str, preset: str, method: Method, vm_size: str) -> dict[str, Any]:
    """As the API server takes it."""

    def data(claim: str) -> Data:
        return Data(volume_source=Volume(persistent_volume_claim=VolumeClaim(claim_name=claim)))

    tuning = Tuning(preset=Preset(name=preset), method=method, config=title, input=data(KAITO_DATA), output=data(title))
    nodes = LabelSelector(match_labels={NODE_LABEL: title})
    head = {"apiVersion": API_VERSION, "kind": "Workspace", "metadata": {"name": title, "namespace": KAITO_TUNING}}
    resource = WorkspaceResource(instance_type=vm_size, label_selector=nodes)
    return head | Workspace(resource=resource, tuning=tuning).written()


@dataclass(frozen=True)
class KaitoTuningArgs:
    """An environment whose `tuning.runtime` is kaito, and of which `infra.kaito.tuning_refusals` has no word.

    `account` is the storage account's name; `identity` the one by which KAITO's volumes are mounted; `namespace` that
    of our own tuning Jobs, which evaluate.
    """

    env: Environment
    place: Place
    base_address: pulumi.Input[str]
    datasets: Datasets
    images: Images
    store: pulumi.Input[str]
    account: pulumi.Input[str]
    namespace: Namespace
    identity: Identity


class KaitoTuning(pulumi.ComponentResource):
    """Namespace `drydock-kaito-tuning` with a Job for each adapter that has KAITO tune; `job_names` by adapter.

    The Workspaces are these Jobs' and not Pulumi's: they come and go with the training, and Pulumi would make one again
    that has done its work. A Job that is deleted, since its adapter is gone or another one is wanted, takes its
    Workspace with it. Whatever decides the weights or the verdict is in the names, and another Job starts; other
    settings, such as `retries`, are those of the next one.
    """

    job_names: dict[str, pulumi.Output[str]]

    def __init__(self, name: str, args: KaitoTuningArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:KaitoTuning", name, None, opts)
        env, child = args.env, pulumi.ResourceOptions(parent=self)
        plans = [
            plan(env, adapter, told, dataset_digest=args.datasets.digests[adapter])
            for adapter, told in args.datasets.for_kaito.items()
        ]
        # Not `restricted`: KAITO's pods run as root. GPUs for those that replace others meanwhile.
        accounts = {CONDUCTOR: args.identity.client_id}
        space = Namespace(
            f"{name}-namespace", NamespaceArgs(KAITO_TUNING, "baseline", 2 * max(1, len(plans)), accounts), child
        )
        policies = [
            network_policy(
                "kaito",
                space.name,
                labels={},
                egress=[egress_https()],  # KAITO's pods: its registry; ours: the API server, Entra and Blob
                resource_name=f"{name}-network",
                opts=child,
            ),
            network_policy(
                "evaluate",
                args.namespace.name,
                labels={"app": "tune"},
                egress=[egress_https()],  # Entra, Blob, registry
                resource_name=f"{name}-evaluation-network",
                opts=child,
            ),
        ]
        rights = self._rights(name, args, space, plans, child)
        rows = self._volume(name, args, space, KAITO_DATA, KAITO_DATA, read_only=True)
        self.job_names = {}
        for each in plans:
            evaluation = self._evaluation(args, each)
            config_map = core.v1.ConfigMap(
                f"{name}-{each.title}",
                metadata=meta.v1.ObjectMetaArgs(name=each.title, namespace=space.name),
                data={CONFIG_FILE: each.config},
                immutable=True,
                opts=child,
            )
            result = self._volume(name, args, space, each.title, f"{KAITO_OUT}/{each.title}", read_only=False)
            before = [*policies, *rights, rows, result, config_map, evaluation, *args.datasets.uploads_for_kaito]
            self.job_names[each.adapter] = self._conductor(args, space, each, before)
        self.register_outputs({"job_names": self.job_names})

    def _volume(
        self, name: str, args: KaitoTuningArgs, space: Namespace, of: str, folder: str, *, read_only: bool
    ) -> core.v1.PersistentVolumeClaim:
        """Claim `of` for a folder of the container, mounted by the identity of KAITO's pods: no key, no secret.

        docs/workload-identity-static-pv-mount.md and docs/driver-parameters.md of kubernetes-sigs/blob-csi-driver. Of
        the volume's own `readOnly` such a mount takes no notice, hence the option.
        """
        child = pulumi.ResourceOptions(parent=self)
        options = ["-o allow_other", "--file-cache-timeout-in-seconds=120", f"--subdirectory={folder}"]
        size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]  # Blob has no limit of its own, and a claim must name one
        volume = core.v1.PersistentVolume(
            f"{name}-{of}-volume",
            metadata=meta.v1.ObjectMetaArgs(name=f"{KAITO_TUNING}-{of}", annotations=SKIP_AWAIT),
            spec=core.v1.PersistentVolumeSpecArgs(
                capacity=size,
                access_modes=modes,
                persistent_volume_reclaim_policy="Retain",
                storage_class_name="",
                claim_ref=core.v1.ObjectReferenceArgs(
                    api_version="v1", kind="PersistentVolumeClaim", namespace=KAITO_TUNING, name=of
                ),
                mount_options=[*options, *(["-o ro"] if read_only else [])],
                csi=core.v1.CSIPersistentVolumeSourceArgs(
                    driver="blob.csi.azure.com",
                    volume_handle=pulumi.Output.concat(args.account, f"_{KAITO}_{of}"),
                    volume_attributes={
                        "protocol": "fuse2",
                        "resourcegroup": args.place.group,
                        "storageaccount": args.account,
                        "containerName": KAITO,
                        "clientID": args.identity.client_id,
                        "mountWithWorkloadIdentityToken": "true",
                    },
                ),
            ),
            opts=child,
        )
        return core.v1.PersistentVolumeClaim(
            f"{name}-{of}-claim",
            metadata=meta.v1.ObjectMetaArgs(name=of, namespace=space.name, annotations=SKIP_AWAIT),
            spec=core.v1.PersistentVolumeClaimSpecArgs(
                access_modes=modes,
                storage_class_name="",
                volume_name=volume.metadata.name,
                resources=core.v1.VolumeResourceRequirementsArgs(requests=size),
            ),
            opts=child,
        )

    def _rights(
        self,
        name: str,
        args: KaitoTuningArgs,
        space: Namespace,
        plans: list[Plan],
        child: pulumi.ResourceOptions,
    ) -> list[pulumi.Resource]:
        """What `training.kaito` asks of the API server, and no more."""
        if not plans:
            return []  # a rule that names nothing would mean everything
        subject = rbac.v1.SubjectArgs(
            kind="ServiceAccount", name=space.service_accounts[CONDUCTOR], namespace=space.name
        )
        bindings: list[pulumi.Resource] = []
        for where, namespace, rules in (
            ("kaito", space.name, own_rules([each.title for each in plans])),
            ("tuning", args.namespace.name, evaluation_rules([each.evaluation for each in plans])),
        ):
            metadata = meta.v1.ObjectMetaArgs(name=f"kaito-{CONDUCTOR}", namespace=namespace)
            role = rbac.v1.Role(f"{name}-{where}-role", metadata=metadata, rules=rules, opts=child)
            bindings.append(
                rbac.v1.RoleBinding(
                    f"{name}-{where}-binding",
                    metadata=metadata,
                    role_ref=rbac.v1.RoleRefArgs(
                        api_group="rbac.authorization.k8s.io", kind="Role", name=role.metadata.name
                    ),
                    subjects=[subject],
                    opts=child,
                )
            )
        return bindings

    def _conductor(
        self, args: KaitoTuningArgs, space: Namespace, each: Plan, before: list[pulumi.Resource]
    ) -> pulumi.Output[str]:
        """Job `kaito-<adapter>-<hash>`, which has KAITO tune."""
        env, labels = args.env, LABELS | {ADAPTER_LABEL: each.adapter}
        specs = core.v1.ConfigMap(
            each.conductor,
            metadata=meta.v1.ObjectMetaArgs(name=each.conductor, namespace=space.name),
            data={"workspace.json": json.dumps(each.workspace, indent=2)},
            opts=pulumi.ResourceOptions(parent=self),
        )
        result = pulumi.Output.concat("az://", args.account, f"/{KAITO}/{KAITO_OUT}/{each.title}")
        hours = env.tuning.deadline_hours
        container = core.v1.ContainerArgs(
            name="kaito",
            image=args.images.training,
            command=[
                *("python", "-m", "training.kaito", "--workspace", f"{SPECS}/workspace.json"),
                *("--job", each.conductor, "--then", args.namespace.name.apply(lambda n: f"{n}/{each.evaluation}")),
                *("--result", result, "--hours", f"{hours:g}", "--retries", str(env.tuning.retries)),
                *("--wait-seconds", str(ROLE_WAIT_SECONDS)),
            ],
            env=ENVIRONMENT,
            resources=resources(cpu="100m", cpu_limit="1", memory="512Mi", storage="256Mi"),
            security_context=container_security(),
            volume_mounts=[*SCRATCH, mount("specs", SPECS, read_only=True), mount("token", TOKEN, read_only=True)],
        )
        started = job(
            each.conductor,
            space.name,
            job_pod(
                space.service_accounts[CONDUCTOR],
                [container],
                [scratch("work"), scratch("cache"), scratch("tmp"), config("specs", specs.metadata.name), api_token()],
                node_selector=apps_node_selector(),
            ),
            labels=labels,
            retries=env.tuning.retries,
            deadline_seconds=round(hours * 3600) + MARGIN_SECONDS,
            resource_name=each.conductor,
            # Its resource has the Job's name: what is ignored here is that of this run, never that of the one before.
            opts=pulumi.ResourceOptions(parent=self, depends_on=before, ignore_changes=["spec"]),
        )
        name: pulumi.Output[str] = started.metadata.name
        return name

    def _evaluation(self, args: KaitoTuningArgs, each: Plan) -> pulumi.Resource:
        """Job `tune-<adapter>-<hash>` beside our own: from KAITO's files to the verdict, by the same commands."""
        env, pool = args.env, args.env.pools[args.env.tuning.pool]
        store = pulumi.Output.from_input(args.store)
        specs = core.v1.ConfigMap(
            each.evaluation,
            metadata=meta.v1.ObjectMetaArgs(name=each.evaluation, namespace=args.namespace.name),
            data={
                "tuning.json": each.spec.model_dump_json(indent=2),
                "evaluate.json": store.apply(
                    lambda found: each.serving.model_copy(update={"store": found}).model_dump_json(indent=2)
                ),
            },
            opts=pulumi.ResourceOptions(parent=self),
        )
        result = pulumi.Output.concat("az://", args.account, f"/{KAITO}/{KAITO_OUT}/{each.title}/")
        image, wait = args.images.training, str(ROLE_WAIT_SECONDS)
        digest = args.datasets.digests[each.adapter]
        rows = ("--sha256", digest, "--wait-seconds", wait)
        pod = job_pod(
            args.namespace.service_accounts["tuning"],
            [
                on_gpu(
                    pool,
                    "evaluate",
                    args.images.serving,
                    [
                        *("python", "-m", "serving", "evaluate", "--spec", f"{SPECS}/evaluate.json", "--run", RUN),
                        *("--store", store),
                    ],
                    gpus=env.serving.gpus,
                )
            ],
            [
                *(scratch("work"), scratch("cache"), scratch("tmp"), shared_memory(f"{2 * env.serving.gpus}Gi")),
                config("specs", specs.metadata.name),
            ],
            node_selector=gpu_node_selector(env.tuning.pool),
            tolerations=gpu_tolerations(pool),
            init_containers=[
                fetching(
                    image, "fetch-base", args.base_address, base_folder(env.base), "--wait-seconds",
                    str(BASE_WAIT_SECONDS),
                ),
                fetching(image, "fetch-dataset", args.datasets.blobs[each.adapter], DATASET, *rows),
                *(
                    fetching(
                        image, f"fetch-adapter-{number}", pulumi.Output.concat(result, file), f"{PEER}/{file}",
                        "--wait-seconds", wait,
                    )
                    for number, file in enumerate(ADAPTER_FILES)
                ),
                core.v1.ContainerArgs(
                    name="adopt",
                    image=image,
                    command=[
                        *("python", "-m", "training", "adopt", "--spec", f"{SPECS}/tuning.json"),
                        *("--adapter", PEER, "--out", RUN),
                    ],
                    env=ENVIRONMENT,
                    resources=resources(cpu="1", cpu_limit="2", memory="4Gi", storage="1Gi"),
                    security_context=container_security(),
                    volume_mounts=[*SCRATCH, mount("specs", SPECS, read_only=True)],
                ),
            ],
        )  # fmt: skip
        waiting: pulumi.Resource = job(
            each.evaluation,
            args.namespace.name,
            pod,
            labels={"app": "tune", ADAPTER_LABEL: each.adapter},
            retries=env.tuning.retries,
            deadline_seconds=round(env.tuning.deadline_hours * 3600),
            suspend=True,
            resource_name=each.evaluation,
            annotations={
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
            },
            opts=pulumi.ResourceOptions(parent=self, ignore_changes=["spec"]),
        )
        return waiting


def own_rules(workspaces: list[str]) -> list[rbac.v1.PolicyRuleArgs]:
    """In KAITO's namespace. `create` cannot be held to names."""
    return [
        rbac.v1.PolicyRuleArgs(api_groups=["kaito.sh"], resources=["workspaces"], verbs=["create"]),
        rbac.v1.PolicyRuleArgs(
            api_groups=["kaito.sh"],
            resources=["workspaces"],
            resource_names=workspaces,
            verbs=["get", "patch", "delete"],
        ),
        rbac.v1.PolicyRuleArgs(api_groups=["batch"], resources=["jobs"], verbs=["get"]),
    ]


def evaluation_rules(jobs: list[str]) -> list[rbac.v1.PolicyRuleArgs]:
    """In the namespace of our tuning Jobs: those that wait for KAITO may go on."""
    return [
        rbac.v1.PolicyRuleArgs(api_groups=["batch"], resources=["jobs"], resource_names=jobs, verbs=["get", "patch"])
    ]
