"""What the deployer's machine sends: the providers' methods against fakes on loopback."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pulumi.dynamic import CreateResult
from pulumi.dynamic.dynamic import serialize_provider

import blobs.store
from blobs.store import Refused
from common.settings import SettingsError
from infra import uploads
from infra.context import context_files, context_hash
from infra.uploads import FileUploadProvider, ImageBuildProvider
from tests.unit.blob_fakes import KEY, FakeAccount, Server, _Handler

REGISTRY = "/subscriptions/sub/resourceGroups/group/providers/Microsoft.ContainerRegistry/registries/reg"
DIGEST = "sha256:" + "d" * 64
SIGNATURE = "sig=do-not-tell"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.uploads.time.sleep", lambda seconds: None)
    monkeypatch.setattr(blobs.store, "BACKOFF_SECONDS", 0)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAccount]:
    fake = FakeAccount()
    monkeypatch.setenv("DRYDOCK_BLOB_ENDPOINT", f"{fake.url}/store")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    yield fake
    fake.close()


def upload_of(path: Path, content: bytes = b"rows\n") -> dict[str, Any]:
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return {"account": "store", "container": "box", "blob": f"{digest}.jsonl", "path": str(path), "sha256": digest}


@pytest.mark.parametrize("provider", [FileUploadProvider, ImageBuildProvider])
def test_the_copy_of_a_provider_that_pulumi_keeps_is_plain_and_never_changes(provider: Any) -> None:
    first, second = serialize_provider(provider()), serialize_provider(provider())
    assert first == second and len(first) < 120  # a reference to the class by name, not its code
    assert provider.serialize_as_secret_always is False


def test_a_file_is_put_once_under_its_digest(account: FakeAccount, tmp_path: Path) -> None:
    props = upload_of(tmp_path / "rows")
    made = FileUploadProvider().create(props)
    assert made.id == f"az://store/box/{props['blob']}" and made.outs == props
    assert account.blobs[props["blob"]] == (b"rows\n", {"sha256": props["sha256"]})
    FileUploadProvider().create(props)
    assert len(account.writes()) == 1


def test_only_content_and_destination_make_a_difference(tmp_path: Path) -> None:
    old = upload_of(tmp_path / "rows")
    moved = FileUploadProvider().diff("id", old, old | {"path": "/elsewhere/rows", "__provider": "another"})
    assert moved.changes is False and moved.replaces == []
    for key in ("account", "container", "blob", "sha256"):
        found = FileUploadProvider().diff("id", old, old | {key: "other"})
        assert found.changes is True and found.replaces == [key] and not found.delete_before_replace


def test_deleting_the_resource_leaves_the_file(account: FakeAccount, tmp_path: Path) -> None:
    props = upload_of(tmp_path / "rows")
    FileUploadProvider().create(props)
    FileUploadProvider().delete("id", props)
    ImageBuildProvider().delete("id", {})
    assert props["blob"] in account.blobs and not any(line.startswith("DELETE") for line in account.seen)


def test_a_file_that_changed_since_the_preview_is_not_put(account: FakeAccount, tmp_path: Path) -> None:
    props = upload_of(tmp_path / "rows")
    (tmp_path / "rows").write_bytes(b"others\n")
    with pytest.raises(SettingsError, match="changed while pulumi was running"):
        FileUploadProvider().create(props)
    (tmp_path / "rows").unlink()
    with pytest.raises(SettingsError, match="no such file, though"):
        FileUploadProvider().create(props)
    assert account.seen == []


def test_a_role_that_spreads_slowly_is_waited_for(
    account: FakeAccount, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = iter([(403, "AuthorizationPermissionMismatch")] * 2)
    account.fault = lambda method, name: next(refusals, None)
    props = upload_of(tmp_path / "rows")
    with caplog.at_level(logging.INFO):
        FileUploadProvider().create(props)
    assert props["blob"] in account.blobs
    assert "waiting for the right to write" in caplog.text


def test_a_role_that_never_comes_is_named(
    account: FakeAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "ROLE_SECONDS", 0.0)
    account.fault = lambda method, name: (403, "AuthorizationPermissionMismatch")
    with pytest.raises(Refused) as caught:
        FileUploadProvider().create(upload_of(tmp_path / "rows"))
    assert "whoever runs pulumi up needs the role Storage Blob Data Contributor on account store" in str(caught.value)
    assert "ten minutes" in str(caught.value) and caught.value.__cause__ is None


def test_networks_refusal_is_not_waited_for(account: FakeAccount, tmp_path: Path) -> None:
    account.fault = lambda method, name: (403, "AuthorizationFailure")
    with pytest.raises(SettingsError, match="network rules of account store"):
        FileUploadProvider().create(upload_of(tmp_path / "rows"))
    assert len(account.seen) == 1


def test_refresh_forgets_a_file_that_is_gone_and_keeps_one_it_may_not_see(account: FakeAccount, tmp_path: Path) -> None:
    props = upload_of(tmp_path / "rows")
    FileUploadProvider().create(props)
    assert FileUploadProvider().read("id", props).id == "id"
    account.fault = lambda method, name: (403, "AuthorizationPermissionMismatch")
    assert FileUploadProvider().read("id", props).id == "id"
    account.fault = lambda method, name: None
    account.blobs.clear()
    gone = FileUploadProvider().read("id", props)
    assert gone.id is None and gone.outs == {}


class FakeRegistry(Server):
    """Azure Resource Manager with one registry, and the place where sources go. `statuses` are those of its run."""

    def __init__(self) -> None:
        self.statuses = ["Queued", "Running", "Succeeded"]
        self.faults: list[int] = []  # statuses of the next answers
        self.images = [{"repository": "drydock/stress", "digest": DIGEST}]
        self.sources: list[tuple[bytes, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.authorizations: set[str | None] = set()
        super().__init__(_Arm)


class _Arm(_Handler):
    server: FakeRegistry

    def do(self) -> None:
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(f"{self.command} {path}")
        self.server.authorizations.add(self.headers.get("Authorization"))
        if self.server.faults:
            error = {"error": {"code": "AsTheTestWants", "message": "said Azure"}}
            return self.answer(self.server.faults.pop(0), json.dumps(error).encode())
        if path == "/source" and query == SIGNATURE:
            self.server.sources.append((body, str(self.headers["x-ms-blob-type"])))
            return self.answer(201)
        if path == "/log" and query == SIGNATURE:
            return self.answer(200, b"".join(b"line %d\n" % number for number in range(100)))
        assert query == "api-version=2019-06-01-preview"
        found: dict[str, Any] = {
            f"{REGISTRY}/listBuildSourceUploadUrl": {"uploadUrl": f"{self.server.url}/source?{SIGNATURE}", "relativePath": "src/1"},
            f"{REGISTRY}/scheduleRun": {"properties": {"runId": "ca1", "status": "Queued"}},
            f"{REGISTRY}/runs/ca1/listLogSasUrl": {"logLink": f"{self.server.url}/log?{SIGNATURE}"},
        }  # fmt: skip
        if path == f"{REGISTRY}/scheduleRun":
            self.server.requests.append(json.loads(body))
        if path == f"{REGISTRY}/runs/ca1":
            statuses = self.server.statuses
            status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
            found[path] = {"properties": {"runId": "ca1", "status": status, "outputImages": self.server.images}}
        self.answer(200, json.dumps(found[path]).encode(), Content_Type="application/json")

    do_GET = do_PUT = do_POST = do


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistry]:
    fake = FakeRegistry()
    monkeypatch.setenv("DRYDOCK_ARM_ENDPOINT", fake.url)
    yield fake
    fake.close()


@pytest.fixture
def build(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "room").mkdir()
    (tmp_path / "room/code.py").write_text("pass\n")
    (tmp_path / "Dockerfile").write_text("FROM base\nCOPY room ./room\n")
    return {
        "subscription_id": "sub", "resource_group": "group", "registry": "reg", "image": "drydock/stress",
        "root": str(tmp_path), "dockerfile": "Dockerfile", "arguments": {"BASE": "reg.example/cache/python:3"},
        "context": context_hash(context_files(tmp_path, "Dockerfile")), "agent_pool": None,
    }  # fmt: skip


def test_an_image_is_built_by_the_registry_from_the_uploaded_context(
    registry: FakeRegistry, build: dict[str, Any]
) -> None:
    made: CreateResult = ImageBuildProvider().create(build)
    assert made.outs is not None and made.outs["digest"] == DIGEST and made.outs["run_id"] == "ca1"
    assert made.id == f"reg/drydock/stress@{DIGEST}"
    assert registry.requests == [
        {
            "type": "DockerBuildRequest", "sourceLocation": "src/1", "dockerFilePath": "Dockerfile",
            "imageNames": [f"drydock/stress:{build['context'][:12]}"], "isPushEnabled": True,
            "platform": {"os": "Linux", "architecture": "amd64"},
            "arguments": [{"name": "BASE", "value": "reg.example/cache/python:3"}], "timeout": 3600,
        }
    ]  # fmt: skip
    ((source, kind),) = registry.sources
    assert kind == "BlockBlob"
    with tarfile.open(fileobj=io.BytesIO(source)) as archive:
        assert archive.getnames() == ["Dockerfile", "room/code.py"]
    assert registry.authorizations == {None}  # no token leaves for a stand-in on loopback, nor to a signed address


def test_a_pool_of_agents_is_asked_for_by_name(registry: FakeRegistry, build: dict[str, Any]) -> None:
    ImageBuildProvider().create(build | {"agent_pool": "builds"})
    assert registry.requests[0]["agentPoolName"] == "builds"


def test_an_image_differs_by_context_name_and_registry_alone(build: dict[str, Any]) -> None:
    same = build | {"root": "/elsewhere", "arguments": {}, "agent_pool": "builds", "subscription_id": "moved"}
    assert ImageBuildProvider().diff("id", build | {"digest": DIGEST}, same).changes is False
    for key in ("context", "image", "registry"):
        assert ImageBuildProvider().diff("id", build, build | {key: "other"}).replaces == [key]


def test_a_context_that_changed_since_the_preview_is_not_built(
    registry: FakeRegistry, build: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "room/code.py").write_text("changed\n")
    with pytest.raises(SettingsError, match="drydock/stress: its files changed while pulumi was running"):
        ImageBuildProvider().create(build)
    assert registry.seen == []


@pytest.mark.parametrize("status", ["Failed", "Canceled", "Error", "Timeout"])
def test_a_failed_build_shows_the_end_of_its_log_and_how_to_see_the_rest(
    registry: FakeRegistry, build: dict[str, Any], status: str
) -> None:
    registry.statuses = ["Running", status]
    with pytest.raises(SettingsError) as caught:
        ImageBuildProvider().create(build)
    first, *lines, last = caught.value.problems
    assert first.endswith(f"its build ended as {status}") and first.startswith("drydock/stress:")
    assert lines == [f"line {number}" for number in range(70, 100)]
    assert last == "the whole log: az acr task logs --registry reg --run-id ca1"
    assert SIGNATURE not in str(caught.value)


def test_a_run_without_our_image_is_no_success(registry: FakeRegistry, build: dict[str, Any]) -> None:
    registry.images = [
        {"repository": "drydock/other", "digest": DIGEST},
        {"repository": "drydock/stress", "digest": ""},
    ]
    with pytest.raises(SettingsError, match=r"tells no digest.*--run-id ca1"):
        ImageBuildProvider().create(build)


def test_a_run_that_never_ends_is_given_up(
    registry: FakeRegistry, build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "BUILD_SECONDS", 0)
    monkeypatch.setattr(uploads, "QUEUE_SECONDS", 0)
    registry.statuses = ["Queued"]
    with pytest.raises(SettingsError, match="run ca1 is Queued after 0 s"):
        ImageBuildProvider().create(build)


def test_passing_trouble_is_waited_out(registry: FakeRegistry, build: dict[str, Any]) -> None:
    registry.faults = [429, 503]
    assert ImageBuildProvider().create(build).id.endswith(DIGEST)
    assert registry.seen[:3] == [f"POST {REGISTRY}/listBuildSourceUploadUrl"] * 3


def test_a_missing_role_is_named_at_once(registry: FakeRegistry, build: dict[str, Any]) -> None:
    registry.faults = [403]
    with pytest.raises(SettingsError) as caught:
        ImageBuildProvider().create(build)
    assert "AsTheTestWants: said Azure" in str(caught.value)
    assert "Container Registry Tasks Contributor on group group" in str(caught.value)
    assert len(registry.seen) == 1


def test_a_wrong_request_is_not_repeated(registry: FakeRegistry, build: dict[str, Any]) -> None:
    registry.faults = [409]
    with pytest.raises(SettingsError, match="reg: listBuildSourceUploadUrl: 409 AsTheTestWants: said Azure"):
        ImageBuildProvider().create(build)
    assert len(registry.seen) == 1


def test_no_answer_is_told_without_the_signed_address(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = uploads.RegistryTasks("sub", "group", "reg")
    with pytest.raises(SettingsError) as caught:
        tasks._send("PUT", f"http://127.0.0.1:1/source?{SIGNATURE}", "upload of the build context")
    assert str(caught.value) == "reg: upload of the build context: no answer from 127.0.0.1 (ConnectionError)"


def test_azures_own_endpoint_gets_a_token_for_its_audience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRYDOCK_ARM_ENDPOINT", raising=False)
    asked: list[str] = []

    class Token:
        token = "t0ken"

    class Credential:
        def get_token(self, *scopes: str) -> Token:
            asked.extend(scopes)
            return Token()

    class Answer:
        ok, status_code = True, 200

        def json(self) -> dict[str, Any]:
            return {"properties": {"runId": "ca1"}}

    sent: list[tuple[str, dict[str, str]]] = []

    def request(method: str, url: str, *, headers: dict[str, str], **_: Any) -> Answer:
        sent.append((url, headers))
        return Answer()

    monkeypatch.setattr("azure.identity.DefaultAzureCredential", Credential)
    tasks = uploads.RegistryTasks("sub", "group", "reg")
    monkeypatch.setattr(tasks._session, "request", request)
    assert tasks.schedule({}) == "ca1"
    assert asked == ["https://management.azure.com/.default"]
    assert sent == [
        (
            f"https://management.azure.com{REGISTRY}/scheduleRun?api-version=2019-06-01-preview",
            {"Authorization": "Bearer t0ken"},
        )
    ]
