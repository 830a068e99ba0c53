"""How KEDA scales the replicas, and that what it asks for is a metric that exists under the labels it has."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from infra.settings import Serving
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, deploy
from workloads.metrics import PORTS, Metrics, MetricsArgs, scrape_config, scraped
from workloads.scaling import HPA_LONGEST_WINDOW, Scaling, ScalingArgs, asked, behavior, start_seconds

PARAMETERS = 8_030_261_248


@cache
def declared(low: int = 1, high: int = 4) -> Recorder:
    settings = Serving(pool="a100", min_replicas=low, max_replicas=high, queue_target=7, max_num_seqs=48)
    args = ScalingArgs(settings, PARAMETERS, "https://prometheus.example", "client-of-keda")
    return deploy(lambda: Scaling("scaling", args) and None)


def scaled(seen: Recorder) -> dict[str, Any]:
    found: dict[str, Any] = seen.one(":ScaledObject").inputs["spec"]
    return found


def triggers(seen: Recorder) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in scaled(seen)["triggers"]}


def test_a_fixed_number_of_replicas_is_not_scaled() -> None:
    assert not [item for item in declared(2, 2).resources if item.type.startswith("kubernetes:")]


def test_between_the_two_bounds_of_the_settings() -> None:
    spec = scaled(declared())
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (1, 4)
    assert spec["scaleTargetRef"] == {"name": "engine"}


def test_it_signs_in_as_kedas_identity() -> None:
    authentication = declared().one(":TriggerAuthentication").inputs
    assert authentication["apiVersion"] == "keda.sh/v1alpha1"
    assert authentication["spec"] == {"podIdentity": {"provider": "azure-workload", "identityId": "client-of-keda"}}
    for trigger in triggers(declared()).values():
        assert trigger["type"] == "prometheus"
        assert trigger["metadata"]["serverAddress"] == "https://prometheus.example"
        assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
        assert all(isinstance(value, str) for value in trigger["metadata"].values())  # KEDA takes texts alone


def test_queue_slots_and_cache_each_want_replicas() -> None:
    found = triggers(declared())
    assert set(found) == {"waiting", "running", "kv-cache"}
    thresholds = {name: trigger["metadata"]["threshold"] for name, trigger in found.items()}
    # Of one replica: the setting, and four fifths of its 48 slots and of its cache.
    assert thresholds == {"waiting": "7", "running": "38.4", "kv-cache": "0.8"}
    for name, metric in (("running", "num_requests_running"), ("kv-cache", "kv_cache_usage_perc")):
        assert found[name]["metadata"]["query"].startswith(f"sum(vllm:{metric}{{")
    # ceil(sum / threshold), whatever is ready: with Value, ready replicas times average / threshold.
    assert all("metricType" not in trigger for trigger in found.values())


def test_a_queue_asks_for_half_as_many_more_than_answer() -> None:
    query = triggers(declared())["waiting"]["metadata"]["query"]
    queue = 'vllm:num_requests_waiting{kubernetes_namespace="drydock-serving"}'
    assert query == f"clamp_max(sum({queue}), 10.5 * scalar(count({queue})))"  # 1.5 x 7 for each that answers


def test_a_missing_metric_scales_nothing_down_where_replicas_are_always_there() -> None:
    for low, ignored in ((1, "false"), (0, "true")):
        for name in ("waiting", "running", "kv-cache"):
            assert triggers(declared(low))[name]["metadata"]["ignoreNullValues"] == ignored


def test_a_sleeping_pool_is_woken_by_the_router() -> None:
    assert "asked" not in triggers(declared(1))
    query = triggers(declared(0))["asked"]["metadata"]["query"]
    assert query == asked()
    # A counter begins with its first event, in which `increase` sees no growth: the first request must count as well.
    for counter in ("vllm_router_requests_total{", "vllm_router_request_errors_total{"):
        assert query.count(counter) == 3
    assert 'error_type="no_available_workers"' in query
    assert query.startswith("clamp_max(") and query.endswith(", 1)")  # holds one replica, asks for no second
    assert query.count("(") == query.count(")")


@pytest.mark.parametrize("low", [0, 1])
def test_queries_use_the_labels_that_the_scrape_gives(low: int) -> None:
    for trigger in triggers(declared(low)).values():
        for selector in re.findall(r"\{(.*?)\}", trigger["metadata"]["query"]):
            assert selector.startswith('kubernetes_namespace="drydock-serving"'), selector


def test_the_pace_follows_the_models_start() -> None:
    small, large = 1_000_000_000, 70_553_706_496
    assert [start_seconds(each) for each in (small, large)] == [1220, 2612]
    # 600 s for a node, 600 s to compile, 2 bytes a parameter at 100 MB/s
    windows = [behavior(each)["scaleDown"]["stabilizationWindowSeconds"] for each in (small, large)]
    assert windows == [1830, HPA_LONGEST_WINDOW]
    assert behavior(small)["scaleUp"]["stabilizationWindowSeconds"] < 120
    assert scaled(declared())["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == behavior(PARAMETERS)
    # What one request woke is there for longer than it takes to come.
    assert scaled(declared(0))["cooldownPeriod"] >= start_seconds(PARAMETERS)


@pytest.mark.parametrize("low", [0, 1, 2])
def test_what_customers_depend_on_has_three_replicas(low: int) -> None:
    with pytest.raises(ValidationError, match=f"min_replicas = {low} .* raise it to 3"):
        Serving(pool="a100", min_replicas=low, max_replicas=4, customer_facing=True)
    assert Serving(pool="a100", min_replicas=3, max_replicas=4, customer_facing=True).min_replicas == 3


@cache
def metrics() -> Recorder:
    return deploy(lambda: Metrics("metrics", MetricsArgs(("drydock-tuning", "drydock-serving"))) and None)


def test_prometheus_reads_annotated_pods_of_our_namespaces() -> None:
    maps = {item.inputs["metadata"]["name"]: item.inputs for item in metrics().of(":ConfigMap")}
    assert [said for item in maps.values() for said in problems(item)] == []
    assert {item["metadata"]["namespace"] for item in maps.values()} == {"kube-system"}
    data = maps["ama-metrics-settings-configmap"]["data"]
    assert data["schema-version"] == "v1" and len(data["config-version"]) <= 10
    assert data["pod-annotation-based-scraping"] == 'podannotationnamespaceregex = "drydock-tuning|drydock-serving"'
    assert data["default-targets-metrics-keep-list"] == 'kubestate = "kube_job_status_failed"'
    assert scraped(8000) == {
        "prometheus.io/scrape": "true", "prometheus.io/path": "/metrics", "prometheus.io/port": "8000",
    }  # fmt: skip


def test_further_ports_are_found_by_their_name_under_the_same_labels() -> None:
    assert all(len(port) <= 15 for port in PORTS), "Kubernetes' limit of a port's name"
    (job,) = yaml.safe_load(scrape_config(("drydock-serving",)))["scrape_configs"]
    assert job["relabel_configs"][0] == {
        "source_labels": ["__meta_kubernetes_pod_container_port_name"], "action": "keep", "regex": "|".join(PORTS),
    }  # fmt: skip
    assert {rule.get("target_label") for rule in job["relabel_configs"][2:]} == {
        "kubernetes_namespace",
        "kubernetes_pod_name",
        "node",
    }


def test_of_these_ports_what_nobody_asks_is_not_paid_for() -> None:
    (job,) = yaml.safe_load(scrape_config(("drydock-serving",)))["scrape_configs"]
    (rule,) = job["metric_relabel_configs"]
    assert (rule["source_labels"], rule["action"]) == (["__name__"], "keep")
    for name, kept in {
        "drydock_adapter_serving": True,
        "drydock_startup_seconds": True,
        "DCGM_FI_DEV_GPU_UTIL": True,
        "haproxy_frontend_http_responses_total": True,
        "haproxy_process_uptime_seconds": False,
        "haproxy_server_http_responses_total": False,
        "haproxy_frontend_http_responses_total_created": False,
    }.items():
        assert bool(re.fullmatch(rule["regex"], name)) == kept, name
