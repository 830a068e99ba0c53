"""Turns rows into token ids and marks the tokens that the loss counts: the answer and its end of turn, no more."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from common.chat import Message, answer, prompt_messages
from common.settings import SettingsError
from training.dataset import Refused, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26)
"""What templates are told that ask for the day, and what Llama 3.2's says where it cannot: the same settings, data and
base shall give the same tokens on any day, one on which a run resumes among them. vLLM tells them the real one."""

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
    cannot be cut at the answer, or takes no such row.
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
    texts = [_prompt_and_answer(row, line, tokenizer) for line, row in rows]
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


def _prompt_and_answer(row: Row, line: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    try:
        return prompt_and_answer(row, tokenizer)
    except Refused as error:
        raise SettingsError([f"dataset: line {line}: {error}"]) from None


def prompt_and_answer(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """`row` as the base's chat template writes it, cut where the answer begins. Raises `Refused`."""
    messages = prompt_messages(row)
    prompt = _rendered(tokenizer, messages, add_generation_prompt=True)
    whole = _rendered(tokenizer, [*messages, {"role": "assistant", "content": answer(row)}])
    if not whole.startswith(prompt) or not whole[len(prompt) :].startswith(answer(row).strip()):
        raise Refused(
            "a row whose prompt or answer the base's chat template changes when the answer is added, so the loss "
            "cannot be limited to the answer",
            "one that it leaves as it is; or give the base a template that appends turns unchanged",
        )
    return prompt, whole[len(prompt) :]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, add_generation_prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, strftime_now=TODAY.strftime
        )
    except TemplateError as error:  # what a template says by raise_exception, too
        raise Refused(
            f"a row that the base's chat template refuses ({error})", "turns that it takes, or another template"
        ) from None
    return str(text)
