"""What alerts and dashboards ask is there, by the parts that give it; and each alert fires when it should, by promtool."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from infra.alerts import rules_file
from serving.sidecar import Metrics
from serving.startup import Phases
from tests.contract.conftest import Replica
from tests.unit.promql import metrics
from tests.unit.test_environment import environment
from training.progress import Progress
from workloads.alerts import alerts
from workloads.dashboards import RATE, dashboards
from workloads.metrics import KEPT

HERE = Path(__file__).parent
CASES: dict[str, list[dict[str, Any]]] = yaml.safe_load((HERE / "alerts.yaml").read_text())
ALERTS = alerts(environment())
SLEEPING = alerts(environment(serving='{"pool": "a100", "min_replicas": 0, "max_replicas": 2}'))

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus")


def exposed(text: str) -> set[str]:
    """The names under which the metrics of an exposition can be asked."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


@pytest.fixture(scope="module")
def known(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """All metrics that there are: of the engine and its request layer, the sidecar, the trainer, and what is listed."""
    folder = tmp_path_factory.mktemp("eyes")
    with Progress("kubectl", 1, folder / "events.jsonl", None) as trainer:
        registries = [Metrics().registry, trainer._registry, CollectorRegistry()]
        registries[-1].register(Phases(folder))
        texts = [generate_latest(registry).decode() for registry in registries]
    texts.append(httpx.get(f"{replica.url}/metrics", timeout=10).text)
    listed = {line for line in (HERE / "metrics.txt").read_text().splitlines() if line and line[0] != "#"}
    return listed.union(KEPT, *map(exposed, texts))


@pytest.mark.parametrize("alert", {alert.name: alert for alert in (*SLEEPING, *ALERTS)}.values(), ids=lambda a: a.name)
def test_what_an_alert_asks_is_there(known: set[str], alert: Any) -> None:
    assert metrics(alert.expression) - known == set()


@pytest.mark.parametrize("name", dashboards(1.0))
def test_what_a_dashboard_asks_is_there(known: set[str], name: str) -> None:
    missing = {
        panel["title"]: unknown
        for panel in dashboards(1.0)[name]["panels"]
        for target in panel.get("targets", ())
        if (unknown := metrics(target["expr"]) - known)
    }
    assert missing == {}


def test_a_name_that_is_not_there_would_be_found(known: set[str]) -> None:
    assert metrics("rate(vllm:gpu_cache_usage_perc[5m])") - known == {"vllm:gpu_cache_usage_perc"}


@promtool
@pytest.mark.parametrize("found", [ALERTS, SLEEPING], ids=["awake", "sleeping"])
def test_prometheus_reads_the_rules(tmp_path: Path, found: Any) -> None:
    (tmp_path / "rules.yaml").write_text(rules_file(found, "https://code.example/runbooks"))
    said = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert said.returncode == 0 and f"{len(found)} rules found" in said.stdout, said.stdout + said.stderr


@promtool
def test_prometheus_reads_what_dashboards_ask(tmp_path: Path) -> None:
    queries = [
        target["expr"].replace(RATE, "1m")
        for board in dashboards(1.0).values()
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    said = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert f"{len(queries)} rules found" in said.stdout, said.stdout + said.stderr


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    assert list(CASES) == [alert.name for alert in ALERTS]
    for name, cases in CASES.items():
        assert {bool(case["fires"]) for case in cases} == {True, False}, name


@promtool
@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_fires_when_it_should(tmp_path: Path, alert: Any) -> None:
    # Annotations would have to be said word by word: that their labels are there is looked at below.
    (group,) = yaml.safe_load(rules_file([alert]))["groups"]
    group["rules"][0].pop("annotations")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    tests = [
        {
            "name": case["what"],
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in case["series"].items()],
            "alert_rule_test": [
                {
                    "eval_time": f"{case['at']}m",
                    "alertname": alert.name,
                    "exp_alerts": [
                        {"exp_labels": {**labels, "severity": str(alert.severity)}} for labels in case["fires"]
                    ],
                }
            ],
        }
        for case in CASES[alert.name]
    ]
    plan = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    said = subprocess.run(["promtool", "test", "rules", tmp_path / "tests.yaml"], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    told = set(re.findall(r"\$labels\.(\w+)", alert.summary))
    for case in CASES[alert.name]:
        assert all(told <= set(labels) for labels in case["fires"]), f"{alert.summary!r} names what is not there"
