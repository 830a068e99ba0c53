"""Generated requests against a real replica: no answer may be a 5xx, hang, beyond a limit or the engine's end.

    python -m benches.fuzz --minutes 60 --seed 1

A request is a valid one with fields set to values that vLLM's own schema of the route allows, or nearly; its number and
the seed make it, so a failing one can be made again. Each kind of fault is reduced to the fields that it needs and
written to OUT/fuzz, once. Exit code 1: something was found.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from benches.replica import ADAPTER, Server, promote, prove, spec_of, tune, wait_traffic
from common import exits
from common.files import write_json
from common.processes import Processes
from serving.requests import CHAT, COMPLETIONS, FIELDS

HANG_SECONDS = 30.0
AT_ONCE = 6
TOLD_EACH = 1000  # requests: a minute or so
CONTEXT = 256  # tokens; short, so that even an unlimited answer ends soon on two cores
TIERS = {
    "fuzz": {
        "prompt_tokens": 100, "output_tokens": 24, "n": 3, "concurrency": 32, "waiting": 32, "kv_cache": 0.98,
    }
}  # fmt: skip
NUMBERS = (
    0, 1, 2, 3, 5, 16, 20, 63, 64, 255, 300, 1000, 5000, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
    10**30, -1, -2, -100, -(2**31), -(2**63), -(2**64), 0.0, -0.0, 0.5, 1.0, 1.5, 2.5, -0.5, 1e-9, 1e-45, 1e-320, 1e38,
    1e39, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
STRINGS = (
    "", " ", "a", "user", "system", "tool", "assistant", "text", "image_url", "json_object", "json_schema", "regex",
    "function", "auto", "required", "none", "hello there", "0", "-1", "null", "token_id:0", "token_id:999999", "\0",
    "\ud800", "\u200f\u202e", "\U0001f600" * 5, "a" * 300, "word " * 400, "[" * 40, "(", "(a+)+$", "[a-z]{1000000}",
    "(?<=a)b", "\\p{L}+", "{{ 1 / 0 }}", "{% for x in range(9) %}a{% endfor %}", "{% raise %}", "{{ messages }}",
    '{"type": "object"}', '{"type": "nothing"}', '{"$ref": "#"}', 'root ::= "a" root', "root ::= (", "root ::= missing",
    "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x.png", "data:image/png;base64,AAAA", "AAAA", "<unk>",
    "<|im_end|>", "<tool_call>", "base", ADAPTER, f"{ADAPTER}.00000000", "x" * 2000,
)  # fmt: skip
# What people try when an answer or a prompt shall be longer than they may ask for.
GREEDY: tuple[dict[str, Any], ...] = (
    {"max_tokens": 100_000}, {"max_tokens": None}, {"max_completion_tokens": 200, "max_tokens": 1},
    {"max_tokens": 200, "max_completion_tokens": None}, {"min_tokens": 200}, {"min_tokens": 200, "max_tokens": 200},
    {"n": 64}, {"n": 4, "stream": True}, {"n": 5, "use_beam_search": True}, {"n": 200, "max_tokens": 1},
    {"use_beam_search": True, "n": 3, "max_tokens": 300}, {"ignore_eos": True, "max_tokens": None},
    {"ignore_eos": True, "stream": True, "max_tokens": 250}, {"best_of": 20}, {"n": "5"}, {"max_tokens": "200"},
    {"max_tokens": 200.0}, {"n": True}, {"vllm_xargs": {"max_tokens": 200, "n": 9}}, {"priority": -100},
    {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 100_000}, {"add_special_tokens": True},
)  # fmt: skip
LONG: tuple[dict[str, Any], ...] = (
    {"prompt": "a b c d " * 40}, {"prompt": ["a b c d " * 40]}, {"prompt": [1] * 200}, {"prompt": [[1] * 200]},
    {"prompt": ["a"] * 40}, {"prompt": [[5], [6]] * 20}, {"prompt": "x y z " * 60, "truncate_prompt_tokens": 10},
    {"messages": [{"role": "user", "content": "a b c d " * 40}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a b c d "}] * 40}]},
    {"messages": [{"role": "user", "content": "a"}] * 60},
    {"messages": [{"role": "user", "content": "hello"}], "chat_template": "{{ 'a b c d ' * 60 }}"},
    {"messages": [{"role": "user", "content": "hello"}], "chat_template_kwargs": {"messages": [{"role": "a"}] * 60}},
    {"messages": [{"role": "user", "content": "hello"}], "documents": [{"text": "a b c d " * 60}]},
    {
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "a b c d " * 60}}],
    },
)  # fmt: skip
BROKEN = (
    b"", b"null", b"[]", b'"a"', b"1", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"model": "base"',
    b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"model": "base", "messages": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"model": "base", "model": 1, "prompt": "a"}', b'{"model": "base", "prompt": "\xc3\x28"}',
    b'{"model": "base", "prompt": ' + b"9" * 5000 + b"}", b'{"model":"base","prompt":"a","seed":1e999}',
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One request: what `number` and the seed make."""

    number: int
    path: str
    content: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    @property
    def body(self) -> dict[str, Any] | None:
        """The body's fields; None where it is no JSON object."""
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Answer:
    """What came back; `status` 0: nothing did, and `text` says how that showed."""

    status: int
    text: str


@dataclass
class Target:
    """The replica under attack, and the limits of the client's tier."""

    url: str
    key: str | None
    models: tuple[str, ...]
    tier: Mapping[str, Any] | None


@dataclass(frozen=True)
class Fault:
    """A wrong answer: in words, the request as it was and the least of it that still shows it."""

    words: str
    case: Case
    answer: Answer
    least: Case

    @property
    def kind(self) -> str:
        """The same for answers that differ in numbers alone."""
        return re.sub(r"[0-9a-f]{8,}|\d+", "*", f"{self.words} {_message(self.answer)[:80]}")

    def as_json(self) -> dict[str, Any]:
        """What is written to OUT/fuzz."""
        answer = {"status": self.answer.status, "text": self.answer.text[:2000]}
        requests = {"least": _shown(self.least), "as_generated": _shown(self.case)}
        return {"fault": self.words, "number": self.case.number, "answer": answer, **requests}


# --- Requests -------------------------------------------------------------------------------------------------------


def schemas() -> dict[str, dict[str, Any]]:
    """vLLM's own JSON schema of each route's request body, as its /openapi.json has them."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return {CHAT: ChatCompletionRequest.model_json_schema(), COMPLETIONS: CompletionRequest.model_json_schema()}


def cases(seed: int, models: tuple[str, ...], known: Mapping[str, dict[str, Any]]) -> Iterator[Case]:
    """Endless requests; the same arguments give the same ones."""
    for number in itertools.count():
        yield _case(number, random.Random(f"{seed}/{number}"), models, known)


def _case(number: int, rng: random.Random, models: tuple[str, ...], known: Mapping[str, dict[str, Any]]) -> Case:
    path = rng.choice((CHAT, COMPLETIONS))
    if rng.random() < 0.03:
        kind = rng.choice(("application/json", "text/plain", "application/json; charset=utf-16", ""))
        return Case(number, path, rng.choice(BROKEN), {"Content-Type": kind})
    body: dict[str, Any] = {"model": rng.choice(models), "max_tokens": rng.randint(1, 20)}
    question = rng.choice(("hello", "restart web in prod", "a b c", "list the pods"))
    body |= {"prompt": question} if path == COMPLETIONS else {"messages": [{"role": "user", "content": question}]}
    if rng.random() < 0.3:
        body["stream"] = True
    dice = rng.random()
    if dice < 0.12:
        body |= rng.choice(GREEDY)
    elif dice < 0.2:
        body |= rng.choice([each for each in LONG if ("prompt" in each) == (path == COMPLETIONS)])
    if dice > 0.12:
        properties = known[path]["properties"]
        values = _Values(rng, known[path].get("$defs", {}))
        # Fields that the layer lets through reach vLLM: most of the time those, the others now and then.
        names = properties.keys() - {"model"} if rng.random() < 0.1 else properties.keys() & FIELDS[path] - {"model"}
        for name in rng.sample(sorted(names), rng.choice((1, 1, 1, 2, 2, 3, 5))):
            body[name] = values.of(properties[name])
        if rng.random() < 0.15:
            _spoil(body, rng, values)
    # The same route as Azure OpenAI's clients know it; there the deployment is the model.
    deployment = quote(str(body["model"]), safe="", errors="surrogatepass")
    azure = f"/openai/deployments/{deployment}{path.removeprefix('/v1')}?api-version=2024-10-21"
    return Case(number, azure if rng.random() < 0.05 else path, json.dumps(body).encode())


class _Values:
    """Values of a JSON schema, mostly; those at the edges are as likely as the others."""

    def __init__(self, rng: random.Random, definitions: Mapping[str, Any]) -> None:
        self.rng, self.definitions = rng, definitions

    def of(self, schema: Mapping[str, Any], depth: int = 0) -> Any:
        rng = self.rng
        if "$ref" in schema:
            return self.of(self.definitions[schema["$ref"].rpartition("/")[2]], depth)
        if rng.random() < 0.02:
            return self.any(depth)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return self.of(rng.choice(schema[union]), depth)
        if "const" in schema or "enum" in schema:
            return schema["const"] if "const" in schema else rng.choice(schema["enum"])
        match schema.get("type"):
            case "integer":
                return int(self._number(schema)) if rng.random() < 0.5 else rng.randint(0, 8)
            case "number":
                return self._number(schema) if rng.random() < 0.5 else round(rng.uniform(-2, 2), 2)
            case "boolean":
                return rng.random() < 0.6
            case "null":
                return None
            case "string":
                return rng.choice(STRINGS)
            case "array":
                return [self.of(schema.get("items", {}), depth + 1) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
            case "object":
                return self._object(schema, depth)
        return self.any(depth)

    def any(self, depth: int = 0) -> Any:
        """Anything that JSON knows, and what Python's reader takes beside."""
        kinds = ["null", "boolean", "integer", "number", "string"] + ([] if depth > 3 else ["array", "object"])
        return self.of({"type": self.rng.choice(kinds), "additionalProperties": True}, depth + 1)

    def _number(self, schema: Mapping[str, Any]) -> float:
        low, high = schema.get("minimum", float("-inf")), schema.get("maximum", float("inf"))
        finite = [each for each in NUMBERS if schema["type"] == "number" or each - each == 0]
        allowed = [each for each in finite if low <= each <= high]
        return self.rng.choice(allowed if self.rng.random() < 0.9 else finite)

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        required = schema.get("required", ())
        made = {
            name: self.of(each, depth + 1)
            for name, each in properties.items()
            if name in required or self.rng.random() < (0.3 if depth < 4 else 0.05)
        }
        more = schema.get("additionalProperties")
        if more and depth < 5:
            for _ in range(self.rng.randint(0, 2)):
                name = self.rng.choice(
                    ("type", "properties", "0", "5", "999999999", "-1", "x", "add_generation_prompt")
                )
                made[name] = self.of(more if isinstance(more, dict) else {}, depth + 1)
        return made


def _spoil(value: Any, rng: random.Random, values: _Values) -> None:
    """Put something else in one place anywhere in `value`."""
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not places:
        return
    place = rng.choice(places)
    if isinstance(value[place], dict | list) and value[place] and rng.random() < 0.7:
        _spoil(value[place], rng, values)
    else:
        value[place] = values.any()


# --- Answers --------------------------------------------------------------------------------------------------------


def wrong(case: Case, answer: Answer, tier: Mapping[str, Any] | None) -> str | None:
    """What is wrong with `answer`, in words; None when nothing is."""
    if answer.status == 0:
        return answer.text
    if answer.status >= 500:
        return f"status {answer.status}"
    if answer.status >= 400:
        return _wrong_error(answer)
    if answer.status != 200:
        return f"status {answer.status}: neither an answer nor an error"
    try:
        if answer.text.startswith("data:"):
            return _wrong_stream(case, answer.text, tier)
        return _wrong_answer(case, json.loads(answer.text), tier)
    except ValueError:
        return "an answer that is not JSON"
    except (LookupError, TypeError, AttributeError) as error:
        return f"an answer of another shape: {error!r}"


def _wrong_answer(case: Case, whole: Any, tier: Mapping[str, Any] | None) -> str | None:
    if any(choice.get("finish_reason") in ("abort", "error") for choice in whole["choices"]):
        return "a choice ended with abort or error"
    return _beyond(case, len(whole["choices"]), whole.get("usage") or {}, tier)


def _wrong_error(answer: Answer) -> str | None:
    """OpenAI's errors are {"error": {"message", "type", "param", "code"}}."""
    try:
        error = json.loads(answer.text)["error"]
        shaped = {"message", "type", "param", "code"} <= error.keys() and isinstance(error["type"], str)
        if shaped and isinstance(error["message"], str) and error["message"]:
            return None
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    return f"status {answer.status} without OpenAI's error shape"


def _wrong_stream(case: Case, text: str, tier: Mapping[str, Any] | None) -> str | None:
    events = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    texts: Counter[int] = Counter()
    usage: dict[str, Any] = {}
    for event in events[:-1] if events[-1] == "[DONE]" else events:
        try:
            chunk = json.loads(event)
        except ValueError:
            return "an event that is not JSON"
        if "error" in chunk:
            # Some fields are looked at only once the stream has begun: a refusal then, if nothing was answered before.
            code = chunk["error"].get("code")
            if isinstance(code, int) and 400 <= code < 500 and not texts:
                return _wrong_error(Answer(code, event))
            return "an error inside a stream"
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            if choice.get("finish_reason") in ("abort", "error"):
                return "a choice ended with abort or error"
            texts[choice["index"]] += bool(choice.get("text") or (choice.get("delta") or {}).get("content"))
    if events[-1] != "[DONE]":
        return "a stream without [DONE]"
    counted = {"completion_tokens": sum(texts.values())} | usage
    return _beyond(case, len(texts), counted, tier)


def _beyond(case: Case, choices: int, usage: Mapping[str, Any], tier: Mapping[str, Any] | None) -> str | None:
    if tier is None:
        return None
    if choices > tier["n"]:
        return f"{choices} choices, the tier allows {tier['n']}"
    if usage.get("completion_tokens", 0) > tier["output_tokens"] * max(1, choices):
        return f"{usage['completion_tokens']} tokens in {choices} choices, the tier allows {tier['output_tokens']} each"
    if usage.get("prompt_tokens", 0) > tier["prompt_tokens"]:
        return f"{usage['prompt_tokens']} prompt tokens, the tier allows {tier['prompt_tokens']}"
    return None


def _message(answer: Answer) -> str:
    """The error's message, or the text."""
    if found := re.search(r'"message": ?"((?:[^"\\]|\\.)*)"', answer.text):
        return found[1]
    return answer.text if answer.status != 200 else ""


def _shown(case: Case) -> dict[str, Any]:
    body = case.body
    shown: dict[str, Any] = {"content": case.content[:4000].decode("latin-1")} if body is None else {"body": body}
    return {"path": case.path, "headers": dict(case.headers), **shown}


# --- The attack -----------------------------------------------------------------------------------------------------


@dataclass
class Attack:
    """Sends cases, `AT_ONCE` at a time, and keeps the first fault of each kind."""

    target: Target
    faults: dict[str, Fault] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    recent: deque[Case] = field(default_factory=lambda: deque(maxlen=3 * AT_ONCE))
    seen: Counter[str] = field(default_factory=Counter)
    lost: list[Case] = field(default_factory=list)

    async def run(self, requests: Iterable[Case], until: float = float("inf")) -> bool:
        """Send until `requests` or the time (monotonic) ends; False at once when the engine ends."""
        requests = iter(requests)
        self.lost = []
        headers = {"Authorization": f"Bearer {self.target.key}"} if self.target.key else {}
        # A kept connection may be closed by the server just as it is used again: that would look like a lost answer.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self.target.url, headers=headers, timeout=None, limits=limits, trust_env=False
        ) as client:

            async def user() -> None:
                for case in requests:
                    if case.number > 0 and case.number % TOLD_EACH == 0:
                        left = "" if until == float("inf") else f", ETA {(until - time.monotonic()) / 60:.0f} min"
                        print(f"request {case.number}: {len(self.faults)} kinds of fault{left}", flush=True)
                    await self._try(client, case)
                    if self.lost or time.monotonic() > until:
                        return

            await asyncio.gather(*(user() for _ in range(AT_ONCE)))
        return not self.lost

    async def _try(self, client: httpx.AsyncClient, case: Case) -> None:
        self.recent.append(case)
        answer = await _send(client, case)
        self.statuses[answer.status] += 1
        words = wrong(case, answer, self.target.tier)
        if words is None or self.lost:
            return
        fault = Fault(words, case, answer, case)
        self.seen[fault.kind] += 1
        if (answer.status in (0, 200) or answer.status >= 500) and not await _healthy(client):
            self.lost = list(self.recent)
        elif fault.kind not in self.faults:
            self.faults[fault.kind] = fault
            print(f"request {case.number}: {words}", flush=True)
            self.faults[fault.kind] = Fault(words, case, answer, await self.least(client, fault))

    async def least(self, client: httpx.AsyncClient, fault: Fault) -> Case:
        """`fault`'s request without the fields that it does not need."""
        least = fault.case
        for path in _fields(fault.case.body):
            body = least.body
            assert body is not None
            if not _without(body, path):
                continue
            candidate = replace(least, content=json.dumps(body).encode())
            answer = await _send(client, candidate)
            words = wrong(candidate, answer, self.target.tier)
            if words and Fault(words, candidate, answer, candidate).kind == fault.kind:
                least = candidate
        return least


def _fields(value: Any, *above: str | int) -> Iterator[tuple[str | int, ...]]:
    """Where each field of the objects in `value` is, the outer ones first."""
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    within = list(places)
    yield from ((*above, name) for name, _ in within if isinstance(value, dict))
    for name, each in within:
        yield from _fields(each, *above, name)


def _without(value: Any, path: Sequence[str | int]) -> bool:
    """Remove what is at `path`; False where something above it is gone already."""
    for name in path[:-1]:
        if isinstance(value, dict) and name not in value:
            return False
        value = value[name]
    if path[-1] not in value:
        return False
    del value[path[-1]]
    return True


async def _send(client: httpx.AsyncClient, case: Case) -> Answer:
    try:
        async with asyncio.timeout(HANG_SECONDS):
            got = await client.post(case.path, content=case.content, headers=dict(case.headers))
        return Answer(got.status_code, got.text)
    except TimeoutError:
        return Answer(0, f"no whole answer within {HANG_SECONDS:.0f} s")
    except httpx.HTTPError as error:
        return Answer(0, f"connection lost: {type(error).__name__}")


async def _healthy(client: httpx.AsyncClient) -> bool:
    """Whether the engine lives: a dying one may answer once more, so it is asked twice."""
    for _ in range(2):
        await asyncio.sleep(1)
        try:
            if (await client.get("/health", timeout=HANG_SECONDS)).status_code != 200:
                return False
        except httpx.HTTPError:
            return False
    return True


# --- The command ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Attack a replica of our own for some minutes; what was found is in OUT/fuzz."""
    parser = argparse.ArgumentParser(
        "python -m benches.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of fuzz/*.json [%(default)s]")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the attack [%(default)s]")
    parser.add_argument("--seed", type=int, help="for the same requests again [of the clock]")
    parser.add_argument("--first", type=int, default=0, help="number of the first request [%(default)s]")
    arguments = parser.parse_args(argv)
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    folder = arguments.out / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    with Processes() as processes:
        server = Server(processes, folder / "replica", spec_of(folder / "store", max_model_len=CONTEXT))
        run = tune(processes, folder / "replica")
        server.start_engine(TIERS)
        server.wait("/health")
        prove(server, run)
        version, _ = promote(run, folder / "store")
        server.start_sidecar()
        wait_traffic(server, version)
        target = Target(server.url, server.key, ("base", ADAPTER), next(iter(TIERS.values())))
        attack = Attack(target)
        print(f"seed {seed}, {arguments.minutes:g} minutes", flush=True)
        requests = itertools.islice(cases(seed, target.models, schemas()), arguments.first, None)
        until = time.monotonic() + 60 * arguments.minutes
        ends: list[dict[str, Any]] = []
        with contextlib.suppress(KeyboardInterrupt):  # what was found until then is told all the same
            while not asyncio.run(attack.run(requests, until)):
                ends.append(_find_end(server, attack))
                write_json(folder / f"end-{len(ends)}.json", ends[-1])
                print(f"the engine ended: {folder}/end-{len(ends)}.json", flush=True)
    for number, (kind, fault) in enumerate(attack.faults.items(), 1):
        write_json(folder / f"fault-{number}.json", fault.as_json() | {"seed": seed, "times": attack.seen[kind]})
        print(f"{attack.seen[kind]:>6} times: {fault.words}: {_message(fault.answer)[:150]}")
    told = ", ".join(f"{count} x {status}" for status, count in sorted(attack.statuses.items()))
    found = len(attack.faults) + len(ends)
    print(f"seed {seed}: {attack.statuses.total()} requests ({told}); {found} faults: {folder}")
    return exits.FAILED if found else exits.OK


def _find_end(server: Server, attack: Attack) -> dict[str, Any]:
    """Start the engine again and send each of the last requests among plain ones: those that end it once more."""
    suspects, guilty = attack.lost, []
    body = {"model": ADAPTER, "prompt": "a b c", "max_tokens": 20, "ignore_eos": True}
    plain = Case(-1, COMPLETIONS, json.dumps(body).encode())

    def start() -> None:
        server.stop()
        server.start_engine(TIERS)
        server.wait("/ready")

    start()
    for case in suspects:
        if not asyncio.run(attack.run([plain] * AT_ONCE + [case] + [plain] * AT_ONCE)):
            guilty.append(case)
            start()
    return {"guilty": [_shown(case) for case in guilty], "last_requests": [_shown(case) for case in suspects]}


if __name__ == "__main__":
    sys.exit(main())
