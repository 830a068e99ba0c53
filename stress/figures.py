"""Figures from request records: pure functions, every definition stated here and nowhere else.

Percentiles interpolate linearly between the two nearest ranks: rank = p/100 * (n - 1), as `numpy.percentile` does by
default. Times (`ttft_ms`, `itl_ms`, `latency_ms`) and tokens per second are over successful requests that started in
the window, also if they ended after it: leaving out the slow ones would flatter. Rates (`rps`,
`output_tokens_per_second`) are over successful requests that ended in the window, divided by its length. The window
leaves out the ramp. `requests` and `failed` count all requests of the run, ramp included.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stress.spec import Slo

PERCENTILES = "linear interpolation between nearest ranks, rank = p/100 * (n - 1)"
Row = Mapping[str, Any]


def percentile(values: Sequence[float], p: float) -> float:
    """The `p`-th percentile (0..100) of unsorted `values`, linearly interpolated. Raises `ValueError` if empty."""
    if not values:
        raise ValueError("no values: a percentile of nothing is not zero")
    if not 0 <= p <= 100:
        raise ValueError(f"p must be between 0 and 100, found {p}")
    ordered = sorted(values)
    rank = p / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def percentiles(values: Sequence[float], *wanted: int) -> dict[str, float]:
    """`{"p50": ..., ...}`, rounded to 3 places."""
    ordered = sorted(values)
    return {f"p{p}": round(percentile(ordered, p), 3) for p in wanted}


def ended_at(row: Row) -> float:
    """Unix seconds at which the request ended."""
    return float(row["started_at"]) + float(row["latency_ms"] or 0.0) / 1000


def summary(rows: Iterable[Row], window: tuple[float, float] | None = None) -> dict[str, Any]:
    """The figures of one run; `rows` is read once.

    `window` is (start, end) in unix seconds; without it, from the first start to the last end (then `rows` must be a
    sequence). A figure that has no data is not there, and `absent` says why.
    """
    if window is None:
        rows = list(rows)
        window = (min((r["started_at"] for r in rows), default=0.0), max((ended_at(r) for r in rows), default=0.0))
    start, end = window
    requests = measured = completed = streams = 0
    reasons: Counter[str] = Counter()
    ttft, itl, latency, speed, prompt = (array("d") for _ in range(5))
    output_tokens = 0
    output_known = True
    for row in rows:
        requests += 1
        if row["error"] is not None:
            reasons[row["error"]] += 1
            continue
        if start <= ended_at(row) <= end:
            completed += 1
            output_known = output_known and row["completion_tokens"] is not None
            output_tokens += row["completion_tokens"] or 0
        if not start <= row["started_at"] <= end:
            continue
        measured += 1
        streams += row["stream"]
        latency.append(row["latency_ms"])
        if row["ttft_ms"] is not None:
            ttft.append(row["ttft_ms"])
        itl.extend(row["itl_ms"])
        if row["prompt_tokens"] is not None:
            prompt.append(row["prompt_tokens"])
        if row["completion_tokens"] is not None and row["latency_ms"] > 0:
            speed.append(row["completion_tokens"] / row["latency_ms"] * 1000)

    figures: dict[str, Any] = {
        "requests": requests,
        "failed": sum(reasons.values()),
        "failures_by_reason": dict(reasons.most_common()),
        "measured_requests": measured,
        "window_seconds": round(end - start, 3),
    }
    absent: dict[str, str] = {}
    no_rate = "no request succeeded inside the measured window" if end > start else "the run ended before its ramp did"
    nothing = "no requests were sent" if not requests else "no request that started after the ramp succeeded"

    def put(name: str, values: Sequence[float], reason: str, *wanted: int) -> None:
        if values:
            figures[name] = percentiles(values, *wanted)
        else:
            absent[name] = reason

    if end > start and completed:
        figures["rps"] = round(completed / (end - start), 4)
    else:
        absent["rps"] = no_rate
    put("ttft_ms", ttft, "no streaming request succeeded" if measured else nothing, 50, 95)
    if len(ttft) >= 100:
        figures["ttft_ms"]["p99"] = round(percentile(ttft, 99), 3)
    else:
        absent["ttft_ms.p99"] = f"needs 100 streamed requests, has {len(ttft)}"
    put(
        "itl_ms",
        itl,
        "no streamed answer had two chunks of text" if streams else "no streaming request succeeded",
        50,
        95,
    )
    put("latency_ms", latency, nothing, 50, 95)
    no_usage = "the server sent no usage" if measured else nothing
    put("tokens_per_second", speed, no_usage, 50, 95)
    put("prompt_tokens", prompt, no_usage, 50)
    if end > start and completed and output_known:
        figures["output_tokens_per_second"] = round(output_tokens / (end - start), 3)
    else:
        absent["output_tokens_per_second"] = no_rate if output_known else "the server sent no usage with some answers"
    figures["absent"] = absent
    return figures


def ttft_values(rows: Iterable[Row]) -> list[float]:
    """TTFT in ms of the successful streamed requests among `rows`."""
    return [row["ttft_ms"] for row in rows if row["error"] is None and row["ttft_ms"] is not None]


def failed(rows: Iterable[Row]) -> int:
    """How many of `rows` failed."""
    return sum(row["error"] is not None for row in rows)


def bounds(summary: Mapping[str, Any], slo: Slo) -> list[dict[str, Any]]:
    """What became of each bound that `slo` gives: `{name, at_most, measured, held}`, in the order of its fields.

    Without a figure `measured` is not there, the bound is not held, and `reason` says why.
    """
    absent = summary.get("absent", {})
    measured: dict[str, tuple[float | None, str]] = {
        "ttft_p95_ms": (summary.get("ttft_ms", {}).get("p95"), absent.get("ttft_ms", "")),
        "itl_p95_ms": (summary.get("itl_ms", {}).get("p95"), absent.get("itl_ms", "")),
        "error_rate": (
            round(summary["failed"] / summary["requests"], 6) if summary["requests"] else None,
            "no requests were sent",
        ),
    }
    found = []
    for name, most in slo.model_dump(exclude_none=True).items():
        value, reason = measured[name]
        entry = {"name": name, "at_most": most}
        found.append(
            entry | ({"reason": reason, "held": False} if value is None else {"measured": value, "held": value <= most})
        )
    return found


def told(bound: Mapping[str, Any]) -> str:
    """A bound in words: `ttft_p95_ms: 912.3, at most 800: not held`."""
    seen = f"{bound['measured']:g}" if "measured" in bound else f"not measured ({bound['reason']})"
    return f"{bound['name']}: {seen}, at most {bound['at_most']:g}: {'held' if bound['held'] else 'not held'}"
