"""Publishes an evaluated adapter as an artifact; the `promoted` tag moves only if its gate was passed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.adapter import AdapterCard, AdapterError, promote, publish_adapter, version
from artifacts.store import open_store
from common.files import read_json, write_atomic
from common.settings import SettingsError, load_settings
from training.spec import TuningSpec


@dataclass(frozen=True)
class Published:
    """What became of a run: its artifact, and whether it is the one to serve."""

    name: str
    version: str
    digest: str
    promoted: bool
    verdict: str


def publish(run: Path, store_url: str) -> Published:
    """Push the adapter of the evaluated run in folder `run` to the store; promote it if it passed.

    One that failed is pushed as well: a candidate that people can look at, but that no replica serves. Raises
    `SettingsError` when the run is not evaluated or vLLM would refuse its adapter.
    """
    missing = [name for name in ("spec.json", "tuning.json", "evaluation.json") if not (run / name).is_file()]
    if missing:
        raise SettingsError([f"{run}: not an evaluated run: lacks {', '.join(missing)}; tune, then evaluate"])
    spec = load_settings(run / "spec.json", TuningSpec)
    tuning, evaluation = read_json(run / "tuning.json"), read_json(run / "evaluation.json")
    card = AdapterCard(
        name=spec.adapter,
        base_model=Path(spec.base_model).name,
        base_revision=tuning["base_revision"],
        dataset_digest=tuning["dataset_digest"],
        tuning=spec.model_dump(mode="json"),
        evaluation={name: value for name, value in evaluation.items() if name != "seconds"},
        versions=tuning["versions"] | evaluation["versions"],
    )
    write_atomic(run / "README.md", model_card(card, tuning))  # PEFT's own beside the weights is an empty form
    try:
        store = open_store(store_url)
        digest = publish_adapter(store, spec.adapter, run / "adapter", card, reports=run)
    except (AdapterError, ValueError) as error:
        raise SettingsError([str(error)]) from error
    if card.passed:
        promote(store, spec.adapter, digest)
    return Published(spec.adapter, version(digest), digest, card.passed, str(evaluation["verdict"]))


def model_card(card: AdapterCard, tuning: dict[str, Any]) -> str:
    """The adapter's README: what it is, from what it was made, and what it was measured to do. Markdown.

    The header's keys are those that Hugging Face's model cards have.
    """
    spec, evaluation = card.tuning, card.evaluation
    low, high = evaluation["gain_ci95"]
    settings = "\n".join(
        f"| {name} | `{value}` |" for name, value in sorted(spec.items()) if not isinstance(value, dict)
    )
    versions = ", ".join(f"{name} {number}" for name, number in sorted(card.versions.items()))
    return f"""---
base_model: {card.base_model}
library_name: peft
---
# {card.name}

A LoRA adapter of rank {spec["lora_r"]} for `{card.base_model}`, tuned on {tuning["examples"]:,} rows.

**{evaluation["verdict"]}**

| measured on {evaluation["examples"]:,} rows that tuning never saw | |
| --- | --- |
| {evaluation["metric"]}, base | {evaluation["base"]:.3f} |
| {evaluation["metric"]}, adapter | {evaluation["adapter"]:.3f} |
| gain, 95 % interval | {low:+.3f} to {high:+.3f} |

| made from | |
| --- | --- |
| base revision | `{card.base_revision}` |
| dataset | `{card.dataset_digest}`, {tuning["dropped"]:,} rows too long and left out |
| versions | {versions} |

| setting | |
| --- | --- |
{settings}
"""
