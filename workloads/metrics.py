"""What the cluster's managed Prometheus (pods `ama-metrics`) reads from our pods, and under which labels.

Pods say by annotations where their metrics are (`scraped`), which leaves room for one port a pod. A second one (the
adapter sidecar in the engine's pod, HAProxy in the router's) is found by the name of its port; so are the GPUs', whose
node must be known. Both ways give the labels of the pod, `kubernetes_namespace` and `kubernetes_pod_name`; ports found
by name also give `node`. There is no label `namespace` (podannotationsDefault.yml of Azure/prometheus-collector):
queries say `kubernetes_namespace`. On a GPU's metrics, `namespace` and `pod` are those of the pod that has the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import yaml
from pulumi_kubernetes import core, meta

NAMESPACE_LABEL = "kubernetes_namespace"
SIDECAR_PORT, FRONT_PORT, GPU_PORT = PORTS = ("sidecar-metrics", "front-metrics", "gpu-metrics")
"""Names of ports; at most 15 characters."""
KEPT = ("kube_job_status_failed",)
"""Metrics of kube-state-metrics that alerts need beyond those that the add-on's minimal ingestion profile keeps."""
FRONT_KEPT = (
    "haproxy_backend_client_aborts_total",
    "haproxy_backend_connection_errors_total",
    "haproxy_backend_response_errors_total",
    "haproxy_backend_retry_warnings_total",
    "haproxy_frontend_current_sessions",
    "haproxy_frontend_http_responses_total",
    "haproxy_frontend_limit_sessions",
    "haproxy_frontend_request_errors_total",
)
"""Of HAProxy's 184 metrics those that dashboards and alerts ask."""
INTERVAL = "15s"  # the default of 30 s is as long as a queue takes to fill


def scraped(port: int) -> dict[str, str]:
    """Annotations of a pod whose metrics are at `port`."""
    return {"prometheus.io/scrape": "true", "prometheus.io/path": "/metrics", "prometheus.io/port": str(port)}


def settings_data(namespaces: tuple[str, ...]) -> dict[str, str]:
    """`ama-metrics-settings-configmap`: sections that are left out keep their defaults, such as the kubelet's."""
    return {
        "schema-version": "v1",
        "config-version": "drydock",
        "pod-annotation-based-scraping": f'podannotationnamespaceregex = "{"|".join(namespaces)}"',
        "default-targets-scrape-interval-settings": f'podannotations = "{INTERVAL}"',
        "default-targets-metrics-keep-list": f'kubestate = "{"|".join(KEPT)}"',
    }


def scrape_config(namespaces: tuple[str, ...]) -> str:
    """`ama-metrics-prometheus-config`, Prometheus's own format: ports by their name."""
    meta_label = "__meta_kubernetes_"
    job = {
        "job_name": "drydock-ports",
        "scrape_interval": INTERVAL,
        "kubernetes_sd_configs": [{"role": "pod", "namespaces": {"names": list(namespaces)}}],
        "relabel_configs": [
            {"source_labels": [f"{meta_label}pod_container_port_name"], "action": "keep", "regex": "|".join(PORTS)},
            {"action": "labelmap", "regex": f"{meta_label}pod_label_(.+)"},
            {"source_labels": [f"{meta_label}namespace"], "target_label": NAMESPACE_LABEL},
            {"source_labels": [f"{meta_label}pod_name"], "target_label": "kubernetes_pod_name"},
            {"source_labels": [f"{meta_label}pod_node_name"], "target_label": "node"},
        ],
        "metric_relabel_configs": [
            {
                "source_labels": ["__name__"],
                "action": "keep",
                "regex": "|".join(("drydock_.+", "DCGM_.+", *FRONT_KEPT)),
            }
        ],
    }
    return yaml.safe_dump({"scrape_configs": [job]}, sort_keys=False)


@dataclass(frozen=True)
class MetricsArgs:
    """The namespaces whose pods are read."""

    namespaces: tuple[str, ...]


class Metrics(pulumi.ComponentResource):
    """The two ConfigMaps that the add-on looks for in kube-system; a cluster has one of each."""

    def __init__(self, name: str, args: MetricsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Metrics", name, None, opts)
        data = {
            "ama-metrics-settings-configmap": settings_data(args.namespaces),
            "ama-metrics-prometheus-config": {"prometheus-config": scrape_config(args.namespaces)},
        }
        for title, content in data.items():
            core.v1.ConfigMap(
                f"{name}-{title}",
                metadata=meta.v1.ObjectMetaArgs(name=title, namespace="kube-system"),
                data=content,
                opts=pulumi.ResourceOptions(parent=self),
            )
        self.register_outputs({})
