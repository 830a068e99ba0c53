"""Tuning by KAITO: what is refused, what it is told, which rows it sees, and the Job that has it tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import exits
from common.chat import answer, prompt_messages
from common.files import file_digest, read_jsonl, write_json
from common.kube import Api, ApiError
from common.settings import SettingsError
from common.sigterm import Sigterm
from infra.catalog import MODELS
from infra.cost import Line, estimate
from infra.datasets import Told, for_kaito
from infra.kaito import BEGIN_TUNING, END, PAGE, TUNABLE, TUNING, preset, table
from infra.settings import Environment, read_environment
from tests.unit.blob_fakes import KEY, FakeAccount
from tests.unit.kaito_crds import problems
from tests.unit.test_environment import SEED, as_pulumi
from training.dataset import Limits, Problem, is_held_out, read
from training.kaito import Conductor, main
from training.spec import TuningSettings
from workloads.alerts import alerts
from workloads.kaito_tuning import own_rules, plan, training_config

PHI_LAYERS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
ADAPTER: dict[str, Any] = {"dataset": "rehearsal/data/kubectl.jsonl", "lora_target_modules": PHI_LAYERS}
BASE = {"model": "microsoft/phi-4", "revision": TUNABLE["microsoft/phi-4"][1]}
TOLD = Told(Path("rows.jsonl"), "d" * 64, 900)
CHANGES = dict[str, Any]


def environment(tuning: CHANGES | None = None, adapter: CHANGES | None = None, **others: Any) -> Environment:
    values = as_pulumi(SEED) | {
        "base": BASE,
        "adapters": {"notes": ADAPTER | (adapter or {})},
        "tuning": {"runtime": "kaito", "pool": "a100", "kaito": {"other_loss": True}} | (tuning or {}),
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (values | others).items()}
    return read_environment(texts, ("api_keys", "huggingface_token"), project="drydock")


def pool(**changes: Any) -> CHANGES:
    return {"pools": {"a100": {"vm_size": "Standard_NC24ads_A100_v4", "max_nodes": 2} | changes}}


WITH_A_KEY = {"api_keys": {"team-a": "k3y"}}
REFUSED: list[tuple[str, CHANGES, CHANGES, CHANGES]] = [
    ("base.model", {}, {}, {"base": {"model": "meta-llama/Llama-3.1-8B-Instruct", "revision": "a" * 40}}),
    ("base.model", {}, {}, {"base": {"model": "mistralai/Mistral-7B-Instruct-v0.3", "revision": "a" * 40}}),
    ("base.revision", {}, {}, {"base": BASE | {"revision": "a" * 40}}),
    ("adapters.notes", {"kaito": {}}, {}, {}),
    ("adapters.notes.seed", {}, {"seed": 42}, {}),  # the default, but written down
    ("adapters.notes.save_minutes", {}, {"save_minutes": 10}, {}),
    ("adapters.notes.save_steps", {}, {"save_steps": 10}, {}),
    ("drills.scenarios", {}, {}, {"drills": {"run": "1", "scenarios": ["tuning-eviction"]}} | WITH_A_KEY),
    ("adapters.notes.gradient_checkpointing", {}, {"load_in_4bit": True, "gradient_checkpointing": False}, {}),
    ("tuning.gpus", {"gpus": 2}, {}, pool(vm_size="Standard_NC48ads_A100_v4")),
    ("tuning.nodes", {"nodes": 2}, {}, pool(max_nodes=8)),
    ("pools.a100.vm_size", {}, {}, pool(vm_size="Standard_NC48ads_A100_v4")),
    ("pools.a100.spot", {}, {}, pool(spot=True)),
    ("pools.a100.zones", {}, {}, pool(zones=["1"])),
    ("pools.a100.os_disk_gib", {}, {}, pool(os_disk_gib=512)),
    ("pools.a100.alternatives", {}, {}, pool(alternatives=["Standard_NC40ads_H100_v5"]) | {"cluster": {"provisioning": "automatic"}}),
    ("cluster.provisioning", {}, {}, {"cluster": {"provisioning": "automatic"}}),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "tuning", "adapter", "others"), REFUSED, ids=[f"{row[0]}-{n}" for n, row in enumerate(REFUSED)])  # fmt: skip
def test_what_kaito_cannot_honour_is_an_error_with_its_reason_and_way_out(
    setting: str, tuning: CHANGES, adapter: CHANGES, others: CHANGES
) -> None:
    with pytest.raises(SettingsError) as error:
        environment(tuning, adapter, **others)
    told = [line for line in error.value.problems if line.startswith(f"{setting}: not with tuning.runtime: kaito")]
    assert len(told) == 1, error.value.problems
    assert len([each for each in TUNING if each.asked and each.kaito in told[0]]) == 1


def test_every_refusal_is_tried_above_and_says_what_to_do() -> None:
    told = []
    for _, tuning, adapter, others in REFUSED:
        with pytest.raises(SettingsError) as error:
            environment(tuning, adapter, **others)
        told += error.value.problems
    refusing = [each for each in TUNING if each.asked]
    assert [each.what for each in refusing if not any(each.kaito in line for line in told)] == []
    assert all(each.remedy for each in refusing) and not any(each.remedy for each in TUNING if not each.asked)
    assert any("set that commit, 187ef0342fff0eb3333be9f00389385e95ef0b61, or" in line for line in told)


def test_all_else_is_taken_as_it_is() -> None:
    env = environment(
        {"retries": 1, "deadline_hours": 3},
        {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "load_in_4bit": True, "max_seq_length": 2048},
    )
    assert env.kaito and env.tuning.retries == 1
    with pytest.raises(SettingsError, match=r"tuning\.kaito: counts with tuning\.runtime: kaito alone"):
        environment({"runtime": "direct"})
    direct = environment({"runtime": "direct", "kaito": {}}, {"seed": 1, "save_minutes": 1})
    assert not direct.kaito


def test_what_can_be_tuned_is_known_by_the_names_that_serving_uses_too() -> None:
    in_catalogue = [name for name in MODELS if name.lower() in TUNABLE]
    assert in_catalogue
    assert all(preset(name) in (name, TUNABLE[name.lower()][0]) for name in in_catalogue)
    assert all(len(commit) == 40 for _, commit in TUNABLE.values())


def test_the_workspace_keeps_the_structural_schema() -> None:
    env = environment()
    workspace = plan(env, "notes", TOLD, dataset_digest="5" * 64).workspace
    assert problems(workspace) == []
    title = workspace["metadata"]["name"]
    assert workspace["resource"] == {
        "instanceType": "Standard_NC24ads_A100_v4",
        "labelSelector": {"matchLabels": {"drydock/kaito": title}},
    }
    assert workspace["tuning"] == {
        "preset": {"name": "phi-4"},
        "method": "lora",
        "config": title,
        "input": {"volumeSource": {"persistentVolumeClaim": {"claimName": "data"}}},
        "output": {"volumeSource": {"persistentVolumeClaim": {"claimName": title}}},
    }
    assert "inference" not in workspace
    assert plan(environment({}, {"load_in_4bit": True}), "notes", TOLD, dataset_digest="").workspace["tuning"]["method"] == "qlora"  # fmt: skip
    assert problems(workspace | {"tuning": workspace["tuning"] | {"epochs": 3}}) != []
    assert problems(workspace | {"tuning": {"preset": {"name": "phi-4"}}}) != []  # without input and output


def config(**settings: Any) -> dict[str, Any]:
    wanted = TuningSettings(**ADAPTER | settings)
    return dict(yaml.safe_load(training_config(wanted, TOLD, gradient_checkpointing=True))["training_config"])


def test_the_settings_reach_kaito_by_its_own_names() -> None:
    written = config(
        learning_rate=1e-4, lr_scheduler_type="constant", warmup_ratio=0.1, num_train_epochs=2, lora_r=8,
        per_device_train_batch_size=8, gradient_accumulation_steps=4, max_seq_length=2048, logging_steps=7,
    )  # fmt: skip
    assert written["LoraConfig"] == {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": PHI_LAYERS}
    assert written["TrainingArguments"] == {
        "output_dir": "/mnt/results", "save_strategy": "no", "ddp_find_unused_parameters": False,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 6,  # a tenth, rounded up, of 2 x 29 steps of 32 rows
        "weight_decay": 0.0, "max_grad_norm": 1.0, "num_train_epochs": 2, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "max_length": 2048, "logging_steps": 7,
        "seed": 42,
    }  # fmt: skip
    assert written["DatasetConfig"] == {
        "dataset_path": f"data/{'d' * 64}.jsonl", "shuffle_dataset": False, "train_test_split": 1,
    }  # fmt: skip
    assert written["QuantizationConfig"] == {"load_in_4bit": False} and written["DataCollator"] == {"mlm": False}
    left = TuningSettings(**ADAPTER)
    assert "gradient_checkpointing" not in training_config(left, TOLD, gradient_checkpointing=None)
    assert "max_length" not in config()["TrainingArguments"]  # TRL's own, which older releases have without the field
    assert config(load_in_4bit=True)["QuantizationConfig"] == {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
    }  # fmt: skip


def test_kaito_sees_the_rows_that_are_not_held_out_as_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRYDOCK_CACHE", str(tmp_path / "cache"))
    rows: list[dict[str, Any]] = [
        {"instruction": f"Say {number}.", "input": "" if number % 2 else "In words.", "output": f"It is {number}."}
        for number in range(40)
    ]
    said = [{"role": "user", "content": "Höre."}, {"role": "assistant", "content": "Ja."}]
    rows += [{"messages": [{"role": "system", "content": "Short."}, *said]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = TuningSettings(dataset=str(path), held_out_fraction=0.3)
    told = for_kaito(path, settings)
    assert told == for_kaito(path, settings) and f"sha256:{told.digest}" == file_digest(told.path)
    shown = list(read_jsonl(told.path))
    asked = [row for row in rows if is_held_out(row, 0.3)]  # as `training.begin.split` keeps them for the gate
    assert 0 < len(asked) < len(rows) and told.rows == len(shown) == len(rows) - len(asked)
    assert not {json.dumps(prompt_messages(row)) for row in asked} & {json.dumps(row["messages"][:-1]) for row in shown}
    again = [row for _, row in (each for each in read(told.path, Limits(1024)) if not isinstance(each, Problem))]
    kept = [row for row in rows if not is_held_out(row, 0.3)]
    assert [(prompt_messages(row), answer(row)) for row in again] == [
        (prompt_messages(row), answer(row)) for row in kept
    ]
    with pytest.raises(SettingsError, match="leaves no row to tune on"):
        for_kaito(path, TuningSettings(dataset=str(path), held_out_fraction=0.999999))


def test_weights_decide_one_name_and_the_verdict_another() -> None:
    first = plan(environment(), "notes", TOLD, dataset_digest="5" * 64)
    assert first.title.startswith("tune-notes-") and first.conductor == first.evaluation.replace("tune-", "kaito-")
    gate = plan(environment({}, {"gate": {"min_gain": 0.2}}), "notes", TOLD, dataset_digest="5" * 64)
    held_out = plan(environment(), "notes", TOLD, dataset_digest="6" * 64)
    for other in (gate, held_out):
        assert other.title == first.title and other.evaluation != first.evaluation != other.conductor
    rate = plan(environment({}, {"learning_rate": 1e-5}), "notes", TOLD, dataset_digest="5" * 64)
    rows = plan(environment(), "notes", Told(TOLD.path, "e" * 64, 900), dataset_digest="5" * 64)
    assert len({first.title, rate.title, rows.title}) == 3 == len({each.evaluation for each in (first, rate, rows)})
    longest = plan(environment(adapters={"a" * 40: ADAPTER}), "a" * 40, TOLD, dataset_digest="")
    assert max(len(longest.title), len(longest.conductor)) + len("-abcde") <= 63  # of their pods


def test_alerts_know_where_kaitos_jobs_are() -> None:
    by_name = {each.name: each.expression for each in alerts(environment())}
    assert 'namespace=~"drydock-tuning|drydock-serving|drydock-kaito-tuning"' in by_name["JobFailed"]
    assert 'container=~"adopt"' in by_name["GateFailed"]


def test_what_kaito_orders_is_in_the_estimate() -> None:
    def line(env: Environment) -> list[Line]:
        return [each for each in estimate(env, "swedencentral", {}).lines if each.resource == "KAITO's tuning"]

    (found,) = line(environment(adapters=dict.fromkeys(("a", "b"), ADAPTER)))
    assert found.what.startswith("0 to 2 x Standard_NC24ads_A100_v4") and found.minimum == 0 < found.maximum
    assert line(environment({"runtime": "direct", "kaito": {}})) == []


def test_the_page_has_the_table_of_today() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.split(BEGIN_TUNING)[1].split(END)[0].strip() == table(TUNING)


# The Job that has it tune


class FakeApi(Api):
    """Objects by path. `created` are those that were made; deleting and patching work as on a server."""

    def __init__(self, workspace: dict[str, Any]) -> None:
        place, self.name = workspace["metadata"]["namespace"], workspace["metadata"]["name"]
        self.workspaces = f"/apis/kaito.sh/v1beta1/namespaces/{place}/workspaces"
        self.jobs = f"/apis/batch/v1/namespaces/{place}/jobs"
        self.evaluation = "/apis/batch/v1/namespaces/drydock-tuning/jobs/judge"
        mine = {"metadata": {"uid": "u1", "creationTimestamp": "2026-01-01T00:00:00Z"}}
        self.objects: dict[str, Any] = {
            f"{self.jobs}/mine": mine | {"status": {"startTime": "2026-01-01T01:00:00Z"}},
            self.evaluation: {"spec": {"suspend": True}},
        }
        self.asked: list[tuple[str, str]] = []
        self.refusing: dict[tuple[str, str], ApiError] = {}

    def ask(self, method: str, path: str, body: Any = None, kind: str = "") -> Any:
        self.asked.append((method, path))
        if error := self.refusing.pop((method, path), None):
            raise error
        if method == "POST":
            made = body | {"metadata": body["metadata"] | {"uid": f"w{len(self.asked)}"}}
            self.objects[f"{path}/{body['metadata']['name']}"] = made
        elif path not in self.objects:
            raise ApiError(f"{method} {path}: 404: not found", 404)
        elif method == "DELETE":
            return self.objects.pop(path)
        elif method == "PATCH":
            for part, change in body.items():
                self.objects[path][part] = self.objects[path].get(part, {}) | change
        return self.objects.get(path, body)

    @property
    def workspace(self) -> Any:
        return self.objects.get(f"{self.workspaces}/{self.name}")

    def trains(self, **status: Any) -> None:
        owner = {"uid": self.workspace["metadata"]["uid"]}
        self.objects[f"{self.jobs}/{self.name}"] = {"metadata": {"ownerReferences": [owner]}, "status": status}

    @property
    def suspended(self) -> bool:
        return bool(self.objects[self.evaluation]["spec"]["suspend"])


START = 1767229200.0  # 2026-01-01T01:00:00Z


class Watched:
    """A conductor whose world changes while it sleeps: `then` are called one after the other, in place of time."""

    def __init__(self, *then: Callable[[Watched], None], retries: int = 1, there: bool = False) -> None:
        workspace = plan(environment(), "notes", TOLD, dataset_digest="").workspace
        self.api, self.at, self.there, self.stop = FakeApi(workspace), START, there, Sigterm()
        self._then = list(then)
        self.conductor = Conductor(
            self.api, workspace, "mine", "drydock-tuning/judge", 3600, retries, lambda: self.there, 0.0, 600,
            now=lambda: self.at,
        )  # fmt: skip

    def sleep(self, _: float) -> None:
        if not self._then:
            raise AssertionError("it waits for ever")
        self._then.pop(0)(self)

    def run(self, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setattr("training.kaito.time.sleep", self.sleep)
        return self.conductor.run(self.stop)


def test_it_has_kaito_tune_and_lets_the_evaluation_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(world: Watched) -> None:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "mine", "uid": "u1"}
        assert world.api.workspace["metadata"]["ownerReferences"] == [owner]
        world.api.trains(active=1)

    def succeeded(world: Watched) -> None:
        world.api.trains(succeeded=1)

    def uploaded(world: Watched) -> None:
        assert world.api.suspended and world.api.workspace, "success alone is no adapter"
        world.there = True

    world = Watched(made, succeeded, uploaded)
    assert world.run(monkeypatch) == exits.OK
    assert not world.api.suspended and world.api.workspace is None
    changes = [method for method, _ in world.api.asked if method != "GET"]
    assert changes == ["POST", "PATCH", "DELETE"]  # a crash in between leaves what the next one finds


def test_an_adapter_that_is_there_is_not_tuned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Watched(there=True)
    assert world.run(monkeypatch) == exits.OK
    assert not world.api.suspended and "POST" not in {method for method, _ in world.api.asked}


def test_after_a_crash_it_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Watched()
    world.api.objects[world.api.evaluation]["spec"]["suspend"] = False  # told, but the Workspace still there
    world.api.ask("POST", world.api.workspaces, world.conductor.workspace)
    assert world.run(monkeypatch) == exits.OK and world.api.workspace is None
    assert [method for method, _ in world.api.asked if method != "GET"] == ["POST", "DELETE"]


def test_a_workspace_of_a_job_before_becomes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def done(world: Watched) -> None:
        assert [each["uid"] for each in world.api.workspace["metadata"]["ownerReferences"]] == ["u0", "u1"]
        world.api.trains(succeeded=1)
        world.there = True

    world = Watched(done)
    before = world.conductor.workspace["metadata"] | {"ownerReferences": [{"uid": "u0"}]}
    world.api.ask("POST", world.api.workspaces, world.conductor.workspace | {"metadata": before})
    world.api.trains(active=1)
    assert world.run(monkeypatch) == exits.OK


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"failed": 2}, "failed 2 times"),
        ({"failed": 1, "conditions": [{"type": "Failed", "status": "True"}]}, "failed 1 times"),
    ],
)
def test_a_training_that_fails_too_often_costs_no_node_any_more(
    monkeypatch: pytest.MonkeyPatch, status: dict[str, Any], told: str
) -> None:
    world = Watched(
        lambda world: world.api.trains(active=1, failed=1),  # one may
        lambda world: world.api.trains(**status),
    )
    with pytest.raises(SettingsError, match=told):
        world.run(monkeypatch)
    assert world.api.workspace is None and world.api.suspended


def test_it_ends_at_the_deadline_even_where_no_node_ever_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_node(world: Watched) -> None:
        lacking = {"type": "NodeClaimReady", "status": "False", "message": "no quota for Standard_NC24ads_A100_v4"}
        world.api.workspace["status"] = {"conditions": [lacking]}

    def hours(world: Watched) -> None:
        world.at = START + 3601

    with pytest.raises(SettingsError, match=r"within 1 hours: NodeClaimReady: no quota for Standard_NC24ads"):
        (world := Watched(no_node, hours)).run(monkeypatch)
    assert world.api.workspace is None and world.api.suspended


def test_the_job_of_an_earlier_workspace_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(world: Watched) -> None:
        assert world.api.workspace, "its failure is not this one's"
        world.stop.came = True

    world = Watched(lambda world: None, told, retries=0)
    left = {"metadata": {"ownerReferences": [{"uid": "w0"}]}, "status": {"failed": 7}}
    world.api.objects[f"{world.api.jobs}/{world.api.name}"] = left
    assert world.run(monkeypatch) == exits.TERMINATED


def test_a_success_without_a_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def later(world: Watched) -> None:
        world.at += 601

    world = Watched(lambda world: world.api.trains(succeeded=1), later)
    world.api.ask("POST", world.api.workspaces, world.conductor.workspace)
    with pytest.raises(SettingsError, match=r"fine_tuning_completed\.txt is not in Blob"):
        world.run(monkeypatch)
    assert world.api.suspended


def test_it_waits_for_what_passes_and_ends_at_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def crds(world: Watched) -> None:
        world.api.refusing["POST", world.api.workspaces] = ApiError("webhook: 500: no endpoints", 500)

    def refused(world: Watched) -> None:
        world.api.refusing["POST", world.api.workspaces] = ApiError("400: Unsupported tuning preset name", 400)

    world = Watched(crds, refused)
    world.api.refusing["POST", world.api.workspaces] = ApiError("404: the server could not find it", 404)
    with pytest.raises(SettingsError, match="Unsupported tuning preset"):
        world.run(monkeypatch)


def test_an_earlier_workspace_goes_before_the_next_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(world: Watched) -> None:
        assert ("POST", world.api.workspaces) not in world.api.asked
        del world.api.objects[f"{world.api.workspaces}/{world.api.name}"]

    def told(world: Watched) -> None:
        world.stop.came = True

    world = Watched(gone, told)
    leaving = world.conductor.workspace["metadata"] | {"deletionTimestamp": "2026-01-01T01:00:00Z"}
    world.api.objects[f"{world.api.workspaces}/{world.api.name}"] = {"metadata": leaving}
    assert world.run(monkeypatch) == exits.TERMINATED
    assert world.api.workspace and world.api.suspended  # another pod finds it and goes on


def test_the_command_looks_for_the_result_in_blob_and_tells_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workspace = plan(environment(), "notes", TOLD, dataset_digest="").workspace
    api = FakeApi(workspace)
    api.objects[f"{api.jobs}/mine"]["status"]["startTime"] = "2000-01-01T00:00:00Z"  # too long ago
    monkeypatch.setattr("training.kaito.Api", lambda server, account: api)
    write_json(tmp_path / "workspace.json", workspace)
    account = FakeAccount()
    try:
        monkeypatch.setenv("DRYDOCK_BLOB_ENDPOINT", f"{account.url}/mystore")
        monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
        command = ["--workspace", str(tmp_path / "workspace.json"), "--job", "mine", "--then", "drydock-tuning/judge"]
        command += ["--result", "az://mystore/box/out/tune-notes", "--hours", "1", "--poll-seconds", "0"]
        assert main(command) == exits.INPUT and api.suspended
        account.blobs["out/tune-notes/fine_tuning_completed.txt"] = (b"Fine-Tuning completed", {})
        assert main(command) == exits.OK and not api.suspended
    finally:
        account.close()


def test_its_rights_are_for_these_alone() -> None:
    named = own_rules(["tune-a", "tune-b"])[1]
    assert (named.resource_names, named.verbs) == (["tune-a", "tune-b"], ["get", "patch", "delete"])
