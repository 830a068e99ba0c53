"""The example of another stack reads outputs that exist, keeps secrets secret, and tells a wrong model at once."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pulumi
import pytest
from pulumi.runtime import mocks as runtime_mocks

from infra.outputs import described
from tests.unit.pulumi_mocks import KUBECONFIG, Recorder, mocked

PROGRAM = Path(__file__).parents[2] / "examples" / "consumer" / "__main__.py"
VALUES = {
    "kubeconfig": KUBECONFIG,
    "cluster_id": "/subscriptions/1/aks",
    "endpoint": "http://drydock.drydock-serving.svc/v1",
    "models": ["base", "kubectl"],
    "client_label": {"drydock/client": "true"},
}


def run(monkeypatch: pytest.MonkeyPatch, model: str) -> Recorder:
    original = Recorder.new_resource

    def new_resource(self: Recorder, args: runtime_mocks.MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        if args.typ == "pulumi:pulumi:StackReference":
            return args.name, {"name": args.name, "outputs": VALUES, "secretOutputNames": ["kubeconfig"]}
        return original(self, args)

    monkeypatch.setattr(Recorder, "new_resource", new_resource)
    config = {"chat-app:drydock_stack": "organization/drydock/dev", "chat-app:model": model, "chat-app:api_key": "k"}
    with mocked(project="chat-app", config=config) as seen:
        pulumi.runtime.test(lambda: (runpy.run_path(str(PROGRAM)), None)[1])()  # type: ignore[no-untyped-call]
    return seen


def test_it_reads_outputs_that_every_environment_has() -> None:
    read = set(re.findall(r'require_output\("(\w+)"\)', PROGRAM.read_text()))
    assert read == set(VALUES)
    assert read <= set(described())
    assert described()["kubeconfig"].secret


def test_it_makes_a_namespace_that_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run(monkeypatch, "kubectl")
    assert seen.one(":Namespace").inputs["metadata"]["labels"] == {"drydock/client": "true"}
    assert seen.one(":ConfigMap").inputs["data"] == {"OPENAI_BASE_URL": VALUES["endpoint"], "OPENAI_MODEL": "kubectl"}
    assert all(item.type.startswith("kubernetes:") or ":" in item.type for item in seen.resources)


def test_a_model_that_is_not_served_is_told_in_the_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pulumi.RunError, match="kubctl is not served there; choose one of base, kubectl"):
        run(monkeypatch, "kubctl")


def test_the_program_stays_short() -> None:
    assert len(ast.parse(PROGRAM.read_text()).body) < 20
