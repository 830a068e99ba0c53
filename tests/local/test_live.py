"""A running local cloud without its stack: pods in a network of their own, Azure under its own names, and its end.

Needs what `localcloud.live.machine` asks for and a static busybox (Debian: busybox-static), else it is skipped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.processes import wait_for as until
from common.settings import SettingsError
from localcloud.api import Api
from localcloud.images import Store
from localcloud.live import attach, machine
from localcloud.live.attach import LiveCloud
from localcloud.live.dress import AUTHORITIES
from localcloud.live.places import AZURE_ADDRESS, REGISTRY_ADDRESS
from localcloud.pods import wait_for
from localcloud.tools import Tools
from tests.engine.objects import container, deployment, namespace, pod_template
from tests.local import test_builder
from tests.local.test_runner import node

PLACE = "team"
PODS = f"/api/v1/namespaces/{PLACE}/pods"
IMAGE = "some.azurecr.io/drydock/busybox:1"
USER = {"runAsNonRoot": True, "runAsUser": 1234, "seccompProfile": {"type": "RuntimeDefault"}}


def why_not() -> str:
    try:
        machine.check(Path("/tmp"), Path("/tmp"))
    except SettingsError as error:
        return "; ".join(error.problems)
    return test_builder.why_not()


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def cloud(tools: Tools, place: Path) -> Iterator[LiveCloud]:
    """Up, with one node and one image, `IMAGE`."""
    found = attach.start(place / "cloud", place / "images")
    try:
        store, log = Store(place / "images"), place / "build.log"
        name = test_builder.busybox(store, log)
        host = found.registry.removeprefix("http://")
        assert store.run("push", "--tls-verify=false", name, f"docker://{host}/drydock/busybox:1", log=log) == 0
        with found.api() as api:
            node(api, "one")
            api.apply(namespace(PLACE))
            wait_for(api, f"/api/v1/namespaces/{PLACE}/serviceaccounts", lambda item: item["items"])
        yield found
    finally:
        attach.stop(place / "cloud")


@pytest.fixture
def api(cloud: LiveCloud) -> Iterator[Api]:
    with cloud.api() as api:
        yield api


def pod(api: Api, name: str, image: str = IMAGE, script: str = "true", **more: Any) -> None:
    main = container("main", image=image, command=["sh", "-c", script], **more)
    wanted = pod_template({"app": name}, [main], restartPolicy="Never", securityContext=USER)
    metadata = {"name": name, "namespace": PLACE, "labels": {"app": name}}
    api.apply({"apiVersion": "v1", "kind": "Pod", **wanted, "metadata": metadata})


def said(api: Api, name: str) -> str:
    """All that the pod has said, once it has succeeded."""
    wait_for(api, f"{PODS}/{name}", lambda item: item["status"].get("phase") == "Succeeded", 60)
    status, body = api.proxied(f"{PODS}/{name}/log")
    assert status == 200
    return body.decode()


def waits_for(api: Api, name: str, reason: str) -> str:
    """The message with which the pod's container waits because of `reason`."""

    def waiting(item: dict[str, Any]) -> dict[str, str]:
        states = item["status"].get("containerStatuses") or [{"state": {}}]
        return dict(states[0]["state"].get("waiting", {}))

    found = wait_for(api, f"{PODS}/{name}", lambda item: waiting(item).get("reason") == reason, 30)
    return waiting(found)["message"]


def test_pods_answer_behind_a_service_and_each_of_them_gets_its_share(api: Api) -> None:
    web = container("web", image=IMAGE, command=["httpd", "-f", "-p", "8080", "-h", "/etc"])
    api.apply(deployment("web", PLACE, 2, pod_template({"app": "web"}, [web], securityContext=USER)))
    service = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}
    metadata = {"name": "web", "namespace": PLACE}
    api.apply({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service})
    slices = f"/apis/discovery.k8s.io/v1/namespaces/{PLACE}/endpointslices"

    def both(found: dict[str, Any]) -> bool:
        endpoints = [one for item in found["items"] for one in item.get("endpoints") or []]
        return len([one for one in endpoints if one["conditions"]["ready"]]) == 2

    wait_for(api, slices, both, 60)
    # kube-proxy hears of endpoints a moment after their readiness; from then on every request is answered.
    ask = "wget -q -O - http://web.team.svc.cluster.local/hostname"
    pod(
        api,
        "client",
        script=f"until {ask}; do sleep 0.2; done 2>/dev/null; for i in $(seq 40); do {ask} || exit 1; done",
    )
    names = {item["metadata"]["name"] for item in api.list(PODS, labelSelector="app=web")}
    assert set(said(api, "client").split()) == names


def test_a_pod_reaches_the_api_server_and_finds_azure_by_its_names(api: Api) -> None:
    pod(
        api,
        "looks",
        script=f"echo | nc -w 5 $KUBERNETES_SERVICE_HOST 443 >/dev/null && grep -c BEGIN {AUTHORITIES} && cat /etc/hosts",
    )
    lines = said(api, "looks").splitlines()
    assert int(lines[0]) > 1, "this machine's authorities, and the cloud's own"
    azure = next(line for line in lines if "login.microsoftonline.com" in line)
    assert "huggingface.co" in azure
    address = azure.split()[0]
    pod(api, "asks", script=f"echo | nc -w 5 {address} 443 >/dev/null && echo open")
    assert said(api, "asks") == "open\n"


def test_the_registry_alone_can_be_out_of_pods_reach(cloud: LiveCloud, api: Api) -> None:
    ask = "echo | nc -w 5 $address 443 >/dev/null 2>&1 && echo open || echo shut"
    script = f"for address in {REGISTRY_ADDRESS} {AZURE_ADDRESS}; do {ask}; done"
    for name, reachable, expected in (("before", True, "open"), ("away", False, "shut"), ("again", True, "open")):
        cloud.reach_registry(reachable)
        pod(api, name, script=script)
        assert said(api, name) == f"{expected}\nopen\n"
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
        assert attach.AWAY not in tables, "this machine's own are not touched"


def test_what_does_not_start_says_so_as_a_cluster_does(api: Api) -> None:
    pod(api, "digest", image=f"some.azurecr.io/drydock/busybox@sha256:{'0' * 64}")
    secret = {"name": "absent", "key": "token"}
    pod(api, "secret", env=[{"name": "TOKEN", "valueFrom": {"secretKeyRef": secret}}])
    assert "MANIFEST_UNKNOWN" in waits_for(api, "digest", "ErrImagePull").upper().replace(" ", "_")
    assert waits_for(api, "secret", "CreateContainerConfigError") == 'secret "absent" not found'


def test_killed_outright_it_leaves_nothing_and_comes_back_with_what_it_had(cloud: LiveCloud, api: Api) -> None:
    everything = [process.pid for process in psutil.Process(cloud.pid).children(recursive=True)]
    assert len(everything) > 8, "etcd, API server, controllers, scheduler, kube-proxy, registries, Azurite, pods"
    os.kill(cloud.pid, signal.SIGKILL)
    until(lambda: not any(_runs(pid) for pid in everything), 10, "the end of all processes", lambda: None)
    mounts = Path("/proc/mounts").read_text()
    assert str(cloud.folder) not in mounts and str(cloud.folder.parent / "images") not in mounts
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert "kube-proxy" not in tables
    began = time.monotonic()
    again = attach.start(cloud.folder, cloud.folder.parent / "images")
    assert time.monotonic() - began < attach.START_SECONDS
    with again.api() as other:
        assert other.find(f"/api/v1/namespaces/{PLACE}") is not None
        wait_for(
            other,
            f"/apis/apps/v1/namespaces/{PLACE}/deployments/web",
            lambda item: item["status"].get("readyReplicas") == 2,
            60,
        )
    assert attach.stop(cloud.folder) and not attach.stop(cloud.folder)
    attach.remove(cloud.folder)
    assert not cloud.folder.exists()


def test_a_folder_of_something_else_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(SettingsError, match="not the folder of a local cloud"):
        attach.remove(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
