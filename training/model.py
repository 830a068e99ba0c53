"""The model that is tuned: the frozen base, whole or in 4 bits, with a fresh adapter on it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from training.fused import fuse
from training.packing import ATTENTION
from training.spec import TuningSpec


def load_model(spec: TuningSpec, folder: Path, device: torch.device) -> Any:
    """The base with a fresh adapter on it, in bf16 where the GPU computes in it and fp32 elsewhere.

    The adapter itself stays in fp32: its updates are too small for bf16's 8 bits of mantissa.
    """
    disable_progress_bar()  # one bar is enough, and loading takes a moment
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if half else torch.float32
    # In 4 bits it is quantised on its way to the device, so it has to be told where that is.
    quantised = {"quantization_config": _nf4(dtype), "device_map": {"": device}} if spec.load_in_4bit else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION, **quantised)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora_r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=list(spec.lora_target_modules),
        bias="none",  # vLLM refuses adapters with biases
    )
    # Not peft's prepare_model_for_kbit_training: it brings embeddings, norms and lm_head to fp32 (for Llama 3.1 8B
    # 2 GiB more of weights, and fp32 activations between the layers), and what else it does is done here.
    model = get_peft_model(base if spec.load_in_4bit else base.to(device), config, autocast_adapter_dtype=True)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fuse(model)
    return model.train()


def own_precision(model: Any) -> AbstractContextManager[None]:
    """While entered, no adapter copies its input to fp32: autocast brings its weights to the base's bf16 instead.

    peft casts the other way, and autograd keeps a copy for each adapted layer: for Llama 3.1 8B at 4 x 1,024
    tokens 9.5 GiB beside the 31.3 that are kept without.
    """
    return disable_input_dtype_casting(model, active=model.dtype == torch.bfloat16)  # type: ignore[no-any-return]


def _nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's own setting (Dettmers and others, 2023): normal floats of 4 bits, their scales quantised once more."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
