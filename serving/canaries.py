"""Canaries: a few prompts whose log-probabilities prove that a replica really applies the right adapter.

vLLM can serve the bare base in an adapter's name without an error (keys that match no layer: vLLM issue 34186). So the
evaluation records what the adapter, and for contrast the base, gives to each token of a few answers; a replica that
loaded the adapter must reproduce it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.client import Answer, Engine

COUNT = 4
TOKENS = 16  # of an answer: enough to tell, few enough to be asked in a second
# Mean difference in nats that rounding may cause: fp32 kernels differ by about 1e-5, bf16 ones by about 1e-2.
TOLERANCE = 0.05
# How many tolerances apart adapter and base must be on a canary for it to tell them apart.
CONTRAST = 4


class Canary(BaseModel):
    """One prompt with an answer: what each of the answer's tokens was worth to the adapter and to the base."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    token_ids: list[int] = Field(description="Prompt, then answer.")
    prompt_length: int = Field(ge=1, description="How many of them are the prompt.")
    adapter: list[float] = Field(description="Log-probability in nats of each answer token under the adapter.")
    base: list[float] = Field(description="The same under the base.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        answer = len(self.token_ids) - self.prompt_length
        if answer < 1 or {len(self.adapter), len(self.base)} != {answer}:
            raise ValueError(f"{answer} answer tokens, {len(self.adapter)} and {len(self.base)} log-probabilities")
        return self

    @property
    def contrast(self) -> float:
        return mean_difference(self.adapter, self.base)


class Canaries(BaseModel):
    """The whole of `canaries.json`."""

    model_config = ConfigDict(frozen=True)

    tolerance: float = Field(TOLERANCE, gt=0, description="Mean difference in nats up to which a canary agrees.")
    canaries: list[Canary] = Field(min_length=1)


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean |difference| of two equally long lists of log-probabilities, in nats a token."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def record(engine: Engine, adapter: str, base: str, answers: Sequence[Answer]) -> Canaries | None:
    """Measure `answers` under both models and keep the `COUNT` that tell them apart best.

    None when not one tells them apart: then no replica could prove which of the two it serves.
    """

    measured = []
    for answer in answers:
        token_ids = answer.token_ids[: answer.prompt_length + TOKENS]
        if len(token_ids) > answer.prompt_length:
            adapter_says, base_says = (
                engine.log_probabilities(model, token_ids, answer.prompt_length) for model in (adapter, base)
            )
            measured.append(
                Canary(token_ids=token_ids, prompt_length=answer.prompt_length, adapter=adapter_says, base=base_says)
            )
    telling = sorted((c for c in measured if c.contrast >= CONTRAST * TOLERANCE), key=lambda c: -c.contrast)
    return Canaries(tolerance=TOLERANCE, canaries=telling[:COUNT]) if telling else None


def largest_difference(engine: Engine, model: str, canaries: Canaries) -> float:
    """The largest mean difference in nats between what `model` gives now and what was recorded; no number is inf."""
    differences = [
        mean_difference(engine.log_probabilities(model, canary.token_ids, canary.prompt_length), canary.adapter)
        for canary in canaries.canaries
    ]
    return max(math.inf if math.isnan(difference) else difference for difference in differences)


def load(path: Path) -> Canaries:
    """The canaries in `path`. Raises pydantic's ValidationError or OSError."""
    return Canaries.model_validate_json(path.read_bytes())
