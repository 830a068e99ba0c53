"""What the serving bench concludes from its measurements."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from benches.replica import spec_of
from benches.serving import added, agreement, compiling, layer
from serving.engine import vllm_command


def test_the_added_latency_is_that_of_pairs_with_its_uncertainty() -> None:
    rng = random.Random(5)
    bare = [rng.gauss(20 + 40 * (number > 200), 2) for number in range(300)]  # the last third: the machine was busy
    ours = [each + rng.gauss(1, 1) for each in bare[:290]] + [500.0] * 10  # a few that somebody else held up
    seen = added(ours, bare)
    assert 0.8 < seen["low"] < seen["value"] < seen["high"] < 1.3  # of 1 ms; the mean would be 16
    same = added(bare, bare)
    assert (same["low"], same["value"], same["high"]) == (0, 0, 0)


def test_two_clients_agree_only_if_their_worst_figure_does() -> None:
    vllm = [{"rps": 10.0, "ttft": 20.0}, {"rps": 10.2, "ttft": 21.0}, {"rps": 30.0, "ttft": 22.0}]
    near = agreement({"vllm": vllm, "stress": [{"rps": 10.4, "ttft": 20.5}] * 3})
    assert near["figures"]["rps"]["difference"] == pytest.approx(10.4 / 10.2 - 1)  # medians: one bad round is none
    assert near["agree"] and near["worst"] == pytest.approx(1 - 20.5 / 21)
    far = agreement({"vllm": vllm, "stress": [{"rps": 10.2, "ttft": 30.0}] * 3})
    assert not far["agree"] and far["worst"] == pytest.approx(30 / 21 - 1)


def test_a_start_that_compiles_leaves_out_what_keeps_vllm_from_it_on_a_cpu(tmp_path: Path) -> None:
    command = vllm_command(spec_of(tmp_path), host="127.0.0.1", port=1)
    found = compiling(command)
    left_out = {"--enforce-eager", "--enable-lora", "--max-lora-rank", "--max-loras", "--max-cpu-loras"}
    assert {word for word in command if word.startswith("--")} - set(found) == left_out
    assert len(command) - len(found) == len(left_out) + 3, "three of them with a number"
    assert found[-2:] == command[-2:] and '{"disable_any_whitespace": true, "backend": "xgrammar"}' in found


def test_the_layer_alone_is_measured_on_requests_that_it_lets_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # so that what `layer` sets is undone
    seen = asyncio.run(layer(tmp_path))
    assert 0 < seen["p50"] <= seen["p95"] < 50_000
