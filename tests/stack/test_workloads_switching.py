"""Other replicas in place of those that answer: what the preview says, and in which order they come and go."""

from __future__ import annotations

from typing import Any

import pulumi
import pytest
from pulumi.runtime import mocks as runtime_mocks

from common.settings import SettingsError
from infra.outputs import described
from infra.settings import Environment
from tests.stack.test_stack import objects
from tests.stack.test_workloads_kaito import by_kaito, deployed, direct
from tests.unit.pulumi_mocks import Recorder, mocked
from tests.unit.test_kaito import environment, pool
from workloads.kaito import WAIT_FOR, manifest
from workloads.switching import OURS, OUTPUT, gap, lost, minutes, stays, tell

DIRECT = {"runtime": "direct", "kaito": {}}
ONE = {"min_replicas": 1, "max_replicas": 1}
KAITOS = "workspace/engine-1a2b3c4d"


def told(
    monkeypatch: pytest.MonkeyPatch, env: Environment, before: str | None, after: str, *, preview: bool = True
) -> list[tuple[str, str]]:
    """What `tell` says, by severity, when the stack's last outputs name `before`."""
    said: list[tuple[str, str]] = []
    for level in ("info", "warn", "error"):
        monkeypatch.setattr(pulumi.log, level, lambda line, level=level: said.append((level, line)))
    outputs = {"endpoint": "x"} | ({OUTPUT: before} if before else {})

    def new_resource(self: Recorder, args: runtime_mocks.MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        assert args.typ == "pulumi:pulumi:StackReference" and args.inputs == {"name": "example/drydock/test"}
        return args.name, {"name": args.name, "outputs": outputs, "secretOutputNames": []}

    monkeypatch.setattr(Recorder, "new_resource", new_resource)
    with mocked(preview=preview):
        pulumi.runtime.test(lambda: tell(env, after))()  # type: ignore[no-untyped-call]
    return said


def test_nothing_is_said_at_first_of_what_stays_or_outside_of_a_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment(ONE)
    assert OUTPUT in described()
    assert told(monkeypatch, env, None, KAITOS) == []
    assert told(monkeypatch, env, KAITOS, KAITOS) == []
    assert told(monkeypatch, env, OURS, KAITOS, preview=False) == []


def test_how_long_nobody_is_answered_and_the_way_out_by_the_pool_s_size(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy, full = environment(ONE), environment()  # one and two replicas; the pool has two GPUs
    ((level, line),) = told(monkeypatch, roomy, OURS, KAITOS)
    assert level == "warn" and line == gap(roomy, OURS, KAITOS)
    assert "deployment/engine goes at once" in line and "nobody is answered for 10 to 46 minutes" in line
    assert "pools.a100.max_nodes = 2 has room for both at once: serving.new_first: true keeps the old ones" in line
    ((_, line),) = told(monkeypatch, full, KAITOS, "inferenceset/engine-2")
    assert (
        "max_nodes = 2 has no room for both: with 4, and quota for them, serving.new_first: true keeps the old" in line
    )


def test_with_new_first_the_old_ones_answer_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment(ONE | {"new_first": True})
    assert told(monkeypatch, env, OURS, KAITOS) == [("info", stays(env, OURS, KAITOS))]
    assert "deployment/engine answers until workspace/engine-1a2b3c4d does, 10 to 46 minutes" in stays(
        env, OURS, KAITOS
    )


def test_the_add_on_has_to_stay_until_its_resources_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    without, kept = environment(DIRECT), environment(DIRECT, cluster={"kaito": True})
    (level, line), (second, _) = told(monkeypatch, without, KAITOS, OURS)
    assert (level, second) == ("error", "warn") and line == lost(without, KAITOS)[0] and "cluster.kaito: " in line
    assert [level for level, _ in told(monkeypatch, kept, KAITOS, OURS)] == ["warn"]


def test_our_own_replicas_are_up_sooner_as_their_weights_are_next_door() -> None:
    env = environment(DIRECT)
    assert minutes(env, OURS) == (10, 43) and minutes(env, KAITOS) == (10, 46)


@pytest.mark.parametrize(("nodes", "fits"), [(3, False), (4, True)])
@pytest.mark.parametrize("runtime", [{}, DIRECT])
def test_new_first_needs_gpus_for_both(nodes: int, fits: bool, runtime: dict[str, Any]) -> None:
    wanted = {"new_first": True} | runtime
    if fits:
        assert environment(wanted, pools=pool(max_nodes=nodes)).serving.new_first
        return
    with pytest.raises(
        SettingsError, match=r"serving\.new_first: 4 replicas, new and old, but pool a100 has room for 3 at"
    ):
        environment(wanted, pools=pool(max_nodes=nodes))


@pytest.mark.parametrize(
    ("replicas", "condition"), [(1, "condition=InferenceReady"), (2, "jsonpath={.status.readyReplicas}=2")]
)
def test_pulumi_waits_for_what_kaito_says_is_ready(replicas: int, condition: str) -> None:
    several = {"min_replicas": replicas, "max_replicas": replicas}
    waited = manifest(environment(several | {"new_first": True}, pools=pool(max_nodes=4)))
    plain = manifest(environment(several, pools=pool(max_nodes=4)))
    assert waited["metadata"]["annotations"][WAIT_FOR] == condition
    assert WAIT_FOR not in plain["metadata"]["annotations"]
    assert waited["metadata"]["name"] == plain["metadata"]["name"], "to wait or not is no other replica"


def of(seen: Recorder, name: str) -> dict[str, Any]:
    (found,) = (item.inputs for item in objects(seen) if item.name == name)
    return found


def test_the_address_is_the_same_object_whoever_answers() -> None:
    assert of(direct(), "serving-router-service") == of(by_kaito(), "serving-router-service")
    for seen in (direct(), by_kaito()):
        services = [item.inputs["metadata"]["name"] for item in objects(seen) if item.type.endswith(":Service")]
        assert services == ["drydock"]


def test_our_own_deployment_is_waited_for_with_new_first_alone() -> None:
    serving = {"pool": "a100", "min_replicas": 1, "max_replicas": 1}
    waited = deployed({"drydock:serving": serving | {"new_first": True}})
    skip = "pulumi.com/skipAwait"
    assert skip not in (of(waited, "serving-engine-deployment")["metadata"].get("annotations") or {})
    assert skip in of(direct(), "serving-engine-deployment")["metadata"]["annotations"]
