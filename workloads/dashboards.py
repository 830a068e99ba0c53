"""What people look at: Grafana dashboards of tuning, serving and the fleet, as data that Grafana imports.

The data source is a variable, so that the same files serve Azure's own Prometheus and any other one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import cli, exits
from infra import prices
from infra.settings import Environment
from workloads.gpu_metrics import SLOWED
from workloads.metrics import NAMESPACE_LABEL
from workloads.namespaces import SERVING, TUNING

EPILOG = """
example:
  python -m workloads.dashboards --out out/dashboards
  az grafana dashboard import --name NAME --definition @out/dashboards/serving.json
"""

COLUMNS = 24  # Grafana's grid
HEIGHT = 8
RATE = "$__rate_interval"  # four scrapes, or the width of a pixel where that is more
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

_S = f'{NAMESPACE_LABEL}="{SERVING}"'
_T = f'{NAMESPACE_LABEL}="{TUNING}"'
_FRONT = f'{_S},proxy="clients"'
_OURS = f'namespace=~"{TUNING}|{SERVING}"'
_GPU = 'resource="nvidia_com_gpu"'
_SPOT = 'key="kubernetes.azure.com/scalesetpriority",value="spot"'
_DOWN = 'key=~"ToBeDeletedByClusterAutoscaler|karpenter.sh/disrupted"'  # the autoscaler's mark, and Karpenter's
_DRAINED = 'key="remediator.kubernetes.azure.com/unschedulable"'  # AKS's own, when Azure takes a node (node-auto-drain)
_POD = "{{kubernetes_pod_name}}"
_GPU_OF = "{{node}} {{gpu}} {{pod}}"


@dataclass(frozen=True)
class Panel:
    """`queries`: legend to PromQL. `unit`: Grafana's name of it. `width`: of the 24 columns."""

    title: str
    unit: str
    queries: dict[str, str]
    kind: Literal["timeseries", "stat", "bargauge", "table"] = "timeseries"
    width: int = 8
    description: str = ""
    stacked: bool = False
    log: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Board:
    """One dashboard: rows of panels, by the row's title."""

    name: str
    title: str
    rows: dict[str, Sequence[Panel]] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As Grafana has it; the same for the same panels."""
        panels: list[dict[str, Any]] = []
        top = 0
        for title, row in self.rows.items():
            panels.append(_row(len(panels) + 1, title, top))
            top, left = top + 1, 0
            for panel in row:
                if left + panel.width > COLUMNS:
                    top, left = top + HEIGHT, 0
                panels.append(_panel(len(panels) + 1, panel, {"h": HEIGHT, "w": panel.width, "x": left, "y": top}))
                left += panel.width
            top += HEIGHT
        return {
            "uid": f"drydock-{self.name}",
            "title": self.title,
            "tags": ["drydock"],
            "schemaVersion": 39,
            "version": 1,
            "editable": True,
            "timezone": "browser",
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "graphTooltip": 1,  # one cross-hair for all panels
            "templating": {
                "list": [
                    {
                        "name": "datasource",
                        "label": "Prometheus",
                        "type": "datasource",
                        "query": "prometheus",
                        "hide": 0,
                        "refresh": 1,
                    }
                ]
            },
            "annotations": {"list": []},
            "links": [],
            "panels": panels,
        }


def _row(number: int, title: str, top: int) -> dict[str, Any]:
    place = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    now = panel.kind != "timeseries"
    defaults: dict[str, Any] = {"unit": panel.unit}
    options: dict[str, Any] = {}
    if panel.limits:
        defaults |= {"min": panel.limits[0], "max": panel.limits[1]}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "scaleDistribution": {"type": "log", "log": 10} if panel.log else {"type": "linear"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind in ("stat", "bargauge"):
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + place_of),
                "datasource": SOURCE,
                "expr": query,
                "legendFormat": legend,
                "range": not now,
                "instant": now,
                "format": "table" if panel.kind == "table" else "time_series",
            }
            for place_of, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def usd_an_hour(env: Environment, location: str) -> float | None:
    """What the nodes of one tuning Job cost; None where no price is known."""
    pool = env.pools[env.tuning.pool]
    try:
        price = prices.vm_price(pool.vm_size, location, spot=pool.spot, given=env.prices)
    except ValueError:
        return None
    return price.usd * env.tuning.nodes


def dashboards(tuning_usd_an_hour: float | None = None) -> dict[str, dict[str, Any]]:
    """All dashboards by name. Without a price of the tuning Job's nodes, what a run has cost is left out."""
    return {board.name: board.json() for board in (_tuning(tuning_usd_an_hour), _serving(), _fleet())}


def _quantiles(name: str, by: str = "", legend: str = "") -> dict[str, str]:
    """p50 and p95 of a histogram, for each `by`."""
    buckets = f"sum by ({by}, le)" if by else "sum by (le)"
    buckets += f" (rate({name}_bucket{{{_S}}}[{RATE}]))"
    return {f"{legend} p{share}".strip(): f"histogram_quantile(0.{share}, {buckets})" for share in (50, 95)}


def _tuning(usd: float | None) -> Board:
    def of(name: str) -> dict[str, str]:
        return {"{{adapter}}": f"max by (adapter) (drydock_tuning_{name}{{{_T}}})"}

    done = f"max by (adapter) (drydock_tuning_step{{{_T}}} / drydock_tuning_total_steps{{{_T}}})"
    cost = []
    if usd is not None:
        query = f"max by (adapter) (drydock_tuning_elapsed_seconds{{{_T}}}) / 3600 * {usd:g}"
        told = f"At {usd:g} USD an hour of the Job's nodes. Earlier attempts count, waiting for a node does not."
        cost = [Panel("Cost so far", "currencyUSD", {"{{adapter}}": query}, "stat", 6, told)]
    return Board(
        "tuning",
        "Drydock: tuning",
        {
            "Now": [
                Panel("Done", "percentunit", {"{{adapter}}": done}, "bargauge", 6, limits=(0, 1)),
                Panel("Time to the last step", "s", of("eta_seconds"), "stat", 6),
                Panel("Time spent", "s", of("elapsed_seconds"), "stat", 6, "Attempts before this one included."),
                *cost,
            ],
            "Learning": [
                Panel("Loss", "none", of("loss"), width=12, description="Mean of an answer token, in nats."),
                Panel("Gradient norm", "none", of("gradient_norm"), width=6, description="Before clipping.", log=True),
                Panel("Learning rate", "sci", of("learning_rate"), width=6),
            ],
            "Speed": [
                Panel("Tokens a second", "none", of("tokens_per_second"), description="None of them is padding."),
                Panel("Share of a pass that is used", "percentunit", of("pass_fill"), limits=(0, 1)),
                Panel("GPU memory, at most", "bytes", of("gpu_memory_bytes"), description="Of the allocator."),
                Panel(
                    "Age of the newest checkpoint",
                    "s",
                    {"{{adapter}}": f"time() - max by (adapter) (drydock_tuning_checkpoint_timestamp_seconds{{{_T}}})"},
                    description="What an eviction would cost.",
                ),
                Panel("Rows left out as too long", "none", of("dropped_rows")),
                Panel(
                    "Jobs",
                    "none",
                    {
                        "{{job_name}} runs": f'max by (job_name) (kube_job_status_active{{namespace="{TUNING}"}}) > 0',
                        "{{job_name}} failed": "max by (job_name) "
                        f'(kube_job_failed{{namespace="{TUNING}",condition="true"}}) > 0',
                    },
                ),
            ],
        },
    )


def _serving() -> Board:
    requests = f"rate(drydock_requests_total{{{_S}}}[{RATE}])"
    errors = f'rate(drydock_requests_total{{{_S},outcome="error"}}[{RATE}])'
    answers = f"rate(haproxy_frontend_http_responses_total{{{_FRONT}}}[{RATE}])"
    return Board(
        "serving",
        "Drydock: serving",
        {
            "Requests": [
                Panel(
                    "By model",
                    "reqps",
                    {"{{model}}": f"sum by (model) ({requests})"},
                    stacked=True,
                    description="Without a name: refused before it was known which.",
                ),
                Panel("By tier", "reqps", {"{{tier}}": f"sum by (tier) ({requests})"}, stacked=True),
                Panel(
                    "By outcome",
                    "reqps",
                    {"{{outcome}}": f"sum by (outcome) ({requests})"},
                    stacked=True,
                    description="error: ours. client_gone: the client left. The rest: ok, or the code of the refusal.",
                ),
                Panel(
                    "In flight",
                    "none",
                    {"{{tier}}": f"sum by (tier) (drydock_requests_in_flight{{{_S}}})"},
                    stacked=True,
                ),
                Panel(
                    "Through the router",
                    "reqps",
                    {
                        "placed": f"sum(rate(vllm_router_requests_total{{{_S}}}[{RATE}]))",
                        "{{error_type}}": "sum by (error_type) "
                        f"(rate(vllm_router_request_errors_total{{{_S}}}[{RATE}]))",
                    },
                ),
                Panel(
                    "Share of errors",
                    "percentunit",
                    {"errors": f"(sum({errors}) or vector(0)) / sum({requests})"},
                ),
            ],
            "Front": [
                Panel(
                    "Answers by status",
                    "reqps",
                    {"{{code}}": f"sum by (code) ({answers}) > 0"},
                    width=6,
                    stacked=True,
                    description="What clients got of HAProxy, its own refusals and the kubelet's probes included.",
                ),
                Panel(
                    "Connections",
                    "none",
                    {
                        _POD: f"haproxy_frontend_current_sessions{{{_FRONT}}}",
                        "the most a pod takes": f"max(haproxy_frontend_limit_sessions{{{_FRONT}}})",
                    },
                    width=6,
                    log=True,
                    description="It has no queue of its own: beyond the most they wait in the kernel, uncounted.",
                ),
                Panel(
                    "Broken",
                    "reqps",
                    {
                        "no router": f"sum(rate(haproxy_backend_connection_errors_total{{{_S}}}[{RATE}]))",
                        "tried again": f"sum(rate(haproxy_backend_retry_warnings_total{{{_S}}}[{RATE}]))",
                        "no whole answer": f"sum(rate(haproxy_backend_response_errors_total{{{_S}}}[{RATE}]))",
                    },
                    width=6,
                    description="Engines count none of it. No whole answer: a router or a replica went meanwhile.",
                ),
                Panel(
                    "Cut short by clients",
                    "reqps",
                    {
                        "too slow, or no HTTP": f"sum(rate(haproxy_frontend_request_errors_total{{{_FRONT}}}[{RATE}]))",
                        "left before the end": f"sum(rate(haproxy_backend_client_aborts_total{{{_S}}}[{RATE}]))",
                    },
                    width=6,
                    description="Headers or a body that took 10 s got 408; connections without a request count too.",
                ),
            ],
            "Latency": [
                Panel("First token", "s", _quantiles("drydock_time_to_first_token_seconds"), log=True),
                Panel(
                    "First token by model",
                    "s",
                    _quantiles("drydock_time_to_first_token_seconds", "model", "{{model}}"),
                    log=True,
                    description="An adapter's name, or the base.",
                ),
                Panel("Whole answer", "s", _quantiles("drydock_request_seconds"), log=True),
                Panel("Between two tokens", "s", _quantiles("vllm:inter_token_latency_seconds")),
                Panel("In the engine's queue", "s", _quantiles("vllm:request_queue_time_seconds")),
                Panel("Prefill", "s", _quantiles("vllm:request_prefill_time_seconds")),
            ],
            "Engines": [
                Panel("Waiting", "none", {_POD: f"vllm:num_requests_waiting{{{_S}}}"}),
                Panel("Running", "none", {_POD: f"vllm:num_requests_running{{{_S}}}"}),
                Panel("KV cache in use", "percentunit", {_POD: f"vllm:kv_cache_usage_perc{{{_S}}}"}, limits=(0, 1)),
                Panel(
                    "Preempted",
                    "ops",
                    {_POD: f"rate(vllm:num_preemptions_total{{{_S}}}[{RATE}])"},
                    description="Answers put back for want of KV cache, and begun anew.",
                ),
                Panel(
                    "Tokens",
                    "cps",
                    {
                        "prompt": f"sum(rate(vllm:prompt_tokens_total{{{_S}}}[{RATE}]))",
                        "generated": f"sum(rate(vllm:generation_tokens_total{{{_S}}}[{RATE}]))",
                    },
                ),
                Panel(
                    "Prompt tokens found in the cache",
                    "percentunit",
                    {
                        _POD: f"rate(vllm:prefix_cache_hits_total{{{_S}}}[{RATE}]) "
                        f"/ rate(vllm:prefix_cache_queries_total{{{_S}}}[{RATE}])"
                    },
                    limits=(0, 1),
                ),
                Panel(
                    "Without a step, with requests",
                    "s",
                    {_POD: f"drydock_engine_stalled_seconds{{{_S}}}"},
                    description="0 while the engine moves; loading an adapter is a short pause.",
                ),
                Panel(
                    "Replicas",
                    "none",
                    {
                        "{{deployment}} wanted": f'kube_deployment_spec_replicas{{namespace="{SERVING}"}}',
                        "{{deployment}} ready": f'kube_deployment_status_replicas_available{{namespace="{SERVING}"}}',
                    },
                ),
                Panel(
                    "The last start, by phase",
                    "s",
                    {"{{phase}}": f"max by (phase) (drydock_startup_seconds{{{_S}}})"},
                    "bargauge",
                    description="The slowest replica of each phase.",
                ),
            ],
            "Adapters": [
                Panel(
                    "Versions that answer",
                    "none",
                    {"": f"count by (adapter, version) (drydock_adapter_serving{{{_S}}} == 1)"},
                    "table",
                    description="And on how many replicas.",
                ),
                Panel(
                    "From the tag to the answer, by phase",
                    "s",
                    {
                        "{{adapter}} {{version}} {{phase}}": "max by (adapter, version, phase) "
                        f"(drydock_adapter_switch_seconds{{{_S}}})"
                    },
                    "bargauge",
                ),
                Panel(
                    "Refused",
                    "none",
                    {"{{adapter}} {{version}}": f"sum by (adapter, version) (drydock_adapter_refused_total{{{_S}}})"},
                ),
                Panel(
                    "Canaries off by, at most",
                    "none",
                    {
                        "{{adapter}} {{version}}": "max by (adapter, version) "
                        f"(drydock_adapter_parity_difference_nats{{{_S}}})"
                    },
                    description="Nats a token, between what was evaluated and what a replica computes.",
                ),
                Panel("Registry not seen for", "s", {_POD: f"drydock_registry_unreachable_seconds{{{_S}}}"}),
                Panel(
                    "Looks that failed",
                    "ops",
                    {"{{adapter}}": f"sum by (adapter) (rate(drydock_sidecar_errors_total{{{_S}}}[{RATE}]))"},
                ),
            ],
        },
    )


def _fleet() -> Board:
    kv_cache, spot = f"vllm:kv_cache_usage_perc{{{_S}}}", f"kube_node_spec_taint{{{_SPOT}}}"
    # Not what one failed scrape does not show.
    gone = f"(max_over_time({spot}[5m] offset 5m) unless on (node) max_over_time({spot}[5m]))"
    marked = (
        f"(max_over_time(kube_node_spec_taint{{{_DOWN}}}[10m]) "
        f"unless on (node) max_over_time(kube_node_spec_taint{{{_DRAINED}}}[10m]))"
    )
    ready = 'kube_node_status_condition{condition="Ready",status="true"}'
    pool = 'label_replace(kube_node_info, "pool", "$1", "node", "aks-([^-]+)-.*")'
    return Board(
        "fleet",
        "Drydock: the fleet",
        {
            "GPUs": [
                Panel(
                    "There, and asked for",
                    "none",
                    {
                        "there": f"sum(kube_node_status_allocatable{{{_GPU}}})",
                        "asked for in {{namespace}}": "sum by (namespace) "
                        f'(kube_pod_container_resource_requests{{{_GPU},node!=""}} '
                        'and on (namespace, pod) kube_pod_status_phase{phase=~"Pending|Running"} == 1)',
                    },
                    description="By pods that have a node. A tuning pod counts with the GPU of its evaluation.",
                ),
                Panel(
                    "Memory that tuning used, at most",
                    "bytes",
                    {"{{adapter}}": f"max by (adapter) (drydock_tuning_gpu_memory_bytes{{{_T}}})"},
                ),
                Panel(
                    "KV cache in use",
                    "percentunit",
                    {"mean": f"avg({kv_cache})", "most": f"max({kv_cache})"},
                    limits=(0, 1),
                ),
                Panel(
                    "Busy",
                    "percentunit",
                    {_GPU_OF: "DCGM_FI_DEV_GPU_UTIL / 100"},
                    limits=(0, 1),
                    description="Share of the time in which a kernel ran: full says at work, not fast.",
                ),
                Panel("Memory in use, by GPU", "bytes", {_GPU_OF: "DCGM_FI_DEV_FB_USED * 1048576"}),
                Panel("Power", "watt", {_GPU_OF: "DCGM_FI_DEV_POWER_USAGE"}),
                Panel("Temperature", "celsius", {_GPU_OF: "DCGM_FI_DEV_GPU_TEMP"}),
                Panel(
                    "Xid errors within five minutes",
                    "none",
                    {f"{_GPU_OF} xid {{{{xid}}}}": 'DCGM_EXP_XID_ERRORS_COUNT{xid!~"|0"}'},
                    description="By NVIDIA's number; 13, 31, 43, 45, 68 and 109 are a program's own.",
                ),
                Panel(
                    "Clocks slowed down",
                    "none",
                    {f"{_GPU_OF} {{{{clock_event}}}}": f"DCGM_EXP_CLOCK_EVENTS_COUNT{{{SLOWED}}} > 0"},
                    description="Samples of five minutes: by heat or power, beyond the cap that belongs to the GPU.",
                ),
            ],
            "Nodes": [
                Panel(
                    "By pool",
                    "none",
                    {"{{pool}}": f"count by (pool) ({pool})"},
                    stacked=True,
                ),
                Panel(
                    "Not ready",
                    "none",
                    {"nodes": f"count(kube_node_info) - sum({ready})"},
                ),
                Panel(
                    "Spot nodes",
                    "none",
                    {
                        "there": f"count({spot})",
                        "scaled down within five minutes": f"count({gone} and on (node) {marked}) or vector(0)",
                        "taken away within five minutes": f"count({gone} unless on (node) {marked}) or vector(0)",
                    },
                    description="Taken away: the autoscaler had not marked it, or AKS drained it for Azure.",
                ),
                Panel(
                    "Memory in use",
                    "percentunit",
                    {"{{instance}}": "1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes"},
                    limits=(0, 1),
                ),
                Panel(
                    "CPU in use",
                    "percentunit",
                    {"{{instance}}": f'1 - avg by (instance) (rate(node_cpu_seconds_total{{mode="idle"}}[{RATE}]))'},
                    limits=(0, 1),
                ),
                Panel(
                    "Root disk in use",
                    "percentunit",
                    {
                        "{{instance}}": '1 - node_filesystem_avail_bytes{mountpoint="/"} '
                        '/ node_filesystem_size_bytes{mountpoint="/"}'
                    },
                    limits=(0, 1),
                    description="Images, base models, checkpoints.",
                ),
            ],
            "Pods": [
                Panel(
                    "By phase",
                    "none",
                    {"{{namespace}} {{phase}}": f"sum by (namespace, phase) (kube_pod_status_phase{{{_OURS}}}) > 0"},
                    stacked=True,
                ),
                Panel(
                    "Restarts in an hour",
                    "none",
                    {
                        "{{pod}} {{container}}": "round(sum by (pod, container) "
                        f"(increase(kube_pod_container_status_restarts_total{{{_OURS}}}[1h]))) > 0"
                    },
                ),
                Panel(
                    "Memory",
                    "bytes",
                    {
                        "{{pod}} {{container}}": "sum by (pod, container) "
                        f'(container_memory_working_set_bytes{{{_OURS},container!=""}})'
                    },
                ),
            ],
        },
    )


def write(out: Path, boards: dict[str, dict[str, Any]]) -> list[Path]:
    """A file each, `out/NAME.json`."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.json" for name in boards]
    for file, board in zip(files, boards.values(), strict=True):
        file.write_text(json.dumps(board, indent=2) + "\n", encoding="utf-8")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m workloads.dashboards",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go, NAME.json each")
    parser.add_argument(
        "--usd-per-hour", type=float, metavar="USD", help="of a tuning Job's nodes: what a run has cost is shown then"
    )
    return cli.run(_write, parser.parse_args(arguments), failures=(OSError,))


def _write(arguments: argparse.Namespace) -> int:
    for file in write(arguments.out, dashboards(arguments.usd_per_hour)):
        print(file)
    return exits.OK


if __name__ == "__main__":
    sys.exit(main())
