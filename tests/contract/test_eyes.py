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

from common.processes import free_ports
from infra.alerts import rules_file
from serving.sidecar import Metrics
from serving.startup import Phases
from tests.contract.conftest import Replica
from tests.contract.test_front import CONFIG, Front, running_front
from tests.contract.test_router import Quiet, serving
from tests.unit.promql import metrics
from tests.unit.test_environment import environment
from training.progress import Progress
from workloads.alerts import alerts
from workloads.dashboards import RATE, dashboards
from workloads.gpu_metrics import COUNTERS
from workloads.metrics import FRONT_KEPT, KEPT

HERE = Path(__file__).parent
CASES: dict[str, list[dict[str, Any]]] = yaml.safe_load((HERE / "alerts.yaml").read_text())
LISTED = {line for line in (HERE / "metrics.txt").read_text().splitlines() if line and line[0] != "#"}
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
    return LISTED.union(KEPT, FRONT_KEPT, *map(exposed, texts))


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


ASKED = set().union(
    *(metrics(alert.expression) for alert in ALERTS),
    *(
        metrics(target["expr"])
        for board in dashboards(1.0).values()
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ),
)


haproxy = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("haproxy", "dumb-init")), reason="needs haproxy and dumb-init"
)


def front_metrics(front: Front) -> str:
    return httpx.get(f"http://127.0.0.1:{front.metrics_port}/metrics", timeout=10).text


@haproxy
def test_of_haproxy_what_is_kept_is_there_and_asked(tmp_path: Path) -> None:
    [nobody] = free_ports(1)
    with running_front(tmp_path, nobody) as front:
        assert set(FRONT_KEPT) - exposed(front_metrics(front)) == set()
    assert set(FRONT_KEPT) == {name for name in ASKED if name.startswith("haproxy_")}


class Breaks(Quiet):
    """Stands for a router that ends at a request."""

    def do_POST(self) -> None:
        self.close_connection = True


@haproxy
def test_haproxy_counts_as_panels_and_alerts_say(tmp_path: Path) -> None:
    config = tmp_path / "front.cfg"
    config.write_text(re.sub(r"timeout http-request \d+s", "timeout http-request 1s", CONFIG.read_text()))

    def counted(front: Front) -> dict[str, float]:
        found = re.findall(r'^haproxy_(\w+_total)\{proxy="(?:clients|router)"\} (\S+)$', front_metrics(front), re.M)
        return {name: float(value) for name, value in found if f"haproxy_{name}" in FRONT_KEPT}

    [nobody] = free_ports(1)
    with running_front(tmp_path, nobody, config) as front:
        assert httpx.post(f"{front.url}/v1/completions", json={}, timeout=20).status_code == 503
        assert counted(front) == {
            "backend_client_aborts_total": 0, "backend_connection_errors_total": 1, "backend_response_errors_total": 0,
            "backend_retry_warnings_total": 3, "frontend_request_errors_total": 0,
        }  # fmt: skip
    with serving(Breaks) as router, running_front(tmp_path, router.server_port, config) as front:
        assert httpx.post(f"{front.url}/v1/completions", json={}, timeout=20).status_code == 502
        assert front.raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le").startswith(b"HTTP/1.1 408 ")
        assert counted(front) == {
            "backend_client_aborts_total": 0, "backend_connection_errors_total": 0, "backend_response_errors_total": 1,
            "backend_retry_warnings_total": 0, "frontend_request_errors_total": 1,
        }  # fmt: skip


def test_of_dcgm_what_is_counted_is_known_and_asked() -> None:
    counted = {name for name, _ in COUNTERS}
    assert counted == {name for name in LISTED if name.startswith("DCGM_")}
    assert counted == {name for name in ASKED if name.startswith("DCGM_")}


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


TAINT = 'kube_node_spec_taint{node="%s",key="%s",value="%s"}'
SPOT_TAINT = ("kubernetes.azure.com/scalesetpriority", "spot")


@promtool
@pytest.mark.parametrize(
    ("marks", "down", "taken"),
    [
        ([], 0, 1),
        ([("ToBeDeletedByClusterAutoscaler", "1790000000")], 1, 0),
        ([("karpenter.sh/disrupted", "")], 1, 0),
        ([("remediator.kubernetes.azure.com/unschedulable", "")], 0, 1),
        ([("remediator.kubernetes.azure.com/unschedulable", ""), ("karpenter.sh/disrupted", "")], 0, 1),
    ],
    ids=["nothing", "autoscaler", "karpenter", "azure", "azure, then karpenter"],
)
def test_a_spot_node_that_is_taken_away_is_told_from_one_that_is_scaled_down(
    tmp_path: Path, marks: list[tuple[str, str]], down: int, taken: int
) -> None:
    (panel,) = (panel for panel in dashboards()["fleet"]["panels"] if panel["title"] == "Spot nodes")
    asked = {target["legendFormat"]: target["expr"] for target in panel["targets"]}
    series = {TAINT % ("stays", *SPOT_TAINT): "1x20", TAINT % ("goes", *SPOT_TAINT): "1x10"}
    series |= {TAINT % ("goes", *mark): "_x9 1x1" for mark in marks}
    wanted = {"there": 1, "scaled down within five minutes": down, "taken away within five minutes": taken}
    plan = {
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {"expr": asked[legend], "eval_time": "17m", "exp_samples": [{"labels": "{}", "value": value}]}
                    for legend, value in wanted.items()
                ],
            }
        ],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    said = subprocess.run(["promtool", "test", "rules", tmp_path / "tests.yaml"], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


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
