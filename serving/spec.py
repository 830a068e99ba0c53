"""What is served and how: the one typed description of a replica. No heavy imports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.lora import MAX_LORA_RANK
from common.settings import Settings
from training.spec import AdapterName


class EngineSettings(Settings):
    """What a person chooses for every replica of a pool."""

    device: Literal["cuda", "cpu"] = Field(
        "cuda", description="What vLLM runs on; cpu is for trying the whole with a tiny model."
    )
    cpu_kv_cache_mib: int = Field(256, ge=16, description="KV cache in MiB on device cpu.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Of weights and compute.")
    max_model_len: int = Field(4096, ge=16, description="Context: tokens of prompt and answer together.")
    max_num_seqs: int = Field(64, ge=1, description="Requests computed at once; more wait.")
    gpu_memory_utilization: float = Field(0.90, gt=0, lt=1, description="Share of the GPU's memory vLLM may take.")
    max_request_kib: int = Field(1024, ge=1, description="Size of a request body beyond which the answer is 413.")
    shutdown_timeout_seconds: int = Field(45, ge=0, description="For running requests to end after SIGTERM.")
    poll_seconds: float = Field(2.0, gt=0, description="Between two looks of the sidecar at the `promoted` tags.")
    old_version_seconds: float = Field(
        30.0, ge=0, description="How long a replaced version stays loaded, for requests that were about to name it."
    )


class ServingSpec(EngineSettings):
    """One base model with the adapters served on it by every replica of a pool."""

    base_model: str = Field(min_length=1, description="Folder of the base model.")
    base_name: str = Field("base", min_length=1, description="What clients put into `model` for the base itself.")
    store: str = Field(min_length=1, description="Where adapters come from: oci://registry/prefix, or a folder.")
    adapters: tuple[AdapterName, ...] = Field((), description="Adapters to follow: each one's `promoted` tag.")
    max_lora_rank: int = Field(16, ge=1, le=MAX_LORA_RANK, description="Largest rank among the adapters.")
