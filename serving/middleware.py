"""The request layer inside the vLLM process (`--middleware`): routes, keys, aliases, readiness. No hop of its own.

vLLM serves far more routes than clients need, some of which load adapters or run arbitrary RPCs, and its API key
guards only a part of them. Here a route is closed unless this file opens it.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from serving.keys import Keys, without_key
from serving.state import TOKEN_HEADER, Aliases, AliasReader, loaded_name, new_boot, prepare, read_token

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

GENERATE = {("POST", "/v1/chat/completions"), ("POST", "/v1/completions")}
OPEN = GENERATE | {("GET", "/v1/models"), ("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics")}
# Azure OpenAI's paths of the same routes (its REST reference, data plane): its newer ones and, with a deployment in the
# path that stands for the model, those that its clients have asked for since 2023. `api-version` is taken and ignored.
AZURE = re.compile(
    r"/openai/(?:v1|deployments/(?P<deployment>[A-Za-z0-9][A-Za-z0-9._-]*))(?P<route>/(?:chat/)?completions)"
)
AZURE_MODELS = ("/openai/v1/models", "/openai/models")
DEPLOYMENT = b"x-drydock-deployment"  # the deployment's name, where serving/front.cfg has already changed the path
KEYED = GENERATE | {("GET", "/v1/models")}  # the others are for kubelet and Prometheus, which have no key
SIDECAR_ONLY = {("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")}

# Seen with vLLM 0.32 and --enable-lora: prompt log-probabilities beside another request in the batch end in a shape
# error in the LoRA logits layer that stops the engine, and with it every request of the replica.
NO_PROMPT_LOGPROBS = "prompt_logprobs, and echo with logprobs, are not served here; logprobs of the answer are"


class RequestLayer:
    """ASGI middleware; vLLM makes one per server process and gives it nothing but the next application."""

    def __init__(self, app: App) -> None:
        self.app = app
        folder = Path(os.environ["DRYDOCK_STATE"])
        self.base_name = os.environ["DRYDOCK_BASE_NAME"]
        self.max_request_bytes = int(os.environ["DRYDOCK_MAX_REQUEST_BYTES"])
        prepare(folder)
        self.token = read_token(folder).encode()
        self.aliases = AliasReader(folder, new_boot(folder))
        api_keys = os.environ.get("DRYDOCK_API_KEYS")
        self.keys = None if api_keys is None else Keys(Path(api_keys))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a websocket is closed by not being answered: no client of the OpenAI API needs one here
        scope, deployment = _as_openai(scope)
        route = (scope["method"], scope["path"])
        given = dict(scope["headers"]).get(TOKEN_HEADER.encode(), b"")
        if given and hmac.compare_digest(given, self.token) and route in OPEN | SIDECAR_ONLY:
            await self.app(scope, receive, send)
        elif route not in OPEN:
            await _error(send, 404, f"{route[0]} {route[1]} is not served here", "not_found")
        elif self.keys and route in KEYED and (refusal := self.keys.refusal(scope["headers"])):
            code = "401" if deployment else "invalid_api_key"  # as Azure says it
            await _error(send, 401, refusal, code, (b"www-authenticate", b"Bearer"))
        elif route == ("GET", "/ready"):
            await self._ready(send)
        elif route == ("GET", "/v1/models"):
            await _json(send, 200, {"object": "list", "data": self._models(self.aliases.current())})
        elif route in GENERATE:
            await self._generate(scope, receive, send, deployment)
        else:
            await self.app(scope, receive, send)

    async def _ready(self, send: Send) -> None:
        current = self.aliases.current()
        body = {
            "ready": current.ready,
            "adapters": {alias: served.version for alias, served in current.aliases.items()},
            "refused": current.refused,
        }
        await _json(send, 200 if current.ready else 503, body)

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
            }
            for alias, served in current.aliases.items()
        ]
        return [base, *adapters]

    async def _generate(self, scope: Message, receive: Receive, send: Send, deployment: str | None) -> None:
        """Check the body's `model` and put the loaded version in place of the alias. A `deployment` is that alias."""
        body = await _body(receive, self.max_request_bytes)
        if body is None:
            message = f"the request body exceeds {self.max_request_bytes:,} bytes"
            return await _error(send, 413, message, "request_too_large")
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            return await _error(send, 400, f"the request body is not JSON: {error}", "invalid_json")
        if deployment and isinstance(request, dict):
            request["model"] = deployment
            body = json.dumps(request).encode()
        if not isinstance(request, dict) or not isinstance(request.get("model"), str):
            return await _error(send, 400, "the request body needs a string `model`", "missing_model")
        if request.get("prompt_logprobs") is not None or (request.get("echo") and request.get("logprobs") is not None):
            return await _error(send, 400, NO_PROMPT_LOGPROBS, "unsupported_parameter")
        current = self.aliases.current()
        names = {alias: loaded_name(alias, served.version) for alias, served in current.aliases.items()}
        model = request["model"]
        if model in names:
            request["model"] = names[model]
            body = json.dumps(request).encode()
        elif model != self.base_name and model not in names.values():
            known = ", ".join([self.base_name, *names])
            what, code = ("deployment", "DeploymentNotFound") if deployment else ("model", "model_not_found")
            return await _error(send, 404, f"{what} {model!r} does not exist; served here: {known}", code)
        forwarded = _resized(scope, body)
        if self.keys:
            forwarded["headers"] = without_key(forwarded["headers"])
        await self.app(forwarded, _replay(body, receive), send)


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


async def _body(receive: Receive, limit: int) -> bytes | None:
    """The whole request body, or None as soon as it exceeds `limit` bytes."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def _resized(scope: Message, body: bytes) -> Message:
    headers = [
        (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")
    ]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first and then waits for the real one, which tells when the client leaves."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _error(send: Send, status: int, message: str, code: str, *headers: tuple[bytes, bytes]) -> None:
    """An answer in the shape of OpenAI's errors."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    await _json(send, status, {"error": error}, *headers)


async def _json(send: Send, status: int, value: Any, *more: tuple[bytes, bytes]) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
