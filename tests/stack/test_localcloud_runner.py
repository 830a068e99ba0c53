"""The pod runner's judgement without a process: statuses, environments, identities, files of volumes, thresholds."""

from __future__ import annotations

import http.server
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from localcloud.runner.container import Container
from localcloud.runner.enter import within
from localcloud.runner.environment import command, environment, expand, services
from localcloud.runner.events import Events
from localcloud.runner.fields import ConfigError, field, quantity, resource
from localcloud.runner.identity import CAPABILITIES, dropped_capabilities, identity
from localcloud.runner.images import Image
from localcloud.runner.logs import log_file, read_log
from localcloud.runner.network import Network, NetworkError
from localcloud.runner.probes import Threshold, ask
from localcloud.runner.status import Place, Seen, adopted, changed, status_of
from localcloud.runner.volumes import Volumes

NOW, BEFORE = "2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z"
PLACE = Place(BEFORE, "192.168.128.2", "10.224.0.4")
RUNNING: dict[str, Any] = {"running": {"startedAt": BEFORE}}


def ended(code: int) -> dict[str, Any]:
    return {"terminated": {"exitCode": code}}


def pod(**spec: Any) -> dict[str, Any]:
    containers = [{"name": "main", "image": "x"}]
    metadata = {"name": "web-0", "namespace": "team", "uid": "u", "labels": {"b": '2"', "a": "1"}}
    return {
        "metadata": metadata,
        "spec": {"nodeName": "n", "containers": containers, "restartPolicy": "Always", **spec},
    }


def conditions(status: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    return {item["type"]: (item["status"], item["reason"]) for item in status["conditions"]}


def test_a_pod_is_ready_when_all_its_containers_are() -> None:
    one = pod()
    running = {"main": Seen(RUNNING, started=True)}
    status = status_of(one, running, PLACE, NOW)
    assert (status["phase"], status["podIP"], status["hostIP"]) == ("Running", "192.168.128.2", "10.224.0.4")
    assert conditions(status)["Initialized"] == ("True", None)
    assert conditions(status)["Ready"] == conditions(status)["ContainersReady"] == ("False", "ContainersNotReady")
    running["main"].ready = True
    assert conditions(status_of(one, running, PLACE, NOW))["Ready"] == ("True", None)
    gated = pod(readinessGates=[{"conditionType": "open"}])
    assert conditions(status_of(gated, running, PLACE, NOW))["Ready"] == ("False", "ReadinessGatesNotReady")
    gated["status"] = {"conditions": [{"type": "open", "status": "True"}]}
    assert conditions(status_of(gated, running, PLACE, NOW))["Ready"] == ("True", None)


def test_the_time_of_a_condition_changes_with_it_alone() -> None:
    one = pod()
    one["status"] = status_of(one, {"main": Seen(RUNNING, started=True)}, PLACE, BEFORE)
    ready = status_of(one, {"main": Seen(RUNNING, started=True, ready=True)}, PLACE, NOW)
    times = {item["type"]: item["lastTransitionTime"] for item in ready["conditions"]}
    assert (times["Initialized"], times["Ready"]) == (BEFORE, NOW)
    assert changed(one["status"], ready)
    assert not changed(
        ready, status_of({**one, "status": ready}, {"main": Seen(RUNNING, started=True, ready=True)}, PLACE, "later")
    )


def test_init_containers_come_before_and_sidecars_count_when_started() -> None:
    side = {"name": "side", "image": "x", "restartPolicy": "Always"}
    one = pod(initContainers=[{"name": "fetch", "image": "x"}, side])
    seen = {"fetch": Seen(RUNNING), "side": Seen(), "main": Seen()}
    status = status_of(one, seen, PLACE, NOW)
    assert status["phase"] == "Pending"
    assert conditions(status)["Initialized"] == ("False", "ContainersNotInitialized")
    seen |= {
        "fetch": Seen(ended(0)),
        "side": Seen(RUNNING, started=True),
        "main": Seen(RUNNING, started=True, ready=True),
    }
    status = status_of(one, seen, PLACE, NOW)
    assert (status["phase"], conditions(status)["Initialized"][0], conditions(status)["Ready"][0]) == (
        "Running",
        "True",
        "False",
    )
    seen["side"].ready = True
    assert conditions(status_of(one, seen, PLACE, NOW))["Ready"][0] == "True"
    seen["side"] = Seen({"waiting": {"reason": "CrashLoopBackOff"}}, ended(1))
    assert (
        status_of(one, seen, PLACE, NOW)["phase"] == "Running"
    )  # it has been; a sidecar that fails later changes no phase


@pytest.mark.parametrize(("code", "phase", "reason"), [(0, "Succeeded", "PodCompleted"), (2, "Failed", "PodFailed")])
def test_how_a_pod_ends(code: int, phase: str, reason: str) -> None:
    status = status_of(pod(restartPolicy="Never"), {"main": Seen(ended(code))}, PLACE, NOW, over=True)
    assert (status["phase"], conditions(status)["Ready"]) == (phase, ("False", reason))
    assert status["containerStatuses"][0]["state"] == ended(code)


def test_a_pod_that_was_deleted_before_it_began_has_failed() -> None:
    assert status_of(pod(), {"main": Seen()}, Place(), NOW, over=True)["phase"] == "Failed"


def test_what_ran_under_an_earlier_runner_has_ended_unwatched() -> None:
    one = pod(initContainers=[{"name": "fetch", "image": "x"}])
    one["status"] = {
        "initContainerStatuses": [{"name": "fetch", "state": ended(0), "restartCount": 0}],
        "containerStatuses": [{"name": "main", "state": RUNNING, "restartCount": 3}],
    }
    seen = adopted(one)
    assert seen["fetch"].exit_code == 0
    assert seen["main"].state["terminated"]["reason"] == "ContainerStatusUnknown"
    assert (seen["main"].exit_code, seen["main"].restarts) == (137, 3)
    assert "waiting" in adopted(pod())["main"].state


def test_the_back_off_doubles_up_to_five_minutes() -> None:
    events = Events.__new__(Events)
    container = Container({"name": "main"}, False, Seen(), events, lambda: None)
    container._began = float("inf")  # it never runs long enough to count as stable
    assert [container.back_off(10) for _ in range(8)] == [0, 10, 20, 40, 80, 160, 300, 300]


def test_references_are_expanded_where_they_can_be() -> None:
    assert expand("$(A) $(B) $$(A) $A $$", {"A": "1"}) == "1 $(B) $(A) $A $"


def lookup(kind: str, name: str) -> dict[str, str] | None:
    return {("configmaps", "settings"): {"one": "1"}, ("secrets", "keys"): {"key": "secret"}}.get((kind, name))


def variables(**container: Any) -> dict[str, str]:
    image = Image(Path(), env=("A=image", "PATH=/bin", "VLLM_PORT=1"))
    base, cluster = {"A": "base", "Z": "0"}, {"VLLM_PORT": "tcp://10.0.0.1:80"}
    return environment(pod(), {"name": "main", **container}, image, base=base, cluster=cluster, lookup=lookup, node={})


def test_the_pod_wins_over_the_cluster_and_the_cluster_over_the_image() -> None:
    assert variables() == {"A": "image", "PATH": "/bin", "Z": "0", "VLLM_PORT": "tcp://10.0.0.1:80"}
    source = [{"prefix": "P_", "configMapRef": {"name": "settings"}}, {"secretRef": {"name": "none", "optional": True}}]
    found = variables(envFrom=source, env=[{"name": "A", "value": "$(P_one)$(A)"}])
    assert (found["P_one"], found["A"]) == ("1", "1image")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"secretKeyRef": {"name": "keys", "key": "none"}}, "couldn't find key none in secret team/keys"),
        ({"secretKeyRef": {"name": "none", "key": "x"}}, 'secret "none" not found'),
        ({"configMapKeyRef": {"name": "none", "key": "x"}}, 'configmap "none" not found'),
        ({"fieldRef": {"fieldPath": "spec.volumes"}}, "fieldPath spec.volumes"),
    ],
)
def test_what_the_cluster_lacks_is_named(source: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        variables(env=[{"name": "X", "valueFrom": source}])
    for kind in source:
        if kind != "fieldRef":
            assert "X" not in variables(env=[{"name": "X", "valueFrom": {kind: {**source[kind], "optional": True}}}])


def test_command_and_args_replace_the_images_as_kubernetes_says() -> None:
    image = Image(Path(), entrypoint=("enter",), cmd=("$(A)",))
    assert command({}, image, {"A": "1"}) == ["enter", "$(A)"]  # only the pod's own words are expanded
    assert command({"args": ["$(A)"]}, image, {"A": "1"}) == ["enter", "1"]
    assert command({"command": ["own"]}, image, {}) == ["own"]
    with pytest.raises(ConfigError, match="no command"):
        command({}, Image(Path()), {})


def test_services_are_told_as_variables() -> None:
    service = {
        "metadata": {"name": "my-web"},
        "spec": {"clusterIP": "10.0.0.7", "ports": [{"name": "http", "port": 80}]},
    }
    headless = {"metadata": {"name": "h"}, "spec": {"clusterIP": "None", "ports": [{"port": 1}]}}
    found = services([service, headless])
    assert found["MY_WEB_SERVICE_HOST"] == "10.0.0.7"
    assert found["MY_WEB_SERVICE_PORT_HTTP"] == found["MY_WEB_SERVICE_PORT"] == "80"
    assert found["MY_WEB_PORT"] == found["MY_WEB_PORT_80_TCP"] == "tcp://10.0.0.7:80"
    assert not [name for name in found if name.startswith("H_")]


def test_fields_and_resources() -> None:
    one = pod(containers=[{"name": "main", "image": "x", "resources": {"limits": {"memory": "1Gi", "cpu": "1500m"}}}])
    assert field(one, "metadata.labels['a']") == "1"
    assert field(one, "metadata.labels") == 'a="1"\nb="2\\""'
    assert field({**one, "status": {"podIP": "1.2.3.4"}}, "status.podIPs") == "1.2.3.4"
    node = {"status": {"allocatable": {"ephemeral-storage": "10Gi"}}}
    assert resource(one, "main", {"resource": "limits.memory", "divisor": "1Mi"}, node) == "1024"
    assert resource(one, "main", {"resource": "limits.cpu"}, node) == "2"  # rounded up
    assert resource(one, "main", {"resource": "limits.ephemeral-storage", "divisor": "1Gi"}, node) == "10"
    assert resource(one, "main", {"resource": "requests.cpu"}, node) == "0"
    assert quantity("2e3") == 2000
    with pytest.raises(ConfigError, match="12 apples: not a quantity"):
        quantity("12 apples")


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nme:x:7:8::/home/me:/bin/sh\n")
    (root / "etc/group").write_text("people:x:9:\n")
    return root


def test_users_by_number_and_by_name(rootfs: Path) -> None:
    def user(image: str, **security: Any) -> tuple[int, int, tuple[int, ...], str]:
        found = identity(pod(securityContext=security), {"name": "main"}, Image(rootfs, user=image))
        return found.uid, found.gid, found.groups, found.home

    assert user("") == (0, 0, (), "/root")
    assert user("me:people") == (7, 9, (), "/home/me")
    assert user("7", fsGroup=5, supplementalGroups=[6]) == (7, 8, (5, 6), "/home/me")
    assert user("me", runAsUser=50, runAsGroup=60) == (50, 60, (), "/")
    for image, words in (("", "will run as root"), ("me", r"non-numeric user \(me\)")):
        with pytest.raises(ConfigError, match=words):
            user(image, runAsNonRoot=True)
    with pytest.raises(ConfigError, match="user you"):
        user("you")


def test_capabilities() -> None:
    def kept(**security: Any) -> set[str]:
        dropped = dropped_capabilities({"securityContext": security})
        return {name for number, name in enumerate(CAPABILITIES) if number not in dropped}

    assert "CHOWN" in kept() and "SYS_ADMIN" not in kept()
    assert kept(capabilities={"drop": ["ALL"], "add": ["NET_ADMIN"]}) == {"NET_ADMIN"}
    assert kept(privileged=True) == set(CAPABILITIES)
    assert (CAPABILITIES.index("SYS_ADMIN"), CAPABILITIES.index("CHECKPOINT_RESTORE")) == (21, 40)  # linux/capability.h


class Cluster:
    """Stands for `Objects`."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, bytes]] = {"settings": {"one": b"1", "two": b"2"}}
        self.tokens = 0

    def data(self, kind: str, name: str) -> dict[str, bytes] | None:
        return self.entries.get(name)

    def token(self, audience: str | None, seconds: int) -> str:
        self.tokens += 1
        return f"token {self.tokens} of {audience} for {seconds}"


def volumes(folder: Path, cluster: Cluster, clock: list[float], *found: dict[str, Any]) -> Volumes:
    objects: Any = cluster
    return Volumes(pod(volumes=list(found)), folder / "pod", folder / "host", objects, {}, clock=lambda: clock[0])


def test_files_from_the_cluster_change_all_at_once(tmp_path: Path) -> None:
    cluster = Cluster()
    one = volumes(tmp_path, cluster, [0], {"name": "v", "configMap": {"name": "settings"}})
    one.prepare()
    place = one.source("v")
    before = os.readlink(place / "..data")
    assert {path.name: path.read_text() for path in place.iterdir() if path.is_file()} == {"one": "1", "two": "2"}
    one.refresh()
    assert os.readlink(place / "..data") == before
    cluster.entries["settings"] = {"one": b"new"}
    one.refresh()
    assert {path.name: path.read_text() for path in place.iterdir() if path.is_file()} == {"one": "new"}
    assert len([path for path in place.iterdir() if path.is_dir() and not path.is_symlink()]) == 1  # the old is gone


def test_an_optional_configmap_comes_and_goes_under_a_pod_that_runs(tmp_path: Path) -> None:
    cluster = Cluster()
    one = volumes(tmp_path, cluster, [0], {"name": "v", "configMap": {"name": "faults", "optional": True}})
    one.prepare()
    place = one.source("v")
    seen = []
    steps: list[dict[str, bytes] | None] = [None, {}, {"until": b"1"}, {"until": b"2"}, {}, {"until": b"3"}, None]
    for entries in steps:
        cluster.entries.pop("faults", None)
        if entries is not None:
            cluster.entries["faults"] = entries
        one.refresh()
        seen.append({path.name: path.read_bytes() for path in place.iterdir() if path.is_file()})
    assert seen == [entries or {} for entries in steps]


def test_a_token_is_renewed_before_it_ends(tmp_path: Path) -> None:
    clock = [0.0]
    source = {"serviceAccountToken": {"path": "token", "expirationSeconds": 1000, "audience": "azure"}}
    one = volumes(tmp_path, Cluster(), clock, {"name": "v", "projected": {"sources": [source]}})
    one.prepare()
    token = one.source("v") / "token"
    clock[0] = 799
    one.refresh()
    assert token.read_text() == "token 1 of azure for 1000"
    clock[0] = 801
    one.refresh()
    assert token.read_text() == "token 2 of azure for 1000"


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        ({"configMap": {"name": "none"}}, 'configmap "none" not found'),
        ({"secret": {"secretName": "settings", "items": [{"key": "no", "path": "x"}]}}, "non-existent key: no"),
        ({"hostPath": {"path": "/nowhere", "type": "Directory"}}, "/nowhere is not a directory"),
    ],
)
def test_a_volume_that_cannot_be_made_says_why(tmp_path: Path, volume: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        volumes(tmp_path, Cluster(), [0], {"name": "v", **volume}).prepare()


def test_paths_of_the_node_are_below_its_own_disk_and_sub_paths_stay_inside(tmp_path: Path) -> None:
    one = volumes(
        tmp_path, Cluster(), [0], {"name": "cache", "hostPath": {"path": "/var/cache"}}, {"name": "e", "emptyDir": {}}
    )
    one.prepare()
    assert one.source("cache") == tmp_path / "host/var/cache"
    assert one.source("e", "a/b").is_dir()
    (one.source("e") / "out").symlink_to("/")
    with pytest.raises(ConfigError, match="leads out of the volume"):
        one.source("e", "out/etc")


def test_links_of_an_image_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "etc").symlink_to("/run")
    (tmp_path / "up").symlink_to("../../..")
    (tmp_path / "loop").symlink_to("loop")
    assert within(tmp_path, "/etc/hosts") == tmp_path / "run" / "hosts"
    assert within(tmp_path, "/up/../etc") == tmp_path / "run"
    with pytest.raises(OSError, match="too many symbolic links"):
        within(tmp_path, "/loop/x")


def test_thresholds_count_answers_in_a_row() -> None:
    threshold = Threshold(success=2, failure=3)
    answers = [True, True, False, False, True, False, False, False, True]
    assert [threshold.observe(good) for good in answers] == [None, True, None, None, None, None, None, False, None]


def test_probes_by_http_and_tcp() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/good" and self.headers["X"] == "y" else 503)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    def execute(words: list[str], seconds: float) -> tuple[int, str]:
        return (0, "") if words == ["true"] else (1, "it says no")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        container = {"name": "main", "ports": [{"name": "http", "containerPort": server.server_port}]}

        def wrong(**handler: Any) -> str:
            return ask(handler, container, "127.0.0.1", execute, 1)

        good = {"port": "http", "path": "/good", "httpHeaders": [{"name": "X", "value": "y"}]}
        assert wrong(httpGet=good) == wrong(tcpSocket={"port": server.server_port}) == ""
        assert wrong(httpGet={"port": "http"}) == "HTTP probe failed with statuscode: 503"
        assert "no port named other" in wrong(tcpSocket={"port": "other"})
        server.shutdown()
    assert "refused" in wrong(tcpSocket={"port": "http"})
    assert (wrong(exec={"command": ["true"]}), wrong(exec={"command": ["false"]})) == ("", "it says no")
    assert wrong(grpc={"port": 1}) == "grpc: not supported by this runner"


def test_addresses_are_not_used_again_soon_and_run_out_in_words() -> None:
    network = Network("10.1.0.0/29")
    assert network.gateway == "10.1.0.1"
    taken = network._taken
    for uid in "abcde":
        taken[uid] = network._free()
    assert list(taken.values()) == ["10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"]
    with pytest.raises(NetworkError, match="no address is free"):
        network._free()
    del taken["c"]
    assert network._free() == "10.1.0.4"


def test_the_log_of_the_last_start_and_of_the_one_before(tmp_path: Path) -> None:
    for number in range(11):
        file = log_file(tmp_path, "team", "web", "uid", "main", number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"start {number}")
    assert read_log(tmp_path, "team", "web", "main") == "start 10"
    assert read_log(tmp_path, "team", "web", "main", previous=True) == "start 9"
    with pytest.raises(FileNotFoundError, match="no log of a start of container side"):
        read_log(tmp_path, "team", "web", "side")
