"""The Job that compiles for the replicas: as they are declared, on their pool, behind them, and once."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from infra.settings import Environment, GpuPool, Serving, read_environment
from serving.__main__ import main as serving_command
from serving.spec import ServingSpec
from tests.stack.test_workloads_serving import BASE, IMAGE, POOL, SETTINGS, args, container, pod
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import Recorder, deploy
from tests.unit.test_environment import SEED, as_pulumi
from workloads.compiled import Compiled, CompiledArgs, compiled_address, key
from workloads.engine import Engine, EngineArgs

told: list[str] = []


def declared(replicas: EngineArgs) -> Recorder:
    """The Job, and the replicas that are to find what it makes."""

    def program() -> None:
        address = compiled_address(replicas, "drydockst")
        address.apply(told.append)
        Compiled("compiled", CompiledArgs(replicas, address, "compiler"))
        Engine("engine", replace(replicas, compiled=address))

    return deploy(program)


@cache
def usual() -> Recorder:
    return declared(args())


def job(seen: Recorder) -> dict[str, Any]:
    return seen.one(":Job").inputs


def job_pod(seen: Recorder) -> dict[str, Any]:
    found: dict[str, Any] = job(seen)["spec"]["template"]["spec"]
    return found


def name(seen: Recorder) -> str:
    found: str = job(seen)["metadata"]["name"]
    return found


def test_every_object_keeps_the_published_schema() -> None:
    own = [item for item in usual().resources if item.name.startswith("compiled-")]
    assert sorted(item.inputs["kind"] for item in own) == ["ConfigMap", "Job", "NetworkPolicy"]
    assert [said for item in own for said in problems(item.inputs)] == []


def test_replicas_look_where_the_job_writes() -> None:
    hashed = name(usual()).removeprefix("compile-")
    address = f"az://drydockst/compiled/{hashed}"
    assert told[0] == address and len(hashed) == 10
    (compiling,) = job_pod(usual())["containers"]
    writes, reads = compiling["command"], container(usual(), "engine")["command"]
    assert writes[writes.index("--into") + 1] == reads[reads.index("--compiled") + 1] == address
    assert "--compiled" not in container(deploy(lambda: Engine("engine", args()) and None), "engine")["command"]


def test_it_starts_vllm_as_the_replicas_do() -> None:
    """Paths, arguments and environment are part of what vLLM hashes: another one, and nothing would be found."""
    (compiling,), replica = job_pod(usual())["containers"], container(usual(), "engine")
    for field in ("image", "env", "resources", "securityContext"):
        assert compiling[field] == replica[field], field
    shared = ("/models", "/cache", "/tmp", "/dev/shm")
    assert {item["mountPath"] for item in compiling["volumeMounts"]} == {*shared, "/etc/drydock"}
    assert job_pod(usual())["initContainers"] == pod(usual())["initContainers"][:1]  # the base model, no sidecar
    spec, theirs = (
        item.inputs["data"]["serving.json"] for item in sorted(usual().of(":ConfigMap"), key=lambda item: item.name)
    )
    assert spec == theirs
    volumes = {volume["name"]: volume for volume in job_pod(usual())["volumes"]}
    assert volumes["specs"]["configMap"]["name"] == name(usual())
    mounts = [*compiling["volumeMounts"], *job_pod(usual())["initContainers"][0]["volumeMounts"]]
    assert {item["name"] for item in mounts} == set(volumes)


def test_the_command_line_takes_these_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DRYDOCK_CACHE", "/cache")
    command = job_pod(usual())["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "serving"]
    assert serving_command(command[3:]) == 2
    assert "/etc/drydock/serving.json: no such file" in capsys.readouterr().err
    assert command[command.index("--timeout-seconds") + 1] == "761"  # a hung start ends, and its GPU is free again


def test_it_stands_behind_the_replicas_and_holds_no_gpu_for_ever() -> None:
    spec = job_pod(usual())
    assert "priorityClassName" not in spec  # a replica's is 1000
    assert spec["nodeSelector"] == pod(usual())["nodeSelector"] and spec["tolerations"] == pod(usual())["tolerations"]
    assert spec["serviceAccountName"] == "compiler" and pod(usual())["serviceAccountName"] == "serving"
    assert job(usual())["spec"]["activeDeadlineSeconds"] == 9761 + 900
    assert job(usual())["spec"]["backoffLimit"] == 2
    assert job(usual())["spec"]["podFailurePolicy"]["rules"][0]["action"] == "Ignore"  # preempted: again, later


def test_nobody_gets_in_and_only_https_gets_out() -> None:
    policy = next(item.inputs for item in usual().of(":NetworkPolicy") if item.name == "compiled-network")["spec"]
    labels = job(usual())["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["ingress"] == []
    assert [int(port["port"]) for rule in policy["egress"] for port in rule["ports"]] == [443]
    engines = pod(usual())
    assert engines and labels["app"] != "engine"  # no Service and no router takes it for a replica


CHANGED: list[tuple[str, EngineArgs, bool]] = [
    ("image", args(image=IMAGE.replace("d" * 64, "e" * 64)), True),
    ("revision", replace(args(), base=BASE.model_copy(update={"revision": "1" * 40})), True),
    ("size", args(pool=GpuPool(vm_size="Standard_NC40ads_H100_v5", max_nodes=3, spot=True)), True),
    ("batch", args(SETTINGS.model_copy(update={"max_num_seqs": 17})), True),
    ("slots", args(adapters=("kubectl", "triage", "third")), True),
    ("rank", args(max_lora_rank=64), True),
    ("poll", args(SETTINGS.model_copy(update={"poll_seconds": 9.0, "stall_seconds": 60.0})), False),
    ("names", args(adapters=("kubectl", "other")), False),
    ("store", args(store="oci://other.azurecr.io/adapters"), False),
    ("keys", args(api_keys={}), False),
    ("nodes", args(pool=POOL.model_copy(update={"max_nodes": 5})), False),
    ("registry", args(image=IMAGE.replace("example", "moved")), False),
]


@pytest.mark.parametrize(("replicas", "another"), [row[1:] for row in CHANGED], ids=[row[0] for row in CHANGED])
def test_only_what_decides_the_graphs_starts_another_job(replicas: EngineArgs, another: bool) -> None:
    spec = ServingSpec.model_validate_json(
        next(item for item in declared(replicas).of(":ConfigMap") if item.name == "compiled-spec").inputs["data"][
            "serving.json"
        ]
    )
    found = f"compile-{key(spec, replicas.base, replicas.pool, str(replicas.image))}"
    assert (found != name(usual())) is another
    if not another and replicas.image == IMAGE:
        assert job(declared(replicas)) == job(usual())  # not even replaced


def environment(serving: dict[str, Any], **pool: Any) -> Environment:
    values = as_pulumi(SEED) | {
        "serving": json.dumps({"pool": "a100", "min_replicas": 1, "max_replicas": 1} | serving),
        "pools": json.dumps({"a100": {"vm_size": "Standard_NC24ads_A100_v4", "max_nodes": 3} | pool}),
    }
    return read_environment(values, ("api_keys", "huggingface_token"), project="drydock")


@pytest.mark.parametrize(
    ("serving", "nodes", "kept"),
    [
        ({}, 3, True),
        ({}, 2, False),  # one replica, one tuning Job: it would wait for a GPU that never comes
        ({"min_replicas": 0}, 2, True),  # the pool sleeps, and wakes sooner
        ({"keep_compiled": False}, 3, False),
        ({"device": "cpu"}, 3, False),  # nothing is compiled there
    ],
)
def test_there_is_one_where_it_is_wanted_and_a_gpu_is_spare(serving: dict[str, Any], nodes: int, kept: bool) -> None:
    env = environment(serving, max_nodes=nodes)
    assert env.others_places == 1
    assert env.compiles is kept
    assert env.finds_compiled is (serving in ({}, {"min_replicas": 0}))  # the numbers roll no replica


def test_kaito_compiles_by_itself() -> None:
    values = {"runtime": "kaito", "pool": "a100"}
    env = environment({}).model_copy(update={"serving": Serving.model_validate(values)})
    assert not env.compiles and not env.finds_compiled
