"""Several processes of one run: how a step is dealt to them, and which exit code speaks for all."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from common import exits
from common.settings import SettingsError
from training.__main__ import main
from training.encode import Example
from training.launch import is_first, is_rank, launch, worst
from training.ranks import deal
from training.spec import TuningSpec
from training.tune import pass_tokens, steps

KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("codes", "whole"),
    [
        ([0, 0], exits.OK),
        ([exits.TERMINATED, exits.TERMINATED], exits.TERMINATED),
        ([-signal.SIGTERM, exits.TERMINATED], exits.TERMINATED),
        ([exits.INPUT, KILLED], exits.INPUT),
        ([exits.FAILED, exits.INPUT], exits.INPUT),
        ([exits.TERMINATED, KILLED], exits.FAILED),
        ([0, KILLED], exits.FAILED),
        ([0, 1], exits.FAILED),
    ],
)
def test_one_exit_code_speaks_for_all(codes: list[int], whole: int) -> None:
    assert worst(codes) == worst(reversed(codes)) == whole


def test_a_process_knows_whether_it_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (is_rank(), is_first()) == (False, True), "RANK alone may be anybody's"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (is_rank(), is_first()) == (True, False)
    monkeypatch.setenv("RANK", "0")
    assert (is_rank(), is_first()) == (True, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": 2}, "--rendezvous: HOST:PORT of node 0 is needed"),
        ({"nodes": 2, "node_rank": 2, "rendezvous": "a:1"}, "--node-rank: should be from 0 to 1"),
        ({"nodes": 2, "rendezvous": "a"}, "--rendezvous: should be HOST:PORT, found a"),
    ],
)
def test_what_several_nodes_need_is_told_before_anything_starts(options: dict, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        launch(["false"], 1, **options)


def test_a_number_of_processes_that_is_none_is_refused(
    tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"adapter: a\nbase_model: {tiny_base}\ndataset: {rows_file}\n")
    assert main(["tune", "--spec", str(spec), "--out", str(tmp_path / "run"), "--processes", "0"]) == exits.INPUT
    assert "--processes: should be a number from 1, or auto; found 0" in capsys.readouterr().err


# How a step is dealt.


@pytest.mark.parametrize("seed", range(10))
def test_shares_differ_by_less_than_the_longest_row(seed: int) -> None:
    numbers = random.Random(seed)
    sizes = [numbers.randint(1, 100) for _ in range(numbers.randint(1, 60))]
    shares = deal(sizes, 4)
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)
    assert shares == deal(sizes, 4)


@pytest.fixture
def spec(tiny_base: Path, rows_file: Path) -> Callable[..., TuningSpec]:
    settings = {"adapter": "a", "base_model": str(tiny_base), "dataset": str(rows_file), "max_seq_length": 60}
    return lambda **change: TuningSpec.model_validate(settings | change)


def test_every_step_has_the_same_rows_on_any_number_of_ranks(spec: Callable[..., TuningSpec]) -> None:
    numbers = random.Random(1)
    examples = [Example(line, (5,) * numbers.randint(2, 60), 1) for line in range(50)]
    alone = list(steps(examples, spec(), start=0))
    for ranks in (2, 5, 64):
        dealt = list(steps(examples, spec(), start=0, ranks=ranks))
        for (number, shares), (_, (passes,)) in zip(dealt, alone, strict=True):
            assert len(shares) == ranks
            assert sorted(row.line for share in shares for rows in share for row in rows) == sorted(
                row.line for rows in passes for row in rows
            ), number
            assert all(sum(len(row.ids) for row in rows) <= pass_tokens(spec()) for share in shares for rows in share)
    busy = [sum(map(bool, shares)) for _, shares in steps(examples, spec(), start=0, ranks=5)]
    assert busy[:3] == [5, 5, 5], "16 rows keep five busy, though fewer passes would hold them"
