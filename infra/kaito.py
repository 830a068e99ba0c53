"""What `runtime: kaito` does with each thing that may be asked of serving, or of tuning: the errors and docs/kaito.md.

Facts: KAITO v0.12.0 (commit 056b8280), by its code and documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.catalog import SKUS

if TYPE_CHECKING:
    from infra.catalog import Architecture
    from infra.settings import Environment

PAGE = Path(__file__).parents[1] / "docs" / "kaito.md"
BEGIN, END = "<!-- written by python -m infra.kaito -->", "<!-- end -->"
BEGIN_TUNING = "<!-- of tuning, written by python -m infra.kaito -->"

MOST_ADAPTERS = 10  # api/v1beta1/workspace_validation.go, MaxAdaptersNumber
HUB = "https://huggingface.co"
# pkg/sku/azure_sku_handler.go, NVIDIA's with one GPU: KAITO gives a replica all GPUs of its node, and ours have one.
SIZES = (
    "Standard_NV36ads_A10_v5",
    "Standard_NC24ads_A100_v4",
    "Standard_NC40ads_H100_v5",
    "Standard_NCC40ads_H100_v5",
)
# pkg/utils/plugin/plugin.go, LegacyBuiltinToCatalog: names that also versions before v0.9 know, which had no others.
PRESETS = {
    "meta-llama/llama-3.1-8b-instruct": "llama-3.1-8b-instruct",
    "meta-llama/llama-3.3-70b-instruct": "llama-3.3-70b-instruct",
    "microsoft/phi-3-medium-128k-instruct": "phi-3-medium-128k-instruct",
    "microsoft/phi-3-medium-4k-instruct": "phi-3-medium-4k-instruct",
    "microsoft/phi-3-mini-128k-instruct": "phi-3-mini-128k-instruct",
    "microsoft/phi-3-mini-4k-instruct": "phi-3-mini-4k-instruct",
    "microsoft/phi-4": "phi-4",
    "mistralai/mistral-7b-instruct-v0.3": "mistral-7b-instruct",
}
# Those that it can tune (presets/workspace/models/transformer_runtime_tuning_parameters.go), each with the commit of
# the weights in its image (supported_models.yaml): for tuning KAITO takes no others. Its table has a tenth,
# mistral-7b-v0.3, which its list of images lacks, so that the controller panics.
TUNABLE = {
    "microsoft/phi-3-mini-4k-instruct": ("phi-3-mini-4k-instruct", "0a67737cc96d2554230f90338b163bc6380a2a85"),
    "microsoft/phi-3-mini-128k-instruct": ("phi-3-mini-128k-instruct", "072cb7562cb8c4adf682a8e186aaafa49469eb5d"),
    "microsoft/phi-3-medium-4k-instruct": ("phi-3-medium-4k-instruct", "b64223aaea6fbf273c0c8cd0801d5e732dce8897"),
    "microsoft/phi-3-medium-128k-instruct": ("phi-3-medium-128k-instruct", "fa7d2aa4f5ea69b2e36b20d050cdae79c9bfbb3f"),
    "microsoft/phi-3.5-mini-instruct": ("phi-3.5-mini-instruct", "3145e03a9fd4cdd7cd953c34d9bbf7ad606122ca"),
    "microsoft/phi-4": ("phi-4", "187ef0342fff0eb3333be9f00389385e95ef0b61"),
    "microsoft/phi-4-mini-instruct": ("phi-4-mini-instruct", "c0fb9e74abda11b496b7907a9c6c9009a7a0488f"),
    "qwen/qwen2.5-coder-7b-instruct": ("qwen2.5-coder-7b-instruct", "c03e6d358207e414f1eca0bb1891e29f1db0e242"),
    "qwen/qwen2.5-coder-32b-instruct": ("qwen2.5-coder-32b-instruct", "381fc969f78efac66bc87ff7ddeadb7e73c218a7"),
}


def preset(model: str) -> str:
    """KAITO's name of a hub model, which it compares without regard to case."""
    return PRESETS.get(model.lower(), model)


def nodes_a_replica(figures: Architecture, vm_size: str) -> int:
    """Nodes with one GPU of `vm_size` that KAITO orders for one replica, whatever its arguments: its own estimate.

    presets/workspace/generator/model-sku-calculation.md of v0.12: weights with 2 % on top in what 84 % of the memory
    leave beside 2.3 GiB and the KV cache of 2048 tokens, with 5 % to spare. In GiB.
    """
    weights = 1.02 * 2 * figures.parameters / 2**30
    token = 2 * figures.num_key_value_heads * figures.head_size * figures.num_hidden_layers * 2
    usable = (SKUS[vm_size].gpu.memory_gb * 0.84 - (2.3 + 2048 * token / 2**30)) / 1.05
    return math.floor(weights / usable) + 1


@dataclass(frozen=True)
class Capability:
    """One thing that serving or tuning does: how we do it (`direct`), and how KAITO does, or why it cannot.

    `asked` yields the settings of an environment that ask for what KAITO cannot do: each of them is an error, with
    `kaito` as its reason and `remedy` as the way out. Without `asked`, KAITO does it as `kaito` says.
    """

    what: str
    direct: str
    kaito: str
    remedy: str = ""
    asked: Callable[[Environment], Iterator[str]] | None = None


def refusals(env: Environment) -> list[str]:
    """What KAITO cannot honour of an environment with `serving.runtime: kaito`: `setting: reason: way out`."""
    return _refused(env, "serving", CAPABILITIES)


def tuning_refusals(env: Environment) -> list[str]:
    """The same of one with `tuning.runtime: kaito`."""
    _, commit = TUNABLE.get(env.base.model.lower(), ("", ""))
    told = _refused(env, "tuning", TUNING)
    return [text.replace(ITS_COMMIT, f"{ITS_COMMIT}, {commit}") for text in told]


def _refused(env: Environment, of: str, capabilities: Sequence[Capability]) -> list[str]:
    return [
        f"{setting}: not with {of}.runtime: kaito, where {each.kaito}: {each.remedy}"
        for each in capabilities
        if each.asked is not None
        for setting in each.asked(env)
    ]


def table(capabilities: Sequence[Capability] | None = None) -> str:
    """Both runtimes side by side, in Markdown; of serving, where nothing else is given."""
    rows = ["| | `direct` | `kaito` |", "| --- | --- | --- |"]
    for each in CAPABILITIES if capabilities is None else capabilities:
        kaito = each.kaito if each.asked is None else f"**error at preview**: {each.kaito}; {each.remedy}"
        rows.append(f"| {each.what} | {each.direct} | {kaito} |")
    return "\n".join(rows)


def written(page: str) -> str:
    """`page` with the tables of today, each between its two marks."""
    for mark, capabilities in ((BEGIN, CAPABILITIES), (BEGIN_TUNING, TUNING)):
        head, rest = page.split(mark)
        page = f"{head}{mark}\n{table(capabilities)}\n{END}{rest.partition(END)[2]}"
    return page


def _given(*names: str) -> Callable[[Environment], Iterator[str]]:
    """Those of serving's settings `names` that someone wrote down. Defaults, None and false ask for nothing."""

    def asked(env: Environment) -> Iterator[str]:
        for name in names:
            if name in env.serving.model_fields_set and getattr(env.serving, name) not in (None, False):
                yield f"serving.{name}"

    return asked


def _pool(env: Environment) -> str | None:
    """The serving pool's place among the settings; None where it is not there, which is told elsewhere."""
    return f"pools.{env.serving.pool}" if env.serving.pool in env.pools else None


def _without_image(env: Environment) -> Iterator[str]:
    for name in env.adapters:
        if name not in env.serving.kaito.adapter_images:
            yield f"adapters.{name}"


def _unknown_image(env: Environment) -> Iterator[str]:
    for name in env.serving.kaito.adapter_images:
        if name not in env.adapters:
            yield f"serving.kaito.adapter_images.{name}"


def _unproven(env: Environment) -> Iterator[str]:
    if not env.serving.kaito.unproven_adapters:
        for name, image in env.serving.kaito.adapter_images.items():
            if image:
                yield f"serving.kaito.adapter_images.{name}"


def _too_many(env: Environment) -> Iterator[str]:
    if sum(image is not None for image in env.serving.kaito.adapter_images.values()) > MOST_ADAPTERS:
        yield "serving.kaito.adapter_images"


def _scaled(env: Environment) -> Iterator[str]:
    if env.serving.scales:
        yield "serving.min_replicas"


def _size(env: Environment) -> Iterator[str]:
    if (place := _pool(env)) and env.pools[env.serving.pool].vm_size not in SIZES:
        yield f"{place}.vm_size"


def _too_large(env: Environment) -> Iterator[str]:
    if place := _pool(env):
        size = env.pools[env.serving.pool].vm_size
        if size in SIZES and nodes_a_replica(env.base.figures, size) > 1:
            yield f"{place}.vm_size"


def _nodes(env: Environment) -> Iterator[str]:
    if _pool(env):
        yield from _asked_of_nodes(env, env.serving.pool)


def _asked_of_nodes(env: Environment, name: str) -> Iterator[str]:
    """What someone wrote down of the nodes of pool `name` that KAITO's own nodes do not have."""
    pool = env.pools[name]
    for setting in ("alternatives", "spot", "zones", "os_disk_gib"):
        if setting in pool.model_fields_set and getattr(pool, setting) not in (None, False, ()):
            yield f"pools.{name}.{setting}"


def _idle_nodes(env: Environment) -> Iterator[str]:
    if (place := _pool(env)) and env.tuning.pool != env.serving.pool and env.pools[env.serving.pool].min_nodes:
        yield f"{place}.min_nodes"


def _provisioning(env: Environment) -> Iterator[str]:
    if env.cluster.provisioning == "automatic":
        yield "cluster.provisioning"


def _tunes_other_models(env: Environment) -> Iterator[str]:
    if env.base.model.lower() not in TUNABLE:
        yield "base.model"


def _tunes_other_commit(env: Environment) -> Iterator[str]:
    _, commit = TUNABLE.get(env.base.model.lower(), ("", env.base.revision))
    if env.base.revision != commit:
        yield "base.revision"


def _tunes_together(env: Environment) -> Iterator[str]:
    for name in ("gpus", "nodes"):
        if getattr(env.tuning, name) > 1:
            yield f"tuning.{name}"


def _serves_together(env: Environment) -> Iterator[str]:
    if env.serving.gpus > 1:
        yield "serving.gpus"


def _tunes_on_size(env: Environment) -> Iterator[str]:
    if env.tuning.pool in env.pools and env.pools[env.tuning.pool].vm_size not in SIZES:
        yield f"pools.{env.tuning.pool}.vm_size"


def _tunes_on_nodes(env: Environment) -> Iterator[str]:
    if env.tuning.pool in env.pools:
        yield from _asked_of_nodes(env, env.tuning.pool)


def _of_adapters(*names: str) -> Callable[[Environment], Iterator[str]]:
    """Those of the adapters' settings `names` that someone wrote down."""

    def asked(env: Environment) -> Iterator[str]:
        for adapter, settings in env.adapters.items():
            for name in names:
                if name in settings.model_fields_set and getattr(settings, name) is not None:
                    yield f"adapters.{adapter}.{name}"

    return asked


def _checkpoints(env: Environment) -> Iterator[str]:
    yield from _of_adapters("save_minutes", "save_steps")(env)
    if env.drills.run and "tuning-eviction" in env.drills.scenarios:
        yield "drills.scenarios"


def _keeps_activations(env: Environment) -> Iterator[str]:
    for adapter, settings in env.adapters.items():
        if settings.load_in_4bit and settings.gradient_checkpointing is False:
            yield f"adapters.{adapter}.gradient_checkpointing"


def _learns_otherwise(env: Environment) -> Iterator[str]:
    if not env.tuning.kaito.other_loss:
        for adapter in env.adapters:
            yield f"adapters.{adapter}"


def _hub(env: Environment) -> Iterator[str]:
    if env.base.hub != HUB:
        yield "base.hub"


def _keys(env: Environment) -> Iterator[str]:
    if env.api_keys:
        yield "api_keys"


def _tiers(env: Environment) -> Iterator[str]:
    for name in env.tiers:
        yield f"tiers.{name}"


def _exposed(env: Environment) -> Iterator[str]:
    if env.serving.expose == "vnet":
        yield "serving.expose"


def _runs(env: Environment) -> Iterator[str]:
    for name, run in (("stress", env.stress), ("drills", env.drills)):
        if run.run:
            yield f"{name}.run"


def _cpu(env: Environment) -> Iterator[str]:
    if env.serving.device == "cpu":
        yield "serving.device"


DIRECT = "set runtime: direct"
LEAVE = f"leave it out, or {DIRECT}"
# KAITO's docs/azure.md and charts/kaito (nodeProvisioner), karpenter-provider-azure's charts/karpenter/values.yaml.
TWO_PROVISIONERS = (
    "the add-on orders nodes by a gpu-provisioner of its own, which acts on the same NodeClaims as AKS's Karpenter; "
    "KAITO can order from a Karpenter that you install, with its feature gate StaticCapacity on, which AKS's does not "
    "let you set"
)

CAPABILITIES = (
    Capability(
        "base model at its revision",
        "fetched from Blob, where the mirror Job copies it once",
        "preset, with `revision` in `inference_config.yaml`; each replica fetches it from the hub when it starts",
    ),
    Capability(
        "a mirror of the hub (`base.hub`)",
        "any that speaks its API",
        "weights come from huggingface.co alone",
        LEAVE,
        _hub,
    ),
    Capability("gated models (`huggingface_token`)", "the mirror Job has it", "a Secret that each replica has"),
    Capability(
        "context, concurrency, GPU memory, dtype, name of the base",
        "vLLM's arguments",
        "the same arguments, by `inference_config.yaml`; KAITO's offload of the KV cache to CPU memory is off",
    ),
    Capability("`device: cpu`", "for trying with a tiny model", "each replica has the GPUs of its node", DIRECT, _cpu),
    Capability(
        "tool calls (`tool_call_parser`)",
        "as set",
        "the parser follows from KAITO's catalogue, and a flag without a value cannot be given to it",
        LEAVE,
        _given("tool_call_parser"),
    ),
    Capability(
        "adapters that no image is named for",
        "OCI artifacts, found by their tag `promoted`",
        "an adapter is a container image with the PEFT files in /data, and promoted versions are not such images",
        "make an image of a version (python -m artifacts image) and name it by digest in serving.kaito.adapter_images, "
        "or name it there as null as long as it is not to be served",
        _without_image,
    ),
    Capability(
        "images of adapters that are not declared",
        "none",
        "`adapters` says which there are",
        "declare it there too, or remove it",
        _unknown_image,
    ),
    Capability(
        "more than ten adapters",
        "as many as fit the GPU",
        f"{MOST_ADAPTERS} are the most that a Workspace takes",
        f"keep {MOST_ADAPTERS}, or {DIRECT}",
        _too_many,
    ),
    Capability(
        "evaluation gate and parity of the adapters that are served",
        "only what beat its base is promoted; each replica replays canary prompts before it serves a version",
        "whatever an image holds is served, even if vLLM ignores its keys and answers as the base",
        f"take images of versions that passed and set serving.kaito.unproven_adapters: true, or {DIRECT}",
        _unproven,
    ),
    Capability(
        "adapters of a rank above 16",
        "`max-lora-rank` of the largest",
        "the same in `inference_config.yaml`: KAITO itself sets none, and vLLM's default of 16 would refuse it",
    ),
    Capability(
        "another version of an adapter (`poll_seconds`, `old_version_seconds`)",
        "loaded beside the old one in running replicas, in seconds",
        "replicas only load what they start with",
        f"name the new image: the replicas are replaced; or {DIRECT}",
        _given("poll_seconds", "old_version_seconds"),
    ),
    Capability(
        "compiled graphs for new replicas (`keep_compiled`)",
        "a Job compiles once, and new replicas fetch that",
        "each replica compiles for itself",
        LEAVE,
        _given("keep_compiled"),
    ),
    Capability(
        "a changed setting",
        "a rollout, replica by replica",
        "a resource of another name. Without `new_first` the old one goes at once, and nobody is answered until the "
        "new nodes are up, for as long as the preview says",
    ),
    Capability(
        "end of a replica (`shutdown_timeout_seconds`)",
        "leaves the router, ends its running requests, within the grace period",
        "running answers are cut after Kubernetes' 30 seconds",
        LEAVE,
        _given("shutdown_timeout_seconds"),
    ),
    Capability(
        "replicas that customers depend on (`customer_facing`)",
        "three at least, a disruption budget, retries by the router",
        "a lost replica and a changed setting cost answers",
        LEAVE,
        _given("customer_facing"),
    ),
    Capability(
        "address, router",
        "Service `drydock` in namespace `drydock-serving`, and the less loaded of two replicas",
        "the same Service and router, which leads to KAITO's pods",
    ),
    Capability(
        "a replica on several GPUs (`gpus`)",
        "as set: tensor parallelism on one node",
        "a replica gets all GPUs of its node, and sizes known here have one",
        f"set 1, or {DIRECT}",
        _serves_together,
    ),
    Capability("several replicas", "a Deployment", "an InferenceSet; a single one is a Workspace"),
    Capability(
        "scaling and sleep (`min_replicas` below `max_replicas`)",
        "KEDA between `min_replicas` and `max_replicas`, down to none",
        "the number is fixed, since KAITO's own scaler is not part of the add-on",
        f"make both the same, 1 or more, or {DIRECT}",
        _scaled,
    ),
    Capability("pace of scaling (`queue_target`)", "as set", "nothing is scaled", LEAVE, _given("queue_target")),
    Capability(
        "a hanging engine (`stall_seconds`)",
        "seen by its steps after `stall_seconds`",
        "only /health is asked",
        LEAVE,
        _given("stall_seconds"),
    ),
    Capability(
        "API keys (`api_keys`)",
        "one for each client",
        "whoever reaches the router is answered: namespaces with the label `drydock/client: true`, by network policy",
        f"remove them, or {DIRECT}",
        _keys,
    ),
    Capability(
        "limits of clients (`tiers`)",
        "prompt, output, n, concurrency, turn",
        "nobody is told apart: 429 for all when more requests wait than `max_num_seqs`",
        f"remove them, or {DIRECT}",
        _tiers,
    ),
    Capability(
        "size of a request (`max_request_kib`)",
        "413 beyond it",
        "what the router takes, 4 MiB, is read",
        LEAVE,
        _given("max_request_kib"),
    ),
    Capability(
        "routes",
        "completions, chat and models; all others 404",
        "the same; by Azure OpenAI's paths the body must name the model",
    ),
    Capability(
        "inside the virtual network (`expose: vnet`)",
        "an internal load balancer",
        "there are no API keys, and the whole network could ask",
        f"set cluster, or {DIRECT}",
        _exposed,
    ),
    Capability(
        "stress test and drills (`stress.run`, `drills.run`)",
        "through the router, with an API key",
        "there is no key to ask with, and no pod of ours to break",
        f"take the run's name out, or {DIRECT}",
        _runs,
    ),
    Capability(
        "VM size (`vm_size` of the pool)",
        "any of the catalogue",
        f"a replica gets all GPUs of its node, and sizes with one GPU are {', '.join(SIZES)}",
        f"take one of these, or {DIRECT}",
        _size,
    ),
    Capability(
        "a model that fills most of the GPU",
        "fits by the settings, or is refused with the numbers",
        "by KAITO's own estimate it needs more than one such node, and it would order several for each replica",
        f"take a size with more memory, or {DIRECT}",
        _too_large,
    ),
    Capability(
        "nodes (`alternatives`, `spot`, `zones`, `os_disk_gib` of the pool)",
        "agent pools of the stack, scaled by AKS",
        "the add-on orders its own agent pools of the pool's VM size, on demand, with its own disk, where Azure places "
        "them",
        f"remove it, or serve from a pool of its own without it, or {DIRECT}",
        _nodes,
    ),
    Capability(
        "nodes that stay (`min_nodes` of a pool that only serves)",
        "for replicas that start at once",
        "replicas do not run on the stack's agent pools, and the nodes would idle",
        f"remove it, or {DIRECT}",
        _idle_nodes,
    ),
    Capability(
        "`cluster.provisioning: automatic`",
        "Karpenter makes the nodes",
        TWO_PROVISIONERS,
        f"set pools, or {DIRECT}",
        _provisioning,
    ),
    Capability(
        "pods",
        "Pod Security `restricted`, read-only root, requests for all they need",
        "as root, in a namespace of their own (`drydock-kaito`, Pod Security `baseline`), with requests for GPUs alone",
    ),
    Capability(
        "metrics, alerts, dashboards of serving",
        "scraped, with alerts",
        "none: KAITO's pods lack the annotations that managed Prometheus follows; these alerts are left out, those of "
        "tuning stay",
    ),
)

ITS_COMMIT = "that commit"
TUNING = (
    Capability(
        "base models (`base.model`)",
        "Llama, Mistral, Qwen 2 and 3, Phi 3 and 4",
        f"{', '.join(name for name, _ in TUNABLE.values())} are all that it can tune; it takes others, and its "
        "controller then fails",
        f"take one of these, or {DIRECT}",
        _tunes_other_models,
    ),
    Capability(
        "base model at its revision (`base.revision`)",
        "any commit",
        "the weights are in an image of Microsoft's registry, made of one commit (`TUNABLE` in infra/kaito.py)",
        f"set {ITS_COMMIT}, or {DIRECT}",
        _tunes_other_commit,
    ),
    Capability(
        "what is learnt, and rows that are too long",
        "the answer alone; rows beyond `max_seq_length` are left out",
        "the loss is over the whole conversation, prompt included, and what is beyond `max_seq_length` is cut off",
        f"set tuning.kaito.other_loss: true if that may be, or {DIRECT}",
        _learns_otherwise,
    ),
    Capability(
        "rank, alpha, dropout, layers, 4 bits; rate, schedule, warm-up, decay, clipping, batch, accumulation, epochs, "
        "`max_seq_length`, `gradient_checkpointing`",
        "as set",
        "the same, by `training_config.yaml`; rows are padded, where ours are packed; a `max_seq_length` other than "
        "1024 needs KAITO v0.11",
    ),
    Capability(
        "chance (`seed`)",
        "the same seed, the same adapter",
        "the first matrices are drawn before any seed is set; only the order of the rows follows one, 42",
        LEAVE,
        _of_adapters("seed"),
    ),
    Capability(
        "dataset",
        "fetched from Blob by identity, held to its digest",
        "its rows that are not held out, made into `messages` at the preview and put into a container of their own "
        "(`kaito`), which the Blob CSI driver mounts by identity",
    ),
    Capability(
        "held-out rows, gate, promotion",
        "after tuning, in the same pod",
        "the same commands on the same rows, which KAITO never sees: `training adopt`, `serving evaluate`, by a Job of "
        "ours on `tuning.pool`, which waits without a GPU until KAITO is done",
    ),
    Capability(
        "checkpoints (`save_minutes`, `save_steps`, drill tuning-eviction)",
        "goes on from the newest one",
        "there are none: a pod or node that is lost costs the whole training, which begins anew",
        LEAVE,
        _checkpoints,
    ),
    Capability(
        "activations kept (`gradient_checkpointing: false`) with 4 bits",
        "as set",
        "they are computed again with 4 bits in any case",
        LEAVE,
        _keeps_activations,
    ),
    Capability(
        "memory of the GPU",
        "checked at the preview",
        "checked as for ours; KAITO itself checks nothing, and a training that does not fit fails on its node",
    ),
    Capability(
        "several GPUs, several nodes (`gpus`, `nodes`)",
        "one adapter on all of them",
        "a training has one node, and by more GPUs than one its batch would grow",
        f"set 1, or {DIRECT}",
        _tunes_together,
    ),
    Capability(
        "VM size (`vm_size` of the pool)",
        "any of the catalogue",
        f"it needs a size that KAITO knows, with one GPU: {', '.join(SIZES)}",
        f"take one of these, or {DIRECT}",
        _tunes_on_size,
    ),
    Capability(
        "nodes (`alternatives`, `spot`, `zones`, `os_disk_gib` of the pool)",
        "agent pools of the stack, scaled by AKS",
        "the add-on orders a node of its own for each training, of the pool's VM size, on demand, with its own disk, "
        "where Azure places it; the pool itself only evaluates",
        f"remove it, or tune in a pool of its own without it, or {DIRECT}",
        _tunes_on_nodes,
    ),
    Capability(
        "`cluster.provisioning: automatic`",
        "Karpenter makes the nodes",
        TWO_PROVISIONERS,
        f"set pools, or {DIRECT}",
        _provisioning,
    ),
    Capability(
        "end (`deadline_hours`, `retries`)",
        "as set",
        "as set (KAITO's Job tries six times more at most): a Job of ours makes the Workspace, and takes it away, and "
        "its node with it, as soon as KAITO has succeeded, failed too often, or taken too long",
    ),
    Capability(
        "progress",
        "loss, tokens a second and the time that is left, as metrics, with alerts; JSON in the log",
        "the log of KAITO's pod; the alerts TuningStalled and TuningLate have nothing to look at",
    ),
    Capability(
        "pods",
        "Pod Security `restricted`, read-only root, requests for all they need",
        "as root, in a namespace of their own (`drydock-kaito-tuning`, Pod Security `baseline`), with a request for "
        "the GPU alone",
    ),
)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
