"""The limits of a client's tier on the real engine: counted as it counts, refused as OpenAI says it, seen on /metrics."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from typing import Any

import httpx
import openai
import pytest

from tests.contract.conftest import Replica, wait_until

LONG = "kubectl get pods --all-namespaces " * 20  # some hundreds of tokens of the rehearsal's tokenizer


def client(replica: Replica, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{replica.url}/v1", api_key=key, max_retries=0)


def counted(replica: Replica, **labels: str) -> float:
    """Sum of drydock_requests_total over the series with these labels."""
    total = 0.0
    for line in httpx.get(f"{replica.url}/metrics", timeout=10).text.splitlines():
        if line.startswith("drydock_requests_total{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rpartition(" ")[2])
    return total


def test_a_long_prompt_is_refused_with_the_count_that_the_engine_itself_would_bill(replica: Replica) -> None:
    answered = replica.chat("base", LONG, max_tokens=1).json()["usage"]["prompt_tokens"]
    assert answered > 200
    before = counted(replica, tier="tier-low", model="base", outcome="context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as refused:
        client(replica, "low").chat.completions.create(model="base", messages=[{"role": "user", "content": LONG}])
    assert refused.value.code == "context_length_exceeded"
    assert f"is 200 tokens; yours has {answered:,}" in str(refused.value)
    assert counted(replica, tier="tier-low", model="base", outcome="context_length_exceeded") == before + 1


def test_a_prompt_is_measured_in_tokens_not_in_bytes(replica: Replica) -> None:
    """Five times as many bytes as tokens are allowed, and fewer tokens."""
    text = "kubectl get pods " * 30
    tokens = replica.post("/v1/completions", {"model": "base", "prompt": text, "max_tokens": 1}).json()["usage"]
    reply = replica.post("/v1/completions", {"model": "base", "prompt": text, "max_tokens": 1}, key="low")
    assert reply.status_code == (200 if tokens["prompt_tokens"] <= 200 else 400)
    short = {"model": "base", "prompt": "kubectl " * 60, "max_tokens": 1}
    reply = replica.post("/v1/completions", short, key="low")
    assert reply.status_code == 200 and reply.json()["usage"]["prompt_tokens"] < len("kubectl " * 60) / 2
    ids = {"model": "base", "prompt": [5] * 201, "max_tokens": 1}
    assert replica.post("/v1/completions", ids, key="low").json()["error"]["code"] == "context_length_exceeded"
    assert replica.post("/v1/completions", ids | {"prompt": [5] * 200}, key="low").status_code == 200


def test_the_context_is_the_limit_of_those_who_have_no_other(replica: Replica) -> None:
    reply = replica.chat("base", LONG * 10)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"], error["param"]) == (
        400, "context_length_exceeded", "invalid_request_error", "messages",
    )  # fmt: skip
    told = re.search(r"maximum context length is 1,024 tokens, .* your prompt has ([0-9,]+)", error["message"])
    assert told and int(told[1].replace(",", "")) > 1024


def test_at_the_edge_of_the_context_layer_and_engine_agree(replica: Replica) -> None:
    for tokens, status in ((1023, 200), (1024, 400), (1025, 400)):
        for stream in (False, True):
            body = {"model": "base", "prompt": [5] * tokens, "max_tokens": 1, "ignore_eos": True, "stream": stream}
            reply = replica.post("/v1/completions", body)
            assert reply.status_code == status, (tokens, reply.text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "more",
    [{"structured_outputs": {"json": '{"$ref": "#"}'}}, {"stop_token_ids": [10**6]}, {"logit_bias": {"9999999": 1}}],
    ids=["grammar", "stop", "bias"],
)
def test_what_only_the_engine_finds_wrong_is_400_also_for_a_stream(replica: Replica, more: Any, stream: bool) -> None:
    reply = replica.post("/v1/completions", {"model": "base", "prompt": "a b c", "stream": stream, **more})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert replica.chat("base", "hi", max_tokens=1).status_code == 200


def test_an_answer_ends_at_the_longest_that_the_tier_allows(replica: Replica) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    assert replica.post("/v1/chat/completions", body, key="low").json()["usage"]["completion_tokens"] == 20
    refused = replica.post("/v1/chat/completions", body | {"max_completion_tokens": 21}, key="low").json()["error"]
    assert refused["message"] == "max_completion_tokens is too large: 21; at most 20 tokens are answered"
    reply = replica.post("/v1/chat/completions", body | {"n": 3}, key="low")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")


def test_more_at_once_than_the_tier_allows_is_429_until_one_has_ended(replica: Replica) -> None:
    """Two requests that are still being sent hold the two places of this client."""
    host, port = replica.url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\napi-key: low\r\ncontent-length: 100\r\n\r\n{"
    body = {"model": "base", "prompt": "x", "max_tokens": 2}

    def status() -> int:
        return replica.post("/v1/completions", body, key="low").status_code

    with contextlib.ExitStack() as stack:
        for _ in range(2):
            begun = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            begun.sendall(head.encode())
        wait_until(lambda: status() == 429, 20, "both are there")
        refused = replica.post("/v1/completions", body, key="low")
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("concurrency_limit_exceeded", "rate_limit_error")
        assert refused.headers["retry-after"] == "1"
        assert replica.post("/v1/completions", body).status_code == 200, "another client has places of its own"
    wait_until(lambda: status() == 200, 20, "they left")


def test_a_crowd_is_turned_away_and_the_others_are_served(replica: Replica) -> None:
    """The engine computes 32 at once; of this tier two may wait."""
    body = {"model": "base", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    replies: list[httpx.Response] = []
    # One for all: making one takes longer than the engine does for some answers.
    http = httpx.Client(base_url=replica.url, headers={"api-key": "crowd"}, timeout=120, limits=httpx.Limits())

    def ask() -> None:
        replies.append(http.post("/v1/completions", json=body))

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    wait_until(lambda: any(reply.status_code == 429 for reply in replies), 30, "somebody is turned away")
    assert replica.chat("base", "hi", max_tokens=2).status_code == 200, "who is in a higher tier"
    for thread in threads:
        thread.join()
    refused = [reply for reply in replies if reply.status_code == 429]
    assert {reply.status_code for reply in replies} == {200, 429}
    assert 20 <= len(refused) <= 26 or len(replies) - len(refused) >= 34, len(refused)
    assert all(1 <= int(reply.headers["retry-after"]) <= 60 for reply in refused)
    assert "waiting on this replica; the limit of tier tier-crowd is 2" in refused[0].json()["error"]["message"]
    assert refused[0].json()["error"]["type"] == "rate_limit_error"


def test_what_happened_is_on_metrics_by_alias_tier_and_outcome(replica: Replica) -> None:
    before = counted(replica, tier="tier-any", model="base", outcome="ok")
    replica.chat("base", "hi", max_tokens=2)
    with httpx.stream(
        "POST", f"{replica.url}/v1/chat/completions", headers={"api-key": "any"}, timeout=60,
        json={"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True},
    ) as reply:  # fmt: skip
        assert [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    assert counted(replica, tier="tier-any", model="base", outcome="ok") == before + 2
    with httpx.stream(
        "POST", f"{replica.url}/v1/completions", headers={"api-key": "any"}, timeout=60,
        json={"model": "base", "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True},
    ) as reply:  # fmt: skip
        next(reply.iter_lines())
    wait_until(lambda: counted(replica, tier="tier-any", outcome="client_gone") >= 1, 20, "who left is counted")
    refused = httpx.post(f"{replica.url}/v1/completions", json={}, headers={"api-key": "guess"}, timeout=10)
    assert refused.status_code == 401
    assert counted(replica, outcome="invalid_api_key") >= 1
    text = httpx.get(f"{replica.url}/metrics", timeout=10).text
    for name in (
        "drydock_time_to_first_token_seconds_bucket",
        "drydock_request_seconds_sum",
        "drydock_requests_in_flight",
    ):
        assert re.search(rf'^{name}{{.*tier="tier-any"', text, re.MULTILINE), name
    assert re.search(r"^drydock_engine_stalled_seconds 0.0", text, re.MULTILINE)


def test_an_answer_in_a_schema_is_in_that_schema(replica: Replica) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer: Any = client(replica, "any").chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content)["a"] in ("x", "y")
