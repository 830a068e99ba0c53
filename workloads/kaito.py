"""Serving by KAITO: one Workspace, or an InferenceSet of several, to which our router leads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_kubernetes
import yaml
from pulumi_kubernetes import core, meta

from common.lora import vllm_lora_rank
from infra.kaito import preset
from infra.kaito_types import (
    API_VERSION,
    NO_BENCHMARK,
    PORT,
    SET_LABEL,
    WORKSPACE_LABEL,
    Adapter,
    AdapterSource,
    Inference,
    InferenceSetSpec,
    LabelSelector,
    Preset,
    PresetOptions,
    SetResource,
    SetTemplate,
    Workspace,
    WorkspaceResource,
)
from infra.settings import Environment
from workloads.engine import ROUTER_LABELS
from workloads.namespaces import SERVING, Namespace, NamespaceArgs
from workloads.policies import egress_https, egress_to, ingress_from, network_policy
from workloads.router import ACCOUNT, Replicas, watch_pods

NAMESPACE = "drydock-kaito"
NODE_LABEL = "drydock/kaito"
HEALTH = "/health"
CONFIG_FILE = "inference_config.yaml"
TOKEN_SECRET, TOKEN_KEY = "huggingface", "HF_TOKEN"  # the key is KAITO's
WAIT_FOR = "pulumi.com/waitFor"  # what counts as being there, for Pulumi
START_SECONDS = 3600  # a node with its driver, an image of 10 GB, weights from the hub, compilation


def served_images(env: Environment) -> dict[str, str]:
    """The images of the adapters that are served, by adapter."""
    return {name: image for name, image in sorted(env.serving.kaito.adapter_images.items()) if image}


def inference_config(env: Environment) -> str:
    """KAITO's inference_config.yaml: what `serving.engine.vllm_command` says to vLLM, as far as it is a setting.

    Every value is text: KAITO's webhook reads a map of texts.
    """
    serving, images = env.serving, served_images(env)
    vllm = {
        "served-model-name": env.base.served_name,
        "revision": env.base.revision,
        "tokenizer-revision": env.base.revision,
        "max-model-len": str(serving.max_model_len),
        "max-num-seqs": str(serving.max_num_seqs),
        "gpu-memory-utilization": str(serving.gpu_memory_utilization),
    }
    if serving.dtype != "auto":
        vllm["dtype"] = serving.dtype
    if images:
        vllm["max-lora-rank"] = str(vllm_lora_rank(env.max_lora_rank))
        vllm["max-loras"] = vllm["max-cpu-loras"] = str(len(images))
    # 0: KAITO would offload the KV cache to half of the node's free memory.
    return yaml.safe_dump({"kv_cache_cpu_memory_utilization": 0, "vllm": vllm}, sort_keys=True)


def inference(env: Environment, config: str) -> Inference:
    """What one replica serves. `config`: the name of the ConfigMap with `inference_config`."""
    secrets = (env.serving.kaito.pull_secret,) if env.serving.kaito.pull_secret else None
    return Inference(
        preset=Preset(
            name=preset(env.base.model),
            preset_options=PresetOptions(model_access_secret=TOKEN_SECRET) if env.huggingface_token else None,
        ),
        config=config,
        adapters=tuple(
            Adapter(source=AdapterSource(name=name, image=image, image_pull_secrets=secrets))
            for name, image in served_images(env).items()
        )
        or None,
    )


def manifest(env: Environment) -> dict[str, Any]:
    """The Workspace or InferenceSet of an environment, as the API server takes it.

    Its name follows from all that it says but the number of replicas, which alone KAITO changes in place: preset and VM
    size are immutable, and a changed template does not reach Workspaces that are there. Its ConfigMap has its name.
    """
    several, size = env.serving.max_replicas > 1, env.pools[env.serving.pool].vm_size
    said = [several, size, inference_config(env), inference(env, "").written()]
    name = f"engine-{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]}"
    what, nodes = inference(env, name), LabelSelector(match_labels={NODE_LABEL: name})
    waited = {WAIT_FOR: "condition=InferenceReady"}
    if several:
        waited = {WAIT_FOR: f"jsonpath={{.status.readyReplicas}}={env.serving.max_replicas}"}
    annotations = NO_BENCHMARK | (waited if env.serving.new_first else {})
    head = {
        "apiVersion": API_VERSION,
        "kind": "InferenceSet" if several else "Workspace",
        "metadata": {"name": name, "namespace": NAMESPACE, "annotations": annotations},
    }
    if not several:
        resource = WorkspaceResource(instance_type=size, label_selector=nodes)
        return head | Workspace(resource=resource, inference=what).written()
    template = SetTemplate(resource=SetResource(instance_type=size), inference=what)
    spec = InferenceSetSpec(replicas=env.serving.max_replicas, label_selector=nodes, template=template)
    return head | {"spec": spec.written()}


def watch(resource: dict[str, Any]) -> str:
    """Command that waits until all replicas answer."""
    name = resource["metadata"]["name"]
    ready, of = "condition=InferenceReady", f"workspace/{name}"
    if resource["kind"] == "InferenceSet":
        ready, of = f"jsonpath='{{.status.readyReplicas}}'={resource['spec']['replicas']}", f"inferenceset/{name}"
    return f"kubectl --namespace {NAMESPACE} wait --for={ready} {of} --timeout={START_SECONDS}s"


@dataclass(frozen=True)
class KaitoServingArgs:
    """An environment whose `serving.runtime` is kaito, and of which `infra.kaito.refusals` has no word.

    `router_namespace`: where the router is, whose pods are the only ones that may ask the replicas.
    """

    env: Environment
    router_namespace: pulumi.Input[str]


class KaitoServing(pulumi.ComponentResource):
    """Namespace `drydock-kaito` with the resource that KAITO acts on; its pods, volumes and nodes are KAITO's."""

    replicas: Replicas
    """For the router."""
    named: str
    """KIND/NAME, as kubectl takes it."""
    watch: str
    """Command that waits until all replicas answer."""

    def __init__(self, name: str, args: KaitoServingArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:KaitoServing", name, None, opts)
        env, child, resource = args.env, pulumi.ResourceOptions(parent=self), manifest(args.env)
        # Not `restricted`: KAITO's pods run as root. GPUs for those that replace others meanwhile.
        gpus = 2 * env.serving.max_replicas
        place = Namespace(f"{name}-namespace", NamespaceArgs(NAMESPACE, "baseline", gpus), child).name
        # The name is in Pulumi's names too: as a replacement, one that failed and is taken back would be made over the
        # running one of the same name, which Pulumi would then delete as the one that was replaced.
        of = resource["metadata"]["name"]
        config = core.v1.ConfigMap(
            f"{name}-{of}-config",
            metadata=meta.v1.ObjectMetaArgs(name=of, namespace=place),
            data={CONFIG_FILE: inference_config(env)},
            immutable=True,
            opts=child,
        )
        needed: list[pulumi.Resource] = [config]  # KAITO's webhook refuses a resource whose ConfigMap is not there
        if env.huggingface_token:
            token = pulumi.Output.secret(env.huggingface_token.get_secret_value())
            metadata = meta.v1.ObjectMetaArgs(name=TOKEN_SECRET, namespace=place)
            needed.append(
                core.v1.Secret(f"{name}-token", metadata=metadata, string_data={TOKEN_KEY: token}, opts=child)
            )
        network_policy(
            "kaito",
            place,
            labels={},
            ingress=[ingress_from(ROUTER_LABELS, PORT, namespace=SERVING)],
            egress=[egress_https()],  # the hub, the registry of the adapters
            resource_name=f"{name}-network",
            opts=child,
        )
        # Beside the router's own policy and role, which stay: in a change of runtime pods of it lead to either.
        network_policy(
            "router-kaito",
            args.router_namespace,
            labels=ROUTER_LABELS,
            egress=[egress_to({}, PORT, namespace=NAMESPACE)],
            resource_name=f"{name}-router-network",
            opts=child,
        )
        watch_pods(f"{name}-router", place, ACCOUNT, args.router_namespace, child)
        # Not apiextensions.CustomResource, which knows `spec` alone: a Workspace has `resource` and `inference`.
        pulumi.CustomResource(
            f"kubernetes:{API_VERSION}:{resource['kind']}",
            f"{name}-{of}",
            resource,
            pulumi.ResourceOptions(
                parent=self,
                depends_on=needed,
                version=pulumi_kubernetes._utilities.get_version(),
                custom_timeouts=pulumi.CustomTimeouts(*[f"{START_SECONDS}s"] * 3),  # its end takes a node away
            ),
        )
        label = SET_LABEL if resource["kind"] == "InferenceSet" else WORKSPACE_LABEL
        self.replicas = Replicas({label: of}, place, PORT, HEALTH)
        self.named = f"{resource['kind'].lower()}/{of}"
        self.watch = watch(resource)
        self.register_outputs({"watch": self.watch})
