"""Figures against values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from stress import figures
from stress.drills import phases, ratio, spread
from stress.spec import Goodput, Slo


def row(started_at: float, **values: Any) -> dict[str, Any]:
    base = {
        "started_at": started_at,
        "model": "kubectl",
        "stream": True,
        "prompt": "normal",
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "ttft_ms": 50.0,
        "itl_ms": [10.0, 20.0],
        "latency_ms": 500.0,
        "status": 200,
        "error": None,
    }
    return base | values


@pytest.mark.parametrize(
    ("values", "p", "expected"),
    [
        ([1, 2, 3, 4], 50, 2.5),
        ([4, 1, 3, 2], 95, 3.85),  # rank 0.95 * 3 = 2.85: 3 + 0.85 * (4 - 3)
        ([10, 20, 30, 40, 50], 95, 48.0),  # rank 3.8
        ([7], 95, 7),
        ([1, 2], 0, 1),
        ([1, 2], 100, 2),
    ],
)
def test_percentile_interpolates_linearly(values: list[float], p: float, expected: float) -> None:
    assert figures.percentile(values, p) == pytest.approx(expected)


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="not zero"):
        figures.percentile([], 50)
    with pytest.raises(ValueError, match="between 0 and 100"):
        figures.percentile([1], 101)


def test_summary_by_hand() -> None:
    rows = [
        row(100.0, ttft_ms=999.0),  # in the ramp, ends in the ramp: counted, not measured
        row(109.8, ttft_ms=888.0),  # started in the ramp, ended (110.3) in the window: only in the rates
        row(111.0, ttft_ms=10.0, latency_ms=1000.0, completion_tokens=20, itl_ms=[5.0]),
        row(112.0, ttft_ms=30.0, latency_ms=2000.0, completion_tokens=10, itl_ms=[15.0], prompt_tokens=300),
        row(119.9, ttft_ms=50.0, latency_ms=400.0, completion_tokens=8, itl_ms=[25.0]),  # ends after the window
        row(113.0, stream=False, ttft_ms=None, itl_ms=[], latency_ms=800.0, completion_tokens=8),
        row(114.0, error="status 503", status=503, ttft_ms=None, itl_ms=[], latency_ms=3.0),
        row(105.0, error="status 503", status=503, ttft_ms=None, itl_ms=[], latency_ms=3.0),
        row(115.0, error="timeout", ttft_ms=77.0, itl_ms=[], latency_ms=9999.0),
    ]
    found = figures.summary(iter(rows), (110.0, 120.0))
    assert (found["requests"], found["failed"]) == (9, 3)
    assert found["failures_by_reason"] == {"status 503": 2, "timeout": 1}
    assert found["measured_requests"] == 4
    assert found["window_seconds"] == 10.0
    assert found["rps"] == 0.4  # 109.8, 111, 112, 113 ended inside
    assert found["output_tokens_per_second"] == pytest.approx((10 + 20 + 10 + 8) / 10)
    assert found["ttft_ms"] == {"p50": 30.0, "p95": 48.0}  # of 10, 30, 50
    assert found["itl_ms"] == {"p50": 15.0, "p95": 24.0}
    assert found["latency_ms"]["p50"] == 900.0  # of 400, 800, 1000, 2000
    assert found["tokens_per_second"]["p50"] == pytest.approx(15.0)  # of 5, 10, 20, 20
    assert found["prompt_tokens"] == {"p50": 100.0}
    assert found["absent"] == {"ttft_ms.p99": "needs 100 streamed requests, has 3"}


def test_p99_comes_with_a_hundred_requests() -> None:
    found = figures.summary([row(float(n), ttft_ms=float(n)) for n in range(101)])
    assert found["ttft_ms"]["p99"] == 99.0
    assert found["absent"] == {}


def test_missing_figures_are_absent_with_a_reason() -> None:
    found = figures.summary([], (0.0, 10.0))
    assert found["requests"] == 0
    assert "rps" not in found and "ttft_ms" not in found and "tokens_per_second" not in found
    assert found["absent"]["ttft_ms"] == "no requests were sent"

    failed = figures.summary([row(1.0, error="connection refused", latency_ms=1.0)], (0.0, 10.0))
    assert failed["failed"] == 1
    assert "rps" not in failed
    assert failed["absent"]["rps"] == "no request succeeded inside the measured window"

    whole = figures.summary([row(1.0, stream=False, ttft_ms=None, itl_ms=[], completion_tokens=None)], (0.0, 10.0))
    assert whole["rps"] == 0.1
    assert whole["absent"]["ttft_ms"] == "no streaming request succeeded"
    assert whole["absent"]["itl_ms"] == "no streaming request succeeded"
    assert "usage" in whole["absent"]["tokens_per_second"]
    assert "usage" in whole["absent"]["output_tokens_per_second"]


def test_a_run_that_ended_in_its_ramp_has_no_rates() -> None:
    found = figures.summary([row(1.0)], (5.0, 5.0))
    assert (found["requests"], found["failed"]) == (1, 0)
    assert found["absent"]["rps"] == found["absent"]["output_tokens_per_second"] == "the run ended before its ramp did"
    assert "ttft_ms" in found["absent"]


def test_spread_and_ratio_need_data() -> None:
    before, lost = spread([row(0, ttft_ms=10.0), row(1, ttft_ms=10.0)]), spread([row(2, ttft_ms=25.0)])
    assert before == {"p50": 10.0, "p95": 10.0, "requests": 2}
    assert ratio(lost, before) == 2.5
    assert spread([row(0, error="timeout")]) is None
    assert ratio(None, before) is None


def test_phases_sum_to_the_recovery() -> None:
    milestones: dict[str, list[float | None]] = {
        "restart": [101.0, 103.0],
        "engine": [112.0, 110.0],
        "adapters": [115.0, None],
    }
    assert phases(100.0, 116.5, milestones) == {"restart": 1.0, "engine": 9.0, "adapters": 5.0, "routed": 1.5}
    # the token came before any replica said that it was ready
    early = phases(100.0, 114.0, milestones)
    assert early == {"restart": 1.0, "engine": 9.0, "adapters": 4.0, "routed": 0.0}
    assert sum(early.values()) == pytest.approx(14.0)


def test_each_bound_is_judged_by_its_figure() -> None:
    rows = [row(float(n), ttft_ms=10.0 * n, itl_ms=[5.0], error="timeout" if n == 0 else None) for n in range(10)]
    found = figures.bounds(figures.summary(rows), Slo(ttft_p95_ms=50, itl_p95_ms=5, error_rate=0.1))
    assert [(bound["name"], bound["at_most"], bound["held"]) for bound in found] == [
        ("ttft_p95_ms", 50, False), ("itl_p95_ms", 5, True), ("error_rate", 0.1, True),
    ]  # fmt: skip
    assert (found[0]["measured"], found[2]["measured"]) == (pytest.approx(86.0), 0.1)
    assert figures.told(found[0]) == "ttft_p95_ms: 86, at most 50: not held"
    assert figures.bounds(figures.summary(rows), Slo()) == []


def test_a_bound_without_a_figure_is_not_held_and_says_why() -> None:
    whole = figures.summary([row(1.0, stream=False, ttft_ms=None, itl_ms=[])], (0.0, 10.0))
    (bound,) = figures.bounds(whole, Slo(ttft_p95_ms=50))
    assert bound["held"] is False
    assert figures.told(bound) == ("ttft_p95_ms: not measured (no streaming request succeeded), at most 50: not held")
    (bound,) = figures.bounds(figures.summary([], (0.0, 1.0)), Slo(error_rate=1))
    assert (bound["held"], bound["reason"]) == (False, "no requests were sent")


def test_goodput_by_hand() -> None:
    objectives = {"ttft_ms": 100.0, "tpot_ms": 20.0, "e2e_ms": 1000.0}
    rows = [
        row(101.0, ttft_ms=100.0, completion_tokens=3, itl_ms=[10.0, 30.0]),  # on each limit: good
        row(102.0, ttft_ms=100.1),
        row(103.0, completion_tokens=3, itl_ms=[10.0, 31.0]),  # 20.5 ms a token
        row(104.0, latency_ms=1000.1),
        row(105.0, completion_tokens=1, itl_ms=[]),  # no further token: good
        row(106.0, stream=False, ttft_ms=None, itl_ms=[]),  # asked for the whole answer alone: good
        row(107.0, error="timeout"),
        row(108.0, error="status 429", status=429),
        row(109.8),  # started in the window, ended after it: good, not in the rate
        row(99.8),  # ended in the window: in the rate
    ]
    found = figures.summary(rows, (100.0, 110.0), objectives=objectives)
    assert found["goodput_rps"] == 0.4 and found["rps"] == 0.7
    assert found["goodput_share"] == round(4 / 9, 6)
    assert "goodput_rps" not in figures.summary(rows, (100.0, 110.0))
    nothing = figures.summary(rows[6:8], (100.0, 110.0), objectives=objectives)
    assert (nothing["goodput_rps"], nothing["goodput_share"]) == (0, 0)
    unknown = figures.summary([row(101.0, completion_tokens=None)], (100.0, 110.0), objectives={"tpot_ms": 15.0})
    assert unknown["goodput_share"] == 1  # without usage, a chunk is a token


def test_shed_requests_are_apart_from_errors() -> None:
    refused = {"error": "status 429", "status": 429, "ttft_ms": None, "itl_ms": []}
    rows = [
        *(row(float(n)) for n in range(6)), row(6.0, **refused, retry_after_seconds=2.0), row(7.0, **refused),
        row(8.0, **refused, retry_after_seconds=4.0), row(9.0, error="timeout"),
    ]  # fmt: skip
    found = figures.summary(rows)
    assert (found["requests"], found["shed"], found["failed"]) == (10, 3, 1)
    assert found["failures_by_reason"] == {"timeout": 1}
    assert found["retry_after_seconds"] == {"p50": 3.0, "p95": 3.9}
    assert figures.failed(rows) == 4  # to who lost them, it is all one

    def judged(slo: Slo) -> list[tuple[str, float, bool]]:
        return [(bound["name"], bound["measured"], bound["held"]) for bound in figures.bounds(found, slo)]

    assert judged(Slo(error_rate=0.1)) == [("error_rate", 0.4, False)]  # a refusal is an error until it is judged apart
    assert judged(Slo(error_rate=0.1, shed_rate=0.2)) == [("error_rate", 0.1, True), ("shed_rate", 0.3, False)]
    silent = figures.summary([row(0.0), row(1.0, **refused)])
    assert "Retry-After" in silent["absent"]["retry_after_seconds"]
    assert "retry_after_seconds" not in figures.summary([row(0.0)])["absent"]


def test_an_open_loop_tells_both_times() -> None:
    rows = [
        row(1.0, ttft_ms=150.0, late_ms=100.0),
        row(2.0, ttft_ms=50.0, late_ms=0.0),
        row(3.0, error=figures.NOT_SENT, status=None, ttft_ms=None, itl_ms=[], latency_ms=None),
    ]
    found = figures.summary(rows, (0.0, 10.0))
    assert found["ttft_ms"]["p50"] == 100.0 and found["ttft_from_sending_ms"]["p50"] == 50.0
    assert found["late_ms"]["p50"] == 50.0
    assert (found["failed"], found["not_sent"]) == (1, 1)
    assert [b["held"] for b in figures.bounds(found, Slo(ttft_p95_ms=900, error_rate=0.5))] == [True, True]
    lacking, unasked = figures.bounds(found, Slo(ttft_p95_ms=900))
    assert not lacking["held"] and figures.told(unasked) == "not_sent: 1, at most 0: not held"
    assert figures.bounds(found, Slo()) == []
    assert {"late_ms", "ttft_from_sending_ms", "not_sent"}.isdisjoint(figures.summary([row(1.0)]))


@pytest.mark.parametrize(
    ("failed", "shed", "slo", "held"),
    [
        (5, 0, {"ttft_p95_ms": 900}, [True]),
        (6, 0, {"ttft_p95_ms": 900, "itl_p95_ms": 900}, [False, False]),
        (3, 3, {"ttft_p95_ms": 900}, [False]),
        (3, 3, {"ttft_p95_ms": 900, "shed_rate": 0.5}, [True, True]),  # judged by itself
        (90, 0, {"ttft_p95_ms": 900, "error_rate": 0.95}, [True, True]),  # said to be fine
    ],
)
def test_a_p95_is_not_held_where_more_failed_than_it_leaves_out(
    failed: int, shed: int, slo: dict[str, float], held: list[bool]
) -> None:
    lost = [row(1.0, error="timeout", status=None, ttft_ms=None, itl_ms=[])] * failed
    refused = [row(1.0, error="status 429", status=429, ttft_ms=None, itl_ms=[])] * shed
    good = [row(1.0, ttft_ms=10.0)] * (100 - failed - shed)
    found = figures.bounds(figures.summary([*good, *lost, *refused], (0.0, 10.0)), Slo.model_validate(slo))
    assert [bound["held"] for bound in found] == held
    if not held[0]:
        assert "6 of 100 requests were not answered, more than a p95 leaves out" in figures.told(found[0])


def test_figures_of_parts_add_up() -> None:
    rows = [
        row(1.0, client="x", model="a", ttft_ms=10.0), row(2.0, client="x", model="b", ttft_ms=30.0),
        row(3.0, client="y", model="a", error="status 429", status=429, ttft_ms=None, itl_ms=[]),
    ]  # fmt: skip
    by = {"client": lambda row: str(row["client"]), "model": lambda row: str(row["model"])}
    found = figures.summary(rows, (0.0, 10.0), objectives={"ttft_ms": 20.0}, by=by)
    assert {name: part["requests"] for name, part in found["by_client"].items()} == {"x": 2, "y": 1}
    assert found["by_client"]["x"]["ttft_ms"] == {"p50": 20.0, "p95": 29.0}
    assert found["by_client"]["x"]["goodput_share"] == 0.5 and found["by_model"]["a"]["goodput_share"] == 0.5
    assert (found["by_client"]["y"]["shed"], found["by_client"]["y"]["failed"]) == (1, 0)
    assert "ttft_ms" not in found["by_client"]["y"]
    assert found["absent"]["by_client.y.ttft_ms"] == "no request that started after the ramp succeeded"
    assert sum(part["rps"] for part in found["by_model"].values()) == found["rps"]


def test_goodput_bounds_are_the_least() -> None:
    slo = Slo(goodput=Goodput(ttft_ms=20, min_rps=0.2, min_share=0.4))
    rows = [row(1.0, ttft_ms=10.0), row(2.0, ttft_ms=30.0)]
    found = figures.bounds(figures.summary(rows, (0.0, 10.0), objectives=slo.goodput.objectives), slo)
    assert [(b["name"], b["at_least"], b["measured"], b["held"]) for b in found] == [
        ("goodput_rps", 0.2, 0.1, False), ("goodput_share", 0.4, 0.5, True),
    ]  # fmt: skip
    assert figures.told(found[0]) == "goodput_rps: 0.1, at least 0.2: not held"
    (bound,) = figures.bounds(
        figures.summary([], (5.0, 5.0), objectives={"ttft_ms": 20.0}), Slo(goodput=Goodput(ttft_ms=20, min_rps=1))
    )
    assert (bound["held"], bound["reason"]) == (False, "the run ended before its ramp did")
