"""The whole program with node auto-provisioning, on the real engine and a real API server with Karpenter's NodePool CRD.

Karpenter itself is not run: what it would act on is read back, and held against the pods that need its nodes.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from infra.catalog import sku
from localcloud.api import Api, ApiError
from localcloud.cloud import LocalCloud, Stack
from tests.engine.plans import SETTINGS, brought_up, preview, written

pytestmark = pytest.mark.timeout(900)

FIRST, SECOND = "Standard_NC24ads_A100_v4", "Standard_NC40ads_H100_v5"
POOLS, CLASSES = "/apis/karpenter.sh/v1/nodepools", "/apis/karpenter.azure.com/v1beta1/aksnodeclasses"


@pytest.fixture(scope="module")
def stack(cloud: LocalCloud) -> Stack:
    """The dev environment with Karpenter, and a size to fall back on, up."""
    return brought_up(cloud, lambda text: provisioned(text, FIRST, SECOND))


def provisioned(text: str, *sizes: str) -> str:
    """The settings `text` with nodes of these sizes by Karpenter, in this order."""
    whole = yaml.safe_load(text)
    whole["config"]["drydock:cluster"]["provisioning"] = "automatic"
    pool = whole["config"]["drydock:pools"]["a100"]
    pool |= {"vm_size": sizes[0], "alternatives": list(sizes[1:]), "spot": False}
    return yaml.safe_dump(whole)


def made(api: Api) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item["spec"] for item in api.list(POOLS)}


def pods(api: Api) -> dict[str, dict[str, Any]]:
    """The specs of our pods' templates with their annotations, by the name of what makes them."""
    found = {}
    for path in ("/apis/batch/v1/jobs", "/apis/apps/v1/deployments"):
        for item in api.list(path):
            if item["metadata"]["namespace"].startswith("drydock-"):
                template = item["spec"]["template"]
                notes = template["metadata"].get("annotations", {})
                found[item["metadata"]["name"]] = template["spec"] | {"annotations": notes}
    return found


def fits(pod: dict[str, Any], pool: dict[str, Any]) -> bool:
    """Whether Karpenter would make a node of `pool` for the pod: labels, taints, and the GPU that it asks for."""
    labels = pool["template"]["metadata"]["labels"]
    wanted = pod.get("nodeSelector", {})
    tolerated = {(each.get("key"), each.get("value"), each.get("effect")) for each in pod.get("tolerations", [])}
    taints = {(each["key"], each.get("value"), each["effect"]) for each in pool["template"]["spec"]["taints"]}
    return all(labels.get(key) == value for key, value in wanted.items()) and taints <= tolerated


def test_the_server_takes_pools_and_class_as_they_are_and_keeps_them(stack: Stack, api: Api) -> None:
    pools = made(api)
    assert set(pools) == {"a100-0", "a100-1"}
    (node_class,) = api.list(CLASSES)
    assert node_class["metadata"]["name"] == "a100"
    for spec in pools.values():
        assert spec["template"]["spec"]["nodeClassRef"]["name"] == "a100"
    assert preview(stack).changes == {}


def test_the_sizes_are_tried_in_the_order_of_the_settings(stack: Stack, api: Api) -> None:
    by_weight = sorted(made(api).values(), key=lambda spec: -spec["weight"])
    sizes = [
        requirement["values"]
        for spec in by_weight
        for requirement in spec["template"]["spec"]["requirements"]
        if requirement["key"] == "karpenter.azure.com/sku-name"
    ]
    assert sizes == [[FIRST], [SECOND]]
    assert [spec["limits"] for spec in by_weight] == [{"nvidia.com/gpu": str(2 * sku(name).gpus)} for name in (FIRST, SECOND)]  # fmt: skip


def test_no_agent_pool_has_gpus_and_each_pod_has_one_kind_of_node(stack: Stack, api: Api) -> None:
    resources = yaml.safe_load(stack.pulumi("stack", "export").stdout)["deployment"]["resources"]
    agent_pools = [item["inputs"] for item in resources if item["type"].endswith(":AgentPool")]
    assert [item["nodeLabels"] for item in agent_pools] == [{"drydock/pool": "apps"}]
    (cluster,) = [item["inputs"] for item in resources if item["type"].endswith(":ManagedCluster")]
    assert cluster["nodeProvisioningProfile"] == {"mode": "Auto", "defaultNodePools": "None"}
    by_maker = pods(api)
    on_gpu = {name for name, pod in by_maker.items() if all(fits(pod, pool) for pool in made(api).values())}
    elsewhere = {name for name, pod in by_maker.items() if pod.get("nodeSelector") == {"drydock/pool": "apps"}}
    assert {name.split("-")[0] for name in on_gpu} >= {"engine", "tune"}
    assert {name.split("-")[0] for name in elsewhere} >= {"router", "mirror"}
    assert not on_gpu & elsewhere and on_gpu | elsewhere == set(by_maker), "the autoscaler's nodes or Karpenter's"


def test_nothing_that_karpenter_does_by_itself_ends_a_training(stack: Stack, api: Api) -> None:
    """Consolidation, drift and age spare a pod that says so, unless its node may end after a while in any case."""
    (tune,) = (pod for name, pod in pods(api).items() if name.startswith("tune-"))
    assert tune["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
    for spec in made(api).values():
        assert spec["disruption"]["consolidationPolicy"] == "WhenEmpty"
        assert spec["template"]["spec"]["expireAfter"] == "Never"
        assert "terminationGracePeriod" not in spec["template"]["spec"]


def test_another_order_changes_the_pools_in_place(stack: Stack) -> None:
    text = (stack.folder / SETTINGS).read_text()
    with written(stack, SETTINGS, provisioned(text, SECOND, FIRST)):
        changes = preview(stack).changes
    of_nodes = {
        name: operations for name, operations in changes.items() if name.startswith(("NodePool", "AKSNodeClass"))
    }
    assert of_nodes == {"NodePool nodes-a100-0": {"update"}, "NodePool nodes-a100-1": {"update"}}


def test_with_kaito_the_preview_says_why_not(stack: Stack) -> None:
    whole = yaml.safe_load((stack.folder / SETTINGS).read_text())
    whole["config"].pop("drydock:api_keys", None)
    whole["config"]["drydock:tuning"] |= {"runtime": "kaito", "kaito": {"other_loss": True}}
    one = {"runtime": "kaito", "pool": "a100", "min_replicas": 1, "max_replicas": 1}
    whole["config"]["drydock:serving"] = one | {"kaito": {"adapter_images": {"kubectl": None}}}
    with written(stack, SETTINGS, yaml.safe_dump(whole)):
        told = "\n".join(preview(stack).errors)
    for runtime in ("serving", "tuning"):
        assert f"cluster.provisioning: not with {runtime}.runtime: kaito, where the add-on orders nodes by a" in told
    assert "StaticCapacity" in told


def test_the_server_refuses_what_karpenter_does_not_have(stack: Stack, api: Api) -> None:
    (found,) = (item for item in api.list(POOLS) if item["metadata"]["name"] == "a100-0")
    item = {"apiVersion": "karpenter.sh/v1", "kind": "NodePool", "metadata": {"name": "wrong"}, "spec": found["spec"]}
    for change, told in (({"weight": 101}, "weight"), ({"vmSize": FIRST}, "vmSize"), ({"disruption": {}}, "consolidateAfter")):  # fmt: skip
        with pytest.raises(ApiError, match=told):
            api.apply(item | {"spec": found["spec"] | change})
