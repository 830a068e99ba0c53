"""What the serving bench concludes from its measurements."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from benches.around import HEADER, Around
from benches.replica import spec_of
from benches.serving import agreement, compiling, of_blocks
from serving.engine import vllm_command
from serving.middleware import RequestLayer


def test_what_is_said_of_blocks_is_as_uncertain_as_blocks_are_few() -> None:
    rng = random.Random(5)
    blocks = [[rng.gauss(1, 1) for _ in range(50)] for _ in range(6)]
    blocks[3][:5] = [500.0] * 5  # a few that somebody else held up
    seen = of_blocks(blocks)
    assert 0.7 < seen["low"] < 1 < seen["high"] < 1.3 and seen["low"] < seen["value"] < seen["high"]  # the mean is 9
    biased = [[value + place for value in block] for block, place in zip(blocks, (-2, 2, -2, 2, -2, 2), strict=True)]
    apart = of_blocks(biased)
    assert apart["high"] - apart["low"] > 5 * (seen["high"] - seen["low"]), "each start has a bias of its own"
    assert of_blocks([[0.98, 0.98], [0.98]]) == {"value": 0.98, "low": 0.98, "high": 0.98}


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


def test_only_who_asks_for_it_gets_around_the_layer() -> None:
    seen: list[str] = []

    async def vllm(*_: Any) -> None:
        seen.append("vllm")

    class Layer(RequestLayer):
        def __init__(self) -> None:
            self.app = vllm

        async def __call__(self, *_: Any) -> None:
            seen.append("layer")

    async def send(_: Any) -> None: ...

    async def receive() -> Any: ...

    around = Around(Layer())
    for headers in ([], [(HEADER.encode(), b"1")], [(b"host", b"a")]):
        asyncio.run(around({"type": "http", "headers": headers}, receive, send))
    asyncio.run(around({"type": "lifespan"}, receive, send))
    assert seen == ["layer", "vllm", "layer", "layer"]
    with pytest.raises(TypeError, match="must be the next --middleware"):
        Around(vllm)
