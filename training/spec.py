"""What is tuned and when it is good enough: the one typed description of a tuning run. No heavy imports."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, model_validator

from common.lora import ADAPTER_NAME, MAX_LORA_RANK
from common.settings import Settings

AdapterName = Annotated[str, Field(pattern=f"^{ADAPTER_NAME}$")]
"""A name clients put into `model`: lower-case letters, digits and hyphens, at most 40 characters."""

LLAMA_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class GateSpec(Settings):
    """When an adapter may be served: the 95 % interval of its gain over the base lies above `min_gain`."""

    metric: Literal["exact_match", "token_f1"] = Field("exact_match", description="The score that decides.")
    min_gain: float = Field(0.0, ge=-1, le=1, description="The gain in score that the whole interval must exceed.")
    min_examples: int = Field(30, ge=1, description="Held-out examples below which no verdict can be a pass.")
    max_examples: int | None = Field(None, ge=1, description="Evaluate only the first N held-out examples.")

    @model_validator(mode="after")
    def _can_pass(self) -> GateSpec:
        if self.max_examples is not None and self.max_examples < self.min_examples:
            raise ValueError(
                f"max_examples = {self.max_examples} is below min_examples = {self.min_examples}, so nothing could pass"
            )
        return self


class TuningSettings(Settings):
    """What a person chooses for one adapter, by the familiar names of transformers and peft."""

    dataset: str = Field(
        min_length=1,
        description="JSON Lines of instruction/input/output or messages rows: a local path, https://..., or "
        "az://ACCOUNT/CONTAINER/PATH.",
    )
    dataset_sha256: str | None = Field(
        None, pattern="^(sha256:)?[0-9a-fA-F]{64}$", description="SHA-256 that the dataset must have, in hex."
    )

    learning_rate: float = Field(2e-4, gt=0, lt=1, description="Peak learning rate of AdamW.")
    num_train_epochs: int = Field(3, ge=1, le=1000, description="Passes over the tuning split.")
    per_device_train_batch_size: int = Field(
        4, ge=1, description="Memory: a forward pass packs rows up to this many times max_seq_length tokens."
    )
    gradient_accumulation_steps: int = Field(
        4, ge=1, description="An optimiser step takes this many times per_device_train_batch_size rows."
    )
    lora_r: int = Field(
        16, ge=1, le=MAX_LORA_RANK, description="Rank of the adapter; 512 is the most that vLLM serves."
    )
    lora_alpha: int = Field(32, ge=1, description="Scale: the update is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input while tuning.")
    lora_target_modules: tuple[str, ...] = Field(
        LLAMA_LINEAR_LAYERS, min_length=1, description="Layers that get an adapter, by the end of their name."
    )
    max_seq_length: int = Field(1024, ge=8, description="Tokens of prompt and answer together; longer rows drop.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field("linear", description="After the warm-up.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    seed: int = Field(42, ge=0, description="Order of the rows, initial adapter, dropout.")
    held_out_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the rows kept away from tuning.")
    logging_steps: int = Field(5, ge=1, description="Optimiser steps between two recorded measurements.")
    save_minutes: float = Field(5, gt=0, description="Minutes between two checkpoints; SIGTERM writes one as well.")
    save_steps: int | None = Field(None, ge=1, description="Also a checkpoint each so many optimiser steps.")
    gradient_checkpointing: bool | None = Field(
        None,
        description="Compute activations again in the backward pass instead of keeping them: a third slower, far less "
        "memory. None: in a stack only where the GPU needs it, else no.",
    )
    load_in_4bit: bool = Field(
        False, description="QLoRA: the base in 4 bits (NF4, double quantisation) while tuning. It is served whole."
    )
    gate: GateSpec = Field(default_factory=GateSpec, description="What the adapter must prove before it is served.")

    @field_serializer("dataset")
    def _without_signature(self, dataset: str) -> str:
        """A query may be a SAS token: it goes into no file, and so into no artifact."""
        return dataset.partition("?")[0] if "://" in dataset else dataset


ASIDE = (
    "gate",
    "logging_steps",
    "save_minutes",
    "save_steps",
    "gradient_checkpointing",
    "dataset",
    "dataset_sha256",
    "base_model",
)


class TuningSpec(TuningSettings):
    """One LoRA tuning run: the settings of an adapter, its name, and the base it is tuned on."""

    adapter: AdapterName = Field(description="The alias that clients will put into `model`.")
    base_model: str = Field(min_length=1, description="Folder of the base model (config, weights, tokenizer).")

    def result_settings(self) -> dict[str, Any]:
        """The settings that decide the weights: not where data and base lie, how often it logs, where memory is saved.

        The gate is left out too: another threshold asks for another verdict, not for another training.
        """
        return self.model_dump(mode="json", exclude=set(ASIDE))

    def fingerprint(self, *, dataset_digest: str, base_revision: str) -> str:
        """Hex SHA-256 of everything that decides the weights: settings, data and base."""
        settings = self.result_settings() | {"dataset_digest": dataset_digest, "base_revision": base_revision}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
