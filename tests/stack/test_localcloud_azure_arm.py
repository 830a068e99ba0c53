"""The stand-in for a registry's runs, as the program's own client meets it; nothing is really built."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from common.settings import SettingsError
from infra.context import context_files, context_hash
from infra.uploads import ImageBuildProvider, RegistryTasks
from localcloud.azure import arm
from localcloud.azure.faults import Fault, inject
from localcloud.azure.rules import SUBSCRIPTION
from tests.stack.azure_engine import Engine

REGISTRY = {"resourceGroupName": "g", "registryName": "reg01", "location": "swedencentral", "sku": {"name": "Standard"}}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[arm.ArmServer]:
    monkeypatch.setattr("infra.uploads.time.sleep", lambda seconds: None)
    engine = Engine(tmp_path / "cloud")
    engine.make("resources:ResourceGroup", {"resourceGroupName": "g", "location": "swedencentral"})
    engine.make("containerregistry:Registry", REGISTRY)
    found = arm.serve(engine.folder, engine.world)
    monkeypatch.setenv("DRYDOCK_ARM_ENDPOINT", found.url)
    yield found
    found.close()


@pytest.fixture
def build(tmp_path: Path) -> dict[str, Any]:
    room = tmp_path / "source"
    (room / "room").mkdir(parents=True)
    (room / "room/code.py").write_text("pass\n")
    (room / "Dockerfile").write_text("FROM base\nCOPY room ./room\n")
    return {
        "subscription_id": SUBSCRIPTION, "resource_group": "g", "registry": "reg01", "image": "drydock/stress",
        "root": str(room), "dockerfile": "Dockerfile", "arguments": {}, "agent_pool": None,
        "context": context_hash(context_files(room, "Dockerfile")),
    }  # fmt: skip


def digest(build: dict[str, Any]) -> str:
    outs = ImageBuildProvider().create(build).outs
    assert outs is not None
    return str(outs["digest"])


def test_the_digest_follows_from_the_context(server: arm.ArmServer, build: dict[str, Any]) -> None:
    first = digest(build)
    assert first.startswith("sha256:") and digest(build) == first
    code = Path(build["root"]) / "room/code.py"
    code.write_text("other\n")
    assert digest(build | {"context": context_hash(context_files(code.parent.parent, "Dockerfile"))}) != first


def test_a_run_takes_its_time(server: arm.ArmServer, build: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    server.build_seconds = 0.2
    with caplog.at_level(logging.INFO):
        digest(build)
    assert "is running" in caplog.text


def test_a_build_that_fails_shows_its_log_and_the_next_one_succeeds(
    server: arm.ArmServer, build: dict[str, Any]
) -> None:
    inject(server.folder, Fault("build_failed", name="drydock/other"), Fault("build_failed", name="drydock/stress"))
    with pytest.raises(SettingsError) as caught:
        digest(build)
    assert "its build ended as Failed: failed to run step ID: build" in caught.value.problems[0]
    assert "ERROR: No matching distribution found" in caught.value.problems
    digest(build)


def test_a_throttled_run_is_asked_for_again(server: arm.ArmServer, build: dict[str, Any]) -> None:
    inject(server.folder, Fault("throttled", action="build", times=2), Fault("slow", action="read"))
    digest(build)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registry": "reg02"}, r"404 ResourceNotFound: The Resource 'Microsoft.ContainerRegistry/registries/reg02'"),
        ({"agent_pool": "builds"}, "there is no agent pool builds"),
    ],
)
def test_what_is_not_there_is_not_built(
    server: arm.ArmServer, build: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        digest(build | change)


@pytest.mark.parametrize(
    ("context", "dockerfile", "said"),
    [(b"no archive", "Dockerfile", "failed to download context"), (None, "Missing", "Missing: no such file")],
)
def test_a_context_must_be_an_archive_with_the_dockerfile(
    server: arm.ArmServer, build: dict[str, Any], context: bytes | None, dockerfile: str, said: str
) -> None:
    from infra.context import pack

    tasks = RegistryTasks(SUBSCRIPTION, "g", "reg01")
    packed = context or pack(context_files(Path(build["root"]), "Dockerfile"))
    request = {
        "type": "DockerBuildRequest", "sourceLocation": tasks.upload(packed), "dockerFilePath": dockerfile,
        "imageNames": ["a:b"], "platform": {"os": "Linux", "architecture": "amd64"},
    }  # fmt: skip
    with pytest.raises(SettingsError, match=said):
        tasks.wait(tasks.schedule(request), "a")
    with pytest.raises(SettingsError, match=r"400 InvalidRequest: type is not DockerBuildRequest; imageNames is empty"):
        tasks.schedule(request | {"type": "FileTaskRunRequest", "imageNames": []})
    with pytest.raises(SettingsError, match="nothing was uploaded to elsewhere"):
        tasks.schedule(request | {"sourceLocation": "elsewhere"})
    with pytest.raises(SettingsError, match="404 RunNotFound"):
        tasks.wait("ca1", "a")


class Builder:
    """Takes its time, says something, and fails where it is told to."""

    def __init__(self, seconds: float = 0.0, failure: Exception | None = None) -> None:
        self.seconds, self.failure = seconds, failure
        self.given: list[Any] = []

    def build(self, context: bytes, dockerfile: str, arguments: Any, images: Any, log: Path) -> str:
        self.given.append((dockerfile, dict(arguments), list(images)))
        log.write_text("STEP 1/2: FROM base\n")
        time.sleep(self.seconds)
        with log.open("a") as output:
            output.write("ERROR: No space left\n" if self.failure else "COMMIT\n")
        if self.failure:
            raise self.failure
        return "sha256:" + "5" * 64


def test_a_builder_makes_the_image(
    server: arm.ArmServer, build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("DRYDOCK_ARM_ENDPOINT", server.url)
    monkeypatch.setattr("infra.uploads.POLL_SECONDS", 0.02)
    server.builder = builder = Builder(0.2)
    with caplog.at_level(logging.INFO):
        assert (
            digest(build | {"arguments": {"PYTHON_IMAGE": "reg01.azurecr.io/cache/python@x"}}) == f"sha256:{'5' * 64}"
        )
    assert "is running" in caplog.text
    tag = build["context"][:12]
    given = ("Dockerfile", {"PYTHON_IMAGE": "reg01.azurecr.io/cache/python@x"}, [f"drydock/stress:{tag}"])
    assert builder.given == [given]


def test_a_builder_s_failure_ends_the_run_with_its_log(
    server: arm.ArmServer, build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("DRYDOCK_ARM_ENDPOINT", server.url)
    monkeypatch.setattr("infra.uploads.POLL_SECONDS", 0.02)
    for failure, said in (
        (RuntimeError("failed to run step ID: build: exit status 1"), "failed to run step ID: build: exit status 1"),
        (KeyError(), "KeyError"),
    ):
        server.builder = Builder(failure=failure)
        with pytest.raises(SettingsError) as caught:
            digest(build)
        assert f"its build ended as Failed: {said}" in caught.value.problems[0]
        assert {"STEP 1/2: FROM base", "ERROR: No space left"} <= set(caught.value.problems)


def test_faults_and_contexts_come_before_the_builder(server: arm.ArmServer, build: dict[str, Any]) -> None:
    server.builder = builder = Builder()
    inject(server.folder, Fault("build_failed", name="drydock/stress"))
    with pytest.raises(SettingsError, match="its build ended as Failed"):
        digest(build)
    assert builder.given == []


def test_sources_go_by_signature_alone(server: arm.ArmServer) -> None:
    answer = requests.put(
        f"{server.url}/sources/x?sig=guess", data=b"x", headers={"x-ms-blob-type": "BlockBlob"}, timeout=5
    )
    assert answer.status_code == 403 and server.builds.sources == {}
    assert requests.get(f"{server.url}/other", timeout=5).json()["error"]["code"] == "InvalidResourceType"
