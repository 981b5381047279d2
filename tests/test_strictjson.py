"""Strict JSON: depth whatever the interpreter, and lone surrogates."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_ticket import strictjson


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 1000 + b"]" * 1000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b'[{"a":' * 500 + b"1" + b"}]" * 500,
        b"[" * 100_000,
        b'["]", ' * 1000 + b"1" + b"]" * 1000,
        b'["\\"]", ' * 1000 + b"1" + b"]" * 1000,
        b'["\\\\", ' * 1000 + b"1" + b"]" * 1000,
    ],
)
def test_a_thousand_levels_are_too_deep(text: bytes) -> None:
    assert strictjson.too_deep(text)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 64 + b"]" * 64,
        (b"[" * 64 + b"]" * 64 + b",") * 100,
        b"[],{}," * 10_000,
        b'"' + b"[" * 10_000 + b'"',
        b'"\\"' + b"[" * 10_000 + b'"',
        b'["[","{"],' * 10_000,
        b'"\\\\","' + b"[" * 10_000 + b'"',
    ],
)
def test_breadth_and_brackets_in_strings_are_not_depth(text: bytes) -> None:
    assert not strictjson.too_deep(text)


def depth(value: object) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 0


@given(
    st.recursive(st.text('[]{}"\\a'), lambda inner: st.lists(inner) | st.dictionaries(st.text('[]{}"\\'), inner)),
    st.integers(0, 1100),
)
def test_the_check_agrees_with_the_depth(value: object, levels: int) -> None:
    text = b"[" * levels + json.dumps(value).encode() + b"]" * levels
    found = levels + depth(value)
    if found <= 64 or found >= 1000:
        assert strictjson.too_deep(text) == (found >= 1000)


def test_invalid_utf8_anywhere() -> None:
    with pytest.raises(strictjson.JSONError, match="byte 2"):
        strictjson.check(b'["\xff"]')


@given(st.lists(st.sampled_from(["\\ud800", "\\udc00", "\\ud83d\\ude00", "\\\\", "\\n", "a", "\\u0041", "\\\\ud800"])))
def test_marked_texts_differ_only_in_lone_surrogates(pieces: list[str]) -> None:
    text = '"' + "".join(pieces) + '"'
    marked = strictjson.decode(strictjson.mark_lone_surrogates(text.encode()), str)
    expected = json.loads(text)
    assert marked == "".join(strictjson.LONE_SURROGATE_MARK if 0xD800 <= ord(c) <= 0xDFFF else c for c in expected)
