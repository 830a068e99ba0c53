"""Publishes an evaluated adapter as an artifact; the `promoted` tag moves only if its gate was passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.adapter import AdapterCard, AdapterError, promote, publish_adapter, version
from artifacts.store import open_store
from common.files import read_json, read_jsonl, tree_digest, write_atomic
from common.settings import SettingsError, load_settings
from training import curves
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
    `SettingsError` when the run is not evaluated as it is now or vLLM would refuse its adapter.
    """
    missing = [name for name in ("spec.json", "tuning.json", "evaluation.json") if not (run / name).is_file()]
    if missing:
        raise SettingsError(
            [f"{run}: not an evaluated run: lacks {', '.join(missing)}; tune (or adopt), then evaluate"]
        )
    spec = load_settings(run / "spec.json", TuningSpec)
    tuning, evaluation = read_json(run / "tuning.json"), read_json(run / "evaluation.json")
    if changed := [name for name, value in subject(run, spec).items() if evaluation.get(name) != value]:
        what = " and ".join(f"the {name.removesuffix('_digest')}" for name in changed)
        raise SettingsError([f"{run}: evaluation.json is of before a change of {what}: evaluate again, then publish"])
    card = AdapterCard(
        name=spec.adapter,
        base_model=Path(spec.base_model).name,
        base_revision=tuning["base_revision"],
        dataset_digest=tuning["dataset_digest"],
        tuning=spec.model_dump(
            mode="json", exclude_unset=True
        ),  # of an adopted one, only what is known is written down
        evaluation={name: value for name, value in evaluation.items() if name != "seconds"},
        versions=tuning["versions"] | evaluation["versions"],
    )
    events = list(read_jsonl(run / "events.jsonl")) if (run / "events.jsonl").is_file() else []
    if events:
        write_atomic(run / "curves.svg", curves.svg(events, f"{card.name}: tuning"))
    else:
        (run / "curves.svg").unlink(missing_ok=True)
    write_atomic(run / "README.md", model_card(card, tuning, events))  # PEFT's own beside the weights is an empty form
    try:
        store = open_store(store_url)
        digest = publish_adapter(store, spec.adapter, run / "adapter", card, reports=run)
    except (AdapterError, ValueError) as error:
        raise SettingsError([str(error)]) from error
    if card.passed:
        promote(store, spec.adapter, digest)
    return Published(spec.adapter, version(digest), digest, card.passed, str(evaluation["verdict"]))


def subject(run: Path, spec: TuningSpec) -> dict[str, Any]:
    """Of what the evaluation in `run` must be to speak for it, in the words of evaluation.json."""
    gate = spec.gate.model_dump(mode="json", exclude_none=True)
    return {"gate": gate, "adapter_digest": tree_digest(run / "adapter")}


def model_card(card: AdapterCard, tuning: dict[str, Any], events: Sequence[dict[str, Any]] = ()) -> str:
    """The adapter's README: what it is, from what it was made, how that went, and what it was measured to do. Markdown.

    The header's keys are those that Hugging Face's model cards have. What `tuning` does not say is left out.
    """
    spec, evaluation = card.tuning, card.evaluation
    low, high = evaluation["gain_ci95"]
    adopted = "adopted" in tuning
    measured = "rows that tuning never saw"
    origin = f"tuned on {tuning['examples']:,} rows" if "examples" in tuning else "tuned"
    if adopted:
        by = f" with PEFT {tuning['versions']['peft']}" if "peft" in tuning["versions"] else ""
        origin = f"tuned elsewhere{by} and adopted here: how it was tuned is not known"
        measured = "held-out rows of the dataset; whether its tuning saw them is not known"
    settings = {
        name: value for name, value in sorted(spec.items()) if not isinstance(value, dict) and value is not None
    }
    return f"""---
base_model: {card.base_model}
library_name: peft
pipeline_tag: text-generation
tags: [lora]
---
# {card.name}

A LoRA adapter of rank {spec["lora_r"]} for `{card.base_model}`, {origin}.

**{evaluation["verdict"]}**

| measured on {evaluation["examples"]:,} {measured} | |
| --- | --- |
| {evaluation["metric"]}, base | {evaluation["base"]:.3f} |
| {evaluation["metric"]}, adapter | {evaluation["adapter"]:.3f} |
| gain, 95 % interval | {low:+.3f} to {high:+.3f} |

{_rows("made from", _origin(card, tuning))}
{_course(card, tuning, events)}
{_rows("setting", {name: f"`{value}`" for name, value in settings.items()})}
"""


def _origin(card: AdapterCard, tuning: dict[str, Any]) -> dict[str, str]:
    left_out = f", {tuning['dropped']:,} rows too long and left out" if "dropped" in tuning else ""
    seeds = {"tuning": tuning.get("seed")} | card.evaluation.get("seeds", {})
    said = {
        "base revision": f"`{card.base_revision}`",
        "dataset": f"`{card.dataset_digest}`{left_out}",
        "seeds": ", ".join(f"{name} {seed}" for name, seed in seeds.items() if seed is not None),
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(card.versions.items())),
    }
    if "adopted" in tuning:
        said["taken from the image"] = f"`{tuning['adopted']['image']}`" if "image" in tuning["adopted"] else ""
        said["by its own account, tuned on"] = f"`{tuning['adopted']['base_model'] or 'nothing named'}`"
    return {name: text for name, text in said.items() if text}


def _course(card: AdapterCard, tuning: dict[str, Any], events: Sequence[dict[str, Any]]) -> str:
    """How the tuning went: what it took, and the curves. Empty where nothing was recorded."""
    if not events:
        return ""
    facts = []
    if "tokens" in tuning:
        facts.append(
            f"{tuning['steps']:,} steps, {tuning['tokens']:,} tokens in {tuning['seconds']:,.0f} s "
            f"({tuning['tokens_per_second']:,.0f} tokens/s) on {tuning['device']}"
        )
    if tuning.get("peak_gpu_bytes"):
        facts.append(f"at most {tuning['peak_gpu_bytes'] / 2**30:.1f} GiB of GPU memory")
    if events[0]["step"] > card.tuning.get("logging_steps", 1):
        facts.append(f"what was measured before step {events[0]['step']} was lost with an earlier attempt's disk")
    told = f"{'; '.join(facts)}.\n\n" if facts else ""
    return (
        f"\n{told}![Loss, learning rate and tokens per second over the steps](curves.svg)\n\n{curves.table(events)}\n"
    )


def _rows(title: str, rows: dict[str, str]) -> str:
    return "\n".join([f"| {title} | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())])
