"""The estimates against published figures and against what autograd really keeps; remedies that hold; the command."""

import gc
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from common import exits
from infra.catalog import MODELS, SKUS, Architecture, sku
from infra.fit import (
    GIB,
    NF4_BITS,
    Fit,
    ServingLoad,
    TuningLoad,
    check_driver,
    check_evaluation,
    check_serving,
    check_tuning,
    explain_serving,
    explain_tuning,
    largest_batch,
    largest_concurrency,
    largest_context,
    largest_sequence,
    main,
    serving_fit,
    smallest_sku,
    tuning_fit,
    tuning_load,
)
from serving.engine import vllm_command
from serving.spec import EngineSettings, ServingSpec
from training.spec import TuningSettings

A100 = sku("Standard_NC24ads_A100_v4")
T4 = sku("Standard_NC4as_T4_v3")
LLAMA_8B = MODELS["meta-llama/Llama-3.1-8B-Instruct"]
LLAMA_3B = MODELS["meta-llama/Llama-3.2-3B"]
ALL_LINEAR = tuple(LLAMA_8B.linear_layers)
SERVING = ServingLoad(context=4096, concurrency=64, lora_slots=2, lora_rank=16)
TUNING = TuningLoad(batch_rows=4, max_seq_length=1024, lora_r=16, target_modules=ALL_LINEAR)


def gib(fit: Fit, name: str) -> float:
    return next(term.gib for term in fit.terms if term.name == name)


# --- published figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "published_gib"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 14.96),  # vLLM's log in vllm PR 10511, Llama 3 8B
        ("Qwen/Qwen2.5-32B-Instruct", 2 * 30.71),  # vllm issue 15815, on each of two GPUs
        ("Qwen/Qwen2.5-14B-Instruct", 2 * 13.9476),  # vllm issue 13061, its distilled DeepSeek R1 on two GPUs
    ],
)
def test_weights_are_what_vllm_logs(model, published_gib):
    assert gib(serving_fit(MODELS[model], A100, SERVING), "weights") == pytest.approx(published_gib, rel=0.02)


@pytest.mark.parametrize(
    ("model", "tokens", "published_gib"),
    [  # huggingface.co/blog/llama31, "KV cache size for FP16"; its 16k and 128k are thousands (blog issue 2345)
        ("meta-llama/Llama-3.1-8B", 1024, 0.125),
        ("meta-llama/Llama-3.1-8B", 16000, 1.95),
        ("meta-llama/Llama-3.1-8B", 128000, 15.62),
        ("meta-llama/Llama-3.1-70B", 1024, 0.313),
        ("meta-llama/Llama-3.1-70B", 16000, 4.88),
        ("meta-llama/Llama-3.1-70B", 128000, 39.06),
    ],
)
def test_kv_cache_is_that_of_the_llama_31_announcement(model, tokens, published_gib):
    fit = serving_fit(MODELS[model], A100, replace(SERVING, context=tokens, concurrency=1))
    assert gib(fit, "KV cache") == pytest.approx(published_gib, rel=0.005)


def test_what_is_left_for_the_kv_cache_is_what_vllm_logs():
    """vllm PR 10511: Llama 3 8B, 256 requests, 71.29 GiB to use, 53.29 GiB of it left for the KV cache, no LoRA."""
    fit = serving_fit(LLAMA_8B, A100, ServingLoad(context=16, concurrency=256, lora_slots=0, lora_rank=1))
    assert fit.total_gib - gib(fit, "KV cache") == pytest.approx(71.29 - 53.29, rel=0.1)
    assert fit.available_gib == pytest.approx(71.29, rel=0.01)


@pytest.mark.parametrize(
    ("rank", "modules", "published_bytes"),
    [
        (32, ("q_proj", "v_proj"), 22_292_725_760),  # lora--llama-3.2-3B-rank32.json
        (64, ("q_proj", "v_proj"), 22_552_772_608),  # lora--llama-3.2-3B-rank64.json
        (10, ("gate_proj", "up_proj", "down_proj"), 24_698_159_104),  # lora--llama-3.2-3B-rank10-target-mlp.json
    ],
)
def test_tuning_peak_is_that_of_pefts_comparison(rank, modules, published_bytes):
    """`accelerator_memory_max` of peft's method_comparison/MetaMathQA/results at 5d602fd (Llama 3.2 3B, L40S, bf16).

    Batches of 4 rows without checkpointing or dropout, AdamW, fp32 adapters; rows are limited to about 768 tokens, which
    the longest batch is taken to have. It is torch's own peak, so without the CUDA context.
    """
    load = TuningLoad(4, 768, rank, modules, lora_dropout=0)
    fit = tuning_fit(LLAMA_3B, A100, load)
    ours = (fit.total_gib - gib(fit, "runtime")) * GIB
    # That run keeps what ours does not: fp32 copies of the inputs, a mask for each layer, keys and values for all heads.
    adapted = [LLAMA_3B.linear_layers[name][0] for name in modules]
    query, key = LLAMA_3B.query_size, LLAMA_3B.key_value_size
    more = sum(4 * inputs + 2 * rank for inputs in adapted)
    more -= sum(2 * inputs for inputs in set(adapted))
    more += 2 * (2 * (query - key) + load.max_seq_length)
    theirs = ours + load.tokens * LLAMA_3B.num_hidden_layers * more
    assert theirs == pytest.approx(published_bytes, rel=0.1)


def llama2(hidden: int, inner: int, layers: int, heads: int, key_value_heads: int) -> Architecture:
    return Architecture(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=32000,
        max_position_embeddings=4096,
    )


@pytest.mark.parametrize(
    ("model", "published_gb"),
    [
        (llama2(4096, 11008, 32, 32, 32), 4.26),  # 7B
        (llama2(5120, 13824, 40, 40, 40), 7.72),  # 13B
        (llama2(8192, 22016, 48, 64, 8), 18.95),  # CodeLlama 34B
        (llama2(8192, 28672, 80, 64, 8), 37.21),  # 70B
    ],
)
def test_weights_in_4_bits_are_those_of_litgpt(model, published_gb):
    """LitGPT's tutorials/resource-tables.md: peak of inference with bnb.nf4-dq, one A100, some hundred tokens of cache."""
    fit = tuning_fit(model, A100, replace(TUNING, load_in_4bit=True))
    ours = (gib(fit, "base weights") + gib(fit, "a layer's weights, copied")) * GIB / 1e9
    assert 0.2 < published_gb - ours < 0.5  # the cache, and what lies around


@pytest.mark.parametrize(
    ("model", "vram_gib", "tokens"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 12, 932),
        ("meta-llama/Llama-3.1-8B-Instruct", 24, 5_789),
        ("meta-llama/Llama-3.1-8B-Instruct", 48, 15_502),
        ("meta-llama/Llama-3.1-8B-Instruct", 80, 28_454),
        ("meta-llama/Llama-3.3-70B-Instruct", 80, 6_916),
    ],
)
def test_qlora_with_checkpointing_reaches_the_published_contexts(model, vram_gib, tokens):
    """Unsloth's README, "Hugging Face + FA2": the longest row by GPU, batch 1, rank 32 on all linear layers.

    Theirs goes through prepare_model_for_kbit_training, which ours leaves out: embeddings, output layer and what lies
    between two layers are in fp32 there, and so is one more copy of the logits.
    """
    model = MODELS[model]
    load = TuningLoad(1, tokens, 32, ALL_LINEAR, lora_dropout=0, gradient_checkpointing=True, load_in_4bit=True)
    wider = 2 * 2 * model.vocab_size * model.hidden_size
    wider += tokens * (2 * model.num_hidden_layers * model.hidden_size + 4 * model.vocab_size)
    assert tuning_fit(model, A100, load).total_gib + wider / GIB == pytest.approx(vram_gib, rel=0.03)


def test_qlora_tunes_65b_on_a_gpu_of_48_gb():
    """Dettmers et al. 2023: LLaMA 65B, rank 64 on all linear layers, rows of 512; AdamW's two moments are paged out."""
    load = TuningLoad(1, 512, 64, ALL_LINEAR, gradient_checkpointing=True, load_in_4bit=True)
    fit = tuning_fit(llama2(8192, 22016, 80, 64, 64), A100, load)
    held = fit.total_gib - gib(fit, "adapter, gradients, AdamW") * 8 / 18
    assert 0.9 * 48e9 < held * GIB < 48e9


# --- what the code really does -------------------------------------------------------------------------------------

TINY = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,  # as in real models, the peak is at the logits
    "max_position_embeddings": 4096,
    "head_dim": 32,
}


@pytest.mark.parametrize(
    ("family", "rows", "on", "dropout"),
    [
        ("llama", 2, A100, 0.05),
        ("llama", 2, A100, 0.0),
        ("llama", 1, T4, 0.05),  # fp32, as model.load_model takes it without bf16
        ("llama", 2, T4, 0.0),
        ("qwen3", 2, A100, 0.05),
        ("phi3", 2, A100, 0.05),
        ("phi3", 2, A100, 0.0),
    ],
)
def test_activations_are_what_a_pass_of_tune_keeps(family, rows, on, dropout):
    head = {"head_dim": None} if family == "phi3" else {}
    one, three = (Architecture(model_type=family, num_hidden_layers=n, **{**TINY, **head}) for n in (1, 3))
    load = TuningLoad(rows, 96, 16, tuple(one.linear_layers), lora_dropout=dropout)
    measured = [_peak_bytes(model, load, on.gpu.bf16) for model in (one, three)]
    # On a CPU dropout keeps its mask in the precision of the input, on CUDA in one byte.
    wider = ((2 if on.gpu.bf16 else 4) - 1) if dropout else 0
    masks = wider * load.tokens * sum(inputs for inputs, _ in one.linear_layers.values())
    fits = [tuning_fit(model, on, load) for model in (one, three)]
    # At the peak, the logits, there are no gradients yet, but the bf16 copies of the adapter's weights.
    copies = [gib(fit, "adapter, gradients, AdamW") * (2 / 18 if on.gpu.bf16 else 0) for fit in fits]
    kept = [(gib(fit, "activations") + gib(fit, "logits") + copy) * GIB for fit, copy in zip(fits, copies, strict=True)]
    assert kept[1] - kept[0] + 2 * masks == pytest.approx(measured[1] - measured[0], rel=0.002)  # two layers
    assert kept[1] + 3 * masks == pytest.approx(measured[1], rel=0.1)


@pytest.mark.parametrize(("vocabulary", "on"), [(4096, A100), (64, A100), (64, T4)])
def test_with_checkpointing_the_peak_is_at_the_logits_or_at_a_layer_computed_again(vocabulary, on):
    one, three = (Architecture(num_hidden_layers=n, **{**TINY, "vocab_size": vocabulary}) for n in (1, 3))
    load = TuningLoad(2, 96, 16, ALL_LINEAR, lora_dropout=0, gradient_checkpointing=True)
    for model in (one, three):
        fit = tuning_fit(model, on, load)
        adapter = gib(fit, "adapter, gradients, AdamW") / (18 if on.gpu.bf16 else 16)
        peak = _peak_bytes(model, load, on.gpu.bf16) / GIB
        if vocabulary == 4096:
            expected = gib(fit, "activations") + gib(fit, "logits")
        else:
            # In the first layer, the last to be computed again, all gradients are there, and no other layer's input.
            again = gib(fit, "a layer, computed again")
            expected = gib(fit, "activations") / model.num_hidden_layers + again + 4 * adapter
        assert peak == pytest.approx(expected, rel=0.06)


def _peak_bytes(model: Architecture, load: TuningLoad, bf16: bool) -> int:
    """The most that torch has allocated at once during forward and backward of `training.tune`, beyond the weights."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from training.encode import Example
    from training.fused import fuse
    from training.model import own_precision
    from training.packing import ATTENTION, summed_loss

    settings = {**model.model_dump(exclude_none=True), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(**settings)
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=load.lora_r,
        target_modules=list(load.target_modules),
        lora_dropout=load.lora_dropout,
    )
    if load.load_in_4bit:
        _quantise(base)
    tuned = get_peft_model(base, adapter).train()
    fuse(tuned)
    if load.gradient_checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = [Example(line, (5,) * load.max_seq_length, 2) for line in range(load.batch_rows)]
    torch.set_num_threads(1)  # so little to compute that threads only wait for each other
    gc.collect()  # a model of before, freed in the midst of it, would count as memory given back
    activities = [torch.profiler.ProfilerActivity.CPU]
    with own_precision(tuned), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        summed_loss(tuned, batch, torch.device("cpu")).backward()  # type: ignore[no-untyped-call]
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


WITHOUT_BITS = "needs bitsandbytes, of the training group"


def _quantise(base: Any) -> None:
    """As transformers loads a base with `load_in_4bit`: all linear layers but the output layer."""
    from torch.nn import Linear

    nn = pytest.importorskip("bitsandbytes", reason=WITHOUT_BITS).nn
    for name, module in list(base.model.named_modules()):
        if isinstance(module, Linear):
            small = nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=module.weight.dtype
            )
            small.weight = nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            base.model.set_submodule(name, small)
    base.is_loaded_in_4bit = True


def test_in_4_bits_a_pass_keeps_what_it_keeps_of_a_whole_base():
    model = Architecture(num_hidden_layers=3, **TINY)
    load = TuningLoad(2, 96, 16, ALL_LINEAR, lora_dropout=0)
    whole, small = (_peak_bytes(model, replace(load, load_in_4bit=on), True) for on in (False, True))
    assert small == pytest.approx(whole, rel=0.03)


def test_a_parameter_in_4_bits_has_the_bits_that_bitsandbytes_gives_it():
    functional = pytest.importorskip("bitsandbytes", reason=WITHOUT_BITS).functional
    import torch

    packed, state = functional.quantize_4bit(torch.randn(1024, 1024), quant_type="nf4", compress_statistics=True)
    kept = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert 8 * kept / 1024**2 == NF4_BITS


def test_lora_slots_are_those_of_the_engine():
    spec = ServingSpec(base_model="m", store="s", adapters=("a", "b", "c"))
    command = vllm_command(spec, host="127.0.0.1", port=1)
    four = int(command[command.index("--max-loras") + 1])
    (told,) = serve(context=131072, adapters=3, lora_rank=512)
    wanted = serving_fit(LLAMA_8B, A100, ServingLoad(131072, 64, lora_slots=four, lora_rank=512))
    assert f"about {wanted.total_gib:.1f} GiB" in told
    assert gib(wanted, "LoRA slots") > 8  # so that one slot more or less shows in the total


def test_lora_slots_hold_every_layer_at_the_rank_that_vllm_allows():
    slots = gib(serving_fit(LLAMA_8B, A100, replace(SERVING, lora_slots=1, lora_rank=24)), "LoRA slots")
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert slots * GIB == 32 * (32 * layer + 2 * (128256 + 4096)) * 2  # 24 is padded to 32


# --- how the estimates move ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["context", "concurrency", "lora_slots", "lora_rank"])
def test_more_to_serve_never_needs_less(field):
    changes: list[dict[str, Any]] = [{field: n} for n in (1, 2, 17, 64, 500)]
    totals = [serving_fit(LLAMA_8B, A100, replace(SERVING, **change)).total_gib for change in changes]
    assert all(before <= after for before, after in pairwise(totals)) and totals[0] < totals[-1]


@pytest.mark.parametrize("field", ["batch_rows", "max_seq_length", "lora_r"])
def test_more_to_tune_needs_more(field):
    changes: list[dict[str, Any]] = [{field: n} for n in (1, 2, 17, 64, 500)]
    totals = [tuning_fit(LLAMA_8B, A100, replace(TUNING, **change)).total_gib for change in changes]
    assert all(before < after for before, after in pairwise(totals))


def test_kv_pages_are_whole():
    caches = [
        gib(serving_fit(LLAMA_8B, A100, replace(SERVING, context=n)), "KV cache") for n in (4080, 4081, 4096, 4097)
    ]
    assert caches[0] < caches[1] == caches[2] < caches[3]


def test_precision_widens_what_it_should():
    half, full = (serving_fit(LLAMA_8B, A100, replace(SERVING, dtype=dtype)) for dtype in ("auto", "float32"))
    for name in ("weights", "KV cache", "LoRA slots"):
        assert gib(full, name) == 2 * gib(half, name)
    assert gib(tuning_fit(LLAMA_8B, T4, TUNING), "base weights") == 2 * gib(half, "weights")


def test_checkpointing_keeps_the_input_of_each_layer():
    thrifty = tuning_fit(LLAMA_8B, A100, replace(TUNING, gradient_checkpointing=True))
    assert gib(thrifty, "activations") * GIB == 4096 * 32 * 4096 * 2
    assert gib(thrifty, "logits") == gib(tuning_fit(LLAMA_8B, A100, TUNING), "logits")


def test_in_4_bits_embeddings_and_output_layer_stay_as_they_are():
    whole, small = (tuning_fit(LLAMA_8B, A100, replace(TUNING, load_in_4bit=on)) for on in (False, True))
    linear = 32 * sum(inputs * outputs for inputs, outputs in LLAMA_8B.linear_layers.values())
    saved = (gib(whole, "base weights") - gib(small, "base weights")) * GIB
    assert saved == pytest.approx(linear * (2 - 0.5 - 0.127 / 8), rel=1e-4)
    assert gib(small, "a layer's weights, copied") * GIB == 4096 * 14336 * 2


def test_gpus_that_tune_together_need_room_to_talk():
    one, eight = (tuning_fit(LLAMA_8B, A100, replace(TUNING, gpus=gpus)) for gpus in (1, 8))
    assert eight.total_gib - one.total_gib == pytest.approx(0.5)


A10 = "Standard_NV36ads_A10_v5"


def test_checkpointing_is_on_only_where_a_size_of_the_pool_needs_it():
    settings = TuningSettings(dataset="d", per_device_train_batch_size=2, max_seq_length=512)

    def decided(*sizes: str, wish: bool | None = None) -> bool:
        wished = settings.model_copy(update={"gradient_checkpointing": wish})
        return tuning_load(wished, LLAMA_8B, sizes).gradient_checkpointing

    assert not decided(A100.name) and decided(A10) and decided(A100.name, A10)
    assert decided(A100.name, wish=True) and not decided(A10, wish=False)
    big = settings.model_copy(update={"per_device_train_batch_size": 4, "max_seq_length": 2048})
    assert not tuning_load(settings, LLAMA_8B, [A100.name]).gradient_checkpointing
    assert tuning_load(big, LLAMA_8B, [A100.name]).gradient_checkpointing


def test_a_small_gpu_leaves_room_for_the_cuda_context():
    sixth = serving_fit(LLAMA_8B, sku("Standard_NV6ads_A10_v5"), SERVING)
    assert sixth.available_gib == pytest.approx(3.6 - 0.5)  # and not 0.9 x 3.6
    assert serving_fit(LLAMA_8B, A100, SERVING).available_gib == pytest.approx(0.9 * 79.1)


def test_vllm_starts_with_one_full_context():
    fit = serving_fit(LLAMA_8B, A100, replace(SERVING, context=8192))
    assert (fit.fits, fit.starts) == (False, True)
    alone = serving_fit(LLAMA_8B, A100, replace(SERVING, context=8192, concurrency=1))
    assert fit.minimum_gib - alone.total_gib == pytest.approx(gib(fit, "activations") - gib(alone, "activations"))


# --- remedies ------------------------------------------------------------------------------------------------------

PAIRS = [
    ("meta-llama/Llama-3.1-8B-Instruct", "Standard_NC24ads_A100_v4"),
    ("meta-llama/Llama-3.2-1B", "Standard_NC4as_T4_v3"),
    ("Qwen/Qwen2.5-14B-Instruct", "Standard_NC40ads_H100_v5"),
    ("microsoft/Phi-3-mini-128k-instruct", "Standard_NV18ads_A10_v5"),
    ("mistralai/Mistral-Small-24B-Instruct-2501", "Standard_ND96isr_H200_v5"),
]


@pytest.mark.parametrize(("model", "size"), PAIRS)
@pytest.mark.parametrize("concurrency", [8, 200])
def test_the_largest_context_fits_and_a_page_more_does_not(model, size, concurrency):
    model, size, load = MODELS[model], sku(size), replace(SERVING, concurrency=concurrency)
    longest = largest_context(model, size, load)
    assert longest % 16 == 0 and (not longest or serving_fit(model, size, replace(load, context=longest)).fits)
    if longest < model.max_position_embeddings:
        assert not serving_fit(model, size, replace(load, context=longest + 16)).fits


@pytest.mark.parametrize(("model", "size"), PAIRS)
def test_the_largest_concurrency_fits_and_one_more_does_not(model, size):
    model, size = MODELS[model], sku(size)
    load = replace(SERVING, context=2048)
    most = largest_concurrency(model, size, load)
    assert most and serving_fit(model, size, replace(load, concurrency=most)).fits
    assert not serving_fit(model, size, replace(load, concurrency=most + 1)).fits


@pytest.mark.parametrize(("model", "size"), PAIRS)
def test_the_largest_batch_and_sequence_fit_and_more_does_not(model, size):
    model, size = MODELS[model], sku(size)
    load = replace(TUNING, max_seq_length=256, target_modules=tuple(model.linear_layers))
    rows, tokens = largest_batch(model, size, load), largest_sequence(model, size, replace(load, batch_rows=1))
    if rows:
        assert tuning_fit(model, size, replace(load, batch_rows=rows)).fits
    assert not tuning_fit(model, size, replace(load, batch_rows=rows + 1)).fits
    if tokens:
        assert tuning_fit(model, size, replace(load, batch_rows=1, max_seq_length=tokens)).fits
    if tokens < model.max_position_embeddings:
        assert not tuning_fit(model, size, replace(load, batch_rows=1, max_seq_length=tokens + 16)).fits
    assert bool(rows) == (tokens >= 256)


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-32B-Instruct"])
@pytest.mark.parametrize(
    "load", [SERVING, replace(SERVING, concurrency=4, dtype="bfloat16"), TUNING], ids=["64", "bf16", "tune"]
)
def test_the_smallest_sku_fits_and_no_cheaper_one_does(model, load):
    model = MODELS[model]
    told = explain_tuning if isinstance(load, TuningLoad) else explain_serving
    fitting = [size for size in SKUS.values() if not check_driver(size) and not told(model, size, load)]
    assert smallest_sku(model, load) == min(fitting, key=lambda size: size.usd_per_hour, default=None)


# --- several GPUs of a replica -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "each_gib"),
    # vllm issues 15815 and 13061: what each of two GPUs says
    [("Qwen/Qwen2.5-32B-Instruct", 30.71), ("Qwen/Qwen2.5-14B-Instruct", 13.9476)],
)
def test_each_of_two_gpus_holds_the_weights_that_vllm_logs(model, each_gib):
    found = serving_fit(MODELS[model], A100, replace(SERVING, gpus=2))
    weights = gib(found, "weights")
    assert weights < each_gib < weights + gib(found, "NCCL"), "0.19 GiB in both: what the two need to talk"


def test_each_gpu_has_its_part_of_all_but_what_is_on_each():
    one, four, eight = (serving_fit(LLAMA_8B, A100, replace(SERVING, gpus=gpus)) for gpus in (1, 4, 8))
    assert gib(one, "weights") == 4 * gib(four, "weights") == 8 * gib(eight, "weights")
    assert gib(one, "KV cache") == 4 * gib(four, "KV cache") == 8 * gib(eight, "KV cache")
    assert gib(one, "LoRA slots") / 4 < gib(four, "LoRA slots") < gib(one, "LoRA slots"), "one of two matrices is whole"
    assert gib(four, "CUDA graphs") == gib(one, "CUDA graphs")
    assert {term.name for term in four.terms} - {term.name for term in one.terms} == {"NCCL"}
    two = LLAMA_8B.model_copy(update={"num_key_value_heads": 2})
    held = [gib(serving_fit(two, A100, replace(SERVING, gpus=gpus)), "KV cache") for gpus in (2, 4)]
    assert held[0] == held[1], "with fewer heads than GPUs, several hold the same one"


def test_what_one_gpu_cannot_hold_is_told_with_the_gpus_that_can():
    large = MODELS["meta-llama/Llama-3.3-70B-Instruct"]
    (told,) = serve(large, "Standard_NC96ads_A100_v4")
    assert "what fits: gpus 4 for each replica" in told
    assert serve(large, "Standard_NC96ads_A100_v4", gpus=4) == []
    (told,) = serve(large, "Standard_NC48ads_A100_v4", gpus=2)
    assert "of the 71.2 GiB that vLLM may take of each of 2 GPUs (gpu_memory_utilization 0.9)" in told
    (told,) = serve(large, gpus=2)
    assert told.endswith("gpus 2 of one node, which has 1")


def test_heads_are_shared_out_whole():
    seven = MODELS["Qwen/Qwen2.5-7B-Instruct"]
    (told,) = serve(seven, "Standard_ND96isr_H100_v5", gpus=8)
    assert told.endswith(
        "its 28 query heads, 4 key and value heads and 18944 inner columns cannot be shared out among 8 GPUs: gpus 4"
    )
    assert serve(seven, "Standard_ND96isr_H100_v5", gpus=4) == []
    assert smallest_sku(seven, replace(SERVING, gpus=8)) is None


def evaluate(model: Architecture, size: str, **settings: Any) -> list[str]:
    engine = EngineSettings.model_validate(settings)
    return check_evaluation("triage", TuningSettings(dataset="d", load_in_4bit=True), engine, model, [size])


def test_what_is_tuned_in_4_bits_may_be_too_large_to_be_evaluated_there():
    assert tune(size=T4.name, load_in_4bit=True, per_device_train_batch_size=1) == []
    (told,) = evaluate(LLAMA_8B, T4.name, dtype="float16")
    assert told.startswith("evaluating triage on Standard_NC4as_T4_v3, as it is served: vLLM would not start: ")
    assert told.endswith("tune in a pool with larger GPUs, or raise serving.gpus")
    assert evaluate(LLAMA_8B, "Standard_NC64as_T4_v3", dtype="float16", gpus=4) == []
    (told,) = evaluate(LLAMA_8B, T4.name, dtype="float16", gpus=4)
    assert told.endswith("serving.gpus 4 of one node, which has 1: tune in a pool that has them")
    (told,) = evaluate(LLAMA_3B, T4.name, dtype="bfloat16")
    assert told.endswith("cannot compute in bfloat16; set dtype to float16 or auto")
    assert evaluate(LLAMA_8B, A100.name) == []


# --- what people are told ------------------------------------------------------------------------------------------


def serve(
    model: Architecture = LLAMA_8B,
    size: str = A100.name,
    *,
    context: int = 4096,
    concurrency: int = 64,
    adapters: int = 2,
    lora_rank: int = 16,
    **more: Any,
) -> list[str]:
    settings = EngineSettings(max_model_len=context, max_num_seqs=concurrency, **more)
    return check_serving("base", model, size, settings, adapters, lora_rank)


def tune(model: Architecture = LLAMA_8B, size: str = A100.name, **changes: Any) -> list[str]:
    return check_tuning("triage", TuningSettings(dataset="d", **changes), model, [size])


def test_the_seed_pipeline_fits_an_a100():
    assert serve() == [] and tune() == []


def test_serving_that_does_not_fit_is_told_with_numbers_and_remedies():
    (told,) = serve(context=8192)
    assert told.startswith("serving base on Standard_NC24ads_A100_v4: about 80.9 GiB are needed of the 71.2 GiB ")
    assert "(gpu_memory_utilization 0.9): KV cache 64.0, weights 15.0, " in told  # the largest first
    assert "vLLM would start, but preempt" in told
    longest = largest_context(LLAMA_8B, A100, ServingLoad(8192, 64, 3, 16))
    assert (
        f"what fits: max_model_len {longest} at max_num_seqs 64, or max_num_seqs 54 at max_model_len 8192, or " in told
    )
    assert told.endswith("Standard_NC40ads_H100_v5 ($6.98/h)")


def test_tuning_that_does_not_fit_is_told_with_numbers_and_remedies():
    big: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_checkpointing": False}
    (told,) = tune(**big)
    assert told.startswith("tuning triage on Standard_NC24ads_A100_v4: about 91.0 GiB are needed of the 79.1 GiB of")
    assert ": activations 62.6, base weights 15.0, logits 11.7, " in told
    assert (
        "what fits: gradient_checkpointing: true (a third slower), or per_device_train_batch_size 6 (with more "
        "gradient_accumulation_steps the result is the same), or max_seq_length 848 at" in told
    )
    assert tune(**big | {"gradient_checkpointing": True}) == tune(**big | {"gradient_checkpointing": None}) == []
    assert tune(**big | {"per_device_train_batch_size": 6}) == [] != tune(**big | {"per_device_train_batch_size": 7})


def test_a_base_too_large_is_told_to_be_tuned_in_4_bits():
    (told,) = tune(size="Standard_NV36ads_A10_v5")
    assert "; gradient checkpointing is counted in; what fits: load_in_4bit: true, or " in told
    assert tune(size="Standard_NV36ads_A10_v5", load_in_4bit=True) == []
    large = MODELS["Qwen/Qwen2.5-32B-Instruct"]
    (told,) = tune(large, gradient_checkpointing=False, max_seq_length=4096)
    assert "what fits: load_in_4bit: true with gradient_checkpointing: true (a third slower), or " in told
    assert tune(large, gradient_checkpointing=True, max_seq_length=4096, load_in_4bit=True) == []


def test_every_size_of_a_pool_is_checked():
    settings = TuningSettings(dataset="d", gradient_checkpointing=False)
    told = check_tuning("triage", settings, LLAMA_8B, [A100.name, A10, T4.name])
    assert [line.split()[3] for line in told] == [f"{A10}:", f"{T4.name}:"]


def test_a_cheaper_size_has_as_many_gpus_as_tune_together():
    load = replace(TUNING, batch_rows=1, gradient_checkpointing=True, load_in_4bit=True)
    sizes = [smallest_sku(LLAMA_8B, replace(load, gpus=gpus)) for gpus in (1, 2, 4, 8)]
    assert [size and size.gpus for size in sizes] == [1, 4, 4, 8]  # one with two T4 there is not


def test_where_not_one_row_fits_the_longest_single_row_is_told():
    small: dict[str, Any] = {"model": MODELS["Qwen/Qwen2.5-7B-Instruct"], "size": A10, "gradient_checkpointing": False}
    (told,) = tune(**small)
    length = int(told.partition("or max_seq_length ")[2].partition(" at per_device_train_batch_size 1,")[0])
    assert 256 < length < 1024
    assert tune(**small, per_device_train_batch_size=1, max_seq_length=length) == []


def test_a_model_that_no_gpu_holds():
    large = MODELS["meta-llama/Llama-3.3-70B-Instruct"]
    (told,) = serve(large)
    assert "weights 131.4" in told and "would start" not in told
    assert told.endswith("what fits: Standard_NC96ads_A100_v4 ($14.69/h) with gpus 4")
    (told,) = serve(large.model_copy(update={"num_hidden_layers": 2000}))
    assert told.endswith("no GPU of the catalogue holds it: a smaller model")


def test_a_context_beyond_the_model():
    told = serve(context=131073)
    assert told == [
        "serving base on Standard_NC24ads_A100_v4: max_model_len 131073 is beyond the model's 131072 tokens"
    ]
    assert "max_seq_length 200000 is beyond the model's 131072 tokens" in tune(max_seq_length=200000)[0]


def test_bfloat16_on_a_t4():
    small = MODELS["meta-llama/Llama-3.2-1B"]
    assert serve(small, T4.name, concurrency=4) == []
    (told,) = serve(small, T4.name, concurrency=4, dtype="bfloat16")
    assert told.endswith("a T4 cannot compute in bfloat16; set dtype to float16 or auto")


def test_layers_that_the_model_does_not_have():
    (told,) = tune(MODELS["microsoft/Phi-3-mini-4k-instruct"])
    assert told.endswith(
        "lora_target_modules: gate_proj, k_proj, q_proj, up_proj, v_proj not in this base; "
        "it has qkv_proj, o_proj, gate_up_proj, down_proj"
    )


def test_bad_values_are_problems_not_exceptions():
    assert "did you mean Standard_NC24ads_A100_v4?" in serve(size="Standard_NC24ads_A100v4")[0]
    assert "did you mean Standard_NC24ads_A100_v4?" in tune(size="Standard_NC24ads_A100v4")[0]
    assert "rank 513 is beyond 512" in serve(lora_rank=513)[0]


# --- the command ---------------------------------------------------------------------------------------------------

COMMAND = ["--model", "meta-llama/Llama-3.1-8B-Instruct", "--sku", A100.name]


def test_command_prints_both_tables(capsys):
    assert main(COMMAND) == exits.OK
    told = capsys.readouterr().out
    assert told.startswith("Standard_NC24ads_A100_v4: 1 x A100 80GB, 79.1 GiB seen by the driver, $3.67/h")
    assert "Serving 64 requests x 4096 tokens, 2 LoRA slots (estimate)" in told
    assert "Tuning 4 rows x 1024 tokens, rank 16 (estimate)" in told
    assert "14.96 GiB  8,030,261,248 parameters x 2 bytes  [config.json]" in told
    assert told.count("\n  fits") == 2 and "does not fit" not in told


def test_command_decides_on_checkpointing_unless_told(capsys):
    big = [*COMMAND, "--batch", "8"]
    assert main(big) == exits.OK and "rank 16, gradient checkpointing (estimate)" in capsys.readouterr().out
    assert main([*big, "--no-gradient-checkpointing"]) == exits.FAILED
    assert "rank 16 (estimate)" in capsys.readouterr().out
    assert main([*COMMAND, "--load-in-4bit", "--gradient-checkpointing"]) == exits.OK
    assert "rank 16, base in 4 bits, gradient checkpointing (estimate)" in capsys.readouterr().out


def test_command_tells_what_does_not_fit(capsys):
    assert main([*COMMAND, "--context", "8192", "--adapters", "4", "--batch", "1"]) == exits.FAILED
    told = capsys.readouterr().out
    assert told.count("\n  fits") == 1 and "does not fit: about 81." in told and "5 LoRA slots" in told


def test_command_compares_all_sizes(capsys):
    assert main(["--model", "meta-llama/Llama-3.1-8B-Instruct", "--sku", "all"]) == exits.OK
    told = capsys.readouterr().out
    lines = {line.split()[0]: line for line in told.splitlines()[2:]}
    assert set(lines) == set(SKUS)
    assert lines[A100.name].count(" yes") == 2 and lines[T4.name].count(" no") == 2
    assert lines["Standard_ND96asr_v4"].endswith(" yes*") and "*: with gradient checkpointing" in told
    assert {name for name, line in lines.items() if line.endswith(" driver 570")} == {n for n in SKUS if "A10_v5" in n}
    assert main(["--model", "meta-llama/Llama-3.1-70B", "--sku", "all"]) == exits.FAILED
    told = capsys.readouterr().out
    assert next(line.split()[0] for line in told.splitlines() if " yes x4 " in line) == "Standard_NC96ads_A100_v4"
    assert main(["--model", "meta-llama/Llama-3.1-70B", "--sku", "all", "--load-in-4bit"]) == exits.OK


def test_a_gpu_whose_driver_is_too_old_cannot_be_used_however_well_the_model_fits(capsys):
    small = ["--model", "meta-llama/Llama-3.2-1B", "--context", "2048", "--concurrency", "4", "--sku"]
    assert main([*small, "Standard_NV36ads_A10_v5"]) == exits.FAILED
    told = capsys.readouterr().out
    assert told.count("\n  fits") == 2 and "Cannot be used: on Standard_NV36ads_A10_v5 AKS installs NVIDIA's" in told
    assert main([*small, T4.name]) == exits.OK and "Cannot be used" not in capsys.readouterr().out


def test_command_takes_a_config_json(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B.model_dump() | {"rope_theta": 1}))
    assert main(["--config", str(path), "--sku", A100.name]) == exits.OK
    assert "8,030,261,248 parameters" in capsys.readouterr().out
    path.write_text("{}")
    assert main(["--config", str(path), "--sku", "all"]) == exits.INPUT
    assert "hidden_size: required, but absent" in capsys.readouterr().err


def test_command_tells_all_bad_input_together(capsys):
    bad = [
        "--model",
        "meta-llama/Llama-3.1-8",
        "--sku",
        "Standard_NC24ads_A100v4",
        "--context",
        "3",
        "--lora-rank",
        "x",
    ]
    assert main(bad) == exits.INPUT
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == ["--model", "--sku", "--context", "--lora-rank"]
    assert "did you mean meta-llama/Llama-3.1-8B?" in told[0] and "--config" in told[0]
    assert main(["--sku", "all"]) == exits.INPUT
    assert "--model or --config is needed" in capsys.readouterr().err
