"""Datasets from elsewhere: fetched once for the checks, then a local file to all that comes after. GPUs and drivers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pulumi
import pytest

from infra.preflight import load, problems
from infra.settings import Environment, read_environment
from tests.stack.test_stack import ROOT, config_of
from tests.unit.file_server import FileServer
from tests.unit.pulumi_mocks import mocked
from tests.unit.test_environment import SEED, as_pulumi
from training import source

DATA = (ROOT / "rehearsal" / "data" / "kubectl.jsonl").read_bytes()
DIGEST = hashlib.sha256(DATA).hexdigest()
SIGNED = "?sig=S3CR3T"


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("DRYDOCK_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "ATTEMPTS", 1)
    server = FileServer(DATA)
    yield server
    server.close()


def loaded(**datasets: dict[str, Any]) -> Environment:
    """The development environment with these adapters, each the one of its file but for its dataset."""
    config = config_of("dev")
    adapter = config["drydock:adapters"]["kubectl"]
    config |= {"drydock:adapters": {name: adapter | change for name, change in datasets.items()}}
    config |= {"drydock:api_keys": {"team-a": "k3y"}, "drydock:network": {"authorized_ip_ranges": ["198.18.0.7/32"]}}
    with mocked(stack="dev", config=config):
        pulumi.runtime.config._SECRET_KEYS.set({"drydock:api_keys"})
        return load("drydock", "dev")


def test_a_dataset_from_elsewhere_is_fetched_once_and_local_from_then_on(server: FileServer, tmp_path: Path) -> None:
    url = f"{server.url}/rows.jsonl{SIGNED}"
    env = loaded(one={"dataset": url, "dataset_sha256": DIGEST}, two={"dataset": url, "dataset_sha256": DIGEST})
    assert server.seen == ["all"], "two adapters share it"
    for adapter in env.adapters.values():
        assert Path(adapter.dataset).is_relative_to(tmp_path) and (ROOT / adapter.dataset).read_bytes() == DATA
        assert adapter.dataset_sha256 is None, "proved here: it names no Job"
    assert loaded(here={}).adapters["here"].dataset == str(ROOT / "rehearsal/data/kubectl.jsonl")


def test_what_is_wrong_with_it_is_told_at_its_setting_with_everything_else(server: FileServer) -> None:
    answers: list[dict[str, object]] = [{"status": 404}, {"status": 503}, {"body": DATA + b"{}\n"}]
    server.fault = answers.__getitem__
    with pytest.raises(pulumi.RunError) as caught:
        loaded(
            gone={"dataset": f"{server.url}/gone{SIGNED}"},
            busy={"dataset": f"{server.url}/busy{SIGNED}"},
            bad={"dataset": f"{server.url}/bad{SIGNED}"},
            other={"dataset_sha256": "0" * 64},
            nowhere={"dataset": "nowhere.jsonl"},
        )
    told = str(caught.value)
    assert "S3CR3T" not in told
    for line in (
        f"adapters.gone.dataset: {server.url}/gone: no such file (404 Not Found)",
        f"adapters.busy.dataset: {server.url}/busy: 503 Service Unavailable, at 1 attempts",
        f"adapters.bad.dataset: {server.url}/bad:{len(DATA.splitlines()) + 1}: found no key 'instruction'",
        f"adapters.other.dataset: rehearsal/data/kubectl.jsonl: dataset_sha256 is {'0' * 64}, but the file's SHA-256 is {DIGEST}",
        "adapters.nowhere.dataset: nowhere.jsonl: no such file below the project's folder",
    ):
        assert line in told


@pytest.mark.parametrize(
    ("group", "ci", "protect", "warned"),
    [(None, "", False, False), (None, "", True, True), (None, "true", False, True), ("0" * 36, "true", True, False)],
)
def test_an_environment_of_several_people_is_told_to_name_its_administrators(
    group: str | None, ci: str, protect: bool, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "warn", lambda text, *_: said.append(text))
    config = config_of("dev") | {
        "drydock:protect": protect,
        "drydock:api_keys": {"team-a": "k3y"},
        "drydock:network": {"authorized_ip_ranges": ["198.18.0.7/32"]},
    }
    config["drydock:cluster"] |= {"admin_group_id": group} if group else {}
    with mocked(stack="dev", config=config):
        pulumi.runtime.config._SECRET_KEYS.set({"drydock:api_keys"})
        load("drydock", "dev")
    assert [text.partition(":")[0] for text in said] == ["cluster.admin_group_id"] * warned


def test_a_dataset_on_which_nothing_could_pass_is_told_before_a_gpu_is_rented(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows = [{"instruction": f"question {number}", "input": "", "output": "a"} for number in range(100)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = {
        "few": {"dataset": "d.jsonl"},
        "asks-less": {"dataset": "d.jsonl", "gate": {"min_examples": 5}},
        "keeps-more": {"dataset": "d.jsonl", "held_out_fraction": 0.5},
    }
    values = as_pulumi(SEED) | {"adapters": json.dumps(adapters)}
    env = read_environment(values, ("api_keys", "huggingface_token"), project="drydock")
    told = [line for line in problems(env, dict.fromkeys(adapters, data)) if "gate.min_examples" in line]
    assert len(told) == 1
    assert told[0].startswith("adapters.few.dataset: d.jsonl: 100 rows with held_out_fraction = 0.1 give ")


@pytest.mark.parametrize(
    ("pools", "change", "told"),
    [
        ({"a10": "Standard_NV6ads_A10_v5"}, {}, ["pools.a10.vm_size"]),
        ({"a10": "Standard_NV36ads_A10_v5"}, {"device": "cpu"}, []),  # a rehearsal of the stack uses no driver
        ({"a10": "Standard_NV36ads_A10_v5", "t4": "Standard_NC4as_T4_v3"}, {"pool": "t4"}, ["pools.a10.vm_size"]),
        ({"t4": "Standard_NC4as_T4_v3", "a10": "Standard_NV36ads_A10_v5"}, {"pool": "t4"}, []),  # nobody uses it
    ],
)
def test_a_pool_whose_driver_is_too_old_for_the_images_is_told_at_its_setting(
    pools: dict[str, str], change: dict[str, Any], told: list[str]
) -> None:
    """What KAITO serves there is KAITO's image: tests/unit/test_kaito.py has A10s that are not refused."""
    first = next(iter(pools))
    values = as_pulumi(SEED) | {
        "pools": json.dumps({name: {"vm_size": size, "max_nodes": 2} for name, size in pools.items()}),
        "tuning": json.dumps({"pool": first}),
        "serving": json.dumps({"pool": first} | change),
    }
    env = read_environment(values, ("api_keys", "huggingface_token"), project="drydock")
    found = problems(env, {})
    drivers = [line for line in found if "AKS installs NVIDIA's driver 570" in line]
    assert [line.partition(":")[0] for line in drivers] == told
    # What would fit into the 4 GiB of such a GPU is no advice where it cannot be used at all.
    assert change or found == drivers
