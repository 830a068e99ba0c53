"""Pods that really run: the pod runner against the real API server, controllers and scheduler, with busybox as image.

Needs root, iproute2, overlayfs and a static busybox (Debian: busybox-static), else it is skipped.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from localcloud.api import Api
from localcloud.control_plane import ControlPlane
from localcloud.pods import evict, wait_for
from localcloud.runner.images import Image, ImageMissing
from localcloud.runner.logs import log_files, read_log
from localcloud.runner.network import Network
from localcloud.runner.node import ANNOTATION
from localcloud.runner.runner import Runner, problems
from localcloud.tools import Tools
from tests.engine.objects import container, deployment, job, namespace, pod_template

PLACE = "team"
PODS = f"/api/v1/namespaces/{PLACE}/pods"
NODE = "runs-really"
USER = 1234
CIDR = "192.168.250.0/24"
SERVE = "mkdir -p /tmp/www; echo $SAID > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www"


def why_not() -> str:
    busybox = shutil.which("busybox")
    static = busybox and b"ld-linux" not in Path(busybox).read_bytes()[:4096]  # its interpreter
    return "; ".join([*problems(), *([] if static else ["a static busybox is needed: install busybox-static"])])


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


class Busybox:
    """One image for every reference but those that say `missing`; `mounted` is first mounted when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.rootfs = folder
        for name in ("bin", "etc", "tmp"):
            (folder / name).mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        (folder / "etc" / "passwd").write_text(
            f"root:x:0:0::/root:/bin/sh\nperson:x:{USER}:{USER}::/home/person:/bin/sh\n"
        )
        shutil.copy(str(shutil.which("busybox")), folder / "bin" / "busybox")
        subprocess.run(["chroot", str(folder), "/bin/busybox", "--install", "-s", "/bin"], check=True)

    def ensure(self, reference: str) -> Image:
        if "missing" in reference:
            raise ImageMissing(f"manifest unknown: {reference}")
        root = self.rootfs.with_name("mounted") if "mounted" in reference else self.rootfs
        if root != self.rootfs:
            root.mkdir(exist_ok=True)
            subprocess.run(["mount", "--bind", str(self.rootfs), str(root)], check=True)
        return Image(root, id=reference, user=str(USER), env=("FROM_IMAGE=yes",), cmd=("sh", "-c", "exit 7"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runner")


@pytest.fixture(scope="module")
def plane(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane"), tools) as plane:
        yield plane


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busybox]:
    images = Busybox(tmp_path_factory.mktemp("image") / "rootfs")
    yield images
    subprocess.run(["umount", str(images.rootfs.with_name("mounted"))], capture_output=True, check=False)


@pytest.fixture(scope="module")
def api(plane: ControlPlane, folder: Path, images: Busybox) -> Iterator[Api]:
    with plane.client() as api:
        node(api, NODE)
        api.apply(namespace(PLACE))
        runner = Runner(
            api, images, folder, service_host="10.9.9.9", service_port=6443, network=Network(CIDR), backoff_seconds=1,
            refresh_seconds=1,
        )  # fmt: skip
        with runner:
            wait_for(api, f"/api/v1/nodes/{NODE}", lambda found: not found["spec"].get("taints"))
            wait_for(api, f"/api/v1/namespaces/{PLACE}/serviceaccounts", lambda found: found["items"])
            yield api


def node(api: Api, name: str, **labels: str) -> None:
    size = {"cpu": "8", "memory": "8Gi", "pods": "100", "nvidia.com/gpu": "1"}
    metadata = {"name": name, "annotations": {ANNOTATION: "true"}, "labels": {"kubernetes.io/hostname": name, **labels}}
    api.apply({"apiVersion": "v1", "kind": "Node", "metadata": metadata})
    status = {"capacity": size, "allocatable": size, "addresses": [{"type": "InternalIP", "address": "10.224.0.9"}]}
    api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": status}, "status")


def shell(name: str, script: str, **more: Any) -> dict[str, Any]:
    return container(name, command=["sh", "-c", script], **more)


def pod(api: Api, name: str, *containers: dict[str, Any], **spec: Any) -> None:
    wanted = pod_template({"app": name}, list(containers), **{"restartPolicy": "Never", **spec})
    api.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            **wanted,
            "metadata": {"name": name, "namespace": PLACE, "labels": {"app": name}},
        }
    )


def ends(api: Api, name: str, phase: str = "Succeeded", seconds: float = 20) -> dict[str, Any]:
    return wait_for(api, f"{PODS}/{name}", lambda found: found and found["status"].get("phase") == phase, seconds)


def ready(item: dict[str, Any]) -> bool:
    conditions = {each["type"]: each["status"] for each in item.get("status", {}).get("conditions", [])}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in item["metadata"]


def of(api: Api, app: str, count: int, seconds: float = 20) -> list[dict[str, Any]]:
    """The Ready pods of `app`, once there are so many."""

    def chosen(found: dict[str, Any]) -> list[dict[str, Any]]:
        return [item for item in found["items"] if item["metadata"]["labels"]["app"] == app and ready(item)]

    return chosen(wait_for(api, PODS, lambda found: len(chosen(found)) == count, seconds))


def answer(item: dict[str, Any]) -> str:
    with urllib.request.urlopen(f"http://{item['status']['podIP']}:8080/", timeout=5) as said:
        return str(said.read().decode().strip())


def processes(word: str) -> list[int]:
    """The processes of this machine with `word` among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if word.encode() in words:
            found.append(int(path.parent.name))
    return found


def serving(name: str, replicas: int, said: str) -> dict[str, Any]:
    main = shell(
        "main", SERVE, env=[{"name": "SAID", "value": said}], ports=[{"name": "http", "containerPort": 8080}],
        readinessProbe={"httpGet": {"port": "http"}, "periodSeconds": 1},
        lifecycle={"preStop": {"sleep": {"seconds": 1}}},
    )  # fmt: skip
    return deployment(name, PLACE, replicas, pod_template({"app": name}, [main], terminationGracePeriodSeconds=5))


def test_a_job_whose_container_exits_with_2_is_ended_by_its_failure_policy(api: Api, folder: Path) -> None:
    volume = {"volumeMounts": [{"name": "work", "mountPath": "/work"}]}
    template = pod_template(
        {"app": "code"},
        [shell("tune", "cat /work/first; id -u; exit 2", **volume, resources={"limits": {"nvidia.com/gpu": "1"}})],
        initContainers=[shell("fetch", "echo fetched > /work/first", **volume)],
        volumes=[{"name": "work", "emptyDir": {}}],
    )
    policy = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]}
    api.apply(job("code", PLACE, template, podFailurePolicy=policy, backoffLimit=3))
    found = wait_for(api, f"/apis/batch/v1/namespaces/{PLACE}/jobs/code", lambda item: item["status"].get("failed"))
    reasons = [item["reason"] for item in found["status"]["conditions"] if item["type"] == "FailureTarget"]
    assert reasons == ["PodFailurePolicy"]
    (one,) = api.list(PODS, labelSelector="app=code")
    status = one["status"]
    assert status["phase"] == "Failed"
    assert status["initContainerStatuses"][0]["state"]["terminated"]["reason"] == "Completed"
    assert status["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 2
    assert status["containerStatuses"][0]["state"]["terminated"]["reason"] == "Error"
    assert read_log(folder, PLACE, one["metadata"]["name"], "tune") == f"fetched\n{USER}\n"


def test_replicas_are_ready_by_their_probe_and_come_back_after_a_kill_and_roll(api: Api, folder: Path) -> None:
    api.apply(serving("web", 2, "one"))
    first = of(api, "web", 2)
    assert [answer(item) for item in first] == ["one", "one"]
    assert len({item["status"]["podIP"] for item in first}) == 2
    victim = processes("/tmp/www")[0]
    os.kill(victim, signal.SIGKILL)

    def restarted(found: dict[str, Any]) -> bool:
        counts = [item["status"]["containerStatuses"][0]["restartCount"] for item in found["items"]]
        return sorted(counts) == [0, 1] and all(ready(item) for item in found["items"])

    pods = wait_for(api, PODS, lambda found: restarted(
        {"items": [item for item in found["items"] if item["metadata"]["labels"]["app"] == "web"]}))  # fmt: skip
    again = [
        item["status"]["containerStatuses"][0] for item in pods["items"] if item["metadata"]["labels"]["app"] == "web"
    ]
    ended = [item["lastState"]["terminated"] for item in again if item["restartCount"]]
    assert [(item["exitCode"], item["reason"]) for item in ended] == [(137, "Error")]
    assert {item["metadata"]["uid"] for item in of(api, "web", 2)} == {item["metadata"]["uid"] for item in first}
    api.apply(serving("web", 2, "two"))
    wait_for(
        api,
        PODS,
        lambda found: (
            sorted(
                item["spec"]["containers"][0]["env"][0]["value"]
                for item in found["items"]
                if item["metadata"]["labels"]["app"] == "web" and ready(item)
            )
            == ["two", "two"]
        ),
    )
    second = of(api, "web", 2)
    assert [answer(item) for item in second] == ["two", "two"]
    pod(api, "client", shell("main", f"wget -qO- http://{second[0]['status']['podIP']}:8080"))
    ends(api, "client")
    assert read_log(folder, PLACE, "client", "main") == "two\n"


def test_pre_stop_then_sigterm_within_the_grace_then_sigkill(api: Api, folder: Path) -> None:
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "echo hook > /proc/1/fd/1; sleep 1"]}}}
    wait = "while :; do sleep 0.1; done"
    gentle = shell("gentle", f"trap 'echo asked; exit 0' TERM; {wait}", lifecycle=hook)
    pod(api, "stops", gentle, shell("stubborn", f"trap 'echo no' TERM; {wait}"), terminationGracePeriodSeconds=60)
    ends(api, "stops", "Running")
    wait_for(api, f"{PODS}/stops", ready)
    started = time.monotonic()
    api.delete(f"{PODS}/stops", gracePeriodSeconds="3")
    wait_for(api, f"{PODS}/stops", lambda found: not found)
    assert 2.9 < time.monotonic() - started < 8
    assert read_log(folder, PLACE, "stops", "gentle") == "hook\nasked\n"
    assert read_log(folder, PLACE, "stops", "stubborn") == "no\n"


def test_what_a_container_finds_inside(api: Api, folder: Path, plane: ControlPlane) -> None:
    for kind, name in (("ConfigMap", "settings"), ("Secret", "keys")):
        data = {"data" if kind == "ConfigMap" else "stringData": {"one": "1", "two.txt": "line"}}
        api.apply({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": PLACE}, **data})
    env = [
        {"name": "PLAIN", "value": "a-$(FROM_one)-$(NOBODY)-$$(PLAIN)"},
        {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "two.txt"}}},
        {"name": "OPTIONAL", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "none", "optional": True}}},
        {"name": "ME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "MIB", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
    ]
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
    ]
    volumes = [
        {"name": "settings", "configMap": {"name": "settings"}},
        {"name": "keys", "secret": {"secretName": "keys", "defaultMode": 0o400}},
        {"name": "all", "projected": {"sources": sources}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "disk", "emptyDir": {}},
    ]
    mounts = [
        {"name": "settings", "mountPath": "/settings"},
        {"name": "settings", "mountPath": "/single.txt", "subPath": "two.txt"},
        {"name": "keys", "mountPath": "/keys"},
        {"name": "all", "mountPath": "/all"},
        {"name": "memory", "mountPath": "/dev/shm"},
        {"name": "memory", "mountPath": "/inner", "subPath": "inner"},
        {"name": "disk", "mountPath": "/disk"},
        {"name": "disk", "mountPath": "/unwritable", "readOnly": True},
    ]
    script = """
        echo $PLAIN $SECRET [$OPTIONAL] $ME $MIB $FROM_IMAGE $HOME $HOSTNAME $KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT
        cat /settings/one /single.txt /keys/two.txt; echo; cat /all/labels; echo
        stat -Lc '%a %g' /keys/two.txt /all/token
        id -u; id -g; id -G; pwd; cat /etc/hostname; grep $IP /etc/hosts | wc -l; grep -c search /etc/resolv.conf
        dd if=/dev/zero of=/dev/shm/big bs=64k count=32 2>/dev/null || echo full; rm /dev/shm/big
        echo x > /inner/x && cat /dev/shm/inner/x; echo x > /disk/x && stat -c '%u %g' /disk/x
        for file in /unwritable/x /x /sys/x /settings/x; do echo x 2>/dev/null > $file || echo no $file; done
        ls /sys/devices/system/cpu | grep -c online; echo x > /dev/null; head -c 4 /dev/urandom | wc -c
        echo $$$$; grep -E 'CapBnd|NoNewPrivs' /proc/self/status; echo said > /dev/termination-log
        cat /all/token; echo; wc -l < /all/ca.crt
    """
    one = shell(
        "one", script, env=env, envFrom=[{"prefix": "FROM_", "configMapRef": {"name": "settings"}}], volumeMounts=mounts,
        workingDir="/new/folder", resources={"limits": {"memory": "64Mi"}},
    )  # fmt: skip
    one["image"] = "example.com/mounted:1"
    one["securityContext"]["readOnlyRootFilesystem"] = True
    security = {
        "runAsNonRoot": True, "runAsUser": 2000, "runAsGroup": 3000, "fsGroup": 4000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    pod(api, "inside", one, volumes=volumes, securityContext=security)
    status = ends(api, "inside")["status"]
    assert status["containerStatuses"][0]["state"]["terminated"]["message"] == "said\n"
    *lines, token, ca_lines = read_log(folder, PLACE, "inside", "one").splitlines()
    assert lines == [
        "a-1-$(NOBODY)-$(PLAIN) line [] inside 64 yes / inside 10.9.9.9:6443", "1linelin" "e", 'app="inside"',
        "440 4000", "640 4000", "2000", "3000", "3000 4000", "/new/folder", "inside", "1", "1", "full", "x", "2000 4000",
        "no /unwritable/x", "no /x", "no /sys/x", "no /settings/x", "1", "4", "1",
        "CapBnd:\t0000000000000000", "NoNewPrivs:\t1",
    ]  # fmt: skip
    assert int(ca_lines) > 10
    session = requests.Session()
    session.trust_env = False
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    who = session.post(
        f"{plane.server}/apis/authentication.k8s.io/v1/selfsubjectreviews",
        json=review,
        headers={"Authorization": f"Bearer {token}"},
        verify=str(plane.ca_file),
        timeout=10,
    ).json()
    assert who["status"]["userInfo"]["username"] == f"system:serviceaccount:{PLACE}:default"
    assert who["status"]["userInfo"]["extra"]["authentication.kubernetes.io/pod-name"] == ["inside"]


def test_an_evicted_pod_ends_by_sigterm_and_its_job_makes_another(api: Api, folder: Path) -> None:
    policy = {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]}
    script = "trap 'echo saved; exit 143' TERM; echo begun; while :; do sleep 0.1; done"
    template = pod_template({"app": "moved"}, [shell("tune", script)])
    api.apply(job("moved", PLACE, template, podFailurePolicy=policy, podReplacementPolicy="Failed", backoffLimit=0))
    (first,) = of(api, "moved", 1)
    evict(api, PLACE, first["metadata"]["name"])
    wait_for(api, f"{PODS}/{first['metadata']['name']}", lambda found: not found)
    assert read_log(folder, PLACE, first["metadata"]["name"], "tune") == "begun\nsaved\n"
    (second,) = of(api, "moved", 1)
    assert second["metadata"]["name"] != first["metadata"]["name"]
    assert api.get(f"/apis/batch/v1/namespaces/{PLACE}/jobs/moved")["status"].get("failed", 0) == 0


def test_a_sidecar_is_there_before_and_after_the_container(api: Api, folder: Path) -> None:
    volume = {"volumeMounts": [{"name": "work", "mountPath": "/work"}]}
    side = shell(
        "side", "trap 'echo side >> /work/order; cat /work/order; exit 0' TERM; sleep 1; touch /work/up; while :; do sleep 0.1; done",
        restartPolicy="Always", startupProbe={"exec": {"command": ["test", "-e", "/work/up"]}, "periodSeconds": 1}, **volume,
    )  # fmt: skip
    main = shell("main", "test -e /work/up && echo main >> /work/order", **volume)
    pod(api, "sided", main, initContainers=[side], volumes=[{"name": "work", "emptyDir": {}}])
    status = ends(api, "sided")["status"]
    assert read_log(folder, PLACE, "sided", "side") == "main\nside\n"
    assert {item["type"]: item["status"] for item in status["conditions"]}["Ready"] == "False"


def test_what_goes_wrong_is_seen_and_mended(api: Api, folder: Path) -> None:
    def waiting(name: str, reason: str) -> str:
        def found(item: dict[str, Any]) -> Any:
            states = [each["state"].get("waiting", {}) for each in item["status"].get("containerStatuses", [])]
            return [each.get("message", "") for each in states if each.get("reason") == reason]

        return str(found(wait_for(api, f"{PODS}/{name}", found))[0])

    missing = [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "late", "key": "key"}}}]
    pod(api, "no-image", {**container("main"), "image": "example.com/missing:1"})
    pod(api, "no-secret", shell("main", "echo $KEY", env=missing))
    pod(api, "no-program", container("main", command=["/bin/nothing"]))
    pod(api, "crashes", shell("main", "echo once; exit 1"), restartPolicy="Always")
    probe = {
        "livenessProbe": {
            "exec": {"command": ["test", "!", "-e", "/tmp/sick"]},
            "periodSeconds": 1,
            "failureThreshold": 2,
        }
    }
    pod(api, "sick", shell("main", "sleep 1; touch /tmp/sick; exec sleep 600", **probe), restartPolicy="Always",
        terminationGracePeriodSeconds=1)  # fmt: skip
    assert "manifest unknown" in waiting("no-image", "ErrImagePull")
    assert waiting("no-image", "ImagePullBackOff").startswith("Back-off pulling image")
    assert waiting("no-secret", "CreateContainerConfigError") == 'secret "late" not found'
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "late", "namespace": PLACE}}
    api.apply({**secret, "stringData": {"key": "came"}})
    ends(api, "no-secret")
    assert read_log(folder, PLACE, "no-secret", "main") == "came\n"
    ended = ends(api, "no-program", "Failed")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert "No such file" in ended["message"]
    assert "restarting failed container=main" in waiting("crashes", "CrashLoopBackOff")
    assert [path.read_text() for path in log_files(folder, PLACE, "crashes", "main")][:2] == ["once\n", "once\n"]
    restarted = wait_for(api, f"{PODS}/sick", lambda item: item["status"]["containerStatuses"][0]["restartCount"])
    assert restarted["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 137
    said = [item["reason"] for item in api.list(f"/api/v1/namespaces/{PLACE}/events")]
    assert {"Unhealthy", "Killing", "BackOff", "Failed", "Started"} <= set(said)


OTHER, OTHER_CIDR = "runs-alone", "192.168.251.0/24"


def run_until_killed(server: str, token: str, ca_file: Path, folder: Path, images: Busybox) -> None:
    with Runner(Api(server, token, ca_file), images, folder, node_names=[OTHER], network=Network(OTHER_CIDR)):
        time.sleep(600)


def traces(folder: Path) -> dict[str, Any]:
    """What a runner in `folder` could leave on this machine."""
    return {
        "mounts": [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line],
        "routes": [
            line for line in subprocess.check_output(["ip", "route"], text=True).splitlines() if "192.168.251." in line
        ],
        "namespaces": subprocess.check_output(["ip", "netns"], text=True),
        "processes": processes("86400"),
    }


def test_a_killed_runner_leaves_nothing_and_the_next_one_tells_what_was_lost(
    api: Api, plane: ControlPlane, images: Busybox, tmp_path: Path
) -> None:
    api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": OTHER}})
    nothing = {**traces(tmp_path), "mounts": [], "routes": [], "processes": []}
    first = multiprocessing.get_context("spawn").Process(
        target=run_until_killed, args=(plane.server, plane.token, plane.ca_file, tmp_path, images)
    )
    first.start()
    alone = {"nodeName": OTHER, "tolerations": [{"operator": "Exists"}], "terminationGracePeriodSeconds": 1}
    memory = {"volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}]}
    for name, policy in (("never", "Never"), ("always", "Always")):
        main = shell("main", "exec sleep 86400", volumeMounts=[{"name": "memory", "mountPath": "/memory"}])
        pod(api, name, main, restartPolicy=policy, **alone, **memory)
        wait_for(api, f"{PODS}/{name}", ready)
    assert len(traces(tmp_path)["processes"]) == len(traces(tmp_path)["routes"]) == 2
    first.kill()
    first.join()
    deadline = time.monotonic() + 5
    while traces(tmp_path) != nothing and time.monotonic() < deadline:
        time.sleep(0.1)
    assert traces(tmp_path) == nothing
    with Runner(api, images, tmp_path, node_names=[OTHER], network=Network(OTHER_CIDR)):
        state = ends(api, "never", "Failed")["status"]["containerStatuses"][0]["state"]["terminated"]
        assert (state["reason"], state["exitCode"]) == ("ContainerStatusUnknown", 137)
        again = wait_for(api, f"{PODS}/always", lambda found: found["status"]["containerStatuses"][0]["restartCount"])
        assert again["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 137
        wait_for(api, f"{PODS}/always", ready)
        assert len(processes("86400")) == 1
        api.delete(f"{PODS}/always", gracePeriodSeconds="0")  # the API server forgets it at once
        deadline = time.monotonic() + 5
        while processes("86400") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not processes("86400")
        api.delete(f"{PODS}/never")
        wait_for(api, f"{PODS}/never", lambda found: not found)
    assert traces(tmp_path) == nothing


CLONE_NEWNET = 0x40000000  # sched.h


def in_own_network(body: Callable[[], None]) -> None:
    """Run `body` in a network namespace, which its threads and processes share, and which goes with them."""

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:  # of this thread alone
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        body()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


def test_logs_come_from_the_api_server_as_kubectl_asks_for_them(tools: Tools, images: Busybox, tmp_path: Path) -> None:
    in_own_network(lambda: logs_come(tools, images, tmp_path))


def logs_come(tools: Tools, images: Busybox, tmp_path: Path) -> None:
    with ControlPlane(tmp_path / "plane", tools) as plane, plane.client() as api:
        node(api, NODE)
        api.apply(namespace(PLACE))
        wait_for(api, f"/api/v1/namespaces/{PLACE}/serviceaccounts", lambda found: found["items"])

        def log(name: str, **query: str) -> requests.Response:
            return requests.get(
                f"{plane.server}{PODS}/{name}/log", query, stream=True, timeout=10, verify=str(plane.ca_file),
                headers={"Authorization": f"Bearer {plane.token}"},
            )  # fmt: skip

        with Runner(api, images, tmp_path / "runner", kubelet_port=10250, backoff_seconds=1):
            endpoint = {"kubeletEndpoint": {"Port": 10250}}
            wait_for(api, f"/api/v1/nodes/{NODE}", lambda found: found["status"]["daemonEndpoints"] == endpoint)
            assert "10.224.0.9/32" in subprocess.check_output(["ip", "addr", "show", "dev", "lo"], text=True)
            talk = "echo one; echo two; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo three"
            pod(api, "talks", shell("main", talk))
            pod(api, "no-image", {**container("main"), "image": "example.com/missing:1"})
            pod(api, "crashes", shell("main", "echo $HOSTNAME; exit 1"), restartPolicy="Always")
            ends(api, "talks", "Running")
            followed = log("talks", follow="true")
            lines = followed.iter_lines(chunk_size=1)
            assert [next(lines), next(lines)] == [b"one", b"two"]
            assert log("talks", tailLines="1").text == "two\n"
            (sleeper,) = processes(talk)
            Path("/proc", str(sleeper), "root", "tmp", "go").touch()
            assert list(lines) == [b"three"]
            ends(api, "talks")
            assert log("talks", limitBytes="5").text == "one\nt"

            def status(found: dict[str, Any]) -> dict[str, Any]:
                return dict((found["status"].get("containerStatuses") or [{}])[0])

            wait_for(api, f"{PODS}/no-image", lambda found: "ImagePullBackOff" in str(status(found).get("state")))
            none = log("no-image")
            words = 'container "main" in pod "no-image" is waiting to start: trying and failing to pull image'
            assert (none.status_code, none.json()["message"]) == (400, words)
            wait_for(api, f"{PODS}/crashes", lambda found: status(found).get("restartCount"))
            assert log("crashes", previous="true").text == "crashes\n"
        assert "10.224" not in subprocess.check_output(["ip", "addr"], text=True)
