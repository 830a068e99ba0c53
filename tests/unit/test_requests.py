"""Bodies of requests: read as one reader would, fields known, limits that no way of writing a number gets around."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.errors import Refusal
from serving.requests import (
    CHAT,
    COMPLETIONS,
    DEEPEST,
    check,
    dump,
    has_grammar,
    longest_given,
    may_exceed,
    parse,
    tokenize_requests,
    too_long,
)
from serving.spec import Tier

CONTEXT = 4096


def refused(route: str = CHAT, limits: Any = None, **fields: Any) -> Refusal | None:
    try:
        check({"model": "m"} | fields, route, limits or Tier(), CONTEXT)
    except Refusal as refusal:
        assert refusal.status == 400
        return refusal
    return None


@pytest.mark.parametrize(
    "text",
    [
        '{"temperature": NaN}', '{"temperature": Infinity}', '{"temperature": -Infinity}', '{"temperature": 1e999}',
        '{"seed": 9223372036854775808}', '{"seed": -9223372036854775809}', '{"n": ' + "9" * 5000 + "}",
        '{"a": 1', "{'a': 1}", '{"a": 01}', "",
    ],
)  # fmt: skip
def test_what_readers_could_disagree_about_is_no_json(text: str) -> None:
    with pytest.raises(Refusal, match="the request body is not JSON") as caught:
        parse(text.encode())
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_numbers_that_vllm_takes_pass() -> None:
    text = '{"seed": 9223372036854775807, "temperature": 0.7, "presence_penalty": -2, "x": -9223372036854775808}'
    assert parse(text.encode()) == json.loads(text)


def test_nesting_ends_at_a_depth_that_no_tool_has() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    assert parse(nested(DEEPEST))
    with pytest.raises(Refusal, match="nested more than 64 levels deep"):
        parse(nested(DEEPEST + 1))
    with pytest.raises(Refusal):
        parse(nested(100_000))
    wide = {"messages": [{"role": "user", "content": [{"type": "text", "text": "[{"}]}] * 100}
    assert parse(json.dumps(wide).encode()) == wide, "many are not deep"


def test_half_a_character_is_refused_and_whole_ones_pass() -> None:
    assert dump({"a": "ü 🚀"}) == '{"a":"ü 🚀"}'.encode()
    with pytest.raises(Refusal, match=r"holds '\\ud83d', which is no character"):
        dump(parse(b'{"a": "\\ud83d"}'))
    assert dump(parse(b'{"a": "\\ud83d\\ude80"}')) == '{"a":"🚀"}'.encode()


# Fields.


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "field",
    [
        "prompt_logprobs", "use_beam_search", "priority", "request_id", "kv_transfer_params", "vllm_xargs",
        "chat_template", "mm_processor_kwargs", "media_io_kwargs", "documents", "prompt_embeds", "truncate_prompt_tokens",
        "logprob_token_ids", "session_id", "brand_new",
    ],
)  # fmt: skip
def test_fields_that_nobody_looked_at_are_closed(route: str, field: str) -> None:
    refusal = refused(route, **{field: 1})
    assert refusal and (refusal.code, refusal.param) == ("unsupported_parameter", field)
    assert f"not supported here: {field}" in refusal.message


def test_defaults_of_closed_fields_ask_for_nothing_and_go_no_further() -> None:
    request: dict[str, Any] = {
        "model": "m",
        "prompt_logprobs": None,
        "use_beam_search": False,
        "documents": [],
        "vllm_xargs": {},
    }
    check(request, CHAT, Tier(), CONTEXT)
    assert request == {"model": "m"}
    # Whatever goes through vllm-router 0.1.17 comes with these (tests/contract/test_router.py).
    added = {
        "no_stop_trim": False, "separate_reasoning": True, "stream_reasoning": True, "return_hidden_states": False,
    }  # fmt: skip
    check(request := {"model": "m", **added}, CHAT, Tier(), CONTEXT)
    assert request == {"model": "m"}
    assert refused(separate_reasoning=1) and refused(return_hidden_states=True)
    assert refused(prompt_logprobs=0), "0 asks for those of the prompt's own tokens"


def test_all_that_is_wrong_is_told_together() -> None:
    refusal = refused(brand_new=1, n=100, max_tokens=10_000)
    assert refusal
    for part in ("brand_new", "n = 100: at most 16", "max_tokens is too large: 10000; at most 4,096"):
        assert part in refusal.message


@pytest.mark.parametrize("value", [[], "x", 5, True, " "])
def test_a_grammar_is_an_object_or_vllm_would_answer_500(value: Any) -> None:
    refusal = refused(COMPLETIONS, structured_outputs=value)
    assert refusal and refusal.param == "structured_outputs"


@pytest.mark.parametrize(
    ("fields", "held"),
    [
        ({}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"choice": ["a"]}}, True),
        ({"tools": [{}], "tool_choice": "auto"}, False),
        ({"tools": [{}], "tool_choice": "required"}, True),
        ({"tools": [{}], "tool_choice": {"type": "function"}}, True),
    ],
)
def test_what_holds_an_answer_to_a_form(fields: dict[str, Any], held: bool) -> None:
    assert has_grammar(fields) == held


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file", None, 7])
def test_parts_that_vllm_would_fetch_are_refused(kind: Any) -> None:
    part = {"type": kind, "image_url": {"url": "http://169.254.169.254/"}}
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
    refusal = refused(messages=messages)
    assert refusal and refusal.param == "messages[1].content"
    assert refused(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}]) is None


# Lengths and counts.


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [65, 10**9, "10", "65", 65.0, 10.0, True, [10], {"a": 1}])
def test_no_way_of_writing_it_gets_around_the_longest_answer(field: str, value: Any) -> None:
    refusal = refused(limits=Tier(output_tokens=64), **{field: value})
    assert refusal and (refusal.code, refusal.param) == ("invalid_value", field)


def test_either_name_counts_where_both_are_given() -> None:
    limits = Tier(output_tokens=64)
    assert refused(limits=limits, max_tokens=64, max_completion_tokens=65)
    assert refused(limits=limits, max_tokens=65, max_completion_tokens=64)
    assert refused(limits=limits, max_tokens=64, max_completion_tokens=64) is None


@pytest.mark.parametrize(
    ("route", "given", "limit", "sent"),
    [
        (CHAT, {}, 64, 64),
        (CHAT, {"max_tokens": None}, 64, 64),
        (CHAT, {"max_tokens": 5}, 64, 5),
        (CHAT, {}, None, None),
        (CHAT, {}, 10_000, 4096),
        (COMPLETIONS, {}, 64, None),  # the API's default is 16
        (COMPLETIONS, {}, 8, 8),
        (COMPLETIONS, {"max_tokens": None}, 64, 64),
    ],
)
def test_who_names_no_length_gets_at_most_the_longest(
    route: str, given: dict[str, Any], limit: int | None, sent: int | None
) -> None:
    request = {"model": "m", **given}
    check(request, route, Tier(output_tokens=limit), CONTEXT)
    assert request.get("max_tokens") == sent


@pytest.mark.parametrize(
    ("route", "fields", "fits"),
    [
        (CHAT, {"n": 4}, True),
        (CHAT, {"n": 5}, False),
        (CHAT, {"n": "4"}, False),
        (CHAT, {"n": 2.0}, False),
        (CHAT, {"n": None}, True),
        (COMPLETIONS, {"n": 2, "prompt": ["a", "b"]}, True),
        (COMPLETIONS, {"n": 2, "prompt": ["a", "b", "c"]}, False),
        (COMPLETIONS, {"prompt": [[1, 2], [3], [4], [5], [6]]}, False),
        (COMPLETIONS, {"prompt": list(range(100))}, True),
    ],
)
def test_answers_are_counted_over_all_prompts(route: str, fields: dict[str, Any], fits: bool) -> None:
    refusal = refused(route, Tier(n=4), **fields)
    assert (refusal is None) == fits
    assert refusal is None or refusal.param == "n"


def test_vllm_is_asked_for_the_length_of_what_it_would_compute() -> None:
    messages = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = tokenize_requests({"model": "m", "messages": messages, "tools": tools, "temperature": 1, "n": 2}, CHAT)
    assert asked == [{"model": "m", "messages": messages, "tools": tools}]
    both = {"model": "m", "prompt": ["a", "b"], "add_special_tokens": False}
    assert tokenize_requests(both, COMPLETIONS) == [
        {"model": "m", "prompt": "a", "add_special_tokens": False},
        {"model": "m", "prompt": "b", "add_special_tokens": False},
    ]
    assert tokenize_requests({"model": "m", "prompt": [1, 2]}, COMPLETIONS) == []


def test_token_ids_are_counted_as_they_are() -> None:
    assert longest_given({"prompt": [1, 2, 3]}) == 3
    assert longest_given({"prompt": [[1], [2, 3], "x"]}) == 2
    assert longest_given({"prompt": "abc"}) == longest_given({"prompt": []}) == longest_given({}) == 0


def test_a_short_body_needs_no_tokeniser() -> None:
    plain: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    assert not may_exceed(b"x" * 400, plain, 1000)
    assert may_exceed(b"x" * 600, plain, 1000), "the template may add more than the text has"
    assert may_exceed(b"x", plain, 100)
    odd: tuple[Any, ...] = (None, 5, "text", [5], {})
    assert not any(may_exceed(b"x", {"messages": messages}, 1000) for messages in odd)


@pytest.mark.parametrize("field", [{"allowed_token_ids": [8, 7]}, {"bad_words": ["regex"]}, {"min_tokens": 5}])
@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"regex": "regex"}},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
    ],
)
def test_a_form_and_what_forbids_its_tokens_are_not_served_together(
    field: dict[str, Any], form: dict[str, Any]
) -> None:
    """Found by the fuzz (seed 1795776921, request 205085): the answer began, then ended in an error."""
    refusal = refused(messages=[], **field, **form)
    assert refusal and refusal.param == next(iter(field)) and "could leave no token" in refusal.message
    assert refused(messages=[], **field) is refused(messages=[], **form) is None
    plain: dict[str, Any] = {"response_format": {"type": "text"}}
    assert refused(messages=[], **field, **plain) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"chat_template_kwargs": {"custom_tools": [1]}},
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "function"}]}]},
    ],
)
def test_what_a_template_prints_as_json_is_always_counted(fields: dict[str, Any]) -> None:
    """Indented, as by Llama 3.1's template, it has no bound in the bytes of the body."""
    nested: Any = list(range(600))
    for _ in range(50):
        nested = [nested]
    assert len(json.dumps(nested, indent=4)) > 50 * len(json.dumps(nested, separators=(",", ":")))
    assert may_exceed(b"x", fields, 1000)


def schema(properties: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(properties)}}


def tool(properties: int, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema(properties)} | more}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema(900)}}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema(1000)}}}, "response_format has 2,006"),
        ({"structured_outputs": {"json": schema(1000)}}, "structured_outputs has 2,003"),
        ({"structured_outputs": {"json": json.dumps(schema(1000))}}, "structured_outputs has 2,003"),
        ({"structured_outputs": {"json": "{" * 5000}}, None),  # no JSON: vLLM's to refuse
        ({"tools": [tool(1500)]}, None),
        ({"tools": [tool(1500)], "tool_choice": "auto"}, None),
        ({"tools": [tool(1500)], "tool_choice": "required"}, "tools has 3,007 values, at most 2,000"),
        ({"tools": [tool(1500, strict=True)]}, "tools has 3,008 values, at most 2,000"),
        ({"tools": [tool(1500)] * 4}, "tools has 12,028 values, at most 10,000"),
        ({"chat_template_kwargs": {"custom_tools": [tool(1500)] * 4}}, "chat_template_kwargs has 12,029"),
        ({"tools": "no list", "tool_choice": "required"}, None),
    ],
)  # fmt: skip
def test_a_form_that_would_take_seconds_to_compile_or_to_print_is_refused(
    fields: dict[str, Any], told: str | None
) -> None:
    refusal = refused(messages=[], **fields)
    assert (refusal.param if refusal else None) == (next(iter(fields)) if told else None)
    assert told is None or (refusal and told in refusal.message)


def test_too_long_says_both_figures_and_whose_limit_it_is() -> None:
    context = too_long(5000, 4096, 4096, CHAT)
    assert (context.status, context.code, context.param) == (400, "context_length_exceeded", "messages")
    assert "maximum context length is 4,096 tokens" in context.message and "has 5,000" in context.message
    tier = too_long(5000, 1000, 4096, COMPLETIONS)
    assert tier.param == "prompt"
    assert "The longest prompt allowed to you is 1,000 tokens; yours has 5,000" in tier.message
