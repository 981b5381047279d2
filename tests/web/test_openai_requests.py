"""OpenAI's requests, read into events: what is passed on, and what is refused with the name of the field."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_ticket.content import Function, ToolCall
from ai_ticket.errors import DomainError, InvalidRequest, UnsupportedParameter
from ai_ticket.event import Chunks, Event, EventLimits, Message, Parameters
from ai_ticket.web.openai_faults import InvalidField
from ai_ticket.web.openai_requests import read_chat, read_text

LIMITS = EventLimits(4096, 512)
HI = {"role": "user", "content": "hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def chat(*messages: Any, **fields: Any) -> Event:
    body = json.dumps({"model": "gpt-4o", "messages": list(messages) or [HI], **fields})
    return read_chat(body.encode(), LIMITS, id="chatcmpl-1", now=12.7)


def text(prompt: Any = "Once", **fields: Any) -> Event:
    return read_text(json.dumps({"model": "m", "prompt": prompt, **fields}).encode(), LIMITS, id="cmpl-1", now=12.7)


def fault(reading: Any) -> tuple[str, str | None]:
    """The code and the field of what is wrong."""
    with pytest.raises(DomainError) as caught:
        reading()
    error = caught.value
    if isinstance(error, InvalidField):
        return error.kind, error.param
    return error.code, error.details if isinstance(error, UnsupportedParameter) else None


def test_the_least() -> None:
    assert chat() == Event(
        [Message("user", "hi")], Parameters(max_tokens=512), max_tokens_given=False, chunks=Chunks("chatcmpl-1", 12)
    )
    assert text() == Event(
        [], Parameters(max_tokens=512), max_tokens_given=False, raw_prompt="Once", chunks=Chunks("cmpl-1", 12)
    )


def test_all_that_is_passed_on() -> None:
    common: dict[str, Any] = {
        "max_tokens": 9,
        "temperature": 1,
        "top_p": 0.5,
        "stop": "x",
        "seed": 7,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"50256": -100},
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_k": 40,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "user": "someone",
    }
    for event in (chat(**common), text(**common)):
        assert event.parameters == Parameters(
            max_tokens=9, temperature=1.0, top_p=0.5, top_k=40, min_p=0.1, seed=7, stop=["x"]
        )
        assert {name: json.loads(value) for name, value in event.extra.items()} == {
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repeat_penalty": 1.1,
            "logit_bias": {"50256": -100},
        }
        assert (event.stream, event.max_tokens_given) == (True, True)
        assert event.chunks is not None
        assert event.chunks.usage


def test_null_counts_as_absent() -> None:
    names = "max_tokens max_completion_tokens temperature top_p stop seed n stream stream_options tools tool_choice"
    more = "response_format logprobs audio functions function_call reasoning_effort logit_bias metadata top_k"
    assert chat(**dict.fromkeys([*names.split(), *more.split()])) == chat()
    assert text(**dict.fromkeys(["echo", "best_of", "suffix", "logprobs", "stop"])) == text()


def test_what_changes_nothing() -> None:
    harmless = {
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "logprobs": False,
        "stop": [],
    }
    assert chat(**harmless) == chat()
    assert text(echo=False, best_of=1, suffix="") == text()


def test_messages() -> None:
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {}}
    call = {"id": "c1", "type": "function", "function": function, "index": 0}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}]
    answered = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []}
    event = chat(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {**answered, "audio": None, "function_call": None, "reasoning_content": "Hm.", "parsed": None},
        {"role": "tool", "content": "9", "tool_call_id": "c1"},
    )
    assert event.messages == [
        Message("developer", "Be brief."),
        Message("user", "ab", name="Ann"),
        Message("assistant", "", tool_calls=[ToolCall("c1", Function("f", "{}"))]),
        Message("tool", "9", tool_call_id="c1"),
    ]


def test_a_conversation_needs_no_user() -> None:
    assert chat({"role": "system", "content": "Greet."}).messages == [Message("system", "Greet.")]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "function", "content": "x"}, ("invalid_value", "messages[0].role")),
        ({"role": "user"}, ("missing_required_parameter", "messages[0].content")),
        ({"role": "assistant", "content": None}, ("missing_required_parameter", "messages[0].content")),
        ({"content": "x"}, ("missing_required_parameter", "messages[0].role")),
        ({"role": "user", "content": 5}, ("invalid_type", "messages[0].content")),
        ({"role": "tool", "content": "x"}, ("missing_required_parameter", "messages[0].tool_call_id")),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, ("invalid_value", "messages[0].tool_call_id")),
        ({"role": "user", "content": "x", "mood": "sad"}, ("unknown_parameter", "messages[0].mood")),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]},
            ("unsupported_parameter", "messages[0].content[1].image_url"),
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "image_url": {"url": "data:,"}}]},
            ("unsupported_parameter", "messages[0].content[0].image_url"),
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "mood": "sad"}]},
            ("unknown_parameter", "messages[0].content[0].mood"),
        ),
        (
            {"role": "user", "content": [{"type": "thought", "text": "x"}]},
            ("unsupported_parameter", "messages[0].content[0].type"),
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            ("missing_required_parameter", "messages[0].content[0].text"),
        ),
        (
            {"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]},
            ("invalid_value", "messages[0].tool_calls"),
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]},
            ("invalid_type", "messages[0].tool_calls[0].function.arguments"),
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}, "result": 5}]},
            ("unknown_parameter", "messages[0].tool_calls[0].result"),
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "", "by": "x"}}]},
            ("unknown_parameter", "messages[0].tool_calls[0].function.by"),
        ),
        ({"role": "assistant", "audio": {"id": "1"}}, ("unsupported_parameter", "messages[0].audio")),
    ],
)
def test_messages_that_are_refused(message: Any, expected: tuple[str, str]) -> None:
    assert fault(lambda: chat(message)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n": 2}, ("unsupported_parameter", "n")),
        ({"n": 0}, ("unsupported_parameter", "n")),
        ({"audio": {"voice": "x"}}, ("unsupported_parameter", "audio")),
        ({"functions": []}, ("unsupported_parameter", "functions")),
        ({"function_call": "auto"}, ("unsupported_parameter", "function_call")),
        ({"reasoning_effort": "low"}, ("unsupported_parameter", "reasoning_effort")),
        ({"web_search_options": {}}, ("unsupported_parameter", "web_search_options")),
        ({"modalities": ["text", "audio"]}, ("invalid_value", "modalities[1]")),
        ({"max_tokens": 4097}, ("invalid_value", "max_tokens")),
        ({"max_tokens": 0}, ("invalid_value", "max_tokens")),
        ({"max_tokens": "9"}, ("invalid_type", "max_tokens")),
        ({"max_tokens": True}, ("invalid_type", "max_tokens")),
        ({"max_completion_tokens": 5000}, ("invalid_value", "max_completion_tokens")),
        ({"max_tokens": 5, "max_completion_tokens": 6}, ("invalid_value", "max_tokens")),
        ({"temperature": 5.1}, ("invalid_value", "temperature")),
        ({"presence_penalty": -3}, ("invalid_value", "presence_penalty")),
        ({"seed": -1}, ("invalid_value", "seed")),
        ({"stop": [""]}, ("invalid_value", "stop")),
        ({"stop": ["x"] * 17}, ("invalid_value", "stop")),
        ({"stop": [1]}, ("invalid_type", "stop[0]")),
        ({"logit_bias": {"hello": 1}}, ("invalid_value", "logit_bias")),
        ({"logit_bias": {"1": 101}}, ("invalid_value", "logit_bias[...]")),
        ({"stream_options": {"include_usage": True}}, ("invalid_value", "stream_options")),
        ({"stream": True, "stream_options": {"x": 1}}, ("unknown_parameter", "stream_options.x")),
        ({"top_logprobs": 2}, ("invalid_value", "top_logprobs")),
        ({"temprature": 1}, ("unknown_parameter", "temprature")),
        ({"metadata": {str(n): "" for n in range(17)}}, ("invalid_value", "metadata")),
        ({"response_format": {"type": "xml"}}, ("invalid_value", "response_format.type")),
        ({"response_format": {"type": "json_schema"}}, ("missing_required_parameter", "response_format.json_schema")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            ("missing_required_parameter", "response_format.json_schema.schema"),
        ),
        ({"tools": [{"type": "custom"}]}, ("invalid_value", "tools[0].type")),
        ({"tools": [{"type": "function"}]}, ("missing_required_parameter", "tools[0].function")),
        ({"logit_bias": {str(n): 0 for n in range(9000)}}, ("invalid_value", "logit_bias")),
        ({"logit_bias": [1]}, ("invalid_type", "logit_bias")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
            ("invalid_type", "response_format.json_schema.schema"),
        ),
        (
            {"tools": [CLOCK, {"type": "function", "function": {"name": "f", "parameters": 5}}]},
            ("invalid_type", "tools[1].function.parameters"),
        ),
        ({"tools": [WEATHER] * 129}, ("invalid_value", "tools")),
        ({"tool_choice": "required"}, ("invalid_value", "tool_choice")),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, ("invalid_value", "tool_choice")),
        ({"tools": [WEATHER], "tool_choice": CLOCK}, ("invalid_value", "tool_choice")),
        ({"tools": [CLOCK], "tool_choice": {**CLOCK, "strict": True}}, ("unknown_parameter", "tool_choice.strict")),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "clock", "x": 1}}},
            ("unknown_parameter", "tool_choice.function.x"),
        ),
        ({"messages": []}, ("invalid_value", "messages")),
        ({"messages": "hi"}, ("invalid_type", "messages")),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], expected: tuple[str, str]) -> None:
    assert fault(lambda: chat(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": ""}, ("invalid_value", "prompt")),
        ({"prompt": []}, ("invalid_value", "prompt")),
        ({"prompt": ["a", "b"]}, ("unsupported_parameter", "prompt")),
        ({"prompt": [1, 2]}, ("unsupported_parameter", "prompt")),
        ({"prompt": 5}, ("invalid_type", "prompt")),
        ({"echo": True}, ("unsupported_parameter", "echo")),
        ({"best_of": 2}, ("unsupported_parameter", "best_of")),
        ({"suffix": "end"}, ("unsupported_parameter", "suffix")),
        ({"logprobs": 0}, ("unsupported_parameter", "logprobs")),
        ({"tools": [WEATHER]}, ("unknown_parameter", "tools")),
        ({"max_tokens": 4097}, ("invalid_value", "max_tokens")),
    ],
)
def test_texts_that_are_refused(fields: dict[str, Any], expected: tuple[str, str]) -> None:
    assert fault(lambda: text(**fields)) == expected


def test_a_list_of_one_prompt_is_a_prompt() -> None:
    assert text(["Once"]) == text("Once")


def test_tools_are_passed_on_as_they_are() -> None:
    event = chat(tools=[WEATHER, CLOCK], tool_choice="none", parallel_tool_calls=False)
    assert json.loads(event.extra["tools"]) == [WEATHER, CLOCK]
    assert (event.extra["tool_choice"], event.extra["parallel_tool_calls"]) == ('"none"', "false")


def test_to_choose_a_tool_is_to_offer_no_other() -> None:
    """llama.cpp knows no choice by name, and takes it for none."""
    event = chat(tools=[WEATHER, CLOCK], tool_choice={"type": "function", "function": {"name": "clock"}})
    assert json.loads(event.extra["tools"]) == [CLOCK]
    assert event.extra["tool_choice"] == '"required"'


def test_a_schema_is_passed_on_as_it_is() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    assert json.loads(chat(response_format=wanted).extra["response_format"]) == wanted


@pytest.mark.parametrize("levels", [50, 70, 400])
def test_a_schema_nested_too_deep_is_refused(levels: int) -> None:
    schema: Any = {"type": "object"}
    for _ in range(levels):
        schema = {"items": schema}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    if levels < 60:
        assert "response_format" in chat(response_format=wanted).extra
    else:
        assert fault(lambda: chat(response_format=wanted)) == ("invalid_value", "response_format")


def test_logprobs() -> None:
    assert chat(logprobs=True).extra == {"logprobs": "true"}
    assert chat(logprobs=True, top_logprobs=3).extra == {"logprobs": "true", "top_logprobs": "3"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nonsense", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xff"]
)
def test_what_is_not_json(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_chat(body, LIMITS, id="", now=0)


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"5", b"null"])
def test_what_is_no_object(body: bytes) -> None:
    assert fault(lambda: read_chat(body, LIMITS, id="", now=0)) == ("invalid_type", None)


def test_a_fault_does_not_say_much_back() -> None:
    with pytest.raises(InvalidField) as caught:
        chat(**{"x" * 10_000: 1})
    assert len(caught.value.message) <= 300
    assert len(caught.value.param or "") <= 64


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    "model max_tokens temperature stop seed logit_bias n stream stream_options tools tool_choice response_format"
    " messages metadata prompt audio logprobs echo user".split()
)


@given(st.dictionaries(NAMES, JSON, max_size=4))
def test_whatever_comes_is_read_or_refused(fields: dict[str, Any]) -> None:
    """And what is read has types that a model server can take, as JSON texts where they are passed on."""
    for read in (read_chat, read_text):
        try:
            event = read(json.dumps({"messages": [HI], **fields}).encode(), LIMITS, id="", now=0)
        except DomainError:
            continue
        for value in event.extra.values():
            json.loads(value)
