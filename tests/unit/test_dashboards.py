"""The dashboards as Grafana takes them: places, numbers, units, one data source; the same each time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.unit.promql import metrics
from tests.unit.test_environment import environment
from workloads.dashboards import COLUMNS, RATE, dashboards, main, usd_an_hour

BOARDS = dashboards(3.67)
# Of Grafana's own list (packages/grafana-data, valueFormats/categories.ts): what is used here.
UNITS = {"none", "percentunit", "s", "bytes", "reqps", "ops", "cps", "sci", "currencyUSD", "celsius", "watt"}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_the_three_are_there_and_can_be_told_apart() -> None:
    assert list(BOARDS) == ["tuning", "serving", "fleet"]
    for key in ("uid", "title"):
        assert len({board[key] for board in BOARDS.values()}) == 3
    assert all(len(board["uid"]) <= 40 for board in BOARDS.values())  # Grafana's limit


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """The paths of what is in `given` and not, or not the same, in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif given != kept:
        yield path


@pytest.mark.parametrize("name", BOARDS)
def test_grafanas_own_schema_knows_every_field(name: str) -> None:
    register_default_plugins()  # the options of each kind of panel, and Prometheus's of a query

    def through(board: Any) -> Any:
        return json.loads(JSONEncoder().encode(Dashboard.from_json(board)))

    board = json.loads(json.dumps(BOARDS[name]))
    assert list(lost(board, through(board))) == []
    panel = next(item for item in board["panels"] if item["type"] != "row")
    panel["fieldConfig"]["defaults"]["units"] = panel["options"]["colour"] = panel["targets"][0]["query"] = "x"
    number = board["panels"].index(panel)
    wrong = ("fieldConfig.defaults.units", "options.colour", "targets[0].query")
    assert sorted(lost(board, through(board))) == [f".panels[{number}].{each}" for each in wrong]


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_numbers_of_their_own_and_do_not_overlap(name: str) -> None:
    numbers = [panel["id"] for panel in BOARDS[name]["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARDS[name]["panels"]:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["w"] > 0 and at["h"] > 0 and at["x"] + at["w"] <= COLUMNS, panel["title"]
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']} lies over {taken[cell]}"
            taken[cell] = panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_each_panel_has_a_title_a_unit_and_queries_of_the_chosen_source(name: str) -> None:
    (source,) = BOARDS[name]["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    titles = [panel["title"] for panel in panels(BOARDS[name])]
    assert len(set(titles)) == len(titles) and all(titles)
    for panel in panels(BOARDS[name]):
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == f"${{{source['name']}}}"
            assert metrics(target["expr"].replace(RATE, "1m")), panel["title"]
            # A figure of now asks once; over time, an empty legend would be the whole series' name.
            assert target["instant"] != target["range"]
            assert target["legendFormat"] or panel["type"] == "table"


def test_they_are_the_same_each_time_and_fit_what_azure_takes() -> None:
    assert json.dumps(dashboards(3.67)) == json.dumps(BOARDS)
    for board in BOARDS.values():
        assert len(json.dumps(board)) < 1_000_000


def test_cost_is_there_where_a_price_is_known() -> None:
    def cost(boards: dict[str, Any]) -> list[str]:
        return [p["targets"][0]["expr"] for p in panels(boards["tuning"]) if p["title"] == "Cost so far"]

    (query,) = cost(BOARDS)
    assert "/ 3600 * 3.67" in query
    assert cost(dashboards()) == []


def test_the_price_is_that_of_all_nodes_of_a_job() -> None:
    one = usd_an_hour(environment(), "eastus")
    assert one is not None and 1 < one < 10
    given = '{"usd_per_hour": {"Standard_NC24ads_A100_v4": 2.5}}'
    assert usd_an_hour(environment(prices=given), "eastus") == 2.5
    several = {
        "tuning": '{"pool": "a100", "nodes": 2}',
        "pools": '{"a100": {"vm_size": "Standard_NC24ads_A100_v4", "max_nodes": 4}}',
    }
    assert usd_an_hour(environment(prices=given, **several), "eastus") == 5.0


def test_files_for_an_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "boards"), "--usd-per-hour", "3.67"]) == 0
    told = capsys.readouterr().out.split()
    assert [Path(line).name for line in told] == ["tuning.json", "serving.json", "fleet.json"]
    assert {Path(line).stem: json.loads(Path(line).read_text()) for line in told} == BOARDS
