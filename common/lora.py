"""What the field fixes about adapters: the ranks that vLLM takes, and the names that an adapter may have."""

from __future__ import annotations

# The values of --max-lora-rank (vllm/config/lora.py MaxLoRARanks, 0.32); an adapter's rank is rounded up to one.
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_LORA_RANK = VLLM_LORA_RANKS[-1]

# An adapter's name is a repository, a part of Kubernetes names and the `model` of requests: 1 to 40 characters.
ADAPTER_NAME = r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?"


def vllm_lora_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that holds an adapter of `rank`. Raises ValueError beyond `MAX_LORA_RANK`.

    Not more than needed: every adapter is padded to it, which costs memory and decode speed (vLLM PR 22782).
    """
    for allowed in VLLM_LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(f"rank {rank} is beyond {MAX_LORA_RANK}, the most that vLLM serves")
