"""That the replicas follow a load without flapping: the declared policy on seeded synthetic loads, by KEDA's rules."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from common import exits
from common.settings import SettingsError
from infra.offline import read
from infra.settings import Serving
from workloads.autoscaler import Autoscaler
from workloads.scaling import (
    DOWN_PERIOD,
    FULL,
    IDLE_SECONDS,
    MOST_AT_ONCE,
    POLL_SECONDS,
    UP_WINDOW,
    behavior,
    scaled_object,
    start_seconds,
)
from workloads.scaling_simulation import (
    LOADS,
    SEEN_AFTER,
    Request,
    Result,
    Speed,
    arrivals,
    main,
    recorded,
    simulate,
    speed,
)

PARAMETERS = 8_030_261_248
START = start_seconds(PARAMETERS)  # the worst
USUAL_START = 480
# An 8B model on an A100, with fewer slots than anyone would give it: fewer requests fill it, and take less time here.
SMALL = Speed(8, 400_000, 0.0128, 1.04e-7, 1.03e-4, queue=64)
HOUR = 3600
WINDOW = behavior(PARAMETERS)["scaleDown"]["stabilizationWindowSeconds"]
SOON = START + WINDOW  # after a scale-down: a scale-up is a flap
SEEN = (SEEN_AFTER + 3) * POLL_SECONDS  # from a request to what is done about it, without the window


def declared(low: int = 1, high: int = 6, slots: int = SMALL.slots) -> dict[str, Any]:
    settings = Serving(pool="a100", min_replicas=low, max_replicas=high, max_num_seqs=slots)
    return scaled_object(settings, PARAMETERS, query_endpoint="https://prometheus.example")


@cache
def followed(load: str, rate: float, hours: float, low: int = 1, start: float = START, seed: int = 0) -> Result:
    seconds = hours * HOUR
    requests = arrivals(LOADS[load](rate, seconds), rate, seconds, answer=500, seed=seed)
    return simulate(declared(low), SMALL, start, requests, seconds, seed=seed)


def turns(result: Result) -> int:
    ways = [after > before for _, before, after in result.changes]
    return sum(one != other for one, other in itertools.pairwise(ways))


# The rules of KEDA and the HPA


def scaler(replicas: int, *, target: str = "10", low: int = 1, high: int = 20, **behavior: Any) -> Autoscaler:
    """One with two triggers, `a` and `b`."""
    rules = {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "policies": [{"type": "Percent", "value": 900, "periodSeconds": 15}],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": 0,
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
        },
    }
    found = [{"name": name, "metadata": {"threshold": target, "ignoreNullValues": "false"}} for name in "ab"]
    spec = {
        "minReplicaCount": low,
        "maxReplicaCount": high,
        "cooldownPeriod": 300,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": rules | behavior}},
        "triggers": found,
    }
    return Autoscaler(spec, replicas)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (91, 0, 10),  # within a tenth of 10 x 10
        (109, 0, 10),
        (112, 0, 12),
        (89, 0, 9),
        (40, 71, 8),  # the one that wants most
        (900, 0, 20),  # no more than the maximum
        (0, 0, 1),
        (40, None, 10),  # what is not known could want more than 4
        (140, None, 14),
        (None, None, 10),
    ],
)
def test_replicas_by_metric(a: float | None, b: float | None, wanted: int) -> None:
    assert scaler(10).sync(0, {"a": a, "b": b}) == wanted


def test_a_null_value_may_count_as_nothing() -> None:
    lenient = scaler(10)
    for trigger in lenient.spec["triggers"]:
        trigger["metadata"]["ignoreNullValues"] = "true"
    assert lenient.sync(0, {"a": None, "b": 40}) == 4


def test_down_to_the_most_that_was_wanted_within_the_window() -> None:
    """KEP-853's example: of ten looks the first one says 10, and counts until it is ten minutes old."""
    down = {"stabilizationWindowSeconds": 600, "policies": [{"type": "Pods", "value": 5, "periodSeconds": 600}]}
    seen = scaler(10, target="1", high=100, scaleDown=down)
    said = [10, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7]
    numbers = [seen.sync(60 * minute, {"a": float(value), "b": 0}) for minute, value in enumerate(said)]
    assert numbers == [10] * 10 + [8]


def test_up_by_no_more_than_was_wanted_all_the_window() -> None:
    up = {"stabilizationWindowSeconds": 60, "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}]}
    seen = scaler(2, scaleUp=up)
    asked = [20, 60, 40, 35, 40, 40]
    assert [seen.sync(15 * n, {"a": value, "b": 0}) for n, value in enumerate(asked)] == [2, 2, 2, 2, 4, 4]


def test_policies_pace_both_ways() -> None:
    up = {"stabilizationWindowSeconds": 0, "policies": [{"type": "Percent", "value": 100, "periodSeconds": 60}]}
    down = {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}
    seen = scaler(2, scaleUp=up, scaleDown=down)
    assert [seen.sync(15 * n, {"a": 200, "b": 0}) for n in range(6)] == [4, 4, 4, 4, 8, 8]
    assert [seen.sync(1000 + 15 * n, {"a": 0, "b": 0}) for n in range(6)] == [7, 7, 7, 7, 6, 6]


def test_keda_wakes_from_zero_and_sleeps_after_the_cooldown() -> None:
    seen = scaler(0, low=0)
    nothing, something = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 1.0}
    assert [seen.sync(0, something), seen.poll(0, nothing), seen.poll(15, something)] == [0, 0, 1]
    assert seen.sync(20, nothing) == 1  # the HPA does not go to zero
    assert [seen.poll(at, nothing) for at in (30, 315, 330)] == [1, 1, 0]
    assert scaler(1, low=0).poll(0, {"a": 0, "b": None}) == 1  # an error takes nothing away
    assert scaler(1, low=2).poll(0, nothing) == 2


def test_another_metric_type_is_refused() -> None:
    spec = copy.deepcopy(declared())
    spec["triggers"][0]["metricType"] = "Value"
    with pytest.raises(ValueError, match="waiting"):
        Autoscaler(spec, 1)


# The policy


@pytest.mark.parametrize(
    ("low", "rate", "seed", "start"),
    [
        (1, 4, 5, START),  # flapped with a window of one start
        (1, 3, 2, START),  # turned thrice with it
        (1, 4.5, 0, START),  # turned thrice with a queue that could double the replicas
        (3, 4.5, 1, START),
        (3, 4.5, 2, USUAL_START),
    ],
)
def test_a_day_is_followed_up_and_down_once(low: int, rate: float, seed: int, start: float) -> None:
    found = followed("day", rate, 8, low=low, seed=seed, start=start)
    assert max(row.replicas for row in found.rows) >= 5 and found.rows[-1].replicas <= 3
    assert turns(found) == 1, found.changes
    assert found.flaps(SOON) == []
    assert found.refused < 0.001 * len(found.first_tokens)
    assert found.first_token(0.95) < 5
    assert found.replica_hours < 0.9 * 6 * 8  # less than to have the most of them all the time


@pytest.mark.parametrize("rate", [1.3, 1.6, 2.2])
def test_noise_at_constant_load_changes_nothing(rate: float) -> None:
    found = followed("constant", rate, 5, start=USUAL_START)
    assert found.flaps(SOON) == []
    assert turns(found) <= 1, found.changes  # from one replica up, once perhaps too far
    assert [change for change in found.changes if change[0] > 3 * HOUR] == []
    assert found.first_token(0.95, since=2 * HOUR) < 5


def test_the_measure_sees_a_policy_that_flaps() -> None:
    """Kubernetes' own defaults, and slots that count as free until the last one is taken."""
    spec = declared(low=3)
    spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] = {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": 300,
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
        },
    }
    for trigger in spec["triggers"]:
        if trigger["name"] == "running":
            trigger["metadata"]["threshold"] = str(SMALL.slots)
    seconds = 4 * HOUR
    requests = arrivals(LOADS["day"](4.5, seconds), 4.5, seconds, answer=500, seed=1)
    assert simulate(spec, SMALL, START, requests, seconds, seed=1).flaps(SOON)


@pytest.mark.parametrize("start", [USUAL_START, START])
def test_a_step_gets_what_it_needs_as_soon_as_replicas_start(start: float) -> None:
    found = followed("step", 2.4, 4, start=start)
    at, before, needed = float(HOUR), found.rows[HOUR // 15].replicas, found.rows[-1].replicas
    up = [then for then, low, high in found.changes if high > low and then >= HOUR]
    assert up[0] <= HOUR + UP_WINDOW + SEEN
    while before < needed:  # half as many more with each start, which none of them can be sooner than
        at, before = at + start + UP_WINDOW + SEEN, math.ceil(before * MOST_AT_ONCE)
    ready_at = next(row.at for row in found.rows if row.ready >= needed)
    assert ready_at <= at
    assert found.first_token(0.95, since=ready_at + 300) < 5


def test_a_queue_asks_for_half_as_many_more_than_answer() -> None:
    found = followed("spike", 6, 3)
    ready = {row.at: row.ready for row in found.rows}
    ups = [(at, high) for at, low, high in found.changes if high > low]
    assert [(high, math.ceil(MOST_AT_ONCE * ready[at])) for at, high in ups] == [(2, 2), (3, 3), (5, 5)]


def test_none_goes_before_fewer_were_enough_for_as_long_as_a_start_takes() -> None:
    found = followed("spike", 6, 3)
    at, before, _ = next(change for change in found.changes if change[2] < change[1])
    window = [row for row in found.rows if at - WINDOW + SEEN <= row.at < at]
    assert len(window) > 120
    # Not one of them wanted what there was.
    for row in window:
        assert row.waiting <= 5 * (before - 1) * 1.1 and row.running <= FULL * SMALL.slots * (before - 1) * 1.1, row
    assert turns(found) == 1


def test_a_full_cache_adds_replicas_while_slots_are_free() -> None:
    """Prompts of 6,000 tokens: some thirty of them fill the cache of a replica with 64 slots."""
    narrow, seconds, rate = replace(SMALL, slots=64, kv_tokens=200_000), 2 * HOUR, 0.42
    requests = list(arrivals(LOADS["constant"](rate, seconds), rate, seconds, prompt=6000, answer=1500, seed=3))
    spec = declared(slots=64)
    found = simulate(spec, narrow, USUAL_START, requests, seconds)
    at = found.changes[0][0]
    until = [row for row in found.rows if row.at <= at]
    assert max(row.running for row in until) < FULL * 64
    assert sum(row.waiting for row in until) / len(until) < 1  # nothing waits for long yet
    assert found.first_token(0.95, since=HOUR) < 5
    blind = {**spec, "triggers": [item for item in spec["triggers"] if item["name"] != "kv-cache"]}
    assert [
        change for change in simulate(blind, narrow, USUAL_START, requests, seconds).changes if change[0] <= at
    ] == []


def test_without_metrics_nothing_is_taken_away() -> None:
    seconds, rate = 3 * HOUR, 2.2
    requests = list(arrivals(LOADS["constant"](rate, seconds), rate, HOUR, answer=500, seed=1))  # and then none
    found = simulate(declared(), SMALL, USUAL_START, requests, seconds, blind=(HOUR, 2 * HOUR))
    assert found.rows[HOUR // 15].replicas > 2
    assert [change for change in found.changes if HOUR < change[0] <= 2 * HOUR] == []
    downs = [at for at, before, after in found.changes if at > 2 * HOUR and before - after == 1]
    assert len(downs) == found.rows[HOUR // 15].replicas - 1  # then all but one, one by one
    assert min(later - earlier for earlier, later in itertools.pairwise(downs)) >= DOWN_PERIOD


# Zero


def test_the_routers_trigger_alone_wakes_a_pool_that_sleeps() -> None:
    spec = declared(low=0)
    single = [Request(HOUR, 500, 100)]
    found = simulate(spec, SMALL, START, single, 3 * HOUR)
    (woken, *up), (slept, *down) = found.changes
    assert (up, down) == ([0, 1], [1, 0])
    assert HOUR < woken <= HOUR + (SEEN_AFTER + 2) * POLL_SECONDS
    assert found.unplaced == 1
    # It was there for who comes back once it could answer, and not for ever.
    assert woken + START < slept <= woken + START + IDLE_SECONDS + 4 * POLL_SECONDS
    asleep = {**spec, "triggers": [item for item in spec["triggers"] if item["name"] != "asked"]}
    assert simulate(asleep, SMALL, START, single, 3 * HOUR).changes == []


def test_zero_is_for_those_who_allow_it() -> None:
    for low in (1, 3):
        found = simulate(declared(low=low), SMALL, START, [], 6 * HOUR)
        assert {row.replicas for row in found.rows} == {low}


# The command


def test_every_environment_with_gpus_can_be_simulated() -> None:
    found = speed(read("prod").env)
    assert found.slots == 32 and 300_000 < found.kv_tokens < 500_000
    assert 0.010 < found.step_seconds < 0.016  # an 8B model in bfloat16 on an A100 80GB
    with pytest.raises(SettingsError, match="device: cpu"):
        speed(read("local").env)
    with pytest.raises(SettingsError, match="no such file"):
        read("nowhere")


TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


def test_a_recorded_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    one, other = recorded(file)
    assert (one.at, one.prompt, one.answer) == (0, 374, 44)
    assert other.at == pytest.approx(4.314579)
    assert len(recorded(file, scale=3)) == 6
    assert main(["prod", "--trace", str(file)]) == exits.OK
    said = capsys.readouterr().out
    assert "2 answers" in said and "0 times a replica went and one came back" in said
    file.write_text(TRACE + "yesterday,1,2\n")
    assert main(["prod", "--trace", str(file)]) == exits.INPUT
    assert f"{file}:4: needs TIMESTAMP" in capsys.readouterr().err


def test_a_load_is_the_same_by_its_seed() -> None:
    one, same, other = (list(arrivals(LOADS["day"](1, HOUR), 1, HOUR, seed=seed)) for seed in (0, 0, 1))
    assert one == same != other
    assert sum(request.answer for request in one) / len(one) == pytest.approx(250, rel=0.15)
