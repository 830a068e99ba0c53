"""Figures from request records: pure functions, every definition stated here and nowhere else.

Percentiles interpolate linearly between the two nearest ranks: rank = p/100 * (n - 1), as `numpy.percentile` does by
default. Times (`ttft_ms`, `itl_ms`, `latency_ms`) and tokens per second are over successful requests that started in
the window, also if they ended after it: leaving out the slow ones would flatter. Rates (`rps`, `goodput_rps`,
`output_tokens_per_second`) are over successful requests that ended in the window, divided by its length. The window
leaves out the ramp. `requests`, `failed` and `shed` count all requests of the run, ramp included.

Of an open loop a request starts when it is due, and TTFT and latency count from then; `late_ms` is how much later it
was sent, and `ttft_from_sending_ms` is TTFT without that. `not_sent` are those of `failed` that were due while
`max_in_flight` were unanswered.

`shed`: answered 429, the server's way to say that it is full; no part of `failed`. `retry_after_seconds` is over those
with that header; `retry_after_obeyed`: whether users waited so long (closed loop), or nobody (open loop).

Good: answered within each objective of `slo.goodput`. `tpot_ms` is (last text - first text) / (completion tokens - 1),
0 with one token. `ttft_ms` and `tpot_ms` are asked of streamed requests alone. `goodput_share` is the good share of all
requests that started in the window, failed and shed ones included.

Differences from `vllm bench serve` (0.32, vllm/benchmarks/serve.py and lib/endpoint_request_func.py), all on purpose:

- TTFT: vLLM stops at the first chunk with choices, which has the role alone; we stop at the first text. Its server
  sends both at once, with the first token, so the two agree unless the first token has no text. vLLM reuses
  connections; ours are new, as those of many people are: a TCP (and TLS) handshake more. With `--max-concurrency` vLLM
  counts from sending, not from arrival; its `client_queue_time` has the rest.
- ITL: vLLM counts a gap for every further chunk with choices: one of about 0 ms from the role to the first text, and
  those without text (the last one, if the answer ended by itself; half a character). Ours are between chunks of text,
  which is what a reader waits for. So its mean is lower, by about 1/n with answers of n tokens, and so are its low
  percentiles; leave out its first gap to compare. Neither knows of several tokens in one chunk.
- TPOT: vLLM's begins with the role and ends with the last chunk with choices: the same, unless that has no text.
- End: vLLM's latency (`e2el`) ends at the last chunk with choices, ours with the body, after usage and [DONE].
- Rates: vLLM divides all it completed by the whole run, with its ramp and its last answers; ours are of the window.
- Success: for vLLM any stream with one chunk; ours needs text, [DONE] and no abort. vLLM sends streams only.
- Goodput: vLLM's is by the whole run, and counts no request that failed; neither does `goodput_rps`.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stress.spec import Slo

PERCENTILES = "linear interpolation between nearest ranks, rank = p/100 * (n - 1)"
NOT_SENT = "not sent"  # the error of a request that was due while max_in_flight were unanswered
LATENCIES = {"ttft_p95_ms": 0.95, "itl_p95_ms": 0.95}  # bounds of a percentile, and which
VALUES = (
    *("ttft_ms", "ttft_from_sending_ms", "late_ms", "itl_ms", "latency_ms", "tokens_per_second", "prompt_tokens"),
    "retry_after_seconds",
)
PART_FIGURES = (
    *("requests", "failed", "shed", "rps", "goodput_rps", "goodput_share", "ttft_ms", "itl_ms", "latency_ms"),
    "tokens_per_second",
)
Row = Mapping[str, Any]


def percentile(values: Sequence[float], p: float) -> float:
    """The `p`-th percentile (0..100) of unsorted `values`, linearly interpolated. Raises `ValueError` if empty."""
    if not len(values):
        raise ValueError("no values: a percentile of nothing is not zero")
    if not 0 <= p <= 100:
        raise ValueError(f"p must be between 0 and 100, found {p}")
    return float(np.percentile(np.asarray(values, dtype=float), p))  # 8 bytes a value: there may be millions


def percentiles(values: Sequence[float], *wanted: int) -> dict[str, float]:
    """`{"p50": ..., ...}`, rounded to 3 places."""
    return {f"p{p}": round(percentile(values, p), 3) for p in wanted}


def ended_at(row: Row) -> float:
    """Unix seconds at which the request ended."""
    return float(row["started_at"]) + float(row["latency_ms"] or 0.0) / 1000


def shed(row: Row) -> bool:
    """Whether the server refused the request because it was full."""
    return row["error"] is not None and row.get("status") == 429


def good(row: Row, objectives: Mapping[str, float]) -> bool:
    """Whether the request was answered within each of the `objectives` that can be asked of it."""
    if row["error"] is not None:
        return False
    seen = {"e2e_ms": row["latency_ms"]}
    if row["stream"]:
        gaps = row["itl_ms"]
        tokens = row["completion_tokens"] or len(gaps) + 1
        seen |= {"ttft_ms": row["ttft_ms"], "tpot_ms": sum(gaps) / (tokens - 1) if tokens > 1 else 0.0}
    return all(seen[name] <= most for name, most in objectives.items() if name in seen)


class Tally:
    """The figures of the rows that were added, for the window (start, end) in unix seconds."""

    def __init__(self, window: tuple[float, float], objectives: Mapping[str, float]) -> None:
        self.start, self.end = window
        self.objectives = objectives
        self.requests = self.shed = self.not_sent = self.measured = self.completed = self.streams = 0
        self.started = self.good = self.good_completed = 0
        self.reasons: Counter[str] = Counter()
        self.output_tokens: int | None = 0
        self.values: dict[str, array[float]] = {name: array("d") for name in VALUES}

    def add(self, row: Row) -> None:
        """Count one request in."""
        values, inside = self.values, self.start <= row["started_at"] <= self.end
        self.requests += 1
        self.started += inside
        if inside and row.get("late_ms") is not None:
            values["late_ms"].append(row["late_ms"])
        if shed(row):
            self.shed += 1
            if row.get("retry_after_seconds") is not None:
                values["retry_after_seconds"].append(row["retry_after_seconds"])
            return
        if row["error"] is not None:
            self.reasons[row["error"]] += 1
            return
        kept = bool(self.objectives) and good(row, self.objectives)
        if self.start <= ended_at(row) <= self.end:
            self.completed += 1
            self.good_completed += kept
            known = self.output_tokens is not None and row["completion_tokens"] is not None
            self.output_tokens = self.output_tokens + row["completion_tokens"] if known else None
        if not inside:
            return
        self.measured += 1
        self.good += kept
        self.streams += row["stream"]
        values["latency_ms"].append(row["latency_ms"])
        if row["ttft_ms"] is not None:
            values["ttft_ms"].append(row["ttft_ms"])
            if row.get("late_ms") is not None:
                values["ttft_from_sending_ms"].append(row["ttft_ms"] - row["late_ms"])
        values["itl_ms"].extend(row["itl_ms"])
        if row["prompt_tokens"] is not None:
            values["prompt_tokens"].append(row["prompt_tokens"])
        if row["completion_tokens"] is not None and row["latency_ms"] > 0:
            values["tokens_per_second"].append(row["completion_tokens"] / row["latency_ms"] * 1000)

    def figures(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The figures, and why others are absent."""
        seconds = self.end - self.start
        found: dict[str, Any] = {
            "requests": self.requests,
            "failed": sum(self.reasons.values()),
            "failures_by_reason": dict(self.reasons.most_common()),
            "shed": self.shed,
            "measured_requests": self.measured,
            "window_seconds": round(seconds, 3),
        }
        absent: dict[str, str] = {}
        no_rate = (
            "no request succeeded inside the measured window" if seconds > 0 else "the run ended before its ramp did"
        )
        nothing = "no request that started after the ramp succeeded" if self.requests else "no requests were sent"
        no_stream = "no streaming request succeeded" if self.measured else nothing
        no_usage = "the server sent no usage" if self.measured else nothing
        rated = seconds > 0 and self.completed

        def put(name: str, reason: str | None, *wanted: int) -> None:
            if self.values[name]:
                found[name] = percentiles(self.values[name], *wanted)
            elif reason:
                absent[name] = reason

        if rated:
            found["rps"] = round(self.completed / seconds, 4)
        else:
            absent["rps"] = no_rate
        put("ttft_ms", no_stream, 50, 95)
        if len(self.values["ttft_ms"]) >= 100:
            found["ttft_ms"]["p99"] = round(percentile(self.values["ttft_ms"], 99), 3)
        else:
            absent["ttft_ms.p99"] = f"needs 100 streamed requests, has {len(self.values['ttft_ms'])}"
        put("ttft_from_sending_ms", None, 50, 95)
        put("late_ms", None, 50, 95)
        no_gap = "no streamed answer had two chunks of text" if self.streams else "no streaming request succeeded"
        put("itl_ms", no_gap, 50, 95)
        put("latency_ms", nothing, 50, 95)
        put("tokens_per_second", no_usage, 50, 95)
        put("prompt_tokens", no_usage, 50)
        put("retry_after_seconds", "the server sent no Retry-After with its 429" if self.shed else None, 50, 95)
        if rated and self.output_tokens is not None:
            found["output_tokens_per_second"] = round(self.output_tokens / seconds, 3)
        else:
            absent["output_tokens_per_second"] = (
                "the server sent no usage with some answers" if self.output_tokens is None else no_rate
            )
        if self.objectives:
            if seconds > 0:
                found["goodput_rps"] = round(self.good_completed / seconds, 4)
            else:
                absent["goodput_rps"] = no_rate
            if self.started:
                found["goodput_share"] = round(self.good / self.started, 6)
            else:
                absent["goodput_share"] = "no request started after the ramp"
        if NOT_SENT in self.reasons:
            found["not_sent"] = self.reasons[NOT_SENT]
        return found, absent


def summary(
    rows: Iterable[Row],
    window: tuple[float, float] | None = None,
    *,
    objectives: Mapping[str, float] | None = None,
    by: Mapping[str, Callable[[Row], str]] | None = None,
) -> dict[str, Any]:
    """The figures of one run; `rows` is read once.

    `window` is (start, end) in unix seconds; without it, from the first start to the last end (then `rows` must be a
    sequence). `by` names groups: `{"model": ...}` gives `by_model`, some figures of each of the models. A figure that
    has no data is not there, and `absent` says why.
    """
    if window is None:
        rows = list(rows)
        window = (min((r["started_at"] for r in rows), default=0.0), max((ended_at(r) for r in rows), default=0.0))
    objectives = objectives or {}
    whole = Tally(window, objectives)
    parts: dict[str, dict[str, Tally]] = {name: {} for name in by or ()}
    for row in rows:
        whole.add(row)
        for name, of in (by or {}).items():
            parts[name].setdefault(of(row), Tally(window, objectives)).add(row)
    figures, absent = whole.figures()
    for name, tallies in parts.items():
        figures[f"by_{name}"] = {}
        for member, tally in sorted(tallies.items()):
            found, missing = tally.figures()
            figures[f"by_{name}"][member] = {key: found[key] for key in PART_FIGURES if key in found}
            absent |= {f"by_{name}.{member}.{key}": text for key, text in missing.items() if key in PART_FIGURES}
    figures["absent"] = absent
    return figures


def ttft_values(rows: Iterable[Row]) -> list[float]:
    """TTFT in ms of the successful streamed requests among `rows`."""
    return [row["ttft_ms"] for row in rows if row["error"] is None and row["ttft_ms"] is not None]


def failed(rows: Iterable[Row]) -> int:
    """How many of `rows` were not answered, shed ones included: to who lost a request, it is all one."""
    return sum(row["error"] is not None for row in rows)


def bounds(summary: Mapping[str, Any], slo: Slo) -> list[dict[str, Any]]:
    """What became of each bound that `slo` gives: `{name, at_most or at_least, measured, held}`, in its order.

    Without a figure `measured` is not there, the bound is not held, and `reason` says why. Without a bound for them,
    shed requests count into `error_rate`. Without `error_rate`, a request that was not sent is a breach by itself: what
    else was measured is of a smaller load than was asked for; and where more requests failed than a p95 leaves out, it
    is not held: percentiles are of those that were answered.
    """
    requests, apart = summary["requests"], slo.shed_rate is not None
    errors = summary["failed"] + (0 if apart else summary["shed"])
    rates = {"error_rate": errors, "shed_rate": summary["shed"]}
    measured = {
        "ttft_p95_ms": summary.get("ttft_ms", {}).get("p95"),
        "itl_p95_ms": summary.get("itl_ms", {}).get("p95"),
        **{name: round(count / requests, 6) if requests else None for name, count in rates.items()},
        **{name: summary.get(name) for name in ("goodput_rps", "goodput_share")},
    }
    absent = summary.get("absent", {})
    limits = {name: ("at_most", limit) for name, limit in slo.model_dump(exclude={"goodput"}).items()}
    limits |= {"goodput_rps": ("at_least", slo.goodput.min_rps), "goodput_share": ("at_least", slo.goodput.min_share)}
    found = []
    for name, (side, limit) in limits.items():
        if limit is None:
            continue
        entry = {"name": name, side: limit}
        if slo.error_rate is None and name in LATENCIES and errors > (1 - LATENCIES[name]) * requests:
            reason = f"{errors:,} of {requests:,} requests were not answered, more than a p95 leaves out"
            found.append(entry | {"reason": reason, "held": False})
        elif (value := measured[name]) is None:
            reason = absent.get(name.replace("_p95", ""), "no requests were sent")
            found.append(entry | {"reason": reason, "held": False})
        else:
            found.append(entry | {"measured": value, "held": value <= limit if side == "at_most" else value >= limit})
    if found and slo.error_rate is None and (not_sent := summary.get("not_sent")):
        found.append({"name": "not_sent", "at_most": 0, "measured": not_sent, "held": False})
    return found


def told(bound: Mapping[str, Any]) -> str:
    """A bound in words: `ttft_p95_ms: 912.3, at most 800: not held`."""
    seen = f"{bound['measured']:g}" if "measured" in bound else f"not measured ({bound['reason']})"
    limit = f"at most {bound['at_most']:g}" if "at_most" in bound else f"at least {bound['at_least']:g}"
    return f"{bound['name']}: {seen}, {limit}: {'held' if bound['held'] else 'not held'}"
