"""HTTP/1.1 from those who mean no good: what is malformed, too large, too much at a time, or too slow."""

import json

import pytest
from harness import MemoryTransport, parse_responses
from hypothesis import given
from hypothesis import strategies as st
from logged import clean_log
from surface import Surface, make_surface
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from ai_ticket.web.heads import MAX_HEAD_BYTES

BODY = b'{"content": "hello"}'
LINE = b"GET /health/live HTTP/1.1\r\n"
HEAD = b"POST /event HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: 20\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"14\r\n" + BODY + b"\r\n"
END = b"0\r\n\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"


def get(fields: bytes = b"", line: bytes = LINE) -> bytes:
    return line + b"Host: x\r\n" + fields + b"\r\n"


MALFORMED = {
    "fields": [
        get(b"X: a\r\n b\r\n"),
        get(b"X: a\r\n\tb\r\n"),
        get(b"X: a\rb\r\n"),
        get(b"X: a\n"),
        get(b"X: a\0b\r\n"),
        get(b"X: a\x01b\r\n"),
        get(b"X: a\x7fb\r\n"),
        get(b"X : a\r\n"),
        get(b"X\t: a\r\n"),
        get(b"Xa\r\n"),
        get(b": a\r\n"),
        get(b"X(: a\r\n"),
        get(b"\xe9: a\r\n"),
        LINE + b" Host: x\r\n\r\n",
        LINE.replace(b"\r\n", b"\n") + b"Host: x\n\n",
    ],
    "the host": [
        LINE + b"\r\n",
        get(b"Host: x\r\n"),
        get(b"Host: y\r\n"),
        LINE + b"Host: a b\r\n\r\n",
        LINE + b"Host: a/b\r\n\r\n",
        LINE + b"Host: [::::]\r\n\r\n",
        LINE + b"Host: x%zz\r\n\r\n",
        b"GET /health/live HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
    ],
    "the request line": [
        get(line=b"GET http://y/health/live HTTP/1.1\r\n"),
        get(line=b"GET http://u:p@x/health/live HTTP/1.1\r\n"),
        get(line=b"GET x:80 HTTP/1.1\r\n"),
        get(line=b"GET * HTTP/1.1\r\n"),
        get(line=b"GET health HTTP/1.1\r\n"),
        get(line=b"GET /health#live HTTP/1.1\r\n"),
        get(line=b"GET /\x01 HTTP/1.1\r\n"),
        get(line=b"get / HTTP/1.1\r\n"),
        get(line=b"GET\t/ HTTP/1.1\r\n"),
        get(line=b"GET / HTTP/1.1 \r\n"),
        get(line=b"GET / HTTP/1.2\r\n"),
        get(line=b"GET / HTTP/2.0\r\n"),
        get(line=b"GET / http/1.1\r\n"),
        get(line=b" GET / HTTP/1.1\r\n"),
        get(line=b"GET  /health/live HTTP/1.1\r\n"),
        get(line=b"GET /health/live   HTTP/1.1\r\n"),
        get(line=b"GET /health/live RTSP/1.1\r\n"),
        get(line=b"DESCRIBE /x RTSP/1.0\r\n"),
        get(line=b"SOURCE /x ICE/1.0\r\n"),
        HEAD.replace(b" HTTP/", b" RTSP/") + LENGTH + b"\r\n" + BODY,
        *(before + get() for before in (b"\n", b"\r", b"\n\n", b"\n" * 1000, b"\r\r\n", b"\r\n\n", b"\r\n\r\n")),
        b"GET /\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    "how long the body is": [
        HEAD + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNK + END,
        HEAD + b"Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n" + CHUNK + END,
        HEAD + LENGTH + b"Transfer-Encoding: identity\r\n\r\n" + BODY,
        HEAD + LENGTH + LENGTH + b"\r\n" + BODY,
        *(
            HEAD + b"Content-Length: %b\r\n\r\n" % length + BODY
            for length in (b"20, 20", b"+20", b"-20", b"0x14", b"", b"2 0", b"20.0", b"2_0", b"9" * 25, b"0" * 5000)
        ),
        *(
            HEAD + b"Transfer-Encoding: %b\r\n\r\n" % coding + CHUNK + END
            for coding in (b"gzip", b"gzip, chunked", b"chunked, gzip", b"identity", b"chunked, chunked", b"xchunked")
        ),
        HEAD + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK + END,
        CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + CHUNK + END,
    ],
    "chunks": [
        *(
            CHUNKED + size + b"\r\n" + BODY + b"\r\n" + END
            for size in (b"0x14", b"+14", b"-14", b" 14", b"14 ", b"14\t", b"", b"1_4", b"f" * 17, b"zz")
        ),
        CHUNKED + b"14\n" + BODY + b"\r\n" + END,
        CHUNKED + b"14\r\n" + BODY + b"\n" + END,
        CHUNKED + b"14\r\n" + BODY + END,
        CHUNKED + CHUNK + b"0\n\n",
        CHUNKED + CHUNK + b"0\r\n\n",
        CHUNKED + b"14;a\rb\r\n" + BODY + b"\r\n" + END,
        CHUNKED + b"14;a\nb\r\n" + BODY + b"\r\n" + END,
        CHUNKED + b'14;a="\n"\r\n' + BODY + b"\r\n" + END,
        CHUNKED + b"14;a\0\r\n" + BODY + b"\r\n" + END,
        CHUNKED + b"14 ;a\r\n" + BODY + b"\r\n" + END,
    ],
    "trailers": [
        CHUNKED + CHUNK + b"0\r\nX : y\r\n\r\n",
        CHUNKED + CHUNK + b"0\r\nX: y\r\n z\r\n\r\n",
        CHUNKED + CHUNK + b"0\r\nX: y\0\r\n\r\n",
    ],
    "an offer to upgrade changes none of it": [
        get(b"X: a\r\n b\r\n" + UPGRADE),
        HEAD + LENGTH + LENGTH + UPGRADE + b"\r\n" + BODY,
        HEAD + LENGTH + b"Transfer-Encoding: chunked\r\n" + UPGRADE + b"\r\n" + CHUNK + END,
        get(b"Host: y\r\n" + UPGRADE),
    ],
}


def statuses(surface: Surface, data: bytes, step: int | None = None) -> tuple[list[int], MemoryTransport]:
    """The statuses of the answers to what comes at once, or by so many bytes, and the transport."""
    connection, transport = surface.connect()
    for start in range(0, len(data), step or len(data)):
        connection.dataReceived(data[start : start + (step or len(data))])
    surface.clock.advance(0)
    answers = transport.value().replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    return [status for status, _, _ in parse_responses(answers)], transport


@pytest.mark.parametrize("step", [None, 1], ids=["at once", "bytewise"])
@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_malformed_is_400_and_the_end(surface: Surface, what: str, step: int | None) -> None:
    for data in MALFORMED[what]:
        found, transport = statuses(surface, data, step)
        assert found == [400], data
        assert transport.disconnecting, data
    assert surface.pipeline.events == []
    assert surface.recorder.in_flight == 0


@pytest.mark.parametrize("step", [None, 1], ids=["at once", "bytewise"])
def test_what_is_unusual_is_served(surface: Surface, step: int | None) -> None:
    for data in (
        get(b"X: \xc3\xa9\tb\r\n"),
        b"\r\n" + get(),
        LINE + b"Host:\r\n\r\n",
        get(line=b"GET http://x/health/live HTTP/1.1\r\n"),
        get(line=b"GET http://X/health/live?x HTTP/1.1\r\n"),
        b"GET /health/live HTTP/1.0\r\n\r\n",
        HEAD + b"Content-Length: 20 \t\r\n\r\n" + BODY,
        CHUNKED + b'0014;a=b;c="d"\r\n' + BODY + b"\r\n000\r\nX: y\r\n\r\n",
        get(b"Transfer-Encoding: chunked\r\n") + END,
        get(UPGRADE),
        get(b"Connection: Upgrade\r\nUpgrade: websocket\r\n"),
        CHUNKED.replace(b"\r\n\r\n", b"\r\n" + UPGRADE + b"\r\n") + CHUNK + END,
        b"GET /health/live HTTP/1.0\r\n" + UPGRADE + b"\r\n",
        HEAD + LENGTH + b"Expect: 100-Continue\r\n\r\n" + BODY,
    ):
        assert statuses(surface, data, step)[0] == [200], data


@pytest.mark.parametrize("step", [None, 1, 5000])
def test_a_head_may_have_16_kib_and_100_fields(surface: Surface, step: int | None) -> None:
    size = MAX_HEAD_BYTES - len(get(b"X: \r\n"))
    for over, expected in ((0, 200), (1, 431)):
        assert statuses(surface, get(b"X: %b\r\n" % (b"x" * (size + over))), step)[0] == [expected]
        assert statuses(surface, get(b"X: y\r\n" * (99 + over)), step)[0] == [expected]
    target = b"GET /health/live?%b HTTP/1.1\r\n" % (b"x" * (size + 4))
    assert statuses(surface, get(line=target), step)[0] == [200]
    assert statuses(surface, get(line=target.replace(b"?", b"?xx")), step)[0] == [431]


@pytest.mark.parametrize("step", [None, 1000])
@pytest.mark.parametrize(
    "trailers", [b"X: y\r\n" * 97, b"X: %b\r\n" % (b"y" * 16_384), b"X" * 30_000, b"X: " + b"y" * 2_000_000]
)
def test_trailers_count_towards_the_limits_of_the_head(surface: Surface, trailers: bytes, step: int | None) -> None:
    """Also one that never ends."""
    assert statuses(surface, CHUNKED + CHUNK + b"0\r\n" + b"X: y\r\n" * 95 + b"\r\n", step)[0] == [200]
    found, transport = statuses(surface, CHUNKED + CHUNK + b"0\r\n" + trailers + b"\r\n\r\n", step)
    assert found in ([400], [431])
    assert transport.disconnecting
    assert len(surface.pipeline.events) == 1


@pytest.mark.parametrize("data", [b"14;a=" + b"b" * 30_000, b"1;%b\r\n%%b\r\n" % (b"a" * 4000) * 10])
def test_a_body_that_is_mostly_framing_is_refused(surface: Surface, data: bytes) -> None:
    found, transport = statuses(surface, CHUNKED + data.replace(b"%b", b" "))
    assert found == [400]
    assert transport.disconnecting


def test_a_body_in_chunks_of_one_byte_is_read(surface: Surface) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"content": "%s"}' % (b"x" * 9000))
    assert statuses(surface, CHUNKED + chunks + END)[0] == [200]
    assert statuses(surface, CHUNKED + chunks + END, 1)[0] == [200]


def test_rubbish_behind_the_last_request_is_not_looked_at(surface: Surface) -> None:
    assert statuses(surface, get(b"Connection: close\r\n") + b"rubbish")[0] == [200]
    assert statuses(surface, b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n" + b"rubbish" * 10_000)[0] == [404]


def test_any_number_of_offers_to_upgrade(surface: Surface) -> None:
    """Each needs a parser of its own, but they do not pile up."""
    assert statuses(surface, get(UPGRADE) * 1000)[0] == [200] * 1000


@pytest.mark.parametrize("expected", [b"tea", b"100-continue, tea"])
def test_who_expects_anything_else_is_refused(surface: Surface, expected: bytes) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(HEAD + LENGTH + b"Expect: %b\r\n\r\n" % expected)
    [(status, headers, body)] = parse_responses(transport.value())
    assert (status, json.loads(body)["error"]) == (417, "expectation_failed")
    assert headers["connection"] == "close"


def test_http10_callers_are_not_told_to_go_on(surface: Surface) -> None:
    """They would take it for the answer (RFC 9110, 10.1.1)."""
    connection, transport = surface.connect()
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + LENGTH + b"Expect: 100-continue\r\n\r\n"
    connection.dataReceived(head)
    assert transport.value() == b""
    connection.dataReceived(BODY)
    assert transport.value().startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "data",
    [
        get(b"X-Request-ID: mine\r\nHost: y\r\n"),
        get(b"X-Request-ID: mine\r\nA: b\r\nX : y\r\nX-API-Key: mine\r\n"),
        get(b"X-Request-ID: mine\r\nX: " + b"y" * 20_000 + b"\r\n"),
    ],
)
def test_a_refusal_has_what_every_answer_has(surface: Surface, data: bytes) -> None:
    """Its id is ours: the caller's could be a token, and what would tell may not have been read."""
    connection, transport = surface.connect(secure=True)
    connection.dataReceived(data)
    [(_, headers, body)] = parse_responses(transport.value())
    assert headers["x-request-id"] == json.loads(body)["request_id"] == "id0"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["strict-transport-security"] == "max-age=99"
    assert headers["connection"] == "close"


@pytest.mark.parametrize("body", [b"zz\r\n", CHUNK + b"zz\r\n", CHUNK + b"0\r\nX : y\r\n\r\n"])
@pytest.mark.parametrize("step", [None, 1])
def test_a_request_whose_body_breaks_is_refused_as_itself(surface: Surface, body: bytes, step: int | None) -> None:
    """Not as another one, of which nothing is known."""
    data = CHUNKED.replace(b"\r\n\r\n", b"\r\nX-Request-ID: mine\r\n\r\n") + body
    connection, transport = surface.connect()
    for start in range(0, len(data), step or len(data)):
        connection.dataReceived(data[start : start + (step or len(data))])
    [(status, headers, answer)] = parse_responses(transport.value())
    assert (status, headers["connection"]) == (400, "close")
    assert headers["x-request-id"] == json.loads(answer)["request_id"] == "mine"
    assert [found[:3] for found in surface.recorder.finished] == [("/event", "POST", 400)]
    assert surface.recorder.in_flight == 0
    assert transport.disconnecting


def test_each_of_many_request_lines_is_looked_at(surface: Surface) -> None:
    """Wherever in a packet its request begins: behind a head, a body, or a chunked one."""
    other = get(line=b"GET /health/live RTSP/1.1\r\n")
    trailers = END.replace(b"0\r\n", b"0\r\nX: y\r\n")
    for before in (
        get(),
        HEAD + LENGTH + b"\r\n" + BODY,
        CHUNKED + CHUNK + END,
        CHUNKED + CHUNK + trailers,
        get(UPGRADE),
    ):
        for step in (None, 1, 7):
            assert statuses(surface, before * 2 + get(), step)[0] == [200] * 3, (before, step)
            assert statuses(surface, before * 2 + other, step)[0] == [200, 200, 400], (before, step)


def test_the_id_of_an_earlier_request_is_not_that_of_rubbish(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(get(b"X-Request-ID: mine\r\n") + b"rubbish\r\n\r\n")
    _, (_, headers, _) = parse_responses(transport.value())
    assert headers["x-request-id"] == "id0"


@pytest.mark.parametrize(
    ("head", "data"),
    [
        (b"", get() * 1000),
        (b"", (LINE + b"Host:x\r\n" + b"a:\r\n" * 90 + b"\r\n") * 100),
        (b"", get(UPGRADE) * 500),
        (CHUNKED.replace(b"secret", b"wrong"), b"1\r\nx\r\n" * 10_000),
        (CHUNKED.replace(b"/event", b"/events").replace(b"/json", b"/x-ndjson"), b"1\r\n\n\r\n" * 10_000),
    ],
)
def test_a_packet_is_read_a_little_in_each_turn(surface: Surface, head: bytes, data: bytes) -> None:
    """Whatever is in it; and nothing more is taken from the kernel in the meantime."""
    connection, transport = surface.connect()
    connection.dataReceived(head)
    connection.dataReceived(data)
    turns = 0
    while surface.clock.calls and surface.clock.calls[0].getTime() <= surface.clock.seconds():
        assert transport.producerState == "paused"
        before = len(surface.recorder.finished)
        call = surface.clock.calls.pop(0)
        call.called = 1
        call.func()
        assert len(surface.recorder.finished) - before <= 16
        turns += 1
    assert turns >= 2
    assert transport.producerState == "producing"
    connection.connectionLost(Failure(ConnectionDone()))


def test_many_small_packets_have_no_more_of_a_turn_than_one(surface: Surface) -> None:
    """As TLS hands them on, one for each of its records, all of them in one turn."""
    connection, transport = surface.connect()
    for _ in range(100):
        connection.dataReceived(get())
    assert len(surface.recorder.finished) <= 16
    surface.clock.advance(0)
    assert len(list(parse_responses(transport.value()))) == 100


def test_who_does_not_let_the_end_come_is_not_read_on(surface: Surface) -> None:
    """After the last answer what comes is dropped, but no faster than it can be read."""
    connection, transport = surface.connect()
    connection.dataReceived(CHUNKED.replace(b"secret", b"wrong"))
    assert transport.value().startswith(b"HTTP/1.1 401 ")
    connection.dataReceived(b"1\r\nx\r\n" * 10_000)
    assert transport.producerState == "paused"
    surface.clock.advance(0)
    assert transport.producerState == "producing"
    assert not transport.disconnecting


def test_a_head_behind_a_body_has_its_own_deadline(surface: Surface) -> None:
    """Also where the first of it came with the body."""
    connection, transport = surface.connect()
    connection.dataReceived(HEAD + LENGTH + b"\r\n" + BODY + b"GET / HT")
    sweep(surface, 9)
    assert not transport.aborted
    sweep(surface, 2)
    assert transport.aborted


@pytest.mark.parametrize(("rate", "aborted"), [(800, False), (80, True)])
def test_a_large_body_may_take_longer_if_it_keeps_coming(surface: Surface, rate: int, aborted: bool) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(HEAD.replace(b"/event", b"/events") + b"Content-Length: 29000\r\n\r\n[")
    for _ in range(35):
        connection.dataReceived(b" " * rate)
        sweep(surface, 1)
    assert transport.aborted == aborted
    connection.connectionLost(Failure(ConnectionDone()))


def sweep(surface: Surface, seconds: float) -> None:
    surface.clock.advance(seconds)
    surface.connections._check_deadlines()


PIECES = [get(), HEAD, LENGTH, b"\r\n", BODY, CHUNKED, CHUNK, END, UPGRADE, LINE, b"Host: x\r\n", b"a:b\r\n", b"0\r\n"]


@given(st.data())
def test_no_mixture_of_pieces_breaks_it(data: st.DataObject) -> None:
    surface = make_surface()
    surface.pipeline.answer = data.draw(st.sampled_from([lambda: Deferred(), surface.pipeline.answer]))
    with clean_log():
        connection, transport = surface.connect()
        for piece in data.draw(st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=5)), max_size=30)):
            cut = data.draw(st.integers(0, len(piece)))
            connection.dataReceived(piece[:cut])
            connection.dataReceived(piece[cut:])
            surface.clock.advance(data.draw(st.sampled_from([0, 0, 5])))
            surface.connections._check_deadlines()
        connection.connectionLost(Failure(ConnectionDone()))
    assert b"HTTP/1.1 500" not in transport.value()
    assert surface.recorder.in_flight == 0
    assert not surface.clock.getDelayedCalls()
