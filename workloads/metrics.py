"""What the cluster's managed Prometheus (pods `ama-metrics`) reads from our pods, and under which labels.

Pods say by annotations where their metrics are (`scraped`), which leaves room for one port a pod. The adapter sidecar,
a second one in the engine's pod, is found by the name of its port. Both ways give the same labels: those of the pod,
`kubernetes_namespace` and `kubernetes_pod_name`. There is no label `namespace` (podannotationsDefault.yml of
Azure/prometheus-collector): queries say `kubernetes_namespace`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import yaml
from pulumi_kubernetes import core, meta

NAMESPACE_LABEL = "kubernetes_namespace"
SIDECAR_PORT = "sidecar-metrics"  # at most 15 characters
KEPT = ("kube_job_status_failed",)
"""Metrics of kube-state-metrics that alerts need beyond those that the add-on's minimal ingestion profile keeps."""
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
    """`ama-metrics-prometheus-config`, Prometheus's own format: the sidecars' ports."""
    meta_label = "__meta_kubernetes_"
    job = {
        "job_name": "drydock-sidecar",
        "scrape_interval": INTERVAL,
        "kubernetes_sd_configs": [{"role": "pod", "namespaces": {"names": list(namespaces)}}],
        "relabel_configs": [
            {"source_labels": [f"{meta_label}pod_container_port_name"], "action": "keep", "regex": SIDECAR_PORT},
            {"action": "labelmap", "regex": f"{meta_label}pod_label_(.+)"},
            {"source_labels": [f"{meta_label}namespace"], "target_label": NAMESPACE_LABEL},
            {"source_labels": [f"{meta_label}pod_name"], "target_label": "kubernetes_pod_name"},
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
