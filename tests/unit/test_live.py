"""The parts of a running local cloud that need neither root nor tools: relays, what pods are given, the environment."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from common.settings import SettingsError
from infra.settings import SECRETS, read_environment
from localcloud.azure.rules import TENANT
from localcloud.hub import revision_of
from localcloud.live import attach, drills, machine
from localcloud.live.dress import Dresser
from localcloud.live.places import AZURE_ADDRESS, REGISTRY_ADDRESS, TRUST
from localcloud.live.relay import Relay
from localcloud.live.sight import Job, Sight, plain
from serving.sidecar import Metrics
from tests.unit.test_environment import as_pulumi
from workloads.engine import SIDECAR_METRICS

ROOT = Path(__file__).parents[2]


def test_images_count_as_built_once_each_of_the_stacks_is(tmp_path: Path) -> None:
    """buildah makes its folder before it has built anything; a second run must not take that for less to come."""
    kept = tmp_path / "store" / "overlay-images" / "images.json"
    assert not machine.are_built(tmp_path)
    kept.parent.mkdir(parents=True)
    assert not machine.are_built(tmp_path)
    kept.write_text("[{")
    assert not machine.are_built(tmp_path)
    images = [{"names": [f"localhost/drydock/{name}:1a2b"]} for name in ("training", "serving", "stress", "router")]
    for number in range(4):
        kept.write_text(json.dumps([{"id": "a layer"}, {"names": None}, *images[:number]]))
        assert not machine.are_built(tmp_path)
    kept.write_text(json.dumps(images))
    assert machine.are_built(tmp_path)
    assert machine.disk_gib(tmp_path) == machine.LATER_GIB


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """Answers each connection with what it was sent, once all of it has come."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        said = b""
                        while piece := connection.recv(65536):
                            said += piece
                        connection.sendall(said)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)


def say(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.settimeout(10)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        heard = b""
        while piece := client.recv(65536):
            heard += piece
        return heard


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_two_relays_carry_a_connection_over_a_file_whichever_side_ends_first(
    echo: tuple[str, int], tmp_path: Path
) -> None:
    port, file = free_port(), tmp_path / "sockets" / "echo"
    with (
        contextlib.closing(Relay(file, echo)),
        contextlib.closing(Relay(("127.0.0.1", port), lambda: file)),
    ):
        data = bytes(range(256)) * 4000
        assert say(port, data) == data
        assert say(port, b"again") == b"again"
    assert not file.exists()
    with pytest.raises(ConnectionRefusedError):
        say(port, b"gone")


def test_where_nobody_answers_the_connection_is_closed_at_once(tmp_path: Path) -> None:
    def nowhere() -> Path:
        raise ConnectionRefusedError("no such Service yet")

    for target in (tmp_path / "nobody", nowhere):
        port = free_port()
        with (
            contextlib.closing(Relay(("127.0.0.1", port), target)),
            socket.create_connection(("127.0.0.1", port), 10) as client,
        ):
            client.settimeout(10)
            assert client.recv(10) == b""


def test_an_open_connection_does_not_hold_up_the_end_of_a_relay(echo: tuple[str, int]) -> None:
    port = free_port()
    relay = Relay(("127.0.0.1", port), echo)
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"not all yet")
        relay.close()
        client.settimeout(10)
        assert client.recv(10) == b""


class Accounts:
    """In place of the API server: one service account."""

    def __init__(self, **annotations: str) -> None:
        self.annotations = annotations

    def get(self, path: str) -> dict[str, Any]:
        assert path == "/api/v1/namespaces/team/serviceaccounts/tuning"
        return {"metadata": {"annotations": self.annotations} if self.annotations else {}}


def dressed(tmp_path: Path, labels: dict[str, str], accounts: Accounts) -> dict[str, Any]:
    bundle = tmp_path / "bundle"
    bundle.write_text("certificates")
    container = {"name": "main", "env": [{"name": "SSL_CERT_FILE", "value": "own"}]}
    pod: dict[str, dict[str, Any]] = {
        "metadata": {"namespace": "team", "labels": labels},
        "spec": {
            "nodeName": "node-1",
            "serviceAccountName": "tuning",
            "initContainers": [{"name": "first"}],
            "containers": [container],
        },
    }
    names = ["a.blob.core.windows.net", "b.azurecr.io"]
    found = Dresser(accounts, tmp_path / "nodes", bundle, lambda: names)(pod)  # type: ignore[arg-type]
    assert "volumes" not in pod["spec"], "the pod itself, which is reported on, stays as it is"
    return found


def test_every_pod_finds_azure_by_its_names_and_trusts_who_answers(tmp_path: Path) -> None:
    pod = dressed(tmp_path, {}, Accounts())
    assert pod["spec"]["hostAliases"] == [
        {"ip": AZURE_ADDRESS, "hostnames": ["a.blob.core.windows.net"]},
        {"ip": REGISTRY_ADDRESS, "hostnames": ["b.azurecr.io"]},
    ]
    assert (tmp_path / "nodes" / "node-1" / TRUST).read_text() == "certificates"
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["drydock-local-trust"]
    first, main = pod["spec"]["initContainers"][0], pod["spec"]["containers"][0]
    assert {"name": "SSL_CERT_FILE", "value": "/etc/ssl/certs/ca-certificates.crt"} in first["env"]
    assert [item for item in main["env"] if item["name"] == "SSL_CERT_FILE"] == [
        {"name": "SSL_CERT_FILE", "value": "own"}
    ]
    assert not any("AZURE" in item["name"] for item in main["env"])


def test_a_pod_with_the_label_gets_its_identity_as_the_webhook_of_aks_gives_it(tmp_path: Path) -> None:
    labels = {"azure.workload.identity/use": "true"}
    pod = dressed(tmp_path, labels, Accounts(**{"azure.workload.identity/client-id": "client-7"}))
    variables = {item["name"]: item["value"] for item in pod["spec"]["containers"][0]["env"]}
    assert variables["AZURE_CLIENT_ID"] == "client-7"
    assert variables["AZURE_TENANT_ID"] == TENANT
    folder, _, file = variables["AZURE_FEDERATED_TOKEN_FILE"].rpartition("/")
    volume = next(item for item in pod["spec"]["volumes"] if item["name"] == "azure-identity-token")
    (source,) = volume["projected"]["sources"]
    assert source["serviceAccountToken"] == {
        "path": file,
        "expirationSeconds": 3600,
        "audience": "api://AzureADTokenExchange",
    }
    mount = {"name": "azure-identity-token", "mountPath": folder, "readOnly": True}
    assert all(mount in item["volumeMounts"] for item in pod["spec"]["initContainers"] + pod["spec"]["containers"])


def test_a_service_account_without_the_annotation_gives_no_client(tmp_path: Path) -> None:
    pod = dressed(tmp_path, {"azure.workload.identity/use": "true"}, Accounts())
    names = [item["name"] for item in pod["spec"]["containers"][0]["env"]]
    assert "AZURE_FEDERATED_TOKEN_FILE" in names and "AZURE_CLIENT_ID" not in names


def test_the_environment_names_the_revision_and_the_figures_that_the_base_here_has() -> None:
    base = yaml.safe_load((ROOT / "Pulumi.local.yaml").read_text())["config"]["drydock:base"]
    folder = ROOT / "rehearsal" / "base"
    assert base["revision"] == revision_of(folder)
    config = yaml.safe_load((folder / "config.json").read_text())
    assert base["architecture"] == {name: config[name] for name in base["architecture"]}


def test_for_how_long_the_registry_is_not_seen_is_read_of_the_sidecars_own_metrics(tmp_path: Path) -> None:
    metrics, asked = Metrics(), list[str]()
    metrics.unreachable.set(12.5)

    class Pods:
        def proxied(self, path: str) -> tuple[int, bytes]:
            asked.append(path)
            if len(asked) > 1:
                raise ConnectionError
            return 200, generate_latest(metrics.registry)

    pods: Any = Pods()
    sight = Sight(pods, tmp_path)
    assert sight.registry_unseen("engine-1") == 12.5
    assert asked == [f"/api/v1/namespaces/drydock-serving/pods/engine-1:{SIDECAR_METRICS}/proxy/metrics"]
    assert sight.registry_unseen("engine-1") is None, "it does not listen yet, or no more"


class JobsCloud:
    """A stack's copy, an API server that has one drills Job, and what `pulumi up` found in the settings."""

    name = "local"

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, dict[str, Any]()
        self.text = (ROOT / "Pulumi.local.yaml").read_text() + "encryptionsalt: v1:abc\n"
        (folder / "Pulumi.local.yaml").write_text(self.text)
        self.api, self.code = self, 0

    def pulumi(self, *arguments: str, check: bool) -> subprocess.CompletedProcess[str]:
        self.found = as_pulumi((self.folder / "Pulumi.local.yaml").read_text())
        return subprocess.CompletedProcess(arguments, self.code, "", "no room")

    def list(self, path: str, labelSelector: str) -> list[dict[str, Any]]:
        assert (path, labelSelector) == ("/apis/batch/v1/namespaces/drydock-serving/jobs", "app=drills")
        return [{"metadata": {"name": "drills-1a2b3c4d"}}]

    def job(self, namespace: str, name: str) -> Job:
        return Job(name, "failed", "a bound was not kept", "drills: report", 12.0)

    def ground(self) -> drills.Ground:
        here: Any = self
        nothing: Any = None
        return drills.Ground(
            stack=here, sight=here, store=nothing, router="", dataset=Path(), adapters=["kubectl", "triage"], load=nothing,
            say=print, doing=print, scratch=Path(), reach_registry=print,
        )  # fmt: skip


def test_the_drills_job_is_asked_for_by_settings_that_hold_and_that_are_taken_back(tmp_path: Path) -> None:
    cloud = JobsCloud(tmp_path)
    assert drills.stack_job(cloud.ground()).name == "drills-1a2b3c4d"
    assert (tmp_path / "Pulumi.local.yaml").read_text() == cloud.text
    environment = read_environment(cloud.found | {"api_keys": '{"local": "key"}'}, SECRETS, project="drydock")
    assert environment.drills.run and environment.drills.models == {"kubectl": 1.0, "triage": 1.0}
    assert {"long-prompts", "replica-loss", "node-drain"} <= {*environment.drills.scenarios}
    cloud.code = 255
    with pytest.raises(drills.DrillFailed, match="no room"):
        drills.stack_job(cloud.ground())
    assert (tmp_path / "Pulumi.local.yaml").read_text() == cloud.text


HOLDS = """
import sys, time
from pathlib import Path
from localcloud.live import attach
with attach.alone(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that works on the folder `tmp_path`/local."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "local")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "has it\n"
            yield process
        finally:
            process.kill()


def test_two_runs_do_not_work_on_one_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(SettingsError, match=f"process {holder.pid} is at work on it"), attach.alone(tmp_path / "local"):
        pass
    with attach.alone(tmp_path / "other"):
        pass
    assert holder.poll() is None


def test_down_ends_the_run_that_is_at_work(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with attach.alone(tmp_path / "local", end_other=True) as ended:
        assert ended and holder.wait(5) == -signal.SIGTERM
    with attach.alone(tmp_path / "local", end_other=True) as ended:  # and leaves nothing locked
        assert not ended


def test_a_log_of_records_reads_as_one_of_lines() -> None:
    """The drills look for what people see: where tuning stands, and where it goes on."""
    log = (
        '{"time": "t", "level": "info", "message": "resuming at step 50 of 136"}\n'
        '{"time": "t", "level": "info", "message": "step 55/136  loss 0.3", "step": 55, "loss": 0.3}\n'
        'plain text, as vLLM writes it\n{"no": "record"}\n{"time": "t", "mess'
    )
    assert plain(log) == (
        "resuming at step 50 of 136\nstep 55/136  loss 0.3\nplain text, as vLLM writes it\n"
        '{"no": "record"}\n{"time": "t", "mess'
    )
