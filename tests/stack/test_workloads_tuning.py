"""The tuning Job: what its pod runs, where, and which change is another Job."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from typing import Any

import pulumi
import pytest

from common.settings import SettingsError
from infra.pools import POOL_LABEL, gpu_taints
from infra.settings import Base, GpuPool, Tuning
from serving.spec import EngineSettings, ServingSpec
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import DIGEST, Recorder, deploy
from tests.unit.registrations import registered
from tests.unit.test_environment import environment
from training.spec import TuningSettings, TuningSpec
from workloads.tuning import NAME_LIMIT, TuningJob, TuningJobArgs, evaluation_spec, job_name, tuning_spec

IMAGES = [f"reg.azurecr.io/drydock/{name}@{DIGEST}" for name in ("training", "serving")]
DATASET, CODE = "5" * 64, "c" * 64
BASE = Base(model="meta-llama/Llama-3.1-8B-Instruct", revision="a" * 40, served_name="llama")
SETTINGS = TuningSettings(dataset="data.jsonl", lora_r=32)
GIB = 2**30


def deployed(adapter: str = "kubectl", **change: Any) -> Recorder:
    values: dict[str, Any] = {
        "adapter": adapter,
        "settings": SETTINGS,
        "tuning": Tuning(pool="t4", deadline_hours=1.5, retries=2),
        "serving": EngineSettings(dtype="float16"),
        "pool": GpuPool(vm_size="Standard_NC16as_T4_v3", spot=True),
        "base": BASE,
        "base_address": "az://st/models/meta-llama/Llama-3.1-8B-Instruct/" + "a" * 40,
        "dataset_address": f"az://st/datasets/{DATASET}.jsonl",
        "dataset_digest": DATASET,
        "training_code": CODE,
        "training_image": pulumi.Output.from_input(IMAGES[0]),
        "serving_image": IMAGES[1],
        "store": "oci://reg.azurecr.io/adapters",
        "account": "st",
        "namespace": "drydock-tuning",
        "service_account": "tuning",
    }

    def program() -> None:
        TuningJob(f"tune-{adapter}", TuningJobArgs(**(values | change)))

    return deploy(program)


@pytest.fixture(scope="module")
def seen() -> Recorder:
    return deployed()


def job(seen: Recorder) -> dict[str, Any]:
    return copy.deepcopy(seen.one(":Job").inputs)


def pod(seen: Recorder) -> dict[str, Any]:
    return job(seen)["spec"]["template"]["spec"]


def containers(seen: Recorder) -> dict[str, dict[str, Any]]:
    spec = pod(seen)
    return {item["name"]: item for item in [*spec["initContainers"], *spec["containers"]]}


def data(seen: Recorder) -> dict[str, str]:
    return seen.one(":ConfigMap").inputs["data"]


def test_every_object_keeps_the_published_schema(seen: Recorder):
    objects = [item for item in seen.resources if item.custom]
    assert {item.type.rpartition(":")[2] for item in objects} == {"ConfigMap", "Job", "NetworkPolicy"}
    assert {item.name: said for item in objects if (said := problems(item.inputs))} == {}


def test_the_pod_fetches_then_tunes_then_evaluates(seen: Recorder):
    spec = pod(seen)
    assert [item["name"] for item in spec["initContainers"]] == ["fetch-base", "fetch-dataset", "tune"]
    assert [item["name"] for item in spec["containers"]] == ["evaluate"]
    by_name = containers(seen)
    name = job(seen)["metadata"]["name"]
    fetch = ["python", "-m", "blobs", "fetch"]
    assert by_name["fetch-base"]["command"] == [
        *(*fetch, f"az://st/models/{BASE.model}/{BASE.revision}", "/work/models/Llama-3.1-8B-Instruct"),
        *("--wait-seconds", "7200"),  # the mirror may still be at work
    ]
    assert by_name["fetch-dataset"]["command"] == [
        *(*fetch, f"az://st/datasets/{DATASET}.jsonl", "/work/dataset.jsonl"),
        *("--sha256", DATASET, "--wait-seconds", "900"),
    ]
    tune = by_name["tune"]["command"]
    assert tune == [
        *("python", "-m", "training", "tune", "--spec", "/etc/drydock/tuning.json", "--out", "/work/run"),
        *("--checkpoints", f"az://st/checkpoints/{name}", "--metrics-address", "0.0.0.0:9401"),
    ]
    evaluate = by_name["evaluate"]["command"]
    assert evaluate == [
        *("python", "-m", "serving", "evaluate", "--spec", "/etc/drydock/evaluate.json", "--run", "/work/run"),
        *("--store", "oci://reg.azurecr.io/adapters"),
    ]
    assert [by_name[key]["image"] for key in ("fetch-base", "fetch-dataset", "tune", "evaluate")] == [
        *[IMAGES[0]] * 3,
        IMAGES[1],
    ]


def test_the_containers_get_the_settings_that_they_parse(seen: Recorder):
    spec = TuningSpec.model_validate_json(data(seen)["tuning.json"])
    assert (spec.adapter, spec.lora_r, spec.learning_rate) == ("kubectl", 32, 2e-4)
    assert spec.dataset == containers(seen)["fetch-dataset"]["command"][5]
    assert spec.base_model == containers(seen)["fetch-base"]["command"][5]
    served = ServingSpec.model_validate_json(data(seen)["evaluate.json"])
    assert served.base_model == spec.base_model
    assert (served.base_name, served.dtype, served.max_lora_rank) == ("llama", "float16", 32)
    assert served.store == "oci://reg.azurecr.io/adapters"
    (volume,) = [item for item in pod(seen)["volumes"] if item["name"] == "specs"]
    config = seen.one(":ConfigMap").inputs
    assert volume["configMap"]["name"] == config["metadata"]["name"]


def test_checkpointing_is_decided_by_what_the_pools_gpus_hold(seen: Recorder):
    def decided(size: str, *alternatives: str, **change: Any) -> bool | None:
        pool = GpuPool(vm_size=size, alternatives=alternatives)
        changed = deployed(pool=pool, settings=SETTINGS.model_copy(update=change))
        # It decides no weights, so the checkpoints of another GPU's run are gone on from.
        assert job(changed)["metadata"]["name"] == job(seen)["metadata"]["name"]
        return TuningSpec.model_validate_json(data(changed)["tuning.json"]).gradient_checkpointing

    assert decided("Standard_NC24ads_A100_v4") is False
    assert decided("Standard_NC24ads_A100_v4", "Standard_NV36ads_A10_v5") is True
    assert decided("Standard_NC24ads_A100_v4", gradient_checkpointing=True) is True


def test_the_evaluation_has_room_for_its_rows_but_no_more_than_the_model():
    spec = tuning_spec("a", TuningSettings(dataset="d", max_seq_length=2048), BASE, False)
    served = evaluation_spec(spec, BASE, EngineSettings(max_model_len=64), store="s")
    assert served.max_model_len >= 2048 + 4 * 2048
    long = tuning_spec("a", TuningSettings(dataset="d", max_seq_length=100_000), BASE, False)
    assert evaluation_spec(long, BASE, EngineSettings(), store="s").max_model_len == 131072


def test_first_an_eviction_is_ignored_then_a_mistake_ends_it(seen: Recorder):
    spec = job(seen)["spec"]
    ignore, fail = spec["podFailurePolicy"]["rules"]
    assert ignore["action"] == "Ignore"
    assert ignore["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"]["operator"] == "In"
    assert [int(code) for code in fail["onExitCodes"]["values"]] == [2, 3]
    assert "containerName" not in fail["onExitCodes"]  # fetching, tuning and evaluating alike
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the API wants it with a failure policy
    assert spec["podReplacementPolicy"] == "Failed"
    assert (int(spec["backoffLimit"]), int(spec["activeDeadlineSeconds"])) == (2, 5400)
    assert "ttlSecondsAfterFinished" not in spec


def test_pulumi_neither_waits_for_it_nor_trips_over_its_old_self(seen: Recorder):
    assert job(seen)["metadata"]["annotations"] == {
        "pulumi.com/skipAwait": "true",
        "pulumi.com/deletionPropagationPolicy": "background",
    }


def test_it_runs_where_its_gpu_is(seen: Recorder):
    spec = pod(seen)
    assert spec["nodeSelector"] == {POOL_LABEL: "t4"}
    tolerated = [(item["key"], item["value"], item["effect"]) for item in spec["tolerations"]]
    spot = GpuPool(vm_size="Standard_NC16as_T4_v3", spot=True)
    assert tolerated == [(taint.key, taint.value, taint.effect) for taint in gpu_taints(spot)]


def test_both_that_need_the_gpu_ask_for_it_within_one_node(seen: Recorder):
    by_name = containers(seen)
    for name, container in by_name.items():
        asked, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(limits), name
        assert asked.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
        assert (asked.get("nvidia.com/gpu") == "1") == (name in ("tune", "evaluate"))
        # A pod asks for the most that one init container, or all others together, ask for: this is the node's share.
        assert int(asked["cpu"]) <= 15 and int(asked["memory"].removesuffix("Gi")) * GIB <= 110 * 0.85 * GIB
    assert by_name["tune"]["resources"] == by_name["evaluate"]["resources"]


@pytest.mark.parametrize(
    ("size", "gpus"),
    [("Standard_NC96ads_A100_v4", 2), ("Standard_NC96ads_A100_v4", 4), ("Standard_ND96isr_H100_v5", 8)],
)
def test_gpus_that_tune_together_are_asked_for_within_one_node(size: str, gpus: int):
    seen = deployed(tuning=Tuning(pool="big", gpus=gpus), pool=GpuPool(vm_size=size))
    node, by_name = GpuPool(vm_size=size).sku, containers(seen)
    assert by_name["tune"]["command"][-2:] == ["--processes", str(gpus)]
    assert by_name["evaluate"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    asked = by_name["tune"]["resources"]["requests"]
    assert asked == by_name["tune"]["resources"]["limits"]
    assert asked["nvidia.com/gpu"] == str(gpus)
    share = gpus / node.gpus
    assert 0.9 * node.vcpus * share <= int(asked["cpu"]) < node.vcpus * share
    memory = int(asked["memory"].removesuffix("Gi"))
    assert 0.8 * node.ram_gib * share <= memory <= 0.85 * node.ram_gib * share
    (shared,) = [item["emptyDir"] for item in pod(seen)["volumes"] if item["name"] == "shm"]
    assert gpus <= int(shared["sizeLimit"].removesuffix("Gi")) < memory / 2  # it counts as the pod's memory
    assert {item.name: said for item in seen.resources if item.custom and (said := problems(item.inputs))} == {}


TOGETHER = Tuning(pool="big", gpus=4, nodes=3)


@pytest.fixture(scope="module")
def together() -> Recorder:
    return deployed(tuning=TOGETHER, pool=GpuPool(vm_size="Standard_NC96ads_A100_v4", max_nodes=3))


def test_several_nodes_are_pods_of_one_job_that_ends_as_the_first_does(seen: Recorder, together: Recorder):
    spec, before = job(together)["spec"], job(seen)["spec"]
    assert (int(spec["completions"]), int(spec["parallelism"]), spec["completionMode"]) == (3, 3, "Indexed")
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    for key in ("podFailurePolicy", "podReplacementPolicy"):
        assert spec[key] == before[key]
    assert not {"completions", "parallelism", "completionMode", "successPolicy"} & set(before)
    assert job(together)["metadata"]["name"] == job(seen)["metadata"]["name"], "the same weights"
    assert {item.name: said for item in together.resources if item.custom and (said := problems(item.inputs))} == {}


def test_the_pods_find_the_first_by_name_each_on_a_node_of_its_own(together: Recorder):
    name, spec = job(together)["metadata"]["name"], pod(together)
    service = together.one(":Service").inputs
    assert service["metadata"]["name"] == spec["subdomain"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["metadata"]["annotations"]["pulumi.com/skipAwait"] == "true", "its pods may wait an hour for a GPU"
    mine = {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["selector"] == mine
    assert containers(together)["tune"]["command"][-7:] == [
        *("--processes", "4", "--nodes", "3", "--rendezvous", f"{name}-0.{name}:29500", "--rejoin")
    ]
    (apart,) = spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart == {"labelSelector": {"matchLabels": mine}, "topologyKey": "kubernetes.io/hostname"}


def test_the_pods_of_one_job_and_no_others_may_talk_to_each_other(together: Recorder):
    labels = job(together)["spec"]["template"]["metadata"]["labels"]
    mine = {**labels, "batch.kubernetes.io/job-name": job(together)["metadata"]["name"]}
    del mine["azure.workload.identity/use"]
    rules = together.one(":NetworkPolicy").inputs["spec"]
    for side, peers in (("ingress", "from"), ("egress", "to")):
        https_or_metrics, among = rules[side]
        assert among == {peers: [{"podSelector": {"matchLabels": mine}}], "ports": [{"protocol": "TCP"}]}
        assert [set(item) for item in https_or_metrics["ports"]] == [{"port", "protocol"}]


@pytest.mark.parametrize(("index", "said"), [("0", "python -m serving evaluate"), ("1", ""), ("12", "")])
def test_the_first_alone_evaluates(index: str, said: str, together: Recorder):
    command = containers(together)["evaluate"]["command"]
    shell, words = command[:4], command[4:]
    assert words == containers(deployed())["evaluate"]["command"]
    ran = subprocess.run(
        [*shell, "echo", *words], env={**os.environ, "JOB_COMPLETION_INDEX": index}, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout.strip().startswith(said)) == (0, True)
    assert bool(ran.stdout) == bool(said)
    failed = subprocess.run([*shell, "sh", "-c", "exit 3"], env={**os.environ, "JOB_COMPLETION_INDEX": "0"})
    assert failed.returncode == 3, "its exit code is the container's"


@pytest.mark.parametrize(
    ("nodes", "pool", "adapters", "gpus", "least"),
    [
        (2, "big", 1, 4, 2),
        (16, "big", 1, 4, 16),
        (2, "big", 3, 4, 4),  # three that hold one each, and one more
        (3, "big", 2, 4, 5),
        (2, "shared", 1, 4, 3),  # and one for the two replicas
        (2, "shared", 1, 2, 2),  # which have room beside two GPUs
    ],
)
def test_a_pool_has_the_nodes_that_are_needed_at_once(nodes: int, pool: str, adapters: int, gpus: int, least: int):
    def told(most: int) -> list[str]:
        pools = {"big": {"vm_size": "Standard_NC96ads_A100_v4", "max_nodes": most}}
        pools["other"] = {"vm_size": "Standard_NC24ads_A100_v4", "max_nodes": 2}
        try:
            environment(
                pools=json.dumps(pools),
                tuning=json.dumps({"pool": "big", "nodes": nodes, "gpus": gpus}),
                serving=json.dumps({"pool": "big" if pool == "shared" else "other", "max_model_len": 4096}),
                adapters=json.dumps({f"a{number}": {"dataset": "d.jsonl"} for number in range(adapters)}),
            )
        except SettingsError as error:
            return error.problems
        return []

    assert told(least) == []
    (problem,) = told(least - 1)
    assert problem.startswith(f"tuning.nodes: {nodes} nodes")
    assert f" need {least} in pool big" in problem
    assert problem.endswith(f"which has {least - 1} at most: raise pools.big.max_nodes or lower it")


def test_all_nodes_of_a_job_count_among_what_tuning_may_hold_of_the_serving_pool():
    pools = json.dumps({"a100": {"vm_size": "Standard_NC96ads_A100_v4", "max_nodes": 4}})
    env = environment(pools=pools, tuning=json.dumps({"pool": "a100", "gpus": 4, "nodes": 3}))
    assert env.others_places == 12


def test_the_root_is_read_only_and_all_that_is_written_lies_in_volumes(seen: Recorder):
    spec = pod(seen)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert (spec["enableServiceLinks"], spec["automountServiceAccountToken"]) == (False, False)
    volumes = {item["name"]: item for item in spec["volumes"]}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    for container in containers(seen).values():
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        places = {item["mountPath"]: item for item in container["volumeMounts"]}
        environment = {item["name"]: item["value"] for item in container["env"]}
        for key in ("HOME", "TMPDIR", "DRYDOCK_CACHE"):
            assert not places[environment[key]].get("readOnly")
        assert {item["name"] for item in container["volumeMounts"]} <= set(volumes)
        if "nvidia.com/gpu" in container["resources"]["limits"]:
            assert {"/dev/shm", "/etc/drydock"} <= set(places)


def test_the_node_is_not_taken_away_and_the_metrics_are_read(seen: Recorder):
    template = job(seen)["spec"]["template"]
    annotations = template["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"
    port = int(containers(seen)["tune"]["ports"][0]["containerPort"])
    assert (annotations["prometheus.io/scrape"], annotations["prometheus.io/port"]) == ("true", str(port))
    assert int(template["spec"]["terminationGracePeriodSeconds"]) >= 60
    labels = template["metadata"]["labels"]
    assert labels["azure.workload.identity/use"] == "true"
    assert labels["drydock/adapter"] == "kubectl"
    rules = seen.one(":NetworkPolicy").inputs["spec"]
    assert rules["podSelector"]["matchLabels"].items() <= labels.items()
    assert [int(item["port"]) for rule in rules["ingress"] for item in rule["ports"]] == [port]
    assert [int(item["port"]) for rule in rules["egress"] for item in rule["ports"]] == [443]


def name_of(settings: TuningSettings = SETTINGS, **change: Any) -> str:
    values: dict[str, Any] = {"dataset_digest": DATASET, "base": BASE, "code": CODE}
    return job_name(tuning_spec("kubectl", settings, BASE, False), **(values | change))


def test_what_decides_the_result_is_in_the_name(seen: Recorder):
    name = name_of()
    assert job(seen)["metadata"]["name"] == name
    others = [
        name_of(SETTINGS.model_copy(update={"learning_rate": 1e-4})),
        name_of(SETTINGS.model_copy(update={"load_in_4bit": True})),
        name_of(dataset_digest="6" * 64),
        name_of(base=BASE.model_copy(update={"revision": "b" * 40})),
        name_of(code="e" * 64),
    ]
    assert len({name, *others}) == 6


def test_where_and_how_often_it_runs_is_not_in_the_name(seen: Recorder):
    changed = deployed(
        tuning=Tuning(pool="other", deadline_hours=9, retries=7),
        pool=GpuPool(vm_size="Standard_NC24ads_A100_v4"),
        serving=EngineSettings(dtype="bfloat16"),
    )
    assert job(changed)["metadata"]["name"] == job(seen)["metadata"]["name"]
    assert job(changed)["spec"]["template"] != job(seen)["spec"]["template"]
    # The file's name on the deployer's machine says nothing about what is in it.
    assert name_of(SETTINGS.model_copy(update={"dataset": "renamed.jsonl"})) == name_of()


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"stall_seconds": 40.0}, False),
        ({"max_num_seqs": 8}, False),
        ({"gpu_memory_utilization": 0.8}, False),
        ({"tool_call_parser": "llama3_json"}, False),
        ({"dtype": "bfloat16"}, True),
        ({"gpus": 2}, True),
    ],
)
def test_only_what_decides_a_score_evaluates_a_finished_adapter_again(change: dict[str, Any], again: bool):
    """It would be promoted again as well, and so undo a roll back."""
    pool = GpuPool(vm_size="Standard_NC48ads_A100_v4")
    before, changed = (
        deployed(pool=pool, serving=EngineSettings(**({"dtype": "float16"} | each))) for each in ({}, change)
    )
    told = [made.one(":ConfigMap").inputs["data"]["evaluate.json"] for made in (before, changed)]
    assert told[0] != told[1], "the next pod reads it"
    assert (job(changed) != job(before)) is again


GATE = SETTINGS.gate.model_copy(update={"min_gain": 0.1})


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"gate": GATE}, True),
        ({"gradient_checkpointing": True}, True),
        ({"logging_steps": 1}, False),
        ({"save_minutes": 1.0}, False),
        ({"save_steps": 7}, False),
    ],
)
def test_what_decides_no_weights_makes_no_other_job(change: dict[str, Any], again: bool):
    """Some make it again, to go on from its checkpoints; how often it logs and saves waits for its next pod."""
    pool = GpuPool(vm_size="Standard_NC24ads_A100_v4")
    before, changed = deployed(pool=pool), deployed(pool=pool, settings=SETTINGS.model_copy(update=change))
    assert job(changed)["metadata"]["name"] == job(before)["metadata"]["name"]
    assert (job(changed) != job(before)) is again
    assert data(changed) != data(before)
    assert not changed.one(":ConfigMap").inputs.get("immutable")


def test_retries_and_deadline_change_the_job_in_place(seen: Recorder):
    changed = deployed(tuning=Tuning(pool="t4", deadline_hours=9, retries=7))
    assert job(changed)["spec"]["template"] == job(seen)["spec"]["template"]
    assert data(changed) == data(seen)


def test_one_changed_setting_changes_its_specs_and_their_name(seen: Recorder):
    changed = deployed(settings=SETTINGS.model_copy(update={"learning_rate": 1e-4}))
    assert json.loads(data(changed)["tuning.json"])["learning_rate"] == 1e-4
    names = [item.one(":ConfigMap").inputs["metadata"]["name"] for item in (seen, changed)]
    assert names[0] != names[1]


@pytest.mark.parametrize("adapter", ["a", "a" * 40, "b" * 35 + "-" + "c" * 4])
def test_names_stay_short_enough_for_those_of_pods(adapter: str):
    name = job_name(tuning_spec(adapter, SETTINGS, BASE, False), dataset_digest=DATASET, base=BASE, code=CODE)
    assert len(name) <= NAME_LIMIT == 52
    assert "--" not in name and name.startswith(f"tune-{adapter[:30]}")


def test_two_adapters_with_the_same_beginning_are_two_jobs():
    names = {
        job_name(tuning_spec("a" * 39 + end, SETTINGS, BASE, False), dataset_digest=DATASET, base=BASE, code=CODE)
        for end in "xy"
    }
    assert len(names) == 2


def test_new_serving_code_leaves_a_job_as_it_is():
    with registered() as requests:
        seen = deployed()
    (request,) = [request for request in requests if request.type.endswith(":Job")]
    assert request.name == name_of()  # its successor is another resource, and takes the image of its own day
    assert list(request.ignoreChanges) == ["spec.template.spec.containers[0].image"]
    assert pod(seen)["containers"][0]["name"] == "evaluate"
