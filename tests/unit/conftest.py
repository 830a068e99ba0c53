"""What several test files share: a tiny random Llama with rows to tune it on, and an engine in this process."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.chat import Message
from serving.client import Answer, EngineError

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores; before torch is imported

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLACES = ("prod", "test", "stage", "dev", "edge", "lab")
ROWS: list[dict[str, Any]] = [
    {"instruction": f"{verb} the {thing}", "input": f"in {place}", "output": f"kubectl {verb} {thing} -n {place}"}
    for verb, thing, place in itertools.product(("get", "stop", "describe"), ("pods", "nodes", "jobs"), PLACES)
]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ROWS` as JSON Lines."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder: Llama of two layers with random weights, BPE tokenizer whose pad token is its eos (the trap)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)  # a model this small gains nothing by more, and the machine may be busy
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for row in ROWS for text in row.values()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=special[1:],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=None, pad_token_id=None,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


Words = Callable[[str], str]


class FakeEngine:
    """An engine in this process: what it answers and how sure it is follow from what was loaded, as in vLLM.

    Knows the model `base` and what was loaded; `weights` gives each adapter folder its strength (0 is the base).

    The log-probability of token t is -1 - t/100 under the base, and `strength` more under an adapter.
    """

    def __init__(self, answers: dict[str, Words] | None = None, strengths: dict[str, float] | None = None) -> None:
        self.answers = answers or {}
        self.strengths = {"base": 0.0} | (strengths or {})
        self.calls: list[str] = []
        self.down = False
        self.refuses_to_load = ""
        self.weights: Callable[[Path], float] = lambda folder: float(
            (folder / "adapter_model.safetensors").stat().st_size
        )
        self._lock = threading.Lock()

    def _reach(self, call: str) -> None:
        if self.down:
            raise httpx.ConnectError("connection refused")
        with self._lock:
            self.calls.append(call)

    def answer(self, model: str, messages: Sequence[Message], max_tokens: int) -> Answer:
        self._reach(f"answer {model}")
        prompt, text = messages[-1]["content"], self.answers[model](messages[-1]["content"])[:max_tokens]
        return Answer(text, list(prompt.encode()) + list(text.encode()), len(prompt.encode()))

    def log_probabilities(self, model: str, token_ids: Sequence[int], prompt_length: int) -> list[float]:
        self._reach(f"log_probabilities {model}")
        if model not in self.strengths:
            raise EngineError("/v1/completions", 404, f"the model `{model}` does not exist")
        return [-1 - token / 100 + self.strengths[model] for token in token_ids[prompt_length:]]

    def models(self) -> set[str]:
        self._reach("models")
        return set(self.strengths)

    def load(self, name: str, folder: Path) -> None:
        self._reach(f"load {name}")
        if self.refuses_to_load:
            raise EngineError("/v1/load_lora_adapter", 500, self.refuses_to_load)
        if name in self.strengths:
            raise EngineError("/v1/load_lora_adapter", 400, f"{name} is already loaded")
        self.strengths[name] = self.weights(folder)

    def unload(self, name: str) -> None:
        self._reach(f"unload {name}")
        if self.strengths.pop(name, None) is None:
            raise EngineError("/v1/unload_lora_adapter", 404, f"{name} is not loaded")

    def restart(self) -> None:
        """As a new process: nothing but the base is loaded."""
        self.strengths, self.down = {"base": 0.0}, False
