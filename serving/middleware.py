"""The request layer inside the vLLM process (`--middleware`): routes, keys, limits, aliases, readiness. No extra hop.

vLLM serves far more routes than clients need, some of which load adapters or run arbitrary RPCs, and its API key
guards only a part of them. Here a route is closed unless this file opens it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from serving import requests
from serving.admission import Admission
from serving.errors import Refusal, from_vllm
from serving.heartbeat import Heartbeat
from serving.keys import ANYONE, Caller, Keys, without_key
from serving.spec import Tier
from serving.startup import Phases
from serving.state import TOKEN_HEADER, Aliases, AliasReader, loaded_name, new_boot, prepare, read_token
from serving.traffic import IN_FLIGHT, STALLED, Answer

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

GENERATE = {("POST", requests.CHAT), ("POST", requests.COMPLETIONS)}
OPEN = GENERATE | {("GET", "/v1/models"), ("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics")}
# Azure OpenAI's paths of the same routes (its REST reference, data plane): its newer ones and, with a deployment in the
# path that stands for the model, those that its clients have asked for since 2023. `api-version` is taken and ignored.
AZURE = re.compile(
    r"/openai/(?:v1|deployments/(?P<deployment>[A-Za-z0-9][A-Za-z0-9._-]*))(?P<route>/(?:chat/)?completions)"
)
AZURE_MODELS = ("/openai/v1/models", "/openai/models")
DEPLOYMENT = b"x-drydock-deployment"  # the deployment's name, where serving/front.cfg has already changed the path
SIDECAR_ONLY = {("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")}

BODY_SECONDS = 30.0
"""For a whole request body to arrive."""
BEAT_SECONDS = 1.0


class RequestLayer:
    """ASGI middleware; vLLM makes one per server process and gives it nothing but the next application."""

    def __init__(self, app: App) -> None:
        self.app = app
        folder = Path(os.environ["DRYDOCK_STATE"])
        self.base_name = os.environ["DRYDOCK_BASE_NAME"]
        self.max_request_bytes = int(os.environ["DRYDOCK_MAX_REQUEST_BYTES"])
        self.max_model_len = int(os.environ["DRYDOCK_MAX_MODEL_LEN"])
        self.admission = Admission(int(os.environ["DRYDOCK_MAX_NUM_SEQS"]))
        self.heartbeat = Heartbeat(float(os.environ["DRYDOCK_STALL_SECONDS"]))
        prepare(folder)
        self.phases = Phases(folder)
        self.awaited = 0  # requests that wait for the engine: not for a client that is slow to send, or to read
        self.token = read_token(folder).encode()
        self.aliases = AliasReader(folder, new_boot(folder))
        api_keys = os.environ.get("DRYDOCK_API_KEYS")
        self.keys = None if api_keys is None else Keys(Path(api_keys))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._live(scope, receive, send)
            return  # a websocket is closed by not being answered: no client of the OpenAI API needs one here
        scope, deployment = _as_openai(scope)
        route = (scope["method"], scope["path"])
        given = dict(scope["headers"]).get(TOKEN_HEADER.encode(), b"")
        if given and hmac.compare_digest(given, self.token) and route in OPEN | SIDECAR_ONLY:
            await self.app(scope, receive, send)
        elif route not in OPEN:
            await _refuse(send, Refusal(404, f"{route[0]} {route[1]} is not served here", "not_found"))
        elif route in GENERATE:
            await self._generate(scope, receive, send, deployment)
        elif route == ("GET", "/v1/models"):
            try:
                self._caller(scope, azure=False)
            except Refusal as refusal:
                return await _refuse(send, refusal)
            await _json(send, 200, {"object": "list", "data": self._models(self.aliases.current())})
        elif route == ("GET", "/ready"):
            await self._ready(send)
        elif route == ("GET", "/health") and self.heartbeat.stalled:
            await _json(send, 503, {"stalled_seconds": round(self.heartbeat.look(self.awaited), 1)})
        else:
            await self.app(scope, receive, send)

    def _caller(self, scope: Message, *, azure: bool) -> Caller:
        """Who asks. Raises `Refusal` (401) for who has no key of ours; its code is Azure's own for its clients."""
        if self.keys is None:
            return ANYONE
        caller = self.keys.caller(scope["headers"])
        if isinstance(caller, str):
            raise Refusal(401, caller, "401" if azure else "invalid_api_key")
        return caller

    async def _live(self, scope: Message, receive: Receive, send: Send) -> None:
        """The server's whole life, with the engine's heart felt each second beside it."""
        REGISTRY.register(self.phases)
        beat = asyncio.create_task(self._beat())
        try:
            await self.app(scope, receive, send)
        finally:
            beat.cancel()
            REGISTRY.unregister(self.phases)

    async def _beat(self) -> None:
        while True:
            if self.aliases.current().ready:
                self.phases.mark_ready()
            stalled = self.heartbeat.stalled
            STALLED.set(seconds := self.heartbeat.look(self.awaited))
            if self.heartbeat.stalled and not stalled:
                log.error("the engine has made no step for %.0f s while %d requests wait for it: not ready, and "
                          "/health fails until it does", seconds, self.awaited)  # fmt: skip
            elif stalled and not self.heartbeat.stalled:
                log.warning("the engine moves again")
            await asyncio.sleep(BEAT_SECONDS)

    async def _ready(self, send: Send) -> None:
        current = self.aliases.current()
        ready = current.ready and not self.heartbeat.stalled
        body = {
            "ready": ready,
            "adapters": {alias: served.version for alias, served in current.aliases.items()},
            "refused": current.refused,
        }
        await _json(send, 200 if ready else 503, body)

    def _models(self, current: Aliases) -> list[dict[str, Any]]:
        base = {"id": self.base_name, "object": "model", "created": int(time.time()), "owned_by": "drydock"}
        adapters = [
            {
                "id": alias,
                "object": "model",
                "created": int(served.since),
                "owned_by": "drydock",
                "root": loaded_name(alias, served.version),
                "parent": self.base_name,
                "digest": served.digest,
                "base": served.base,
                "evaluation": {"metric": served.metric, "score": served.score, "base_score": served.base_score},
            }
            for alias, served in current.aliases.items()
        ]
        return [base, *adapters]

    async def _generate(self, scope: Message, receive: Receive, send: Send, deployment: str | None) -> None:
        """Answer one request for text, or say why not; either way it is counted. A `deployment` is Azure's model."""
        answer = Answer(send)
        heard = _Heard(receive)
        try:
            caller = self._caller(scope, azure=deployment is not None)
            answer.tier = caller.tier
            self.admission.enter(caller)
            in_flight = IN_FLIGHT.labels(caller.tier)
            in_flight.inc()
            try:
                request = await self._read(heard)
                if deployment:
                    request["model"] = deployment
                route = scope["path"]
                answer.model = self._resolve(request, azure=deployment is not None)
                requests.check(request, route, caller.limits, self.max_model_len)
                body = requests.dump(request)
                await self._measure(scope, request, body, caller.limits)
                forwarded = _resized(scope, body)
                if self.keys:
                    forwarded["headers"] = without_key(forwarded["headers"])

                async def refine(refusal: Refusal) -> Refusal:
                    if refusal.code != "context_length_exceeded":
                        return refusal
                    try:
                        tokens = await self._longest(scope, request)  # vLLM stops counting at the limit
                    except Refusal:
                        return refusal
                    return requests.too_long(tokens, self.max_model_len, self.max_model_len, route)

                answer.grammar = requests.has_grammar(request)
                answer.refine = refine
                self._await(+1)
                answer.awaited = self._await
                try:
                    await self.app(forwarded, _replay(body, heard), answer)
                finally:
                    self._await(-1)
            finally:
                self.admission.leave(caller)
                in_flight.dec()
        except Refusal as refusal:
            answer.outcome = None if heard.gone else refusal.code
            await _refuse(send, refusal)
        finally:
            answer.count(heard.gone)

    def _await(self, change: int) -> None:
        self.awaited += change

    async def _read(self, heard: _Heard) -> dict[str, Any]:
        """The body as an object with a `model`, which may be None. Raises `Refusal` (400, 408, 413)."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(heard, self.max_request_bytes)
        except TimeoutError:
            raise Refusal(408, f"the request did not arrive within {BODY_SECONDS:.0f} s", "timeout") from None
        return requests.parse(body)

    def _resolve(self, request: dict[str, Any], *, azure: bool) -> str:
        """Put the loaded version in place of the alias in `model`; the name it is counted by. Raises `Refusal`."""
        model = request.get("model")
        if not isinstance(model, str):
            raise Refusal(400, "the request body needs a string `model`", "missing_model", param="model")
        aliases = self.aliases.current().aliases
        names = {alias: loaded_name(alias, served.version) for alias, served in aliases.items()}
        if model in names:
            request["model"] = names[model]
            return model
        if model == self.base_name:
            return model
        for alias, name in names.items():
            if model == name:
                return alias
        known = ", ".join([self.base_name, *names])
        what, code = ("deployment", "DeploymentNotFound") if azure else ("model", "model_not_found")
        raise Refusal(404, f"{what} {model!r:.200} does not exist; served here: {known}", code, param="model")

    async def _measure(self, scope: Message, request: dict[str, Any], body: bytes, limits: Tier) -> None:
        """Hold the prompts against the tier's own limit. Raises `Refusal` (400) with both figures.

        Only what may exceed it is tokenised. The context is vLLM's to check, which tokenises anyhow.
        """
        limit = limits.prompt_tokens
        if limit is None or limit >= self.max_model_len or not requests.may_exceed(body, request, limit):
            return
        tokens = await self._longest(scope, request)
        if tokens > limit:
            raise requests.too_long(tokens, limit, self.max_model_len, scope["path"])

    async def _longest(self, scope: Message, request: dict[str, Any]) -> int:
        """Tokens of the longest prompt, counted by vLLM itself: as it will be, template and all."""
        tokens = requests.longest_given(request)
        for asked in requests.tokenize_requests(request, scope["path"]):
            tokens = max(tokens, await self._count(scope, requests.dump(asked)))
        return tokens

    async def _count(self, scope: Message, body: bytes) -> int:
        """Tokens of what /tokenize is asked. Raises `Refusal` where it refuses: what cannot be counted stays out."""
        parts: list[bytes] = []
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        inner = {**scope, "path": "/tokenize", "raw_path": b"/tokenize", "query_string": b"", "headers": headers}
        await self.app(inner, _replay(body, _stays), note)
        if status != 200:
            raise from_vllm(status, b"".join(parts))
        return int(json.loads(b"".join(parts))["count"])


def _as_openai(scope: Message) -> tuple[Message, str | None]:
    """`scope` with OpenAI's path where it has one of Azure's, and the deployment that stands for the model."""
    headers = [(name, value) for name, value in scope["headers"] if name != DEPLOYMENT]
    deployment = next((value.decode("latin-1") for name, value in scope["headers"] if name == DEPLOYMENT), None)
    path = scope["path"]
    if match := AZURE.fullmatch(path):
        deployment, path = match["deployment"], f"/v1{match['route']}"
    elif path in AZURE_MODELS:
        path = "/v1/models"
    elif deployment is None:
        return scope, None
    return {**scope, "path": path, "raw_path": path.encode(), "headers": headers}, deployment


class _Heard:
    """A `receive` that notes when the client leaves."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message


def _replay(body: bytes, then: Receive) -> Receive:
    """A `receive` that gives `body` first, and then what `then` gives."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await then()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _stays() -> Message:
    """A `receive` of a client that never leaves, for which vLLM listens."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody ends this future")


async def _body(receive: Receive, limit: int) -> bytes:
    """The whole body, empty when the client left. Raises `Refusal` (413) as soon as it exceeds `limit` bytes."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise Refusal(413, f"the request body exceeds {limit:,} bytes", "request_too_large")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def _resized(scope: Message, body: bytes) -> Message:
    headers = [
        (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")
    ]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


async def _refuse(send: Send, refusal: Refusal) -> None:
    await _send(send, refusal.status, refusal.body, *refusal.headers)


async def _json(send: Send, status: int, value: Any) -> None:
    await _send(send, status, json.dumps(value).encode())


async def _send(send: Send, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
