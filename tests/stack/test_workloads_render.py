"""Kubernetes objects as files: all of them, the same each time, with nothing secret in them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pulumi.runtime import rpc

from common.settings import SettingsError
from tests.unit.kubernetes_schema import problems
from workloads.render import declared, file_of, main, plain, stack_config, without_secrets, write

PROJECT = """\
name: ship
runtime: python
config:
  size: {type: integer, default: 3}
  keys: {type: object, default: {}}
"""
STACK = """\
config:
  azure-native:location: swedencentral
  ship:hull: {length: 12, paint: {secure: v1:abc}}
  ship:token: {secure: v1:def}
"""
PROGRAM = """\
import pulumi
from pulumi_kubernetes import core, meta

config = pulumi.Config("ship")
core.v1.ConfigMap("a", metadata=meta.v1.ObjectMetaArgs(name="hull", namespace="dock"), data={"size": config.require("size")})
core.v1.Secret("b", metadata=meta.v1.ObjectMetaArgs(name="keys", namespace="dock"),
               string_data={"key": pulumi.Output.secret("hidden-1")}, data={"old": "hidden-2"})
core.v1.Namespace("c", metadata=meta.v1.ObjectMetaArgs(name="dock"))
if config.get("wrong"):
    raise pulumi.RunError("size: too wrong")
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "Pulumi.yaml").write_text(PROJECT)
    (tmp_path / "Pulumi.dev.yaml").write_text(STACK)
    (tmp_path / "__main__.py").write_text(PROGRAM)
    return tmp_path


def test_settings_are_the_stacks_and_the_projects_defaults_without_what_is_encrypted(root: Path) -> None:
    name, config, encrypted = stack_config(root, "dev")
    assert name == "ship"
    assert config == {
        "azure-native:location": "swedencentral", "ship:size": 3, "ship:keys": {}, "ship:hull": {"length": 12},
    }  # fmt: skip
    assert encrypted == ["ship:hull.paint", "ship:token"]


def test_what_may_be_secret_has_a_placeholder_so_that_its_objects_are_there(root: Path) -> None:
    (root / "Pulumi.dev.yaml").write_text(
        "config: {ship:api_keys: {me: {secure: v1:abc}}, ship:huggingface_token: {secure: v1:def}}"
    )
    _, config, encrypted = stack_config(root, "dev")
    assert config["ship:api_keys"] == {"me": "<secret>"} and config["ship:huggingface_token"] == "<secret>"
    assert encrypted == ["ship:api_keys.me", "ship:huggingface_token"]


def test_a_stack_without_settings_is_told_those_that_have_some(root: Path) -> None:
    (root / "Pulumi.prod.yaml").write_text("config: {}")
    with pytest.raises(SettingsError, match=r"Pulumi.stage.yaml: no such file; stacks with settings: dev, prod"):
        stack_config(root, "stage")


def test_settings_that_are_no_yaml_are_told_with_their_line(root: Path) -> None:
    (root / "Pulumi.dev.yaml").write_text("config:\n  ship:size: [3\n  ship:keys: {}\n")
    with pytest.raises(SettingsError, match=r"^Pulumi\.dev\.yaml:3: not YAML: expected ',' or ']'"):
        stack_config(root, "dev")


def test_a_program_is_run_and_its_objects_written(root: Path) -> None:
    _, config, _ = stack_config(root, "dev")
    names = write(declared(root, "ship", "dev", config), root / "out")
    assert names == ["_cluster/01-namespace-dock.yaml", "dock/08-configmap-hull.yaml", "dock/09-secret-keys.yaml"]
    assert yaml.safe_load((root / "out" / names[1]).read_text())["data"] == {"size": "3"}
    secret = (root / "out" / names[2]).read_text()
    assert "hidden" not in secret
    assert yaml.safe_load(secret)["stringData"] == {"key": "<secret>"}
    assert yaml.safe_load(secret)["data"] == {"old": "<secret>"}


def test_what_the_program_says_of_its_settings_is_told(root: Path) -> None:
    with pytest.raises(SettingsError, match="size: too wrong"):
        declared(root, "ship", "dev", {"ship:size": 3, "ship:wrong": "yes"})


def test_an_object_that_is_gone_loses_its_file_and_others_files_stay(tmp_path: Path) -> None:
    def item(name: str) -> dict[str, Any]:
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}

    write([item("old"), item("kept")], tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert write([item("kept")], tmp_path) == ["_cluster/08-configmap-kept.yaml"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "08-configmap-kept.yaml", "index.txt", "notes.txt",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="two objects"):
        write([item("twice"), item("twice")], tmp_path)


def test_what_is_marked_secret_is_hidden_wherever_it_stands() -> None:
    marked = rpc.wrap_rpc_secret({"token": "hidden", "name": "hidden"})
    assert plain({"spec": [marked, rpc.wrap_rpc_secret("hidden")]}) == {
        "spec": [{"name": "<secret>", "token": "<secret>"}, "<secret>"]
    }


def test_numbers_are_whole_and_keys_in_one_order() -> None:
    assert plain({"z": 2.0, "name": "x", "a": [1.5]}) == {"name": "x", "a": [1.5], "z": 2}
    assert list(plain({"z": 2.0, "name": "x", "a": 1})) == ["name", "a", "z"]
    custom = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "e", "namespace": "n"}}
    assert file_of(custom) == "n/15-scaledobject-e.yaml"
    assert without_secrets({"kind": "ConfigMap", "data": {"a": "b"}}) == {"kind": "ConfigMap", "data": {"a": "b"}}


def test_a_stress_test_is_rendered_though_its_key_is_encrypted() -> None:
    repository = Path(__file__).parents[2]
    project, config, _ = stack_config(repository, "prod")
    config |= {"drydock:stress": {"run": 1}, "drydock:api_keys": {"me": "<secret>"}}
    objects = {(item["kind"], item["metadata"]["name"]) for item in declared(repository, project, "prod", config)}
    assert ("Secret", "stress-key") in objects
    assert [name for kind, name in objects if kind == "Job" and name.startswith("stress-")]


def test_the_stack_itself_without_cloud_or_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    assert main(["--stack", "prod", "--out", str(tmp_path)]) == 0
    files = sorted(tmp_path.rglob("*.yaml"))
    printed = capsys.readouterr().out
    assert f"{len(files)} objects in {tmp_path}" in printed and "13-deployment-engine.yaml" in printed
    for path in files:
        item = yaml.safe_load(path.read_text())
        if item["apiVersion"] != "keda.sh/v1alpha1":
            assert problems(item) == [], path.name
    kinds = {path.name.split("-")[1] for path in files}
    assert {"namespace", "job", "deployment", "daemonset", "service", "scaledobject", "networkpolicy"} <= kinds
