"""Every flag and environment variable that we give to vLLM and its router exists in the pinned versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.lora import VLLM_LORA_RANKS
from serving import requests
from serving.engine import vllm_command, vllm_environment
from serving.router import router_command
from serving.spec import ServingSpec

SPECS = [ServingSpec(base_model="b", store="s", adapters=("a",), device=device) for device in ("cpu", "cuda")]

# Reads a list of command lines, one parser for all: importing vLLM is the slow part.
PARSE = """
import json, sys, typing
from vllm import envs
from vllm.config.lora import MaxLoRARanks
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
told = []
for command in json.load(sys.stdin):
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    validate_parsed_serve_args(arguments)
    modules = [module.name for module in arguments.lora_modules or []]
    told.append({"shutdown_timeout": arguments.shutdown_timeout, "max_loras": arguments.max_loras, "modules": modules})
ranks = [rank for rank in typing.get_args(MaxLoRARanks)]
fields = {"chat": sorted(ChatCompletionRequest.model_fields), "completions": sorted(CompletionRequest.model_fields)}
variables = sorted(envs.environment_variables)
print("TOLD" + json.dumps({"commands": told, "ranks": ranks, "variables": variables, "fields": fields}))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    commands = [
        vllm_command(spec, host="127.0.0.1", port=8000, adapters={"x": Path("runs/x"), "y": Path("runs/y")})[3:]
        for spec in SPECS
    ]
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(commands), capture_output=True, text=True, timeout=240,
        env=os.environ | vllm_environment(SPECS[0]), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.rpartition("TOLD")[2])
    return result


def test_vllm_takes_every_flag_of_every_device(told: dict[str, Any]) -> None:
    assert told["commands"] == [{"shutdown_timeout": 45, "max_loras": 3, "modules": ["x", "y"]}] * 2


def test_vllm_knows_every_field_that_the_layer_lets_through(told: dict[str, Any]) -> None:
    without_effect = set(requests.WITHOUT_EFFECT.split())
    for route, name in ((requests.CHAT, "chat"), (requests.COMPLETIONS, "completions")):
        assert requests.FIELDS[route] - set(told["fields"][name]) == without_effect


def test_the_ranks_are_vllms_own(told: dict[str, Any]) -> None:
    assert told["ranks"] == list(VLLM_LORA_RANKS)


def test_vllm_knows_every_variable_that_bears_its_name(told: dict[str, Any]) -> None:
    given = {name for spec in SPECS for name in vllm_environment(spec, state=Path("state")) if name.startswith("VLLM_")}
    known = told["variables"]
    assert isinstance(known, list)
    assert given <= set(known)
    assert len(given) >= 5


def test_the_router_takes_every_flag() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_router.launch_router", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    known = set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))
    given = [
        word
        for word in router_command(["http://127.0.0.1:1", "http://127.0.0.1:2"], ("127.0.0.1", 3), ("127.0.0.1", 4))
        if word.startswith("--")
    ]
    assert [flag for flag in given if flag not in known] == []
    assert "power_of_two" in done.stdout
