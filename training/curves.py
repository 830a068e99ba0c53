"""Draws how a run went as one SVG picture, and tells it in a short table: for the adapter's card.

Written by hand, because the card is made in containers that have no plotting library, and three lines need none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 860, 400
INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6471", "#d9dee5", "#fefefe"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
TABLE_ROWS = 6
MOST_POINTS = 1000  # more than there are pixels to show them

Event = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """A plot of one figure over the step; x, y, width and height in pixels of the axes."""

    name: str
    title: str
    colour: str
    x: int
    y: int
    width: int
    height: int


PANELS = (
    Panel("loss", "Loss, nats per answer token", "#0072b2", 62, 58, 430, 284),
    Panel("learning_rate", "Learning rate", "#009e74", 572, 58, 262, 110),
    Panel("tokens_per_second", "Tokens per second", "#d55e01", 572, 232, 262, 110),
)


def svg(events: Sequence[Event], title: str) -> str:
    """Loss, learning rate and tokens/s over the step. `events` are the lines of events.jsonl, at least one."""
    last = max(event["total_steps"] for event in events)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="{FONT}" font-size="12" fill="{MUTED}" role="img">',
        f"<title>{_escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{PAPER}"/>',
        f'<text x="24" y="28" font-size="15" font-weight="600" fill="{INK}">{_escape(title)}</text>',
        *(_panel(panel, events, last) for panel in PANELS),
        *(
            f'<text x="{panel.x + panel.width / 2:g}" y="{HEIGHT - 16}" text-anchor="middle">optimiser step</text>'
            for panel in (PANELS[0], PANELS[2])
        ),
        "</svg>\n",
    ]
    return "\n".join(parts)


def table(events: Sequence[Event]) -> str:
    """The same figures at some steps, first and last included, as Markdown."""
    count = min(TABLE_ROWS, len(events))
    chosen = sorted({round(number * (len(events) - 1) / max(1, count - 1)) for number in range(count)})
    rows = [
        f"| {event['step']:,} | {event['epoch']:.2f} | {event['loss']:.4f} | {event['learning_rate']:.2e} | "
        f"{event['tokens_per_second']:,.0f} |"
        for event in (events[number] for number in chosen)
    ]
    return "\n".join(["| step | epoch | loss | learning rate | tokens/s |", "| --: | --: | --: | --: | --: |", *rows])


def _panel(panel: Panel, events: Sequence[Event], last: int) -> str:
    values = [float(event[panel.name]) for event in events]
    steps = [int(event["step"]) for event in events]
    # A loss is read by how far it fell, the other two against nothing.
    low = min(values) if panel.name == "loss" else 0.0
    ticks = _ticks(low, max(values), 6 if panel.name == "loss" else 3)
    low, span = ticks[0], ticks[-1] - ticks[0]

    def x(step: float) -> float:
        return round(panel.x + panel.width * step / last, 1)

    def y(value: float) -> float:
        return round(panel.y + panel.height * (1 - (value - low) / span), 1)

    lines = [f'<text x="{panel.x}" y="{panel.y - 10}" fill="{INK}">{panel.title}</text>']
    for tick in ticks:
        at = y(tick)
        lines += [
            f'<line x1="{panel.x}" x2="{panel.x + panel.width}" y1="{at}" y2="{at}" stroke="{GRID}"/>',
            f'<text x="{panel.x - 8}" y="{at + 4:g}" text-anchor="end">{_shown(tick)}</text>',
        ]
    for tick in (tick for tick in _ticks(0, last, 5 if panel.width > 300 else 3) if tick <= last):
        lines.append(
            f'<text x="{x(tick)}" y="{panel.y + panel.height + 18}" text-anchor="middle">{_shown(tick)}</text>'
        )
    every = -(-len(steps) // MOST_POINTS)
    kept = [*range(0, len(steps) - 1, every), len(steps) - 1]
    points = " ".join(f"{x(steps[number])},{y(values[number])}" for number in kept)
    lines += [
        f'<polyline points="{points}" fill="none" stroke="{panel.colour}" stroke-width="1.7" stroke-linejoin="round"/>',
        f'<circle cx="{x(steps[-1])}" cy="{y(values[-1])}" r="3" fill="{panel.colour}"/>',
    ]
    return "\n".join(lines)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, the first at or below `low`, the last at or above `high`."""
    low = low if low < high else min(0.0, high)
    raw = (high - low) / count or 1.0
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step * 0.9999)
    return [number * step for number in range(first, max(first + 1, last) + 1)]


def _shown(value: float) -> str:
    if value and abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
