"""Canaries prove that a server computes what was evaluated; without contrast there is no proof."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving import canaries
from serving.canaries import CONTRAST, COUNT, TOLERANCE, Canaries, Canary, largest_difference, mean_difference, record
from serving.client import Answer
from tests.unit.conftest import FakeEngine

ANSWERS = [Answer("x", [1, 2, 3, 10 + n], 2) for n in range(8)]


def engine(strength: float) -> Any:
    return FakeEngine(strengths={"candidate": strength})


def test_the_difference_is_the_mean_over_tokens() -> None:
    assert mean_difference([-1.0, -2.0, -4.0], [-1.5, -2.0, -3.0]) == pytest.approx(0.5)


def test_what_was_recorded_is_what_the_same_server_gives() -> None:
    one = engine(0.5)
    recorded = record(one, "candidate", "base", ANSWERS)
    assert recorded
    assert len(recorded.canaries) == COUNT
    assert recorded.canaries[0].contrast == pytest.approx(0.5)
    assert largest_difference(one, "candidate", recorded) == 0


def test_a_server_that_answers_with_the_bare_base_is_far_beyond_the_tolerance() -> None:
    recorded = record(engine(0.5), "candidate", "base", ANSWERS)
    assert recorded
    assert largest_difference(engine(0.0), "candidate", recorded) > recorded.tolerance
    assert largest_difference(engine(0.5 + 0.9 * TOLERANCE), "candidate", recorded) < recorded.tolerance


@pytest.mark.parametrize("strength", [0.0, 0.9 * CONTRAST * TOLERANCE])
def test_an_adapter_too_like_its_base_has_no_canaries(strength: float) -> None:
    assert record(engine(strength), "candidate", "base", ANSWERS) is None


def test_answers_without_a_token_prove_nothing() -> None:
    assert record(engine(0.5), "candidate", "base", [Answer("", [1, 2], 2)]) is None


def test_the_most_telling_answers_are_kept() -> None:
    class Uneven(FakeEngine):
        def log_probabilities(self, model: str, token_ids: Any, prompt_length: int) -> list[float]:
            return [-float(token_ids[-1]) / 10 if model == "candidate" else 0.0] * 2

    recorded = record(Uneven(), "candidate", "base", ANSWERS)  # type: ignore[arg-type]
    assert recorded
    assert [canary.token_ids[-1] for canary in recorded.canaries] == [17, 16, 15, 14]


def test_the_worst_canary_decides() -> None:
    good, bad = ([-1.1, -1.2], [-1.1, -1.9])
    both = Canaries(
        canaries=[
            Canary(token_ids=[5, 10, 20], prompt_length=1, adapter=says, base=[-9.0, -9.0]) for says in (good, bad)
        ]
    )
    assert largest_difference(engine(0.0), "candidate", both) == pytest.approx(0.35)


def test_a_server_that_gives_no_number_proves_nothing() -> None:
    recorded = record(engine(0.5), "candidate", "base", ANSWERS)
    assert recorded
    for broken in (recorded.canaries[0], recorded.canaries[-1]):

        class Sick(FakeEngine):
            sick = tuple(broken.token_ids)

            def log_probabilities(self, model: str, token_ids: Any, prompt_length: int) -> list[float]:
                right = super().log_probabilities(model, token_ids, prompt_length)
                return [math.nan] * len(right) if tuple(token_ids) == self.sick else right

        difference = largest_difference(Sick(strengths={"candidate": 0.5}), "candidate", recorded)  # type: ignore[arg-type]
        assert not difference <= recorded.tolerance
        assert difference > recorded.tolerance, "as the sidecar asks it"


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": [-1.0]},  # two answer tokens, one log-probability
        {"base": []},
        {"prompt_length": 3},  # no answer token at all
        {"prompt_length": 0},
        {"adapter": [math.nan, -1.0]},
    ],
)
def test_canaries_that_do_not_fit_together_are_no_canaries(change: dict[str, Any], tmp_path: Path) -> None:
    fine = {"token_ids": [1, 2, 3], "prompt_length": 1, "adapter": [-1.0, -1.0], "base": [-2.0, -2.0]}
    Canary.model_validate(fine)
    with pytest.raises(ValidationError):
        Canary.model_validate(fine | change)


def test_a_file_comes_back_as_it_went_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    recorded = record(engine(0.5), "candidate", "base", ANSWERS)
    assert recorded
    path = tmp_path / "canaries.json"
    path.write_text(recorded.model_dump_json())
    assert canaries.load(path) == recorded
    path.write_text('{"canaries": []}')
    with pytest.raises(ValidationError):
        canaries.load(path)
