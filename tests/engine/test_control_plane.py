"""The control plane by itself: it starts, lasts, ends, and behaves as one of AKS with nodes that work."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from infra.kubeconfig import for_kubelogin
from infra.network import POD_CIDR, SERVICE_CIDR
from localcloud import control_plane
from localcloud.api import Api, ApiError
from localcloud.control_plane import ControlPlane, ControlPlaneError
from localcloud.nodes import DRAIN_SECONDS, nodes_of, sync
from localcloud.pods import evict, pod_path, wait_for
from localcloud.tools import Tools
from tests.engine.objects import container, deployment, job, namespace, pod_template

ROOT = Path(__file__).parents[2]
PLACE = "team"
POOL_ID = "/subscriptions/1/resourceGroups/g/providers/Microsoft.ContainerService/managedClusters/c/agentPools/apps"
POOL = {
    "agentPoolName": "apps",
    "vmSize": "Standard_D4ds_v5",
    "enableAutoScaling": True,
    "count": 1,
    "maxCount": 3,
    "availabilityZones": ["1", "2", "3"],
    "nodeLabels": {"drydock/pool": "apps"},
}
GPU_POOL = POOL | {
    "agentPoolName": "a100",
    "vmSize": "Standard_NC24ads_A100_v4",
    "maxCount": 2,
    "nodeLabels": {"drydock/pool": "a100"},
    "nodeTaints": ["sku=gpu:NoSchedule"],
}


def nodes(pool: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return nodes_of(pool | changes, cluster="test-aks", location="westeurope")


@pytest.fixture(scope="module")
def plane(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane"), tools) as plane:
        yield plane


@pytest.fixture(scope="module")
def api(plane: ControlPlane) -> Iterator[Api]:
    """A cluster with three small nodes, two with a GPU, and a namespace."""
    with plane.client() as api:
        sync(api, POOL_ID, nodes(POOL))
        sync(api, f"{POOL_ID}-gpu", nodes(GPU_POOL))
        api.apply(namespace(PLACE))
        yield api


def pods(api: Api, app: str) -> list[dict[str, Any]]:
    return api.list(f"/api/v1/namespaces/{PLACE}/pods", labelSelector=f"app={app}")


def available(api: Api, name: str, replicas: int) -> None:
    path = f"/apis/apps/v1/namespaces/{PLACE}/deployments/{name}"
    wait_for(api, path, lambda found: found["status"].get("availableReplicas") == replicas)


def test_it_looks_like_a_cluster_of_aks(plane: ControlPlane, api: Api, tools: Tools) -> None:
    names = {item["metadata"]["name"] for item in api.list("/api/v1/namespaces")}
    assert {"default", "kube-system", "kube-public", "kube-node-lease"} <= names
    crds = {crd["metadata"]["name"]: crd for crd in api.list("/apis/apiextensions.k8s.io/v1/customresourcedefinitions")}
    assert {path.stem.rpartition("_")[2] for path in tools.crds.glob("*.yaml")} == {name.split(".")[0] for name in crds}
    for crd in crds.values():
        assert {"type": "Established", "status": "True"}.items() <= {
            key: value
            for item in crd["status"]["conditions"]
            if item["type"] == "Established"
            for key, value in item.items()
        }.items()
    assert api.path_of({"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "x"}})
    assert (POD_CIDR, SERVICE_CIDR) == (control_plane.POD_CIDR, control_plane.SERVICE_CIDR)


def test_only_who_holds_the_token_and_the_authority_gets_in(plane: ControlPlane) -> None:
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{plane.server}/api", timeout=5)
    assert requests.get(f"{plane.server}/api/v1/nodes", verify=str(plane.ca_file), timeout=5).status_code in (401, 403)
    with pytest.raises(ApiError) as refused, Api(plane.server, "wrong", plane.ca_file) as stranger:
        stranger.list("/api/v1/nodes")
    assert refused.value.status == 401
    modes = {
        name: (plane.folder / name).stat().st_mode & 0o777 for name in ("cluster.json", "kubeconfig", "tokens.csv")
    }
    assert modes == dict.fromkeys(modes, 0o600)


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_the_program_signs_in_as_it_would_to_aks(plane: ControlPlane, version: str) -> None:
    written = yaml.safe_load(plane.kubeconfig)
    assert written["users"][0]["user"]["exec"]["args"][-2:] == ["--login", "devicecode"]
    document = yaml.safe_load(for_kubelogin(plane.kubeconfig))
    command = document["users"][0]["user"]["exec"]
    asked = {"kind": "ExecCredential", "apiVersion": f"client.authentication.k8s.io/{version}", "spec": {}}
    done = subprocess.run(
        [plane.folder / "bin" / command["command"], *command["args"]],
        env={"KUBERNETES_EXEC_INFO": json.dumps(asked, separators=(",", ":"))},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["apiVersion"] == asked["apiVersion"]
    with Api(document["clusters"][0]["cluster"]["server"], answer["status"]["token"], plane.ca_file) as found:
        assert found.get("/version")["major"] == "1"


def test_the_stand_in_for_kubelogin_refuses_what_would_wait_for_a_person(plane: ControlPlane) -> None:
    command = yaml.safe_load(plane.kubeconfig)["users"][0]["user"]["exec"]
    kubelogin = plane.folder / "bin" / "kubelogin"
    done = subprocess.run([kubelogin, *command["args"]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "") and "waits for a person" in done.stderr
    done = subprocess.run([kubelogin, "get-token"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "") and "--server-id" in done.stderr


def test_what_others_read(plane: ControlPlane) -> None:
    written = json.loads((plane.folder / "cluster.json").read_text())
    assert written == {
        "server": plane.server,
        "token": plane.token,
        "ca_file": str(plane.ca_file),
        "kubeconfig": plane.kubeconfig,
        "kubelet": "kwok",
        "autoscaler": False,
    }
    person = yaml.safe_load((plane.folder / "kubeconfig").read_text())
    assert person["users"][0]["user"] == {"token": plane.token}
    assert person["clusters"] == yaml.safe_load(plane.kubeconfig)["clusters"]


def test_nodes_are_ready_without_a_kubelet_and_their_leases_are_renewed(api: Api) -> None:
    found = api.list("/api/v1/nodes")
    assert len(found) == 5
    for node in found:
        conditions = {item["type"]: item["status"] for item in node["status"]["conditions"]}
        assert conditions["Ready"] == "True" and conditions["MemoryPressure"] == "False"
        assert not any(taint["key"].startswith("node.kubernetes.io/") for taint in node["spec"].get("taints", []))
        lease = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{node['metadata']['name']}"
        wait_for(api, lease, lambda held: held.get("spec", {}).get("renewTime"))


def test_a_changed_pool_changes_its_nodes_and_a_smaller_one_is_drained(api: Api) -> None:
    pool_id = f"{POOL_ID}-other"
    other = POOL | {"agentPoolName": "other", "nodeLabels": {"drydock/pool": "other"}}
    sync(api, pool_id, nodes(other, maxCount=2))
    template = pod_template({"app": "moving"}, nodeSelector={"drydock/pool": "other"})
    api.apply(deployment("moving", PLACE, 4, template))
    available(api, "moving", 4)
    first, second = (node["metadata"]["name"] for node in nodes(other, maxCount=2))
    assert {pod["spec"]["nodeName"] for pod in pods(api, "moving")} == {first, second}

    started = time.monotonic()
    sync(api, pool_id.upper(), nodes(other, maxCount=1, nodeLabels={"drydock/pool": "other", "new": "1"}))
    assert time.monotonic() - started < DRAIN_SECONDS  # its pods went when they were asked to
    assert api.find(f"/api/v1/nodes/{second}") is None
    kept = api.get(f"/api/v1/nodes/{first}")
    assert kept["metadata"]["labels"]["new"] == "1" and not kept["spec"].get("unschedulable")
    available(api, "moving", 4)
    assert {pod["spec"]["nodeName"] for pod in pods(api, "moving")} == {first}

    sync(api, pool_id, nodes(other, maxCount=1))
    assert "new" not in api.get(f"/api/v1/nodes/{first}")["metadata"]["labels"]
    api.delete(f"/apis/apps/v1/namespaces/{PLACE}/deployments/moving", propagationPolicy="Foreground")
    sync(api, pool_id, [])
    assert api.find(f"/api/v1/nodes/{first}") is None
    assert len(api.list("/api/v1/nodes")) == 5


def test_pods_run_with_sidecars_and_vanish_in_order(api: Api) -> None:
    template = pod_template(
        {"app": "whole"},
        initContainers=[container("fetch"), container("sidecar", restartPolicy="Always")],
        readinessGates=[{"conditionType": "example.com/ready"}],
    )
    template["spec"]["containers"][0]["readinessProbe"] = {"httpGet": {"path": "/", "port": 1}}  # nobody asks it
    api.apply(deployment("whole", PLACE, 1, template))
    available(api, "whole", 1)
    [pod] = pods(api, "whole")
    status = pod["status"]
    assert status["phase"] == "Running"
    assert status["podIP"].startswith(POD_CIDR[:8]) and status["hostIP"].startswith("10.224.")
    assert {item["type"]: item["status"] for item in status["conditions"]}.items() >= {
        "PodScheduled": "True",
        "Initialized": "True",
        "ContainersReady": "True",
        "Ready": "True",
    }.items()
    [main] = status["containerStatuses"]
    assert (main["ready"], main["started"], list(main["state"])) == (True, True, ["running"])
    fetch, sidecar = status["initContainerStatuses"]
    assert fetch["state"]["terminated"]["exitCode"] == 0 and fetch["ready"]
    assert (sidecar["ready"], sidecar["started"], list(sidecar["state"])) == (True, True, ["running"])

    path = pod_path(PLACE, pod["metadata"]["name"])
    api.delete(path)
    assert api.find(path)["metadata"]["deletionTimestamp"]  # type: ignore[index]  # it takes a moment to end
    wait_for(api, path, lambda found: not found, 5)
    available(api, "whole", 1)  # another in its place


def test_pods_spread_over_nodes_and_zones(api: Api) -> None:
    spread = [
        {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"app": "spread"}},
        }
        for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
    ]
    template = pod_template({"app": "spread"}, topologySpreadConstraints=spread, nodeSelector={"drydock/pool": "apps"})
    api.apply(deployment("spread", PLACE, 3, template))
    available(api, "spread", 3)
    zones = {
        node["metadata"]["name"]: node["metadata"]["labels"]["topology.kubernetes.io/zone"]
        for node in api.list("/api/v1/nodes")
    }
    used = {zones[pod["spec"]["nodeName"]] for pod in pods(api, "spread")}
    assert used == {"westeurope-1", "westeurope-2", "westeurope-3"}


def test_a_disruption_budget_forbids_what_it_should(api: Api) -> None:
    api.apply(deployment("guarded", PLACE, 2, pod_template({"app": "guarded"})))
    available(api, "guarded", 2)
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "guarded", "namespace": PLACE},
        "spec": {"minAvailable": 2, "selector": {"matchLabels": {"app": "guarded"}}},
    }
    api.apply(budget)
    path = f"/apis/policy/v1/namespaces/{PLACE}/poddisruptionbudgets/guarded"
    wait_for(api, path, lambda found: found.get("status", {}).get("currentHealthy") == 2)
    one, _ = (pod["metadata"]["name"] for pod in pods(api, "guarded"))
    with pytest.raises(ApiError) as refused:
        evict(api, PLACE, one)
    assert refused.value.status == 429
    api.patch(path, {"spec": {"minAvailable": 1}})
    wait_for(api, path, lambda found: found["status"]["disruptionsAllowed"] == 1)
    evict(api, PLACE, one)


def test_pod_security_refuses(api: Api) -> None:
    privileged = pod_template({"app": "bad"}, hostNetwork=True)
    with pytest.raises(ApiError, match="violates PodSecurity") as refused:
        api.post(
            f"/api/v1/namespaces/{PLACE}/pods",
            {"apiVersion": "v1", "kind": "Pod", **privileged, "metadata": {"name": "bad"}},
        )
    assert refused.value.status == 403


def test_a_job_beyond_the_quota_of_gpus_waits_and_then_completes(api: Api) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "quota", "namespace": "gpus"},
        "spec": {"hard": {"requests.nvidia.com/gpu": "0"}},
    }
    api.apply(namespace("gpus"))
    api.apply(quota)
    one_gpu = {"limits": {"nvidia.com/gpu": "1"}}
    template = pod_template(
        {"app": "gpu"},
        [container("main", resources=one_gpu)],
        nodeSelector={"drydock/pool": "a100"},
        tolerations=[{"key": "sku", "value": "gpu", "effect": "NoSchedule"}],
    )
    api.apply(job("gpu", "gpus", template))
    wait_for(
        api,
        "/api/v1/namespaces/gpus/events",
        lambda found: any("exceeded quota" in event["message"] for event in found["items"]),
    )
    assert api.list("/api/v1/namespaces/gpus/pods") == []
    api.apply({**quota, "spec": {"hard": {"requests.nvidia.com/gpu": "1"}}})
    done = wait_for(
        api, "/apis/batch/v1/namespaces/gpus/jobs/gpu", lambda found: found["status"].get("succeeded") == 1, 60
    )
    assert {"type": "Complete", "status": "True"}.items() <= done["status"]["conditions"][-1].items()
    [pod] = api.list("/api/v1/namespaces/gpus/pods")
    assert pod["status"]["phase"] == "Succeeded"
    assert pod["spec"]["nodeName"].startswith("aks-a100-")


def broken(tmp_path: Path) -> Path:
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho 'the reason why'\nexit 3\n")
    program.chmod(0o755)
    return program


def left(folder: Path) -> list[str]:
    """The programs that still run for `folder`; one that is dead counts no more, though nobody has asked for it yet."""
    found = []
    for process in psutil.process_iter(["cmdline", "status", "name"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(folder) in " ".join(process.info["cmdline"] or ()):
            found.append(process.info["name"])
    return found


def test_killed_outright_nothing_is_left_but_the_cluster_that_is_there_again(tools: Tools, tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from localcloud.control_plane import ControlPlane\n"
        "from localcloud.tools import locate\n"
        "with ControlPlane(pathlib.Path(sys.argv[1]), locate()):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    folder, path = tmp_path / "folder", "/apis/apps/v1/namespaces/default/deployments/kept"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        assert len(left(folder)) == 6  # five programs and the one above
        first = json.loads((folder / "cluster.json").read_text())
        with Api(first["server"], first["token"], Path(first["ca_file"])) as api:
            sync(api, POOL_ID, nodes(POOL, maxCount=1))
            api.apply(deployment("kept", "default", 1, pod_template({"app": "kept"})))
            wait_for(api, path, lambda found: found["status"].get("readyReplicas"))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 5
    while left(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left(folder) == []

    with ControlPlane(folder, tools) as plane, plane.client() as api:
        assert json.loads((folder / "cluster.json").read_text()) == first
        [pod] = api.list("/api/v1/namespaces/default/pods")
        assert pod["status"]["phase"] == "Running"
        # Nodes work again at once, not only when the leases of the start before have run out.
        api.apply(deployment("kept", "default", 2, pod_template({"app": "kept"})))
        wait_for(api, path, lambda found: found["status"].get("readyReplicas") == 2, 15)
    assert left(folder) == []


def test_an_address_that_is_taken_is_told(tools: Tools, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, fails = tmp_path / "folder", dataclasses.replace(tools, etcd=broken(tmp_path))
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (folder / "cluster.json").write_text(json.dumps({"server": f"https://127.0.0.1:{port}"}))
        plane = ControlPlane(folder, fails)
        with pytest.raises(ControlPlaneError), plane:
            pass
    assert plane.server != f"https://127.0.0.1:{port}"
    assert f"port {port} is taken meanwhile: the cluster's address is now {plane.server}" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["etcd", "kube_apiserver"])
def test_a_program_that_ends_is_named_with_the_end_of_its_log(tools: Tools, tmp_path: Path, program: str) -> None:
    fails = dataclasses.replace(tools, **{program: broken(tmp_path)})
    folder = tmp_path / "folder"
    told = rf"(?s){program.replace('_', '-')} ended with 3.*the reason why"
    with pytest.raises(ControlPlaneError, match=told), ControlPlane(folder, fails):
        pass
    assert left(folder) == []
