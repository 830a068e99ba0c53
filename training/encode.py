"""Turns rows into token ids and marks the tokens that the loss counts: the answer and its end of turn, no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.chat import answer, prompt_messages
from common.settings import SettingsError
from training.dataset import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1000
"""Rows that the tokenizer gets in one call: it spreads them over the cores."""


@dataclass(frozen=True)
class Example:
    """One encoded row: `ids` holds prompt then answer, the first `prompt_length` of them carry no loss."""

    line: int
    ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt_length


def encode(row: Row, line: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Encode `row` by the base's own chat template.

    Prompt and answer are tokenized apart, as at serving time, where the model gets the prompt's tokens alone: no
    token may span the border. The end-of-turn token is a part of the answer and is learnt; padding is never
    derived from it (the pad = eos trap: a model that never stops). Raises `SettingsError` when the template
    cannot be cut at the answer.
    """
    return _encode([(line, row)], tokenizer)[0]


def encode_all(
    rows: list[tuple[int, Row]], tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> tuple[list[Example], list[int]]:
    """`(examples, dropped lines)`: a row beyond `max_seq_length` tokens is dropped whole, never cut.

    Not cached between attempts: 10,000 rows of 44 tokens take about 2 s on two CPU cores.
    """
    examples, dropped = [], []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        for example in _encode(rows[first : first + ROWS_AT_ONCE], tokenizer):
            if len(example.ids) <= max_seq_length:
                examples.append(example)
            else:
                dropped.append(example.line)
    return examples, dropped


def _encode(rows: list[tuple[int, Row]], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    texts = [_prompt_and_answer(row, tokenizer) for _, row in rows]
    prompts, answers = (
        tokenizer([pair[side] for pair in texts], add_special_tokens=False)["input_ids"] for side in (0, 1)
    )
    end_tokens = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    end_tokens.add(int(tokenizer.eos_token_id))
    examples = []
    for (line, _), prompt_ids, answer_ids in zip(rows, prompts, answers, strict=True):
        ends = [position for position, token in enumerate(answer_ids) if token in end_tokens]
        if not ends:
            raise SettingsError(
                ["base_model: its chat template ends no assistant turn with the eos token or another special token; "
                 "the tuned model would never stop"]
            )  # fmt: skip
        answer_ids = answer_ids[: ends[-1] + 1]  # what some templates add after the turn is not the model's to say
        examples.append(Example(line, tuple(prompt_ids + answer_ids), len(prompt_ids)))
    return examples


def _prompt_and_answer(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    messages = prompt_messages(row)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer(row)}], tokenize=False)
    if not whole.startswith(prompt) or not whole[len(prompt) :].startswith(answer(row).strip()):
        raise SettingsError(
            ["base_model: its chat template changes the prompt or the answer when the answer is added, so the loss "
             "cannot be limited to the answer; use a template that appends turns unchanged"]
        )  # fmt: skip
    return prompt, whole[len(prompt) :]
