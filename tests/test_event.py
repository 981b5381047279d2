"""Events: what becomes of a body, by the worked cases and by rules that they do not show."""

import json
import string
from typing import Any

import pytest
from harness import HERE
from hypothesis import given
from hypothesis import strategies as st

from ai_ticket.errors import DomainError
from ai_ticket.event import Event, EventLimits, Message, parse_event

CASES = [
    case
    for case in json.loads((HERE / "data/events.json").read_text())
    if case.get("error") != "unsupported_media_type"
]
LIMITS = EventLimits(max_tokens=4096, default_max_tokens=512)


def parse(body: str | bytes | dict[str, Any]) -> Event:
    if isinstance(body, dict):
        body = json.dumps(body)
    return parse_event(body.encode() if isinstance(body, str) else body, LIMITS)


def fault(body: str | bytes | dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(DomainError) as caught:
        parse(body)
    return caught.value.code, caught.value.details or ""


def texts(body: str | bytes | dict[str, Any]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in parse(body).messages]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_worked_case(case: dict[str, Any]) -> None:
    if case["status"] != 200:
        code, details = fault(case["body"])
        assert code == case["error"]
        assert case.get("details_mentions", "") in details
        return
    event = parse(case["body"])
    assert event.messages == [Message(**message) for message in case["messages"]]
    assert event.metadata == case.get("metadata")
    for name, value in case.get("options", {}).items():
        assert getattr(event.parameters, name) == value


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"messages": []}, "x"], None),
        ([{"messages": [], "prompt": "p"}, "x"], [("user", "p\nx")]),
        ([{"role": "user", "content": "u", "max_tokens": 0}], [("user", "u")]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], [("user", "a")]),
        ([{"prompt": "p", "role": None}], [("user", "p")]),
        (["", "x"], [("user", "\nx")]),
        ([5], None),
        ([["x"]], None),
        ([None], None),
        ([{}], None),
        ([{"role": "user"}], None),
        ([{"content": "x"}], None),
        ([{"role": "boss", "content": "x"}], None),
        ({"role": "user", "content": "x"}, None),
        ({"prompt": None, "messages": None}, None),
        ({"prompt": 5}, None),
        ({"prompt": True}, None),
        ({"prompt": "p", "messages": "x"}, None),
        ({"prompt": "p", "messages": [{"role": "user"}]}, None),
        ({"prompt": "p", "messages": None}, [("user", "p")]),
        ({"messages": [{"role": "user", "content": None}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, None),
        ({"messages": [{"role": "tool", "content": "t"}, {"role": "developer", "content": "d"}]}, None),
        ('{"prompt": 5}', [("user", '{"prompt": 5}')]),
        ('{"prompt": "p", "messages": "x"}', [("user", '{"prompt": "p", "messages": "x"}')]),
        (' ["a", "b"] ', [("user", "a\nb")]),
        ('{"prompt": " "}', [("user", '{"prompt": " "}')]),
        ("[" * 2000, [("user", "[" * 2000)]),
        ("[" * 2000 + "]" * 2000, [("user", "[" * 2000 + "]" * 2000)]),
        ("\u2003\u00a0", None),
    ],
)
def test_content(content: Any, expected: list[tuple[str, str]] | None) -> None:
    if expected is None:
        assert fault({"content": content})[0] == "prompt_extraction_failed"
    else:
        assert texts({"content": content}) == expected


@pytest.mark.parametrize("role", ["<boss>", "a'b", "x - at `$.y`"])
def test_details_do_not_quote_what_was_sent(role: str) -> None:
    found = fault({"content": {"messages": [{"role": role, "content": "x"}]}})
    assert found == ("prompt_extraction_failed", "content.messages[0].role: Not one of the allowed values")


def test_details_name_the_path() -> None:
    assert (
        "content.messages[1].role"
        in fault({"content": {"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "b"}]}})[1]
    )
    assert "content[2]" in fault({"content": ["a", "b", {"role": "user"}]})[1]
    assert "content[1]" in fault({"content": ["a", 5]})[1]
    for nothing in ({}, {"text": "b"}, {"messages": []}, {"prompt": None}):
        assert fault({"content": ["a", nothing, 5]})[1] == "content[1]: neither a text nor a message"
    assert "parameters.top_p" in fault({"content": "x", "parameters": {"top_p": 0}})[1]
    assert "content.seed" in fault({"content": {"prompt": "x", "seed": -1}})[1]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("max_tokens", [1, 4096], [0, 4097, 1.5, True, "5", [1]]),
        ("temperature", [0, 5, 0.5], [-0.1, 5.1, True, "1"]),
        ("top_p", [1, 0.01], [0, 1.01, False]),
        ("top_k", [0, 40], [-1, 1.5, True]),
        ("min_p", [0, 1], [-0.1, 1.1, True]),
        ("seed", [0, 2**32 - 1], [-1, 2**32, 1.5, True]),
        ("stop", ["x", ["x"], ["x"] * 16], ["", [], [""], ["x"] * 17, [1], 5, {}]),
    ],
)
def test_parameter_bounds(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        found = getattr(parse({"content": "x", "parameters": {name: value}}).parameters, name)
        assert found == ([value] if name == "stop" and isinstance(value, str) else value)
    for value in bad:
        code, details = fault({"content": "x", "parameters": {name: value}})
        assert (code, f"parameters.{name}" in details) == ("invalid_parameter", True)
    assert getattr(parse({"content": "x", "parameters": {name: None}}).parameters, name) == (
        512 if name == "max_tokens" else None
    )


def test_a_top_k_beyond_any_vocabulary_stays_a_32_bit_integer() -> None:
    assert parse({"content": "x", "parameters": {"top_k": 10**30}}).parameters.top_k == 2**31 - 1


def test_the_default_of_max_tokens_stays_within_the_limit() -> None:
    event = parse_event(b'{"content": "x"}', EventLimits(max_tokens=100, default_max_tokens=512))
    assert event.parameters.max_tokens == 100


def test_parameters_inside_a_string_count_and_are_checked() -> None:
    assert parse({"content": '{"prompt": "x", "max_tokens": 7}'}).parameters.max_tokens == 7
    assert fault({"content": '{"prompt": "x", "max_tokens": 0}'})[0] == "invalid_parameter"


@pytest.mark.parametrize("field", ["parameters", "stream", "metadata"])
def test_null_counts_as_absent(field: str) -> None:
    assert parse({"content": "x", field: None}) == parse({"content": "x"})


def test_metadata() -> None:
    assert parse({"content": "x", "metadata": {"a": "b", "c": None}}).metadata == {"a": "b"}
    assert fault({"content": "x", "metadata": {str(n): "" for n in range(17)}})[0] == "invalid_parameter"
    assert fault({"content": "x", "metadata": ["a"]})[0] == "invalid_parameter"


def test_of_repeated_keys_the_last_counts() -> None:
    assert texts('{"content": 5, "content": "x"}') == [("user", "x")]
    assert texts('{"content": {"prompt": 5, "prompt": "x", "messages": 1, "messages": null}}') == [("user", "x")]
    assert parse('{"content": "x", "parameters": {"seed": "a", "seed": 1}}').parameters.seed == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"content": "x", "y": "\xff"}',
        b'{"content": "\xed\xa0\x80"}',
        b'{"content": "\\ud800"}',
        b'{"content": "x\\udc00 y"}',
        b'{"content": "x", "metadata": {"a": "\\ud800"}}',
        b'{"content": "x", "parameters": {"stop": "\\ud800"}}',
        b'{"content": ["a", "\\ud800\\ud800"]}',
        b'\xef\xbb\xbf{"content": "x"}',
        b'{"content": "x", "y": 01}',
        b'{"content": "x", "y": Infinity}',
        b"{'content': 'x'}",
        b'{"content": "x",}',
        b'{"content": "a\nb"}',
        b'{"content": "x"}\x00',
        b'{"content": "x"}{}',
        b" ",
        b'{"content": "x", "y": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        b'{"content": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
    ],
)
def test_what_is_not_json(body: bytes) -> None:
    assert fault(body)[0] == "invalid_request"


def test_a_lone_surrogate_that_nobody_reads_does_no_harm() -> None:
    assert texts(b'{"content": "x", "y": "\\ud800", "\\uDFFF": 1}') == [("user", "x")]
    assert texts(b'{"content": "\\\\ud800 \\ud83d\\ude00", "y": "\\ud800"}') == [("user", "\\ud800 😀")]


def test_64_levels_pass() -> None:
    assert texts(b'{"content": "x", "y": ' + b"[" * 63 + b"]" * 63 + b"}") == [("user", "x")]


@pytest.mark.parametrize("body", ["[1", "5 5", "[NaN]", "true x", '"a', "nul"])
def test_what_begins_like_another_value_but_is_no_json(body: str) -> None:
    assert fault(body)[0] == "invalid_request"


def test_an_unknown_parameter_is_named_by_its_path_and_not_at_length() -> None:
    assert fault({"content": "x", "parameters": {"temprature": 1}})[1] == "parameters.temprature is not a parameter"
    assert len(fault({"content": "x", "parameters": {"a" * 10_000: 1}})[1]) < 100


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_is_its_own_prompt_or_has_none(text: str) -> None:
    body = {"content": text}
    looks_like_json = text.strip(" \t\r\n")[:1] in ("{", "[")
    if not text.strip():
        assert fault(body)[0] == "prompt_extraction_failed"
    elif not looks_like_json:
        assert texts(body) == [("user", text)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(string.printable),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["content", "prompt", "messages", "role", "max_tokens", "stop", "text", "type", "other"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["content", "parameters", "stream", "metadata", "x"]), json_values))
def test_any_object_is_an_event_or_a_fault_of_the_table(value: dict[str, Any]) -> None:
    try:
        event = parse(value)
    except DomainError as error:
        assert error.code in (
            "missing_content_field",
            "invalid_parameter",
            "prompt_extraction_failed",
            "invalid_request",
        )
    else:
        assert any(message.role == "user" and message.content.strip() for message in event.messages)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_a_fault(body: bytes) -> None:
    try:
        parse(body)
    except DomainError as error:
        assert error.code
