"""What `serving.runtime: kaito` does with each thing that may be asked of serving: the errors and docs/kaito.md.

Facts: KAITO v0.12.0 (commit 056b8280), by its code and documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.catalog import SKUS

if TYPE_CHECKING:
    from infra.catalog import Architecture
    from infra.settings import Environment

PAGE = Path(__file__).parents[1] / "docs" / "kaito.md"
BEGIN, END = "<!-- written by python -m infra.kaito -->", "<!-- end -->"

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
    """One thing that serving does: how our own replicas do it (`direct`), and how KAITO does, or why it cannot.

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
    return [
        f"{setting}: not with serving.runtime: kaito, where {each.kaito}: {each.remedy}"
        for each in CAPABILITIES
        if each.asked is not None
        for setting in each.asked(env)
    ]


def table() -> str:
    """Both runtimes side by side, in Markdown."""
    rows = ["| | `direct` | `kaito` |", "| --- | --- | --- |"]
    for each in CAPABILITIES:
        kaito = each.kaito if each.asked is None else f"**error at preview**: {each.kaito}; {each.remedy}"
        rows.append(f"| {each.what} | {each.direct} | {kaito} |")
    return "\n".join(rows)


def written(page: str) -> str:
    """`page` with the table of today between its two marks."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


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
    if env.serving.min_replicas != env.serving.max_replicas:
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
    if place := _pool(env):
        pool = env.pools[env.serving.pool]
        for name in ("alternatives", "spot", "zones", "os_disk_gib"):
            if name in pool.model_fields_set and getattr(pool, name) not in (None, False, ()):
                yield f"{place}.{name}"


def _idle_nodes(env: Environment) -> Iterator[str]:
    if (place := _pool(env)) and env.tuning.pool != env.serving.pool and env.pools[env.serving.pool].min_nodes:
        yield f"{place}.min_nodes"


def _provisioning(env: Environment) -> Iterator[str]:
    if env.cluster.provisioning == "automatic":
        yield "cluster.provisioning"


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
        "make an image of a version and name it by digest in serving.kaito.adapter_images, or name it there as null "
        "as long as it is not to be served",
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
        "a changed setting",
        "a rollout, replica by replica",
        "a resource of another name, while the old one goes at once: nobody is answered until the new nodes are up",
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
        "several replicas",
        "a router that prefers the replica with the prefix in its cache",
        "an InferenceSet, before which a Service spreads connections; a single one is a Workspace",
    ),
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
        "whoever reaches a replica is answered: namespaces with the label `drydock/client: true`, by network policy",
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
        "any size is read",
        LEAVE,
        _given("max_request_kib"),
    ),
    Capability("routes", "completions, chat and models; all others 404", "all that vLLM and KAITO open by default"),
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
        "there is no router, no key, and no pod of ours to break",
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
        "the add-on has a controller of the same NodeClaims, and nothing documents the two together",
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


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
