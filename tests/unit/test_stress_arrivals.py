"""When requests are due, and that what they ask is mixed as the shares say, each within the others."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise, takewhile
from statistics import mean, pstdev

import pytest

from stress.arrivals import Mix, due_seconds
from stress.spec import LoadSpec


def test_arrivals_are_a_poisson_process_at_the_rate() -> None:
    due = list(islice(due_seconds(20, 0, seed=1), 4000))
    gaps = [b - a for a, b in pairwise(due)]
    assert min(gaps) > 0
    assert mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert pstdev(gaps) == pytest.approx(mean(gaps), rel=0.06)  # exponential: a clock would have 0
    per_second = Counter(int(at) for at in due)
    counts = [per_second[second] for second in range(int(due[-1]))]
    assert pstdev(counts) ** 2 == pytest.approx(mean(counts), rel=0.25)  # Poisson: variance is the mean


def test_arrivals_are_seeded() -> None:
    assert list(islice(due_seconds(5, 2, 7), 50)) == list(islice(due_seconds(5, 2, 7), 50))
    assert list(islice(due_seconds(5, 2, 7), 50)) != list(islice(due_seconds(5, 2, 8), 50))


def test_the_sum_of_the_workers_processes_is_one_at_their_rates_together() -> None:
    parts = [list(takewhile(lambda at: at < 200, due_seconds(5, 20, f"7/{index}"))) for index in range(4)]
    assert len({tuple(part[:5]) for part in parts}) == 4  # independent: the same seed, other numbers
    assert parts[1] == list(takewhile(lambda at: at < 200, due_seconds(5, 20, "7/1")))
    due = sorted(at for part in parts for at in part)
    assert sum(at < 20 for at in due) == pytest.approx(200, abs=4 * 200**0.5)  # half the rate in the ramp
    counts = [Counter(int(at) for at in due)[second] for second in range(20, 200)]
    assert mean(counts) == pytest.approx(20, rel=0.06)
    assert pstdev(counts) ** 2 == pytest.approx(mean(counts), rel=0.35)  # Poisson: variance is the mean


def test_users_are_numbered_the_same_whoever_has_them() -> None:
    spec = LoadSpec(models=["a"], clients={"x": 2, "y": 1}, stream_share=0.5)
    whole = list(islice(Mix(spec).users(), 12))
    assert Counter(client for client, _ in whole) == {"x": 8, "y": 4}
    assert Counter(whole)["x", True] == 4 and Counter(whole)["y", True] == 2
    shared = [list(islice(Mix(spec).users(), index, 12, 3)) for index in range(3)]
    assert [user for each in zip(*shared, strict=True) for user in each] == whole


def test_the_rate_rises_evenly_over_the_ramp() -> None:
    due = list(takewhile(lambda at: at < 40, due_seconds(100, 20, seed=3)))
    quarters = Counter(int(at // 5) for at in due)
    # the areas under the rate: 100 / 20 * t, then 100
    for quarter, expected in enumerate([62.5, 187.5, 312.5, 437.5, 500, 500, 500, 500]):
        assert quarters[quarter] == pytest.approx(expected, abs=4 * expected**0.5)


def test_no_share_is_in_step_with_another() -> None:
    """Half the requests long, two models and two clients of equal weight: each model gets as many long ones."""
    spec = LoadSpec(
        models={"a": 1, "b": 1}, clients={"x": 1, "y": 1}, long_share=0.5, stream_share=0.5, arrivals="poisson",
        requests_per_second=1,
    )  # fmt: skip
    mix = Mix(spec)
    seen: Counter[tuple[object, ...]] = Counter()
    for _ in range(160):
        client = mix.client()
        model = mix.model(client)
        stream = mix.stream(client, model)
        seen[client, model, stream, mix.long(client, model, stream)] += 1
    assert len(seen) == 16 and set(seen.values()) == {10}


def test_weights_and_shares_hold_in_any_stretch() -> None:
    mix = Mix(LoadSpec(models={"a": 3, "b": 1}, long_share=0.25))
    asked = [(mix.model(None), mix.long(None, "m", True)) for _ in range(80)]
    for start in range(0, 80, 8):
        stretch = asked[start : start + 8]
        assert Counter(model for model, _ in stretch) == {"a": 6, "b": 2}
        assert sum(long for _, long in stretch) == 2
    none = Mix(LoadSpec(models={"a": 1}, stream_share=0))
    assert none.client() is None and not none.stream(None) and not none.long(None)
