"""The base model seen from tuning: where it is, its revision, its tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.chat import Message
from common.files import tree_digest
from common.settings import SettingsError
from training.dataset import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = "*.safetensors"


def base_folder(name: str) -> Path:
    """The folder of base model `name`. Raises `SettingsError` when it is not a complete model folder."""
    folder = Path(name)
    if not folder.is_dir():
        raise SettingsError([f"base_model: {name}: no such folder; give the folder that holds config.json"])
    missing = [
        what
        for what, found in {
            "config.json": (folder / "config.json").is_file(),
            f"weights ({WEIGHTS})": any(folder.glob(WEIGHTS)),
            "tokenizer.json": (folder / "tokenizer.json").is_file(),
        }.items()
        if not found
    ]
    if missing:
        raise SettingsError([f"base_model: {name}: lacks {', '.join(missing)}"])
    return folder


def base_revision(folder: Path) -> str:
    """`sha256:<hex>` over every file of the base: weights, configuration, tokenizer, chat template."""
    return tree_digest(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer. Raises `SettingsError` when it cannot render a chat or end a turn."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    problems = []
    if not tokenizer.chat_template:
        problems.append(f"base_model: {folder}: no chat template; use an instruct model, or add chat_template.jinja")
    if tokenizer.eos_token_id is None:
        problems.append(f"base_model: {folder}: the tokenizer names no eos_token, so an answer could never end")
    if problems:
        raise SettingsError(problems)
    return tokenizer


def base_limits(name: str | None, max_seq_length: int) -> Limits:
    """What a row may be for base `name`; with no base, only what can be told without a tokenizer."""
    if name is None:
        return Limits(max_seq_length)
    tokenizer = load_tokenizer(base_folder(name))

    def count(messages: list[Message]) -> int:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return Limits(max_seq_length, count, special)
