"""Scores worked out by hand, an interval that covers what it should, and a gate that is strict at its border."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from serving.evaluate import judge
from serving.scores import exact_match, gain_interval, normalise, token_f1
from training.spec import GateSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a \t b\n\nc ", "a b c"),
        ("\uff4b\uff55\uff42\uff45", "kube"),
        ("Get Pods!", "Get Pods!"),
        ("a\u00a0b", "a b"),
        ("e\u0301", "\u00e9"),
        (" ", ""),
    ],
)
def test_normalising_touches_white_space_and_unicode_forms_alone(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [("a b", " a  b\n", 1.0), ("a b", "A b", 0.0), ("a b.", "a b", 0.0), ("", "", 1.0), ("a", "", 0.0)],
)
def test_exact_match(answer: str, expected: str, score: float) -> None:
    assert exact_match(answer, expected) == score


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("a b c", "a b c", 1.0),
        ("c b a", "a b c", 1.0),  # order does not count
        ("a b", "a b c d", 2 * 1.0 * 0.5 / 1.5),  # precision 2/2, recall 2/4
        ("a a a", "a b", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # repetition counts once
        ("a a", "a a b", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("x", "y", 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
    ],
)
def test_token_f1(answer: str, expected: str, score: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(score)


def test_the_interval_of_no_difference_and_of_a_constant_one_is_a_point() -> None:
    scores = [0.0, 1.0, 1.0, 0.0] * 10
    assert gain_interval(scores, scores) == (0.0, 0.0)
    assert gain_interval([0.0] * 40, [1.0] * 40) == (1.0, 1.0)


def test_the_interval_agrees_with_the_binomial_where_that_is_known() -> None:
    """50 of 100 questions won, none lost: the resampled mean is Binomial(100, 0.5) / 100, whose 2.5 % quantile is 0.40."""
    low, high = gain_interval([0.0] * 100, [1.0] * 50 + [0.0] * 50)
    assert (low, high) == pytest.approx((0.40, 0.60), abs=0.011)


def test_the_interval_is_paired_by_question() -> None:
    """The same means with the wins on other questions: the pairing alone makes the difference."""
    base = [1.0, 0.0] * 50
    same_side = gain_interval(base, [1.0, 0.1] * 50)
    crossed = gain_interval(base, [0.1, 1.0] * 50)
    assert same_side[1] - same_side[0] < 0.1 * (crossed[1] - crossed[0])


def test_the_same_answers_always_get_the_same_interval() -> None:
    base, adapter = [0.0, 1.0, 0.0] * 20, [1.0, 1.0, 0.0] * 20
    assert gain_interval(base, adapter) == gain_interval(base, adapter)


def test_the_interval_covers_the_true_gain_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.scores.RESAMPLES", 500)
    draw = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        base, adapter = (draw.random((2, 80)) < [[0.3], [0.6]]).astype(float).tolist()
        low, high = gain_interval(base, adapter)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199


def figures(low: float, high: float = 0.9) -> dict[str, Any]:
    return {"base": 0.2, "adapter": 0.7, "gain_ci95": [low, high]}


@pytest.mark.parametrize(
    ("low", "min_gain", "passed"),
    [
        (0.11, 0.10, True),
        (0.10, 0.10, False),  # the whole interval above the minimum, not from it
        (0.0, 0.0, False),
        (math.ulp(0.0), 0.0, True),
        (-0.02, -0.05, True),  # "not noticeably worse", where someone asks for that
        (-0.05, -0.05, False),
    ],
)
def test_the_gate_opens_only_when_the_whole_interval_exceeds_the_minimum(
    low: float, min_gain: float, passed: bool
) -> None:
    verdict = judge(GateSpec(min_gain=min_gain), figures(low), 100, distinguishable=True)
    assert verdict[0] is passed
    assert verdict[1].startswith(
        "PASSED: exact_match 0.200 -> 0.700" if passed else "FAILED: exact_match 0.200 -> 0.700"
    )


def test_too_few_questions_are_no_proof_however_good_the_answers() -> None:
    gate = GateSpec(min_examples=30)
    assert judge(gate, figures(0.5), 29, distinguishable=True) == (
        False, "FAILED: 29 held-out examples, gate.min_examples is 30",
    )  # fmt: skip
    assert judge(gate, figures(0.5), 30, distinguishable=True)[0]


def test_an_adapter_that_no_replica_could_tell_from_its_base_fails() -> None:
    passed, verdict = judge(GateSpec(min_gain=-0.1), figures(0.0), 100, distinguishable=False)
    assert not passed
    assert "tell them apart" in verdict
