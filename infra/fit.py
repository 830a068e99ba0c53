"""Does this model fit this GPU, to be served and to be tuned? Estimates for a GPU, each term with formula and source.

    python -m infra.fit --model meta-llama/Llama-3.1-8B-Instruct --sku Standard_NC24ads_A100_v4 --context 8192

Of GPUs that serve together each holds its share (tensor parallelism), of those that tune together each the whole base.
Exit codes: 0 all fits, 1 something does not, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from common import cli, exits
from common.lora import MAX_LORA_RANK, vllm_lora_rank
from common.settings import Settings, SettingsError, explain
from infra import prices
from infra.catalog import NEEDED_DRIVER, SKUS, Architecture, Sku, architecture, architecture_of, sku
from serving.spec import GPUS, EngineSettings, Gpus, ServingSpec
from training.spec import TuningSettings, TuningSpec

GIB = 2**30
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

BYTES_PER_TOKEN, TEMPLATE_TOKENS = 4, 64
"""The evaluation asks for as many tokens as the longest expected answer has bytes, of which text has about four a
token; and what the chat template and the end of the turn add."""
KV_PAGE_TOKENS = 16
"""Tokens in a block of the KV cache: vLLM's default on CUDA."""
CUDA_CONTEXT_GIB = 0.5
"""What a process takes for the CUDA context alone, outside torch and outside vLLM's share. By experience 0.3 to 0.6."""
SERVING_RUNTIME_GIB = 0.35
"""`non_torch_memory` in vLLM's log: 0.05 to 0.12 GiB in engine V0, 0.32 to 0.35 in V1 (Llama 3.1 8B, 79.1 GiB GPUs)."""
CUDA_GRAPHS_GIB = 1.0
"""vLLM 0.21 and later set aside what its graphs take: 0.36 to 0.73 GiB in the logs of PRs 39559 and gpustack 251, and
with LoRA they are captured both with and without adapters (`cudagraph_specialize_lora`)."""
SAMPLER_BYTES = 40
"""For each request and vocabulary entry while sampling is profiled: 1.19 to 1.26 GiB in vLLM's logs at 256 requests x
128,256 entries (PR 10511): logits in two precisions, sorted copies with indices, probabilities."""
TUNING_RUNTIME_GIB = 1.0
"""CUDA context, cuBLAS workspace and the allocator's unused rest."""
LOGIT_BYTES = 12
"""For each token and vocabulary entry in the loss: an fp32 log-softmax and two gradients of it."""
NCCL_GIB = 0.5
"""What GPUs that work together need to talk: buffers of 4 MiB (NCCL_BUFFSIZE) for each of at most 32 channels and two
directions, and as much again for its kernels and connections."""
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a parameter: its own, 8 for each block of 64, 32 for each 256 blocks (Dettmers et al. 2023, QLoRA)."""
AGAIN = "gradient_checkpointing: true (a third slower)"
SMALL = "load_in_4bit: true"
READS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "input of attention"),
    "o_proj": "output of attention",
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "input of the MLP"),
    "down_proj": "inside of the MLP",
}
"""Which tensor a layer reads (modeling_llama.py and modeling_phi3.py of transformers 5.19)."""
SPLIT_INPUTS = ("o_proj", "down_proj")
"""Layers of which each GPU has a part of the inputs; of the others, a part of the outputs (Shoeybi et al. 2019)."""


@dataclass(frozen=True)
class Term:
    """One part of the memory needed."""

    name: str
    gib: float
    formula: str
    source: str


@dataclass(frozen=True)
class Fit:
    """What is needed on one GPU against what it has, in GiB.

    `minimum_gib` is what the process needs to start at all: vLLM starts with room for one full context, and preempts
    requests when more are running than fit. For tuning it is all of it.
    """

    terms: tuple[Term, ...]
    available_gib: float
    minimum_gib: float

    @property
    def total_gib(self) -> float:
        """All that is needed."""
        return sum(term.gib for term in self.terms)

    @property
    def fits(self) -> bool:
        """Whether all that is needed is there."""
        return self.total_gib <= self.available_gib

    @property
    def starts(self) -> bool:
        """Whether the process starts."""
        return self.minimum_gib <= self.available_gib


@dataclass(frozen=True)
class ServingLoad:
    """What a replica must hold: `concurrency` requests with `context` tokens each, and `lora_slots` adapters.

    These are vLLM's max_num_seqs, max_model_len and max_loras, and the settings of those names. `gpus` hold it
    together: vLLM's tensor_parallel_size.
    """

    context: int
    concurrency: int
    lora_slots: int
    lora_rank: int
    dtype: Dtype = "auto"
    gpu_memory_utilization: float = 0.9
    gpus: int = 1


@dataclass(frozen=True)
class TuningLoad:
    """One forward and backward pass: at most `batch_rows` x `max_seq_length` tokens, packed without padding.

    Each of `gpus` GPUs of each of `nodes` nodes makes such passes, with all of the base on it.
    """

    batch_rows: int
    max_seq_length: int
    lora_r: int
    target_modules: tuple[str, ...]
    lora_dropout: float = 0.05
    gradient_checkpointing: bool = False
    load_in_4bit: bool = False
    gpus: int = 1
    nodes: int = 1

    @property
    def tokens(self) -> int:
        """The most tokens of the pass."""
        return self.batch_rows * self.max_seq_length


def tuning_load(
    settings: TuningSettings, model: Architecture, sizes: Iterable[str], *, gpus: int = 1, nodes: int = 1
) -> TuningLoad:
    """What an adapter's settings ask of a GPU of any of `sizes`, with `gradient_checkpointing: None` decided.

    It is on where one of them cannot hold the load without. Raises ValueError for a size that the catalogue lacks.
    """
    load = TuningLoad(
        settings.per_device_train_batch_size,
        settings.max_seq_length,
        settings.lora_r,
        settings.lora_target_modules,
        settings.lora_dropout,
        bool(settings.gradient_checkpointing),
        settings.load_in_4bit,
        gpus,
        nodes,
    )
    if settings.gradient_checkpointing is None and not all(tuning_fit(model, sku(name), load).fits for name in sizes):
        return replace(load, gradient_checkpointing=True)
    return load


def serving_fit(model: Architecture, size: Sku, load: ServingLoad) -> Fit:
    """The estimate for each GPU of `size` that has a part in one vLLM replica."""
    width = 4 if load.dtype == "float32" else 2
    gpu, gpus = size.gpu, load.gpus
    shared, parted = (f" / {gpus} GPUs", f", one of the two / {gpus} GPUs") if gpus > 1 else ("", "")
    page_bytes = kv_token_bytes(model, width, gpus) * KV_PAGE_TOKENS
    pages = math.ceil(load.context / KV_PAGE_TOKENS)
    rank = vllm_lora_rank(load.lora_rank)
    # Of an adapter's two matrices, the one beside the part that a layer has in whole is whole as well.
    adapted = model.num_hidden_layers * sum(
        inputs // gpus + outputs if layer in SPLIT_INPUTS else inputs + outputs // gpus
        for layer, (inputs, outputs) in model.linear_layers.items()
    )
    embedded = 2 * (model.vocab_size + model.hidden_size)
    # vllm/engine/arg_utils.py get_batch_defaults, API server: by the GPU's memory, and less on an A100.
    batched = max(8192 if gpu.driver_gib >= 70 and not gpu.name.startswith("A100") else 2048, load.concurrency)
    inner = model.intermediate_size // gpus
    layer = batched * (3 * inner + 4 * model.hidden_size) * width
    sampler = load.concurrency * model.vocab_size * SAMPLER_BYTES
    terms = [
        Term(
            "weights",
            model.parameters * width / gpus / GIB,
            f"{model.parameters:,} parameters x {width} bytes{shared}",
            "config.json",
        ),
        Term(
            "KV cache",
            load.concurrency * pages * page_bytes / GIB,
            f"2 x {model.num_hidden_layers} layers x {_kv_size(model, gpus)} x {width} bytes x "
            f"{pages * KV_PAGE_TOKENS:,} tokens x {load.concurrency} requests",
            "Kwon et al. 2023, PagedAttention",
        ),
        Term(
            "LoRA slots",
            load.lora_slots * rank * (adapted + embedded) * width / GIB,
            f"{load.lora_slots} slots x rank {rank} x (inputs + outputs of all layers{parted}) x {width} bytes",
            "vllm/lora/layers, lora_a_stacked and lora_b_stacked",
        ),
        Term(
            "activations",
            max(layer, sampler) / GIB,
            f"the larger of {batched:,} tokens x (3 x {inner} + 4 x {model.hidden_size}) x {width} "
            f"bytes and {load.concurrency} requests x {model.vocab_size} x {SAMPLER_BYTES} bytes",
            "vLLM's profiling run; logs of PR 10511",
        ),
        Term("CUDA graphs", CUDA_GRAPHS_GIB, "constant", "vLLM's logs, PR 39559"),
        Term("runtime", SERVING_RUNTIME_GIB, "constant", "non_torch_memory in vLLM's logs"),
    ]
    if gpus > 1:
        terms.append(Term("NCCL", NCCL_GIB, "constant", "NCCL_BUFFSIZE"))
    other_contexts = (load.concurrency - 1) * pages * page_bytes / GIB
    available = min(gpu.driver_gib * load.gpu_memory_utilization, gpu.driver_gib - CUDA_CONTEXT_GIB)
    return Fit(tuple(terms), available, sum(term.gib for term in terms) - other_contexts)


def kv_token_bytes(model: Architecture, width: int, gpus: int) -> int:
    """Bytes of a token in the KV cache of each of `gpus` GPUs; `width`: of an element."""
    return 2 * model.num_hidden_layers * _kv_size(model, gpus) * width


def _kv_size(model: Architecture, gpus: int) -> int:
    """Width of one GPU's key heads together; with fewer heads than GPUs, several have the same one."""
    return max(1, model.num_key_value_heads // gpus) * model.head_size


def tuning_fit(model: Architecture, size: Sku, load: TuningLoad) -> Fit:
    """The estimate for `training.tune` on one GPU of `size`.

    Gradient checkpointing keeps of each layer its input alone. Then the peak is at the logits, or where the backward
    pass has computed a layer again and holds two gradients as wide as the inside of the MLP beside it.
    In 4 bits are the linear layers of the decoder; transformers leaves embeddings and output layer as they are
    (`get_keys_to_not_convert`). bitsandbytes copies one layer at a time in full precision, and keeps no input of it.
    """
    width = 2 if size.gpu.bf16 else 4  # training.model.load_model takes fp32 where the GPU has no bf16
    layers, vocabulary = model.num_hidden_layers, model.vocab_size
    targets = {layer: shape for layer, shape in model.linear_layers.items() if layer in load.target_modules}
    trained = sum(layers * load.lora_r * (inputs + outputs) for inputs, outputs in targets.values())
    copy = 2 if size.gpu.bf16 else 0
    matrices = [inputs * outputs for inputs, outputs in model.linear_layers.values()]
    quantised = layers * sum(matrices) if load.load_in_4bit else 0
    whole = model.parameters - quantised
    layer = _layer_bytes(model, load, width, targets)
    kept, again = layer, layer + 2 * width * model.intermediate_size
    if load.gradient_checkpointing:
        kept = width * model.hidden_size
    terms = [
        Term(
            "base weights",
            (whole * width + quantised * NF4_BITS / 8) / GIB,
            f"{whole:,} parameters x {width} bytes" + (f" + {quantised:,} x {NF4_BITS:.3f} bits" if quantised else ""),
            "config.json; load_model in training" + ("; Dettmers et al. 2023, QLoRA" if quantised else ""),
        ),
        Term(
            "adapter, gradients, AdamW",
            (16 + copy) * trained / GIB,
            f"{trained:,} parameters x (4 + 4 + 8{' + 2' if copy else ''}) bytes",
            "fp32, torch.optim.AdamW" + ("; autocast's bf16 copy" if copy else ""),
        ),
        Term(
            "activations",
            load.tokens * layers * kept / GIB,
            f"{load.tokens:,} tokens x {layers} layers x {kept:,} bytes",
            "Korthikanti et al. 2022, counted for peft",
        ),
    ]
    if load.gradient_checkpointing and again > vocabulary * LOGIT_BYTES:
        formula, source = f"{again:,} bytes", "torch.utils.checkpoint, not reentrant"
        terms.append(
            Term("a layer, computed again", load.tokens * again / GIB, f"{load.tokens:,} tokens x {formula}", source)
        )
    else:
        formula, source = f"{vocabulary} x {LOGIT_BYTES} bytes", "fp32 log-softmax and two gradients of it"
        terms.append(
            Term("logits", load.tokens * vocabulary * LOGIT_BYTES / GIB, f"{load.tokens:,} tokens x {formula}", source)
        )
    if quantised:
        formula = f"{max(matrices):,} parameters x {width} bytes"
        terms.append(
            Term("a layer's weights, copied", max(matrices) * width / GIB, formula, "bitsandbytes, MatMul4Bit")
        )
    if load.gpus * load.nodes > 1:
        terms.append(Term("NCCL", NCCL_GIB, "constant", "NCCL_BUFFSIZE"))
    terms.append(Term("runtime", TUNING_RUNTIME_GIB, "constant", "CUDA context, workspace, allocator"))
    return Fit(tuple(terms), size.gpu.driver_gib, sum(term.gib for term in terms))


def _layer_bytes(model: Architecture, load: TuningLoad, width: int, targets: Mapping[str, tuple[int, int]]) -> int:
    """What a layer keeps of each token for the backward pass, in bytes.

    These are the tensors that autograd keeps in transformers 5.19 with peft 0.21, counted by operation in the manner
    of Korthikanti et al. 2022 (section 4.1). Attention by SDPA keeps no scores, and rows are packed
    (training.packing), so there is no mask. In bf16 heads share keys and values; in fp32 each has its own.
    """
    # An adapter keeps its input. Dropout makes it a copy of its own and keeps a mask of one byte beside it; without
    # dropout the layers that read the same tensor keep it once. Autocast leaves it in the base's precision.
    if load.lora_dropout:
        adapters = sum((width + 1) * inputs for inputs, _ in targets.values())
    else:
        adapters = sum(
            width * inputs for inputs in {READS[layer]: shape[0] for layer, shape in targets.items()}.values()
        )
    adapters += width * load.lora_r * len(targets)
    norms = 8 * model.hidden_size + 8
    query, key = model.query_size, model.key_value_size
    if model.model_type == "qwen3":
        norms += 4 * (query + key + model.num_attention_heads + model.num_key_value_heads)
    repeated = width == 4 and query != key
    attention = width * 2 * (query + (query if repeated else key)) + 4 * model.num_attention_heads
    if model.model_type == "phi3" and not repeated:
        attention += width * (query + key)  # its values are a part of one tensor, which stays as a whole
    return norms + attention + 3 * width * model.intermediate_size + adapters


def largest_context(model: Architecture, size: Sku, load: ServingLoad) -> int:
    """The longest context, in whole KV pages, at which `load` fits; 0 if none does."""
    ceiling = model.max_position_embeddings // KV_PAGE_TOKENS
    return KV_PAGE_TOKENS * _largest(
        lambda pages: serving_fit(model, size, replace(load, context=pages * KV_PAGE_TOKENS)).fits, ceiling
    )


def largest_concurrency(model: Architecture, size: Sku, load: ServingLoad) -> int:
    """The most requests at which `load` fits; 0 if not even one does."""
    return _largest(lambda requests: serving_fit(model, size, replace(load, concurrency=requests)).fits, 2**16)


def largest_batch(model: Architecture, size: Sku, load: TuningLoad) -> int:
    """The most rows in a forward pass at which `load` fits; 0 if not even one does."""
    return _largest(lambda rows: tuning_fit(model, size, replace(load, batch_rows=rows)).fits, 2**16)


def largest_sequence(model: Architecture, size: Sku, load: TuningLoad) -> int:
    """The longest max_seq_length, in steps of 16, at which `load` fits; 0 if none does."""
    return 16 * _largest(
        lambda steps: tuning_fit(model, size, replace(load, max_seq_length=16 * steps)).fits,
        model.max_position_embeddings // 16,
    )


def smallest_sku(model: Architecture, load: ServingLoad | TuningLoad) -> Sku | None:
    """The cheapest size, with as many GPUs as work together, on which `load` fits, None if there is none."""
    if isinstance(load, ServingLoad) and indivisible(model, load.gpus):
        return None
    runs = (size for size in SKUS.values() if not check_driver(size))
    enough = (size for size in runs if size.gpus >= load.gpus and not _dtype_problem(size, load))
    fitting = (size for size in enough if _fit(model, size, load).fits)
    return min(fitting, key=lambda size: size.usd_per_hour, default=None)


def explain_serving(model: Architecture, size: Sku, load: ServingLoad) -> list[str]:
    """Why `load` cannot be served, with the numbers and what fits instead; empty when it can."""
    problems = []
    if load.context > model.max_position_embeddings:
        problems.append(f"max_model_len {load.context} is beyond the model's {model.max_position_embeddings} tokens")
    if problem := _dtype_problem(size, load):
        problems.append(problem)
    if problem := indivisible(model, load.gpus):
        problems.append(problem)
    if size.gpus < load.gpus:
        problems.append(f"gpus {load.gpus} of one node, which has {size.gpus}")
    fit = serving_fit(model, size, load)
    if problems or fit.fits:
        return problems
    remedies = []
    if gpus := fewest_gpus(model, size, load):
        remedies.append(f"gpus {gpus} for each replica")
    if context := largest_context(model, size, load):
        remedies.append(f"max_model_len {context} at max_num_seqs {load.concurrency}")
    if requests := largest_concurrency(model, size, load):
        remedies.append(f"max_num_seqs {requests} at max_model_len {load.context}")
    share = f"gpu_memory_utilization {load.gpu_memory_utilization}"
    limit = f"the {fit.available_gib:.1f} GiB that vLLM may take{_of_each(load.gpus)} ({share})"
    note = "; vLLM would start, but preempt requests when it is full" if fit.starts else ""
    cheapest = _priced(smallest_sku(model, load))
    if not cheapest and not remedies:
        others = [(other, gpus) for gpus in GPUS if (other := smallest_sku(model, replace(load, gpus=gpus)))]
        for other, gpus in sorted(others, key=lambda each: each[0].usd_per_hour)[:1]:
            cheapest = [f"{text} with gpus {gpus}" for text in _priced(other)]
    return [_does_not_fit(fit, limit, [*remedies, *cheapest], note)]


def indivisible(model: Architecture, gpus: int) -> str | None:
    """Why `model` cannot be split among so many GPUs, None where it can: vLLM shares out whole heads (qkv_proj)."""
    heads, shared = model.num_attention_heads, model.num_key_value_heads
    if heads % gpus or model.intermediate_size % gpus or (shared % gpus and gpus % shared):
        enough = [each for each in GPUS if each < gpus and not indivisible(model, each)]
        return (
            f"its {heads} query heads, {shared} key and value heads and {model.intermediate_size} inner columns cannot "
            f"be shared out among {gpus} GPUs: gpus {enough[-1]}"
        )
    return None


def fewest_gpus(model: Architecture, size: Sku, load: ServingLoad) -> int | None:
    """The least of 2, 4 and 8 GPUs of `size`, more than `load` has, on which it fits; None if there is none."""
    more = (gpus for gpus in GPUS if load.gpus < gpus <= size.gpus and not indivisible(model, gpus))
    return next((gpus for gpus in more if serving_fit(model, size, replace(load, gpus=gpus)).fits), None)


def explain_tuning(model: Architecture, size: Sku, load: TuningLoad) -> list[str]:
    """Why `load` cannot be tuned, with the numbers and what fits instead; empty when it can."""
    problems = []
    if unknown := sorted(set(load.target_modules) - set(model.linear_layers)):
        problems.append(
            f"lora_target_modules: {', '.join(unknown)} not in this base; it has {', '.join(model.linear_layers)}"
        )
    if load.max_seq_length > model.max_position_embeddings:
        problems.append(
            f"max_seq_length {load.max_seq_length} is beyond the model's {model.max_position_embeddings} tokens"
        )
    fit = tuning_fit(model, size, load)
    if problems or fit.fits:
        return problems
    again, small = replace(load, gradient_checkpointing=True), replace(load, load_in_4bit=True)
    remedies = [AGAIN] if load != again and tuning_fit(model, size, again).fits else []
    if tuning_fit(model, size, small).fits:
        remedies.append(SMALL)
    elif not remedies and tuning_fit(model, size, replace(small, gradient_checkpointing=True)).fits:
        remedies.append(f"{SMALL} with {AGAIN}")
    if rows := largest_batch(model, size, load):
        remedies.append(
            f"per_device_train_batch_size {rows} (with more gradient_accumulation_steps the result is the same)"
        )
    # Shorter rows lose data; where not even one row fits, the longest single one is what is worth knowing.
    shorter = load if rows else replace(load, batch_rows=1)
    if length := largest_sequence(model, size, shorter):
        remedies.append(f"max_seq_length {length} at per_device_train_batch_size {shorter.batch_rows}")
    limit = f"the {fit.available_gib:.1f} GiB of the GPU"
    note = "; gradient checkpointing is counted in" if load.gradient_checkpointing else ""
    return [_does_not_fit(fit, limit, [*remedies, *_priced(smallest_sku(model, load))], note)]


def serving_load(settings: EngineSettings, adapters: int, lora_rank: int) -> ServingLoad:
    """What a replica with these settings must hold."""
    return ServingLoad(
        settings.max_model_len,
        settings.max_num_seqs,
        lora_slots(adapters),
        lora_rank,
        settings.dtype,
        settings.gpu_memory_utilization,
        settings.gpus,
    )


def check_driver(size: Sku) -> str | None:
    """Why the images cannot use the GPUs of `size` as AKS sets them up, None where they can."""
    if size.gpu.driver >= NEEDED_DRIVER:
        return None
    return (
        f"on {size.name} AKS installs NVIDIA's driver {size.gpu.driver}, and the images' CUDA needs {NEEDED_DRIVER} "
        f"or later: take a size with another GPU than {size.gpu.name}"
    )


def check_serving(
    model_name: str, architecture: Architecture, sku_name: str, settings: EngineSettings, adapters: int, lora_rank: int
) -> list[str]:
    """Problems of serving `architecture` on a `sku_name`, ready to print; empty when it fits."""
    if lora_rank > MAX_LORA_RANK:
        return [f"serving {model_name}: rank {lora_rank} is beyond {MAX_LORA_RANK}, the most that vLLM serves"]
    try:
        size = sku(sku_name)
    except ValueError as error:
        return [str(error)]
    found = explain_serving(architecture, size, serving_load(settings, adapters, lora_rank))
    return [f"serving {model_name} on {sku_name}: {text}" for text in found]


def check_tuning(
    adapter_name: str,
    settings: TuningSettings,
    architecture: Architecture,
    sizes: Sequence[str],
    *,
    gpus: int = 1,
    nodes: int = 1,
) -> list[str]:
    """Problems of tuning `adapter_name` on a GPU of any of `sizes`, ready to print; empty when it fits on all."""
    try:
        load = tuning_load(settings, architecture, sizes, gpus=gpus, nodes=nodes)
    except ValueError as error:
        return [str(error)]
    return [
        f"tuning {adapter_name} on {name}: {text}"
        for name in sizes
        for text in explain_tuning(architecture, sku(name), load)
    ]


def check_evaluation(
    adapter_name: str,
    settings: TuningSettings,
    serving: EngineSettings,
    architecture: Architecture,
    sizes: Sequence[str],
) -> list[str]:
    """Problems of starting vLLM for the evaluation of `adapter_name` where it was tuned, on any of `sizes`.

    It need not hold all its requests at once: those that do not fit wait.
    """
    found = []
    context = evaluation_context(settings.max_seq_length, architecture)
    load = serving_load(serving.model_copy(update={"max_model_len": context}), 1, settings.lora_r)
    for name in sizes:
        size = sku(name)
        what = f"evaluating {adapter_name} on {name}, as it is served:"
        if problem := _dtype_problem(size, load):
            found.append(f"{what} {problem}")
        elif size.gpus < load.gpus:
            found.append(
                f"{what} serving.gpus {load.gpus} of one node, which has {size.gpus}: tune in a pool that has them"
            )
        elif not (fit := serving_fit(architecture, size, load)).starts:
            found.append(
                f"{what} vLLM would not start: {fit.minimum_gib:.1f} GiB are needed of the {fit.available_gib:.1f} GiB "
                f"that it may take{_of_each(load.gpus)}: tune in a pool with larger GPUs, or raise serving.gpus"
            )
    return found


def evaluation_context(max_seq_length: int, architecture: Architecture) -> int:
    """Tokens of a held-out row: its prompt, and an answer of as many bytes as one of its tokens could have."""
    rows = max_seq_length * (1 + BYTES_PER_TOKEN) + TEMPLATE_TOKENS
    return min(rows, architecture.max_position_embeddings)


def lora_slots(adapters: int) -> int:
    """`--max-loras` for so many adapters: one more, for the two versions of one that changes (serving.engine)."""
    return max(1, adapters) + 1


def _fit(model: Architecture, size: Sku, load: ServingLoad | TuningLoad) -> Fit:
    return serving_fit(model, size, load) if isinstance(load, ServingLoad) else tuning_fit(model, size, load)


def _dtype_problem(size: Sku, load: ServingLoad | TuningLoad) -> str | None:
    if isinstance(load, ServingLoad) and load.dtype == "bfloat16" and not size.gpu.bf16:
        return f"a {size.gpu.name} cannot compute in bfloat16; set dtype to float16 or auto"
    return None


def _largest(fits: Callable[[int], bool], ceiling: int) -> int:
    """The largest number from 1 to `ceiling` that fits, 0 if none does; what fits must go on fitting when smaller."""
    low, high = 0, ceiling
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _of_each(gpus: int) -> str:
    return f" of each of {gpus} GPUs" if gpus > 1 else ""


def _priced(size: Sku | None) -> list[str]:
    return [f"{size.name} (${size.usd_per_hour:.2f}/h)"] if size else []


def _does_not_fit(fit: Fit, limit: str, remedies: list[str], note: str) -> str:
    largest_first = sorted(fit.terms, key=lambda term: -term.gib)
    parts = ", ".join(f"{term.name} {term.gib:.1f}" for term in largest_first)
    remedy = f"what fits: {', or '.join(remedies)}" if remedies else "no GPU of the catalogue holds it: a smaller model"
    return f"about {fit.total_gib:.1f} GiB are needed of {limit}: {parts}{note}; {remedy}"


_SERVING, _TUNING = ServingSpec.model_fields, TuningSpec.model_fields


class _Question(Settings):
    """The command line's values; the defaults are those of the two specs."""

    context: int = Field(_SERVING["max_model_len"].default, ge=16, description="max_model_len, in tokens")
    concurrency: int = Field(_SERVING["max_num_seqs"].default, ge=1, description="max_num_seqs, requests at once")
    adapters: int = Field(1, ge=0, description="adapters served at once")
    lora_rank: int = Field(_TUNING["lora_r"].default, ge=1, le=MAX_LORA_RANK, description="rank, tuned and served")
    dtype: Dtype = Field("auto", description="of weights and KV cache while serving")
    gpu_memory_utilization: float = Field(
        _SERVING["gpu_memory_utilization"].default, gt=0, lt=1, description="share of the GPU that vLLM may take"
    )
    gpus: Gpus = Field(_SERVING["gpus"].default, description="GPUs that hold a replica together")
    batch: int = Field(_TUNING["per_device_train_batch_size"].default, ge=1, description="rows in a forward pass")
    seq: int = Field(_TUNING["max_seq_length"].default, ge=8, description="max_seq_length, in tokens")
    gradient_checkpointing: bool | None = Field(
        None, description="keep no activations, compute them again; default: where they do not fit"
    )
    load_in_4bit: bool = Field(False, description="QLoRA: tune on a base in 4 bits; default: no")

    def serving(self) -> ServingLoad:
        return ServingLoad(
            self.context,
            self.concurrency,
            lora_slots(self.adapters),
            self.lora_rank,
            self.dtype,
            self.gpu_memory_utilization,
            self.gpus,
        )

    def tuning(self, model: Architecture, size: Sku) -> TuningLoad:
        settings = TuningSettings(
            dataset="any",
            per_device_train_batch_size=self.batch,
            max_seq_length=self.seq,
            lora_r=self.lora_rank,
            lora_target_modules=tuple(model.linear_layers),
            gradient_checkpointing=self.gradient_checkpointing,
            load_in_4bit=self.load_in_4bit,
        )
        return tuning_load(settings, model, [size.name])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.fit", description="Does this model fit this GPU?")
    parser.add_argument("--model", metavar="ID", help="a model of the catalogue, by its hub id")
    parser.add_argument("--config", metavar="FILE", type=Path, help="a config.json, for a model not in the catalogue")
    parser.add_argument("--sku", metavar="NAME", required=True, help="Azure VM size with its Standard_, or all")
    for name, field in _Question.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        if field.annotation in (bool, bool | None):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=field.description)
        else:
            parser.add_argument(flag, metavar="VALUE", help=f"{field.description} ({field.default})")
    return cli.run(_answer, parser.parse_args(arguments))


def _answer(arguments: argparse.Namespace) -> int:
    problems: list[str] = []
    model, size, question = None, None, None
    try:
        if arguments.config:
            model = architecture_of(arguments.config)
        elif arguments.model:
            model = architecture(arguments.model)
        else:
            problems.append("--model or --config is needed: a hub id of the catalogue, or a config.json")
    except SettingsError as error:
        problems += error.problems
    except ValueError as error:
        problems.append(f"--model: {error} (or give its config.json with --config)")
    try:
        size = None if arguments.sku == "all" else sku(arguments.sku)
    except ValueError as error:
        problems.append(f"--sku: {error}")
    given = {name: value for name in _Question.model_fields if (value := getattr(arguments, name)) is not None}
    try:
        question = _Question.model_validate(given)
    except ValidationError as error:
        problems += [
            f"--{text.replace('_', '-', text.partition(':')[0].count('_'))}" for text in explain(error, _Question)
        ]
    if problems or model is None or question is None:
        raise SettingsError(problems)
    return _show(model, size, question) if size else _compare(model, question)


def _show(model: Architecture, size: Sku, question: _Question) -> int:
    serving, tuning = question.serving(), question.tuning(model, size)
    how = ", base in 4 bits" * tuning.load_in_4bit + ", gradient checkpointing" * tuning.gradient_checkpointing
    print(f"{size.name}: {size.gpus} x {size.gpu.name}, {size.gpu.driver_gib} GiB seen by the driver, ", end="")
    print(f"${size.usd_per_hour:.2f}/h ({size.price_region}, {prices.AS_OF}). Estimates for each GPU.")
    failed = (driver := check_driver(size)) is not None
    if driver:
        print(f"Cannot be used: {driver}.")
    for title, fit, problems in (
        (
            f"Serving {serving.concurrency} requests x {serving.context} tokens, {serving.lora_slots} LoRA slots",
            serving_fit(model, size, serving),
            explain_serving(model, size, serving),
        ),
        (
            f"Tuning {tuning.batch_rows} rows x {tuning.max_seq_length} tokens, rank {tuning.lora_r}{how}",
            tuning_fit(model, size, tuning),
            explain_tuning(model, size, tuning),
        ),
    ):
        print(f"\n{title} (estimate)")
        for term in fit.terms:
            print(f"  {term.name:<26}{term.gib:>8.2f} GiB  {term.formula}  [{term.source}]")
        print(f"  {'total':<26}{fit.total_gib:>8.2f} GiB  of {fit.available_gib:.2f} available")
        print("\n".join(f"  does not fit: {problem}" for problem in problems) or "  fits")
        failed |= bool(problems)
    return exits.FAILED if failed else exits.OK


def _compare(model: Architecture, question: _Question) -> int:
    asked = question.serving()
    print(
        "Estimates in GiB needed of GiB available on each GPU; "
        f"prices of {prices.AS_OF}; xN: by N GPUs together; *: with gradient checkpointing."
    )
    print(f"{'size':<28}{'$/h':>7}  {'GPU':<12}{'serving':>16}{'tuning':>25}")
    found = False
    for size in sorted(SKUS.values(), key=lambda each: each.usd_per_hour):
        serving, tuning = asked, question.tuning(model, size)
        if not serving_fit(model, size, serving).fits and (gpus := fewest_gpus(model, size, serving)):
            serving = replace(serving, gpus=gpus)
        driver = check_driver(size)
        serves, tunes = driver or explain_serving(model, size, serving), driver or explain_tuning(model, size, tuning)
        cells = [
            f"{fit.total_gib:6.1f} of {fit.available_gib:5.1f} {said:<6}"
            for fit, said in (
                (serving_fit(model, size, serving), "no" if serves else f"yes x{serving.gpus}".removesuffix(" x1")),
                (
                    tuning_fit(model, size, tuning),
                    "no" if tunes else f"yes{'*' if tuning.gradient_checkpointing else ''}",
                ),
            )
        ]
        found |= not serves and not tunes
        row = f"{size.name:<28}{size.usd_per_hour:>7.2f}  {size.gpu.name:<12}{cells[0]}  {cells[1]}"
        print(f"{row} driver {size.gpu.driver}" if driver else row.rstrip())
    return exits.OK if found else exits.FAILED


if __name__ == "__main__":
    sys.exit(main())
