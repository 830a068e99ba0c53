"""What is served and how: the one typed description of a replica. No heavy imports."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from common.lora import MAX_LORA_RANK
from common.settings import Settings
from training.spec import AdapterName

TierName = Annotated[str, Field(pattern="^[a-z][a-z0-9-]{0,30}$")]
STANDARD = "standard"
"""The tier of every client of which nothing else is said."""


GPUS = (1, 2, 4, 8)
"""Among how many GPUs a replica may be split."""


def _of_gpus(value: int) -> int:
    if value not in GPUS:
        raise ValueError(f"should be 1, 2, 4 or 8, as nodes have GPUs, found {value}")
    return value


Gpus = Annotated[int, AfterValidator(_of_gpus)]


class Tier(Settings):
    """What one group of clients may ask of a replica. Each replica counts for itself."""

    prompt_tokens: int | None = Field(
        None, ge=1, description="Longest prompt; a longer one is answered 400. None: the context (max_model_len)."
    )
    output_tokens: int | None = Field(
        None, ge=1, description="Longest answer; who asks for more gets 400. None: what the context leaves."
    )
    n: int = Field(16, ge=1, le=64, description="Answers of one request: its n times its prompts.")
    concurrency: int | None = Field(
        None, ge=1, description="Requests of one client at once on a replica; more are answered 429. None: no limit."
    )
    waiting: int = Field(
        256, ge=1, description="Requests waiting on a replica at which this tier gets 429; a low tier has a low number."
    )
    kv_cache: float = Field(
        1.0, gt=0, le=1, description="Share of the KV cache in use at which this tier gets 429; 1: when it is full."
    )


class EngineSettings(Settings):
    """What a person chooses for every replica of a pool."""

    device: Literal["cuda", "cpu"] = Field(
        "cuda", description="What vLLM runs on; cpu is for trying the whole with a tiny model."
    )
    gpus: Gpus = Field(
        1,
        description="GPUs of one node that hold a replica together (tensor parallelism), for a model beyond one of "
        "them: 1, 2, 4 or 8. On device cpu, processes.",
    )
    cpu_kv_cache_mib: int = Field(256, ge=16, description="KV cache in MiB on device cpu.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Of weights and compute.")
    max_model_len: int = Field(4096, ge=16, description="Context: tokens of prompt and answer together.")
    max_num_seqs: int = Field(64, ge=1, description="Requests computed at once; more wait.")
    long_prefill_tokens: int = Field(
        512,
        ge=16,
        description="Of a longer prompt so many tokens, or a fair share of a step, are computed at once beside others.",
    )
    gpu_memory_utilization: float = Field(0.90, gt=0, lt=1, description="Share of the GPU's memory vLLM may take.")
    max_request_kib: int = Field(1024, ge=1, description="Size of a request body beyond which the answer is 413.")
    shutdown_timeout_seconds: int = Field(45, ge=0, description="For running requests to end after SIGTERM.")
    tool_call_parser: Literal["hermes", "llama3_json", "llama4_pythonic", "mistral", "pythonic"] | None = Field(
        None,
        description="How this base writes tool calls, such as llama3_json; none: tools only where a request names one.",
    )
    stall_seconds: float = Field(
        20.0, ge=5, description="Without a step of the engine while requests are in flight: it counts as hung then."
    )
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
