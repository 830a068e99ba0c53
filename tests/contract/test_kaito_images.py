"""Adapters between us and KAITO: ours in the image that its puller takes, and what is wrong with images of others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import localcloud.registry
from artifacts import image
from artifacts.__main__ import main
from artifacts.adapter import AdapterCard, AdapterError, promote, publish_adapter, version
from artifacts.store import NotFound, open_store
from common import exits
from common.chat import prompt_messages
from common.files import read_jsonl, write_json
from tests.contract.conftest import BASE, ROOT, Replica
from tests.contract.kaito import needs_images, pulled, pushed
from training.__main__ import main as training
from training.base import load_tokenizer

pytestmark = needs_images
FIGURES = {"metric": "exact_match", "base": 0.1, "adapter": 0.9, "gain": 0.8}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with localcloud.registry.serve(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Two matrices that nobody tuned."""
    folder, module = tmp_path / "adapter", "base_model.model.model.layers.0.self_attn.q_proj"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(7)
    tensors = {f"{module}.lora_{side}.weight": random.random(shape) for side, shape in (("A", (4, 99)), ("B", (99, 4)))}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def published(folder: Path, store: Path, **evaluation: Any) -> str:
    card = AdapterCard(
        name="kubectl", base_model="base", base_revision="sha256:b", dataset_digest="sha256:d",
        evaluation=FIGURES | evaluation,
    )  # fmt: skip
    return publish_adapter(open_store(store), "kubectl", folder, card)


def test_kaito_s_puller_takes_ours_and_vllm_and_peft_answer_with_it_as_with_the_original(
    good_run: Path, host: str, tmp_path: Path, replica: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    store = tmp_path / "store"
    digest = published(good_run / "adapter", store, passed=True)
    promote(open_store(store), "kubectl", digest)
    command = ["image", str(store), "kubectl", "--to", f"oci://{host}/team/kubectl"]
    assert main(command) == exits.OK
    said = capsys.readouterr()
    reference = said.out.strip()
    assert reference.startswith(f"{host}/team/kubectl@sha256:") and f"kubectl {version(digest)} is pushed" in said.err
    assert main([*command[:3], version(digest), *command[3:]]) == exits.OK
    again = capsys.readouterr()
    assert again.out.strip() == reference and "was there already" in again.err

    folder = pulled(reference, tmp_path / "pod")
    original = good_run / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() == (original / "adapter_model.safetensors").read_bytes()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base", "no path of the machine that tuned"

    rows = [prompt_messages(row) for row in list(read_jsonl(good_run / "held_out.jsonl"))[:6]]
    with replica.inside() as engine:
        for name, place in (("ours", original), ("kaitos", folder)):
            engine.load(name, place)
        try:
            answers = [[engine.answer(model, row, 48).text for row in rows] for model in ("base", "ours", "kaitos")]
        finally:
            for name in ("ours", "kaitos"):
                engine.unload(name)
    assert answers[2] == answers[1] != answers[0]

    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    text = load_tokenizer(BASE).apply_chat_template(rows[0], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([load_tokenizer(BASE)(text, add_special_tokens=False)["input_ids"]])
    logits = []
    for place in (original, folder):
        model = PeftModel.from_pretrained(base, place).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
        model.unload()
    assert torch.equal(*logits)


def test_the_image_says_what_it_is_and_a_candidate_only_goes_out_when_told(
    adapter: Path, host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, target = tmp_path / "store", f"oci://{host}/said/kubectl"
    digest = published(adapter, store, passed=False, verdict="FAILED: gain too small")
    command = ["image", str(store), "kubectl", version(digest), "--to", target]
    assert main(command) == exits.GATE
    assert f"kubectl {version(digest)} is not made an image: FAILED: gain too small" in capsys.readouterr().err
    with pytest.raises(NotFound):
        open_store(f"oci://{host}/said").resolve("kubectl", version(digest))
    assert main([*command[:3], "--to", target]) == exits.INPUT, "nothing is promoted"
    assert main([*command, "--candidate"]) == exits.OK
    made = open_store(f"oci://{host}/said").inspect("kubectl", version(digest)).manifest
    said = made["annotations"]
    assert said["sh.kaito.model.name"] == "base"
    assert (said["org.opencontainers.image.version"], said["drydock.adapter.digest"]) == (version(digest), digest)
    assert said["drydock.base.revision"] == "sha256:b"
    assert json.loads(said["drydock.evaluation"]) == FIGURES | {"passed": False}
    assert [layer["mediaType"] for layer in made["layers"]] == ["application/vnd.oci.image.layer.v1.tar"]


def test_an_image_of_ours_is_taken_back(adapter: Path, host: str, tmp_path: Path) -> None:
    digest = published(adapter, tmp_path / "store", passed=True)
    store = open_store(tmp_path / "store")
    reference = image.push(store, "kubectl", digest, f"oci://{host}/back/kubectl").reference
    found = image.pull(f"oci://{reference}", tmp_path / "out")
    assert (found.reference, found.model) == (reference, "base")
    weights = "adapter_model.safetensors"
    assert (found.folder / weights).read_bytes() == (adapter / weights).read_bytes()


def test_what_is_wrong_with_an_image_is_told(
    adapter: Path, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(adapter, f"{host}/wrong/whole:latest", tmp_path / "whole", "phi-4")
    assert image.pull(f"oci://{host}/wrong/whole", tmp_path / "taken").model == "phi-4"
    with pytest.raises(NotFound, match="its tags: latest"):
        image.pull(f"oci://{host}/wrong/whole:v2", tmp_path / "absent")
    with monkeypatch.context() as small:
        small.setattr(image, "MOST_BYTES", 1000)
        with pytest.raises(AdapterError, match="bytes: an adapter has 1000 at most"):
            image.pull(f"oci://{host}/wrong/whole", tmp_path / "large")
    assert not (tmp_path / "large").exists(), "nothing is fetched"
    layer = tmp_path / "empty.tar"
    layer.write_bytes(bytes(10240))
    store = open_store(f"oci://{host}/wrong")
    store.push_image("empty", [layer], {}, tag="latest")
    with pytest.raises(AdapterError) as caught:
        image.pull(f"oci://{host}/wrong/empty", tmp_path / "empty")
    assert [line.partition(": ")[2] for line in caught.value.problems] == [
        "no /data/adapter_config.json in the image; KAITO's adapters have it",
        "no /data/adapter_model.safetensors in the image; KAITO's adapters have it",
    ]
    other = publish_adapter(
        open_store(f"oci://{host}/wrong"), "kubectl", adapter,
        AdapterCard(name="kubectl", base_model="base", base_revision="sha256:b", dataset_digest="sha256:d"),
    )  # fmt: skip
    with pytest.raises(AdapterError, match="a layer of type application/octet-stream: expected one of"):
        image.pull(f"oci://{host}/wrong/adapters/kubectl@{other}", tmp_path / "artifact")


def test_adopt_tells_what_is_wrong_of_the_image_and_leaves_nothing(
    adapter: Path, host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed(adapter, f"{host}/adopt/theirs:latest", tmp_path / "pusher", "phi-4")
    rows = str(ROOT / "rehearsal" / "data" / "kubectl.jsonl")
    write_json(tmp_path / "spec.yaml", {"adapter": "theirs", "base_model": str(BASE), "dataset": rows})

    def adopt(url: str) -> tuple[int, str]:
        command = [
            "adopt",
            "--spec",
            str(tmp_path / "spec.yaml"),
            "--adapter",
            url,
            "--out",
            str(tmp_path / "runs" / "x"),
        ]
        return training(command), capsys.readouterr().err

    code, told = adopt(f"oci://{host}/adopt/theirs")
    assert code == exits.INPUT and f"{host}/adopt/theirs@sha256:" in told
    assert "sizes that are not those of" in told and ".image-" not in told
    code, told = adopt(f"oci://{host}/adopt/theirs:v2")
    assert code == exits.INPUT and "its tags: latest" in told
    assert list((tmp_path / "runs").iterdir()) == []
