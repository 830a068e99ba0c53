"""Adapters as artifacts: what publish refuses, the promotion gate, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifacts.__main__ import main
from artifacts.adapter import (
    AdapterCard,
    AdapterError,
    NotProven,
    check_adapter,
    check_name,
    fetch_adapter,
    promote,
    promoted_digest,
    publish_adapter,
    read_card,
    version,
)
from artifacts.store import NotFound, Store, open_store
from common import exits

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
PASSED = {"metric": "exact_match", "base": 0.25, "adapter": 0.75, "gain": 0.5, "passed": True}
FAILED = PASSED | {"adapter": 0.25, "gain": 0.0, "passed": False, "verdict": "gain 0.000 is below 0.050"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _adapter(tmp_path / "adapter")


def _tensors(rank: int = 4, prefix: str = PREFIX) -> dict[str, Any]:
    return {
        f"{prefix}.lora_A.weight": np.ones((rank, 16), np.float32),
        f"{prefix}.lora_B.weight": np.ones((8, rank), np.float32),
    }


def _adapter(folder: Path, tensors: dict[str, Any] | None = None, **settings: Any) -> Path:
    """What PEFT's save_pretrained leaves behind, with `settings` changed."""
    folder.mkdir()
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    plain |= {"use_dora": False, "modules_to_save": None, "init_lora_weights": True, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(plain | settings))
    save_file(_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def _card(name: str = "kubectl", **values: Any) -> AdapterCard:
    base: dict[str, Any] = {"base_model": "tiny", "base_revision": "sha256:b", "dataset_digest": "sha256:d"}
    return AdapterCard(name=name, **base | {"evaluation": PASSED} | values)


def test_publish_then_fetch(store: Store, folder: Path, tmp_path: Path) -> None:
    reports = tmp_path / "run"
    reports.mkdir()
    (reports / "evaluation.json").write_text('{"from": "run"}')
    (folder / "evaluation.json").write_text('{"from": "adapter"}')
    (folder / "README.md").write_text("# kubectl")
    (folder / "optimizer.pt").write_text("not for serving")
    digest = publish_adapter(store, "kubectl", folder, _card(tuning={"lora_r": 4}), reports)
    assert store.tags("adapters/kubectl") == {version(digest): digest}
    assert promoted_digest(store, "kubectl") is None

    fetched = fetch_adapter(store, "kubectl", version(digest), tmp_path / "out")
    assert (fetched.name, fetched.version, fetched.digest) == ("kubectl", digest[7:15], digest)
    assert fetched.card == _card(tuning={"lora_r": 4}, lora_rank=4, vllm_max_lora_rank=8)
    assert sorted(path.name for path in fetched.folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "evaluation.json",
    ]
    assert (fetched.folder / "evaluation.json").read_text() == '{"from": "run"}'
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (fetched.folder / name).read_bytes() == (folder / name).read_bytes()


def test_publishing_twice_is_one_version(store: Store, folder: Path, tmp_path: Path) -> None:
    first = publish_adapter(store, "kubectl", folder, _card())
    assert publish_adapter(store, "kubectl", folder, _card()) == first
    assert publish_adapter(open_store(tmp_path / "elsewhere"), "kubectl", folder, _card()) == first
    assert publish_adapter(store, "kubectl", folder, _card(dataset_digest="sha256:e")) != first


def test_the_card_keeps_figures_not_samples() -> None:
    card = _card(evaluation=PASSED | {"samples": [{"prompt": "p"}]})
    assert card.evaluation == PASSED
    assert AdapterCard.model_validate_json(card.model_dump_json()[:-1] + ',"later": 1}') == card


def test_a_plain_adapter_has_no_problems(folder: Path) -> None:
    assert check_adapter(folder) == []


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"lora_bias": False}])
def test_what_vllm_serves_is_not_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert check_adapter(_adapter(tmp_path / "a", **settings)) == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "use_dora is True, which vLLM does not serve: tune with use_dora=False"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"r": 513}, "r is 513; vLLM takes a rank from 1 to 512"),
        ({"r": "4"}, "r is '4'"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank_pattern.q_proj is 1024"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"target_modules": None}, "target_modules"),
    ],
)
def test_settings_that_vllm_refuses(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    (problem,) = check_adapter(_adapter(tmp_path / "a", **settings))
    assert told in problem
    assert str(tmp_path / "a" / "adapter_config.json") in problem


_ONE = np.ones((4, 4), np.float32)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({**_tensors(), "base_model.model.lm_head.base_layer.weight": _ONE}, "the base's embeddings"),
        ({**_tensors(), "base_model.model.model.embed_tokens.weight": _ONE}, "save_embedding_layers=False"),
        (_tensors(prefix="model.layers.0.self_attn.q_proj"), "no plain LoRA"),
        ({**_tensors(), f"{PREFIX}.lora_magnitude_vector": _ONE}, "lora_magnitude_vector"),
        ({f"{PREFIX}.lora_A.weight": _ONE}, "lora_A or lora_B is missing"),
        (_tensors(rank=8), "expected (4, in) and (out, 4)"),
        ({}, "holds no tensors"),
    ],
)
def test_weights_that_vllm_refuses_or_misreads(tmp_path: Path, tensors: dict[str, Any], told: str) -> None:
    (problem,) = check_adapter(_adapter(tmp_path / "a", tensors))
    assert told in problem


def test_embedding_lora_is_served(tmp_path: Path) -> None:
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    more = {f"{embedding}A": np.ones((4, 32), np.float32), f"{embedding}B": np.ones((16, 4), np.float32)}
    assert check_adapter(_adapter(tmp_path / "a", _tensors() | more)) == []


def test_all_problems_are_told_together(store: Store, tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "a", use_dora=True, bias="all")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError) as caught:
        publish_adapter(store, "kubectl", folder, _card("other"))
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert all(part in text for part in ("use_dora", "bias", "safe_serialization=True", "'other'"))
    assert not Path(store.url).exists()


def test_broken_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert len(check_adapter(tmp_path / "a")) == 2
    folder = _adapter(tmp_path / "b")
    (folder / "adapter_config.json").write_text('{"r": 4')
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    config, whole = check_adapter(folder)
    assert "not JSON" in config
    assert "not a whole safetensors file" in whole


@pytest.mark.parametrize("name", ["", "Kubectl", "a_b", "-a", "a-", "a.b", "../a", "a" * 41, "a/b", "a\n"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="adapter name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "kubectl", "triage-2", "a" * 40])
def test_names_that_are_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("evaluation", [{}, FAILED, {"passed": "true"}])
def test_only_what_passed_is_promoted(store: Store, folder: Path, evaluation: dict[str, Any]) -> None:
    good = publish_adapter(store, "kubectl", folder, _card())
    promote(store, "kubectl", good)
    bad = publish_adapter(store, "kubectl", folder, _card(evaluation=evaluation))
    with pytest.raises(NotProven, match=version(bad)):
        promote(store, "kubectl", bad)
    assert promoted_digest(store, "kubectl") == good


def test_something_else_is_no_adapter(store: Store, folder: Path, tmp_path: Path) -> None:
    files = {"adapter_config.json": folder / "adapter_config.json"}
    store.push("adapters/kubectl", files, b"{}", "application/vnd.other", tag="other")
    kind = "application/vnd.drydock.adapter.v1+json"
    store.push("adapters/kubectl", files, _card().model_dump(), kind, tag="half")
    whole = files | {"adapter_model.safetensors": folder / "adapter_model.safetensors"}
    store.push("adapters/kubectl", whole, _card("triage").model_dump(), kind, tag="renamed")
    store.push("adapters/kubectl", whole, b"{}", kind, tag="cardless")
    said = {
        "other": "expected an adapter",
        "half": "lacks adapter_model",
        "renamed": "'triage'",
        "cardless": "card",
    }
    for tag, text in said.items():
        with pytest.raises(AdapterError, match=text):
            fetch_adapter(store, "kubectl", tag, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(store: Store, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", store.url]) == exits.INPUT
    assert "no such folder" in capsys.readouterr().err
    old = publish_adapter(store, "kubectl", folder, _card())
    new = publish_adapter(store, "kubectl", folder, _card(dataset_digest="sha256:e"))
    bad = publish_adapter(store, "kubectl", folder, _card(evaluation=FAILED))

    assert main(["promote", store.url, "kubectl", version(old)]) == exits.OK
    assert "its first" in capsys.readouterr().out
    assert main(["promote", store.url, "kubectl", version(new)]) == exits.OK
    out = capsys.readouterr().out
    assert f"in place of {version(old)}" in out
    rollback = out.split("to go back: python -m artifacts ")[1].split()
    assert main(rollback) == exits.OK
    assert promoted_digest(store, "kubectl") == old

    assert main(["promote", store.url, "kubectl", version(bad)]) == exits.GATE
    assert "gain 0.000 is below 0.050" in capsys.readouterr().err
    assert main(["promote", store.url, "kubectl", "00000000"]) == exits.INPUT
    assert version(old) in capsys.readouterr().err
    assert promoted_digest(store, "kubectl") == old

    assert main(["list", store.url]) == exits.OK
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:7] == [
        "kubectl",
        version(old),
        "promoted",
        "exact_match",
        "0.250",
        "0.750",
        "0.500",
    ]
    assert any(version(bad) in line and "failed" in line for line in lines)

    for adapter in ("kubectl", f"kubectl:{version(old)}", f"kubectl@{old}"):
        assert main(["show", store.url, adapter]) == exits.OK
        shown = json.loads(capsys.readouterr().out)
        assert (shown["digest"], shown["tags"]) == (old, sorted([version(old), "promoted"]))
        assert AdapterCard.model_validate(shown["card"]) == read_card(store, "kubectl", old)[1]
        assert shown["files_bytes"]["adapter_model.safetensors"] > 0
    assert main(["show", store.url, "Kubectl"]) == exits.INPUT


def test_promoting_the_unknown(store: Store) -> None:
    with pytest.raises(NotFound, match="adapters/kubectl"):
        promote(store, "kubectl", "12345678")
