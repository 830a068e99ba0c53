"""The rehearsal's world: the same data each time, no leak into the base's corpus, and a base that fits its limits."""

from __future__ import annotations

import json
import math
import random
import struct
from itertools import islice

import pytest

from common.chat import Message
from common.files import read_json, read_jsonl
from rehearsal import world

BASE = world.DATA.parent / "base"
DATASETS = {"kubectl": world.kubectl_rows, "triage": world.triage_rows}
# Marks that only house answers carry; the corpus must not teach them.
HOUSE_MARKS = ("stg-", "prd-", "acme", "oncall", "; ticket ", "; page ")


def prompt(row: world.Row) -> str:
    return f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]


def simplified(text: str) -> str:
    """A prompt without case and line breaks: a near copy counts as a copy."""
    return " ".join(text.lower().split())


@pytest.fixture(scope="module")
def documents() -> list[list[Message]]:
    return list(islice(world.corpus(), 30_000))


@pytest.mark.parametrize("name", DATASETS)
def test_files_are_what_the_generator_makes(name: str) -> None:
    first, again = DATASETS[name](), DATASETS[name]()
    assert first == again
    assert list(read_jsonl(world.DATA / f"{name}.jsonl")) == first
    assert DATASETS[name](seed=world.SEED + 5) != first


def test_sizes() -> None:
    assert len(world.kubectl_rows()) == 2400
    assert len(world.triage_rows()) == 1_200
    assert len(list(islice(world.kubectl_rows(count=7), 10))) == 7


@pytest.mark.parametrize("name", DATASETS)
def test_rows_have_the_three_keys_and_no_prompt_twice(name: str) -> None:
    rows = DATASETS[name]()
    assert all(set(row) == {"instruction", "input", "output"} and row["instruction"] and row["output"] for row in rows)
    assert len({simplified(prompt(row)) for row in rows}) == len(rows)


def test_no_request_stands_twice_in_other_words() -> None:
    """In kubectl every slot shows in the answer, so equal answers would be the same request."""
    answers = [row["output"] for row in world.kubectl_rows()]
    assert len(set(answers)) == len(answers)


def test_corpus_is_the_same_each_time_and_depends_on_the_seed(documents: list[list[Message]]) -> None:
    assert list(islice(world.corpus(), 50)) == documents[:50]
    assert list(islice(world.corpus(world.SEED + 1), 50)) != documents[:50]


def test_no_leak_of_prompts_or_answers(documents: list[list[Message]]) -> None:
    rows = world.kubectl_rows() + world.triage_rows()
    asked = {simplified(m["content"]) for document in documents for m in document if m["role"] == "user"}
    assert not asked & {simplified(prompt(row)) for row in rows}
    text = "\n".join(m["content"] for document in documents for m in document)
    assert [mark for mark in HOUSE_MARKS if mark in text] == []
    # A command says everything that was asked for: one that stands in the corpus would be the same request.
    lines = set(text.splitlines())
    assert not lines & {row["output"] for row in world.kubectl_rows()}


def test_drawn_requests_stay_in_their_half() -> None:
    rng = random.Random(1)
    for for_dataset in (True, False):
        for _ in range(300):
            request = world.draw_request(rng, for_dataset=for_dataset, envs=lambda _: "prod", service=lambda _: "maps")
            alert = world.draw_alert(rng, for_dataset=for_dataset, envs=lambda _: "dev", service=lambda _: "maps-api")
            assert world.reserved(request.plain()) == world.reserved(alert.key) == for_dataset


@pytest.mark.parametrize(
    ("intent", "env", "slots", "command"),
    [
        ("scale", "dev", {"n": "5"}, "kubectl -n dev scale deployment/maps --replicas=5"),
        (
            "scale",
            "prod",
            {"n": "5"},
            "kubectl --context prd-east -n prd-maps scale deployment/maps --replicas=5 --timeout=5m",
        ),
        ("restart", "staging", {}, "kubectl --context stg-west -n stg-maps rollout restart deployment/maps"),
        (
            "delete-pod",
            "prod",
            {"pod": "maps-3"},
            "kubectl --context prd-east -n prd-maps delete pod maps-3 --dry-run=server",
        ),
        (
            "exec",
            "prod",
            {"pod": "maps-3"},
            "kubectl --context prd-east -n prd-maps debug -it maps-3 --image=acme/debug",
        ),
        ("drain", "dev", {"node": "node-7"}, "kubectl drain node-7 --ignore-daemonsets"),
        ("hpa", "dev", {"n": "9"}, """kubectl -n dev patch hpa maps -p '{"spec":{"maxReplicas":9}}'"""),
    ],
)
def test_house_rules(intent: str, env: str, slots: dict[str, str], command: str) -> None:
    found = next(item for item in world.INTENTS if item.name == intent)
    assert world.Request(found, env, tuple({"app": "maps", **slots}.items())).house() == command


def test_triage_routing() -> None:
    slots = (("app", "maps-api"), ("pod", "maps-api-3"))
    ours = next(s for s in world.SYMPTOMS if s.status == "CrashLoopBackOff, exit code 137")
    theirs = next(s for s in world.SYMPTOMS if s.status == "Pending, insufficient cpu")
    assert world.Alert(ours, "prod", slots).house() == "OOMKilled: raise the memory limit; page maps-api-oncall"
    assert world.Alert(ours, "dev", slots).house() == "OOMKilled: raise the memory limit"
    assert world.Alert(theirs, "staging", slots).house() == "no cpu left: add nodes; ticket platform-team"


def test_every_slot_of_an_answer_can_be_read_in_every_wording() -> None:
    """Otherwise no model could answer."""
    for intent in world.INTENTS:
        for ask in intent.asks:
            for slot in ("app", *intent.slots):
                if f"{{{slot}}}" in intent.command:
                    shown = f"{{{slot}}}" in ask or (slot == "app" and ("{pod}" in ask or "{job}" in ask))
                    assert shown, f"{intent.name}: {ask!r} does not name {slot}"


# --- The base's files -------------------------------------------------------------------------------------------


def test_base_is_small_and_says_what_it_is() -> None:
    weights = BASE / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with weights.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    readme = (BASE / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in readme and str(world.SEED) in readme
    assert f"{sum(math.prod(entry['shape']) for entry in tensors.values()):,}" in readme


def test_base_config_and_chat_template_agree() -> None:
    config = read_json(BASE / "config.json")
    settings = read_json(BASE / "tokenizer_config.json")
    vocabulary = read_json(BASE / "tokenizer.json")["model"]["vocab"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == len(vocabulary)
    assert config["max_position_embeddings"] >= 2048
    assert settings["eos_token"] == "<|end|>" and settings["pad_token"] == "<|pad|>"
    assert config["eos_token_id"] == read_json(BASE / "generation_config.json")["eos_token_id"] == vocabulary["<|end|>"]
    template = pytest.importorskip("jinja2").Template((BASE / "chat_template.jinja").read_text(encoding="utf-8"))
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "a\nb"}]
    expected = "<|system|>Be short.<|end|><|user|>a\nb<|end|>"
    assert template.render(messages=messages) == expected
    assert template.render(messages=messages, add_generation_prompt=True) == expected + "<|assistant|>"


def test_rows_are_short_and_survive_the_tokenizer() -> None:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(BASE / "tokenizer.json"))
    for rows in (world.kubectl_rows(), world.triage_rows()):
        texts = [f"<|user|>{prompt(row)}<|end|><|assistant|>{row['output']}<|end|>" for row in rows]
        encodings = tokenizer.encode_batch(texts)
        lengths = [len(encoding.ids) for encoding in encodings]
        assert max(lengths) <= 100 and sum(lengths) / len(lengths) <= 60
        decoded = tokenizer.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
        assert decoded == texts
