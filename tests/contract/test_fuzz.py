"""A short attack of `make fuzz`: always the same requests, on a replica of its own with a tier of narrow limits."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import httpx

from benches.fuzz import CONTEXT, TIERS, Answer, Attack, Case, Fault, Target, cases, schemas, wrong
from benches.replica import Server, spec_of
from common.processes import Processes

REQUESTS = 300
PLAIN = Case(0, "/v1/completions", b'{"model": "base", "prompt": "a"}')


def test_generated_requests_find_nothing(tmp_path: Path) -> None:
    with Processes() as processes:
        server = Server(processes, tmp_path, spec_of(tmp_path / "store", adapters=(), max_model_len=CONTEXT))
        server.start_engine(TIERS)
        server.wait("/health")
        attack = Attack(Target(server.url, server.key, ("base",), TIERS["fuzz"]))
        alive = asyncio.run(attack.run(itertools.islice(cases(1, ("base",), schemas()), REQUESTS)))
        assert alive, [case.content for case in attack.lost]
    assert not attack.faults, [fault.as_json() for fault in attack.faults.values()]
    assert attack.statuses.total() == REQUESTS
    assert attack.statuses[200] > REQUESTS / 4  # it is no attack if all is refused at the door
    assert attack.statuses[400] > REQUESTS / 4


def test_the_same_seed_makes_the_same_requests() -> None:
    known = schemas()
    first, again, other = (
        [case.content for case in itertools.islice(cases(seed, ("base",), known), 50)] for seed in (7, 7, 8)
    )
    assert first == again != other


def test_what_counts_as_a_fault() -> None:
    tier = {"prompt_tokens": 10, "output_tokens": 4, "n": 2}

    def seen(status: int, text: str) -> str | None:
        return wrong(PLAIN, Answer(status, text), tier)

    usage = '"usage": {"prompt_tokens": 3, "completion_tokens": %d}'
    assert seen(200, '{"choices": [{}], %s}' % (usage % 4)) is None
    assert seen(200, '{"choices": [{}, {}], %s}' % (usage % 8)) is None
    assert "5 tokens" in str(seen(200, '{"choices": [{}], %s}' % (usage % 5)))
    assert "3 choices" in str(seen(200, '{"choices": [{}, {}, {}], %s}' % (usage % 3)))
    assert "prompt tokens" in str(seen(200, '{"choices": [{}], "usage": {"prompt_tokens": 11}}'))
    assert "abort" in str(seen(200, '{"choices": [{"finish_reason": "abort"}]}'))
    for odd in ("{}", "[]", '{"choices": null}', "data: 5\n\ndata: [DONE]\n\n"):
        assert "another shape" in str(seen(200, odd))
    assert seen(500, "{}") == "status 500"
    assert seen(0, "no whole answer") == "no whole answer"
    shaped = '{"error": {"message": "no", "type": "invalid_request_error", "param": null, "code": null}}'
    assert seen(400, shaped) is None
    assert "shape" in str(seen(400, '{"detail": "no"}')) and "shape" in str(seen(404, "Not Found"))
    event = 'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'
    assert seen(200, event * 4 + "data: [DONE]\n\n") is None
    assert "without [DONE]" in str(seen(200, event))
    assert "5 tokens" in str(seen(200, event * 5 + "data: [DONE]\n\n"))
    assert "error inside" in str(seen(200, event + 'data: {"error": {"message": "no"}}\n\ndata: [DONE]\n\n'))


def test_a_fault_is_reduced_to_the_fields_that_it_needs() -> None:
    body = {
        "model": "base",
        "prompt": "a",
        "seed": 1,
        "structured_outputs": {"json": {"x": [{"bad": 1, "y": 2}]}, "z": 3},
    }

    def server(request: httpx.Request) -> httpx.Response:
        bad = "model" in json.loads(request.content) and b"bad" in request.content
        return httpx.Response(500 if bad else 200, text='{"choices": []}')

    async def reduced() -> dict[str, Any] | None:
        case = Case(0, "/v1/completions", json.dumps(body).encode())
        fault = Fault("status 500", case, Answer(500, '{"choices": []}'), case)
        async with httpx.AsyncClient(base_url="http://fuzz", transport=httpx.MockTransport(server)) as client:
            return (await Attack(Target("", None, (), None)).least(client, fault)).body

    assert asyncio.run(reduced()) == {"model": "base", "structured_outputs": {"json": {"x": [{"bad": 1}]}}}
