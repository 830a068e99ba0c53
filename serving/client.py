"""The few calls that evaluation and the sidecar make to a vLLM server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from common.chat import Message
from serving.state import TOKEN_HEADER

SECONDS_PER_TOKEN = 0.2
"""The slowest that an answer may come, its share of a full batch: a longer answer is given longer."""


class EngineError(RuntimeError):
    """The server answered with an error; the text holds its status and message."""

    def __init__(self, path: str, status: int, message: str) -> None:
        super().__init__(f"{path}: {status}: {message[:500]}")
        self.status = status

    @property
    def final(self) -> bool:
        """Whether asking again would give the same answer: the request is at fault, not the server."""
        return 400 <= self.status < 500 and self.status not in (408, 429)


class Answer(NamedTuple):
    """A greedy answer: its text, all token ids (prompt, then answer) and how many of them are the prompt."""

    text: str
    token_ids: list[int]
    prompt_length: int


class Engine:
    """A vLLM server at `url`, asked with the sidecar's token where one is given. Safe to share between threads."""

    def __init__(self, url: str, token: str | None = None, timeout_seconds: float = 120.0) -> None:
        headers = {TOKEN_HEADER: token} if token else {}
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        self._timeout = timeout_seconds
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_seconds, limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def _post(self, path: str, body: dict[str, Any], more_seconds: float = 0.0) -> httpx.Response:
        response = self._http.post(path, json=body, timeout=self._timeout + more_seconds)
        if response.status_code != 200:
            raise EngineError(path, response.status_code, response.text)
        return response

    def answer(self, model: str, messages: Sequence[Message], max_tokens: int) -> Answer:
        """The greedy answer of `model`: the likeliest token at each place, at most `max_tokens`."""
        body = {
            "model": model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
            "return_token_ids": True,  # vLLM's addition to the OpenAI API
        }
        reply = self._post("/v1/chat/completions", body, SECONDS_PER_TOKEN * max_tokens).json()
        choice = reply["choices"][0]
        prompt = list(reply["prompt_token_ids"])
        return Answer(choice["message"]["content"] or "", prompt + list(choice["token_ids"]), len(prompt))

    def log_probabilities(self, model: str, token_ids: Sequence[int], prompt_length: int) -> list[float]:
        """Natural log-probability that `model` gives each token after the first `prompt_length`.

        The tokens are given, not generated, so that two servers are asked the very same question even where rounding
        would tip a greedy choice: one request a token, which allows that token alone; vLLM reports its probability
        from before that restriction (logprobs mode raw_logprobs, the default). `prompt_logprobs` would be one request,
        but vLLM 0.32 dies of it when a LoRA server has others in the batch (see `serving.middleware`).
        """

        def one(position: int) -> float:
            body = {
                "model": model,
                "prompt": list(token_ids[:position]),
                "allowed_token_ids": [token_ids[position]],
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 0,  # of the token alone
            }
            told = self._post("/v1/completions", body).json()["choices"][0]["logprobs"]
            return float(told["token_logprobs"][0])

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, range(prompt_length, len(token_ids))))

    def models(self) -> set[str]:
        """Every name that the server itself knows: the base and the versions loaded now."""
        response = self._http.get("/v1/models")
        response.raise_for_status()
        return {model["id"] for model in response.json()["data"]}

    def load(self, name: str, folder: Path) -> None:
        """Load the PEFT adapter in `folder` as `name`."""
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})

    def unload(self, name: str) -> None:
        """Forget `name`; requests that run on it end undisturbed."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name})
