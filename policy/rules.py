"""What no environment may do, as pure functions: a resource's type and properties in, violations with remedies out.

Properties have the names that Azure and Kubernetes know (camelCase). Unknown values of a preview are absent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Props = Mapping[str, Any]
Rule = Callable[[str, Props], Iterator[str]]

GPU_SIZE = re.compile(r"^Standard_N[CDVG]", re.IGNORECASE)
GPU_TAINT = "sku=gpu:NoSchedule"
SPOT_TAINT = "kubernetes.azure.com/scalesetpriority=spot:NoSchedule"
MOST_GPU_NODES = 16
REQUIRED_TAGS = ("project", "environment", "owner")
TAGGED = (
    "AgentPool", "AzureMonitorWorkspace", "Dashboard", "DataCollectionEndpoint", "DataCollectionRule", "Grafana",
    "ManagedCluster", "NatGateway", "PrivateEndpoint", "PrometheusRuleGroup", "PublicIPAddress", "Registry",
    "ResourceGroup", "StorageAccount", "UserAssignedIdentity", "VirtualNetwork",
)  # fmt: skip
POD_OWNERS = ("CronJob", "DaemonSet", "Deployment", "Job", "Pod", "ReplicaSet", "StatefulSet")
BY_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
INTERNAL = "service.beta.kubernetes.io/azure-load-balancer-internal"


def gpu_pools_are_bounded(kind: str, props: Props) -> Iterator[str]:
    """GPU nodes cost from one to a hundred dollars an hour: they keep other pods off, and scale between bounds."""
    if not _is(kind, "azure-native", "AgentPool") or not GPU_SIZE.match(str(props.get("vmSize", ""))):
        return
    taints = props.get("nodeTaints") or []
    if GPU_TAINT not in taints:
        yield f"pods without a GPU would land on this pool: add the taint {GPU_TAINT}"
    if props.get("scaleSetPriority") == "Spot" and SPOT_TAINT not in taints:
        yield f"AKS taints spot nodes by itself, and the next update would differ: declare {SPOT_TAINT}"
    if props.get("enableAutoScaling") is not True:
        yield "the pool has a fixed size, paid day and night: set enableAutoScaling with minCount and maxCount"
    most = props.get("maxCount")
    if most is None or most > MOST_GPU_NODES:
        nodes = most if most is None else int(most)  # the engine hands numbers over as floats
        yield f"maxCount is {nodes}, more than {MOST_GPU_NODES} or unbounded: lower pools.NAME.max_nodes"


def storage_is_private(kind: str, props: Props) -> Iterator[str]:
    """Datasets and weights are read by Entra identity, never by a key or by everyone."""
    if _is(kind, "azure-native", "StorageAccount"):
        if props.get("allowSharedKeyAccess") is not False:
            yield "whoever has the account key reads everything: set allowSharedKeyAccess to false"
        if props.get("allowBlobPublicAccess") is not False:
            yield "containers could be opened to everyone: set allowBlobPublicAccess to false"
    if _is(kind, "azure-native", "BlobContainer") and props.get("publicAccess") not in (None, "None"):
        yield f"publicAccess is {props['publicAccess']}: set it to None"


def registry_is_private(kind: str, props: Props) -> Iterator[str]:
    """Images and adapters are pulled and pushed by Entra identity alone."""
    if _is(kind, "azure-native", "Registry") and "containerregistry" in kind:
        if props.get("adminUserEnabled") is True:
            yield "the admin user is a shared password: set adminUserEnabled to false"
        if props.get("anonymousPullEnabled") is True:
            yield "everyone could pull images and adapters: set anonymousPullEnabled to false"


def cluster_is_guarded(kind: str, props: Props) -> Iterator[str]:
    """Only Entra identities sign in, and only from where you said."""
    if not _is(kind, "azure-native", "ManagedCluster"):
        return
    if props.get("disableLocalAccounts") is not True:
        yield "the cluster has an admin certificate that no one can revoke: set disableLocalAccounts to true"
    access = props.get("apiServerAccessProfile") or {}
    ranges = access.get("authorizedIPRanges") or []
    if access.get("enablePrivateCluster") is not True and not ranges:
        yield "the whole internet reaches the API server: set network.private, or network.authorized_ip_ranges"
    if any(item.endswith("/0") for item in ranges):
        yield "authorizedIPRanges contains the whole internet: name your own ranges"


def images_are_pinned(kind: str, props: Props) -> Iterator[str]:
    """A tag can be moved; what was tested is named by its digest."""
    for container in _containers(kind, props):
        image = container.get("image")
        if image is not None and not BY_DIGEST.search(image):
            yield f"container {container.get('name')}: image {image} is not named by digest (…@sha256:…)"


def containers_are_limited(kind: str, props: Props) -> Iterator[str]:
    """A container without limits takes the memory of its neighbours."""
    for container in _containers(kind, props):
        limits = (container.get("resources") or {}).get("limits") or {}
        missing = [name for name in ("cpu", "memory") if name not in limits]
        if missing:
            yield f"container {container.get('name')}: set resources.limits for {' and '.join(missing)}"


def services_are_internal(kind: str, props: Props) -> Iterator[str]:
    """No model is put on the internet by a Service: that takes a gateway with its own sign-in."""
    if _is(kind, "kubernetes", "Service") and (props.get("spec") or {}).get("type") == "LoadBalancer":
        annotations = (props.get("metadata") or {}).get("annotations") or {}
        if annotations.get(INTERNAL) != "true":
            yield f"the load balancer would get a public address: set the annotation {INTERNAL} to true"


def tags_are_there(kind: str, props: Props) -> Iterator[str]:
    """Who pays and who answers must be known of everything."""
    if kind.startswith("azure-native:") and kind.rpartition(":")[2] in TAGGED:
        missing = [tag for tag in REQUIRED_TAGS if tag not in (props.get("tags") or {})]
        if missing:
            yield f"lacks the tags {', '.join(missing)}: infra/tags.py sets them for everything"


RULES: dict[str, Rule] = {
    "gpu-pools-are-bounded": gpu_pools_are_bounded,
    "storage-is-private": storage_is_private,
    "registry-is-private": registry_is_private,
    "cluster-is-guarded": cluster_is_guarded,
    "images-are-pinned": images_are_pinned,
    "containers-are-limited": containers_are_limited,
    "services-are-internal": services_are_internal,
    "tags-are-there": tags_are_there,
}


def violations(kind: str, props: Props) -> dict[str, list[str]]:
    """What each rule says of one resource; rules without a word are absent."""
    found = {name: list(rule(kind, props)) for name, rule in RULES.items()}
    return {name: said for name, said in found.items() if said}


def _is(kind: str, package: str, name: str) -> bool:
    return kind.startswith(f"{package}:") and kind.rpartition(":")[2] == name


def _containers(kind: str, props: Props) -> Iterator[Props]:
    """Every container of a pod or of what makes pods, init containers included."""
    name = kind.rpartition(":")[2]
    if not kind.startswith("kubernetes:") or name not in POD_OWNERS:
        return
    spec: Any = props.get("spec") or {}
    if name == "CronJob":
        spec = (spec.get("jobTemplate") or {}).get("spec") or {}
    if name != "Pod":
        spec = (spec.get("template") or {}).get("spec") or {}
    for field in ("initContainers", "containers", "ephemeralContainers"):
        yield from spec.get(field) or []
