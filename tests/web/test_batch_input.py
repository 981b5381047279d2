"""What a batch is made of: elements of an array, lines of NDJSON, whatever the pieces that they come in."""

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from ai_ticket.errors import DomainError, InvalidInputFormat, InvalidRequest
from ai_ticket.event import EventLimits, parse_event
from ai_ticket.web.batch_input import Element, LineSplitter, array_elements, lines
from ai_ticket.web.faults import PayloadTooLarge

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def texts(elements: list[Element]) -> list[Any]:
    return [type(one.text) if isinstance(one.text, DomainError) else one.text for one in elements]


@given(values=st.lists(JSON_VALUES, max_size=20))
def test_an_array_is_split_into_its_elements(values: list[Any]) -> None:
    found = array_elements(json.dumps(values).encode(), 20)
    assert [json.loads(one.text) for one in found if isinstance(one.text, bytes)] == values


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", InvalidRequest),
        (b"[1,", InvalidRequest),
        (b"[1] 2", InvalidRequest),
        (b"[nul]", InvalidRequest),
        (b"{", InvalidRequest),
        (b"{}", InvalidInputFormat),
        (b' "a"', InvalidInputFormat),
        (b"1", InvalidInputFormat),
        (b"[1,2,3,4]", PayloadTooLarge),
        (b"[" * 5000 + b"]" * 5000, InvalidRequest),
    ],
)
def test_what_is_no_array_of_a_few_events(body: bytes, error: type[DomainError]) -> None:
    with pytest.raises(error):
        array_elements(body, 3)


def test_an_array_of_too_many_costs_no_more_than_one_of_enough() -> None:
    body = b"[" + b"0," * 2_000_000 + b"0]"
    tracemalloc.start()
    with pytest.raises(PayloadTooLarge):
        array_elements(body, 1000)
    assert tracemalloc.get_traced_memory()[1] < 10 * len(body)
    tracemalloc.stop()


def test_a_lone_surrogate_is_its_own_event_s_fault() -> None:
    body = rb'[{"content": "a"}, {"content": "\ud800"}, {"content": "b", "x": "\ud800"}]'
    good, bad, unread = array_elements(body, 10)
    limits = EventLimits(100, 10)
    for element in (good, unread):
        assert isinstance(element.text, bytes)
        parse_event(element.text, limits, marked=element.marked)
    assert isinstance(bad.text, bytes)
    with pytest.raises(InvalidRequest, match="surrogate"):
        parse_event(bad.text, limits, marked=bad.marked)


def split(pieces: list[bytes], most: int = 100) -> list[Element]:
    splitter = LineSplitter(most)
    return [element for piece in pieces for element in splitter.feed(piece)] + list(splitter.end())


@given(data=st.data(), found=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=8))
def test_lines_are_the_same_in_whatever_pieces_they_come(data: st.DataObject, found: list[bytes]) -> None:
    text = b"\n".join(found)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    expected = [PayloadTooLarge if len(line.lstrip(b" \t\r")) > 8 else line.strip(b" \t\r") for line in found]
    assert texts(split(pieces, most=8)) == [line for line in expected if line]


def test_lines() -> None:
    assert texts(split([b'{"a":1}\r\n\n  \n{"b', b'":2}'])) == [b'{"a":1}', b'{"b":2}']
    assert texts(split([b"x" * 60, b"x" * 60, b"\nok\n"])) == [PayloadTooLarge, b"ok"]
    assert texts(split([b"x" * 101])) == [PayloadTooLarge]
    assert texts(split([])) == []


def test_of_a_line_that_is_too_long_nothing_is_kept() -> None:
    splitter = LineSplitter(1000)
    tracemalloc.start()
    for _ in range(1000):
        assert list(splitter.feed(b"x" * 10_000)) == []
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert texts(list(splitter.feed(b"\nok\n"))) == [PayloadTooLarge, b"ok"]


def test_each_line_is_progress() -> None:
    pieces = [b"1\n2\n3", b"\n", b"4", b""]
    progress: list[bool] = []

    async def read_some() -> bytes:
        return pieces.pop(0)

    async def read_all() -> list[Any]:
        return [element.text async for element in lines(read_some, lambda: progress.append(True), 10)]

    found: list[Any] = []
    Deferred.fromCoroutine(read_all()).addBoth(found.append)
    assert found == [[b"1", b"2", b"3", b"4"]]
    assert len(progress) == 3
