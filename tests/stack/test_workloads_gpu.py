"""Device plugin and GPU metrics are on every GPU node that we have; provisioned nodes are like those of the agent pools."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from infra.pools import POOL_LABEL, gpu_labels, gpu_taints
from infra.settings import GpuPool
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, deploy
from workloads.gpu import DevicePlugin, DevicePluginArgs
from workloads.gpu_metrics import COUNTERS, GpuMetrics, GpuMetricsArgs, counters_file
from workloads.provisioning import NodeProvisioning, NodeProvisioningArgs, node_pool
from workloads.render import declared, stack_config

SPOT = GpuPool(vm_size="Standard_NC4as_T4_v3", spot=True, max_nodes=2)
TWO_GPUS = GpuPool(
    vm_size="Standard_NC24ads_A100_v4", alternatives=("Standard_NC80adis_H100_v5",), max_nodes=3, zones=("2",)
)


def plugin() -> dict[str, Any]:
    def program() -> None:
        DevicePlugin("gpu", DevicePluginArgs(namespace="drydock-gpu", cache="reg.azurecr.io/cache", pools=["a", "b"]))

    return deploy(program).one(":DaemonSet").inputs


def test_device_plugin_is_a_valid_object_as_nvidia_publishes_it():
    made = plugin()
    assert problems(made) == []
    assert made["metadata"]["namespace"] == "drydock-gpu"
    spec = made["spec"]["template"]["spec"]
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["volumes"] == [
        {"name": "sockets", "hostPath": {"path": "/var/lib/kubelet/device-plugins", "type": "Directory"}}
    ]
    (container,) = spec["containers"]
    assert container["image"].startswith("reg.azurecr.io/cache/nvidia/k8s-device-plugin:v0.20.0@sha256:")
    assert len(container["image"].partition("@sha256:")[2]) == 64
    assert container["volumeMounts"] == [{"name": "sockets", "mountPath": "/var/lib/kubelet/device-plugins"}]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory", "ephemeral-storage"} == set(container["resources"]["limits"])
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False


@cache
def exporter() -> Recorder:
    args = GpuMetricsArgs(namespace="drydock-gpu", cache="reg.azurecr.io/cache", pools=["a", "b"])
    return deploy(lambda: GpuMetrics("gpu-metrics", args) and None)


def exporter_pod() -> dict[str, Any]:
    found: dict[str, Any] = exporter().one(":DaemonSet").inputs["spec"]["template"]["spec"]
    return found


def test_gpu_metrics_are_valid_objects() -> None:
    objects = [item.inputs for item in exporter().resources if item.type.startswith("kubernetes:")]
    assert sorted(item["kind"] for item in objects) == ["ConfigMap", "DaemonSet", "NetworkPolicy"]
    assert [said for item in objects for said in problems(item)] == []
    assert {item["metadata"]["namespace"] for item in objects} == {"drydock-gpu"}


def test_gpu_metrics_take_no_right_that_they_do_not_need() -> None:
    (container,) = exporter_pod()["containers"]
    assert container["image"].startswith("reg.azurecr.io/cache/nvidia/dcgm-exporter:4.5.3-4.8.2-distroless@sha256:")
    assert len(container["image"].partition("@sha256:")[2]) == 64
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    # The capability SYS_ADMIN is wanted by these alone.
    assert not [name for name, _ in COUNTERS if name.startswith("DCGM_FI_PROF_")]
    assert not {"hostNetwork", "hostPID", "priorityClassName"} & set(exporter_pod())
    assert exporter_pod()["automountServiceAccountToken"] is False
    assert set(container["resources"]["limits"]) == {"cpu", "memory", "ephemeral-storage"}, "no GPU is taken for it"
    volumes = {item["name"]: item for item in exporter_pod()["volumes"]}
    mounts = {item["name"]: item for item in container["volumeMounts"]}
    assert [name for name, item in volumes.items() if "hostPath" in item] == ["pod-resources"]
    assert volumes["pod-resources"]["hostPath"]["path"] == "/var/lib/kubelet/pod-resources"
    assert mounts["pod-resources"]["readOnly"] is True


def test_gpu_metrics_count_what_the_file_says_and_only_prometheus_reads_them() -> None:
    made = exporter().one(":ConfigMap").inputs
    (container,) = exporter_pod()["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    volumes = {item["name"]: item for item in exporter_pod()["volumes"]}
    mounts = {item["name"]: item["mountPath"] for item in container["volumeMounts"]}
    assert volumes["counters"]["configMap"]["name"] == made["metadata"]["name"]
    assert environment["DCGM_EXPORTER_COLLECTORS"] == f"{mounts['counters']}/counters.csv"
    assert environment["DCGM_EXPORTER_KUBERNETES"] == "true"
    rows = list(csv.reader(made["data"]["counters.csv"].splitlines(), skipinitialspace=True))
    assert [row[:2] for row in rows] == [[name, "gauge"] for name, _ in COUNTERS]
    assert {len(row) for row in rows} == {3}, "the exporter ends at a line with another comma"
    assert made["data"]["counters.csv"] == counters_file() and made["immutable"] is True
    policy = exporter().one(":NetworkPolicy").inputs["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= exporter_labels().items()
    (scrape,) = policy["ingress"]
    assert [int(item["port"]) for item in scrape["ports"]] == [container["ports"][0]["containerPort"]] == [9400]
    assert policy["egress"] == [] and "Egress" in policy["policyTypes"]


def exporter_labels() -> dict[str, str]:
    found: dict[str, str] = exporter().one(":DaemonSet").inputs["spec"]["template"]["metadata"]["labels"]
    return found


def test_gpu_metrics_can_be_left_out() -> None:
    repository = Path(__file__).parents[2]
    project, config, _ = stack_config(repository, "prod")
    made = {}
    for wanted in (True, False):
        config["drydock:cluster"] = {**config.get("drydock:cluster", {}), "gpu_metrics": wanted}
        objects = declared(repository, project, "prod", config)
        made[wanted] = {item["metadata"]["name"] for item in objects if item["kind"] == "DaemonSet"}
    assert made == {True: {"nvidia-device-plugin", "dcgm-exporter"}, False: {"nvidia-device-plugin"}}


@pytest.mark.parametrize("of", [lambda: plugin()["spec"]["template"]["spec"], exporter_pod], ids=["plugin", "metrics"])
def test_both_reach_every_gpu_node(of: Callable[[], dict[str, Any]]) -> None:
    spec = of()
    tolerated = {(item["key"], item["value"], item["effect"]) for item in spec["tolerations"]}
    for pool in (SPOT, TWO_GPUS):
        assert {(taint.key, taint.value, taint.effect) for taint in gpu_taints(pool)} <= tolerated
    (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": POOL_LABEL, "operator": "In", "values": ["a", "b"]}]


def provisioned() -> Recorder:
    def program() -> None:
        args = NodeProvisioningArgs(pools={"t4": SPOT, "big": TWO_GPUS}, zones=("1", "3"), location="swedencentral")
        NodeProvisioning("nodes", args)

    return deploy(program)


def requirements(spec: dict[str, Any]) -> dict[str, list[str]]:
    found = spec["template"]["spec"]["requirements"]
    assert all(item["operator"] == "In" for item in found)
    return {item["key"]: item["values"] for item in found}


def test_sizes_are_tried_in_the_order_of_the_settings():
    pools = {item.inputs["metadata"]["name"]: item.inputs for item in provisioned().of(":NodePool")}
    assert set(pools) == {"t4-0", "big-0", "big-1"}
    first, second = pools["big-0"]["spec"], pools["big-1"]["spec"]
    assert first["weight"] > second["weight"] >= 1
    assert requirements(first)["karpenter.azure.com/sku-name"] == ["Standard_NC24ads_A100_v4"]
    assert requirements(second)["karpenter.azure.com/sku-name"] == ["Standard_NC80adis_H100_v5"]
    assert first["limits"] == {"nvidia.com/gpu": "3"}  # three nodes with one
    assert second["limits"] == {"nvidia.com/gpu": "6"}  # three nodes with two
    assert {item["apiVersion"] for item in pools.values()} == {"karpenter.sh/v1"}


def test_provisioned_nodes_are_those_that_pods_look_for():
    spec = node_pool("t4", SPOT, SPOT.vm_size, [], weight=100)
    template = spec["template"]
    assert template["metadata"]["labels"].items() <= gpu_labels("t4", SPOT).items()
    assert template["metadata"]["labels"][POOL_LABEL] == "t4"
    assert [(taint["key"], taint["value"], taint["effect"]) for taint in template["spec"]["taints"]] == [
        (taint.key, taint.value, taint.effect) for taint in gpu_taints(SPOT)
    ]
    assert requirements(spec)["karpenter.sh/capacity-type"] == ["spot"]
    assert "topology.kubernetes.io/zone" not in requirements(spec)


def test_zones_are_the_pools_own_or_the_clusters():
    pools = {item.inputs["metadata"]["name"]: item.inputs["spec"] for item in provisioned().of(":NodePool")}
    assert requirements(pools["t4-0"])["topology.kubernetes.io/zone"] == ["swedencentral-1", "swedencentral-3"]
    assert requirements(pools["big-0"])["topology.kubernetes.io/zone"] == ["swedencentral-2"]
    assert requirements(pools["big-0"])["karpenter.sh/capacity-type"] == ["on-demand"]


def test_node_classes_are_there_under_the_name_that_pools_refer_to():
    made = provisioned()
    classes = {item.inputs["metadata"]["name"]: item.inputs for item in made.of(":AKSNodeClass")}
    assert set(classes) == {"t4", "big"}
    for item in made.of(":NodePool"):
        reference = item.inputs["spec"]["template"]["spec"]["nodeClassRef"]
        node_class = classes[reference["name"]]
        assert node_class["apiVersion"] == f"{reference['group']}/v1beta1"
        assert node_class["kind"] == reference["kind"]
    assert classes["t4"]["spec"] == {"imageFamily": "Ubuntu", "osDiskSizeGB": 256, "maxPods": 60}
