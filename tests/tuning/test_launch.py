"""Several processes of one run: how a step is dealt to them, and which exit code speaks for all."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import exits
from common.processes import wait_for
from common.settings import SettingsError
from training import launch as launcher
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


# The processes of one machine, and when they are run again.


def script(*codes: int) -> list[str]:
    """A command whose attempts end one after the other with these codes; each leaves a file named by its number."""
    return [
        sys.executable, "-c",
        "import pathlib, sys; made = len(list(pathlib.Path().glob('attempt-*'))); "
        f"pathlib.Path(f'attempt-{{made}}').touch(); sys.exit({list(codes)}[made])",
    ]  # fmt: skip


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many attempts a `script` has made; it runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda: len(list(tmp_path.glob("attempt-*")))


@pytest.mark.parametrize(
    ("node", "codes", "whole"),
    [
        (1, (exits.FAILED, exits.TERMINATED, exits.FAILED, exits.OK), exits.OK),
        (1, (exits.FAILED, exits.INPUT), exits.INPUT),
        (0, (exits.TERMINATED, exits.OK), exits.OK),
        (0, (exits.TERMINATED, exits.FAILED), exits.FAILED),
        (1, (exits.FAILED,) * launcher.SOON_TIMES, exits.FAILED),
    ],
)
def test_who_joins_again_and_when_not(
    node: int, codes: tuple[int, ...], whole: int, attempts: Callable[[], int]
) -> None:
    assert launch(script(*codes), 1, nodes=2, node_rank=node, rendezvous="a:1", rejoin=True) == whole
    assert attempts() == len(codes)


def test_nobody_joins_again_unasked(attempts: Callable[[], int]) -> None:
    assert launch(script(exits.TERMINATED), 1, nodes=2, node_rank=1, rendezvous="a:1") == exits.TERMINATED
    assert attempts() == 1


def test_what_the_first_has_finished_is_finished_though_others_still_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "ALONE_SECONDS", 0.2)
    wait = [sys.executable, "-c", "import os, time; time.sleep(600 * int(os.environ['RANK']))"]
    assert launch(wait, 2) == exits.OK
    assert launch(wait, 1, nodes=2, node_rank=0, rendezvous="a:1", rejoin=True) == exits.OK


FLAGGED_OR_NOT = """
import os, pathlib, signal, sys, time
came = []
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, lambda *_: came.append(1))
pathlib.Path(f"attempt-{os.environ['RANK']}").touch()
while not came:
    time.sleep(0.01)
sys.exit(1)
"""


def test_sigterm_while_one_still_loads_is_no_failure(attempts: Callable[[], int]) -> None:
    """The one that loads has nothing to save and ends at once; the other, which noted the signal, only loses it."""

    def end() -> None:
        wait_for(lambda: attempts() == 2, 30, "both processes", lambda: None)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    code = launch([sys.executable, "-c", FLAGGED_OR_NOT], 2, nodes=2, rendezvous="a:1", rejoin=True)
    thread.join()
    assert code == exits.TERMINATED


@pytest.mark.parametrize(
    ("given", "index", "rank"),
    [
        ((), "1", "1"),
        (("--node-rank", "0"), "1", "0"),
        ((), None, "0"),
        (("--nodes", "1", "--processes", "2"), "1", "0"),
    ],
)
def test_a_pod_of_an_indexed_job_knows_which_machine_it_is(
    given: tuple[str, ...], index: str | None, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(launcher, "launch", lambda command, processes, **options: seen.append(options))
    monkeypatch.delenv(launcher.INDEX, raising=False)
    if index:
        monkeypatch.setenv(launcher.INDEX, index)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fresh", action="store_true")
    launcher.add_arguments(parser)
    words = ["--nodes", "2", "--rendezvous", "a:1", *given]
    launcher.launched(parser.parse_args(words, argparse.Namespace(argv=words)))
    assert str(seen[0]["node_rank"]) == rank


def test_who_joins_again_must_not_begin_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("adapter: a\nbase_model: b\ndataset: c\n")
    words = ["tune", "--spec", str(spec), "--out", str(tmp_path / "run"), "--nodes", "2", "--rendezvous", "a:1"]
    assert main([*words, "--rejoin", "--fresh"]) == exits.INPUT
    assert "--fresh: not with --rejoin" in capsys.readouterr().err


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
