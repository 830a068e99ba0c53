"""The stress test: what its Job runs and may reach, what starts another one, and that its key stays secret."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pulumi
import pytest
from pulumi.runtime import rpc

from infra.datasets import Datasets, DatasetsArgs
from infra.pools import APPS, POOL_LABEL
from infra.settings import ROOT, Environment, Retention, read_environment
from infra.storage import Storage, StorageArgs
from policy.rules import violations
from stress.spec import LoadSpec
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import DIGEST, Recorder, place
from tests.unit.registrations import Request, deploy_with_requests, orphans
from tests.unit.test_environment import SEED, as_pulumi
from workloads.stress import StressTest, StressTestArgs, deadline_seconds, job_name

IMAGE = f"reg.azurecr.io/drydock/stress@{DIGEST}"
KEY = "k3y-of-the-stress-test"
RUN = {"run": 7, "slo": {"ttft_p95_ms": 800, "error_rate": 0.01}}


def environment(stress: dict[str, Any] | None = None, **more: Any) -> Environment:
    values = as_pulumi(SEED) | {"stress": json.dumps(RUN | (stress or {})), "api_keys": json.dumps({"load": KEY})}
    values |= {key: json.dumps(value) for key, value in more.items()}
    return read_environment(values, ("api_keys",), project="drydock")


def deployed(env: Environment) -> tuple[Recorder, dict[tuple[str, str], Request], list[tuple[str, ...]]]:
    """What was registered, and the outputs `report`, `job_name`, `follow`."""
    told: list[tuple[str, ...]] = []

    def program() -> None:
        where = place()
        storage = Storage("storage", StorageArgs(where, Retention(), zones=False))
        files = {name: ROOT / adapter.dataset for name, adapter in env.adapters.items()}
        data = Datasets("datasets", DatasetsArgs(where, storage, files))
        test = StressTest("stress", StressTestArgs(env, IMAGE, data, "drydockst", "drydock-serving", "stress"))
        pulumi.Output.all(test.report, test.job_name, test.follow).apply(lambda known: told.append(tuple(known)))

    return *deploy_with_requests(program), told


@cache
def made() -> tuple[Recorder, dict[tuple[str, str], Request], list[tuple[str, ...]]]:
    return deployed(environment())


def job() -> dict[str, Any]:
    return made()[0].one(":Job").inputs


def pod() -> dict[str, Any]:
    return dict(job()["spec"]["template"]["spec"])


def objects(seen: Recorder) -> list[Any]:
    return [item for item in seen.resources if item.type.startswith("kubernetes:") and item.custom]


def test_every_object_keeps_the_published_schema_and_belongs_to_the_component() -> None:
    seen, requests, _ = made()
    assert sorted(item.type.rpartition(":")[2] for item in objects(seen)) == [
        "ConfigMap", "Job", "NetworkPolicy", "Secret",
    ]  # fmt: skip
    for item in objects(seen):
        wrapped = {"stringData": {"key": "x"}} if item.type.endswith(":Secret") else {}  # comes wrapped, see below
        assert problems(item.inputs | wrapped) == [], item.name
        assert item.inputs["metadata"]["namespace"] == "drydock-serving"
    ours = {key: request for key, request in requests.items() if key[0] not in ("Storage", "Datasets")}
    ours = {key: request for key, request in ours.items() if ":infra:" not in request.parent}
    assert orphans(ours, "StressTest") == []


def test_it_loads_through_the_router_judges_and_leaves_its_report() -> None:
    (container,) = pod()["containers"]
    report = "az://drydockst/reports/stress/7"
    assert container["image"] == IMAGE
    assert container["command"] == [
        *("python", "-m", "stress", "run", "--target", "http://drydock.drydock-serving.svc.cluster.local"),
        *("--allow-remote", "--settings", "/etc/drydock/stress.json", "--dataset", "/work/datasets"),
        *("--out", "/work/out", "--wait-seconds", "900", "--push", report),
    ]
    name = job()["metadata"]["name"]
    assert made()[2] == [(report, name, f"kubectl -n drydock-serving logs -f job/{name}")]


def test_the_container_reads_the_settings_as_they_were_written() -> None:
    settings = made()[0].one(":ConfigMap").inputs
    assert settings["immutable"] is True
    spec = LoadSpec.model_validate_json(settings["data"]["stress.json"])
    assert (spec.users, spec.ramp_seconds, spec.duration_seconds, spec.prompt_tokens) == (100, 60, 600, 800)
    assert (spec.stream_share, spec.slo.ttft_p95_ms, spec.slo.itl_p95_ms, spec.slo.error_rate) == (1, 800, None, 0.01)
    assert spec.models == {"base": 1.0, "domain-llama": 1.0}
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert volumes["specs"]["configMap"]["name"] == settings["metadata"]["name"]
    chosen = LoadSpec.model_validate_json(
        deployed(environment({"models": {"domain-llama": 2}}))[0].one(":ConfigMap").inputs["data"]["stress.json"]
    )
    assert chosen.models == {"domain-llama": 2.0}


def test_prompts_come_from_each_dataset_once() -> None:
    adapters = {
        name: {"dataset": f"rehearsal/data/{file}.jsonl"}
        for name, file in (("a", "kubectl"), ("b", "triage"), ("c", "kubectl"))
    }
    spec = deployed(environment(adapters=adapters))[0].one(":Job").inputs["spec"]["template"]["spec"]
    fetched = [container["command"][4:6] for container in spec["initContainers"]]
    assert len(fetched) == 2
    for source, target in fetched:
        digest = source.rpartition("/")[2].removesuffix(".jsonl")
        assert source.startswith("az://drydocktest") and "/datasets/" in source
        assert target == f"/work/datasets/{digest[:12]}.jsonl"
    for container in spec["initContainers"]:
        assert container["image"] == IMAGE
        assert container["command"][:4] == ["python", "-m", "blobs", "fetch"]
        assert container["command"][6:] == ["--sha256", Path(container["command"][4]).stem, "--wait-seconds", "900"]


def test_the_key_comes_from_a_secret_and_is_nowhere_in_plain_text() -> None:
    seen = made()[0]
    assert seen.one(":Secret").inputs["stringData"] == {
        rpc._special_sig_key: rpc._special_secret_sig,
        "value": {"key": KEY},
    }
    env = {item["name"]: item for item in pod()["containers"][0]["env"]}
    assert env["DRYDOCK_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "stress-key", "key": "key"}}
    assert all("DRYDOCK_API_KEY" not in json.dumps(container) for container in pod()["initContainers"])
    assert not [item.name for item in seen.resources if KEY in json.dumps(item.inputs) and item.type[-7:] != ":Secret"]


def test_the_key_is_that_of_the_client_named() -> None:
    env = environment({"client": "b"}, api_keys={"a": "one", "b": "two"})
    assert env.stress_key is not None and env.stress_key.get_secret_value() == "two"


def test_several_clients_bring_their_keys_and_tiers() -> None:
    several = {"clients": {"a": 3, "b": 1}, "arrivals": "poisson", "requests_per_second": 20}
    keys = {"a": "k3y-of-a", "b": "k3y-of-b", "c": "k3y-of-c"}
    env = environment(several, api_keys=keys, tiers={"low": {"clients": ["b"], "concurrency": 2}})
    seen = deployed(env)[0]
    assert json.loads(seen.one(":Secret").inputs["stringData"]["value"]["keys"]) == {"a": "k3y-of-a", "b": "k3y-of-b"}
    (container,) = seen.one(":Job").inputs["spec"]["template"]["spec"]["containers"]
    variables = {item["name"]: item for item in container["env"]}
    assert variables["DRYDOCK_API_KEYS"]["valueFrom"] == {"secretKeyRef": {"name": "stress-key", "key": "keys"}}
    assert "DRYDOCK_API_KEY" not in variables
    spec = LoadSpec.model_validate_json(seen.one(":ConfigMap").inputs["data"]["stress.json"])
    assert (spec.arrivals, spec.requests_per_second) == ("poisson", 20)
    assert (spec.clients, spec.tiers) == ({"a": 3, "b": 1}, {"a": "standard", "b": "low"})
    told = [item for item in seen.resources if item.type[-7:] != ":Secret" and item.type.startswith("kubernetes:")]
    assert "k3y" not in json.dumps([item.inputs for item in told])


def test_the_pod_has_a_home_and_writes_nowhere_else() -> None:
    spec = pod()
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False and spec["serviceAccountName"] == "stress"
    assert job()["spec"]["template"]["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    empty = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume}
    for container in (*spec["initContainers"], *spec["containers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        mounts = {item["mountPath"]: item for item in container["volumeMounts"]}
        assert {mounts[path]["name"] for path in ("/work", "/cache", "/tmp")} <= empty
        assert all(item.get("readOnly") for path, item in mounts.items() if path not in ("/work", "/cache", "/tmp"))
        environment = {item["name"]: item.get("value") for item in container["env"]}
        assert (environment["HOME"], environment["TMPDIR"]) == ("/cache", "/tmp")


def test_it_runs_beside_the_router_without_a_gpu() -> None:
    assert pod()["nodeSelector"] == {POOL_LABEL: APPS}
    assert not pod().get("tolerations")
    assert "nvidia.com/gpu" not in json.dumps(pod())


def test_it_reaches_the_router_and_https_and_nothing_reaches_it() -> None:
    spec = made()[0].one(":NetworkPolicy").inputs["spec"]
    assert spec["podSelector"]["matchLabels"].items() <= job()["spec"]["template"]["metadata"]["labels"].items()
    assert spec["ingress"] == []
    router, https = spec["egress"]
    assert router["to"] == [{"podSelector": {"matchLabels": {"app": "router"}}}]
    assert [int(port["port"]) for port in router["ports"]] == [8080]
    assert [int(port["port"]) for port in https["ports"]] == [443]


@cache
def made_by_workers() -> Recorder:
    return deployed(environment({"workers": 3, "clients": {"load": 1}}))[0]


def test_several_workers_are_a_job_of_their_own_with_less_rights() -> None:
    seen = made_by_workers()
    assert sorted(item.type.rpartition(":")[2] for item in objects(seen)) == [
        "ConfigMap", "Job", "Job", "NetworkPolicy", "NetworkPolicy", "Secret", "Service",
    ]  # fmt: skip
    for item in objects(seen):
        wrapped = {"stringData": {"key": "x"}} if item.type.endswith(":Secret") else {}
        assert problems(item.inputs | wrapped) == [], item.name
        assert violations(item.type, item.inputs) == {}, item.name
    jobs = {item.inputs["metadata"]["name"]: item.inputs for item in seen.of(":Job")}
    title = min(jobs, key=len)
    assert set(jobs) == {title, f"{title}-workers"}
    spec = jobs[f"{title}-workers"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (3, 3, 0)
    assert "completionMode" not in spec and "successPolicy" not in spec  # the first to end must not end the others
    assert spec["podFailurePolicy"] == jobs[title]["spec"]["podFailurePolicy"]
    assert spec["activeDeadlineSeconds"] == jobs[title]["spec"]["activeDeadlineSeconds"]
    template = spec["template"]
    assert "azure.workload.identity/use" not in template["metadata"]["labels"]
    assert template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    inside = template["spec"]
    assert inside["serviceAccountName"] == "default" and inside["automountServiceAccountToken"] is False
    assert inside["nodeSelector"] == {POOL_LABEL: APPS} and not inside.get("initContainers")
    (container,) = inside["containers"]
    router = ("--target", "http://drydock.drydock-serving.svc.cluster.local", "--allow-remote")
    assert container["command"] == [
        *("python", "-m", "stress", "worker", "--master", f"{title}:5557", *router, "--wait-seconds", "2700"),
    ]
    variables = {item["name"]: item for item in container["env"]}
    assert variables["DRYDOCK_API_KEYS"]["valueFrom"]["secretKeyRef"]["name"] == "stress-key"
    assert "reports" not in json.dumps(jobs[f"{title}-workers"]) and "az://" not in json.dumps(inside)

    (master,) = jobs[title]["spec"]["template"]["spec"]["containers"]
    assert master["command"][-4:] == ["--listen", "0.0.0.0:5557", "--join-seconds", "900"]
    assert jobs[title]["spec"]["template"]["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    told = seen.one(":ConfigMap").inputs["data"]["stress.json"]
    assert LoadSpec.model_validate_json(told).workers == 3
    service = seen.one(":Service").inputs
    assert service["metadata"]["name"] == title and service["spec"].get("type") is None
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": title}


def test_workers_reach_the_router_and_their_master_and_nothing_else() -> None:
    policies = {item.inputs["metadata"]["name"]: item.inputs["spec"] for item in made_by_workers().of(":NetworkPolicy")}
    worker, master = policies["stress-worker"], policies["stress"]
    labels = [item.inputs["spec"]["template"]["metadata"]["labels"] for item in made_by_workers().of(":Job")]
    assert sum(worker["podSelector"]["matchLabels"].items() <= one.items() for one in labels) == 1
    assert sum(master["podSelector"]["matchLabels"].items() <= one.items() for one in labels) == 1
    assert worker["ingress"] == []
    assert [(rule["to"], [int(port["port"]) for port in rule["ports"]]) for rule in worker["egress"]] == [
        ([{"podSelector": {"matchLabels": {"app": "router"}}}], [8080]),
        ([{"podSelector": master["podSelector"]}], [5557]),
    ]
    (rule,) = master["ingress"]
    assert rule["from"] == [{"podSelector": worker["podSelector"]}] and [int(p["port"]) for p in rule["ports"]] == [
        5557
    ]


def test_one_worker_is_what_it_was() -> None:
    one = deployed(environment({"workers": 1}))[0]
    assert len(objects(one)) == 4
    assert "--listen" not in one.one(":Job").inputs["spec"]["template"]["spec"]["containers"][0]["command"]
    many = environment({"workers": 2}).stress
    assert job_name(many) != job_name(environment().stress)
    assert deadline_seconds(many) == deadline_seconds(environment().stress) + 900


def test_a_breach_ends_the_job_and_an_eviction_does_not() -> None:
    spec = job()["spec"]
    assert spec["backoffLimit"] == 0
    ignored, failed = spec["podFailurePolicy"]["rules"]
    assert ignored["action"] == "Ignore" and ignored["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert failed["action"] == "FailJob" and 3 in failed["onExitCodes"]["values"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert "ttlSecondsAfterFinished" not in spec
    assert job()["metadata"]["annotations"]["pulumi.com/skipAwait"] == "true"


def test_the_deadline_leaves_room_for_every_wait() -> None:
    settings = environment({"wait_seconds": 3600}).stress
    load = 60 + 600 + 2 * 120
    assert int(job()["spec"]["activeDeadlineSeconds"]) == deadline_seconds(environment().stress)
    assert deadline_seconds(settings) >= load + 2 * 3600 + 900 + 600


def test_another_run_or_setting_is_another_job_and_nothing_else_is() -> None:
    name = job_name(environment().stress)
    assert name == job()["metadata"]["name"] and len(name) == len("stress-") + 8
    changes: list[dict[str, Any]] = [{"run": 8}, {"users": 200}, {"slo": {}}]
    others = {job_name(environment(change).stress) for change in changes}
    assert len(others | {name}) == 4
    assert job_name(environment({"run": "7"}).stress) == name


def test_nothing_that_is_made_anew_elsewhere_loads_the_replicas_again() -> None:
    """The Job keeps its pod, the ConfigMap its content, under a name that only the settings of the test decide."""
    requests = made()[1]
    name = job_name(environment().stress)
    assert list(requests["Job", name].ignoreChanges) == ["spec"]
    assert list(requests["ConfigMap", name].ignoreChanges) == ["data"]
    adapters = {"another": {"dataset": "rehearsal/data/triage.jsonl"}}
    assert job_name(environment(adapters=adapters).stress) == name


@pytest.mark.parametrize("run", ["../7", "a/b", "", ".", "x" * 64])
def test_a_name_that_is_no_folder_is_refused(run: str) -> None:
    with pytest.raises(ValueError, match=r"stress\.run: string should match pattern"):
        environment({"run": run})
