"""The kubelet's server of the pod runner, asked as the API server asks it; pods are what a stub tells of them."""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from localcloud.api import Api, ApiError
from localcloud.runner import kubelet
from localcloud.runner.kubelet import Kubelet
from localcloud.runner.logs import entry, log_file, times_file
from localcloud.runner.node import is_ready

RUNNING: dict[str, Any] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
ENDED: dict[str, Any] = {"terminated": {"exitCode": 1}}


class Cluster:
    """One pod with one container, `main`."""

    pod: dict[str, Any] | None = None

    def find(self, path: str) -> dict[str, Any] | None:
        if path.endswith("/unknown"):
            raise ApiError(path, 503, "ServiceUnavailable", "etcd is away")
        return self.pod if path == "/api/v1/namespaces/team/pods/web" else None

    def set(self, state: dict[str, Any], last: dict[str, Any] | None = None, restarts: int = 0, uid: str = "u") -> None:
        main = {"name": "main", "state": state, "lastState": last or {}, "restartCount": restarts}
        spec = {"containers": [{"name": "main"}], "initContainers": [{"name": "early"}]}
        self.pod = {"metadata": {"uid": uid}, "spec": spec, "status": {"containerStatuses": [main]}}


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def server(cluster: Cluster, tmp_path: Path) -> Iterator[Kubelet]:
    with Kubelet(cast(Api, cluster), tmp_path, 0) as server:
        yield server


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = log_file(tmp_path, "team", "web", "u", "main", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"one\ntwo\nthree\n")
    return path


def ask(server: Kubelet, path: str = "/containerLogs/team/web/main", source: str = "127.0.0.1") -> Any:
    context = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection(
        "127.0.0.1", server.port, timeout=10, context=context, source_address=(source, 0)
    )
    connection.request("GET", path)
    return connection.getresponse()


def logs(server: Kubelet, query: str = "") -> str:
    answer = ask(server, f"/containerLogs/team/web/main?{query}")
    text = answer.read().decode()
    assert answer.status == 200, text
    return str(text)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "one\ntwo\nthree\n"),
        ("tailLines=2", "two\nthree\n"),
        ("tailLines=0", ""),
        ("limitBytes=5", "one\nt"),
        ("tailLines=1&limitBytes=3", "thr"),
        ("sinceSeconds=60", "one\ntwo\nthree\n"),
        ("sinceTime=2126-01-01T00:00:00Z", ""),
    ],
)
def test_as_much_as_is_asked_for(server: Kubelet, cluster: Cluster, written: Path, query: str, expected: str) -> None:
    cluster.set(ENDED)
    assert logs(server, query) == expected


def test_times_are_those_at_which_a_line_began(server: Kubelet, cluster: Cluster, written: Path) -> None:
    cluster.set(ENDED)
    now = time.time()
    with times_file(written).open("wb") as file, pytest.MonkeyPatch.context() as clock:
        for size, ago in ((6, 3600), (8, 1800), (11, 20)):  # `one` and the beginning of `two`; its end; half of `three`
            clock.setattr(time, "time", lambda ago=ago: now - ago)
            file.write(entry(size))
    os.utime(written, (now - 10, now - 10))
    assert logs(server, "sinceSeconds=1900") == "three\n"
    lines = [line.split(" ") for line in logs(server, "timestamps=true").splitlines()]
    assert [text for _, text in lines] == ["one", "two", "three"]
    for (stamp, _), ago in zip(lines, (3600, 3600, 20), strict=True):
        assert abs(datetime.fromisoformat(stamp).timestamp() - (now - ago)) < 0.001
        assert stamp.endswith("Z") and datetime.fromisoformat(stamp).tzinfo == UTC
    times_file(written).unlink()
    assert logs(server, "sinceSeconds=15") == "one\ntwo\nthree\n"  # when it was last written to
    assert logs(server, "sinceSeconds=5") == ""


def test_a_log_is_followed_in_whole_lines_until_its_container_ends(
    server: Kubelet, cluster: Cluster, written: Path
) -> None:
    cluster.set(RUNNING)
    answer = ask(server, "/containerLogs/team/web/main?follow=true&tailLines=1")
    assert answer.readline() == b"three\n"
    with written.open("ab", buffering=0) as file:
        file.write(b"fo")
        time.sleep(2 * kubelet.POLL_SECONDS)
        file.write(b"ur\nfive")
        assert answer.readline() == b"four\n"
    cluster.set(ENDED)
    assert answer.read() == b"five"  # and the end


@pytest.mark.parametrize("change", ["restarted", "gone", "another"])
def test_following_ends_with_the_pod_and_with_the_start_that_was_asked_for(
    server: Kubelet, cluster: Cluster, written: Path, change: str
) -> None:
    cluster.set(RUNNING)
    answer = ask(server, "/containerLogs/team/web/main?follow=true")
    assert answer.readline() == b"one\n"
    if change == "gone":
        cluster.pod = None
    else:
        cluster.set(RUNNING, ENDED, restarts=int(change == "restarted"), uid="other" if change == "another" else "u")
    assert answer.read() == b"two\nthree\n"


def test_nobody_is_told_when_the_client_has_gone_and_enough_is_enough(
    server: Kubelet, cluster: Cluster, written: Path
) -> None:
    cluster.set(RUNNING)
    assert ask(server, "/containerLogs/team/web/main?follow=true&limitBytes=6").read() == b"one\ntw"
    before = threading.active_count()
    answer = ask(server, "/containerLogs/team/web/main?follow=true")
    assert answer.readline() == b"one\n" and threading.active_count() == before + 1
    answer.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before


def test_each_start_has_its_log(server: Kubelet, cluster: Cluster, written: Path) -> None:
    written.with_name("1.log").write_text("again\n")
    cluster.set(RUNNING, ENDED, restarts=1)
    assert (logs(server), logs(server, "previous=true")) == ("again\n", "one\ntwo\nthree\n")
    cluster.set({"waiting": {"reason": "CrashLoopBackOff"}}, ENDED, restarts=1)
    assert (logs(server), logs(server, "previous=true")) == ("again\n", "again\n")
    cluster.set(RUNNING, uid="other")  # a pod of the same name has its own
    assert logs(server) == ""


def waiting(reason: str) -> dict[str, Any]:
    return {"waiting": {"reason": reason}}


@pytest.mark.parametrize(
    ("state", "path", "status", "said"),
    [
        (waiting("ContainerCreating"), "main", 400, 'container "main" in pod "web" is waiting to start: ContainerCreating'),
        (waiting("ErrImagePull"), "main", 400, 'container "main" in pod "web" is waiting to start: image can\'t be pulled'),
        (waiting("ImagePullBackOff"), "main", 400, 'container "main" in pod "web" is waiting to start: trying and failing to pull image'),
        (RUNNING, "main?previous=true", 400, 'previous terminated container "main" in pod "web" not found'),
        (RUNNING, "early", 400, 'container "early" in pod "web" is not available'),
        (RUNNING, "none", 404, 'container "none" not found in pod "web"'),
        (RUNNING, "main?tailLines=x", 400, "Unable to decode query."),
    ],
)  # fmt: skip
def test_where_there_is_no_log_the_answer_is_the_kubelets(
    server: Kubelet, cluster: Cluster, state: dict[str, Any], path: str, status: int, said: str
) -> None:
    cluster.set(state)
    answer = ask(server, f"/containerLogs/team/web/{path}")
    assert (answer.status, answer.read().decode()) == (status, said)


def test_other_questions_and_other_people_are_turned_away(server: Kubelet, cluster: Cluster, written: Path) -> None:
    cluster.set(ENDED)
    assert ask(server, "/pods").status == 404
    assert ask(server, "/containerLogs/team/nobody/main").status == 404
    away = ask(server, "/containerLogs/team/unknown/main")
    assert away.status == 500 and b"etcd is away" in away.read()
    stranger = ask(server, source="127.0.0.2")
    assert (stranger.status, stranger.read()) == (401, b"Unauthorized")


def test_a_node_is_ready_once_it_says_where_its_kubelet_listens() -> None:
    given = {"Ready": "True", "MemoryPressure": "False", "DiskPressure": "False", "PIDPressure": "False"}
    conditions = [{"type": kind, "status": status} for kind, status in given.items()]
    node: dict[str, Any] = {"status": {"conditions": conditions, "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}}}}
    assert is_ready(node) and not is_ready(node, 10250)
    node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] = 10250
    assert is_ready(node, 10250)
