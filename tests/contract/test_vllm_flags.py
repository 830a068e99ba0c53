"""Every flag and environment variable that we give to vLLM and its router exists in the pinned versions."""

from __future__ import annotations

import asyncio
import hashlib
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
from serving.middleware import RequestLayer
from serving.router import router_command
from serving.spec import ServingSpec

SPECS = [ServingSpec(base_model="b", store="s", adapters=("a",), device=device) for device in ("cpu", "cuda")]

# Reads a list of command lines, one parser for all: importing vLLM is the slow part.
PARSE = """
import json, sys, typing
from vllm import envs
from vllm.config.lora import MaxLoRARanks
from vllm.entrypoints.launchers.app import build_app
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
arguments.middleware = []
app = build_app(arguments, ("generate",))
routes = sorted({(method, route.path) for route in app.routes for method in getattr(route, "methods", None) or ["GET"]})
fields = {"chat": sorted(ChatCompletionRequest.model_fields), "completions": sorted(CompletionRequest.model_fields)}
variables = sorted(envs.environment_variables)
print("TOLD" + json.dumps({"commands": told, "ranks": ranks, "variables": variables, "fields": fields, "routes": routes}))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    commands = [
        vllm_command(spec, host="127.0.0.1", port=8000, adapters={"x": Path("runs/x"), "y": Path("runs/y")})[3:]
        for spec in SPECS
    ]
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(commands), capture_output=True, text=True, timeout=240,
        env=os.environ | vllm_environment(SPECS[0]) | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, check=False,
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


def test_of_all_routes_that_vllm_has_only_the_listed_ones_answer_clients(told: dict[str, Any], tmp_path: Path) -> None:
    """Each of them, without a key and with one, by every method, and through tricks that routers undo."""
    routes = {(method, path) for method, path in told["routes"]}
    assert len(routes) > 20 and ("POST", "/v1/load_lora_adapter") in routes and ("POST", "/tokenize") in routes
    (tmp_path / "keys").write_text(json.dumps({"clients": {"a": {"sha256": hashlib.sha256(b"key").hexdigest()}}}))
    environment = vllm_environment(SPECS[0], state=tmp_path / "state", api_keys=tmp_path / "keys")
    reached: set[tuple[str, str]] = set()

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        reached.add((scope["method"], scope["path"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(method: str, path: str, key: bytes) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b'{"model": "base"}', "more_body": False}

        async def send(message: Any) -> None: ...

        headers = [(b"authorization", b"Bearer " + key), (b"x-drydock-sidecar", b"guess"), (b"upgrade", b"h2c")]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers}
        await layer(scope, receive, send)

    async def ask_all() -> None:
        for _, path in routes:
            tricks = {path, path + "/", "/" + path, "/." + path, "/v1/.." + path, path.upper(), path + "%20", path + ";x",
                      path.replace("/", "%2f"), path.replace("/", "\\"), "/openai" + path, "/openai/v1" + path}  # fmt: skip
            for trick in tricks:
                for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "CONNECT", "post"):
                    for key in (b"", b"guess", b"key"):
                        await ask(method, trick, key)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        layer = RequestLayer(inner)
    asyncio.run(ask_all())
    assert reached == {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/health"),
        ("GET", "/metrics"),
    }


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
