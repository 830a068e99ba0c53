"""Tuning by KAITO in the whole program: what is made in place of our own Jobs, and that nothing else changes."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from typing import Any
from unittest.mock import patch

import yaml

from infra.kaito import TUNABLE
from infra.roles import BLOB_DATA_CONTRIBUTOR, BLOB_DATA_READER
from localcloud.azure.types import check
from policy.rules import violations
from serving.spec import ServingSpec
from tests.stack.test_stack import config_of, objects
from tests.stack.test_workloads_kaito import deployed
from tests.unit import kaito_crds
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, Resource, computed
from training.spec import TuningSpec
from workloads.render import plain

PHI = {"model": "microsoft/phi-4", "revision": TUNABLE["microsoft/phi-4"][1]}
PLACE, OURS = "drydock-kaito-tuning", "drydock-tuning"


def settings(runtime: str) -> dict[str, Any]:
    adapters = config_of("dev")["drydock:adapters"]
    layers = {"lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    kaito = {"kaito": {"other_loss": True}} if runtime == "kaito" else {}
    return {
        "drydock:base": PHI,
        "drydock:adapters": {name: adapter | layers for name, adapter in adapters.items()},
        "drydock:tuning": {"runtime": runtime, "pool": "a100", "retries": 2, "deadline_hours": 6, **kaito},
        "drydock:serving": {"pool": "a100", "min_replicas": 1, "max_replicas": 1, "max_num_seqs": 32},
    }


@cache
def by_kaito() -> Recorder:
    with tempfile.TemporaryDirectory() as cache_folder, patch.dict("os.environ", DRYDOCK_CACHE=cache_folder):
        return deployed(settings("kaito"))


@cache
def direct() -> Recorder:
    return deployed(settings("direct"))


def inside(place: str) -> dict[str, dict[str, Any]]:
    """The objects of a namespace, by kind and name."""
    return {
        f"{item.inputs['kind']} {item.inputs['metadata']['name']}": item.inputs
        for item in objects(by_kaito())
        if item.inputs["metadata"].get("namespace") == place
    }


def one(place: str, start: str) -> dict[str, Any]:
    (found,) = (item for name, item in inside(place).items() if name.startswith(start))
    return found


def workspace() -> dict[str, Any]:
    return dict(json.loads(one(PLACE, "ConfigMap kaito-")["data"]["workspace.json"]))


def test_the_cluster_has_the_add_on_and_the_driver_for_kaito_alone() -> None:
    cluster = by_kaito().one(":ManagedCluster").inputs
    assert cluster["aiToolchainOperatorProfile"] == {"enabled": True}
    assert cluster["storageProfile"]["blobCSIDriver"] == {"enabled": True}
    assert check("azure-native:containerservice:ManagedCluster", plain(cluster)) == []  # by the SDK's own types
    ours = direct().one(":ManagedCluster").inputs
    assert "aiToolchainOperatorProfile" not in ours and ours["storageProfile"]["blobCSIDriver"] == {"enabled": False}


def test_every_object_keeps_its_schema_and_the_policy() -> None:
    found = [item for item in objects(by_kaito()) if item.name.startswith("kaito-") or "kubectl" in item.name]
    kinds = {item.inputs["kind"] for item in found}
    assert {"Job", "ConfigMap", "PersistentVolume", "PersistentVolumeClaim", "Role", "RoleBinding"} <= kinds
    assert {item.name: said for item in found if (said := problems(item.inputs))} == {}
    assert {item.name: said for item in found if (said := list(violations(item.type, item.inputs)))} == {}
    assert kaito_crds.problems(workspace()) == []
    assert "Workspace" not in kinds  # it comes and goes with the Job that makes it


def test_the_config_has_the_name_that_the_workspace_refers_to() -> None:
    made = workspace()
    config = one(PLACE, f"ConfigMap {made['tuning']['config']}")
    assert config["immutable"] is True and made["metadata"]["namespace"] == PLACE
    written = yaml.safe_load(config["data"]["training_config.yaml"])["training_config"]
    uploads = [item.inputs for item in by_kaito().of(":FileUpload") if item.inputs["container"] == "kaito"]
    assert [item["blob"] for item in uploads] == [written["DatasetConfig"]["dataset_path"]]


def test_its_volumes_are_folders_of_one_container_mounted_by_identity() -> None:
    made, client = workspace(), computed("x:UserAssignedIdentity", "identities-kaito", {})["clientId"]
    volumes = {item.inputs["metadata"]["name"]: item.inputs["spec"] for item in objects(by_kaito()) if item.type.endswith(":PersistentVolume")}  # fmt: skip
    for place, folder, read_only in (("input", "data", True), ("output", f"out/{made['metadata']['name']}", False)):
        claimed = made["tuning"][place]["volumeSource"]["persistentVolumeClaim"]["claimName"]
        claim = one(PLACE, f"PersistentVolumeClaim {claimed}")
        volume = volumes[claim["spec"]["volumeName"]]
        assert volume["claimRef"] == {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": PLACE, "name": claimed}  # fmt: skip
        assert volume["csi"]["driver"] == "blob.csi.azure.com"
        attributes = volume["csi"]["volumeAttributes"]
        assert attributes["mountWithWorkloadIdentityToken"] == "true" and attributes["clientID"] == client
        assert attributes["containerName"] == "kaito" and volume["persistentVolumeReclaimPolicy"] == "Retain"
        assert f"--subdirectory={folder}" in volume["mountOptions"]
        assert ("-o ro" in volume["mountOptions"]) is read_only
        assert volume["storageClassName"] == claim["spec"]["storageClassName"] == ""
    handles = [volume["csi"]["volumeHandle"] for volume in volumes.values()]
    assert len(set(handles)) == len(handles) == 2


def test_kaitos_pods_may_write_their_own_container_and_our_jobs_read_it() -> None:
    principals = {
        computed("x:UserAssignedIdentity", f"identities-{who}", {})["principalId"]: who for who in ("kaito", "tuning")
    }
    roles = {
        (principals[item.inputs["principalId"]], item.inputs["roleDefinitionId"].rpartition("/")[2], item.inputs["scope"].rpartition("/")[2])
        for item in by_kaito().of(":RoleAssignment")
        if item.inputs["principalId"] in principals
    }  # fmt: skip
    assert {role for role in roles if role[0] == "kaito"} == {("kaito", BLOB_DATA_CONTRIBUTOR, "storage-kaito")}
    assert ("tuning", BLOB_DATA_READER, "storage-kaito") in roles
    subjects = {
        item.inputs["subject"]
        for item in by_kaito().of(":FederatedIdentityCredential")
        if item.name.startswith("identities-kaito")
    }
    assert subjects == {f"system:serviceaccount:{PLACE}:{who}" for who in ("default", "conductor")}
    rules = {item["name"]: item["definition"]["filters"]["prefixMatch"] for item in by_kaito().one(":ManagementPolicy").inputs["policy"]["rules"]}  # fmt: skip
    assert rules["old-checkpoints"] == ["checkpoints/", "kaito/out/"]  # data stay: another gate may ask for them


def test_what_has_kaito_tune_holds_no_gpu_and_has_these_rights_alone() -> None:
    conductor, judge, made = one(PLACE, "Job kaito-"), one(OURS, "Job tune-"), workspace()
    pod = conductor["spec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in json.dumps(pod) and pod["nodeSelector"] == {"drydock/pool": "apps"}
    assert (conductor["spec"]["backoffLimit"], conductor["spec"]["activeDeadlineSeconds"]) == (2, 6 * 3600 + 1800)
    (container,) = pod["containers"]
    title, command = made["metadata"]["name"], container["command"]
    assert command[:5] == ["python", "-m", "training.kaito", "--workspace", "/etc/drydock/workspace.json"]
    assert command[command.index("--job") + 1] == conductor["metadata"]["name"]
    assert command[command.index("--then") + 1] == f"{OURS}/{judge['metadata']['name']}"
    assert command[command.index("--result") + 1].endswith(f"/kaito/out/{title}")
    assert command[command.index("--hours") + 1 :][:3] == ["6", "--retries", "2"]
    assert pod["serviceAccountName"] == "conductor" and pod["automountServiceAccountToken"] is False
    own = one(PLACE, "Role kaito-conductor")["rules"]
    assert [(rule["resources"], rule["verbs"], rule.get("resourceNames")) for rule in own] == [
        (["workspaces"], ["create"], None),
        (["workspaces"], ["get", "patch", "delete"], [title]),
        (["jobs"], ["get"], None),
    ]
    (there,) = one(OURS, "Role kaito-conductor")["rules"]
    assert (there["resources"], there["verbs"]) == (["jobs"], ["get", "patch"])
    assert there["resourceNames"] == [judge["metadata"]["name"]]
    for place in (PLACE, OURS):
        (subject,) = one(place, "RoleBinding kaito-conductor")["subjects"]
        assert (subject["name"], subject["namespace"]) == ("conductor", PLACE)


def test_the_evaluation_waits_and_is_the_very_one_of_our_own_jobs() -> None:
    judge = one(OURS, "Job tune-")
    assert judge["spec"]["suspend"] is True
    pod = judge["spec"]["template"]["spec"]
    steps = [item["name"] for item in pod["initContainers"]]
    assert steps == ["fetch-base", "fetch-dataset", "fetch-adapter-0", "fetch-adapter-1", "adopt"]
    (evaluate,) = pod["containers"]
    (tune,) = (item.inputs for item in objects(direct()) if item.inputs["kind"] == "Job" and item.inputs["metadata"]["name"].startswith("tune-"))  # fmt: skip
    (ours,) = tune["spec"]["template"]["spec"]["containers"]
    assert evaluate["command"] == ours["command"] and evaluate["resources"] == ours["resources"]
    adopt = pod["initContainers"][-1]
    assert adopt["command"][:4] == ["python", "-m", "training", "adopt"]
    assert "nvidia.com/gpu" not in json.dumps(pod["initContainers"])
    config = one(OURS, f"ConfigMap {judge['metadata']['name']}")["data"]
    spec = TuningSpec.model_validate_json(config["tuning.json"])
    assert spec.base_model == "/work/models/phi-4" and spec.dataset == "/work/dataset.jsonl"
    assert ServingSpec.model_validate_json(config["evaluate.json"]).store.startswith("oci://")
    annotations = judge["spec"]["template"]["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def test_the_namespace_takes_kaitos_pods_and_lets_them_reach_https_alone() -> None:
    (space,) = (item.inputs for item in objects(by_kaito()) if item.inputs["metadata"]["name"] == PLACE)
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "baseline"
    rules = inside(PLACE)["NetworkPolicy kaito"]["spec"]
    assert [port["port"] for rule in rules["egress"] for port in rule["ports"]] == [443]
    assert rules["podSelector"] in ({}, {"matchLabels": {}}) and not rules.get("ingress")


def test_all_else_of_the_stack_is_unchanged() -> None:
    def rest(seen: Recorder) -> dict[tuple[str, str], dict[str, Any]]:
        def kept(item: Resource) -> dict[str, Any]:
            return {key: value for key, value in item.inputs.items() if key != "tags"}

        return {(item.type, item.name): kept(item) for item in seen.resources}

    ours, kaitos = rest(direct()), rest(by_kaito())
    assert all(name.startswith("tune-") for _, name in ours.keys() - kaitos.keys())
    new = {name for _, name in kaitos.keys() - ours.keys()}
    parts = (
        "kaito-",
        "tune-",
        "identities-kaito",
        "identities-tuning-reads-what-KAITO",
        "storage-kaito",
        "datasets-kaito",
    )
    assert {name for name in new if not name.startswith(parts)} == set()
    changed = {key[1] for key in ours.keys() & kaitos.keys() if ours[key] != kaitos[key]}
    assert changed == {"cluster", "storage-lifecycle", "alerts-1"}
