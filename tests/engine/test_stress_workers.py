"""The stress test of several workers, as the real API server, scheduler and Job controller take it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from common import exits
from localcloud.api import Api
from localcloud.pods import evict, finish, wait_for
from localcloud.tools import Tools
from tests.engine.clusters import cluster
from tests.engine.test_tuning_nodes import ended
from tests.stack.test_workloads_stress import deployed, environment, objects

PLACE = "drydock-serving"
POOL = {
    "agentPoolName": "apps",
    "vmSize": "Standard_D4ds_v5",
    "enableAutoScaling": True,
    "count": 2,
    "maxCount": 3,
    "nodeLabels": {"drydock/pool": "apps"},
}


@pytest.fixture(scope="module")
def api(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A cluster with two nodes, whose pods run until a test ends them."""
    with cluster(tools, tmp_path_factory.mktemp("plane"), POOL, PLACE, "stress") as api:
        yield api


def begun(api: Api, run: int) -> str:
    """Apply the objects of a stress test, and wait for its pods to run; the name of the master's Job."""
    seen = deployed(environment({"run": run, "workers": 3}))[0]
    for item in objects(seen):
        if item.type.endswith(":Secret"):
            api.apply(item.inputs | {"stringData": {"key": "k3y"}})
        else:
            api.apply(item.inputs)
    name = str(min((item.inputs["metadata"]["name"] for item in seen.of(":Job")), key=len))
    running(api, name, 1)
    running(api, f"{name}-workers", 3)
    return name


def running(api: Api, job: str, count: int) -> list[dict[str, Any]]:
    """The Job's pods, once so many run."""

    def those(found: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            pod
            for pod in found["items"]
            if pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == job
            and pod["status"]["phase"] == "Running"
            and "deletionTimestamp" not in pod["metadata"]
        ]

    return those(wait_for(api, f"/api/v1/namespaces/{PLACE}/pods", lambda found: len(those(found)) == count, 60))


def test_they_find_their_master_and_each_that_ends_well_leaves_the_others_alone(api: Api) -> None:
    job = begun(api, 1)
    (master,) = running(api, job, 1)
    slices = wait_for(
        api,
        f"/apis/discovery.k8s.io/v1/namespaces/{PLACE}/endpointslices?labelSelector=kubernetes.io/service-name={job}",
        lambda found: sum(len(item["endpoints"] or []) for item in found["items"]) == 1,
    )
    addresses = [address for item in slices["items"] for end in item["endpoints"] for address in end["addresses"]]
    assert addresses == [master["status"]["podIP"]]
    first, *others = running(api, f"{job}-workers", 3)
    finish(api, PLACE, first["metadata"]["name"], {})
    assert {pod["metadata"]["name"] for pod in running(api, f"{job}-workers", 2)} == {
        pod["metadata"]["name"] for pod in others
    }
    for pod in (*others, master):
        finish(api, PLACE, pod["metadata"]["name"], {})
    ended(api, f"{job}-workers", "Complete", PLACE)
    ended(api, job, "Complete", PLACE)


def test_an_evicted_one_comes_again_and_one_that_fails_ends_all(api: Api) -> None:
    job = begun(api, 2)
    pods = running(api, f"{job}-workers", 3)
    evict(api, PLACE, pods[0]["metadata"]["name"])
    again = running(api, f"{job}-workers", 3)
    assert pods[0]["metadata"]["uid"] not in {pod["metadata"]["uid"] for pod in again}
    finish(api, PLACE, again[0]["metadata"]["name"], {"worker": exits.FAILED})
    ended(api, f"{job}-workers", "Failed", PLACE)
    running(api, f"{job}-workers", 0)
    running(api, job, 1)  # the master says in its log what has happened, and ends by itself
