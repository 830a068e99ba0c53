"""What the autoscaler judges by: which pods fit on which nodes, and how large a pool is that has been scaled."""

from __future__ import annotations

from typing import Any

import pytest

from localcloud.nodes import nodes_of, sized
from localcloud.predicates import Room, belongs, fits, requests

POOL = {
    "agentPoolName": "a100", "vmSize": "Standard_NC24ads_A100_v4", "enableAutoScaling": True, "count": 1, "minCount": 0,
    "maxCount": 3, "nodeLabels": {"drydock/pool": "a100", "rank": "7"}, "nodeTaints": ["sku=gpu:NoSchedule"],
}  # fmt: skip
TOLERANT = [{"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}]


def container(**asked: str) -> dict[str, Any]:
    return {"name": "x", "resources": {"requests": asked}}


def pod(labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    spec = {"containers": [container()], "tolerations": TOLERANT, **spec}
    return {"metadata": {"name": "x", "namespace": "team", "labels": labels or {}}, "spec": spec}


def rooms(count: int = 1, **changes: Any) -> list[Room]:
    made = nodes_of(POOL | changes, cluster="c", location="westeurope", indices=range(count))
    return [Room(node) for node in made]


def alone(pod: dict[str, Any]) -> bool:
    (room,) = rooms()
    return fits(pod, room, [room])


def test_a_pod_asks_for_its_containers_and_sidecars_or_for_what_an_init_container_needs_beside_them() -> None:
    sidecar = container(cpu="500m") | {"restartPolicy": "Always"}
    spec = {
        "initContainers": [container(cpu="2", memory="1Gi"), sidecar, container(cpu="2", **{"nvidia.com/gpu": "1"})],
        "containers": [container(cpu="1"), container(cpu="250m", memory="2Gi")],
        "overhead": {"memory": "1Mi"},
    }
    assert {name: float(amount) for name, amount in requests(spec).items()} == {
        "cpu": 2.5, "memory": 2 * 2**30 + 2**20, "nvidia.com/gpu": 1, "pods": 1,
    }  # fmt: skip
    long_lived = spec | {"containers": [container(cpu="4")]}
    assert float(requests(long_lived)["cpu"]) == 4.5
    assert float(requests(long_lived | {"resources": {"requests": {"cpu": "6"}}})["cpu"]) == 6


def test_a_node_is_full_when_its_pods_ask_for_all_that_is_allocatable() -> None:
    (room,) = rooms()
    half = pod(containers=[container(cpu="11")])
    for _ in range(2):
        assert fits(half, room, [room])
        room.add(half)
    assert not fits(half, room, [room])
    assert fits(pod(containers=[container(cpu="1")]), room, [room])
    assert not alone(pod(containers=[container(**{"nvidia.com/gpu": "2"})]))
    assert not alone(pod(containers=[container(**{"amd.com/gpu": "1"})]))
    (small,) = rooms(maxPods=1)
    small.add(half | {"status": {"phase": "Succeeded"}})
    assert fits(half, small, [small])
    small.add(half)
    assert not fits(pod(), small, [small])


@pytest.mark.parametrize(
    ("tolerations", "expected"),
    [
        (TOLERANT, True),
        ([{"operator": "Exists"}], True),
        ([{"key": "sku", "operator": "Exists"}], True),
        ([{"key": "sku", "value": "gpu"}], True),
        ([], False),
        ([{"key": "sku", "value": "cpu"}], False),
        ([{"key": "other", "operator": "Exists"}], False),
        ([{"key": "sku", "operator": "Exists", "effect": "NoExecute"}], False),
    ],
)
def test_taints(tolerations: list[dict[str, str]], expected: bool) -> None:
    assert alone(pod(tolerations=tolerations)) is expected


def affine(*terms: dict[str, Any]) -> dict[str, Any]:
    required = {"nodeSelectorTerms": list(terms)}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}


def expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([expression("drydock/pool", "In", "l4", "a100")], True),
        ([expression("drydock/pool", "In", "l4")], False),
        ([expression("drydock/pool", "In", "l4"), expression("drydock/pool", "Exists")], True),
        ([expression("drydock/pool", "NotIn", "a100")], False),
        ([expression("nobody", "NotIn", "a100")], True),
        ([expression("nobody", "DoesNotExist")], True),
        ([expression("rank", "Gt", "6")], True),
        ([expression("rank", "Lt", "7")], False),
        ([expression("drydock/pool", "Gt", "6")], False),
        ([{}], False),
        ([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["other"]}]}], False),
    ],
)
def test_node_affinity(terms: list[dict[str, Any]], expected: bool) -> None:
    assert alone(pod(affinity=affine(*terms))) is expected


def test_node_selector() -> None:
    assert alone(pod(nodeSelector={"drydock/pool": "a100"}))
    assert not alone(pod(nodeSelector={"drydock/pool": "l4"}))
    (room,) = rooms()
    room.add(pod(containers=[container(cpu="23")]))
    assert belongs(pod(containers=[container(cpu="23")]), room)  # however full it is


@pytest.mark.parametrize(
    ("key", "second"), [("kubernetes.io/hostname", True), ("topology.kubernetes.io/region", False)]
)
def test_pods_that_may_not_be_together_are_apart_whichever_of_them_says_so(key: str, second: bool) -> None:
    selector = {
        "matchLabels": {"app": "router"},
        "matchExpressions": [{"key": "hash", "operator": "In", "values": ["1"]}],
    }
    term = {"topologyKey": key, "labelSelector": selector}
    apart = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    says, labels = pod({}, affinity=apart), {"app": "router", "hash": "1"}
    for first, then in ((pod(labels), says), (says, pod(labels))):
        one, two = rooms(2)
        one.add(first)
        assert not fits(then, one, [one, two])
        assert fits(then, two, [one, two]) is second
        assert fits(pod({"app": "router", "hash": "2"}), one, [one, two])
    elsewhere = pod(labels)
    elsewhere["metadata"]["namespace"] = "other"
    one.add(elsewhere)
    assert fits(pod(labels), one, [one, two]) is False  # of the pod that says so in `team`


@pytest.mark.parametrize(
    ("changes", "there", "expected"),
    [
        ({}, [], [0]),
        ({"minCount": 2}, [], [0, 1]),
        ({"count": 9}, [], [0, 1, 2]),
        ({"count": 0}, [], []),
        ({}, [0, 2], [0, 2]),
        ({"count": 3}, [1, 5], [0, 1, 5]),
        ({"maxCount": 1}, [1, 2], [1]),
        ({"maxCount": 0, "count": 1}, [1], []),
    ],
)
def test_a_scaled_pool_keeps_its_nodes_within_its_limits(
    changes: dict[str, int], there: list[int], expected: list[int]
) -> None:
    assert sized(POOL | changes, there) == expected


def test_who_keeps_the_nodes_is_written_on_them() -> None:
    (node,) = nodes_of(POOL, cluster="c", location="westeurope", kubelet="runner", indices=[36])
    assert node["metadata"]["annotations"] == {"drydock.local/runner": "true"}
    assert node["metadata"]["name"].endswith("-vmss000010")
    with pytest.raises(ValueError, match="kubelet = docker: expected one of kwok, runner"):
        nodes_of(POOL, cluster="c", location="westeurope", kubelet="docker")
