"""The dev environment on the real engine: it comes up, stays as it is, and changes where a person expects it to."""

from __future__ import annotations

import json
import re

import pytest

from localcloud.cloud import Stack
from localcloud.pods import evict, finish, wait_for
from tests.engine.cluster import gpu_nodes, maker, placements
from tests.engine.conftest import Up
from tests.engine.plans import REPLACED, Plan, edited, last_update, preview, resource, written

pytestmark = pytest.mark.timeout(900)

SETTINGS = "Pulumi.dev.yaml"
DEPLOYMENT, ENGINE_POOL = "Deployment serving-engine-deployment", "AgentPool pools-a100"


def test_the_first_preview_needs_nothing_from_azure(dev: Up) -> None:
    assert dev.first.errors == []
    assert {op for ops in dev.first.changes.values() for op in ops} == {"create"}
    assert len(dev.first.changes) > 100
    # Every value of Azure's was unknown then, and the objects in the cluster were planned all the same.
    assert {DEPLOYMENT, "ScaledObject serving-scaling-scaled"} <= set(dev.first.changes)
    assert tuning_jobs(dev.first) == [("tune-kubectl", {"create"})]


def tuning_jobs(plan: Plan) -> list[tuple[str, set[str]]]:
    """What happens to tuning Jobs, without the hashes of their names, sorted."""
    found = [
        (name.split()[1].rpartition("-")[0], ops) for name, ops in plan.changes.items() if name.startswith("Job tune-")
    ]
    return sorted(found, key=lambda item: (item[0], sorted(item[1])))


def others(plan: Plan) -> dict[str, set[str]]:
    """The changes of everything but tuning Jobs."""
    return {name: ops for name, ops in plan.changes.items() if not name.startswith("Job tune-")}


ANEW = [("tune-kubectl", {"create"}), ("tune-kubectl", {"delete"})]


def test_it_comes_up_by_the_cli_alone(dev: Up) -> None:
    result, changes = last_update(dev.stack)
    assert (result, set(changes)) == ("succeeded", {"create"})
    assert changes["create"] == len(dev.first.steps)
    assert dev.stack.outputs()["models"] == ["base", "kubectl"]


def test_every_pod_is_on_the_pool_meant_for_it_and_none_elsewhere(dev: Up) -> None:
    assert placements(dev.cloud) == {
        "engine": {"a100"},
        "tune-kubectl": {"a100"},
        "nvidia-device-plugin": {"a100"},
        "dcgm-exporter": {"a100"},
        "router": {"apps"},
        "mirror": {"apps"},
    }
    with dev.cloud.control_plane.client() as api:
        plugins = [
            pod for pod in api.list("/api/v1/namespaces/drydock-gpu/pods") if maker(pod) == "nvidia-device-plugin"
        ]
    assert sorted(pod["spec"]["nodeName"] for pod in plugins) == sorted(gpu_nodes(dev.cloud))


def test_a_second_up_changes_nothing(dev: Up) -> None:
    dev.stack.pulumi("up", "--yes", "--skip-preview")
    result, changes = last_update(dev.stack)
    assert (result, set(changes)) == ("succeeded", {"same"})


def test_after_a_refresh_there_is_nothing_to_do(dev: Up) -> None:
    dev.stack.pulumi("refresh", "--yes", "--skip-preview")
    assert set(last_update(dev.stack)[1]) <= {"same", "refresh"}
    assert preview(dev.stack).changes == {}


def test_another_learning_rate_is_one_new_job(dev: Up) -> None:
    with edited(dev.stack, SETTINGS, "learning_rate: 0.0002", "learning_rate: 0.0001"):
        plan = preview(dev.stack)
    assert tuning_jobs(plan) == ANEW
    assert others(plan) == {"ConfigMap tune-kubectl-specs": REPLACED}


def test_how_often_it_logs_is_a_setting_of_the_job_that_is_there(dev: Up) -> None:
    with edited(dev.stack, SETTINGS, "lora_dropout: 0.05", "lora_dropout: 0.05\n      logging_steps: 1"):
        plan = preview(dev.stack)
    assert plan.changes == {"ConfigMap tune-kubectl-specs": {"update"}}


def test_a_byte_of_the_dataset_is_an_upload_and_its_adapters_job(dev: Up) -> None:
    row = '{"instruction": "one more", "input": "", "output": "row"}\n'
    data = "rehearsal/data/kubectl.jsonl"
    with written(dev.stack, data, (dev.stack.folder / data).read_text() + row):
        plan = preview(dev.stack)
    uploads = {name: ops for name, ops in plan.changes.items() if name.startswith("FileUpload ")}
    assert sorted(map(sorted, uploads.values())) == [["create"], ["delete"]]  # forgotten: the blob itself stays
    assert tuning_jobs(plan) == ANEW
    assert set(others(plan)) == set(uploads)


def test_serving_code_is_an_image_and_a_rollout(dev: Up) -> None:
    with written(dev.stack, "stress/__init__.py", "# changed\n"):
        assert set(preview(dev.stack).changes) == {"ImageBuild images-stress"}
    sidecar = "serving/sidecar.py"
    with written(dev.stack, sidecar, (dev.stack.folder / sidecar).read_text() + "# changed\n"):
        plan = preview(dev.stack)
    assert plan.changes[DEPLOYMENT] == {"update"}
    assert tuning_jobs(plan) == []  # hours of GPU
    assert not any(name.startswith(("AgentPool", "ManagedCluster", "Namespace")) for name in plan.changes)


def test_a_pools_maximum_is_changed_in_place(dev: Up) -> None:
    with edited(dev.stack, SETTINGS, "max_nodes: 2", "max_nodes: 3"):
        plan = preview(dev.stack)
    assert plan.changes[ENGINE_POOL] == {"update"}
    assert not any(op.startswith(("replace", "create-rep", "delete")) for ops in plan.changes.values() for op in ops)


def test_another_gpu_is_a_new_pool_before_the_old_one_goes(dev: Up) -> None:
    with edited(dev.stack, SETTINGS, "Standard_NC24ads_A100_v4", "Standard_NC40ads_H100_v5"):
        plan = preview(dev.stack)
    assert plan.changes[ENGINE_POOL] == REPLACED
    order = plan.order(ENGINE_POOL)
    assert order.index("create-replacement") < order.index("delete-replaced")  # the replicas have where to move to
    steps = {step["op"]: step for step in plan.steps if resource(step["urn"]) == ENGINE_POOL}
    new, old = steps["create-replacement"]["newState"], steps["delete-replaced"]["oldState"]
    assert new["inputs"]["agentPoolName"] != old["inputs"]["agentPoolName"]
    assert plan.changes[DEPLOYMENT] == {"update"}
    # Its pod asks for another share of the node: the Job is made anew and goes on from its checkpoints.
    assert tuning_jobs(plan) == [("tune-kubectl", REPLACED)]
    assert {name for name, ops in others(plan).items() if ops != {"update"}} == {ENGINE_POOL}


def test_tags_replace_nothing(dev: Up) -> None:
    with edited(dev.stack, SETTINGS, "drydock:owner:", "drydock:tags: { cost-center: '7' }\n  drydock:owner:"):
        plan = preview(dev.stack)
        dev.stack.pulumi("up", "--yes", "--skip-preview")
        result, changes = last_update(dev.stack)
    # The provider's plan calls the principal ID of an identity unknown as soon as the identity changes in anything.
    shown = {name for name, ops in plan.changes.items() if ops != {"update"}}
    assert {name.split()[0] for name in shown} <= {"RoleAssignment"}, shown
    assert (result, set(changes)) == ("succeeded", {"same", "update"})
    dev.stack.pulumi("up", "--yes", "--skip-preview")  # as the others expect it


SECOND = """\
  drydock:adapters:
    triage:
      dataset: rehearsal/data/triage.jsonl
      max_seq_length: 512
"""


def test_a_second_adapter_changes_nothing_of_the_first(dev: Up) -> None:
    with edited(dev.stack, SETTINGS, "  drydock:adapters:\n", SECOND):
        plan = preview(dev.stack)
    assert plan.errors == []
    assert tuning_jobs(plan) == [("tune-triage", {"create"})]
    assert not any("kubectl" in name for name in plan.changes), plan.changes
    assert not any(
        op.startswith("delete") or "replace" in op
        for name, ops in plan.changes.items()
        for op in ops
        if "ConfigMap" not in name
    )


def test_a_renewed_kubeconfig_replaces_nothing(dev: Up) -> None:
    path = dev.cloud.folder / "cluster.json"
    before = path.read_text()
    said = json.loads(before)
    said["kubeconfig"] = said["kubeconfig"].replace("clusterUser", "clusterUserRenewed")
    assert said["kubeconfig"] != json.loads(before)["kubeconfig"]
    path.write_text(json.dumps(said))
    try:
        dev.stack.pulumi("refresh", "--yes", "--skip-preview")
        plan = preview(dev.stack)
    finally:
        path.write_text(before)
    assert {op for ops in plan.changes.values() for op in ops} <= {"update"}, plan.changes
    assert set(plan.changes) <= {"Provider platform-provider", "kubernetes platform-provider"}, plan.changes


def secrets_of(up: Up) -> dict[str, str]:
    kept = {"API key": (up.cloud.folder / "dev.key").read_text(), "token": up.cloud.control_plane.token}
    return kept | {"kubeconfig": "clusterUser"}


def test_no_secret_is_in_the_clear(dev: Up) -> None:
    exported = dev.stack.pulumi("stack", "export").stdout
    seen = {
        "state file": "".join(path.read_text() for path in (dev.cloud.folder / "state").rglob("*.json*")),
        "export": exported,
        "up": dev.said,
        "preview": dev.stack.pulumi("preview", "--diff").stdout,
        "outputs": dev.stack.pulumi("stack", "output").stdout,
        "settings": (dev.stack.folder / SETTINGS).read_text(),
    }
    found = [
        (place, what) for place, text in seen.items() for what, secret in secrets_of(dev).items() if secret in text
    ]
    assert found == []
    assert re.search(r"kubeconfig\s+\[secret\]", seen["outputs"])
    # Not vacuous: in the clear they are there for who may see them.
    assert "clusterUser" in dev.stack.pulumi("stack", "output", "kubeconfig", "--show-secrets").stdout


def test_the_policy_pack_refuses_in_the_engine_and_tells_what_to_do(dev: Up) -> None:
    with edited(dev.stack, SETTINGS, "max_nodes: 2", "max_nodes: 20"):
        done = dev.stack.pulumi("preview", "--policy-pack", "policy", check=False)
    assert done.returncode != 0
    assert "maxCount is 20, more than 16" in done.stdout + done.stderr


def test_a_platform_teams_own_stack_reads_the_outputs(dev: Up) -> None:
    class Consumer(Stack):
        def __init__(self) -> None:
            self.cloud, self.name, self.folder = dev.cloud, "team", dev.stack.folder / "examples" / "consumer"

    consumer = Consumer()
    consumer.pulumi("stack", "init", "team", "--no-select", stack=False)
    for key, value in {"drydock_stack": "organization/drydock/dev", "model": "kubectl"}.items():
        consumer.pulumi("config", "set", key, value)
    consumer.pulumi("config", "set", "--secret", "api_key", "a-key-of-theirs")
    consumer.pulumi("up", "--yes", "--skip-preview")
    with dev.cloud.control_plane.client() as api:
        made = api.get("/api/v1/namespaces/chat-app/configmaps/models")["data"]
        labels = api.get("/api/v1/namespaces/chat-app")["metadata"]["labels"]
    assert made == {"OPENAI_BASE_URL": dev.stack.outputs()["endpoint"], "OPENAI_MODEL": "kubectl"}
    assert labels["drydock/client"] == "true"
    consumer.pulumi("config", "set", "model", "kubectk")
    refused = consumer.pulumi("preview", check=False)
    assert "kubectk is not served there; choose one of base, kubectl" in refused.stdout + refused.stderr
    consumer.pulumi("config", "set", "model", "kubectl")
    consumer.pulumi("destroy", "--yes", "--skip-preview")


def job_copy(up: Up, name: str) -> tuple[dict, dict]:
    """A Job of one's own made from the tuning Job's spec as it stands in the cluster, and its first pod."""
    with up.cloud.control_plane.client() as api:
        jobs = "/apis/batch/v1/namespaces/drydock-tuning/jobs"
        real = next(job for job in api.list(jobs) if job["metadata"]["name"].startswith("tune-kubectl"))
        spec = json.loads(json.dumps(real["spec"]))
        spec.pop("selector")
        for key in [
            key for key in spec["template"]["metadata"]["labels"] if "controller-uid" in key or "job-name" in key
        ]:
            del spec["template"]["metadata"]["labels"][key]
        job = api.post(jobs, {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec})
        return job, first_pod(up, name)


def first_pod(up: Up, job: str, other_than: str = "") -> dict:
    path = "/api/v1/namespaces/drydock-tuning/pods"

    def there(found: dict) -> bool:
        return any(running(pod) for pod in found["items"])

    def running(pod: dict) -> bool:
        mine = pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == job
        return mine and pod["metadata"]["name"] != other_than and pod["status"]["phase"] == "Running"

    with up.cloud.control_plane.client() as api:
        found = wait_for(api, path, there, 60)
        return next(pod for pod in found["items"] if running(pod))


def ended(up: Up, job: str) -> dict:
    """The status of a Job that has ended, as its conditions by type."""
    path = f"/apis/batch/v1/namespaces/drydock-tuning/jobs/{job}"

    def over(found: dict) -> bool:
        kinds = {item["type"]: item["status"] for item in found["status"].get("conditions", [])}
        return "True" in (kinds.get("Failed"), kinds.get("Complete"))

    with up.cloud.control_plane.client() as api:
        status = wait_for(api, path, over, 60)["status"]
    return status | {"by_type": {item["type"]: item for item in status["conditions"] if item["status"] == "True"}}


def test_an_eviction_does_not_count_and_a_passed_gate_completes_the_job(dev: Up) -> None:
    with dev.cloud.control_plane.client() as api:
        jobs = api.list("/apis/batch/v1/namespaces/drydock-tuning/jobs")
        name = next(job["metadata"]["name"] for job in jobs if job["metadata"]["name"].startswith("tune-kubectl"))
        evicted = first_pod(dev, name)["metadata"]["name"]
        evict(api, "drydock-tuning", evicted)
        again = first_pod(dev, name, other_than=evicted)["metadata"]["name"]
        finish(api, "drydock-tuning", again, {})
    status = ended(dev, name)
    assert "Complete" in status["by_type"]
    assert status.get("succeeded") == 1 and status.get("failed", 0) == 0


@pytest.mark.parametrize(("container", "code"), [("tune", 2), ("evaluate", 3)])
def test_a_mistake_or_a_gate_not_passed_ends_the_job_at_once_with_its_reason(
    dev: Up, container: str, code: int
) -> None:
    job, pod = job_copy(dev, f"try-{container}")
    with dev.cloud.control_plane.client() as api:
        finish(api, "drydock-tuning", pod["metadata"]["name"], {container: code})
    status = ended(dev, job["metadata"]["name"])
    failed = status["by_type"]["Failed"]
    assert failed["reason"] == "PodFailurePolicy"
    assert container in failed["message"] and f"exit code {code}" in failed["message"]
    assert status["failed"] == 1  # no second try
    with dev.cloud.control_plane.client() as api:
        api.delete(
            f"/apis/batch/v1/namespaces/drydock-tuning/jobs/{job['metadata']['name']}", propagationPolicy="Background"
        )
