"""Scores of answers, and the interval of the gain between two models on the same questions."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
BOOTSTRAP_SEED = 42


def normalise(text: str) -> str:
    """Unicode NFKC, runs of white space as one blank, none at the ends. Case and punctuation stay: they matter to a
    command line as they do to code."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def exact_match(answer: str, expected: str) -> float:
    """1.0 when the two are equal after `normalise`, otherwise 0.0."""
    return float(normalise(answer) == normalise(expected))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over blank-separated words, counted with repetition.

    As in SQuAD 1.1's evaluation (Rajpurkar et al. 2016), with `normalise` for its English-only normalisation. Two
    empty texts score 1.
    """
    ours, theirs = Counter(normalise(answer).split()), Counter(normalise(expected).split())
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((ours & theirs).values())
    return 2 * common / (sum(ours.values()) + sum(theirs.values()))


METRICS = {"exact_match": exact_match, "token_f1": token_f1}


def gain_interval(base: Sequence[float], adapter: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of mean(adapter - base), paired by question (Efron & Tibshirani 1993, ch. 13).

    `base` and `adapter` hold one score a question, in the same order. The resamples come from a fixed seed, so that
    the same answers always get the same verdict.
    """
    gains = np.asarray(adapter, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    picks = np.random.default_rng(BOOTSTRAP_SEED)
    # In slices: all resamples of 10,000 questions at once would take 800 MB.
    means = np.concatenate(
        [gains[picks.integers(0, len(gains), size=(100, len(gains)))].mean(axis=1) for _ in range(RESAMPLES // 100)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
