"""The request layer: closed unless opened, aliases only to what was proven, ready only when the sidecar said so."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client import REGISTRY

from serving.heartbeat import Heartbeat
from serving.middleware import RequestLayer
from serving.state import Aliases, AliasReader, Served, new_boot, prepare, read_boot, read_token, write_aliases

LIMIT = 2000
CONTEXT = 4096
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPTS: dict[str, Any] = {CHAT: {"messages": []}, COMPLETIONS: {"prompt": "x"}}


class Reply(NamedTuple):
    status: int
    body: Any
    headers: dict[bytes, bytes]


class Inner:
    """Stands for vLLM's application: notes what reaches it and answers 200 with the body that it got."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []
        self.after: list[Any] = []

    def tokenizing(self, tokens: int) -> Any:
        """The same, which counts so many tokens in any prompt."""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] != "/tokenize":
                return await self(scope, receive, send)
            self.scopes.append(scope)
            self.bodies.append((await receive())["body"])
            body = json.dumps({"count": tokens, "max_model_len": CONTEXT, "tokens": []}).encode()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})

        return app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        body = b""
        if scope["method"] == "POST":
            message = await receive()
            body = message["body"]
            assert not message["more_body"]
            self.after.append(await receive())
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body or b"{}"})


class Layer:
    """A request layer over `Inner`, asked as a server would ask it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inner = folder, Inner()
        self.app = RequestLayer(self.inner)

    def ask(
        self, method: str, path: str, body: bytes | Any = b"", headers: Any = (), *, chunks: list[bytes] | None = None,
        leaves: bool = False,
    ) -> Reply:  # fmt: skip
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        parts = chunks if chunks is not None else [data]
        incoming = [
            {"type": "http.request", "body": part, "more_body": leaves or number < len(parts) - 1}
            for number, part in enumerate(parts)
        ]
        sent: list[Any] = []

        async def receive() -> Any:
            return incoming.pop(0) if incoming else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        given = [(b"host", b"x"), (b"content-length", str(sum(map(len, parts))).encode()), *headers]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": given}
        before = json.dumps(scope, default=str)
        asyncio.run(self.app(scope, receive, send))
        assert json.dumps(scope, default=str) == before, "the server's own scope is left alone"
        start, *rest = sent
        text = b"".join(message.get("body", b"") for message in rest)
        return Reply(start["status"], json.loads(text) if text else None, dict(start["headers"]))

    def chat(self, model: Any, **more: Any) -> Reply:
        return self.ask("POST", CHAT, {"model": model, "messages": [], **more})

    def say(self, *, ready: bool = True, boot: str | None = None, refused: Any = None, **versions: str) -> None:
        served = {
            alias: Served(
                version=version,
                digest=f"sha256:{version}",
                parity_difference=0.001,
                since=1700000000.5,
                base="tiny@sha256:cccc",
                metric="exact_match",
                score=0.9,
                base_score=0.1,
            )
            for alias, version in versions.items()
        }
        known = boot or read_boot(self.folder) or ""
        write_aliases(self.folder, Aliases(boot=known, ready=ready, aliases=served, refused=refused or {}))

    @property
    def token(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-drydock-sidecar", read_token(self.folder).encode())]


@pytest.fixture
def layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Layer]:
    monkeypatch.setenv("DRYDOCK_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("DRYDOCK_BASE_NAME", "base")
    monkeypatch.setenv("DRYDOCK_MAX_REQUEST_BYTES", str(LIMIT))
    monkeypatch.setenv("DRYDOCK_MAX_MODEL_LEN", str(CONTEXT))
    monkeypatch.setenv("DRYDOCK_MAX_NUM_SEQS", "4")
    monkeypatch.setenv("DRYDOCK_STALL_SECONDS", "20")
    monkeypatch.delenv("DRYDOCK_API_KEYS", raising=False)
    yield Layer(tmp_path / "state")


# Routes.


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/v1/load_lora_adapter/"), ("POST", "//v1/load_lora_adapter"), ("POST", "/v1/./load_lora_adapter"),
        ("POST", "/v1/chat/../load_lora_adapter"), ("POST", "/V1/LOAD_LORA_ADAPTER"),
        ("POST", "/v1/load_lora_adapter?x"), ("POST", "/v1%2fload_lora_adapter"), ("GET", "/v1/load_lora_adapter"),
        ("POST", CHAT + "/"), ("GET", CHAT), ("PUT", CHAT), ("OPTIONS", CHAT),
        ("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/invocations"), ("POST", "/v1/embeddings"),
        ("POST", "/v1/responses"), ("POST", "/collective_rpc"), ("POST", "/sleep"), ("POST", "/reset_prefix_cache"),
        ("POST", "/pooling"), ("POST", "/score"), ("GET", "/load"), ("GET", "/version"), ("GET", "/server_info"),
        ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/"), ("GET", ""), ("POST", "/health"),
        ("DELETE", "/v1/models"), ("GET", "/metrics/"), ("POST", "/start_profile"),
    ],
)  # fmt: skip
def test_what_is_not_opened_is_closed(layer: Layer, method: str, path: str) -> None:
    layer.say(kubectl="aaaa1111")
    reply = layer.ask(method, path, b'{"model": "base"}')
    assert reply.status == 404
    assert reply.body["error"]["code"] == "not_found"
    assert not layer.inner.scopes, "vLLM never saw it"


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_health_and_metrics_reach_vllm_at_any_time(layer: Layer, path: str) -> None:
    assert layer.ask("GET", path).status == 200
    assert layer.inner.scopes[0]["path"] == path


def test_the_sidecar_and_nobody_else_loads_adapters(layer: Layer) -> None:
    token = read_token(layer.folder).encode()
    wrong = [b"", b" ", token[:-1], token + b"0", token.upper() if token.upper() != token else b"x", b"\xff", b"0" * 64]
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        for guess in wrong:
            assert layer.ask("POST", path, {}, [(b"x-drydock-sidecar", guess)]).status == 404
        assert not layer.inner.scopes
    assert layer.ask("POST", "/v1/load_lora_adapter", {"lora_name": "x"}, layer.token).status == 200
    assert json.loads(layer.inner.bodies[0]) == {"lora_name": "x"}


def test_not_even_the_sidecar_gets_at_other_routes(layer: Layer) -> None:
    for path in ("/collective_rpc", "/sleep", "/v1/load_lora_adapter/"):
        assert layer.ask("POST", path, {}, layer.token).status == 404
    assert not layer.inner.scopes


def test_the_sidecar_names_loaded_versions_before_they_are_proven(layer: Layer) -> None:
    assert layer.ask("POST", "/v1/completions", {"model": "kubectl.aaaa1111"}, layer.token).status == 200
    assert json.loads(layer.inner.bodies[0])["model"] == "kubectl.aaaa1111"


def test_the_token_is_secret_and_compared_in_constant_time(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (layer.folder / "token").stat().st_mode & 0o077 == 0
    assert len(read_token(layer.folder)) == 64
    compared: list[bytes] = []
    plain = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return plain(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    layer.ask("POST", "/v1/load_lora_adapter", {}, [(b"x-drydock-sidecar", b"guess")])
    assert compared == [b"guess"]


# Aliases.


def test_an_alias_becomes_its_version_and_nothing_else_changes(layer: Layer) -> None:
    layer.say(kubectl="aaaa1111", triage="bbbb2222")
    request = {
        "model": "kubectl",
        "messages": [{"role": "user", "content": "ü 🚀"}],
        "temperature": 0.1,
        "stream": True,
    }
    assert layer.ask("POST", CHAT, request, [(b"content-type", b"application/json")]).status == 200
    body = layer.inner.bodies[0]
    assert json.loads(body) == request | {"model": "kubectl.aaaa1111"}
    headers = layer.inner.scopes[0]["headers"]
    assert [value for name, value in headers if name == b"content-length"] == [str(len(body)).encode()]
    assert (b"content-type", b"application/json") in headers


def test_a_chunked_body_arrives_whole_with_a_length(layer: Layer) -> None:
    layer.say(kubectl="aaaa1111")
    data = json.dumps({"model": "kubectl", "prompt": "x" * 50}).encode()
    chunks = [data[:7], b"", data[7:30], data[30:]]
    assert (
        layer.ask("POST", "/v1/completions", headers=[(b"transfer-encoding", b"chunked")], chunks=chunks).status == 200
    )
    names = [name for name, _ in layer.inner.scopes[0]["headers"]]
    assert b"transfer-encoding" not in names
    assert json.loads(layer.inner.bodies[0]) == {"model": "kubectl.aaaa1111", "prompt": "x" * 50}


def test_vllm_reads_what_was_checked_and_nothing_else(layer: Layer) -> None:
    """Of a name given twice two readers could take another one."""
    assert layer.ask("POST", CHAT, b'{ "model":"gpt-4",\n"messages": [], "model": "base" }').status == 200
    assert layer.inner.bodies == [b'{"model":"base","messages":[]}']


def test_a_proven_version_answers_under_its_full_name_too(layer: Layer) -> None:
    layer.say(kubectl="aaaa1111")
    assert layer.chat("kubectl.aaaa1111").status == 200


@pytest.mark.parametrize(
    "model",
    ["gpt-4", "kubectl.bbbb2222", "triage", "kubectl.", "Kubectl", " kubectl", "", "/etc/passwd", "candidate-kubectl"],
)
def test_an_unknown_or_unproven_model_is_404_as_openai_says_it(layer: Layer, model: str) -> None:
    layer.say(kubectl="aaaa1111")
    reply = layer.chat(model)
    assert reply.status == 404
    assert reply.headers[b"content-type"] == b"application/json"
    error = reply.body["error"]
    assert error["code"] == "model_not_found"
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert repr(model) in error["message"]
    assert "base, kubectl" in error["message"]
    assert not layer.inner.scopes


# Clients of Azure OpenAI.

DEPLOYMENT_CHAT = "/openai/deployments/kubectl/chat/completions"


@pytest.mark.parametrize(
    ("path", "inner", "more"),
    [
        (DEPLOYMENT_CHAT, CHAT, {}),
        ("/openai/deployments/kubectl/completions", "/v1/completions", {"model": "base"}),
        ("/openai/v1/chat/completions", CHAT, {"model": "kubectl"}),
        ("/openai/v1/completions", "/v1/completions", {"model": "kubectl"}),
    ],
)
def test_azures_paths_lead_to_the_same_routes(layer: Layer, path: str, inner: str, more: Any) -> None:
    layer.say(kubectl="aaaa1111")
    assert layer.ask("POST", path, {"messages": [], **more}).status == 200
    (scope,) = layer.inner.scopes
    assert (scope["path"], scope["raw_path"]) == (inner, inner.encode())
    assert json.loads(layer.inner.bodies[0])["model"] == "kubectl.aaaa1111", "the deployment, whatever the body says"


def test_the_front_names_the_deployment_in_a_header_which_goes_no_further(layer: Layer) -> None:
    layer.say(kubectl="aaaa1111")
    assert layer.ask("POST", CHAT, {"messages": []}, [(b"x-drydock-deployment", b"kubectl")]).status == 200
    assert json.loads(layer.inner.bodies[0])["model"] == "kubectl.aaaa1111"
    assert b"x-drydock-deployment" not in dict(layer.inner.scopes[0]["headers"])


def test_an_unknown_deployment_is_404_as_azure_says_it(layer: Layer) -> None:
    layer.say(kubectl="aaaa1111")
    reply = layer.ask("POST", DEPLOYMENT_CHAT.replace("kubectl", "gpt-4"), {"messages": []})
    assert (reply.status, reply.body["error"]["code"]) == (404, "DeploymentNotFound")
    assert "deployment 'gpt-4' does not exist; served here: base, kubectl" in reply.body["error"]["message"]


@pytest.mark.parametrize("path", ["/openai/models", "/openai/v1/models"])
def test_azures_clients_list_the_models(layer: Layer, path: str) -> None:
    layer.say(kubectl="aaaa1111")
    assert [model["id"] for model in layer.ask("GET", path).body["data"]] == ["base", "kubectl"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/openai/deployments//chat/completions"), ("POST", "/openai/deployments/../chat/completions"),
        ("POST", "/openai/deployments/a/b/completions"), ("POST", "/openai/deployments/kubectl/embeddings"),
        ("POST", "/openai/v1/load_lora_adapter"), ("POST", "/openai/v1/responses"), ("GET", DEPLOYMENT_CHAT),
        ("POST", DEPLOYMENT_CHAT + "/"), ("POST", "/openai" + DEPLOYMENT_CHAT), ("POST", "/openai/v1/models"),
        ("POST", DEPLOYMENT_CHAT + "\n"), ("GET", "/openai/metrics"), ("GET", "/openai/v1/metrics"),
    ],
)  # fmt: skip
def test_nothing_else_opens_below_azures_paths(layer: Layer, method: str, path: str) -> None:
    layer.say(kubectl="aaaa1111")
    assert layer.ask(method, path, {"messages": []}, layer.token).status == 404
    assert not layer.inner.scopes


def test_a_switch_takes_effect_with_the_next_request_and_closes_the_old_version(layer: Layer) -> None:
    layer.say(kubectl="aaaa1111")
    layer.chat("kubectl")
    layer.say(kubectl="bbbb2222")
    layer.chat("kubectl")
    assert [json.loads(body)["model"] for body in layer.inner.bodies] == ["kubectl.aaaa1111", "kubectl.bbbb2222"]
    assert layer.chat("kubectl.aaaa1111").status == 404
    layer.say()
    assert layer.chat("kubectl").status == 404, "withdrawn"


def test_what_the_sidecar_said_about_an_earlier_process_is_void(layer: Layer) -> None:
    layer.say(kubectl="aaaa1111")
    assert layer.chat("kubectl").status == 200
    after_restart = Layer(layer.folder)
    assert after_restart.chat("kubectl").status == 404
    assert after_restart.ask("GET", "/ready").status == 503
    assert [model["id"] for model in after_restart.ask("GET", "/v1/models").body["data"]] == ["base"]
    after_restart.say(kubectl="aaaa1111")
    assert after_restart.chat("kubectl").status == 200
    assert read_token(layer.folder).encode() == after_restart.app.token, "the token outlives the process"


# Bodies.


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_413_and_one_at_it_passes(layer: Layer, chunked: bool) -> None:
    head = len(json.dumps({"model": "base", "prompt": ""}))
    for excess, status in ((0, 200), (1, 413)):
        data = json.dumps({"model": "base", "prompt": "x" * (LIMIT - head + excess)}).encode()
        chunks = [data[i : i + 100] for i in range(0, len(data), 100)] if chunked else [data]
        reply = layer.ask("POST", COMPLETIONS, chunks=chunks)
        assert reply.status == status
    assert reply.body["error"]["code"] == "request_too_large"
    assert "2,000 bytes" in reply.body["error"]["message"]
    assert len(layer.inner.bodies) == 1


@pytest.mark.parametrize("data", [b"", b"{", b"model=base", b"\xff\xfe", b'{"model": "base"', b"[" * 1900, b"\x00"])
def test_what_is_no_json_is_400(layer: Layer, data: bytes) -> None:
    reply = layer.ask("POST", CHAT, data)
    assert (reply.status, reply.body["error"]["code"]) == (400, "invalid_json")
    assert not layer.inner.scopes


@pytest.mark.parametrize(
    "value", [[], "base", 7, None, {}, {"model": None}, {"model": 7}, {"model": ["base"]}, {"Model": "base"}]
)
def test_a_body_without_a_model_is_400(layer: Layer, value: Any) -> None:
    reply = layer.ask("POST", CHAT, value)
    assert (reply.status, reply.body["error"]["code"]) == (400, "missing_model")
    assert not layer.inner.scopes


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"prompt_logprobs": 0}, 400),
        ({"prompt_logprobs": 5}, 400),
        ({"echo": True, "logprobs": 0}, 400),
        ({"echo": True, "logprobs": True}, 400),
        ({"prompt_logprobs": None}, 200),
        ({"echo": False, "logprobs": 2}, 200),
        ({"logprobs": 5}, 200),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_request_that_would_kill_the_engine_for_all_is_400(
    layer: Layer, path: str, more: dict[str, Any], status: int
) -> None:
    reply = layer.ask("POST", path, {"model": "base"} | PROMPTS[path] | more)
    assert reply.status == status
    assert len(layer.inner.bodies) == (status == 200)


def test_echo_asks_a_chat_for_what_kills_the_engine_and_a_completion_for_its_prompt(layer: Layer) -> None:
    """For a chat vLLM 0.32 makes prompt_logprobs of it (found by benches/fuzz.py)."""
    assert layer.ask("POST", CHAT, {"model": "base", "messages": [], "echo": True}).status == 400
    assert layer.ask("POST", COMPLETIONS, {"model": "base", "prompt": "x", "echo": True}).status == 200


def test_no_depth_of_nesting_is_a_500(layer: Layer) -> None:
    layer.app.max_request_bytes = 10**6
    for depth in (60, 70, 500, *range(900, 1000, 10), 10_000):
        data = b'{"model": "base", "tools": ' + b"[" * depth + b"]" * depth + b"}"
        assert layer.ask("POST", CHAT, data).status == (200 if depth == 60 else 400)


def test_a_client_that_leaves_while_sending_reaches_nothing(layer: Layer) -> None:
    reply = layer.ask("POST", CHAT, chunks=[b'{"model": "ba'], leaves=True)
    assert reply.status == 400
    assert not layer.inner.scopes


def test_vllm_learns_that_a_client_left_while_it_generated(layer: Layer) -> None:
    layer.say(kubectl="aaaa1111")
    layer.chat("kubectl")
    assert layer.inner.after == [{"type": "http.disconnect"}], "after the body it hears the real client"


def test_lifespan_passes_and_websockets_do_not(layer: Layer) -> None:
    async def nothing() -> Any:
        return {}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    for kind in ("lifespan", "websocket"):
        asyncio.run(layer.app({"type": kind, "path": "/v1/realtime", "headers": []}, nothing, send))
    assert [scope["type"] for scope in layer.inner.scopes] == ["lifespan"]


# API keys.


def write_keys(path: Path, **tier: Any) -> None:
    """One client, `team-a` with `key-a`, in a tier with these limits."""
    client = {"sha256": hashlib.sha256(b"key-a").hexdigest(), "tier": "low"}
    path.write_text(json.dumps({"tiers": {"low": tier}, "clients": {"team-a": client}}))


@pytest.fixture
def keyed(layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layer:
    """A layer that knows one client, whose key is `key-a`."""
    write_keys(tmp_path / "keys")
    monkeypatch.setenv("DRYDOCK_API_KEYS", str(tmp_path / "keys"))
    return Layer(layer.folder)


CLIENT_ROUTES = [("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/v1/models")]


@pytest.mark.parametrize(("method", "path"), CLIENT_ROUTES)
@pytest.mark.parametrize("headers", [(), [(b"authorization", b"Bearer guess")], [(b"api-key", b"guess")]])
def test_without_a_key_it_is_401_as_openai_says_it(keyed: Layer, method: str, path: str, headers: Any) -> None:
    keyed.say(kubectl="aaaa1111")
    reply = keyed.ask(method, path, {"model": "kubectl"}, headers)
    assert (reply.status, reply.headers[b"www-authenticate"]) == (401, b"Bearer")
    error = reply.body["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert "guess" not in json.dumps(reply.body)
    assert not keyed.inner.scopes


@pytest.mark.parametrize(("method", "path"), CLIENT_ROUTES)
@pytest.mark.parametrize("header", [(b"authorization", b"Bearer key-a"), (b"api-key", b"key-a")])
def test_with_its_key_a_client_is_served_and_vllm_does_not_see_it(
    keyed: Layer, method: str, path: str, header: tuple[bytes, bytes]
) -> None:
    keyed.say(kubectl="aaaa1111")
    reply = keyed.ask(method, path, {"model": "kubectl"} if method == "POST" else b"", [header, (b"x-a", b"b")])
    assert reply.status == 200
    for scope in keyed.inner.scopes:
        assert b"key-a" not in b"".join(value for _, value in scope["headers"])
        assert (b"x-a", b"b") in scope["headers"]
    assert len(keyed.inner.scopes) == (method == "POST")


def test_azures_paths_are_no_way_around_the_key(keyed: Layer) -> None:
    keyed.say(kubectl="aaaa1111")
    reply = keyed.ask("POST", DEPLOYMENT_CHAT, {"messages": []})
    assert (reply.status, reply.body["error"]["code"]) == (401, "401")
    for path in ("/openai/models", "/openai/v1/models", "/openai/v1/chat/completions"):
        method = "GET" if path.endswith("models") else "POST"
        assert keyed.ask(method, path, {"model": "kubectl"}).status == 401
    assert not keyed.inner.scopes
    assert keyed.ask("POST", DEPLOYMENT_CHAT, {"messages": []}, [(b"api-key", b"key-a")]).status == 200


def test_probes_metrics_and_the_sidecar_need_no_key(keyed: Layer) -> None:
    keyed.say()
    assert [keyed.ask("GET", path).status for path in ("/health", "/ready", "/metrics")] == [200, 200, 200]
    assert keyed.ask("POST", "/v1/completions", {"model": "kubectl.aaaa1111"}, keyed.token).status == 200
    assert keyed.ask("GET", "/v1/models", headers=keyed.token).status == 200
    assert keyed.ask("POST", "/v1/load_lora_adapter", {}, [(b"api-key", b"key-a")]).status == 404, "no client's route"


def test_an_emptied_key_file_closes_the_server_and_says_how_to_open_it(keyed: Layer, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("{}")
    reply = keyed.ask("POST", CHAT, {"model": "base"}, [(b"api-key", b"key-a")])
    assert reply.status == 401
    assert "pulumi config set --secret --path 'drydock:api_keys.CLIENT' VALUE" in reply.body["error"]["message"]


def test_an_empty_variable_is_no_open_door(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRYDOCK_API_KEYS", "")
    assert Layer(layer.folder).chat("base").status == 401


def test_without_the_variable_no_key_is_needed_and_headers_pass_as_they_are(layer: Layer) -> None:
    header = (b"authorization", b"Bearer whatever")
    assert layer.ask("POST", CHAT, {"model": "base"}, [header]).status == 200
    assert header in layer.inner.scopes[0]["headers"]


# Limits, counts and a heart.


def counted(outcome: str, tier: str = "standard", model: str = "base") -> float:
    return REGISTRY.get_sample_value(
        "drydock_requests_total", {"model": model, "tier": tier, "outcome": outcome}
    ) or 0.0  # fmt: skip


def test_a_tiers_limits_hold_from_the_next_request_on(keyed: Layer, tmp_path: Path) -> None:
    key = [(b"api-key", b"key-a")]
    ask = {"model": "base", "messages": [], "max_tokens": 11}
    assert keyed.ask("POST", CHAT, ask, key).status == 200
    write_keys(tmp_path / "keys", output_tokens=10)
    before = counted("invalid_value", "low")
    reply = keyed.ask("POST", CHAT, ask, key)
    assert (reply.status, reply.body["error"]["param"]) == (400, "max_tokens")
    assert counted("invalid_value", "low") == before + 1
    assert keyed.ask("POST", CHAT, ask | {"max_tokens": None}, key).status == 200
    assert json.loads(keyed.inner.bodies[-1])["max_tokens"] == 10


@pytest.mark.parametrize("tokens", [49, 50, 51])
def test_only_a_body_that_may_be_too_long_is_tokenised_and_by_vllm(keyed: Layer, tmp_path: Path, tokens: int) -> None:
    write_keys(tmp_path / "keys", prompt_tokens=50)
    keyed.app.app = keyed.inner.tokenizing(tokens)
    ask = {"model": "base", "messages": [{"role": "user", "content": "x"}], "temperature": 0.5}
    reply = keyed.ask("POST", CHAT, ask, [(b"api-key", b"key-a")])
    assert keyed.inner.scopes[0]["path"] == "/tokenize"
    assert json.loads(keyed.inner.bodies[0]) == {"model": "base", "messages": ask["messages"]}
    assert reply.status == (200 if tokens <= 50 else 400)
    if tokens > 50:
        assert reply.body["error"]["code"] == "context_length_exceeded"
        assert "is 50 tokens; yours has 51" in reply.body["error"]["message"]
    write_keys(tmp_path / "keys", prompt_tokens=4000)
    keyed.inner.scopes.clear()
    assert keyed.ask("POST", CHAT, ask, [(b"api-key", b"key-a")]).status == 200
    assert [scope["path"] for scope in keyed.inner.scopes] == [CHAT]


def test_a_prompt_that_cannot_be_counted_is_not_let_in(keyed: Layer, tmp_path: Path) -> None:
    write_keys(tmp_path / "keys", prompt_tokens=50)

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        keyed.inner.scopes.append(scope)
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "odd messages", "code": 400}}'})

    keyed.app.app = vllm
    reply = keyed.ask("POST", CHAT, {"model": "base", "messages": ["x"]}, [(b"api-key", b"key-a")])
    assert (reply.status, reply.body["error"]["message"]) == (400, "odd messages")
    assert [scope["path"] for scope in keyed.inner.scopes] == ["/tokenize"]


def test_what_is_refused_leaves_no_trace_in_the_counts_of_who_is_here(layer: Layer) -> None:
    for body in (b"{", {"model": "gpt-4"}, {"model": "base", "n": 1000}, {"model": "base", "messages": []}):
        layer.ask("POST", CHAT, body)
    assert layer.app.admission.in_flight == layer.app.awaited == 0
    assert REGISTRY.get_sample_value("drydock_requests_in_flight", {"tier": "standard"}) == 0


@pytest.mark.parametrize(
    ("answer", "status", "code", "outcome"),
    [
        ({"error": {"message": "too long", "type": "BadRequestError", "param": "input_tokens", "code": 400}}, 400,
         "context_length_exceeded", "context_length_exceeded"),
        ({"error": {"message": "bad", "type": "BadRequestError", "param": "top_p", "code": 400}}, 400, "invalid_value",
         "invalid_value"),
        ({"error": {"message": "boom", "type": "InternalServerError", "param": None, "code": 500}}, 500,
         "internal_error", "error"),
        ("Internal Server Error", 500, "internal_error", "error"),
        ({"detail": "x"}, 422, "invalid_value", "invalid_value"),
    ],
)  # fmt: skip
def test_vllms_errors_take_openais_shape_and_are_counted(
    layer: Layer, answer: Any, status: int, code: str, outcome: str
) -> None:
    body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:5], "more_body": True})
        await send({"type": "http.response.body", "body": body[5:]})

    layer.app.app = failing
    before = counted(outcome)
    reply = layer.chat("base")
    assert (reply.status, reply.body["error"]["code"]) == (status, code)
    assert set(reply.body["error"]) == {"message", "type", "param", "code"}
    assert reply.headers[b"content-type"] == b"application/json"
    assert counted(outcome) == before + 1


class Stream:
    """Stands for vLLM, which streams these events."""

    def __init__(self, *events: bytes) -> None:
        self.events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"transfer-encoding", b"chunked")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


LATE = b'data: {"error": {"message": "out of vocabulary", "type": "BadRequestError", "param": "stop", "code": 400}}\n\n'
BROKEN = b'data: {"error": {"message": "Internal server error", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("first", "more", "status", "code", "outcome"),
    [
        (LATE, {}, 400, "invalid_value", "invalid_value"),
        (BROKEN, {}, 500, "internal_error", "error"),
        (BROKEN, {"structured_outputs": {"json": "{}"}}, 400, "invalid_value", "invalid_value"),
        (BROKEN, {"tools": [], "tool_choice": "auto"}, 500, "internal_error", "error"),
    ],
)
def test_an_error_before_the_first_token_is_an_answer_with_its_status(
    layer: Layer, first: bytes, more: Any, status: int, code: str, outcome: str
) -> None:
    layer.app.app = Stream(first, DONE)
    before = counted(outcome)
    reply = layer.chat("base", stream=True, **more)
    assert (reply.status, reply.body["error"]["code"]) == (status, code)
    assert reply.headers[b"content-type"] == b"application/json" and b"transfer-encoding" not in reply.headers
    assert counted(outcome) == before + 1


def test_an_error_after_it_is_an_event_in_openais_shape_and_counts_as_one(layer: Layer) -> None:
    layer.app.app = Stream(b'data: {"choices": []}\n\n', BROKEN, DONE)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"model": "base", "stream": true}', "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    before = counted("error")
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "headers": []}
    asyncio.run(layer.app(scope, receive, send))
    assert sent[0]["status"] == 200
    events = b"".join(message.get("body", b"") for message in sent).split(b"\n\n")
    assert json.loads(events[1].removeprefix(b"data: "))["error"] == {
        "message": "Internal server error", "type": "server_error", "param": None, "code": "internal_error",
    }  # fmt: skip
    assert events[2] == b"data: [DONE]"
    assert counted("error") == before + 1


def test_a_context_exceeded_is_told_with_the_length_that_vllm_did_not_count_to_its_end(layer: Layer) -> None:
    error = {"message": "at least 4097", "type": "BadRequestError", "param": "input_tokens", "code": 400}

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        counting = scope["path"] == "/tokenize"
        body = json.dumps({"count": 5000} if counting else {"error": error}).encode()
        await send({"type": "http.response.start", "status": 200 if counting else 400, "headers": []})
        await send({"type": "http.response.body", "body": body})

    layer.app.app = vllm
    reply = layer.chat("base")
    assert reply.body["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 4,096 tokens" in reply.body["error"]["message"]
    assert "has 5,000" in reply.body["error"]["message"]


def test_an_engine_that_makes_no_step_is_seen_and_a_slow_client_is_no_such_engine(layer: Layer) -> None:
    layer.say()
    now, step = [0.0], [0]
    layer.app.heartbeat = Heartbeat(20, progress=lambda: step[0], clock=lambda: now[0])

    async def scenario() -> None:
        read, answer = asyncio.Event(), asyncio.Event()

        async def engine(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await answer.wait()
            await send({"type": "http.response.body", "body": b"{}"})

        async def receive() -> Any:
            return {"type": "http.request", "body": json.dumps({"model": "base"}).encode(), "more_body": False}

        async def slow(message: Any) -> None:
            if message["type"] == "http.response.body":
                await read.wait()

        layer.app.app = engine
        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "headers": []}
        task = asyncio.create_task(layer.app(scope, receive, slow))
        await asyncio.sleep(0)
        told: list[int] = [layer.app.awaited]
        for now[0] in (1.0, 10.0, 20.9):
            layer.app.heartbeat.look(layer.app.awaited)
        stalled = [layer.app.heartbeat.stalled]
        now[0] = 21.0
        layer.app.heartbeat.look(layer.app.awaited)
        stalled.append(layer.app.heartbeat.stalled)
        step[0] = 1
        layer.app.heartbeat.look(layer.app.awaited)
        stalled.append(layer.app.heartbeat.stalled)
        assert stalled == [False, True, False], "the last one since it moved"
        answer.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        told.append(layer.app.awaited)
        assert told == [1, 0], "the client has its answer, and takes its time to read it"
        for now[0] in (30.0, 60.0):
            assert layer.app.heartbeat.look(layer.app.awaited) == 0
        read.set()
        await task
        assert layer.app.awaited == 0

    asyncio.run(scenario())


def test_while_the_engine_hangs_the_replica_is_neither_ready_nor_healthy(layer: Layer) -> None:
    layer.say()
    now = [0.0]
    layer.app.heartbeat = Heartbeat(20, progress=lambda: 0, clock=lambda: now[0])
    for now[0] in (0.0, 25.0):
        layer.app.heartbeat.look(3)
    layer.app.awaited = 3
    assert [layer.ask("GET", path).status for path in ("/ready", "/health")] == [503, 503]
    assert not layer.inner.scopes, "vLLM, which would say 200, is not asked"


# Readiness and models.


def test_ready_follows_the_sidecars_word(layer: Layer) -> None:
    assert layer.ask("GET", "/ready").status == 503, "before it spoke"
    layer.say(ready=False, kubectl="aaaa1111")
    assert layer.ask("GET", "/ready").status == 503
    layer.say(ready=True, refused={"triage": "its canaries differ"}, kubectl="aaaa1111")
    reply = layer.ask("GET", "/ready")
    assert reply.status == 200
    assert reply.body == {
        "ready": True,
        "adapters": {"kubectl": "aaaa1111"},
        "refused": {"triage": "its canaries differ"},
    }
    assert not layer.inner.scopes


def test_models_lists_base_and_aliases_with_the_versions_behind_them(layer: Layer) -> None:
    layer.say(kubectl="aaaa1111", triage="bbbb2222")
    reply = layer.ask("GET", "/v1/models").body
    assert reply["object"] == "list"
    assert [model["id"] for model in reply["data"]] == ["base", "kubectl", "triage"]
    kubectl = reply["data"][1]
    assert kubectl == {
        "id": "kubectl", "object": "model", "created": 1700000000, "owned_by": "drydock",
        "root": "kubectl.aaaa1111", "parent": "base", "digest": "sha256:aaaa1111", "base": "tiny@sha256:cccc",
        "evaluation": {"metric": "exact_match", "score": 0.9, "base_score": 0.1},
    }  # fmt: skip


# What both share.


def test_the_alias_file_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    plain = Path.read_bytes

    def read(self: Path) -> bytes:
        reads.append(1)
        return plain(self)

    monkeypatch.setattr(Path, "read_bytes", read)
    boot = new_boot(tmp_path)
    reader = AliasReader(tmp_path, boot)
    assert not reader.current().ready
    write_aliases(tmp_path, Aliases(boot=boot, ready=True))
    assert [reader.current().ready for _ in range(5)] == [True] * 5
    assert len(reads) == 1
    write_aliases(tmp_path, Aliases(boot=boot, ready=False))
    assert not reader.current().ready
    os.unlink(tmp_path / "aliases.json")
    assert not reader.current().ready


def test_reading_the_aliases_costs_a_request_next_to_nothing(tmp_path: Path) -> None:
    boot = new_boot(tmp_path)
    reader = AliasReader(tmp_path, boot)
    write_aliases(tmp_path, Aliases(boot=boot, ready=True))
    started = time.process_time()
    for _ in range(1000):
        reader.current()
    assert time.process_time() - started < 0.3, "far below a millisecond each"


def test_two_processes_that_start_together_agree_on_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine and sidecar both prepare the folder; here the other one comes first by the width of a hair."""
    told: list[str] = []
    plain = secrets.token_hex

    def slow(size: int) -> str:
        monkeypatch.setattr(secrets, "token_hex", plain)
        prepare(tmp_path)
        told.append(read_token(tmp_path))  # what the other process will use from now on
        return plain(size)

    monkeypatch.setattr(secrets, "token_hex", slow)
    prepare(tmp_path)
    assert told == [read_token(tmp_path)]
    assert len(told[0]) == 64
