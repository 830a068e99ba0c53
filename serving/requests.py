"""What a request may say: its body read strictly, its fields known, its size within the limits of who asks.

A field is refused unless it is listed here. Some of vLLM's own would let one client harm the others (`priority`,
`prompt_logprobs`, in a chat `echo`), or get around a limit (`use_beam_search`, `documents`); those that a newer
vLLM brings are closed until somebody has looked at them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from serving.errors import Refusal
from serving.spec import Tier

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_BOTH = """
    model stream stream_options n max_tokens temperature top_p seed stop frequency_penalty presence_penalty logit_bias
    logprobs user response_format
    top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids include_stop_str_in_output bad_words
    allowed_token_ids skip_special_tokens spaces_between_special_tokens add_special_tokens structured_outputs
    return_tokens_as_token_ids return_token_ids cache_salt
"""  # OpenAI's, then vLLM's
_CHAT_ONLY = """
    messages max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls reasoning_effort
    add_generation_prompt continue_final_message chat_template_kwargs include_reasoning
"""
_COMPLETIONS_ONLY = "prompt suffix echo"
# OpenAI's that change nothing here, by what they mean or because there is only one way to do it.
WITHOUT_EFFECT = """
    metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention verbosity modalities
"""
# What vllm-router 0.1.17 adds to every body, beside fields that vLLM knows and others that are false: dropped.
_OF_THE_ROUTER = {"separate_reasoning": True, "stream_reasoning": True}
FIELDS = {
    CHAT: frozenset((_BOTH + _CHAT_ONLY + WITHOUT_EFFECT).split()),
    COMPLETIONS: frozenset((_BOTH + _COMPLETIONS_ONLY + WITHOUT_EFFECT).split()),
}

_HELD = ("response_format", "structured_outputs")  # what gives the answer a form
_FORBID = ("allowed_token_ids", "bad_words", "min_tokens")  # the last forbids the end
_PRINTED = ("tools", "chat_template_kwargs")  # what a template may print as JSON; Llama 3.1's has `custom_tools`

DEEPEST = 64
"""Levels of nesting, of which a JSON schema of a tool takes the most; vLLM's parsers recurse."""

GRAMMAR_VALUES = 2_000
"""Values in the JSON of what an answer is held to: xgrammar 0.2 compiles a schema of that many in 4 s at worst, one of
10,000 in 23 (1,000 and 5,000 optional properties, 2 cores), and a replica that gives no token meanwhile looks hung."""
TEMPLATE_VALUES = 10_000
"""Values in the JSON that a chat template prints, by Python alone and twice, with each on a line of its own."""
TEMPLATE_TOKENS = 512
"""More than what a chat template adds by itself, such as the frame that Llama 3.1 writes around tools (some 100)."""


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises `Refusal` (400) for what two readers could take for two different things."""
    try:
        request = json.loads(body, parse_constant=_no_number, parse_float=_finite, parse_int=_int64)
        if body.count(b"[") + body.count(b"{") > DEEPEST and _depth(request) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request body is not JSON: {error}", "invalid_json") from None
    if not isinstance(request, dict):
        raise Refusal(400, "the request body needs a string `model`", "missing_model")
    return request


def dump(request: dict[str, Any]) -> bytes:
    """`request` as it goes to vLLM. Raises `Refusal` (400) for text that is none, half of a surrogate pair."""
    try:
        return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise Refusal(
            400, f"the request body holds {error.object[error.start]!a}, which is no character", "invalid_json"
        ) from None


def check(request: dict[str, Any], route: str, limits: Tier, max_model_len: int) -> None:
    """Hold `request` against the limits that need no tokeniser. Raises `Refusal` (400) with all that is wrong.

    Sets the length of the answer where the request says none and the tier has a limit.
    """
    problems = [*_fields(request, route), *_lengths(request, route, limits, max_model_len), *_answers(request, limits)]
    problems += [*_contradictions(request), *_sizes(request)]
    if route == CHAT:
        problems += _parts(request.get("messages"))
    if problems:
        first = problems[0]
        message = "; ".join(problem.message for problem in problems)
        raise Refusal(400, message, first.code, param=first.param)


def has_grammar(request: dict[str, Any]) -> bool:
    """Whether the answer is held to a form, which may allow no answer at all."""
    formed = [request.get(name) for name in _HELD]
    return any(form and form != {"type": "text"} for form in formed) or _calls(request)


def _calls(request: dict[str, Any]) -> bool:
    """Whether the answer has to be a call of a tool."""
    return request.get("tool_choice") not in (None, "auto", "none")


def tokenize_requests(request: dict[str, Any], route: str) -> list[dict[str, Any]]:
    """What vLLM's /tokenize is asked to learn the length of each prompt of `request`; none for token ids."""
    model = request["model"]
    if route == CHAT:
        same = ("messages", "tools", "add_generation_prompt", "continue_final_message", "add_special_tokens",
                "chat_template_kwargs")  # fmt: skip
        return [{"model": model} | {name: request[name] for name in same if request.get(name) is not None}]
    prompt = request.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, list) else []
    more = {"add_special_tokens": request["add_special_tokens"]} if "add_special_tokens" in request else {}
    return [{"model": model, "prompt": text, **more} for text in texts if isinstance(text, str)]


def may_exceed(body: bytes, request: dict[str, Any], limit: int) -> bool:
    """Whether a prompt in `body`, which is `request`, may have more than `limit` tokens.

    A token is at least one byte of it, but where a chat template writes JSON in a form of its own: Llama 3.1's gives
    each value of the tools a line, indented, so that two bytes become hundreds.
    """
    messages = request.get("messages")
    told = messages if isinstance(messages, list) else ()
    called = any(isinstance(each, dict) and each.get("tool_calls") for each in told)
    return called or any(request.get(name) for name in _PRINTED) or len(body) + TEMPLATE_TOKENS > limit


def longest_given(request: dict[str, Any]) -> int:
    """Length of the longest prompt that is given as token ids; 0 without one."""
    prompt = request.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        return 0
    if isinstance(prompt[0], int):
        return len(prompt)
    return max((len(each) for each in prompt if isinstance(each, list)), default=0)


def too_long(tokens: int, limit: int, max_model_len: int, route: str) -> Refusal:
    """The answer to a prompt of `tokens`, more than `limit`."""
    if limit < max_model_len:
        message = f"The longest prompt allowed to you is {limit:,} tokens; yours has {tokens:,}. Shorten it."
    else:
        message = (
            f"This model's maximum context length is {max_model_len:,} tokens, at least one of them the answer's; your "
            f"prompt has {tokens:,}. Shorten it."
        )
    return Refusal(400, message, "context_length_exceeded", param="messages" if route == CHAT else "prompt")


def _fields(request: dict[str, Any], route: str) -> Iterator[Refusal]:
    known = FIELDS[route]
    # Routers and clients send defaults of their own; what asks for nothing is passed over, and goes no further.
    for name, value in list(request.items()):
        if name not in known and (_asks_nothing(value) or _OF_THE_ROUTER.get(name) is value):
            del request[name]
    unknown = [name for name in request if name not in known]
    if unknown:
        names = ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in unknown[:10])
        yield Refusal(400, f"not supported here: {names}", "unsupported_parameter", param=unknown[0][:100])
    grammar = request.get("structured_outputs")
    if grammar is not None and not isinstance(grammar, dict):  # vLLM 0.32 answers 500
        yield Refusal(400, "structured_outputs should be an object", "invalid_value", param="structured_outputs")
    if request.get("echo") and request.get("logprobs") is not None:
        # Both together make prompt_logprobs, as `echo` alone does in a chat. With vLLM 0.32 and --enable-lora these,
        # beside another request in the batch, end in a shape error in the LoRA logits layer that stops the engine, and
        # with it every request of the replica.
        yield Refusal(400, "echo with logprobs is not served here", "unsupported_parameter", param="echo")


def _contradictions(request: dict[str, Any]) -> Iterator[Refusal]:
    """Fields that forbid tokens, beside a form that may need those: in vLLM 0.32 the answer then ends in an error."""
    for name in _FORBID if has_grammar(request) else ():
        if request.get(name):
            message = f"{name} could leave no token to an answer that is held to a form: leave out one of the two"
            yield Refusal(400, message, "unsupported_parameter", param=name)


def _lengths(request: dict[str, Any], route: str, limits: Tier, max_model_len: int) -> Iterator[Refusal]:
    limit = min(limits.output_tokens or max_model_len, max_model_len)
    names = ("max_tokens", "max_completion_tokens") if route == CHAT else ("max_tokens",)
    asked = {name: request[name] for name in names if request.get(name) is not None}
    for name, value in asked.items():
        if not _is_count(value):
            yield Refusal(400, f"{name} should be a whole number, found {value!r:.40}", "invalid_value", param=name)
        elif value > limit:
            yield Refusal(
                400, f"{name} is too large: {value}; at most {limit:,} tokens are answered", "invalid_value", param=name
            )
    if not asked and limits.output_tokens is not None and (route == CHAT or "max_tokens" in request):
        request["max_tokens"] = limit  # without it vLLM takes all that the context leaves
    elif not asked and route == COMPLETIONS and limit < 16:
        request["max_tokens"] = limit  # the API's default for completions is 16


def _answers(request: dict[str, Any], limits: Tier) -> Iterator[Refusal]:
    n = request.get("n") or 1
    if not _is_count(n):
        yield Refusal(400, f"n should be a whole number, found {n!r:.40}", "invalid_value", param="n")
        return
    prompt = request.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = len(prompt) if several and isinstance(prompt, list) else 1
    if n * prompts > limits.n:
        what = f"n = {n}" if prompts == 1 else f"{n} answers to each of {prompts:,} prompts"
        yield Refusal(400, f"{what}: at most {limits.n} answers to one request", "invalid_value", param="n")


def _sizes(request: dict[str, Any]) -> Iterator[Refusal]:
    """JSON that is cheap to send and costs seconds of a core."""
    tools = request.get("tools")
    strict = any(isinstance(each, dict) and _is_strict(each) for each in tools) if isinstance(tools, list) else False
    limits = dict.fromkeys(_PRINTED, TEMPLATE_VALUES) | dict.fromkeys(_HELD, GRAMMAR_VALUES)
    if strict or _calls(request):
        limits["tools"] = GRAMMAR_VALUES
    for name, limit in limits.items():
        if (count := _values(request.get(name))) > limit:
            yield Refusal(
                400, f"{name} has {count:,} values, at most {limit:,} are served", "invalid_value", param=name
            )


def _is_strict(tool: dict[str, Any]) -> bool:
    function = tool.get("function")
    return bool(tool.get("strict") or (isinstance(function, dict) and function.get("strict")))


def _parts(messages: Any) -> Iterator[Refusal]:
    """Text alone: other parts name addresses, which vLLM would fetch."""
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(part, str) and kind not in ("text", "refusal"):
                where = f"messages[{number}].content"
                yield Refusal(400, f"{where}: only parts of type text are served", "unsupported_parameter", param=where)
                return


def _asks_nothing(value: Any) -> bool:
    """Not 0: prompt_logprobs of 0 asks for those of the prompt's own tokens."""
    return value is None or value is False or value in ("", [], {})


def _is_count(value: Any) -> bool:
    """vLLM would also take "5000", 5000.0 and true, which no comparison here would understand."""
    return isinstance(value, int) and not isinstance(value, bool)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _values(value: Any) -> int:
    """Members of all objects and items of all lists in `value`, those of JSON written as text in it too."""
    count, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and item.lstrip()[:1] in ("{", "["):  # vLLM reads a schema from text as well
            try:
                item = json.loads(item)
            except (ValueError, RecursionError):
                continue  # vLLM's to refuse
        if isinstance(item, (dict, list)):
            count += len(item)
            left += item.values() if isinstance(item, dict) else item
    return count


def _depth(value: Any) -> int:
    """Levels of lists and objects, one after the other rather than by recursion."""
    depth, level = 0, [value]
    while level:
        level = [
            each
            for item in level
            for each in (item.values() if isinstance(item, dict) else item)
            if isinstance(each, (dict, list))
        ]
        depth += 1
    return depth
