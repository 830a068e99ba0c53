"""The device plugin runs on every GPU node that we have, and provisioned nodes are like those of the agent pools."""

from __future__ import annotations

from typing import Any

from infra.pools import POOL_LABEL, gpu_labels, gpu_taints
from infra.settings import GpuPool
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, deploy
from workloads.gpu import DevicePlugin, DevicePluginArgs
from workloads.provisioning import NodeProvisioning, NodeProvisioningArgs, node_pool

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


def test_device_plugin_reaches_every_gpu_node():
    spec = plugin()["spec"]["template"]["spec"]
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
