"""The whole program with serving by KAITO, on the real engine and a real API server with KAITO's CRDs in our words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from localcloud.api import Api, ApiError
from localcloud.cloud import LocalCloud, Stack
from localcloud.pods import wait_for
from tests.engine.plans import SETTINGS, brought_up, edited, last_update, preview, written
from tests.unit.kaito_crds import SCHEMAS, definition
from tests.unit.test_kaito import environment
from workloads.kaito import NAMESPACE, manifest
from workloads.namespaces import SERVING

pytestmark = pytest.mark.timeout(900)

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
DEPLOYMENTS = f"/apis/apps/v1/namespaces/{SERVING}/deployments"
ROUTER = f"{DEPLOYMENTS}/router"
SERVICE = f"/api/v1/namespaces/{SERVING}/services/drydock"
WORKSPACES = f"/apis/kaito.sh/v1beta1/namespaces/{NAMESPACE}/workspaces"
UP_SECONDS = 300
IMAGE = "registry.example/kubectl@sha256:" + "a" * 64


@pytest.fixture(scope="module")
def definitions(api: Api) -> None:
    """KAITO's own kinds."""
    for kind in SCHEMAS:
        item = definition(kind)
        api.apply(item)
        wait_for(api, f"{DEFINITIONS}/{item['metadata']['name']}", structural)


def structural(found: dict[str, Any]) -> bool:
    conditions = {item["type"]: item["status"] for item in (found.get("status") or {}).get("conditions") or []}
    return conditions.get("Established") == "True" and conditions.get("NonStructuralSchema") != "True"


@pytest.fixture(scope="module")
def stack(cloud: LocalCloud, definitions: None) -> Stack:
    """The dev environment with one replica by KAITO, up."""
    return brought_up(cloud, served)


def served(text: str, **changes: Any) -> str:
    """The settings `text` with serving by KAITO."""
    settings = yaml.safe_load(text)
    config = settings["config"]
    config.pop("drydock:api_keys", None)
    config["drydock:pools"]["a100"].pop("spot", None)
    kaito = {"adapter_images": {"kubectl": IMAGE}, "unproven_adapters": True}
    one = {"runtime": "kaito", "pool": "a100", "min_replicas": 1, "max_replicas": 1, "kaito": kaito}
    config["drydock:serving"] = one | changes
    return yaml.safe_dump(settings)


def direct(text: str, *, kaito_stays: bool = False, **changes: Any) -> str:
    """The same with our own replicas."""
    settings = yaml.safe_load(served(text, **changes))
    config = settings["config"]
    del config["drydock:serving"]["kaito"], config["drydock:serving"]["runtime"]
    config["drydock:cluster"] |= {"kaito": kaito_stays}
    return yaml.safe_dump(settings)


def leads_to(api: Api) -> str:
    """The label by which the router finds its replicas."""
    (router,) = api.get(ROUTER)["spec"]["template"]["spec"]["initContainers"]
    return str(router["command"][router["command"].index("--selector") + 1])


def same_address(api: Api, before: dict[str, Any]) -> bool:
    now = api.get(SERVICE)
    return all(
        now[part][key] == before[part][key]
        for part, key in (("metadata", "uid"), ("metadata", "name"), ("spec", "clusterIP"), ("spec", "selector"))
    )


def names(api: Api) -> list[tuple[str, str]]:
    return [(item["metadata"]["name"], item["metadata"]["uid"]) for item in there(api, "workspaces")]


@contextmanager
def meanwhile(cloud: LocalCloud, act: Callable[[Api], None]) -> Iterator[None]:
    """`act` in a thread, with a client of its own, while the block runs; what goes wrong in it is raised here."""
    wrong: list[BaseException] = []

    def run() -> None:
        try:
            with cloud.control_plane.client() as own:
                act(own)
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(10)
    assert not wrong and not thread.is_alive(), wrong


def there(api: Api, plural: str) -> list[dict[str, Any]]:
    return api.list(f"/apis/kaito.sh/v1beta1/namespaces/{NAMESPACE}/{plural}")


def test_it_comes_up_as_a_workspace_and_a_second_up_changes_nothing(stack: Stack, api: Api) -> None:
    (workspace,) = there(api, "workspaces")
    assert workspace["resource"]["instanceType"] == "Standard_NC24ads_A100_v4"
    assert workspace["inference"]["adapters"] == [{"source": {"name": "kubectl", "image": IMAGE}}]
    assert [item["metadata"]["name"] for item in api.list(DEPLOYMENTS)] == ["router"]
    assert leads_to(api) == f"kaito.sh/workspace={workspace['metadata']['name']}"
    config = api.get(f"/api/v1/namespaces/{NAMESPACE}/configmaps/{workspace['inference']['config']}")
    assert set(config["data"]) == {"inference_config.yaml"}
    outputs = stack.outputs()
    assert outputs["endpoint"] == "http://drydock.drydock-serving.svc.cluster.local/v1"
    assert outputs["replicas"] == f"workspace/{workspace['metadata']['name']}"
    assert outputs["models"] == ["base", "kubectl"]
    assert f"workspace/{workspace['metadata']['name']}" in outputs["next_steps"][-1]
    assert preview(stack).changes == {}


def test_a_changed_setting_replaces_the_workspace_and_its_config_and_the_gap_is_told(stack: Stack) -> None:
    text = (stack.folder / SETTINGS).read_text()
    with written(stack, SETTINGS, served(text, max_model_len=2048)):
        plan = preview(stack)
    was = stack.outputs()["replicas"].removeprefix("workspace/")
    (becomes,) = {name.rpartition("-kaito-")[2] for name in plan.changes if name.startswith("Workspace")} - {was}
    assert plan.changes == {
        f"ConfigMap serving-kaito-{was}-config": {"delete"},
        f"Workspace serving-kaito-{was}": {"delete"},
        f"ConfigMap serving-kaito-{becomes}-config": {"create"},
        f"Workspace serving-kaito-{becomes}": {"create"},
        "Deployment serving-router-deployment": {"update"},
    }
    (gap,) = [line for line in plan.warnings if "nobody is answered for 10 to 46 minutes" in line]
    assert "pools.a100.max_nodes = 2 has room for both at once: serving.new_first: true keeps the old ones" in gap


def test_the_way_back_keeps_the_add_on_and_the_address_and_tells_the_gap(stack: Stack) -> None:
    text = (stack.folder / SETTINGS).read_text()
    with written(stack, SETTINGS, direct(text)):
        (refused,) = [line for line in preview(stack).errors if "cluster.kaito" in line]
    assert "is still KAITO's" in refused
    with written(stack, SETTINGS, direct(text, kaito_stays=True)):
        plan = preview(stack)
    assert not plan.errors
    workspace = stack.outputs()["replicas"].removeprefix("workspace/")
    assert plan.changes[f"Workspace serving-kaito-{workspace}"] == {"delete"}
    assert plan.changes["Deployment serving-engine-deployment"] == {"create"}
    assert plan.changes["Deployment serving-router-deployment"] == {"update"}
    assert "Service serving-router-service" not in plan.changes and "ManagedCluster cluster" not in plan.changes
    assert any("nobody is answered for 10 to 43 minutes" in line for line in plan.warnings)


def test_from_kaito_to_our_own_the_new_replicas_answer_before_the_old_ones_go(
    cloud: LocalCloud, stack: Stack, api: Api
) -> None:
    text, address = (stack.folder / SETTINGS).read_text(), api.get(SERVICE)
    seen: dict[str, Any] = {}

    def watch(own: Api) -> None:
        wait_for(own, ROUTER, lambda found: "app=engine" in str(found), UP_SECONDS)
        seen["engine"] = own.get(f"{DEPLOYMENTS}/engine").get("status", {}).get("availableReplicas")
        seen["workspaces"] = len(there(own, "workspaces"))

    with written(stack, SETTINGS, direct(text, kaito_stays=True, new_first=True)), meanwhile(cloud, watch):
        stack.pulumi("up", "--yes", "--skip-preview")
    assert seen == {"engine": 1, "workspaces": 1}, "ours answered, and KAITO's were still there"
    assert leads_to(api) == "app=engine" and there(api, "workspaces") == []
    assert same_address(api, address)
    assert stack.outputs()["replicas"] == "deployment/engine"


def test_from_our_own_to_kaito_the_new_replica_answers_before_the_old_ones_go(
    cloud: LocalCloud, stack: Stack, api: Api
) -> None:
    text, address = (stack.folder / SETTINGS).read_text(), api.get(SERVICE)
    seen: dict[str, Any] = {}

    def be_kaito(own: Api) -> None:
        (found,) = wait_for(own, WORKSPACES, lambda found: found.get("items"), UP_SECONDS)["items"]
        with pytest.raises(TimeoutError):  # Pulumi waits for KAITO's word
            wait_for(own, ROUTER, lambda found: "kaito.sh/workspace" in str(found), 5)
        seen["engine"] = own.get(f"{DEPLOYMENTS}/engine")["status"]["availableReplicas"]
        ready = {"type": "InferenceReady", "status": "True", "reason": "ready", "message": "", "observedGeneration": 1}
        status = {"status": {"conditions": [ready | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]}}
        own.patch(f"{WORKSPACES}/{found['metadata']['name']}/status", status)
        wait_for(own, ROUTER, lambda found: "kaito.sh/workspace" in str(found), UP_SECONDS)
        seen["still"] = own.find(f"{DEPLOYMENTS}/engine") is not None

    with written(stack, SETTINGS, served(text, new_first=True)):
        with meanwhile(cloud, be_kaito):
            stack.pulumi("up", "--yes", "--skip-preview")
        assert preview(stack).changes == {}
    assert seen == {"engine": 1, "still": True}
    assert [item["metadata"]["name"] for item in api.list(DEPLOYMENTS)] == ["router"]
    assert leads_to(api).startswith("kaito.sh/workspace=engine-") and same_address(api, address)


def test_a_new_replica_that_does_not_come_up_leaves_the_old_one_serving_and_can_be_taken_back(
    stack: Stack, api: Api
) -> None:
    text, before = (stack.folder / SETTINGS).read_text(), leads_to(api)
    ((name, uid),) = names(api)
    patience = ("workloads/kaito.py", "START_SECONDS = 3600", "START_SECONDS = 10")
    with written(stack, SETTINGS, served(text, new_first=True, max_model_len=2048)), edited(stack, *patience):
        done = stack.pulumi("up", "--yes", "--skip-preview", check=False)
    assert done.returncode != 0, "nobody said that it is ready"
    assert (name, uid) in names(api) and len(names(api)) == 2 and leads_to(api) == before
    done = stack.pulumi("up", "--yes", "--skip-preview", check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert names(api) == [(name, uid)] and leads_to(api) == before


def test_what_kaito_cannot_honour_stops_the_preview_at_its_line(stack: Stack) -> None:
    text = (stack.folder / SETTINGS).read_text()
    with written(stack, SETTINGS, served(text, expose="vnet", tool_call_parser="llama3_json")):
        told = "\n".join(preview(stack).errors)
    for setting in ("serving.expose", "serving.tool_call_parser"):
        assert f"{setting}: not with serving.runtime: kaito" in told
    assert f"{SETTINGS}:" in told


def test_a_second_replica_makes_it_an_inference_set(stack: Stack, api: Api) -> None:
    text = (stack.folder / SETTINGS).read_text()
    with written(stack, SETTINGS, served(text, min_replicas=2, max_replicas=2)):
        stack.pulumi("up", "--yes", "--skip-preview")
    assert last_update(stack)[0] == "succeeded"
    (several,) = there(api, "inferencesets")
    assert several["spec"]["replicas"] == 2 and there(api, "workspaces") == []


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("token", [None, "hf_token"])
def test_the_server_takes_what_we_write_and_keeps_all_of_it(
    api: Api, stack: Stack, replicas: int, token: str | None
) -> None:
    others = {"huggingface_token": token} if token else {}
    item = manifest(environment({"min_replicas": replicas, "max_replicas": replicas}, **others))
    kept = api.apply(item)
    for part in ("resource", "inference", "spec"):
        assert contains(kept.get(part), item.get(part)), part


def contains(kept: object, written: object) -> bool:
    """Whether all that was written is there; the server adds defaults, such as `accessMode: public`."""
    if isinstance(written, dict):
        return isinstance(kept, dict) and all(contains(kept.get(key), value) for key, value in written.items())
    if isinstance(written, list):
        return isinstance(kept, list) and len(kept) == len(written) and all(map(contains, kept, written))
    return kept == written


def test_the_server_refuses_a_field_that_kaito_does_not_have(api: Api, stack: Stack) -> None:
    item = manifest(environment({"min_replicas": 1, "max_replicas": 1}))
    item["metadata"]["name"] = "engine-wrong"
    for wrong, told in (
        (item | {"inference": item["inference"] | {"maxModelLen": 4096}}, "maxModelLen"),
        (item | {"resource": {"instanceType": "Standard_NC24ads_A100_v4"}}, "labelSelector"),
        (item | {"spec": {}}, "spec"),
    ):
        with pytest.raises(ApiError, match=told):
            api.apply(wrong)
