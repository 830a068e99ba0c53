"""The base model seen from tuning: where it is, its revision, its tokenizer and chat template."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import tensors
from common.files import tree_digest
from common.settings import SettingsError
from training.dataset import Limits, Row
from training.encode import prompt_and_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS, INDEX = "*.safetensors", "model.safetensors.index.json"
EMBEDDINGS = "embed_tokens.weight"

ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "Phi3ForCausalLM", "GemmaForCausalLM", "GraniteForCausalLM",
)  # fmt: skip
"""What can be tuned and served, in the words of config.json: its attention is plain softmax, with or without a sliding
window, so that packed rows stay apart (training.packing passes over soft caps and sinks, and recurrent layers would
carry one row into the next), and vLLM 0.32 serves LoRA on it. tests/contract/test_peers.py holds both against it."""


def base_folder(name: str) -> Path:
    """The folder of base model `name`. Raises `SettingsError` with every reason why it cannot be tuned on."""
    if problems := folder_problems(name):
        raise SettingsError(problems)
    return Path(name)


def folder_problems(name: str) -> list[str]:
    """What the files of base `name` show against it: the headers of the weights are read, not the weights."""
    folder = Path(name)
    if not folder.is_dir():
        return [f"base_model: {name}: no such folder; give the folder that holds config.json"]
    missing = [
        what
        for what, found in {
            "config.json": (folder / "config.json").is_file(),
            f"weights ({WEIGHTS})": any(folder.glob(WEIGHTS)),
            "tokenizer.json": (folder / "tokenizer.json").is_file(),
        }.items()
        if not found
    ]
    found = [f"lacks {', '.join(missing)}"] if missing else []
    if absent := [file for file in _indexed(folder) if not (folder / file).is_file()]:
        found.append(f"lacks {_some(absent)} of the weights, which {INDEX} names; fetch the base again")
    if (folder / "config.json").is_file():
        found += _config_problems(folder)
    return [f"base_model: {name}: {problem}" for problem in found]


def _config_problems(folder: Path) -> list[str]:
    try:
        config = base_config(folder)
    except ValueError as error:
        return [f"config.json is not JSON ({error}); fetch the base again"]
    found = []
    architectures = config.get("architectures") or []
    if not set(architectures) & set(ARCHITECTURES):
        found.append(
            f"is a {', '.join(map(str, architectures)) or 'model that names no architecture'}; what can be tuned and "
            f"served here are {', '.join(ARCHITECTURES)}"
        )
    if quantised := config.get("quantization_config"):
        found.append(
            f"is quantised itself ({quantised.get('quant_method', 'by an unknown method')}); give the base that it "
            "was made from, and load_in_4bit: true where memory is short"
        )
    try:
        rows = next((shape[0] for name, shape in base_shapes(folder).items() if name.endswith(EMBEDDINGS)), None)
    except ValueError as error:
        return [*found, str(error)]
    if rows is not None and rows < int(config.get("vocab_size", rows)):
        found.append(
            f"its embeddings have {rows} rows, config.json says vocab_size {config['vocab_size']}; fetch the base again"
        )
    return found


def base_config(folder: Path) -> dict[str, Any]:
    """The base's config.json. Raises ValueError when it is no JSON object."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("no object")
    return config


def base_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the base by its name, from its files' headers; ValueError for a damaged file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in [folder / name for name in _indexed(folder)] or sorted(folder.glob(WEIGHTS)):
        if not path.is_file():
            continue  # told by name in `folder_problems`
        try:
            shapes |= tensors.shapes(path)
        except ValueError as error:
            raise ValueError(f"{path.name} is {error}; fetch the base again") from None
    return shapes


def _indexed(folder: Path) -> list[str]:
    """The files that the base's index names; none where it has no readable index, as a base of one file."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def base_revision(folder: Path) -> str:
    """`sha256:<hex>` over every file of the base: weights, configuration, tokenizer, chat template."""
    return tree_digest(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer. Raises `SettingsError` when it cannot render a chat, end a turn, or fits no such model.

    Asked again for the same files it gives the same object: a run's start needs it three times, and a large one takes
    a second to load.
    """
    files = sorted(path for path in folder.iterdir() if not path.match(WEIGHTS))
    return _load_tokenizer(folder, tuple((path.name, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, files: tuple[tuple[str, int], ...]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds: its files are read by several libraries
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SettingsError(
            [f"base_model: {folder}: its tokenizer cannot be read ({said}); fetch the base again"]
        ) from error
    problems = []
    if not tokenizer.chat_template:
        problems.append(f"base_model: {folder}: no chat template; use an instruct model, or add chat_template.jinja")
    if tokenizer.eos_token_id is None:
        problems.append(f"base_model: {folder}: the tokenizer names no eos_token, so an answer could never end")
    vocabulary = base_config(folder).get("vocab_size", len(tokenizer))
    if len(tokenizer) > vocabulary:
        problems.append(
            f"base_model: {folder}: the tokenizer has {len(tokenizer)} tokens and the model {vocabulary}; give the "
            "base's own tokenizer (vLLM serves no adapter with resized embeddings)"
        )
    if problems:
        raise SettingsError(problems)
    return tokenizer


def base_limits(name: str, max_seq_length: int) -> Limits:
    """What a row may be for base `name`."""
    tokenizer = load_tokenizer(base_folder(name))

    def render(row: Row) -> str:
        return prompt_and_answer(row, tokenizer)[0]

    def count(prompt: str) -> int:
        return len(tokenizer(prompt, add_special_tokens=False)["input_ids"])

    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return Limits(max_seq_length, render, count, special)
