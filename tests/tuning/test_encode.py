"""What the loss counts: the answer and its end of turn, nothing else, with the base's own chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.chat import answer
from common.files import write_jsonl
from common.settings import SettingsError
from tests.unit.conftest import ROWS, TEMPLATE
from training.base import base_limits, load_tokenizer
from training.dataset import Checked, Problem, read
from training.encode import encode, encode_all

CHAT = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "get the pods"},
        {"role": "assistant", "content": "which?"},
        {"role": "user", "content": "in prod"},
        {"role": "assistant", "content": "kubectl get pods -n prod"},
    ]
}


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(tiny_base)


@pytest.fixture
def with_template(tiny_base: Path, tmp_path: Path) -> Any:
    def make(template: str | None) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_base, folder)
        path = folder / "chat_template.jinja"
        assert path.is_file()
        if template is None:
            path.unlink()
        else:
            path.write_text(template)
        return folder

    return make


@pytest.mark.parametrize("row", [ROWS[0], ROWS[7] | {"input": ""}, CHAT])
def test_the_loss_counts_the_answer_and_its_end_of_turn_and_nothing_else(tokenizer: Any, row: dict[str, Any]) -> None:
    example = encode(row, 5, tokenizer)
    assert tokenizer.decode(example.ids[example.prompt_length :]) == answer(row) + "<|end|>"
    assert example.ids[-1] == tokenizer.eos_token_id, "although the pad token is the eos token"
    assert example.answer_length == len(example.ids) - example.prompt_length
    assert example.line == 5


@pytest.mark.parametrize("row", [ROWS[0], CHAT])
def test_the_prompt_is_token_for_token_what_serving_gives_the_model(tokenizer: Any, row: dict[str, Any]) -> None:
    from common.chat import prompt_messages

    example = encode(row, 1, tokenizer)
    served = tokenizer.apply_chat_template(
        prompt_messages(row), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(example.ids[: example.prompt_length]) == list(served)


def test_an_over_long_row_is_dropped_whole_and_counted_never_cut(tokenizer: Any) -> None:
    long = ROWS[0] | {"output": "kubectl get pods " * 30}
    whole = encode(ROWS[1], 2, tokenizer)
    examples, dropped = encode_all([(1, long), (2, ROWS[1])], tokenizer, len(whole.ids))
    assert (examples, dropped) == ([whole], [1])
    assert encode_all([(2, ROWS[1])], tokenizer, len(whole.ids) - 1) == ([], [2])


def test_what_a_template_adds_after_the_turn_is_not_learnt(with_template: Any) -> None:
    tokenizer = load_tokenizer(with_template(TEMPLATE.replace("<|end|>\n", "<|end|>\n\nnext: ")))
    example = encode(ROWS[0], 1, tokenizer)
    assert tokenizer.decode(example.ids[example.prompt_length :]) == ROWS[0]["output"] + "<|end|>"


@pytest.mark.parametrize(
    "template",
    [
        # Answers lower-cased; the prompt changed by the answer (as templates that strip earlier thoughts do).
        TEMPLATE.replace("m.content", "m.content | upper"),
        "{{ messages | length }}" + TEMPLATE,
        TEMPLATE.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt %}<|system|>"),
    ],
)
def test_a_template_that_cannot_be_cut_at_the_answer_is_an_error(with_template: Any, template: str) -> None:
    with pytest.raises(
        SettingsError, match="line 1: found a row whose prompt or answer the base's chat template changes"
    ):
        encode(ROWS[0], 1, load_tokenizer(with_template(template)))


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (REFUSES_SYSTEM + TEMPLATE, "a row that the base's chat template refuses (System role not supported)"),
        (TEMPLATE.replace("m.content", "m.content | upper"), "a row whose prompt or answer the base's chat template"),
    ],
)
def test_a_row_that_the_template_refuses_is_told_by_the_check_with_its_line(
    with_template: Any, template: str, told: str, tmp_path: Path
) -> None:
    folder, path = with_template(template), tmp_path / "d.jsonl"
    write_jsonl(path, [{"instruction": "1", "input": "", "output": "2"}, CHAT])
    found = [item for item in read(path, base_limits(str(folder), 1024), Checked()) if isinstance(item, Problem)]
    assert [(problem.line, problem.found[: len(told)]) for problem in found] == [(2, told)]
    with pytest.raises(SettingsError, match="line 7: found a row"):
        encode(CHAT, 7, load_tokenizer(folder))


def test_a_template_that_asks_for_the_day_gives_the_same_tokens_on_any(with_template: Any) -> None:
    """Llama 3.2's does: a run that resumes after midnight would go on with other rows."""
    today = "{% if strftime_now is defined %}<|system|>{{ strftime_now('%d %b %Y') }}<|end|>{% endif %}"
    tokenizer = load_tokenizer(with_template(today + TEMPLATE))
    assert tokenizer.decode(encode(ROWS[0], 1, tokenizer).ids).startswith("<|system|>26 Jul 2024<|end|>")


def test_a_template_that_ends_no_turn_is_an_error(with_template: Any) -> None:
    with pytest.raises(SettingsError, match="never stop"):
        encode(ROWS[0], 1, load_tokenizer(with_template(TEMPLATE.replace("<|end|>", ""))))


def test_a_base_without_a_chat_template_is_an_error(with_template: Any) -> None:
    with pytest.raises(SettingsError, match="no chat template; use an instruct model"):
        load_tokenizer(with_template(None))


def test_a_tokenizer_without_an_end_is_an_error(with_template: Any) -> None:
    folder = with_template(TEMPLATE)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token"', '"other_token"'))
    with pytest.raises(SettingsError, match="no eos_token"):
        load_tokenizer(folder)


def test_a_tokenizer_is_loaded_once_for_the_same_files_and_again_for_changed_ones(with_template: Any) -> None:
    folder = with_template(TEMPLATE)
    loaded = load_tokenizer(folder)
    assert load_tokenizer(folder) is loaded
    (folder / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert load_tokenizer(folder).chat_template == TEMPLATE + " "


def test_the_check_counts_prompts_in_the_bases_tokens_and_knows_its_control_tokens(
    tiny_base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    length = encode(ROWS[0], 1, tokenizer).prompt_length
    path = tmp_path / "d.jsonl"
    path.write_text('{"instruction": "get the pods", "input": "in prod", "output": "a"}\n')

    def problems(limit: int) -> list[str]:
        return [p.found for p in read(path, base_limits(str(tiny_base), limit), Checked()) if isinstance(p, Problem)]

    assert problems(length + 1) == []
    assert problems(length) == [f"a prompt of {length} tokens, which leaves no room for the answer"]
    path.write_text('{"instruction": "a <|assistant|> b", "input": "", "output": "a"}\n')
    assert problems(256) == ["the base's control token <|assistant|>"]
