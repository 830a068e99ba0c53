"""Agent pools as Azure gets them: labels and taints to the letter, bounds, and names that follow what cannot change."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pulumi
import pytest

from infra.pools import GPU_TAINT, POOL_LABEL, SPOT_TAINT, Pools, PoolsArgs, Taint, gpu_labels, gpu_taints
from infra.settings import Cluster as ClusterSettings
from infra.settings import GpuPool
from tests.unit.pulumi_mocks import Recorder, place
from tests.unit.registrations import Request, deploy_with_requests, orphans

A100 = "Standard_NC24ads_A100_v4"
SUBNET = "/subscriptions/0/subnets/nodes"
SPOT_KEY = "kubernetes.azure.com/scalesetpriority"


def made(pools: dict[str, GpuPool], **settings: Any) -> tuple[Recorder, dict[tuple[str, str], Request], dict[str, str]]:
    names: dict[str, str] = {}

    def program() -> None:
        # A bare cluster: the component has tests of its own, and the SDK's class takes long for its 250 aliases.
        resource = pulumi.CustomResource("azure-native:containerservice:ManagedCluster", "cluster", {})
        cluster = cast(Any, SimpleNamespace(resource=resource, name="aks"))
        found = Pools("pools", PoolsArgs(place(), cluster, SUBNET, ClusterSettings(**settings), pools))
        for key, name in found.names.items():
            name.apply(lambda known, key=key: names.update({key: known}))  # type: ignore[misc]

    seen, requests = deploy_with_requests(program)
    return seen, requests, names


@cache
def sent(cluster_zones: tuple[str, ...] = (), **pool: Any) -> dict[str, Any]:
    """The inputs of the agent pool of one GPU pool."""
    seen, _, _ = made({"gpu": GpuPool(**{"vm_size": A100, **pool})}, zones=cluster_zones)
    inputs: dict[str, Any] = seen.one(":AgentPool", "pools-gpu").inputs
    return inputs


def test_labels_and_taints_to_the_letter() -> None:
    plain, spot = GpuPool(vm_size=A100), GpuPool(vm_size=A100, spot=True)
    assert POOL_LABEL == "drydock/pool"
    assert gpu_labels("a100", plain) == {"drydock/pool": "a100"}
    assert gpu_labels("a100", spot) == {"drydock/pool": "a100", SPOT_KEY: "spot"}
    assert [str(taint) for taint in gpu_taints(plain)] == ["sku=gpu:NoSchedule"]
    assert [str(taint) for taint in gpu_taints(spot)] == ["sku=gpu:NoSchedule", f"{SPOT_KEY}=spot:NoSchedule"]
    assert Taint("sku", "gpu", "NoSchedule") == GPU_TAINT
    assert Taint(SPOT_KEY, "spot", "NoSchedule") == SPOT_TAINT


def test_a_gpu_pool_scales_from_nothing() -> None:
    pool = sent(max_nodes=4)
    assert (pool["enableAutoScaling"], pool["minCount"], pool["maxCount"], pool["count"]) == (True, 0, 4, 0)
    assert pool["mode"] == "User"
    assert pool["nodeTaints"] == ["sku=gpu:NoSchedule"]
    assert pool["nodeLabels"] == {"drydock/pool": "gpu"}
    assert pool["gpuProfile"] == {"driver": "Install"}
    assert pool["resourceName"] == "aks"
    assert pool["vnetSubnetID"] == SUBNET
    assert (pool["vmSize"], pool["osDiskSizeGB"], pool["orchestratorVersion"]) == (A100, 256, "1.35")


def test_a_gpu_pool_that_keeps_nodes_starts_with_them() -> None:
    pool = sent(min_nodes=2, max_nodes=3)
    assert (pool["minCount"], pool["maxCount"], pool["count"]) == (2, 3, 2)


def test_gpu_nodes_are_upgraded_without_further_quota() -> None:
    assert sent()["upgradeSettings"] == {"maxSurge": "0", "maxUnavailable": "1"}


def test_a_spot_pool_declares_what_aks_adds() -> None:
    pool, plain = sent(spot=True), sent()
    assert (pool["scaleSetPriority"], pool["scaleSetEvictionPolicy"], pool["spotMaxPrice"]) == ("Spot", "Delete", -1)
    assert pool["nodeLabels"][SPOT_KEY] == "spot"
    assert pool["nodeTaints"] == ["sku=gpu:NoSchedule", f"{SPOT_KEY}=spot:NoSchedule"]
    assert "upgradeSettings" not in pool  # "Spot pools can't set max surge"
    assert not {"scaleSetPriority", "scaleSetEvictionPolicy", "spotMaxPrice"} & set(plain)


@pytest.mark.parametrize(
    ("vm_size", "expected"),
    [
        (A100, {"enableVTPM": True, "enableSecureBoot": False}),
        ("Standard_ND96asr_v4", None),
        ("Standard_ND96amsr_A100_v4", None),
        ("Standard_NCC40ads_H100_v5", None),
    ],
)
def test_trusted_launch_only_where_the_size_has_it(vm_size: str, expected: dict[str, bool] | None) -> None:
    assert sent(vm_size=vm_size).get("securityProfile") == expected


def test_zones_of_the_pool_go_before_the_clusters() -> None:
    assert "availabilityZones" not in sent()
    assert sent(cluster_zones=("1", "2"))["availabilityZones"] == ["1", "2"]
    assert sent(cluster_zones=("1", "2"), zones=("3",))["availabilityZones"] == ["3"]
    assert "availabilityZones" not in sent(cluster_zones=("1", "2"), zones=())


@pytest.mark.parametrize(
    "change", [{"vm_size": "Standard_NC48ads_A100_v4"}, {"spot": True}, {"zones": ("2",)}, {"os_disk_gib": 512}]
)
def test_what_cannot_change_in_place_makes_a_pool_of_another_name(change: dict[str, Any]) -> None:
    before, after = sent()["agentPoolName"], sent(**change)["agentPoolName"]
    assert before != after
    assert before[:-4] == after[:-4] == "gpu"


@pytest.mark.parametrize("change", [{"max_nodes": 9}, {"min_nodes": 1}])
def test_what_can_change_in_place_keeps_the_name(change: dict[str, Any]) -> None:
    assert sent()["agentPoolName"] == sent(**change)["agentPoolName"]


def test_the_apps_pool_takes_everyone() -> None:
    seen, _, names = made({}, apps_max_nodes=5, apps_vm_size="Standard_D8ds_v5", kubernetes_version="1.36")
    pool = seen.one(":AgentPool").inputs
    assert pool["agentPoolName"] == names["apps"]
    assert (pool["enableAutoScaling"], pool["minCount"], pool["maxCount"], pool["count"]) == (True, 1, 5, 1)
    assert pool["nodeLabels"] == {"drydock/pool": "apps"} and "nodeTaints" not in pool
    assert (pool["vmSize"], pool["orchestratorVersion"]) == ("Standard_D8ds_v5", "1.36")
    assert pool["upgradeSettings"] == {"maxSurge": "33%"}


def test_karpenter_makes_the_gpu_nodes_where_it_provisions() -> None:
    seen, _, names = made({"gpu": GpuPool(vm_size=A100)}, provisioning="automatic")
    assert [item.name for item in seen.of(":AgentPool")] == ["pools-apps"]
    assert set(names) == {"apps"}


def test_options() -> None:
    seen, requests, names = made({"a": GpuPool(vm_size=A100), "b": GpuPool(vm_size=A100, spot=True)})
    assert names == {item.name.removeprefix("pools-"): item.inputs["agentPoolName"] for item in seen.of(":AgentPool")}
    assert set(names) == {"apps", "a", "b"}
    for name in ("pools-apps", "pools-a", "pools-b"):
        request = requests["AgentPool", name]
        assert list(request.ignoreChanges) == ["count"]  # the autoscaler's
        assert request.deleteBeforeReplaceDefined and not request.deleteBeforeReplace  # the provider would
        assert any(urn.endswith("ManagedCluster::cluster") for urn in request.dependencies)
        assert not request.protect
        assert request.deletedWith.endswith("ManagedCluster::cluster")  # else `destroy` drains what budgets hold
    of_pools = {key: request for key, request in requests.items() if key[1].startswith("pools")}
    assert orphans(of_pools, "Pools") == []
