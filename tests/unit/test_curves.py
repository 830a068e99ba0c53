"""The picture and the table of a run: what was measured, where it belongs, and whole as XML."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from training.curves import MOST_POINTS, PANELS, svg, table

SVG = "{http://www.w3.org/2000/svg}"


def events(steps: int, every: int = 5, **change: Any) -> list[dict[str, Any]]:
    return [
        {"step": n, "total_steps": steps, "epoch": 3 * n / steps, "loss": 4 - 3 * n / steps,
         "learning_rate": 2e-4 * (1 - n / steps), "tokens_per_second": 4000.0} | change
        for n in range(every, steps + 1, every)
    ]  # fmt: skip


def lines(picture: str) -> list[list[tuple[float, float]]]:
    """The points of each curve, as drawn."""
    found = ET.fromstring(picture).iter(f"{SVG}polyline")
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.attrib["points"].split())] for line in found]


def test_each_figure_is_drawn_to_scale_in_its_own_panel() -> None:
    loss, rate, speed = lines(svg(events(100), "mine"))
    panel = PANELS[0]
    assert len(loss) == 20
    assert loss[0][0] == pytest.approx(panel.x + panel.width * 0.05, abs=0.1)
    assert loss[-1][0] == panel.x + panel.width
    # From 3.85 to 1 on an axis from 1 to 4.
    assert loss[0][1] == pytest.approx(panel.y + panel.height * 0.05, abs=0.1)
    assert loss[-1][1] == panel.y + panel.height
    assert rate[-1][1] == PANELS[1].y + PANELS[1].height, "its axis begins at 0"
    assert len({y for _, y in speed}) == 1
    for points, place in zip((loss, rate, speed), PANELS, strict=True):
        for x, y in points:
            assert place.x <= x <= place.x + place.width and place.y <= y <= place.y + place.height


def test_the_axes_are_labelled_with_round_numbers() -> None:
    texts = [text.text for text in ET.fromstring(svg(events(100), "mine")).iter(f"{SVG}text")]
    assert {"mine", "Loss, nats per answer token", "1", "2", "3", "4", "20", "100", "2e-4", "4,000"} <= set(texts)


@pytest.mark.parametrize("loss", [0.0, 1e-9, 2.5, 1e6])
def test_one_measurement_or_a_flat_curve_is_a_picture_too(loss: float) -> None:
    for count in (5, 20):
        for points in lines(svg(events(count, loss=loss, tokens_per_second=0.0), "a < b & c")):
            assert len(points) == count // 5


def test_a_long_run_is_thinned_and_keeps_its_end() -> None:
    (loss, *_) = lines(svg(events(100_000), "long"))
    assert MOST_POINTS / 2 < len(loss) <= MOST_POINTS + 1
    assert loss[-1][0] == PANELS[0].x + PANELS[0].width


def test_the_table_has_first_and_last_and_some_between() -> None:
    head, rule, *rows = table(events(1000)).splitlines()
    assert head == "| step | epoch | loss | learning rate | tokens/s |" and rule.count("--:") == 5
    assert len(rows) == 6
    assert rows[0] == "| 5 | 0.01 | 3.9850 | 1.99e-04 | 4,000 |"
    assert rows[-1] == "| 1,000 | 3.00 | 1.0000 | 0.00e+00 | 4,000 |"
    assert len(table(events(5)).splitlines()) == 3
