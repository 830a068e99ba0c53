"""The drills' account before a real API server: it may do what the drills do, and nothing beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.files import read_json, write_json
from localcloud.api import Api as Admin
from localcloud.control_plane import ControlPlane
from localcloud.nodes import nodes_of, sync
from localcloud.pods import wait_for
from localcloud.tools import Tools
from stress.cluster import FAULTS, Api, Cluster, ClusterError
from tests.engine.objects import container, deployment, job, namespace, pod_template
from tests.stack.test_workloads_drills import made
from tests.unit.test_stress_fake import fake_server, stress, write_dataset

SERVING, TUNING = "drydock-serving", "drydock-tuning"
RIGHTS = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")


@pytest.fixture(scope="module")
def admin(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    """A cluster with three nodes, two replicas under a disruption budget, a tuning Job, and the drills' rights."""
    with ControlPlane(tmp_path_factory.mktemp("plane"), tools, complete_jobs=False) as plane, plane.client() as api:
        pool = {"agentPoolName": "serve", "vmSize": "Standard_D4ds_v5", "count": 3}
        sync(api, "pool", nodes_of(pool, cluster="test-aks", location="westeurope"))
        for place in (SERVING, TUNING):
            api.apply(namespace(place))
        for item in made().resources:
            name = item.inputs.get("metadata", {}).get("name", "")
            if name == FAULTS or (item.type.rpartition(":")[2] in RIGHTS and "drills" in name):
                api.apply(item.inputs)
        api.apply(deployment("engine", SERVING, 2, pod_template({"app": "engine"}, [container("engine")])))
        budget = {"maxUnavailable": 1, "selector": {"matchLabels": {"app": "engine"}}}
        metadata = {"name": "engine", "namespace": SERVING}
        api.apply({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata, "spec": budget})
        api.apply(job("tune-a", TUNING, pod_template({"app": "tune"}, [container("evaluate")])))
        yield api


def signed_in(admin: Admin, name: str, folder: Path) -> Api:
    """The API server as a pod with this service account sees it."""
    token = admin.post(f"/api/v1/namespaces/{SERVING}/serviceaccounts/{name}/token", {"spec": {}})["status"]["token"]
    (folder / "token").write_text(token)
    shutil.copy(Path(str(admin._session.verify)), folder / "ca.crt")
    return Api(admin.server, folder)


@pytest.fixture(scope="module")
def account(admin: Admin, tmp_path_factory: pytest.TempPathFactory) -> Api:
    return signed_in(admin, "drills", tmp_path_factory.mktemp("account"))


@pytest.fixture
def cluster(account: Api) -> Cluster:
    return Cluster(account, "http://router", SERVING, TUNING)


def all_ready(admin: Admin, count: int = 2) -> None:
    path = f"/apis/apps/v1/namespaces/{SERVING}/deployments/engine"
    wait_for(admin, path, lambda found: found["status"].get("availableReplicas") == count)


def allowed(account: Api, place: str) -> set[tuple[str, str]]:
    """All that the server lets the account do in a namespace: (verb, resource), or (verb, resource/name)."""
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": place}}
    said = account.ask("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", review)["status"]
    assert not said["incomplete"]
    return {
        (verb, resource + name)
        for rule in said["resourceRules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for name in [f"/{name}" for name in rule.get("resourceNames", [])] or [""]
    }


def test_the_server_lets_it_do_what_is_declared_and_nothing_else(account: Api, admin: Admin, tmp_path: Path) -> None:
    anyone = allowed(signed_in(admin, "default", tmp_path), SERVING)  # such as to ask what it may do

    def own(place: str) -> set[tuple[str, str]]:
        return allowed(account, place) - anyone

    nodes = {("get", "nodes"), ("patch", "nodes")}
    assert not anyone & {("list", "pods"), *nodes}
    pods = {("list", "pods"), ("delete", "pods"), ("create", "pods/eviction")}
    assert own(SERVING) == nodes | pods | {("patch", "configmaps/drill-faults")}
    assert own(TUNING) == nodes | {("list", "pods"), ("get", "pods/log"), ("create", "pods/eviction")}
    assert own("default") == own("kube-system") == nodes


def test_a_killed_replica_is_followed_until_another_is_ready(admin: Admin, cluster: Cluster) -> None:
    all_ready(admin)
    assert cluster.unready() == []
    victim = cluster.names()[0]
    cluster.kill([victim])
    assert victim not in cluster.names()
    wait_for(admin, f"/api/v1/namespaces/{SERVING}/pods", lambda _: cluster.reached(victim)[0] == 3)
    stage, name = cluster.reached(victim)
    assert stage == 3 and name != victim and name in cluster.names()


def test_a_node_is_drained_and_takes_pods_again(admin: Admin, cluster: Cluster) -> None:
    all_ready(admin)
    node, names = cluster.node_of(cluster.names()[0])
    cluster.cordon(node)
    try:
        with pytest.raises(ClusterError, match="cordoned already"):
            cluster.node_of(names[0])
        cluster.drain(names, 30, lambda: None)
        wait_for(admin, f"/api/v1/nodes/{node}", lambda _: all(cluster.reached(name)[0] == 3 for name in names))
        replaced = [cluster.reached(name)[1] for name in names]
        assert node not in {cluster.node_of(name)[0] for name in replaced}
    finally:
        cluster.uncordon(node)
    assert "unschedulable" not in admin.get(f"/api/v1/nodes/{node}")["spec"]


def test_a_loss_of_the_registry_is_declared_and_taken_back(admin: Admin, cluster: Cluster) -> None:
    path = f"/api/v1/namespaces/{SERVING}/configmaps/{FAULTS}"
    at = cluster.lose_registry(90)
    assert admin.get(path)["data"] == {"registry_unreachable_until": f"{at + 90:.0f}"}
    cluster.find_registry()
    assert not admin.get(path).get("data")
    assert set(cluster.registry_unseen()) == set(cluster.names())


def test_a_tuning_pod_is_evicted_and_its_log_may_be_read(admin: Admin, cluster: Cluster) -> None:
    pods = f"/api/v1/namespaces/{TUNING}/pods"
    found = wait_for(admin, pods, lambda all_: any(pod["status"]["phase"] == "Running" for pod in all_["items"]))
    (pod,) = found["items"]
    assert [item["metadata"]["name"] for item in cluster._pods(TUNING, "app=tune")] == [pod["metadata"]["name"]]
    with pytest.raises(ClusterError) as failed:  # there is no kubelet that could answer
        cluster.step(pod)
    assert failed.value.status != 403
    cluster.evict_tuner(pod)
    wait_for(admin, f"{pods}/{pod['metadata']['name']}", lambda there: not there)


def test_the_whole_run_with_nothing_but_that_account(admin: Admin, account: Api, tmp_path: Path) -> None:
    """The Job's own command. Pods here run nothing, so that a fake server stands for the router and all behind it."""
    all_ready(admin)
    load = {"models": ["base"], "users": 2, "ramp_seconds": 0.1, "duration_seconds": 1, "prompt_tokens": 50}
    settings: dict[str, Any] = {
        "load": load,
        "scenarios": ["replica-loss", "node-drain", "outage"],
        "before_seconds": 1,
    }
    settings |= {"after_seconds": 0.5, "bounds": {"recovery_seconds": 60, "moved_seconds": 60}}
    write_json(tmp_path / "drills.json", settings)
    options = ["--settings", tmp_path / "drills.json", "--dataset", write_dataset(tmp_path / "data.jsonl")]
    options += ["--out", tmp_path / "out", "--namespace", SERVING, "--tuning-namespace", TUNING, "--wait-seconds", 5]
    before = {pod["metadata"]["uid"] for pod in admin.list(f"/api/v1/namespaces/{SERVING}/pods")}
    with fake_server(ttft_ms=10, itl_ms=2) as url:
        done = stress("drills", *options, "--target", url, "--api-server", admin.server, "--account", account._account)
    assert done.returncode == 0, done.stderr
    found = {name: read_json(tmp_path / "out" / "drills" / f"{name}.json") for name in settings["scenarios"]}
    assert all(bound["held"] for drill in found.values() for bound in drill["bounds"])
    assert len(found["outage"]["killed"]) == 2
    assert all("ready_seconds" in stages for stages in found["outage"]["replicas"].values())
    assert found["node-drain"]["failed"] == 0 and found["node-drain"]["recovery_seconds"] > 0
    all_ready(admin)
    assert not before & {pod["metadata"]["uid"] for pod in admin.list(f"/api/v1/namespaces/{SERVING}/pods")}
    assert not [node for node in admin.list("/api/v1/nodes") if node["spec"].get("unschedulable")]


def test_pod_security_lets_the_jobs_pod_in(admin: Admin) -> None:
    (declared,) = [item for item in made().of(":Job") if item.name.startswith("drills-")]
    whole = json.loads(json.dumps(declared.inputs), parse_float=lambda text: int(float(text)))  # Pulumi's are floats
    admin.apply(whole)
    path, name = f"/api/v1/namespaces/{SERVING}/pods", whole["metadata"]["name"]

    def of_job(found: dict[str, Any]) -> list[dict[str, Any]]:
        return [pod for pod in found["items"] if pod["metadata"]["labels"].get("job-name") == name]

    (pod,) = of_job(wait_for(admin, path, of_job))
    assert pod["spec"]["serviceAccountName"] == "drills"
    assert [item["name"] for item in pod["spec"]["containers"][0]["volumeMounts"]][-1] == "token"


PATCH = "application/merge-patch+json"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", f"/api/v1/namespaces/{SERVING}/configmaps/kube-root-ca.crt", {"data": {"ca.crt": "mine"}}),
        ("PATCH", f"/api/v1/namespaces/{TUNING}/configmaps/{FAULTS}", {}),
        ("GET", f"/api/v1/namespaces/{SERVING}/configmaps/{FAULTS}", None),
        ("DELETE", f"/api/v1/namespaces/{SERVING}/configmaps/{FAULTS}", {}),
        ("POST", f"/api/v1/namespaces/{SERVING}/configmaps", {"metadata": {"name": FAULTS}}),
        ("PATCH", f"/apis/networking.k8s.io/v1/namespaces/{SERVING}/networkpolicies/engine", {}),
        ("DELETE", f"/api/v1/namespaces/{TUNING}/pods/any", {}),
        ("GET", f"/api/v1/namespaces/{SERVING}/secrets", None),
        ("GET", f"/api/v1/namespaces/{SERVING}/pods/any/log", None),
        ("POST", f"/api/v1/namespaces/{SERVING}/pods/any/exec?command=sh", {}),
        ("POST", f"/api/v1/namespaces/{SERVING}/pods", {}),
        ("DELETE", f"/apis/apps/v1/namespaces/{SERVING}/deployments/engine", {}),
        ("GET", "/api/v1/nodes", None),
        ("DELETE", "/api/v1/nodes/any", {}),
        ("POST", "/api/v1/namespaces/kube-system/pods/any/eviction", {}),
        ("DELETE", f"/apis/networking.k8s.io/v1/namespaces/{SERVING}/networkpolicies/engine", {}),
    ],
)
def test_what_the_drills_do_not_need_is_forbidden(
    account: Api, method: str, path: str, body: dict[str, Any] | None
) -> None:
    with pytest.raises(ClusterError) as refused:
        account.ask(method, path, body, PATCH if method == "PATCH" else "application/json")
    assert refused.value.status == 403
