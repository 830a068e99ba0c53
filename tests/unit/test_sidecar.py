"""The sidecar: what is promoted is loaded, proven, then switched to; whatever breaks, what is served stays served."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import generate_latest
from safetensors.numpy import load_file, save_file

from artifacts.adapter import PROMOTED, AdapterCard, publish_adapter, repository, version
from artifacts.store import MANIFEST_TYPE, OutOfReach, Store, StoreError, open_store
from common.files import write_json
from common.processes import free_ports
from serving import sidecar as module
from serving.canaries import record
from serving.client import Answer, EngineError
from serving.faults import FILE, drilled
from serving.sidecar import Sidecar
from serving.spec import ServingSpec
from serving.state import Aliases, new_boot
from tests.unit.conftest import FakeEngine

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def strength_in(folder: Path) -> float:
    return float(load_file(folder / "adapter_model.safetensors")[KEY.format("A")][0, 0])


class Clock:
    """The time module as the sidecar sees it, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@dataclass
class Rig:
    """One sidecar with a real folder store and an engine in this process."""

    root: Path
    clock: Clock
    engine: FakeEngine = field(default_factory=FakeEngine)

    def __post_init__(self) -> None:
        self.store: Store = open_store(self.root / "store")
        self.state = self.root / "state"
        self.engine.weights = strength_in
        self.boot()
        self.sidecar = self.make("kubectl", "triage")

    def make(self, *adapters: str) -> Sidecar:
        spec = ServingSpec.model_validate(
            {"base_model": "b", "store": "s", "adapters": adapters, "old_version_seconds": 30}
        )
        return Sidecar(spec, self.store, self.engine, self.state, self.state / "cache")  # type: ignore[arg-type]

    def boot(self) -> None:
        """The engine process starts (anew)."""
        self.engine.restart()
        new_boot(self.state)

    def publish(
        self,
        name: str = "kubectl",
        strength: float = 1.0,
        recorded: float | None = None,
        canaries: Any = ...,
        reports: Mapping[str, Any] | None = None,
    ) -> str:
        """Publish and promote a version whose canaries were recorded at strength `recorded`; returns its digest."""
        folder = self.root / "made" / f"{name}-{strength}-{recorded}-{id(canaries)}"
        for title, report in (reports or {}).items():
            write_json(folder / title, report)
        write_json(
            folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        )
        tensors = {
            KEY.format("A"): np.full((2, 8), strength, np.float32), KEY.format("B"): np.ones((8, 2), np.float32)
        }  # fmt: skip
        save_file(tensors, folder / "adapter_model.safetensors")
        if canaries is ...:
            evaluated = FakeEngine(strengths={"c": strength if recorded is None else recorded})
            made = record(evaluated, "c", "base", [Answer("", [1, 2, 3, 4], 2)])  # type: ignore[arg-type]
            assert made
            canaries = made.model_dump()
        if canaries is not None:
            write_json(folder / "canaries.json", canaries)
        card = AdapterCard(
            name=name, base_model="b", base_revision="r", dataset_digest="d", evaluation={"passed": True}
        )
        digest = publish_adapter(self.store, name, folder, card)
        self.promote(digest, name)
        return digest

    def promote(self, digest: str, name: str = "kubectl") -> None:
        self.store.tag(repository(name), digest, PROMOTED)

    @property
    def told(self) -> Aliases:
        """What the request layer reads."""
        return Aliases.model_validate_json((self.state / "aliases.json").read_bytes())

    def ready(self) -> bool:
        return self.told.ready

    @property
    def serving(self) -> dict[str, str]:
        return {alias: served.digest for alias, served in self.told.aliases.items()}

    def metric(self, start: str) -> list[str]:
        text = generate_latest(self.sidecar.metrics.registry).decode()
        return [line for line in text.splitlines() if line.startswith(start)]

    def calls(self, *starts: str) -> list[str]:
        """The engine's calls that begin so; forgets all so far."""
        made = [call for call in self.engine.calls if call.startswith(starts)]
        self.engine.calls.clear()
        return made


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return Rig(tmp_path, clock)


def name(digest: str, adapter: str = "kubectl") -> str:
    return f"{adapter}.{version(digest)}"


# Loading and switching.


def test_a_pool_without_promoted_adapters_is_ready_to_serve_its_base(rig: Rig) -> None:
    assert rig.sidecar.look()
    assert (rig.ready(), rig.told.aliases, rig.told.refused) == (True, {}, {})


def test_a_promoted_version_is_loaded_under_a_name_of_its_own_proven_and_then_answers(rig: Rig) -> None:
    rig.sidecar.look()
    digest = rig.publish()
    assert rig.sidecar.look()
    assert rig.calls("load", "log_probabilities", "unload") == [
        f"load {name(digest)}",
        f"log_probabilities {name(digest)}",
    ]
    served = rig.told.aliases["kubectl"]
    assert (served.digest, served.version, served.parity_difference) == (digest, version(digest), 0)
    assert rig.ready()
    assert rig.metric("drydock_adapter_serving{") == [
        f'drydock_adapter_serving{{adapter="kubectl",version="{version(digest)}"}} 1.0'
    ]


def test_one_look_serves_all_adapters(rig: Rig) -> None:
    first, second = rig.publish("kubectl"), rig.publish("triage", 2.0)
    assert rig.sidecar.look()
    assert rig.serving == {"kubectl": first, "triage": second}


def test_another_look_changes_nothing_and_costs_no_load(rig: Rig) -> None:
    rig.publish()
    rig.sidecar.look()
    stamp = (rig.state / "aliases.json").stat().st_mtime_ns
    rig.calls()
    rig.sidecar.look()
    assert rig.calls("load", "unload", "log_probabilities") == []
    assert (rig.state / "aliases.json").stat().st_mtime_ns == stamp


def test_a_new_version_takes_over_and_the_old_one_stays_for_requests_under_way(rig: Rig) -> None:
    old = rig.publish(strength=1.0)
    rig.sidecar.look()
    new = rig.publish(strength=2.0)
    assert rig.sidecar.look()
    assert rig.serving == {"kubectl": new}
    rig.clock.now += 29.9
    rig.sidecar.look()
    assert name(old) in rig.engine.strengths
    rig.clock.now += 0.2
    rig.sidecar.look()
    assert rig.engine.strengths.keys() == {"base", name(new)}
    assert len(rig.metric("drydock_adapter_serving{")) == 1
    assert len(rig.metric("drydock_adapter_switch_seconds{")) == 3, "of the version that answers alone"


def test_rolling_back_needs_no_load_while_the_old_version_is_there_and_keeps_it(rig: Rig) -> None:
    old = rig.publish(strength=1.0)
    rig.sidecar.look()
    rig.publish(strength=2.0)
    rig.sidecar.look()
    rig.calls()
    rig.promote(old)
    assert rig.sidecar.look()
    assert rig.serving == {"kubectl": old}
    assert rig.calls("load") == []
    rig.clock.now += 60
    rig.sidecar.look()
    assert rig.engine.strengths.keys() == {"base", name(old)}


def test_rolling_back_long_after_loads_it_again(rig: Rig) -> None:
    old = rig.publish(strength=1.0)
    rig.sidecar.look()
    rig.publish(strength=2.0)
    rig.sidecar.look()
    rig.clock.now += 60
    rig.sidecar.look()
    rig.promote(old)
    assert rig.sidecar.look()
    assert rig.serving == {"kubectl": old}


def test_a_withdrawn_adapter_stops_answering_and_is_unloaded_later(rig: Rig) -> None:
    digest = rig.publish()
    rig.sidecar.look()
    index = Path(rig.store.url) / repository("kubectl") / "index.json"
    kept = json.loads(index.read_text())
    for entry in kept["manifests"]:
        entry.pop("annotations", None)
    index.write_text(json.dumps(kept))
    assert rig.sidecar.look()
    assert (rig.serving, rig.ready()) == ({}, True)
    assert name(digest) in rig.engine.strengths
    rig.clock.now += 31
    rig.sidecar.look()
    assert rig.engine.strengths.keys() == {"base"}


# Refusing.


def refused_for(rig: Rig, reason: str, keeps: str | None) -> None:
    assert rig.sidecar.look(), "a refusal is final: nothing is waited for"
    assert reason in rig.told.refused["kubectl"]
    assert rig.serving == ({"kubectl": keeps} if keeps else {})
    assert rig.ready()
    rig.calls()
    assert rig.sidecar.look()
    assert rig.calls("load", "log_probabilities") == [], "it is not tried again"


@pytest.fixture(params=[True, False], ids=["with a version that serves", "as the first version"])
def before(request: pytest.FixtureRequest, rig: Rig) -> str | None:
    if not request.param:
        return None
    digest = rig.publish(strength=1.0)
    rig.sidecar.look()
    return digest


def test_a_version_that_computes_like_the_bare_base_is_refused_and_unloaded(rig: Rig, before: str | None) -> None:
    bad = rig.publish(strength=0.0, recorded=1.5)
    refused_for(rig, "its canaries differ by 1.5000 nats a token from what was recorded, allowed are 0.05", before)
    assert name(bad) not in rig.engine.strengths
    (counted,) = rig.metric("drydock_adapter_refused_total{")
    assert counted.endswith(f'version="{version(bad)}"}} 1.0')


def test_a_blob_that_was_changed_in_the_store_is_refused(rig: Rig, before: str | None) -> None:
    digest = rig.publish(strength=3.0)
    manifest = rig.store.inspect(repository("kubectl"), digest).manifest
    weights = next(x for x in manifest["layers"] if "safetensors" in str(x["annotations"]))["digest"]
    blob = Path(rig.store.url) / repository("kubectl") / "blobs" / "sha256" / weights.removeprefix("sha256:")
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    refused_for(rig, f"adapter_model.safetensors: expected {weights}", before)


def test_a_version_that_vllm_does_not_load_is_refused_in_vllms_words(rig: Rig, before: str | None) -> None:
    rig.publish(strength=3.0)
    rig.engine.refuses_to_load = "/v1/load_lora_adapter: 400: rank 64 is beyond max_lora_rank 16"
    refused_for(rig, "rank 64 is beyond max_lora_rank 16", before)


UNFIT: dict[str, Any] = {
    "absent": None,
    "no canaries": {"canaries": []},
    "another shape": [1],
    "too few figures": {
        "canaries": [{"token_ids": [1, 2, 3], "prompt_length": 1, "adapter": [-1.0], "base": [-2.0, -2.0]}]
    },
    "no answer": {"canaries": [{"token_ids": [1], "prompt_length": 1, "adapter": [], "base": []}]},
}


@pytest.mark.parametrize("canaries", UNFIT.values(), ids=UNFIT)
def test_a_version_without_usable_canaries_is_refused(rig: Rig, before: str | None, canaries: Any) -> None:
    bad = rig.publish(strength=3.0, canaries=canaries)
    refused_for(rig, "canaries.json", before)
    assert name(bad) not in rig.engine.strengths


def test_an_engine_that_computes_no_numbers_proves_nothing(rig: Rig, before: str | None) -> None:
    rig.publish(strength=3.0)
    rig.engine.weights = lambda folder: float("nan")
    refused_for(rig, "its canaries differ by", before)


@pytest.mark.parametrize(("status", "refused"), [(400, True), (404, True), (429, False), (500, False), (503, False)])
def test_canaries_that_the_engine_rejects_are_final_and_its_own_trouble_is_not(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, status: int, refused: bool
) -> None:
    """A prompt that this engine can never answer must not keep a replica out; a busy engine must not refuse for good."""

    def fail(model: str, token_ids: list[int], prompt_length: int) -> list[float]:
        raise EngineError("/v1/completions", status, "no")

    digest = rig.publish()
    with monkeypatch.context() as patch:
        patch.setattr(rig.engine, "log_probabilities", fail)
        assert rig.sidecar.look() is refused
    assert rig.sidecar.look()
    assert rig.serving == ({} if refused else {"kubectl": digest})


def test_the_next_good_version_is_served_after_a_refused_one(rig: Rig) -> None:
    rig.publish(strength=0.0, recorded=1.5)
    rig.sidecar.look()
    good = rig.publish(strength=2.0)
    assert rig.sidecar.look()
    assert rig.serving == {"kubectl": good}


def test_one_adapters_refusal_does_not_hold_up_the_other(rig: Rig) -> None:
    rig.publish("kubectl", strength=0.0, recorded=1.5)
    good = rig.publish("triage", strength=2.0)
    assert rig.sidecar.look()
    assert rig.serving == {"triage": good}
    assert rig.ready()


INDEX = "application/vnd.oci.image.index.v1+json"
BLOB = {"mediaType": "text/plain", "digest": "sha256:" + "a" * 64, "size": 3}
NO_ARTIFACTS: dict[str, Any] = {
    "an index, as docker pushes it": {"schemaVersion": 2, "mediaType": INDEX, "manifests": []},
    "no mediaType": {"schemaVersion": 2, "config": BLOB, "layers": []},
    "no config": {"mediaType": MANIFEST_TYPE, "layers": []},
    "no layers": {"mediaType": MANIFEST_TYPE, "config": BLOB},
    "no digest": {"mediaType": MANIFEST_TYPE, "config": BLOB | {"digest": None}, "layers": []},
    "no number": {"mediaType": MANIFEST_TYPE, "config": BLOB | {"size": "3"}, "layers": []},
    "no text": {"mediaType": MANIFEST_TYPE, "config": BLOB, "layers": [BLOB | {"annotations": {"a": 1}}]},
    "another digest": {"mediaType": MANIFEST_TYPE, "config": BLOB | {"digest": "md5:ab"}, "layers": []},
    "no object": [],
}


@pytest.mark.parametrize("manifest", NO_ARTIFACTS.values(), ids=NO_ARTIFACTS)
def test_a_tag_on_what_is_no_artifact_is_refused_and_holds_up_nothing(rig: Rig, manifest: Any) -> None:
    """`oras tag` and `az acr import` put a tag on anything."""
    good, data = rig.publish("triage", strength=2.0), json.dumps(manifest).encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    rig.store._put_manifest(repository("kubectl"), digest, data)
    rig.store._set_tag(repository("kubectl"), digest, PROMOTED)
    assert rig.sidecar.look()
    assert (rig.serving, rig.ready()) == ({"triage": good}, True)
    assert "kubectl: " in rig.told.refused["kubectl"]
    assert len(rig.metric("drydock_adapter_refused_total{")) == 1


def test_a_fault_of_ours_in_one_adapter_does_not_hold_up_the_other(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good = rig.publish("triage", strength=2.0)
    rig.publish("kubectl")
    plain = rig.sidecar.cache.fetch

    def fetch(store: Store, adapter: str, digest: str) -> Path:
        return plain(store, {"triage": adapter}[adapter], digest)

    with monkeypatch.context() as patch:
        patch.setattr(rig.sidecar.cache, "fetch", fetch)
        assert not rig.sidecar.look()
    assert (rig.serving, rig.ready()) == ({"triage": good}, False)
    assert rig.metric('drydock_sidecar_errors_total{adapter="kubectl"}')[0].endswith(" 1.0")
    assert "KeyError: 'kubectl'" in caplog.text
    assert rig.sidecar.look(), "it is tried again"


# Trouble that passes.


def break_store(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise StoreError("registry: 503")

    patch.setattr(rig.store, "find", fail)


def make_busy(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    """The canaries of triage time out."""
    plain = rig.engine.log_probabilities

    def busy(model: str, *rest: Any) -> list[float]:
        if model.startswith("triage"):
            raise httpx.ReadTimeout("slow")
        return plain(model, *rest)

    patch.setattr(rig.engine, "log_probabilities", busy)


def test_before_the_engine_said_who_it_is_nothing_happens(rig: Rig) -> None:
    (rig.state / "boot").unlink()
    assert not rig.sidecar.look()
    assert not (rig.state / "aliases.json").exists()


def test_while_the_engine_is_starting_the_sidecar_waits(rig: Rig) -> None:
    digest = rig.publish()
    rig.engine.down = True
    assert not rig.sidecar.look()
    rig.engine.down = False
    assert rig.sidecar.look()
    assert rig.serving == {"kubectl": digest}


def test_a_replica_is_not_ready_until_every_promoted_adapter_is_loaded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rig.publish("kubectl")
    rig.publish("triage", 2.0)
    with monkeypatch.context() as patch:
        make_busy(rig, patch)
        assert not rig.sidecar.look()
        assert rig.serving == {"kubectl": first}, "the one that is proven answers already"
        assert not rig.ready()
    assert rig.sidecar.look()
    assert rig.ready()
    assert rig.calls("load triage") == [f"load {name(rig.serving['triage'], 'triage')}"], "and was loaded once"


def test_a_store_out_of_reach_keeps_what_is_served(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = rig.publish()
    rig.publish("triage", 2.0)
    rig.sidecar.look()
    with monkeypatch.context() as patch:
        break_store(rig, patch)
        assert rig.sidecar.look()
        assert rig.serving["kubectl"] == digest
        assert rig.ready()
    assert rig.metric('drydock_sidecar_errors_total{adapter="kubectl"}') == [
        'drydock_sidecar_errors_total{adapter="kubectl"} 1.0'
    ]


@pytest.mark.parametrize("other", ["never promoted", "refused"])
def test_a_store_out_of_reach_does_not_unready_a_replica_whose_other_adapter_is_not_served(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Otherwise one minute without the registry takes every replica of the pool out of the router at once."""
    digest = rig.publish()
    if other == "refused":
        rig.publish("triage", strength=0.0, recorded=1.5)
    assert rig.sidecar.look()
    break_store(rig, monkeypatch)
    rig.sidecar.look()
    assert rig.serving == {"kubectl": digest}
    assert rig.ready()


def test_a_store_out_of_reach_at_the_start_means_not_ready(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.publish()
    with monkeypatch.context() as patch:
        break_store(rig, patch)
        assert not rig.sidecar.look()
        assert not rig.ready()
    assert rig.sidecar.look()
    assert rig.ready()


def test_an_engine_that_came_back_gets_its_adapters_again_without_the_network(rig: Rig) -> None:
    digest = rig.publish()
    rig.sidecar.look()
    first = rig.told
    rig.boot()
    rig.calls()
    assert rig.sidecar.look()
    assert rig.calls("load") == [f"load {name(digest)}"]
    assert rig.told.boot != first.boot
    assert rig.serving == {"kubectl": digest}
    assert len([path for path in (rig.state / "cache").iterdir() if path.is_dir()]) == 1


def test_a_restarted_engine_may_take_what_the_last_one_refused(rig: Rig) -> None:
    digest = rig.publish(strength=3.0)
    rig.engine.refuses_to_load = "500: out of memory"
    rig.sidecar.look()
    assert rig.serving == {}
    rig.engine.refuses_to_load = ""
    rig.boot()
    assert rig.sidecar.look()
    assert (rig.serving, rig.told.refused) == ({"kubectl": digest}, {})


def test_metrics_show_only_the_version_that_serves_after_a_restart_with_another_one(rig: Rig) -> None:
    rig.publish(strength=1.0)
    rig.sidecar.look()
    new = rig.publish(strength=2.0)
    rig.boot()
    rig.sidecar.look()
    assert rig.metric("drydock_adapter_serving{") == [
        f'drydock_adapter_serving{{adapter="kubectl",version="{version(new)}"}} 1.0'
    ]


def test_a_restarted_sidecar_finds_the_engine_as_it_is(rig: Rig) -> None:
    digest = rig.publish()
    rig.sidecar.look()
    rig.calls()
    again = rig.make("kubectl", "triage")
    assert again.look()
    assert rig.calls("load") == [], "the engine has it; it is proven again and taken over"
    assert rig.serving == {"kubectl": digest}


def test_a_restarted_sidecar_takes_back_nothing_that_the_last_one_said(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an update of the sidecar alone makes clients see 404 for adapters that answer well."""
    rig.publish("kubectl")
    rig.publish("triage", 2.0)
    rig.sidecar.look()
    said: list[Aliases] = []
    monkeypatch.setattr(module, "write_aliases", lambda state, aliases: said.append(aliases))
    assert rig.make("kubectl", "triage").look()
    assert all(each.ready and each.aliases.keys() == {"kubectl", "triage"} for each in said)


def test_a_restarted_sidecar_without_a_store_keeps_what_is_served(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = rig.publish()
    rig.sidecar.look()
    break_store(rig, monkeypatch)
    rig.make("kubectl").look()
    assert rig.serving == {"kubectl": digest}


def test_an_old_version_that_cannot_be_unloaded_now_is_unloaded_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = rig.publish(strength=1.0)
    rig.sidecar.look()
    rig.publish(strength=2.0)
    rig.sidecar.look()
    rig.clock.now += 31

    def fail(name: str) -> None:
        raise EngineError("/v1/unload_lora_adapter", 500, "later")

    with monkeypatch.context() as patch:
        patch.setattr(rig.engine, "unload", fail)
        assert rig.sidecar.look()
    rig.sidecar.look()
    assert name(old) not in rig.engine.strengths


def test_the_engine_gets_a_folder_with_plain_peft_files(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    load = rig.engine.load

    def noted(name: str, folder: Path) -> None:
        folders.append(folder)
        load(name, folder)

    monkeypatch.setattr(rig.engine, "load", noted)
    digest = rig.publish()
    rig.sidecar.look()
    assert folders[0].name == name(digest), "a folder of its own for each version: vLLM caches by name and path"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folders[0].iterdir()}


# A store out of reach while containers start anew.


def restart(rig: Rig, *adapters: str) -> Sidecar:
    """Both containers of the replica start anew, over the same folders."""
    rig.boot()
    rig.calls()
    rig.sidecar = rig.make(*(adapters or ("kubectl", "triage")))
    return rig.sidecar


def test_a_replica_that_starts_without_the_store_serves_what_it_served(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    digest = rig.publish()  # triage was seen to have no promoted version
    rig.sidecar.look()
    break_store(rig, monkeypatch)
    restart(rig)
    assert rig.sidecar.look()
    assert (rig.serving, rig.ready()) == ({"kubectl": digest}, True)
    assert rig.calls("load", "log_probabilities") == [f"load {name(digest)}", f"log_probabilities {name(digest)}"]
    assert f"kubectl: version {version(digest)} was promoted when the store last answered" in caplog.text
    told = len(caplog.records)
    rig.sidecar.look()
    assert len(caplog.records) == told, "an outage is told once"


def test_a_registry_that_nobody_listens_for_is_such_a_store(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = rig.publish()
    rig.sidecar.look()
    monkeypatch.setattr("artifacts.registry.BACKOFF_SECONDS", 0.01)
    rig.store = open_store(f"oci://127.0.0.1:{free_ports(1)[0]}/drydock")
    assert restart(rig).look()
    assert (rig.serving, rig.ready()) == ({"kubectl": digest}, True)


def test_an_engine_that_starts_anew_in_a_long_outage_is_ready_before_the_store_is_asked(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = rig.publish()
    rig.sidecar.look()
    break_store(rig, monkeypatch)
    rig.sidecar.look()
    rig.boot()
    readiness: list[bool] = []

    def fail(*_: Any) -> str:
        readiness.append(rig.ready())
        raise StoreError("registry: 503")

    monkeypatch.setattr(rig.store, "find", fail)
    assert rig.sidecar.look()
    assert readiness == [True, True]
    assert rig.serving == {"kubectl": digest}


def test_one_failure_is_enough_to_serve_all_from_the_disk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a store that swallows connections each question costs most of a minute."""
    digests = {"kubectl": rig.publish("kubectl"), "triage": rig.publish("triage", 2.0)}
    rig.sidecar.look()
    served: list[dict[str, str]] = []

    def fail(*_: Any) -> str:
        served.append(rig.serving if (rig.state / "aliases.json").exists() else {})
        raise StoreError("registry: 503")

    monkeypatch.setattr(rig.store, "find", fail)
    (rig.state / "aliases.json").unlink()
    assert restart(rig).look()
    assert served == [{}, digests]


def test_a_store_that_does_not_answer_for_one_adapter_is_not_asked_for_the_others(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {"kubectl": rig.publish("kubectl"), "triage": rig.publish("triage", 2.0)}
    rig.sidecar.look()
    asked: list[str] = []

    def fail(repository: str, *_: Any) -> str:
        asked.append(repository)
        raise OutOfReach("registry: connection refused")

    monkeypatch.setattr(rig.store, "find", fail)
    assert restart(rig).look() and rig.sidecar.look()
    assert asked == [repository("kubectl")] * 2, "once each look"
    assert rig.serving == digests


def test_what_was_promoted_meanwhile_wins_once_the_store_answers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.publish(strength=1.0)
    rig.sidecar.look()
    new = rig.publish(strength=2.0)
    with monkeypatch.context() as patch:
        break_store(rig, patch)
        restart(rig)
        rig.sidecar.look()
        rig.clock.now += 600
        rig.sidecar.look()
        assert rig.metric("drydock_registry_unreachable_seconds ") == ["drydock_registry_unreachable_seconds 600.0"]
    assert rig.sidecar.look()
    assert rig.serving == {"kubectl": new}
    assert rig.metric("drydock_registry_unreachable_seconds ") == ["drydock_registry_unreachable_seconds 0.0"]


def test_a_loss_that_a_drill_declares_is_one_as_any_other(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Up to the file, which is real time's: what is served stays, a start serves from the disk, the metric rises."""
    old = rig.publish(strength=1.0)
    rig.sidecar.look()
    plain, file = rig.store, rig.root / "faults" / FILE
    file.parent.mkdir()
    file.write_text(f"{time.time() + 600:.0f}")
    rig.store = drilled(plain, file.parent)
    assert restart(rig).look()
    new = publish_elsewhere(rig, plain)
    rig.clock.now += 90
    assert rig.sidecar.look()
    assert (rig.serving, rig.ready()) == ({"kubectl": old}, True)
    assert rig.metric("drydock_registry_unreachable_seconds ") == ["drydock_registry_unreachable_seconds 90.0"]
    assert len([record for record in caplog.records if "DRILL" in record.getMessage()]) == 1
    file.unlink()
    assert rig.sidecar.look()
    assert rig.serving == {"kubectl": new}
    assert rig.metric("drydock_registry_unreachable_seconds ") == ["drydock_registry_unreachable_seconds 0.0"]


def publish_elsewhere(rig: Rig, store: Store) -> str:
    """Somebody else, who reaches the store, promotes another version."""
    seen, rig.store = rig.store, store
    try:
        return rig.publish(strength=2.0)
    finally:
        rig.store = seen


def test_a_withdrawn_adapter_is_not_served_from_the_disk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.publish()
    rig.sidecar.look()
    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "find", lambda *_: None)
        rig.sidecar.look()
    break_store(rig, monkeypatch)
    assert restart(rig).look()
    assert (rig.serving, rig.ready()) == ({}, True)


def test_an_adapter_of_which_this_replica_never_heard_keeps_it_out(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = rig.publish()
    rig.sidecar.look()
    break_store(rig, monkeypatch)
    assert not restart(rig, "kubectl", "triage", "third").look()
    assert (rig.serving, rig.ready()) == ({"kubectl": digest}, False)


def test_a_replica_that_starts_anew_after_a_refused_promotion_serves_what_it_served(rig: Rig) -> None:
    """As those do that did not start anew: the alias stays where it is."""
    good = rig.publish(strength=1.0)
    rig.sidecar.look()
    bad = rig.publish(strength=0.0, recorded=1.5)
    rig.sidecar.look()
    assert rig.serving == {"kubectl": good}
    again = restart(rig)
    for _ in range(2):
        assert again.look()
        assert (rig.serving, rig.ready()) == ({"kubectl": good}, True)
    assert "kubectl" in rig.told.refused
    better = rig.publish(strength=2.0)
    assert again.look() and rig.serving == {"kubectl": better} and bad != better


def test_a_refused_promotion_does_not_make_the_replica_forget_what_it_serves(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = rig.publish(strength=1.0)
    rig.sidecar.look()
    rig.publish(strength=0.0, recorded=1.5)
    rig.sidecar.look()
    break_store(rig, monkeypatch)
    assert restart(rig).look()
    assert rig.serving == {"kubectl": good}


def test_a_version_that_can_be_seen_but_not_fetched_leaves_the_last_one_serving(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = rig.publish(strength=1.0)
    rig.sidecar.look()
    new = rig.publish(strength=2.0)

    def fail(*_: Any) -> None:
        raise StoreError("data endpoint: 503")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "pull", fail)
        assert restart(rig).look()
        assert (rig.serving, rig.ready()) == ({"kubectl": old}, True)
        rig.clock.now += 10
        assert rig.metric("drydock_registry_unreachable_seconds ") == ["drydock_registry_unreachable_seconds 0.0"]
    rig.sidecar.look()
    assert rig.serving == {"kubectl": new}


def damage_a_byte(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte changed": damage_a_byte,
    "a file is gone": lambda folder: (folder / "canaries.json").unlink(),
    "a file more": lambda folder: (folder / "more.txt").touch(),
    "never written down": lambda folder: (folder.parent / "kept.json").unlink(),
    "the record is damaged": lambda folder: (folder.parent / "kept.json").write_text('{"served": ['),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_files_that_are_not_those_that_were_fetched_are_not_loaded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    digest = rig.publish()
    rig.sidecar.look()
    damage(rig.state / "cache" / name(digest))
    with monkeypatch.context() as patch:
        break_store(rig, patch)
        assert not restart(rig).look()
        assert (rig.serving, rig.ready()) == ({}, False)
        assert rig.calls("load") == []
    assert rig.sidecar.look()
    assert rig.serving == {"kubectl": digest}


def test_an_engine_too_busy_for_canaries_in_an_outage_does_not_refuse_for_good(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version is loaded by then: to load it once more would be an error, and final."""
    digest = rig.publish("triage")
    rig.sidecar.look()
    find = rig.store.find

    def first_fails(target: str, tag: str) -> str | None:
        if target == repository("kubectl"):
            raise StoreError("registry: 503")
        return find(target, tag)

    monkeypatch.setattr(rig.store, "find", first_fails)
    restart(rig)
    with monkeypatch.context() as patch:
        make_busy(rig, patch)
        assert not rig.sidecar.look()
    assert rig.sidecar.look()
    assert (rig.serving, rig.told.refused) == ({"triage": digest}, {})


# Odd states.


def test_a_sidecar_that_died_before_unloading_leaves_nothing_behind(rig: Rig) -> None:
    old = rig.publish(strength=1.0)
    rig.sidecar.look()
    new = rig.publish(strength=2.0)
    rig.sidecar.look()
    (rig.state / "cache" / ".pull-half").mkdir()
    again = rig.make("kubectl", "triage")
    again.look()
    assert name(old) in rig.engine.strengths, "requests under way may need it"
    rig.clock.now += 31
    again.look()
    assert rig.engine.strengths.keys() == {"base", name(new)}
    assert {path.name for path in (rig.state / "cache").iterdir()} == {"kept.json", name(new)}


def test_a_sidecar_that_died_between_load_and_proof_proves_what_is_loaded(rig: Rig) -> None:
    digest = rig.publish()
    rig.engine.strengths[name(digest)] = 1.0
    rig.sidecar.look()
    assert rig.serving == {"kubectl": digest}
    rig.clock.now += 60
    rig.sidecar.look()
    assert name(digest) in rig.engine.strengths


def test_names_that_are_no_versions_of_ours_are_left_alone(rig: Rig) -> None:
    rig.engine.strengths |= {"elsewhere.12345678": 1.0, "plain": 1.0}
    rig.sidecar.look()
    rig.clock.now += 60
    rig.sidecar.look()
    assert rig.engine.strengths.keys() == {"base", "elsewhere.12345678", "plain"}


def test_a_tag_that_flaps_is_followed_with_one_load_a_version_and_both_stay_loaded(rig: Rig) -> None:
    one = rig.publish(strength=1.0)
    rig.sidecar.look()
    two = rig.publish(strength=2.0)
    rig.calls()
    for turn in range(20):
        rig.promote((two, one)[turn % 2])
        rig.clock.now += 20
        assert rig.sidecar.look()
        assert rig.serving == {"kubectl": (two, one)[turn % 2]}
        assert rig.ready()
    assert rig.calls("load", "unload") == [f"load {name(two)}"], "neither stopped answering for 30 s"
    rig.clock.now += 31
    rig.sidecar.look()
    assert rig.engine.strengths.keys() == {"base", name(one)}
    assert len(rig.metric("drydock_adapter_serving{")) == 1


def test_an_adapter_says_what_it_was_tuned_on_and_how_it_was_judged(rig: Rig) -> None:
    reports = {
        "spec.json": {"base_model": "/models/llama-3.1-8b"},
        "tuning.json": {"base_revision": "sha256:ab"},
        "evaluation.json": {"metric": "exact_match", "base": 0.25, "adapter": 1, "gain": 0.75},
    }
    rig.publish(reports=reports)
    rig.publish("triage", 2.0, reports={"evaluation.json": {"metric": 7, "base": None, "adapter": "0.5"}})
    rig.sidecar.look()
    served = rig.told.aliases["kubectl"]
    assert (served.base, served.metric) == ("llama-3.1-8b@sha256:ab", "exact_match")
    assert (served.score, served.base_score) == (1.0, 0.25)
    odd = rig.told.aliases["triage"]
    rig.publish("triage", 3.0, reports={"evaluation.json": {"metric": "m", "base": 10**400, "adapter": -1e10}})
    rig.sidecar.look()
    assert (rig.told.aliases["triage"].score, rig.told.aliases["triage"].base_score) == (None, None)
    assert (odd.base, odd.metric, odd.score, odd.base_score) == (None, None, None, None)


def test_the_word_of_an_older_sidecar_is_understood() -> None:
    said = {"boot": "b", "ready": True, "aliases": {"kubectl": {
        "version": "12345678", "digest": "sha256:12345678", "parity_difference": 0.0, "since": 1.0}}}  # fmt: skip
    assert Aliases.model_validate(said).aliases["kubectl"].base is None
