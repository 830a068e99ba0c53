"""The list of alerts: names, runbooks, annotations, and what follows from settings. What they do: tests/contract/test_eyes.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from common.settings import SettingsError
from infra.alerts import RUNBOOKS, Alert, rules_file
from tests.unit.promql import metrics
from tests.unit.test_environment import environment
from workloads.alerts import alerts
from workloads.engine import startup_seconds
from workloads.scaling import NODE_SECONDS

ROOT = Path(__file__).parents[2]
SLEEPING = {"serving": '{"pool": "a100", "min_replicas": 0, "max_replicas": 2}'}
SECTIONS = ["## What it means", "## How to see more", "## What to do", "## When to wake somebody"]


def by_name(**changes: str) -> dict[str, Alert]:
    return {alert.name: alert for alert in alerts(environment(**changes))}


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    known = {alert.runbook for alert in (*alerts(environment()), *alerts(environment(**SLEEPING)))}
    assert known == {f"{RUNBOOKS}/{path.name}" for path in (ROOT / RUNBOOKS).glob("*.md")}


@pytest.mark.parametrize("alert", alerts(environment()), ids=lambda alert: alert.name)
def test_a_runbook_says_what_it_means_how_to_see_more_what_to_do_and_when_to_wake_somebody(alert: Alert) -> None:
    text = (ROOT / alert.runbook).read_text()
    assert text.startswith(f"# {alert.name}\n")
    assert re.findall(r"^## .*", text, re.MULTILINE) == SECTIONS
    assert "```" in text, "no command to copy"
    assert len(text.splitlines()) <= 60, "too long to be read at night"


@pytest.mark.parametrize("alert", alerts(environment()), ids=lambda alert: alert.name)
def test_an_alert_is_short_and_its_name_could_be_a_metrics_label(alert: Alert) -> None:
    assert re.fullmatch(r"([A-Z][a-z]+)+", alert.name)
    assert metrics(alert.expression), "asks no metric"
    assert "\n" not in alert.expression and len(alert.summary) <= 200


def test_names_are_there_once() -> None:
    found = alerts(environment())
    assert len({alert.name for alert in found}) == len(found)


def test_runbooks_are_named_by_their_file_or_where_settings_say_they_are_read() -> None:
    (group,) = yaml.safe_load(rules_file(alerts(environment())))["groups"]
    told = {rule["annotations"]["runbook_url"] for rule in group["rules"]}
    assert f"{RUNBOOKS}/gate-failed.md" in told
    (group,) = yaml.safe_load(rules_file(alerts(environment()), "https://code.example/drydock/runbooks/"))["groups"]
    told = {rule["annotations"]["runbook_url"] for rule in group["rules"]}
    assert "https://code.example/drydock/runbooks/gate-failed.md" in told


def test_limits_and_times_follow_the_settings() -> None:
    changes = {
        "alerts": '{"failed_share": 0.2, "time_to_first_token_seconds": 1.5}',
        "tuning": '{"pool": "a100", "deadline_hours": 2}',
        "serving": '{"pool": "a100", "min_replicas": 1, "max_replicas": 2, "queue_target": 9, "stall_seconds": 33}',
    }
    found = by_name(**changes)
    assert "> 0.2 " in found["RequestsFailing"].expression
    assert "> 1.5 " in found["FirstTokenLate"].expression and "wanted are 1.5 s" in found["FirstTokenLate"].summary
    assert "> 5400 " in found["TuningLate"].expression and "> 6480" in found["TuningLate"].expression
    assert "> 9 * count" in found["QueueGrowing"].expression
    assert found["EngineStalled"].expression.endswith(">= 33")
    assert found["ReplicasMissing"].expression.endswith("< 1")
    # A further replica needs a node, an image and weights: before that, a queue is none of anybody's business.
    seconds = NODE_SECONDS + startup_seconds(environment().base.figures.parameters)
    assert found["QueueGrowing"].minutes * 60 >= seconds > by_name()["QueueGrowing"].minutes * 60


def test_a_pool_that_may_sleep_is_not_missed_and_its_router_is() -> None:
    found = by_name(**SLEEPING)
    assert "ReplicasMissing" not in found
    assert 'deployment=~"router"' in found["ServingDown"].expression
    assert 'deployment=~"engine|router"' in by_name()["ServingDown"].expression


def test_of_gpus_nothing_is_told_where_nobody_measures_them() -> None:
    names = {"GpuFaulty", "GpuSlowed", "GpuIdle"}
    images = '"kaito": {"adapter_images": {"domain-llama": null}}'
    kaito = by_name(serving=f'{{"pool": "a100", "runtime": "kaito", "min_replicas": 2, "max_replicas": 2, {images}}}')
    assert names <= set(by_name()) and names <= set(kaito), "there too, tuning is on our own nodes"
    without = by_name(cluster='{"gpu_metrics": false}')
    assert not names & set(without)
    assert "up" in metrics(by_name()["MetricsMissing"].expression)
    assert "up" not in metrics(without["MetricsMissing"].expression)


@pytest.mark.parametrize(
    "wrong",
    [
        '{"action_group_id": "ops@example.org"}',
        '{"action_group_id": "/subscriptions/1/resourceGroups/g/providers/Microsoft.Web/sites/x"}',
        '{"runbooks": "http://code.example"}',
        '{"failed_share": 5}',
        '{"time_to_first_token_seconds": 200}',
    ],
)
def test_settings_that_would_tell_nobody_are_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match="alerts"):
        environment(alerts=wrong)


def test_an_action_group_is_taken_by_its_id() -> None:
    id_ = "/subscriptions/1/resourceGroups/ops/providers/Microsoft.Insights/actionGroups/on-call"
    assert environment(alerts=f'{{"action_group_id": "{id_}"}}').alerts.action_group_id == id_


def test_metrics_of_a_query() -> None:
    query = (
        'sum by (le, model) (rate(a_bucket{x=~"b|c",y="d(e)"}[5m])) / on (z) group_left (w) vllm:f offset 1h '
        'unless label_replace(g == 1, "h", "$1", "i", "(j)") and count(k) > 1e3 or time() - l{m="n"} * inf'
    )
    assert metrics(query) == {"a_bucket", "vllm:f", "g", "k", "l"}
