"""Agent pools that grow and shrink: the autoscaler between the real scheduler and the stand-in for Azure, on KWOK's nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from localcloud.api import Api
from localcloud.autoscaler import Autoscaler
from localcloud.azure.world import World
from localcloud.control_plane import ControlPlane
from localcloud.nodes import index_of
from localcloud.pods import finish, wait_for
from localcloud.tools import Tools
from tests.engine.objects import container, deployment, job, namespace, pod_template
from tests.stack.azure_engine import GROUP, Engine

PLACE = "team"
PODS = f"/api/v1/namespaces/{PLACE}/pods"
IN_GROUP = {"resourceGroupName": "g", "location": "westeurope"}
NETWORK = IN_GROUP | {"virtualNetworkName": "vnet", "subnets": [{"name": "nodes", "addressPrefix": "10.64.0.0/21"}]}
SYSTEM = {
    "name": "system", "mode": "System", "vmSize": "Standard_D4ds_v5", "enableAutoScaling": True, "count": 1,
    "minCount": 1, "maxCount": 2, "nodeTaints": ["CriticalAddonsOnly=true:NoSchedule"],
    "vnetSubnetID": f"{GROUP}/providers/Microsoft.Network/virtualNetworks/vnet/subnets/nodes",
}  # fmt: skip
CLUSTER = IN_GROUP | {
    "resourceName": "aks", "dnsPrefix": "d", "kubernetesVersion": "1.35", "agentPoolProfiles": [SYSTEM],
}  # fmt: skip
APPS = {
    "resourceGroupName": "g", "resourceName": "aks", "agentPoolName": "apps", "vmSize": "Standard_D4ds_v5",
    "enableAutoScaling": True, "count": 1, "minCount": 1, "maxCount": 3, "orchestratorVersion": "1.35",
    "nodeLabels": {"drydock/pool": "apps"},
}  # fmt: skip
GPU = APPS | {
    "agentPoolName": "a100", "vmSize": "Standard_NC24ads_A100_v4", "count": 0, "minCount": 0, "maxCount": 2,
    "nodeLabels": {"drydock/pool": "a100"}, "nodeTaints": ["sku=gpu:NoSchedule"],
}  # fmt: skip
ONE_GPU = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
ON_GPU: dict[str, Any] = {
    "nodeSelector": {"drydock/pool": "a100"},
    "tolerations": [{"key": "sku", "value": "gpu", "effect": "NoSchedule"}],
}
IDLE_SECONDS = 2.0
FAR_SECONDS = 20.0


@pytest.fixture
def plane(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    folder = tmp_path_factory.mktemp("plane")
    with ControlPlane(folder, tools, complete_jobs=False, autoscaler=True) as plane:
        yield plane


@pytest.fixture
def azure(plane: ControlPlane) -> Engine:
    engine = Engine(plane.folder)
    engine.make("resources:ResourceGroup", {"resourceGroupName": "g", "location": "westeurope"})
    engine.make("network:VirtualNetwork", NETWORK)
    engine.make("containerservice:ManagedCluster", CLUSTER)
    engine.make("containerservice:AgentPool", APPS)
    engine.make("containerservice:AgentPool", GPU)
    return engine


@pytest.fixture
def api(plane: ControlPlane, azure: Engine) -> Iterator[Api]:
    with plane.client() as api, plane.client() as own:
        api.apply(namespace(PLACE))
        wait_for(api, f"/api/v1/namespaces/{PLACE}/serviceaccounts", lambda found: found["items"])
        with Autoscaler(own, World(azure.world), seconds=0.3, idle_seconds=IDLE_SECONDS):
            yield api


def pool_id(name: str) -> str:
    return f"{GROUP}/providers/Microsoft.ContainerService/managedClusters/aks/agentPools/{name}"


def indices(nodes: dict[str, Any], pool: str) -> list[int]:
    return sorted(index_of(node) for node in nodes["items"] if node["metadata"]["labels"]["agentpool"] == pool)


def grown(api: Api, pool: str, expected: list[int]) -> None:
    """Waits until the pool has exactly these nodes."""
    wait_for(api, "/api/v1/nodes", lambda found: indices(found, pool) == expected, FAR_SECONDS)


def all_run(api: Api, app: str, count: int) -> None:
    def running(found: dict[str, Any]) -> bool:
        phases = [item["status"]["phase"] for item in found["items"] if item["metadata"]["labels"]["app"] == app]
        return phases == ["Running"] * count

    wait_for(api, PODS, running, FAR_SECONDS)


def workload(api: Api, name: str, replicas: int, resources: dict[str, Any], **spec: Any) -> None:
    api.apply(deployment(name, PLACE, replicas, pod_template({"app": name}, [container("main", **resources)], **spec)))


def delete(api: Api, name: str) -> None:
    api.delete(f"/apis/apps/v1/namespaces/{PLACE}/deployments/{name}")


def test_pools_begin_with_their_count_grow_for_pods_and_shrink_again(api: Api) -> None:
    assert {pool: indices(api.get("/api/v1/nodes"), pool) for pool in ("system", "apps", "a100")} == {
        "system": [0], "apps": [0], "a100": [],
    }  # fmt: skip
    workload(api, "engine", 2, ONE_GPU, **ON_GPU)
    all_run(api, "engine", 2)
    grown(api, "a100", [0, 1])
    said = [item for item in api.list(f"/api/v1/namespaces/{PLACE}/events") if item["reason"] == "TriggeredScaleUp"]
    names = {item["metadata"]["name"] for item in api.list(PODS)}
    assert {item["involvedObject"]["name"] for item in said} == names and len(said) == 2
    (group,) = {node["metadata"]["name"][:-6] for node in api.list("/api/v1/nodes", labelSelector="agentpool=a100")}
    steps = ("0->2",), ("0->1", "1->2")  # the second pod may have come later
    assert {item["message"] for item in said} in [
        {f"pod triggered scale-up: [{{{group} {step} (max: 2)}}]" for step in each} for each in steps
    ]
    assert {item["source"]["component"] for item in said} == {"cluster-autoscaler"}
    delete(api, "engine")
    grown(api, "a100", [])
    assert indices(api.get("/api/v1/nodes"), "apps") == [0]


def test_pods_get_as_many_nodes_as_they_need_and_the_pool_may_have(api: Api) -> None:
    half = {"resources": {"requests": {"cpu": "1800m"}}}  # of a node's 3860m
    workload(api, "web", 4, half)
    all_run(api, "web", 4)
    grown(api, "apps", [0, 1])
    workload(api, "web", 9, half)  # six fit on three nodes

    def six_run(found: dict[str, Any]) -> bool:
        return sorted(item["status"]["phase"] for item in found["items"]) == ["Pending"] * 3 + ["Running"] * 6

    wait_for(api, PODS, six_run, FAR_SECONDS)
    assert indices(api.get("/api/v1/nodes"), "apps") == [0, 1, 2]
    assert indices(api.get("/api/v1/nodes"), "a100") == []  # its taint keeps them away
    api.delete(f"/api/v1/nodes/{next(node for node in names(api, 'apps') if node.endswith('1'))}")
    grown(api, "apps", [0, 1, 2])  # the lowest index that is free


def names(api: Api, pool: str) -> list[str]:
    return [node["metadata"]["name"] for node in api.list("/api/v1/nodes", labelSelector=f"agentpool={pool}")]


def test_pods_that_may_not_be_together_get_a_node_each(api: Api) -> None:
    selector = {"matchLabels": {"app": "router"}}
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": selector, "matchLabelKeys": ["pod-template-hash"]}
    apart = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    workload(api, "router", 2, {}, affinity=apart)
    all_run(api, "router", 2)
    assert indices(api.get("/api/v1/nodes"), "apps") == [0, 1]


def test_a_node_with_finished_pods_and_those_of_daemon_sets_is_idle_and_one_with_work_is_not(api: Api) -> None:
    everywhere = pod_template({"app": "agent"}, tolerations=[{"operator": "Exists"}])
    api.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": "agent", "namespace": PLACE},
            "spec": {"selector": {"matchLabels": {"app": "agent"}}, "template": everywhere},
        }
    )
    for name in ("tune", "long"):
        api.apply(job(name, PLACE, pod_template({"app": name}, [container("main", **ONE_GPU)], **ON_GPU)))
        all_run(api, name, 1)
    grown(api, "a100", [0, 1])
    all_run(api, "agent", 4)
    ran = {item["metadata"]["labels"]["app"]: item for item in api.list(PODS)}
    finish(api, PLACE, ran["tune"]["metadata"]["name"], {})
    stays = ran["long"]["spec"]["nodeName"]
    wait_for(api, "/api/v1/nodes", lambda found: len(indices(found, "a100")) == 1, FAR_SECONDS)
    assert names(api, "a100") == [stays]
    with pytest.raises(TimeoutError):
        wait_for(api, f"/api/v1/nodes/{stays}", lambda found: not found, 2 * IDLE_SECONDS)
    assert api.get(f"/apis/batch/v1/namespaces/{PLACE}/jobs/tune")["status"]["succeeded"] == 1


def test_a_changed_pool_keeps_its_nodes_and_a_deleted_one_none(api: Api, azure: Engine) -> None:
    workload(api, "engine", 2, ONE_GPU, **ON_GPU)
    all_run(api, "engine", 2)
    token = "containerservice:AgentPool"
    labelled = GPU | {"nodeLabels": {"drydock/pool": "a100", "tier": "batch"}}
    azure.update(token, pool_id("a100"), labelled)
    nodes = api.list("/api/v1/nodes", labelSelector="agentpool=a100")
    assert [node["metadata"]["labels"].get("tier") for node in nodes] == ["batch", "batch"]
    assert sorted(item["status"]["phase"] for item in api.list(PODS)) == ["Running", "Running"]
    azure.update(token, pool_id("a100"), labelled | {"maxCount": 1})
    assert indices(api.get("/api/v1/nodes"), "a100") == [0]

    def one_runs(found: dict[str, Any]) -> bool:
        return sorted(item["status"]["phase"] for item in found["items"]) == ["Pending", "Running"]

    wait_for(api, PODS, one_runs, FAR_SECONDS)
    assert indices(api.get("/api/v1/nodes"), "a100") == [0]
    azure.delete(token, pool_id("a100"))
    with pytest.raises(TimeoutError):
        wait_for(api, "/api/v1/nodes", lambda found: indices(found, "a100"), 2)


def test_a_pod_that_fits_nowhere_gets_no_node(api: Api) -> None:
    workload(api, "huge", 1, {"resources": {"requests": {"cpu": "5"}}})
    workload(api, "lost", 1, {}, nodeSelector={"drydock/pool": "none"})
    with pytest.raises(TimeoutError):
        wait_for(api, "/api/v1/nodes", lambda found: len(found["items"]) > 2, 3)
    assert not [item for item in api.list(f"/api/v1/namespaces/{PLACE}/events") if item["reason"] == "TriggeredScaleUp"]
