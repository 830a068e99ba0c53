"""The tuning Job of several nodes, as the real API server, scheduler and Job controller take it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from common import exits
from infra.settings import GpuPool, Tuning
from localcloud.api import Api
from localcloud.pods import evict, finish, wait_for
from localcloud.tools import Tools
from tests.engine.clusters import cluster
from tests.stack.test_workloads_tuning import deployed

PLACE = "drydock-tuning"
POOL = {
    "agentPoolName": "a100",
    "vmSize": "Standard_NC48ads_A100_v4",
    "enableAutoScaling": True,
    "count": 2,
    "maxCount": 3,
    "nodeLabels": {"drydock/pool": "a100"},
    "nodeTaints": ["sku=gpu:NoSchedule"],
}


@pytest.fixture(scope="module")
def api(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A cluster with two nodes of two GPUs, whose pods run until a test ends them."""
    with cluster(tools, tmp_path_factory.mktemp("plane"), POOL, PLACE, "tuning") as api:
        yield api


def begun(api: Api, adapter: str) -> str:
    """Apply the objects of `adapter`'s Job, and wait for its pods to run; the Job's name."""
    # One GPU of two: what keeps the pods from sharing a node is not the GPU.
    tuning, pool = Tuning(pool="a100", nodes=2, retries=2), GpuPool(vm_size="Standard_NC48ads_A100_v4", max_nodes=3)
    seen = deployed(adapter, tuning=tuning, pool=pool)
    for item in seen.resources:
        if item.custom:
            api.apply(item.inputs)
    name = str(seen.one(":Job").inputs["metadata"]["name"])
    running(api, name, 2)
    return name


def running(api: Api, job: str, count: int) -> dict[str, dict[str, Any]]:
    """The Job's pods by their index, once so many run."""

    def those(found: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            pod
            for pod in found["items"]
            if pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] == job
            and pod["status"]["phase"] == "Running"
            and "deletionTimestamp" not in pod["metadata"]
        ]

    found = wait_for(api, f"/api/v1/namespaces/{PLACE}/pods", lambda found: len(those(found)) == count, 60)
    index = "batch.kubernetes.io/job-completion-index"
    return {pod["metadata"]["annotations"][index]: pod for pod in those(found)}


def ended(api: Api, job: str, condition: str, place: str = PLACE) -> dict[str, Any]:
    path = f"/apis/batch/v1/namespaces/{place}/jobs/{job}"
    return wait_for(
        api,
        path,
        lambda found: any(
            (item["type"], item["status"]) == (condition, "True") for item in found["status"].get("conditions", [])
        ),
        60,
    )


def test_a_pod_each_on_its_own_node_and_the_first_decides(api: Api) -> None:
    job = begun(api, "first")
    pods = running(api, job, 2)
    assert set(pods) == {"0", "1"}
    assert len({pod["spec"]["nodeName"] for pod in pods.values()}) == 2
    assert [(pods[index]["spec"]["hostname"], pods[index]["spec"]["subdomain"]) for index in ("0", "1")] == [
        (f"{job}-0", job),
        (f"{job}-1", job),
    ]
    for container in (*pods["1"]["spec"]["initContainers"], *pods["1"]["spec"]["containers"]):
        assert "JOB_COMPLETION_INDEX" in {variable["name"] for variable in container["env"]}, container["name"]
    slices = wait_for(
        api,
        f"/apis/discovery.k8s.io/v1/namespaces/{PLACE}/endpointslices",
        lambda found: sum(len(item["endpoints"] or []) for item in found["items"]) == 2,
    )
    assert {end["hostname"] for item in slices["items"] for end in item["endpoints"]} == {f"{job}-0", f"{job}-1"}

    evict(api, PLACE, pods["1"]["metadata"]["name"])  # it does not count, and comes again under its number
    again = running(api, job, 2)["1"]
    assert again["metadata"]["uid"] != pods["1"]["metadata"]["uid"]
    assert again["spec"]["hostname"] == f"{job}-1"
    finish(api, PLACE, pods["0"]["metadata"]["name"], {})
    done = ended(api, job, "Complete")
    assert (done["status"]["completedIndexes"], done["status"].get("failed", 0)) == ("0", 0)
    running(api, job, 0)  # the other is ended with it


def test_the_others_may_end_before_the_first_is_tried_again(api: Api) -> None:
    job = begun(api, "second")
    pods = running(api, job, 2)
    finish(api, PLACE, pods["1"]["metadata"]["name"], {})
    finish(api, PLACE, pods["0"]["metadata"]["name"], {"evaluate": exits.FAILED})
    again = running(api, job, 1)
    assert set(again) == {"0"}, "only the first comes again"
    finish(api, PLACE, again["0"]["metadata"]["name"], {})
    done = ended(api, job, "Complete")
    assert (done["status"]["succeeded"], done["status"]["failed"]) == (2, 1)


def test_what_only_a_person_can_mend_ends_all(api: Api) -> None:
    job = begun(api, "third")
    finish(api, PLACE, running(api, job, 2)["0"]["metadata"]["name"], {"tune": exits.INPUT})
    ended(api, job, "Failed")
    running(api, job, 0)
