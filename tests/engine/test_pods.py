"""What pods end with, as the real Job controller judges it; see `workloads.jobs.failure_policy` for the rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from localcloud.api import Api, ApiError
from localcloud.pods import evict, finish, wait_for
from localcloud.tools import Tools
from tests.engine.clusters import cluster
from tests.engine.objects import container, deployment, job, pod_template

PLACE = "team"
JOBS = f"/apis/batch/v1/namespaces/{PLACE}/jobs"
PODS = f"/api/v1/namespaces/{PLACE}/pods"
POLICY = {
    "rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3]}},
    ]
}
AGAIN_SECONDS = 40  # the Job controller waits 10 s before it makes another pod in place of one that ended


@pytest.fixture(scope="module")
def api(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    pool = {"agentPoolName": "apps", "vmSize": "Standard_D4ds_v5", "count": 1}
    with cluster(tools, tmp_path_factory.mktemp("plane"), pool, PLACE) as api:
        yield api


def start(api: Api, name: str, **spec: Any) -> str:
    """A Job of two containers that run one after the other, as the tuning Job has; the name of its running pod."""
    template = pod_template(
        {"app": name}, [container("evaluate")], initContainers=[container("fetch"), container("tune")]
    )
    api.apply(
        job(
            name, PLACE, template, podFailurePolicy=POLICY, podReplacementPolicy="Failed", **{"backoffLimit": 1, **spec}
        )
    )
    return running(api, name)


def running(api: Api, name: str, seconds: float = 30) -> str:
    def one(pods: dict[str, Any]) -> bool:
        return any(chosen(pod) for pod in pods["items"])

    def chosen(pod: dict[str, Any]) -> bool:
        alive = pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        return alive and pod["metadata"]["labels"]["app"] == name

    found = wait_for(api, PODS, one, seconds)
    return str(next(pod["metadata"]["name"] for pod in found["items"] if chosen(pod)))


def ended(api: Api, name: str) -> dict[str, Any]:
    """The final condition of the Job."""

    def final(found: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            item
            for item in found["status"].get("conditions", [])
            if item["type"] in ("Complete", "Failed") and item["status"] == "True"
        ]

    return final(wait_for(api, f"{JOBS}/{name}", final))[0]


def test_all_well_completes_the_job_and_not_before(api: Api) -> None:
    pod = start(api, "well")
    assert api.get(f"{JOBS}/well")["status"].get("ready") in (None, 0, 1)
    assert ended_not_yet(api, "well")
    finish(api, PLACE, pod, {})
    assert ended(api, "well")["type"] == "Complete"
    status = api.get(f"{PODS}/{pod}")["status"]
    assert status["phase"] == "Succeeded"
    for item in [*status["initContainerStatuses"], *status["containerStatuses"]]:
        assert item["state"]["terminated"]["exitCode"] == 0
        assert item["state"]["terminated"]["reason"] == "Completed"


def ended_not_yet(api: Api, name: str) -> bool:
    """Whether the Job still runs after twice the time in which KWOK would have completed it."""
    with pytest.raises(TimeoutError):
        wait_for(api, f"{JOBS}/{name}", lambda found: found["status"].get("conditions"), 2)
    return True


@pytest.mark.parametrize(("name", "code"), [("tune", 2), ("evaluate", 3)])
def test_codes_that_no_retry_can_help_fail_the_job_at_once_with_their_reason(api: Api, name: str, code: int) -> None:
    pod = start(api, f"fail-{name}")
    finish(api, PLACE, pod, {name: code})
    condition = ended(api, f"fail-{name}")
    assert (condition["type"], condition["reason"]) == ("Failed", "PodFailurePolicy")
    assert f"Container {name} for pod {PLACE}/{pod} failed with exit code {code}" in condition["message"]
    assert api.get(f"{JOBS}/fail-{name}")["status"]["failed"] == 1


def test_what_comes_after_a_failed_init_container_never_starts(api: Api) -> None:
    pod = start(api, "early")
    finish(api, PLACE, pod, {"fetch": 2})
    ended(api, "early")
    status = api.get(f"{PODS}/{pod}")["status"]
    assert status["phase"] == "Failed"
    assert status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 2
    assert "waiting" in status["containerStatuses"][0]["state"]


def test_a_disruption_does_not_count_and_another_failure_does(api: Api) -> None:
    pod = start(api, "again", backoffLimit=0)
    evict(api, PLACE, pod)
    wait_for(api, f"{PODS}/{pod}", lambda found: not found)
    second = running(api, "again", AGAIN_SECONDS)
    assert second != pod
    assert api.get(f"{JOBS}/again")["status"].get("failed", 0) == 0
    finish(api, PLACE, second, {"tune": 1})
    condition = ended(api, "again")
    assert (condition["type"], condition["reason"]) == ("Failed", "BackoffLimitExceeded")
    assert api.get(f"{JOBS}/again")["status"]["failed"] == 1


def test_what_cannot_be_finished_is_refused(api: Api) -> None:
    pod = start(api, "refused")
    with pytest.raises(ValueError, match="no container named engine"):
        finish(api, PLACE, pod, {"engine": 1})
    api.apply(deployment("serving", PLACE, 1, pod_template({"app": "serving"})))
    with pytest.raises(ValueError, match="restartPolicy = Always"):
        finish(api, PLACE, running(api, "serving"), {"main": 1})
    with pytest.raises(ApiError) as missing:
        finish(api, PLACE, "nobody", {})
    assert missing.value.status == 404


def test_waiting_in_vain_tells_what_was_there(api: Api) -> None:
    with pytest.raises(TimeoutError, match=r"namespaces/team: not as expected within 0 s; last seen: .*Active"):
        wait_for(api, f"/api/v1/namespaces/{PLACE}", lambda found: False, 0.2)
