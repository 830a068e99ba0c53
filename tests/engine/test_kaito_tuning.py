"""The whole program with tuning by KAITO, on the real engine and a real API server with KAITO's CRD in our words.

KAITO itself is played: its Job, and how it ends. What has it tune is real, under its own account and rights.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import exits
from common.files import write_json
from common.kube import Api as Account
from common.kube import ApiError as Refused
from common.settings import SettingsError
from common.sigterm import Sigterm
from localcloud.api import Api, ApiError
from localcloud.cloud import LocalCloud, Stack
from localcloud.pods import wait_for
from tests.engine.objects import job, pod_template
from tests.engine.plans import SETTINGS, brought_up, preview, written
from tests.engine.test_kaito import DEFINITIONS, structural
from tests.stack.test_workloads_kaito_tuning import settings
from tests.unit.kaito_crds import definition
from training.kaito import Conductor

pytestmark = pytest.mark.timeout(900)

PLACE, OURS = "drydock-kaito-tuning", "drydock-tuning"
WORKSPACES = f"/apis/kaito.sh/v1beta1/namespaces/{PLACE}/workspaces"
JOBS = "/apis/batch/v1/namespaces/{}/jobs"


@pytest.fixture(scope="module")
def stack(cloud: LocalCloud, api: Api) -> Stack:
    """The dev environment with tuning by KAITO, up; its CRD is not there yet, as where the add-on was just switched on."""
    return brought_up(cloud, tuned)


def tuned(text: str, **gate: Any) -> str:
    """The settings `text` with tuning by KAITO."""
    whole = yaml.safe_load(text)
    config = whole["config"] | settings("kaito")
    config["drydock:pools"]["a100"].pop("spot", None)
    config["drydock:adapters"]["kubectl"] |= {"gate": {"min_gain": 0.1} | gate}
    return yaml.safe_dump(whole | {"config": config})


def one(api: Api, place: str, start: str) -> dict[str, Any]:
    (found,) = (item for item in api.list(JOBS.format(place)) if item["metadata"]["name"].startswith(start))
    return found


def workspace(api: Api) -> dict[str, Any]:
    name = one(api, PLACE, "kaito-")["metadata"]["name"]
    text = api.get(f"/api/v1/namespaces/{PLACE}/configmaps/{name}")["data"]["workspace.json"]
    return dict(yaml.safe_load(text))


def account(api: Api, folder: Path) -> Account:
    """The API server as the pod sees it that has KAITO tune."""
    folder.mkdir()
    path = f"/api/v1/namespaces/{PLACE}/serviceaccounts/conductor/token"
    (folder / "token").write_text(api.post(path, {"spec": {}})["status"]["token"])
    shutil.copy(Path(str(api._session.verify)), folder / "ca.crt")
    return Account(api.server, folder)


def conductor(api: Api, folder: Path, finished: Callable[[], bool], retries: int = 0) -> Conductor:
    mine, judge = one(api, PLACE, "kaito-"), one(api, OURS, "tune-")
    then = f"{OURS}/{judge['metadata']['name']}"
    return Conductor(
        account(api, folder), workspace(api), mine["metadata"]["name"], then, 3600, retries, finished, 0.2, 5
    )


def workspace_is_there(api: Api) -> None:
    """One has been made. For some seconds after a CRD came, the server answers 429: its storage begins."""
    deadline = time.monotonic() + 60
    while True:
        try:
            if api.list(WORKSPACES):
                return
        except ApiError as error:
            if error.status != 429:
                raise
        assert time.monotonic() < deadline, "no Workspace within a minute"
        time.sleep(0.2)


def kaito_begins(api: Api, name: str) -> None:
    """As KAITO does: a Job of the Workspace's name, owned by it."""
    item = job(name, PLACE, pod_template({"kaito.sh/workspace": name}), suspend=True)
    found = api.get(f"{WORKSPACES}/{name}")
    owner = {"apiVersion": found["apiVersion"], "kind": "Workspace", "name": name, "uid": found["metadata"]["uid"]}
    item["metadata"]["ownerReferences"] = [owner | {"controller": True}]
    api.apply(item)


def test_it_comes_up_without_the_crd_and_a_second_up_changes_nothing(stack: Stack, api: Api) -> None:
    judge, mine = one(api, OURS, "tune-"), one(api, PLACE, "kaito-")
    assert judge["spec"]["suspend"] is True and not judge["status"].get("active")
    labels = [pod["metadata"]["labels"] for pod in api.list(f"/api/v1/namespaces/{OURS}/pods")]
    assert not [each for each in labels if each.get("app") == "tune"], "no GPU waits"
    wait_for(api, f"{JOBS.format(PLACE)}/{mine['metadata']['name']}", lambda found: found["status"].get("active") == 1)
    steps = stack.outputs()["next_steps"]
    assert f"kubectl -n {PLACE} logs -f job/{mine['metadata']['name']} --all-containers" in steps
    assert preview(stack).changes == {}


def test_what_kaito_cannot_honour_stops_the_preview_at_its_line(stack: Stack) -> None:
    text = (stack.folder / SETTINGS).read_text()
    whole = yaml.safe_load(text)
    whole["config"]["drydock:adapters"]["kubectl"]["seed"] = 7
    whole["config"]["drydock:base"]["revision"] = "a" * 40
    with written(stack, SETTINGS, yaml.safe_dump(whole)):
        told = "\n".join(preview(stack).errors)
    for setting in ("adapters.kubectl.seed", "base.revision"):
        assert f"{setting}: not with tuning.runtime: kaito" in told
    assert f"{SETTINGS}:" in told


def test_kaito_tunes_then_the_evaluation_runs_and_the_node_is_free(stack: Stack, api: Api, tmp_path: Path) -> None:
    name, there = workspace(api)["metadata"]["name"], threading.Event()
    ended: list[int] = []
    run = conductor(api, tmp_path / "account", there.is_set)
    thread = threading.Thread(target=lambda: ended.append(run.run(Sigterm())), daemon=True)
    thread.start()
    item = definition("Workspace")  # the add-on, after a while
    api.apply(item)
    wait_for(api, f"{DEFINITIONS}/{item['metadata']['name']}", structural)
    workspace_is_there(api)
    made = api.get(f"{WORKSPACES}/{name}")
    written_down = workspace(api)
    assert made["tuning"]["config"] == name and made["tuning"]["method"] == "lora"
    assert made["tuning"]["input"] == written_down["tuning"]["input"]
    assert made["tuning"]["output"] == written_down["tuning"]["output"], "the server keeps volumes as they are"
    (owner,) = made["metadata"]["ownerReferences"]
    assert owner["uid"] == one(api, PLACE, "kaito-")["metadata"]["uid"]
    kaito_begins(api, name)
    done = {"type": "Complete", "status": "True"}
    times = {"startTime": "2026-11-27T00:00:00Z", "completionTime": "2026-11-27T01:00:00Z"}
    before = {"type": "SuccessCriteriaMet", "status": "True"}
    status = {"succeeded": 1, "conditions": [before, done], **times}
    path = f"{JOBS.format(PLACE)}/{name}"
    api.patch(f"{path}/status", {"status": status})
    assert one(api, OURS, "tune-")["spec"]["suspend"] is True, "its adapter is not in Blob yet"
    there.set()
    thread.join(30)
    assert ended == [exits.OK]
    judge = one(api, OURS, "tune-")
    assert judge["spec"]["suspend"] is False
    wait_for(api, f"{JOBS.format(OURS)}/{judge['metadata']['name']}", lambda found: found["status"].get("active") == 1)
    assert not api.list(WORKSPACES)
    assert preview(stack).changes == {}, "what ran is not made again"


def test_its_account_may_do_nothing_else(stack: Stack, api: Api, tmp_path: Path) -> None:
    may = account(api, tmp_path / "account")
    write_json(tmp_path / "none.json", {})
    for method, path in (
        ("GET", WORKSPACES),
        ("GET", f"/api/v1/namespaces/{PLACE}/secrets"),
        ("GET", f"{JOBS.format(OURS)}"),
        ("DELETE", f"{JOBS.format(OURS)}/{one(api, OURS, 'tune-')['metadata']['name']}"),
        ("GET", f"/api/v1/namespaces/{OURS}/pods"),
    ):
        with pytest.raises(Refused, match="403"):
            may.ask(method, path)


def test_another_gate_asks_the_adapter_that_is_there_and_a_failed_training_ends(
    stack: Stack, api: Api, tmp_path: Path
) -> None:
    text, before = (stack.folder / SETTINGS).read_text(), workspace(api)
    with written(stack, SETTINGS, tuned(text, min_gain=0.2)):
        stack.pulumi("up", "--yes", "--skip-preview")
        assert workspace(api) == before, "the same weights"
        judge = one(api, OURS, "tune-")
        assert judge["spec"]["suspend"] is True
        # What it says where the adapter is lost, and KAITO fails once more than it may.
        name = before["metadata"]["name"]
        run = conductor(api, tmp_path / "failing", lambda: False)
        told: list[str] = []

        def follow() -> None:
            try:
                run.run(Sigterm())
            except SettingsError as error:
                told.append(str(error))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        workspace_is_there(api)
        kaito_begins(api, name)
        api.patch(f"{JOBS.format(PLACE)}/{name}/status", {"status": {"failed": 1}})
        thread.join(30)
        assert "failed 1 times" in told[0] and not api.list(WORKSPACES)
        assert one(api, OURS, "tune-")["spec"]["suspend"] is True
        assert conductor(api, tmp_path / "there", lambda: True).run(Sigterm()) == exits.OK
        assert one(api, OURS, "tune-")["spec"]["suspend"] is False


def test_the_server_refuses_a_field_that_kaito_does_not_have(stack: Stack, api: Api) -> None:
    item = workspace(api)
    item["metadata"]["name"] = "tune-wrong"
    for wrong, told in (
        (item | {"tuning": item["tuning"] | {"epochs": 3}}, "epochs"),
        (item | {"tuning": {key: value for key, value in item["tuning"].items() if key != "output"}}, "output"),
    ):
        with pytest.raises(ApiError, match=told):
            api.apply(wrong)
