"""Plots of the report as inline SVG: no file, no script, no request; colours follow the page's light or dark theme.

matplotlib is imported on the first plot, so that `python -m stress` starts fast. Every series, bar and marker carries
an element id `<plot>-<series>`, and every plot a title that a screen reader speaks.
"""

from __future__ import annotations

import html
import io
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stress.figures import percentile

Item = TypeVar("Item")

# Okabe and Ito's palette, distinct for colour-blind readers (Wong 2011, Nature Methods 8:441), and greys. In the
# finished SVG each colour becomes `var(--name, colour)`: the page chooses, and a copied-out plot still has colours.
COLOURS = {
    "ink": "#1b1f24",
    "muted": "#5b6471",
    "grid": "#d9dee5",
    "paper": "#fefefe",
    "band": "#eef1f5",
    "base": "#8b95a2",
    "blue": "#0072b2",
    "orange": "#e69f00",
    "red": "#d55e01",
    "green": "#009e74",
    "sky": "#56b4ea",
    "rose": "#cc79a8",
}
SERIES = ("blue", "orange", "green", "rose", "sky", "red", "base")
HALF, WIDE = 440, 1120  # widths in CSS px at which the text has its nominal size
POINTS = 400  # more than a curve of this width can show; keeps the page small whatever the run's length


@dataclass(frozen=True, slots=True)
class Sent:
    """One request: unix seconds of start and end, TTFT in ms if it streamed an answer, and whether it failed."""

    started_at: float
    ended_at: float
    ttft_ms: float | None
    failed: bool


@dataclass
class Episode:
    """One stretch of load, a scenario or a drill, with its requests and what happened: `(unix seconds, label)`."""

    name: str
    requests: list[Sent]
    events: list[tuple[float, str]] = field(default_factory=list)

    @property
    def start(self) -> float:
        """Unix seconds of the first request: second 0 of the plot."""
        return min(sent.started_at for sent in self.requests)

    @property
    def span(self) -> float:
        """Seconds to the last end or event."""
        return max([sent.ended_at for sent in self.requests] + [at for at, _ in self.events]) - self.start


@dataclass(frozen=True)
class Mark:
    """One vertical line of the timeline: its label (`1` or `2-3`), its second, and the events that it stands for."""

    label: str
    seconds: float
    names: list[str]


def marks(episode: Episode) -> list[Mark]:
    """The events of `episode` in order, numbered; those too close to be told apart on paper share a line."""
    together: list[tuple[float, list[str]]] = []
    for at, name in sorted(episode.events):
        seconds = max(0.0, at - episode.start)  # a drill notes its load's start just before the first request
        if together and seconds - together[-1][0] < 0.07 * episode.span:
            together[-1][1].append(name)
        else:
            together.append((seconds, [name]))
    found, number = [], 1
    for seconds, names in together:
        last = number + len(names) - 1
        found.append(Mark(str(number) if last == number else f"{number}-{last}", seconds, names))
        number = last + 1
    return found


@contextmanager
def canvas(width: int, height: int) -> Iterator[Any]:
    """A figure of `width` x `height` px in the report's style."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",  # real text: sharp, small, can be searched and read aloud
        "text.parse_math": False,  # an adapter or error text with dollar signs is not mathematics
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 11,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 11,
        "axes.edgecolor": COLOURS["muted"],
        "axes.labelcolor": COLOURS["ink"],
        "axes.titlecolor": COLOURS["ink"],
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "text.color": COLOURS["ink"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "xtick.labelcolor": COLOURS["ink"],
        "ytick.labelcolor": COLOURS["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLOURS["grid"],
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 11,
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")


def svg(figure: Any, name: str, title: str, description: str) -> str:
    """`figure` as an `<svg>` element whose ids begin with `name-`; `description` is the text for who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(rf'\bid="(?!{name}-)', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour}, {value})")
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    head += f' role="img" aria-label="{html.escape(f"{title}. {description}")}"'
    return f"{head}>\n<title>{html.escape(title)}</title>{rest}".strip()


def loss(events: Sequence[Mapping[str, Any]]) -> str:
    """Loss over optimiser steps; `events` are the lines of events.jsonl, at least one."""
    return _steps(events, "loss", "Loss", "mean loss (nats per answer token)", "blue")


def speed(events: Sequence[Mapping[str, Any]]) -> str:
    """Tokens per second over optimiser steps, of the same `events`."""
    return _steps(events, "tokens_per_second", "Speed", "tokens per second", "green")


def _steps(events: Sequence[Mapping[str, Any]], key: str, title: str, unit: str, colour: str) -> str:
    events = _thin(events)
    steps, values = [event["step"] for event in events], [event[key] for event in events]
    with canvas(HALF, 240) as figure:
        axes = figure.subplots()
        axes.plot(
            steps, values, color=COLOURS[colour], marker="o" if len(steps) < 3 else None, gid=f"{_slug(title)}-series"
        )
        axes.set(title=title, xlabel="optimiser step", ylabel=unit, xlim=(0, max(steps) * 1.02))
        axes.set_ylim(0, max(values) * 1.08 or 1)
        axes.yaxis.set_major_formatter(_thousands)
        spoken = f"From {values[0]:,.4g} to {values[-1]:,.4g} {unit} in {steps[-1]} optimiser steps"
        return svg(figure, _slug(title), f"{title} while tuning", spoken)


@dataclass(frozen=True)
class Score:
    """A metric's mean score of base and adapter (0 to 1), the gain, its interval, and the gain the gate asks for."""

    metric: str
    base: float
    adapter: float
    gain: float
    interval: tuple[float, float]
    minimum: float | None = None


def scores(values: Sequence[Score]) -> str:
    """Bars of the base's and the adapter's mean score in each metric; at least one."""
    with canvas(HALF, 100 + 60 * len(values)) as figure:
        axes = figure.subplots()
        for offset, who, colour in ((-0.2, "base", "base"), (0.2, "adapter", "blue")):
            percents = [100 * getattr(score, who) for score in values]
            places = [row + offset for row in range(len(values))]
            bars = axes.barh(places, percents, 0.36, color=COLOURS[colour], label=who)
            for bar in bars:
                bar.set_gid(f"score-{who}")
            axes.bar_label(bars, labels=[f"{value:.1f} %" for value in percents], padding=4, color=COLOURS["ink"])
        names = [score.metric.replace("_", " ") for score in values]
        axes.set_yticks(range(len(values)), names)
        axes.set(title="Score", xlabel="mean score on the held-out examples (%)", xlim=(0, 116))
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower left", ncols=2)
        spoken = "; ".join(
            f"{name}: base {100 * score.base:.1f} %, adapter {100 * score.adapter:.1f} %"
            for name, score in zip(names, values, strict=True)
        )
        return svg(figure, "score", "Score of base and adapter on held-out examples", spoken)


def gain(values: Sequence[Score], confidence: float) -> str:
    """The gain in each metric with its interval; the gate's minimum is a dashed line, a gain below it is red."""
    with canvas(HALF, 100 + 60 * len(values)) as figure:
        axes = figure.subplots()
        shown, spoken = [0.0], []
        for row, score in enumerate(values):
            low, middle, high = (100 * value for value in (score.interval[0], score.gain, score.interval[1]))
            shown += [low, middle, high]
            passed = score.minimum is None or score.interval[0] > score.minimum
            drawn = axes.errorbar(
                middle,
                row,
                xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]],
                fmt="o",
                ms=7,
                capsize=6,
                lw=2.2,
                color=COLOURS["blue" if passed else "red"],
            )
            drawn.lines[0].set_gid(f"gain-{score.metric}")
            text = f"{middle:+.1f}  [{low:+.1f}, {high:+.1f}]"
            axes.annotate(text, (middle, row), xytext=(0, 9), textcoords="offset points", ha="center")
            spoken.append(f"{score.metric.replace('_', ' ')}: {middle:+.1f}, between {low:+.1f} and {high:+.1f} points")
            if score.minimum is not None:
                minimum = 100 * score.minimum
                shown.append(minimum)
                label, ends = f"the gate's minimum: {minimum:+.1f} points", [row - 0.45, row + 0.45]
                axes.plot([minimum] * 2, ends, "--", color=COLOURS["red"], lw=2, gid="gain-minimum", label=label)
                spoken.append(label)
        axes.axvline(0, color=COLOURS["muted"], lw=1)
        room = max(max(shown) - min(shown), 5) * 0.24
        axes.set_xlim(min(shown) - room, max(shown) + room)
        axes.set_yticks(range(len(values)), [score.metric.replace("_", " ") for score in values])
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set(title=f"Gain with its {confidence:.0%} interval", xlabel="adapter minus base (percentage points)")
        axes.grid(axis="y", visible=False)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower left")
        return svg(figure, "gain", "Gain of the adapter over its base", "; ".join(spoken))


def timeline(episodes: Sequence[Episode]) -> str:
    """TTFT p50/p95, answered and failed requests per second over time, a column for each episode with requests.

    Columns share the y axes and each has its own seconds, so idle time between drills takes no room. Each point sums
    up one bin: TTFT of the requests that started in it, rates of those that ended in it.
    """
    episodes = [episode for episode in episodes if episode.requests]
    starts = [episode.start for episode in episodes]
    spans = [episode.span for episode in episodes]
    longest = max(spans)
    with canvas(WIDE, 430) as figure:
        grid = figure.subplots(
            2,
            len(episodes),
            sharex="col",
            sharey="row",
            squeeze=False,
            width_ratios=[max(span, longest / 3, 1e-3) for span in spans],
        )
        ttfts = [sent.ttft_ms for episode in episodes for sent in episode.requests if sent.ttft_ms]
        logarithmic = bool(ttfts) and max(ttfts) > 30 * percentile(ttfts, 10)
        for column, (episode, start, span) in enumerate(zip(episodes, starts, spans, strict=True)):
            above, below = grid[0][column], grid[1][column]
            edges = _bins(max(span, 1.0))
            width = edges[1]
            middles = [edge + width / 2 for edge in edges[:-1]]
            first: list[list[float]] = [[] for _ in middles]
            answered, failed = [0] * len(middles), [0] * len(middles)
            for sent in episode.requests:
                if sent.ttft_ms is not None and not sent.failed:
                    first[_bin(edges, sent.started_at - start)].append(sent.ttft_ms)
                (failed if sent.failed else answered)[_bin(edges, sent.ended_at - start)] += 1
            slug = _slug(episode.name)
            for p, colour, style in ((50, "blue", "-"), (95, "orange", "--")):
                values = [percentile(bin, p) if bin else math.nan for bin in first]
                above.plot(
                    middles,
                    values,
                    style,
                    marker="o",
                    ms=3,
                    color=COLOURS[colour],
                    label=f"TTFT p{p}",
                    gid=f"timeline-ttft-p{p}-{slug}",
                )
            rates = [count / width for count in answered]
            below.stairs(
                rates, edges, color=COLOURS["green"], lw=1.8, zorder=3, label="answered", gid=f"timeline-rps-{slug}"
            )
            if any(failed):
                below.stairs(
                    [count / width for count in failed],
                    edges,
                    color=COLOURS["red"],
                    fill=True,
                    alpha=0.85,
                    label="failed",
                    gid=f"timeline-failed-{slug}",
                )
            for mark in marks(episode):
                for part, axes in (("ttft", above), ("rps", below)):
                    axes.axvline(
                        mark.seconds,
                        color=COLOURS["ink"],
                        lw=1.2,
                        ls=":",
                        gid=f"timeline-mark-{part}-{slug}-{mark.label}",
                    )
                above.annotate(
                    mark.label,
                    (mark.seconds, 1),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    va="center",
                    fontsize=10,
                    fontweight="bold",
                    color=COLOURS["paper"],
                    annotation_clip=False,
                    bbox={"boxstyle": "round,pad=0.25", "facecolor": COLOURS["ink"], "edgecolor": "none"},
                )
            above.set_title(episode.name.replace("_", " ").replace("-", " "), pad=13)
            above.set_xlim(0, max(span, 1.0) * 1.01)
            above.yaxis.set_major_formatter(_thousands)
            below.set_xlabel(f"seconds ({width:g} s bins)")
        if logarithmic:
            grid[0][0].set_yscale("log")
            grid[0][0].yaxis.set_major_formatter(_thousands)
        else:
            grid[0][0].set_ylim(bottom=0)
        grid[1][0].set_ylim(bottom=0)
        grid[0][0].set_ylabel("TTFT (ms, log scale)" if logarithmic else "TTFT (ms)")
        grid[1][0].set_ylabel("requests per second")
        handles = {
            label: handle
            for row in grid
            for axes in row
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=4)
        spoken = "; ".join(
            f"{episode.name}: {len(episode.requests)} requests, {sum(sent.failed for sent in episode.requests)} failed"
            + "".join(f", {', '.join(mark.names)} at {mark.seconds:.0f} s" for mark in marks(episode))
            for episode in episodes
        )
        return svg(figure, "timeline", "Time to first token and requests per second over time", spoken)


def latency(series: Mapping[str, Sequence[float]]) -> str:
    """Cumulative share of requests over milliseconds for each series, such as `{"TTFT": [...]}`; none may be empty."""
    with canvas(WIDE, 270) as figure:
        axes = figure.subplots()
        spoken = []
        for (name, values), colour in zip(series.items(), SERIES, strict=False):
            ordered = sorted(values)
            ranks = _thin(range(len(ordered)))
            shares = [100 * (rank + 1) / len(ordered) for rank in ranks]
            axes.step(
                [ordered[rank] for rank in ranks],
                shares,
                where="post",
                color=COLOURS[colour],
                label=name,
                gid=f"latency-{_slug(name)}",
            )
            middle, high = percentile(ordered, 50), percentile(ordered, 95)
            axes.plot([middle, high], [50, 95], "o", ms=6, color=COLOURS[colour], gid=f"latency-marks-{_slug(name)}")
            for value, share in ((middle, 50), (high, 95)):
                axes.annotate(
                    f"p{share} {value:,.0f} ms",
                    (value, share),
                    xytext=(8, -11),
                    textcoords="offset points",
                    fontsize=10.5,
                )
            spoken.append(f"{name}: p50 {middle:.0f} ms, p95 {high:.0f} ms of {len(ordered)} requests")
        everything = [value for values in series.values() for value in values if value > 0]
        if everything and max(everything) > 20 * percentile(everything, 5):
            axes.set_xscale("log")
        else:
            axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(_thousands)
        axes.set(xlabel="milliseconds", ylabel="share of requests (%)", ylim=(0, 101), title="Requests answered within")
        axes.legend(loc="lower right")
        return svg(figure, "latency", "Distribution of latency", "; ".join(spoken))


def phases(values: Mapping[str, float]) -> str:
    """One stacked bar of an outage's phases, `{phase: seconds}`, in their order."""
    total = sum(values.values())
    with canvas(WIDE, 130 + 18 * ((len(values) + 3) // 4)) as figure:
        axes = figure.subplots()
        start = 0.0
        for number, (name, seconds) in enumerate(values.items()):
            bar = axes.barh(
                0,
                seconds,
                0.7,
                left=start,
                color=COLOURS[SERIES[number % len(SERIES)]],
                edgecolor=COLOURS["paper"],
                label=f"{name.replace('_', ' ')}: {seconds:.1f} s",
                hatch="//" if number >= len(SERIES) else None,
            )
            for patch in bar:
                patch.set_gid(f"phases-{_slug(name)}")
            start += seconds
        axes.set(xlabel="seconds since the replicas were killed", yticks=[], xlim=(0, total * 1.01 or 1))
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=min(4, len(values)))
        spoken = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in values.items())
        return svg(figure, "phases", "Recovery from the outage by phase", f"{spoken}; {total:.1f} s in all")


def _thin(values: Sequence[Item]) -> list[Item]:
    """At most about `POINTS` of `values`, evenly spaced, the first and the last among them."""
    last = len(values) - 1
    return [values[at] for at in sorted({round(last * n / POINTS) for n in range(POINTS + 1)})]


def _bins(span: float, wanted: int = 40) -> list[float]:
    """Edges from 0 to at least `span`, at a round width that makes at most about `wanted` bins."""
    width = next(
        (width for width in (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800) if span / width <= wanted),
        span / wanted,
    )
    return [width * number for number in range(max(1, math.ceil(span / width)) + 1)]


def _bin(edges: Sequence[float], value: float) -> int:
    return min(max(bisect_right(edges, value) - 1, 0), len(edges) - 2)


def _thousands(value: float, _position: int) -> str:
    return f"{value:,.10g}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
