"""Small Kubernetes objects for tests, as the API server takes them in a namespace under the restricted standard."""

from __future__ import annotations

from typing import Any

IMAGE = "example.com/none@sha256:" + "0" * 64


def container(name: str, **more: Any) -> dict[str, Any]:
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {"name": name, "image": IMAGE, "securityContext": security, **more}


def pod_template(labels: dict[str, str], containers: list[dict[str, Any]] | None = None, **spec: Any) -> dict[str, Any]:
    security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    wanted = {"securityContext": security, "containers": containers or [container("main")], **spec}
    return {"metadata": {"labels": labels}, "spec": wanted}


def namespace(name: str) -> dict[str, Any]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def deployment(name: str, place: str, replicas: int, template: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": place},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": template["metadata"]["labels"]},
            "template": template,
        },
    }


def job(name: str, place: str, template: dict[str, Any], **spec: Any) -> dict[str, Any]:
    wanted = {"template": {**template, "spec": {**template["spec"], "restartPolicy": "Never"}}, **spec}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": place},
        "spec": wanted,
    }
