"""The whole program with serving by KAITO, on the real engine and a real API server with KAITO's CRDs in our words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from localcloud.api import Api, ApiError
from localcloud.cloud import LocalCloud, Stack
from localcloud.pods import wait_for
from localcloud.tools import Tools
from tests.engine.plans import last_update, preview, written
from tests.unit.kaito_crds import SCHEMAS, definition
from tests.unit.test_kaito import environment
from workloads.kaito import NAMESPACE, manifest

pytestmark = pytest.mark.timeout(900)

SETTINGS = "Pulumi.dev.yaml"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
IMAGE = "registry.example/kubectl@sha256:" + "a" * 64
REPLACED = {"replace", "create-replacement", "delete-replaced"}


@pytest.fixture(scope="module")
def cloud(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    with LocalCloud(tmp_path_factory.mktemp("kaito"), complete_jobs=False) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def api(cloud: LocalCloud) -> Iterator[Api]:
    with cloud.control_plane.client() as api:
        for kind in SCHEMAS:
            item = definition(kind)
            api.apply(item)
            wait_for(api, f"{DEFINITIONS}/{item['metadata']['name']}", structural)
        yield api


def structural(found: dict[str, Any]) -> bool:
    conditions = {item["type"]: item["status"] for item in (found.get("status") or {}).get("conditions") or []}
    return conditions.get("Established") == "True" and conditions.get("NonStructuralSchema") != "True"


@pytest.fixture(scope="module")
def stack(cloud: LocalCloud, api: Api) -> Stack:
    """The dev environment with one replica by KAITO, up."""
    stack = cloud.stack("dev")
    stack.pulumi("config", "rm", "--path", "drydock:api_keys.local")
    path = stack.folder / SETTINGS
    path.write_text(served(path.read_text()))
    done = stack.pulumi("up", "--yes", "--skip-preview", "--policy-pack", "policy", check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return stack


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


def there(api: Api, plural: str) -> list[dict[str, Any]]:
    return api.list(f"/apis/kaito.sh/v1beta1/namespaces/{NAMESPACE}/{plural}")


def test_it_comes_up_as_a_workspace_and_a_second_up_changes_nothing(stack: Stack, api: Api) -> None:
    (workspace,) = there(api, "workspaces")
    assert workspace["resource"]["instanceType"] == "Standard_NC24ads_A100_v4"
    assert workspace["inference"]["adapters"] == [{"source": {"name": "kubectl", "image": IMAGE}}]
    assert not api.list("/apis/apps/v1/namespaces/drydock-serving/deployments")
    service = api.get(f"/api/v1/namespaces/{NAMESPACE}/services/drydock")
    assert service["spec"]["selector"] == {"kaito.sh/workspace": workspace["metadata"]["name"]}
    config = api.get(f"/api/v1/namespaces/{NAMESPACE}/configmaps/{workspace['inference']['config']}")
    assert set(config["data"]) == {"inference_config.yaml"}
    outputs = stack.outputs()
    assert outputs["endpoint"] == f"http://drydock.{NAMESPACE}.svc.cluster.local/v1"
    assert outputs["models"] == ["base", "kubectl"]
    assert f"workspace/{workspace['metadata']['name']}" in outputs["next_steps"][-1]
    assert preview(stack).changes == {}


def test_a_changed_setting_replaces_the_workspace_and_its_config_alone(stack: Stack) -> None:
    text = (stack.folder / SETTINGS).read_text()
    with written(stack, SETTINGS, served(text, max_model_len=2048)):
        assert preview(stack).changes == {
            "ConfigMap serving-kaito-config": REPLACED,
            "Workspace serving-kaito-replicas": REPLACED,
            "Service serving-kaito-service": {"update"},
        }


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
