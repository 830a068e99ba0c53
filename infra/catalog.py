"""What can be rented and what can be run on it: Azure's GPU sizes, and models by the figures of their config.json."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from common.settings import Settings, SettingsError, explain
from infra.prices import list_price

NEEDED_DRIVER = 580
"""NVIDIA's oldest driver branch for the images' CUDA 13 (CUDA Toolkit 13.0 release notes, table 3; a branch serves all
minor versions of the CUDA that it came with, none of the next)."""
CUDA_DRIVER = 580
"""The branch that AKS installs: CUDA LTS 580.159.04 (AgentBaker, 2026-08-21)."""
GRID_DRIVER = 570
"""The same on virtual GPUs such as the A10: GRID 570.237, which knows CUDA 12.8 at most (aks-gpu#179, 2026-08-17)."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or the slice of one that a virtual GPU is.

    `memory_gb` is the vendor's figure, `driver_gib` what torch and vLLM see as the whole of it: the smallest value
    found in public logs (`total_gpu_memory` of vLLM, `total capacity` of torch's out-of-memory message). `driver` is
    the branch of NVIDIA's driver that AKS installs for it.
    """

    name: str
    memory_gb: int
    driver_gib: float
    compute_capability: float
    driver: int = CUDA_DRIVER

    @property
    def bf16(self) -> bool:
        """Whether it computes in bfloat16: from compute capability 8.0 on (vllm/platforms/cuda.py)."""
        return self.compute_capability >= 8.0


T4 = Gpu("T4", 16, 14.56, 7.5)
# Azure's A10 is always a GRID virtual GPU. No log of torch's view of one was found, so the whole one counts as a bare
# A10 (22.07 GiB in vLLM's logs, with ECC), and the slices as that share of it.
A10 = Gpu("A10", 24, 22.0, 8.6, GRID_DRIVER)
A10_HALF = Gpu("1/2 A10", 12, 11.0, 8.6, GRID_DRIVER)
A10_THIRD = Gpu("1/3 A10", 8, 7.3, 8.6, GRID_DRIVER)
A10_SIXTH = Gpu("1/6 A10", 4, 3.6, 8.6, GRID_DRIVER)
A100_40 = Gpu("A100 40GB", 40, 39.39, 8.0)
A100_80 = Gpu("A100 80GB", 80, 79.1, 8.0)
H100_80 = Gpu("H100 80GB", 80, 79.1, 9.0)
H100_NVL = Gpu("H100 NVL", 94, 93.0, 9.0)
H200 = Gpu("H200", 141, 139.7, 9.0)


@dataclass(frozen=True)
class Sku:
    """An Azure VM size with GPUs, as AKS names it.

    `quota_family` is the name of its vCPU quota, `temp_gib` its temporary disk, `nvme_gib` its raw NVMe disks in all.
    """

    name: str
    gpus: int
    gpu: Gpu
    vcpus: int
    ram_gib: int
    temp_gib: int
    nvme_gib: int
    quota_family: str

    @property
    def usd_per_hour(self) -> float:
        """The Linux pay-as-you-go price in `price_region`, by which sizes are compared."""
        return list_price(self.name)[0]

    @property
    def price_region(self) -> str:
        """East US, or where it is sold instead."""
        return list_price(self.name)[1]


_T4_FAMILY, _A10_FAMILY = "Standard NCASv3_T4 Family", "StandardNVADSA10v5Family"
_A100_FAMILY, _H100_FAMILY = "StandardNCADSA100v4Family", "StandardNCadsH100v5Family"

# Sizes from Microsoft's azure-compute-docs (pages of 2024-07 to 2025-09), families from karpenter-provider-azure's
# known_skus (2025-05-15). 960 GB are 894 GiB; that the A100 sizes have one such disk a GPU is inferred from the
# smallest.
SKUS: dict[str, Sku] = {
    sku.name: sku
    for sku in (
        Sku("Standard_NC4as_T4_v3", 1, T4, 4, 28, 176, 0, _T4_FAMILY),
        Sku("Standard_NC8as_T4_v3", 1, T4, 8, 56, 352, 0, _T4_FAMILY),
        Sku("Standard_NC16as_T4_v3", 1, T4, 16, 110, 352, 0, _T4_FAMILY),
        Sku("Standard_NC64as_T4_v3", 4, T4, 64, 440, 2816, 0, _T4_FAMILY),
        Sku("Standard_NV6ads_A10_v5", 1, A10_SIXTH, 6, 55, 180, 0, _A10_FAMILY),
        Sku("Standard_NV12ads_A10_v5", 1, A10_THIRD, 12, 110, 360, 0, _A10_FAMILY),
        Sku("Standard_NV18ads_A10_v5", 1, A10_HALF, 18, 220, 720, 0, _A10_FAMILY),
        Sku("Standard_NV36ads_A10_v5", 1, A10, 36, 440, 1440, 0, _A10_FAMILY),
        Sku("Standard_NV36adms_A10_v5", 1, A10, 36, 880, 2880, 0, _A10_FAMILY),
        Sku("Standard_NV72ads_A10_v5", 2, A10, 72, 880, 2880, 0, _A10_FAMILY),
        Sku("Standard_NC24ads_A100_v4", 1, A100_80, 24, 220, 64, 894, _A100_FAMILY),
        Sku("Standard_NC48ads_A100_v4", 2, A100_80, 48, 440, 128, 1788, _A100_FAMILY),
        Sku("Standard_NC96ads_A100_v4", 4, A100_80, 96, 880, 256, 3576, _A100_FAMILY),
        Sku("Standard_ND96asr_v4", 8, A100_40, 96, 900, 6000, 0, "Standard NDASv4_A100 Family"),
        Sku("Standard_ND96amsr_A100_v4", 8, A100_80, 96, 1900, 6400, 0, "Standard NDAMSv4_A100Family"),
        Sku("Standard_NC40ads_H100_v5", 1, H100_NVL, 40, 320, 0, 3576, _H100_FAMILY),
        Sku("Standard_NC80adis_H100_v5", 2, H100_NVL, 80, 640, 0, 7152, _H100_FAMILY),
        Sku("Standard_NCC40ads_H100_v5", 1, H100_NVL, 40, 320, 0, 0, "StandardNCCads2023Family"),
        Sku("Standard_ND96isr_H100_v5", 8, H100_80, 96, 1900, 1024, 28672, "standardNDSH100v5Family"),
        Sku("Standard_ND96isr_H200_v5", 8, H200, 96, 1850, 1024, 28672, "standardNDISRH200V5Family"),
    )
}


def sku(name: str) -> Sku:
    """The size `name`. Raises ValueError, with the nearest name, for one that the catalogue lacks."""
    if name not in SKUS:
        raise _unknown(name, "GPU size", SKUS)
    return SKUS[name]


class Architecture(Settings):
    """A dense decoder by the figures of its config.json, under the names that they have there."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "phi3"] = Field(
        "llama", description="Family: qwen2 has biases on q, k and v, qwen3 norms on q and k, phi3 fused projections."
    )
    hidden_size: int = Field(ge=1, description="Width of the residual stream.")
    intermediate_size: int = Field(ge=1, description="Width of the gated feed-forward network.")
    num_hidden_layers: int = Field(ge=1, description="Decoder layers.")
    num_attention_heads: int = Field(ge=1, description="Query heads.")
    num_key_value_heads: int = Field(ge=1, description="Key and value heads, which the KV cache holds.")
    head_dim: int | None = Field(None, ge=1, description="Width of a head; else hidden_size / num_attention_heads.")
    vocab_size: int = Field(ge=1, description="Rows of the embedding.")
    max_position_embeddings: int = Field(ge=1, description="The longest context in tokens.")
    tie_word_embeddings: bool = Field(False, description="Whether the output layer is the embedding itself.")
    attention_bias: bool = Field(False, description="Whether q, k, v and o have biases (llama, qwen3).")
    mlp_bias: bool = Field(False, description="Whether the feed-forward layers have biases (llama).")

    @model_validator(mode="after")
    def _divides(self) -> Architecture:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is no multiple of num_attention_heads = {self.num_attention_heads}; "
                "give head_dim"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        return self

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_size

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together, which is that of all value heads."""
        return self.num_key_value_heads * self.head_size

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Name to (inputs, outputs) of the linear layers in one decoder layer, as transformers names them."""
        hidden, inner, query, key = self.hidden_size, self.intermediate_size, self.query_size, self.key_value_size
        if self.model_type == "phi3":
            head = {"qkv_proj": (hidden, query + 2 * key), "o_proj": (query, hidden)}
            return head | {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key),
            "v_proj": (hidden, key),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def parameters(self) -> int:
        """All parameters, exactly; a tied output layer is counted once."""
        layer = sum(inputs * outputs for inputs, outputs in self.linear_layers.values()) + 2 * self.hidden_size
        if self.model_type == "qwen2" or self.attention_bias:
            layer += self.query_size + 2 * self.key_value_size
        if self.model_type != "qwen2" and self.attention_bias:
            layer += self.hidden_size
        if self.model_type == "qwen3":
            layer += 2 * self.head_size
        if self.mlp_bias:
            layer += 2 * self.intermediate_size + self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * layer + self.hidden_size


_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def architecture_of(path: Path) -> Architecture:
    """Read a model's config.json; keys that do not count here are ignored.

    Raises `SettingsError` with every problem: missing or wrong keys, mixtures of experts, families not known here.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError([f"{path}: no such file"]) from None
    except (OSError, ValueError) as error:
        raise SettingsError([f"{path}: cannot be read as JSON: {error}"]) from None
    if not isinstance(config, dict):
        raise SettingsError([f"{path}: expected the object of a model's config.json"])
    if experts := [key for key in _EXPERT_KEYS if config.get(key)]:
        raise SettingsError([f"{path}: {', '.join(experts)}: mixtures of experts are not supported; take a dense one"])
    if "text_config" in config:
        raise SettingsError([f"{path}: text_config: models of images or sound are not supported; take a text model"])
    if "quantization_config" in config:
        raise SettingsError([f"{path}: quantization_config: give the config.json of the model before quantisation"])
    known = {key: config[key] for key in Architecture.model_fields if key in config}
    missing = [f"{path}: model_type: required, but absent"] if "model_type" not in config else []
    try:
        architecture = Architecture.model_validate(known)
    except ValidationError as error:
        raise SettingsError(missing + explain(error, Architecture, path=path)) from None
    if missing:
        raise SettingsError(missing)
    return architecture


def architecture(name: str) -> Architecture:
    """The architecture of hub model `name`. Raises ValueError, with the nearest name, for one not in the catalogue."""
    if name not in MODELS:
        raise _unknown(name, "model", MODELS)
    return MODELS[name]


def _unknown(name: str, kind: str, known: Iterable[str]) -> ValueError:
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    hint = f"did you mean {by_lower[near[0]]}?" if near else f"known are {', '.join(by_lower.values())}"
    return ValueError(f"{name}: no such {kind} in the catalogue; {hint}")


def _model(
    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "phi3"],
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    vocab: int,
    context: int,
    *,
    head_dim: int | None = None,
    tied: bool = False,
) -> Architecture:
    return Architecture(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
    )


_LLAMA_1B = _model("llama", 2048, 8192, 16, 32, 8, 128256, 131072, tied=True)
_LLAMA_3B = _model("llama", 3072, 8192, 28, 24, 8, 128256, 131072, tied=True)
_LLAMA_8B = _model("llama", 4096, 14336, 32, 32, 8, 128256, 131072)
_LLAMA_70B = _model("llama", 8192, 28672, 80, 64, 8, 128256, 131072)

# By hub id, from each model's config.json. The tests hold the parameter counts against those that the hub publishes.
MODELS: dict[str, Architecture] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "mistralai/Mistral-7B-Instruct-v0.3": _model("mistral", 4096, 14336, 32, 32, 8, 32768, 32768),
    # 128000 is what the base model's config gave; revisions of this one have given 1024000 and 131072.
    "mistralai/Mistral-Nemo-Instruct-2407": _model("mistral", 5120, 14336, 40, 32, 8, 131072, 128000, head_dim=128),
    "mistralai/Mistral-Small-24B-Instruct-2501": _model("mistral", 5120, 32768, 40, 32, 8, 131072, 32768, head_dim=128),
    "Qwen/Qwen2.5-0.5B-Instruct": _model("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _model("qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": _model("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _model("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768),
    "Qwen/Qwen2.5-14B-Instruct": _model("qwen2", 5120, 13824, 48, 40, 8, 152064, 32768),
    "Qwen/Qwen2.5-32B-Instruct": _model("qwen2", 5120, 27648, 64, 40, 8, 152064, 32768),
    "Qwen/Qwen2.5-72B-Instruct": _model("qwen2", 8192, 29568, 80, 64, 8, 152064, 32768),
    "Qwen/Qwen3-0.6B": _model("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, head_dim=128, tied=True),
    "Qwen/Qwen3-1.7B": _model("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, head_dim=128, tied=True),
    "Qwen/Qwen3-4B": _model("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, head_dim=128, tied=True),
    "Qwen/Qwen3-8B": _model("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, head_dim=128),
    "Qwen/Qwen3-14B": _model("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960, head_dim=128),
    "Qwen/Qwen3-32B": _model("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, head_dim=128),
    "microsoft/Phi-3-mini-4k-instruct": _model("phi3", 3072, 8192, 32, 32, 32, 32064, 4096),
    "microsoft/Phi-3-mini-128k-instruct": _model("phi3", 3072, 8192, 32, 32, 32, 32064, 131072),
    "microsoft/Phi-3-medium-4k-instruct": _model("phi3", 5120, 17920, 40, 40, 10, 32064, 4096),
    "microsoft/Phi-3-medium-128k-instruct": _model("phi3", 5120, 17920, 40, 40, 10, 32064, 131072),
    "microsoft/phi-4": _model("phi3", 5120, 17920, 40, 40, 10, 100352, 16384),
}
