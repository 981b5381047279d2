"""Answers of model servers as bytes: read the same however they are cut, and bounded whatever they hold."""

import re
from typing import Any

import pytest
from harness import CAPTURES, capture
from hypothesis import given
from hypothesis import strategies as st

from ai_ticket.backend.http1_parser import MAX_HEAD_BYTES, MAX_HEAD_FIELDS, ResponseParser

OK = b"HTTP/1.1 200 OK\r\n"
RECORDINGS = sorted(str(path.relative_to(CAPTURES)) for path in CAPTURES.glob("*/*.txt"))
ANSWERS = {name: answer for name in RECORDINGS if (answer := capture(name)[1])}
PIECE = b"x" * 1024


def read(*pieces: bytes) -> tuple[ResponseParser, bytes]:
    parser = ResponseParser()
    return parser, b"".join([parser.feed(piece) for piece in pieces])


def seen(*pieces: bytes) -> tuple[Any, ...]:
    """All that a caller of the parser gets to see."""
    parser, body = read(*pieces)
    return parser.status, parser.media_type, parser.framed, parser.complete, parser.problem, body


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    at = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[begin:end] for begin, end in zip([0, *at], [*at, len(data)], strict=True)]


@given(st.data())
def test_a_recorded_answer_is_the_same_however_it_is_cut(data: st.DataObject) -> None:
    answer = ANSWERS[data.draw(st.sampled_from(sorted(ANSWERS)))]
    whole = seen(answer)
    assert whole[0]
    assert whole[4] is None
    assert seen(*data.draw(cut(answer))) == whole
    assert seen(*[bytes([byte]) for byte in answer]) == whole


def test_recorded_heads() -> None:
    found = {name: seen(answer) for name, answer in ANSWERS.items()}
    assert len(found) > 150
    for name, (status, media_type, framed, complete, _, body) in found.items():
        assert status == int(ANSWERS[name].split(b" ")[1])
        assert complete is framed, "the others end with their connection"
        assert media_type or status >= 300 or not body or b"ontent-type" not in ANSWERS[name].lower()


FIELDS = st.lists(
    st.tuples(
        st.from_regex(re.compile(rb"X-[A-Za-z0-9!#$%&'*+.^_`|~-]{0,12}"), fullmatch=True),
        st.from_regex(re.compile(rb"[!-~\x80-\xff]?([ -~\t]{0,20}[!-~])?"), fullmatch=True),
    ),
    max_size=6,
)


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, int, bytes, bool]:
    """An answer, and its status, body, and whether it tells its own end."""
    before = b"".join(
        b"HTTP/1.1 %d Wait\r\n%s\r\n" % (status, b"Link: </x>\r\n")
        for status in draw(st.lists(st.sampled_from([100, 102, 103]), max_size=3))
    )
    status = draw(st.sampled_from([200, 201, 204, 302, 304, 400, 404, 500, 503, 599]))
    head = OK.replace(b"200", b"%d" % status)
    head += b"".join(b"%s:%s\r\n" % (name, value) for name, value in draw(FIELDS))
    if status in (204, 304):
        return before + head + b"\r\n", status, b"", True
    pieces = draw(st.lists(st.binary(min_size=1, max_size=50), max_size=5))
    body = b"".join(pieces)
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    if framing == "length":
        head += b"Content-Length: %d\r\n" % len(body)
        return before + head + b"\r\n" + body, status, body, True
    if framing == "close":
        return before + head + b"\r\n" + body, status, body, False
    extension = draw(st.sampled_from([b"", b";a", b";a=b", b';a="b c"']))
    trailer = draw(st.sampled_from([b"", b"X-Sum: 5\r\nContent-Type: a/b\r\n"]))
    chunks = b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces)
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    return before + head + chunks + b"0\r\n" + trailer + b"\r\n", status, body, True


@given(st.data())
def test_any_answer_is_read_as_it_was_meant(data: st.DataObject) -> None:
    answer, status, body, framed = data.draw(answers())
    assert seen(*data.draw(cut(answer))) == (status, "", framed, framed, None, body)


@given(st.data())
def test_what_is_broken_is_the_same_however_it_is_cut(data: st.DataObject) -> None:
    """Whatever came before it is handed on."""
    answer, *_ = data.draw(answers())
    at = data.draw(st.integers(0, len(answer)))
    broken = answer[:at] + data.draw(st.binary(max_size=20)) + answer[at:]
    assert seen(*data.draw(cut(broken))) == seen(broken)


@given(st.lists(st.binary(max_size=100), max_size=20))
def test_garbage(pieces: list[bytes]) -> None:
    parser, body = read(*pieces)
    assert (parser.status, body) == (0, b"")
    begin = b"".join(pieces).lstrip(b"\r\n")[:4]
    assert parser.problem == "the answer is not HTTP/1.1" or b"HTTP".startswith(begin)


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"HTTP/1.1 200 ", PIECE),
        (OK + b"X-Name: ", PIECE),
        (OK, PIECE),
        (OK, b"X-Name: value\r\n" * 64),
        (OK + b"A", b": b\r\nA" * 100),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 40),
        (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 20),
        (b"", b"\r\n" * 512),
        (CHUNKED + b"5;", PIECE),
        (CHUNKED, b"0" * 1024),
        (CHUNKED + b"0\r\nX-Name: ", PIECE),
        (CHUNKED + b"0\r\n", b"X-Name: value\r\n" * 64),
    ],
)
def test_what_never_ends_is_given_up_soon(begin: bytes, piece: bytes) -> None:
    parser = ResponseParser()
    parser.feed(begin)
    for _ in range(MAX_HEAD_BYTES // len(piece) + 1):
        assert parser.feed(piece) == b""
    assert parser.problem is not None
    assert not parser.complete
    assert parser.feed(piece) == b""


def test_what_never_ends_does_not_count_together_over_a_long_body() -> None:
    parser = ResponseParser()
    parser.feed(CHUNKED)
    for _ in range(10_000):
        assert parser.feed(b"2;extension=x\r\n") == b""
        assert parser.feed(b"hi\r\n") == b"hi"
    parser.feed(b"0\r\n\r\n")
    assert (parser.complete, parser.problem) == (True, None)


@pytest.mark.parametrize(
    "head",
    [
        OK + b"A: b\r\n" * (MAX_HEAD_FIELDS + 1) + b"\r\n",
        OK + b"A: " + b"b" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n" + b"A: b\r\n" * 60 + b"\r\n" + OK + b"A: b\r\n" * 60 + b"\r\n",
    ],
)
def test_a_head_that_is_too_large_also_in_one_piece(head: bytes) -> None:
    assert seen(head + b"body") == (0, "", False, False, "the answer's head is too large", b"")
    most = OK + b"A: b\r\n" * (MAX_HEAD_FIELDS - 1) + b"B: " + b"b" * (MAX_HEAD_BYTES - 2000) + b"\r\n\r\nbody"
    assert seen(most) == (200, "", False, False, None, b"body")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (b"Content-Encoding: gzip\r\n", "compressed"),
        (b"Content-Encoding: identity\r\nContent-Encoding: br\r\n", "compressed"),
        (b"Content-Encoding: identity, gzip\r\n", "compressed"),
        (b"Transfer-Encoding: gzip, chunked\r\n", "transfer coding"),
        (b"Transfer-Encoding: gzip\r\n", "transfer coding"),
        (b"Transfer-Encoding: identity\r\n", "transfer coding"),
        (b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "not HTTP"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", "not HTTP"),
        (b"Content-Length: 4\r\nContent-Length: 5\r\n", "not HTTP"),
        (b"Content-Length: 4, 4\r\n", "not HTTP"),
        (b"Content-Length: -4\r\n", "not HTTP"),
        (b"Content-Length: 99999999999999999999999\r\n", "not HTTP"),
        (b"Name : value\r\n", "not HTTP"),
        (b"Name: value\r\n folded\r\n", "not HTTP"),
        (b"Name: nul\0\r\n", "not HTTP"),
        (b"Name: line feed alone\n", "not HTTP"),
    ],
)
def test_heads_that_are_refused(fields: bytes, problem: str) -> None:
    parser, body = read(OK + fields + b"\r\n" + b"body")
    assert parser.problem is not None
    assert problem in parser.problem
    assert (parser.status, body) == (0, b"")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/2.0 200 OK\r\n\r\nbody",
        b"HTTP/0.9 200 OK\r\n\r\nbody",
        b"HTTP/1.1 99 Low\r\n\r\nbody",
        b"HTTP/1.1 2000 High\r\n\r\nbody",
        b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nbody",
        b"HTTP/1.1 101 Switching\r\n\r\n" + OK + b"\r\nbody",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x0a",
    ],
)
def test_what_is_no_answer(answer: bytes) -> None:
    parser, body = read(answer)
    assert parser.problem is not None
    assert (parser.status, body) == (0, b"")


@pytest.mark.parametrize(
    ("answer", "reusable"),
    [
        (OK + b"Content-Length: 4\r\n\r\nbody", True),
        (CHUNKED + b"4\r\nbody\r\n0\r\n\r\n", True),
        (OK.replace(b"1.1", b"1.0") + b"Connection: keep-alive\r\nContent-Length: 4\r\n\r\nbody", True),
        (OK.replace(b"1.1", b"1.0") + b"Content-Length: 4\r\n\r\nbody", False),
        (OK + b"Connection: close\r\nContent-Length: 4\r\n\r\nbody", False),
        (OK + b"Content-Length: 4\r\n\r\nbodyHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother", False),
        (OK + b"Content-Length: 4\r\n\r\nbodyand more", False),
        (OK + b"Connection: close\r\nContent-Length: 4\r\n\r\nbodyand more", False),
    ],
)
def test_whether_a_connection_takes_another_request(answer: bytes, reusable: bool) -> None:
    """Not where the server says so, nor where more came than was asked for, which is dropped."""
    parser, body = read(answer)
    assert (parser.status, body, parser.complete, parser.problem) == (200, b"body", True, None)
    assert parser.reusable is reusable


@pytest.mark.parametrize(
    ("value", "media_type"),
    [
        (b"text/event-stream", "text/event-stream"),
        (b"Text/Event-Stream ; charset=utf-8", "text/event-stream"),
        (b"", ""),
        (b"a/" + b"b" * 300, "a/" + "b" * 126),
        (b"text/html\r\nContent-Type: application/json", "text/html"),
    ],
)
def test_media_types(value: bytes, media_type: str) -> None:
    assert seen(OK + b"Content-Type: " + value + b"\r\n\r\n")[1] == media_type


def test_a_trailer_is_not_a_header() -> None:
    answer = CHUNKED + b"2\r\nhi\r\n0\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n"
    assert seen(answer) == (200, "", True, True, None, b"hi")
