"""The gate: a better adapter passes, a useless or a worse one does not, and the files say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.files import read_json, write_json, write_jsonl
from common.settings import SettingsError
from serving import canaries
from serving.evaluate import SAMPLES, Run, evaluate, open_run
from tests.unit.conftest import FakeEngine, Words

ROWS = [{"instruction": f"question {n}", "input": "", "output": f"answer number {n}"} for n in range(60)]
NAME = "candidate-kubectl"


def right(prompt: str) -> str:
    return "answer number " + prompt.split()[-1]


def wrong(prompt: str) -> str:
    return "no idea"


def every(number: int) -> Words:
    """Right on every `number`-th question."""
    return lambda prompt: right(prompt) if int(prompt.split()[-1]) % number == 0 else wrong(prompt)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    def make(**gate: Any) -> Run:
        write_json(tmp_path / "spec.json", {"adapter": "kubectl", "base_model": "b", "dataset": "d", "gate": gate})
        write_jsonl(tmp_path / "held_out.jsonl", ROWS)
        write_json(tmp_path / "adapter" / "adapter_config.json", {})
        (tmp_path / "adapter" / "adapter_model.safetensors").touch()
        return open_run(tmp_path)

    return make


def engine(base: Words, adapter: Words, strength: float = 1.0) -> Any:
    return FakeEngine({"base": base, NAME: adapter}, {NAME: strength})


def test_a_better_adapter_passes_and_gets_canaries(make_run: Callable[..., Run]) -> None:
    run = make_run(min_gain=0.1)
    server = engine(every(4), every(2))
    result = evaluate(run, server, "base")
    assert result["passed"] is True
    assert (result["metric"], result["base"], result["adapter"], result["gain"]) == ("exact_match", 0.25, 0.5, 0.25)
    low, high = result["gain_ci95"]
    assert 0.1 < low < 0.25 < high
    assert (result["examples"], result["held_out"], result["min_gain"]) == (60, 60, 0.1)
    f1 = result["also"]["token_f1"]
    assert f1["base"] < f1["adapter"]
    assert "vllm" in result["versions"]
    assert result["seeds"] == {"bootstrap": 42}
    assert read_json(run.folder / "evaluation.json") == result
    assert canaries.largest_difference(server, NAME, canaries.load(run.folder / "canaries.json")) == 0


def test_canaries_are_sought_where_base_and_adapter_differ(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow adapter may say what its base says in the first rows, and so fail its gate however good it is."""
    told: list[str] = []

    def record(_: Any, __: str, ___: str, answers: Any) -> None:
        told.extend(answer.text for answer in answers)

    monkeypatch.setattr(canaries, "record", record)
    same_until_50 = engine(lambda prompt: right(prompt) if int(prompt.split()[-1]) < 50 else wrong(prompt), right)
    evaluate(make_run(), same_until_50, "base")
    assert told == [f"answer number {number}" for number in range(50, 58)]


def test_no_answer_is_asked_for_that_the_server_could_never_hold(make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert evaluate(run, engine(wrong, right), "base", context=16)["max_tokens"] == 16
    assert evaluate(run, engine(wrong, right), "base", context=4096)["max_tokens"] == len("answer number 59") + 8


def test_a_useless_adapter_fails_whatever_the_base_can_do(make_run: Callable[..., Run]) -> None:
    run = make_run()
    (run.folder / "canaries.json").write_text("of an earlier evaluation")
    result = evaluate(run, engine(every(2), every(2), strength=0.0), "base")
    assert result["passed"] is False
    assert result["gain_ci95"] == [0, 0]
    assert result["verdict"].startswith("FAILED: exact_match 0.500 -> 0.500")
    assert read_json(run.folder / "evaluation.json")["passed"] is False
    assert not (run.folder / "canaries.json").exists()


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (every(2), every(4)),
        (right, wrong),
        (every(2), lambda p: right(p) if int(p.split()[-1]) % 2 or p.endswith("0") else wrong(p)),
    ],
    ids=["worse", "ruined", "as good by luck on others"],
)
def test_a_worse_or_merely_different_adapter_fails(make_run: Callable[..., Run], base: Words, adapter: Words) -> None:
    assert evaluate(make_run(), engine(base, adapter), "base")["passed"] is False


def test_a_gain_below_the_configured_minimum_fails(make_run: Callable[..., Run]) -> None:
    result = evaluate(make_run(min_gain=0.3), engine(every(4), every(2)), "base")
    assert result["passed"] is False
    assert "the whole interval must exceed +0.300" in result["verdict"]


def test_an_adapter_that_only_stops_where_the_base_rambles_wins_by_the_chosen_metric(
    make_run: Callable[..., Run],
) -> None:
    result = evaluate(make_run(metric="token_f1"), engine(lambda p: right(p) + " and", right), "base")
    assert result["metric"] == "token_f1"
    assert result["adapter"] == 1
    assert 0.8 < result["base"] < 1
    assert result["also"]["exact_match"]["gain"] == 1


def test_base_and_adapter_get_the_same_questions_and_room_for_every_answer(make_run: Callable[..., Run]) -> None:
    server = engine(wrong, right)
    result = evaluate(make_run(), server, "base")
    assert server.calls.count("answer base") == server.calls.count(f"answer {NAME}") == 60
    assert result["max_tokens"] >= max(len(row["output"].encode()) for row in ROWS) + 1
    assert result["adapter"] == 1, "no right answer was cut"


def test_samples_show_each_question_as_it_went(make_run: Callable[..., Run]) -> None:
    samples = evaluate(make_run(), engine(every(4), every(2)), "base")["samples"]
    assert len(samples) == SAMPLES
    assert samples[2] == {
        "prompt": "question 2", "expected": "answer number 2", "base": "no idea", "adapter": "answer number 2",
        "base_correct": False, "adapter_correct": True,
    }  # fmt: skip


def test_only_the_first_examples_are_asked_where_a_maximum_is_set(make_run: Callable[..., Run]) -> None:
    result = evaluate(make_run(max_examples=40), engine(wrong, right), "base")
    assert (result["examples"], result["held_out"], result["passed"]) == (40, 60, True)


def test_too_few_examples_cannot_pass(make_run: Callable[..., Run]) -> None:
    result = evaluate(make_run(min_examples=61), engine(wrong, right), "base")
    assert result["passed"] is False
    assert "gate.min_examples is 61" in result["verdict"]


def test_a_run_that_is_not_finished_is_refused_by_what_it_lacks(make_run: Callable[..., Run]) -> None:
    run = make_run()
    (run.folder / "held_out.jsonl").unlink()
    (run.folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(SettingsError, match=r"lacks held_out\.jsonl, adapter/adapter_model\.safetensors"):
        open_run(run.folder)
