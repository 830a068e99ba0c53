"""Errors in OpenAI's shape: what the request layer refuses, and what vLLM says in a shape of its own."""

from __future__ import annotations

import json
from typing import Any


class Refusal(Exception):
    """A request is not served. `status` and `code` as OpenAI's API has them; `param` is the field to change."""

    def __init__(
        self, status: int, message: str, code: str | None, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Those that belong to this status."""
        if self.status == 401:
            return [(b"www-authenticate", b"Bearer")]
        return [] if self.retry_after is None else [(b"retry-after", str(self.retry_after).encode())]

    @property
    def body(self) -> bytes:
        """The JSON of it."""
        return json.dumps({"error": shape(self.status, self.message, self.code, self.param)}).encode()


def shape(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, str | None]:
    """The object `error` of an answer."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"message": message, "type": kind, "param": param, "code": code}


# What vLLM 0.32 puts into `param` when a prompt does not fit (vllm/renderers/params.py).
_TOO_LONG = ("input_tokens", "input_text")


def from_vllm(status: int, body: bytes, *, grammar: bool = False) -> Refusal:
    """vLLM's own error answer, whose `code` repeats the status and whose `type` is the name of a Python class.

    `grammar`: the answer was held to a schema or grammar. One that allows no token ends, in vLLM 0.32, as a failure of
    its own, and so many of these would make the router think that the replica is ill.
    """
    try:
        error: Any = json.loads(body)
        error = error.get("error", error)
        message, param = str(error["message"]), error.get("param")
    except (ValueError, LookupError, TypeError, AttributeError):
        message, param = body.decode(errors="replace")[:1000] or f"vLLM answered {status}", None
    if status == 500 and grammar and message == "Internal server error":
        return Refusal(400, "the schema or grammar of this request allows no answer", "invalid_value")
    if status == 404:
        code = "model_not_found"  # the version was unloaded just now
    elif status < 500:
        code = "context_length_exceeded" if param in _TOO_LONG else "invalid_value"
    else:
        code = "internal_error"
    return Refusal(status, message, code, param=param if isinstance(param, str) else None)
