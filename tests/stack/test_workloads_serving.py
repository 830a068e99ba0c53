"""The replicas: what is asked of the node, in what order things start and end, and that a setting reaches the container."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from infra.settings import Base, ClientTier, GpuPool, Serving
from serving.__main__ import main as serving_command
from serving.keys import NONE_CONFIGURED, Keys
from serving.spec import ServingSpec, Tier
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, deploy
from tests.unit.registrations import deploy_with_requests
from workloads.engine import (
    Engine,
    EngineArgs,
    engine_share,
    grace_seconds,
    keys_json,
    rollout,
    startup_failures,
)
from workloads.placement import gpu_share

POOL = GpuPool(vm_size="Standard_NC24ads_A100_v4", max_nodes=3, spot=True)
BASE = Base(model="meta-llama/Llama-3.1-8B-Instruct", revision="0" * 40, served_name="llama")
SETTINGS = Serving(pool="a100", min_replicas=2, max_replicas=2, max_model_len=8192)
IMAGE = "example.azurecr.io/drydock/serving@sha256:" + "d" * 64
SECRET = {"4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270"}  # Pulumi's mark of a secret


def args(settings: Serving = SETTINGS, pool: GpuPool = POOL, **more: Any) -> EngineArgs:
    given: dict[str, Any] = {
        "base_address": "az://account/models/meta-llama/Llama-3.1-8B-Instruct/0",
        "image": IMAGE,
        "store": "oci://example.azurecr.io/adapters",
        "adapters": ("kubectl", "triage"),
        "max_lora_rank": 32,
        "api_keys": {"team-a": SecretStr("plain-key")},
    }
    return EngineArgs(settings=settings, pool=pool, base=BASE, **{**given, **more})


def declared(engine: EngineArgs) -> Recorder:
    return deploy(lambda: Engine("engine", engine) and None)


@cache
def usual() -> Recorder:
    return declared(args())


def deployment(seen: Recorder) -> dict[str, Any]:
    return seen.one(":Deployment").inputs


def pod(seen: Recorder) -> dict[str, Any]:
    found: dict[str, Any] = deployment(seen)["spec"]["template"]["spec"]
    return found


def container(seen: Recorder, name: str) -> dict[str, Any]:
    spec = pod(seen)
    return next(item for item in [*spec["initContainers"], *spec["containers"]] if item["name"] == name)


def spec_of(seen: Recorder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(seen.one(":ConfigMap").inputs["data"]["serving.json"])
    return found


def test_every_object_keeps_the_published_schema() -> None:
    objects = [item.inputs for item in usual().resources if item.type.startswith("kubernetes:")]
    assert {item["kind"] for item in objects} == {
        "ConfigMap", "Secret", "PriorityClass", "NetworkPolicy", "PodDisruptionBudget", "Deployment",
    }  # fmt: skip
    revealed = [
        item | {"stringData": item["stringData"]["value"]} if item["kind"] == "Secret" else item for item in objects
    ]
    assert [said for item in revealed for said in problems(item)] == []


def test_selectors_find_the_pods() -> None:
    labels = deployment(usual())["spec"]["template"]["metadata"]["labels"]
    assert labels["azure.workload.identity/use"] == "true"
    selectors = [
        deployment(usual())["spec"]["selector"],
        usual().one(":PodDisruptionBudget").inputs["spec"]["selector"],
        usual().one(":NetworkPolicy").inputs["spec"]["podSelector"],
        *(each["labelSelector"] for each in pod(usual())["topologySpreadConstraints"]),
    ]
    assert len(selectors) == 5
    for selector in selectors:
        assert selector["matchLabels"].items() <= labels.items()


def test_every_mount_has_its_volume_and_every_volume_exists() -> None:
    spec, seen = pod(usual()), usual()
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    used = {mount["name"] for item in [*spec["initContainers"], *spec["containers"]] for mount in item["volumeMounts"]}
    assert used == set(volumes)
    assert volumes["spec"]["configMap"]["name"] == seen.one(":ConfigMap").inputs["metadata"]["name"]
    assert volumes["keys"]["secret"]["secretName"] == seen.one(":Secret").inputs["metadata"]["name"]
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_a_changed_setting_reaches_the_container_and_rolls_the_pods() -> None:
    changed = declared(args(SETTINGS.model_copy(update={"max_num_seqs": 17})))
    assert spec_of(changed)["max_num_seqs"] == 17
    names = [seen.one(":ConfigMap").inputs["metadata"]["name"] for seen in (usual(), changed)]
    assert names[0] != names[1]
    assert next(item for item in pod(changed)["volumes"] if item["name"] == "spec")["configMap"]["name"] == names[1]


def test_the_settings_of_before_stay_for_the_pods_that_mount_them() -> None:
    """An old ReplicaSet makes pods in a rollout, and again after `kubectl rollout undo`, which runbooks prescribe."""
    _, requests = deploy_with_requests(lambda: Engine("engine", args()) and None)
    assert requests["ConfigMap", "engine-spec"].retainOnDelete


def test_another_store_rolls_the_pods_too() -> None:
    moved = declared(args(store="oci://other.azurecr.io/adapters"))
    assert moved.one(":ConfigMap").inputs["metadata"]["name"] != usual().one(":ConfigMap").inputs["metadata"]["name"]


def test_changed_keys_do_not_roll_the_pods() -> None:
    rotated = declared(args(api_keys={"team-a": SecretStr("another")}))
    assert deployment(rotated) == deployment(usual())
    assert rotated.one(":Secret").inputs["stringData"] != usual().one(":Secret").inputs["stringData"]


def test_the_containers_parse_what_the_stack_writes() -> None:
    spec = ServingSpec.model_validate(spec_of(usual()))
    assert spec.base_model == "/models/Llama-3.1-8B-Instruct" and spec.base_name == "llama"
    assert spec.adapters == ("kubectl", "triage") and spec.max_lora_rank == 32
    assert spec.max_model_len == 8192 and spec.device == "cuda"


@pytest.mark.parametrize("name", ["engine", "sidecar"])
def test_the_command_line_takes_these_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = container(usual(), name)["command"]
    assert command[:3] == ["python", "-m", "serving"]
    # The spec's folder exists in the pod alone: what is complained about must be the file, not an argument.
    assert serving_command(command[3:]) == 2
    assert "/etc/drydock/serving.json: no such file" in capsys.readouterr().err


def test_only_the_hash_of_a_key_leaves_and_that_as_a_secret() -> None:
    given = usual().one(":Secret").inputs["stringData"]
    assert SECRET.items() <= given.items()
    clients = {"team-a": {"sha256": hashlib.sha256(b"plain-key").hexdigest(), "tier": "standard"}}
    assert json.loads(given["value"]["keys.json"]) == {"tiers": {}, "clients": clients}
    assert all("plain-key" not in json.dumps(item.inputs) for item in usual().resources)


def test_the_engine_reads_clients_and_tiers_as_the_stack_writes_them(tmp_path: Path) -> None:
    keys = {name: SecretStr(f"key of {name}") for name in ("web", "nightly")}
    tiers = {"batch": ClientTier(clients=("nightly",), output_tokens=512), "standard": ClientTier(n=2)}
    (tmp_path / "keys.json").write_text(keys_json(keys, tiers))
    known = Keys(tmp_path / "keys.json")
    assert known.caller([(b"api-key", b"key of web")]) == ("web", "standard", Tier(n=2))
    assert known.caller([(b"api-key", b"key of nightly")]) == ("nightly", "batch", Tier(output_tokens=512))
    (tmp_path / "keys.json").write_text(keys_json({}, {}))
    assert known.caller([(b"api-key", b"key of web")]) == NONE_CONFIGURED


def test_base_first_then_the_sidecar_that_outlives_the_engine() -> None:
    first, second = pod(usual())["initContainers"]
    assert first["name"] == "fetch-base" and "restartPolicy" not in first
    assert first["command"][5:] == ["/models/Llama-3.1-8B-Instruct", "--wait-seconds", "7200"]
    assert second["name"] == "sidecar" and second["restartPolicy"] == "Always"
    assert second["livenessProbe"]["httpGet"]["port"] == second["ports"][0]["containerPort"] == 9402


def test_the_pod_asks_for_one_gpu_and_no_more_than_its_share_of_the_node() -> None:
    engine, sidecar, fetch = (container(usual(), name)["resources"] for name in ("engine", "sidecar", "fetch-base"))
    assert engine["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in {**sidecar["limits"], **fetch["limits"]}
    assert engine["requests"]["cpu"] == "22750m" and sidecar["requests"]["cpu"] == "250m"  # 23 of 24
    memory = [int(item["requests"]["memory"].removesuffix("Gi")) for item in (engine, sidecar)]
    assert sum(memory) == 187  # 85 % of 220 GiB
    for item in (engine, sidecar, fetch):
        assert item["requests"]["memory"] == item["limits"]["memory"]
        assert "ephemeral-storage" in item["requests"]


@pytest.mark.parametrize("vm_size", ["Standard_NC4as_T4_v3", "Standard_NV6ads_A10_v5", "Standard_NC96ads_A100_v4"])
def test_the_smallest_share_leaves_the_engine_something(vm_size: str) -> None:
    share = engine_share(GpuPool(vm_size=vm_size, os_disk_gib=128), 1)
    assert int(share.cpu.removesuffix("m")) >= 2000
    assert int(share.memory.removesuffix("Gi")) >= 16


def test_nodes_are_those_of_the_pool_and_spot_is_tolerated() -> None:
    assert pod(usual())["nodeSelector"] == {"drydock/pool": "a100"}
    assert {item["key"] for item in pod(usual())["tolerations"]} == {"sku", "kubernetes.azure.com/scalesetpriority"}


def test_the_pod_has_no_token_no_links_and_no_way_to_write_its_root() -> None:
    spec = pod(usual())
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert spec["serviceAccountName"] == "serving" and spec["securityContext"]["runAsNonRoot"] is True
    for item in [*spec["initContainers"], *spec["containers"]]:
        assert item["image"] == IMAGE
        assert item["securityContext"]["readOnlyRootFilesystem"] is True
        assert item["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_requests_end_within_the_grace_period() -> None:
    seen = declared(args(SETTINGS.model_copy(update={"shutdown_timeout_seconds": 120})))
    before = container(seen, "engine")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec_of(seen)["shutdown_timeout_seconds"] == 120
    assert pod(seen)["terminationGracePeriodSeconds"] == grace_seconds(args().settings) + 75
    assert pod(seen)["terminationGracePeriodSeconds"] >= before + 120 + 15


def test_the_startup_probe_waits_as_long_as_the_weights_need() -> None:
    assert startup_failures(8_030_261_248) == 77  # 600 s and 16 GB at 100 MB/s
    assert startup_failures(70_553_706_496) == 202
    probe = container(usual(), "engine")["startupProbe"]
    assert probe["failureThreshold"] == 77 and probe["periodSeconds"] == 10 and probe["httpGet"]["path"] == "/health"


def test_ready_by_its_adapters_and_restarted_only_after_two_minutes() -> None:
    engine = container(usual(), "engine")
    assert engine["readinessProbe"]["httpGet"]["path"] == "/ready"
    liveness = engine["livenessProbe"]
    assert liveness["httpGet"]["path"] == "/health" and liveness["periodSeconds"] * liveness["failureThreshold"] >= 120


@pytest.mark.parametrize(
    ("nodes", "replicas", "others", "surge", "unavailable"),
    [(3, 2, 0, 1, 0), (2, 2, 0, 0, 1), (3, 2, 1, 0, 1), (4, 2, 1, 1, 0), (1, 1, 0, 0, 1)],
)
def test_a_rollout_surges_only_onto_a_gpu_that_can_be_had(
    nodes: int, replicas: int, others: int, surge: int, unavailable: int
) -> None:
    pool = POOL.model_copy(update={"max_nodes": nodes})
    settings = SETTINGS.model_copy(update={"max_replicas": replicas, "min_replicas": 1})
    found = rollout(settings, pool, others)
    assert (found.max_surge, found.max_unavailable) == (surge, unavailable)


def test_a_replica_of_several_gpus_asks_for_their_share_of_one_node_and_room_to_talk() -> None:
    pool = POOL.model_copy(update={"vm_size": "Standard_NC96ads_A100_v4", "max_nodes": 2})
    two = declared(args(SETTINGS.model_copy(update={"gpus": 2}), pool))
    asked = container(two, "engine")["resources"]
    assert asked["requests"]["nvidia.com/gpu"] == asked["limits"]["nvidia.com/gpu"] == "2"
    share = gpu_share(pool, 2)
    sidecar = container(two, "sidecar")["resources"]["requests"]
    assert int(asked["requests"]["memory"][:-2]) + int(sidecar["memory"][:-2]) == int(share.memory[:-2])
    (shm,) = (item for item in pod(two)["volumes"] if item["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert spec_of(two)["gpus"] == 2
    three = SETTINGS.model_copy(update={"gpus": 2, "max_replicas": 3})  # of four for which there is room
    assert [rollout(three, pool, others).max_surge for others in (0, 1)] == [1, 0]


def test_gpus_count_and_not_nodes() -> None:
    pool = POOL.model_copy(update={"vm_size": "Standard_NC48ads_A100_v4", "max_nodes": 2})
    assert rollout(SETTINGS.model_copy(update={"max_replicas": 3}), pool, 0).max_surge == 1


@pytest.mark.parametrize(("least", "most", "replicas", "forced"), [(2, 2, 2, True), (2, 3, 2, False), (0, 3, 1, False)])
def test_a_number_of_replicas_is_there_from_the_start_and_forced_where_keda_sets_none(
    least: int, most: int, replicas: int, forced: bool
) -> None:
    """That KEDA's is left alone, and nothing falls to one on the way, tests/engine/test_prod.py sees."""
    settings = SETTINGS.model_copy(update={"min_replicas": least, "max_replicas": most})
    seen, requests = deploy_with_requests(lambda: Engine("engine", args(settings)) and None)
    made = deployment(seen)
    assert made["spec"]["replicas"] == replicas
    ignored = list(requests["Deployment", "engine-deployment"].ignoreChanges)
    assert ignored == ([] if forced else ["spec.replicas"])
    assert ("pulumi.com/patchForce" in made["metadata"]["annotations"]) == forced


def test_pulumi_does_not_wait_but_says_how_to() -> None:
    inputs = deployment(usual())
    assert inputs["metadata"]["annotations"]["pulumi.com/skipAwait"] == "true"
    made: list[Engine] = []
    deploy(lambda: made.append(Engine("engine", args())))
    assert made[0].watch == "kubectl --namespace drydock-serving rollout status deployment/engine --timeout=9761s"
    assert inputs["spec"]["progressDeadlineSeconds"] == 9761  # mirror two hours, node half an hour, start 761 s


def test_only_router_and_prometheus_get_in_and_only_https_gets_out() -> None:
    policy = usual().one(":NetworkPolicy").inputs["spec"]
    router, scrape = policy["ingress"]
    assert router["from"] == [{"podSelector": {"matchLabels": {"app": "router"}}}]
    assert [int(item["port"]) for item in router["ports"]] == [8000]
    assert [int(item["port"]) for item in scrape["ports"]] == [8000, 9402]
    assert scrape["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kube-system"}
    assert [[int(item["port"]) for item in rule["ports"]] for rule in policy["egress"]] == [[443]]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}


def test_a_replica_takes_its_gpu_from_tuning_and_one_may_be_drained() -> None:
    priority = usual().one(":PriorityClass").inputs
    assert priority["value"] > 0 and not priority.get("globalDefault")  # the Jobs have 0
    assert pod(usual())["priorityClassName"] == priority["metadata"]["name"]
    assert usual().one(":PodDisruptionBudget").inputs["spec"]["maxUnavailable"] == 1
