"""HTTP/2 from those who mean no good: floods, what is malformed, too large, too much at a time, or too slow."""

import json
import struct
from collections.abc import Callable

import pytest
from frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GET,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    POST,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    Fields,
    RawClient,
    block,
    frame,
    head,
    settings,
    window,
)
from h2.errors import ErrorCodes
from harness import COMPLETION, Http2Client
from hypothesis import given
from hypothesis import strategies as st
from logged import clean_log, logged_facts
from msgspec.structs import replace
from surface import Surface, make_surface
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from ai_ticket.web.http2 import MAX_CONCURRENT_STREAMS, Http2
from ai_ticket.web.http2_stream import Stream

PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 1, 2, 3
FRAME_SIZE_ERROR, REFUSED_STREAM, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 6, 7, 9, 11

BODY = b'{"content": "hello"}'


def codec(client: RawClient) -> Http2:
    found = client.connection.codec
    assert isinstance(found, Http2)
    return found


def sweep(surface: Surface, seconds: float) -> None:
    surface.clock.advance(seconds)
    surface.connections._check_deadlines()


@pytest.mark.parametrize(
    "flood",
    [
        frame(PING, 0, 0, b"12345678"),
        frame(PING, ACK, 0, b"12345678"),
        frame(SETTINGS),
        frame(SETTINGS, ACK),
        settings(initial_window_size=1) + settings(initial_window_size=2),
        window(1),
        window(1, 1),
        frame(PRIORITY, 0, 1, b"\0\0\0\0\1"),
        frame(RST_STREAM, 0, 3, bytes(4)),
        frame(DATA, 0, 1),
        frame(DATA, PADDED, 1, b"\2\0\0"),
        frame(DATA, 0, 3, b"x"),
        frame(99),
    ],
)
def test_a_flood_of_frames_that_bring_nothing_on_ends_the_connection(surface: Surface, flood: bytes) -> None:
    """In turns that are short enough for the others; but a thousand of them are let pass, and then some each second."""
    surface.pipeline.answer = lambda: Deferred()
    client = RawClient(surface)
    client.send(head(1, POST, ends=False) + head(3))
    client.send(flood * 400)
    for _ in range(60):
        sweep(surface, 0.5)
        client.send(flood * 10)
    assert client.goaway is None
    client.send(flood * 5000, turns=False)
    assert client.goaway is None
    assert client.transport.producerState == "paused"
    surface.clock.advance(0)
    client.take()
    assert client.goaway == ENHANCE_YOUR_CALM
    assert surface.recorder.in_flight == 0


def test_who_takes_an_answer_may_open_windows_as_often_as_there_are_pieces(surface: Surface) -> None:
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text="x" * 400_000))
    client = RawClient(surface)
    client.send(settings(initial_window_size=500) + head(1, POST, ends=False) + frame(DATA, END_STREAM, 1, BODY))
    for _ in range(1000):
        client.send(window(250, 1) + window(250))
    assert client.goaway is None
    assert len(client.data(1)) > 200_000


def test_who_opens_the_window_by_a_byte_at_a_time_is_cut(surface: Surface) -> None:
    """CVE-2019-9511."""
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text="x" * 400_000))
    client = RawClient(surface)
    client.send(settings(initial_window_size=1) + head(1, POST, ends=False) + frame(DATA, END_STREAM, 1, BODY))
    client.send(window(1, 1) * 3000)
    assert client.goaway == ENHANCE_YOUR_CALM
    assert 0 < len(client.data(1)) < 1100


@pytest.mark.parametrize("size", [0, 1])
def test_who_shuts_the_window_is_cut_in_time(surface: Surface, size: int) -> None:
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text="x" * 400_000))
    client = RawClient(surface)
    client.send(settings(initial_window_size=size) + head(1, POST, ends=False) + frame(DATA, END_STREAM, 1, BODY))
    for _ in range(31):
        client.send(frame(PING, 0, 0, b"12345678"))
        sweep(surface, 1)
    client.take()
    assert client.resets() == [(1, ErrorCodes.CANCEL)]
    assert len(client.data(1)) == size


def test_streams_that_come_to_nothing_end_the_connection(surface: Surface) -> None:
    """Reset by the peer (CVE-2023-44487), or by us because of what it does (CVE-2025-8671)."""
    surface.pipeline.answer = lambda: Deferred()
    ways: list[Callable[[int], bytes]] = [
        lambda stream: head(stream, POST, ends=False) + frame(RST_STREAM, 0, stream, bytes(4)),
        lambda stream: head(stream, POST, ends=False) + window(2**31 - 1, stream),
        lambda stream: head(stream, [*POST, (b"content-length", b"1")], ends=False) + frame(DATA, 0, stream, b"xx"),
        lambda stream: head(stream, [*POST, (b"connection", b"close")]),
    ]
    for way in ways:
        client = RawClient(surface)
        begun = surface.recorder.finished.copy()
        for stream in range(1, 2000, 2):
            client.send(way(stream))
            if client.transport.disconnecting:
                break
        assert client.goaway == ENHANCE_YOUR_CALM
        assert len(surface.recorder.finished) - len(begun) <= 201
        assert surface.recorder.in_flight == 0


def test_streams_beyond_the_limit_are_refused_alone(surface: Surface) -> None:
    waiting: list[Deferred[object]] = []

    def answer() -> Deferred[object]:
        waiting.append(Deferred())
        return waiting[-1]

    surface.pipeline.answer = answer
    client = RawClient(surface)
    for stream in range(1, 2 * MAX_CONCURRENT_STREAMS + 20, 2):
        client.send(head(stream, POST, ends=False))
        if stream <= 2 * MAX_CONCURRENT_STREAMS:
            client.send(frame(DATA, END_STREAM, stream, BODY))
    assert client.resets() == [(stream, REFUSED_STREAM) for stream in range(201, 220, 2)]
    for one in waiting:
        one.callback(COMPLETION)
    client.take()
    assert client.goaway is None
    assert list(client.statuses().values()) == [200] * MAX_CONCURRENT_STREAMS
    assert len(codec(client)._streams) == 0


def test_heads_that_do_not_end(surface: Surface) -> None:
    """CVE-2024-27316 and its like: by size, and by number."""
    begin = frame(HEADERS, 0, 1, block(GET))
    for more in (frame(CONTINUATION, 0, 1), frame(CONTINUATION, 0, 1, b"\0\1a\1b" * 3000)):
        client = RawClient(surface)
        client.send(begin + more * 70)
        assert client.goaway == ENHANCE_YOUR_CALM
    for other in (frame(99), frame(PING, 0, 0, b"12345678"), frame(GOAWAY, 0, 0, bytes(8)), head(3)):
        client = RawClient(surface)
        client.send(begin + other)
        assert client.goaway == PROTOCOL_ERROR


def test_heads_in_several_frames(surface: Surface) -> None:
    whole = block(GET)
    client = RawClient(surface)
    client.send(frame(HEADERS, END_STREAM, 1, whole[:3]) + frame(CONTINUATION, 0, 1, whole[3:5]))
    client.send(frame(CONTINUATION, END_HEADERS, 1, whole[5:]))
    client.send(frame(HEADERS, END_STREAM | END_HEADERS | PADDED, 3, b"\2" + whole + b"\0\0"))
    client.send(frame(HEADERS, END_STREAM | END_HEADERS | PRIORITISED, 5, b"\0\0\0\0\1" + whole))
    assert client.statuses() == {1: 200, 3: 200, 5: 200}


def test_a_head_must_be_whole_in_time_whatever_else_goes_on(surface: Surface) -> None:
    surface.pipeline.answer = lambda: Deferred()
    for rest in (frame(HEADERS, 0, 3, block(GET)), frame(HEADERS, 4, 3, block(GET))[:-1], b"\0\0"):
        client = RawClient(surface)
        client.send(head(1, POST, ends=False) + frame(DATA, END_STREAM, 1, BODY) + rest)
        sweep(surface, 9)
        assert not client.transport.aborted
        sweep(surface, 2)
        assert client.transport.aborted
        client.connection.connectionLost(Failure(ConnectionDone()))
    client = RawClient(surface)
    client.send(head(1, POST, ends=False) + frame(DATA, END_STREAM, 1, BODY)[:-1])
    sweep(surface, 25)
    assert not client.transport.aborted, "this is a body's matter"
    client.connection.connectionLost(Failure(ConnectionDone()))


@pytest.mark.parametrize("more", [[(b"a", b"")] * 97, [(b"a", b"x" * 16_300)], [(b"a", b"x" * 15_000)] * 2])
def test_too_large_a_head_is_431(surface: Surface, more: Fields) -> None:
    client = RawClient(surface)
    data = block([*POST, (b"x-request-id", b"mine"), *more])
    with logged_facts("malformed request") as lines:
        client.send(frame(HEADERS, 0, 1, data[:16_000]) + frame(CONTINUATION, END_HEADERS, 1, data[16_000:]))
        client.send(frame(DATA, END_STREAM, 1, BODY) + head(3))
    assert lines == [{"status": 431, "request_id": "mine", "peer": "192.0.2.7", "method": "POST"}]
    assert client.statuses() == {1: 431, 3: 200}
    assert json.loads(client.data(1))["request_id"] == "mine"
    assert surface.pipeline.events == []
    assert surface.recorder.in_flight == 0
    assert codec(client).idle


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\0\1a\x7f\xc9\xff\x00" + b"x" * 15_000, COMPRESSION_ERROR),
        (b"\0\0\0" * 5000, ENHANCE_YOUR_CALM),
        (b"\x20" * 16_000, COMPRESSION_ERROR),
        (b"\x3f\xe1\x1f\x3f\xe1\x1f\x20" + block(GET), COMPRESSION_ERROR),
        (b"\x3f\xe2\x1f" + block(GET), COMPRESSION_ERROR),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", COMPRESSION_ERROR),
        (b"\x40\1a\xff\xff\xff\xff\x7f", COMPRESSION_ERROR),
        (b"\xbe", COMPRESSION_ERROR),
        (b"\x80", COMPRESSION_ERROR),
    ],
)
def test_fields_that_can_not_be_read_end_the_connection(surface: Surface, data: bytes, code: int) -> None:
    client = RawClient(surface)
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, data))
    assert client.goaway == code


def test_a_table_may_be_resized_twice(surface: Surface) -> None:
    client = RawClient(surface)
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x20\x3f\xe1\x1f" + block(GET)))
    assert client.statuses() == {1: 200}


def test_the_peer_has_no_larger_a_table_than_is_good_for_us(surface: Surface) -> None:
    client = RawClient(surface)
    client.send(settings(header_table_size=2**31))
    for stream in range(1, 400, 2):
        client.send(head(stream, [*GET, (b"x-request-id", b"%0100d" % stream)]))
    assert list(client.statuses().values()) == [200] * 200
    assert codec(client).h2.encoder.header_table._current_size <= 4096


def test_the_peer_is_told_how_its_table_changes() -> None:
    """Also where it says the same twice, which hpack would take for no change."""
    surface = make_surface()
    client = RawClient(surface)
    client.send(head(1) + settings(header_table_size=0) + settings(header_table_size=0))
    client.send(head(3) + settings(header_table_size=100) + settings(header_table_size=50))
    client.send(settings(header_table_size=9999) + head(5))
    heads = [payload for kind, _, _, payload in client.received if kind == HEADERS]
    assert heads[1].startswith(b"\x20")
    assert heads[2].startswith(b"\x3f\x13\x3f\xe1\x1f") or heads[2].startswith(b"\x3f\x13"), heads[2][:8]
    assert client.statuses() == {1: 200, 3: 200, 5: 200}


def test_settings_that_nobody_knows_are_not_kept(surface: Surface) -> None:
    client = RawClient(surface)
    for start in range(100, 700, 100):
        client.send(frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", start + n, 1) for n in range(100))))
    assert len(codec(client).h2.remote_settings) < 10
    assert client.goaway is None
    assert sum(kind == SETTINGS and bool(flags & ACK) for kind, flags, *_ in client.received) == 7


def test_streams_that_are_over_are_forgotten(surface: Surface) -> None:
    client = RawClient(surface)
    for stream in range(1, 2500, 2):
        client.send(head(stream))
        surface.clock.advance(0.1)
    state = codec(client).h2
    assert len(state._closed_streams) <= 1000
    assert len(state.streams) <= 2
    assert client.goaway is None


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", PROTOCOL_ERROR),
        (b"PRI * HTTP/2.0\r\n\r\nSX", PROTOCOL_ERROR),
        (PREFACE + head(1), PROTOCOL_ERROR),
        (PREFACE + b"\x00\x40\x01", None),
        (PREFACE + b"\x00\x40\x01\x04\x00\x00\x00\x00\x00", FRAME_SIZE_ERROR),
        (PREFACE + b"\xff\xff\xff\x04\x00\x00\x00\x00\x00", FRAME_SIZE_ERROR),
        (PREFACE + frame(SETTINGS, 0, 1), PROTOCOL_ERROR),
        (PREFACE + frame(SETTINGS, 0, 0, b"12345"), FRAME_SIZE_ERROR),
        (PREFACE + settings() + frame(SETTINGS, ACK, 0, bytes(6)), FRAME_SIZE_ERROR),
        (PREFACE + settings(max_frame_size=1), PROTOCOL_ERROR),
        (PREFACE + settings(initial_window_size=2**31), FLOW_CONTROL_ERROR),
        (PREFACE + settings() + frame(PING, 0, 0, b"1234567"), FRAME_SIZE_ERROR),
        (PREFACE + settings() + frame(PING, 0, 1, b"12345678"), PROTOCOL_ERROR),
        (PREFACE + settings() + frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
        (PREFACE + settings() + frame(DATA, 0, 1, b"x"), PROTOCOL_ERROR),
        (PREFACE + settings() + frame(DATA, PADDED, 1, b"\5xx"), PROTOCOL_ERROR),
        (PREFACE + settings() + head(2), PROTOCOL_ERROR),
        (PREFACE + settings() + head(3) + head(1), PROTOCOL_ERROR),
        (PREFACE + settings() + frame(CONTINUATION, END_HEADERS, 1, block(GET)), PROTOCOL_ERROR),
        (PREFACE + settings() + frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4) + block(GET)), PROTOCOL_ERROR),
        (PREFACE + settings() + window(0), PROTOCOL_ERROR),
        (PREFACE + settings() + window(2**31 - 1), FLOW_CONTROL_ERROR),
        (
            PREFACE
            + settings()
            + head(1, POST, ends=False)
            + settings(initial_window_size=1)
            + window(2**31 - 2, 1)
            + settings(initial_window_size=2**31 - 1),
            FLOW_CONTROL_ERROR,
        ),
        (PREFACE + settings() + frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL_ERROR),
        (PREFACE + settings() + frame(PRIORITY, 0, 1, bytes(4)), FRAME_SIZE_ERROR),
        (PREFACE + settings() + frame(RST_STREAM, 0, 1, bytes(4)), PROTOCOL_ERROR),
        (PREFACE + settings() + frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL_ERROR),
        (PREFACE + settings() + frame(GOAWAY, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    ],
)
def test_faults_of_the_connection(surface: Surface, data: bytes, code: int | None) -> None:
    surface.pipeline.answer = lambda: Deferred()
    client = RawClient(surface, greets=False)
    client.send(data)
    assert client.goaway == code
    assert surface.recorder.in_flight == 0 or code is None


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_any_pace(surface: Surface, step: int) -> None:
    client = RawClient(surface, greets=False)
    data = PREFACE + settings() + head(1, POST, ends=False) + frame(DATA, END_STREAM, 1, BODY) + head(3)
    for start in range(0, len(data), step):
        client.send(data[start : start + step])
    assert client.statuses() == {1: 200, 3: 200}


@pytest.mark.parametrize(
    "data",
    [
        head(3, GET[1:]),
        head(3, [*GET, (b"connection", b"close")]),
        head(3, [*GET, (b"X", b"y")]),
        head(3, [*GET, (b"host", b"y")]),
        head(3, [*GET, (b":status", b"200")]),
        head(3, [(b":status", b"100"), *GET]),
        head(3, [*GET, (b"content-length", b"+1")]),
        head(3, [*GET, (b"content-length", b"1")]),
        head(3, [*POST, (b"content-length", b"1")], ends=False) + frame(DATA, END_STREAM, 3),
        head(3, [*POST, (b"content-length", b"1")], ends=False) + frame(DATA, END_STREAM, 3, b"{}"),
        head(3, [*POST, (b"content-length", b"3")], ends=False) + frame(DATA, END_STREAM, 3, b"{}"),
        head(3, [*POST, (b"content-length", b"3")], ends=False) + frame(DATA, 0, 3, b"{}") + head(3, [(b"a", b"b")]),
        head(3, POST, ends=False) + frame(DATA, 0, 3, BODY) + head(3, [(b":path", b"/")]),
    ],
)
def test_a_malformed_request_ends_its_stream_alone(surface: Surface, data: bytes) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    client = RawClient(surface)
    client.send(head(1, POST, ends=False) + frame(DATA, END_STREAM, 1, BODY))
    client.send(data)
    assert client.resets() == [(3, PROTOCOL_ERROR)]
    client.send(head(5))
    waiting.callback(COMPLETION)
    client.take()
    assert client.statuses() == {1: 200, 5: 200}
    assert client.goaway is None
    assert len(surface.pipeline.events) == 1
    assert surface.recorder.in_flight == 0


def test_a_body_that_is_as_long_as_announced_and_has_trailers(surface: Surface) -> None:
    client = RawClient(surface)
    fields = [*POST, (b"content-length", b"20")]
    client.send(head(1, fields, ends=False) + frame(DATA, 0, 1, BODY) + head(1, [(b"a", b"b")]))
    client.send(head(3, [(b":method", b"HEAD"), *GET[1:], (b"content-length", b"0")]))
    assert client.statuses() == {1: 200, 3: 200}


def test_a_window_that_overflows_ends_its_stream(surface: Surface) -> None:
    cancelled: list[object] = []
    surface.pipeline.answer = lambda: Deferred(cancelled.append)
    client = RawClient(surface)
    client.send(head(1, POST, ends=False) + frame(DATA, END_STREAM, 1, BODY) + window(2**31 - 1, 1))
    assert client.resets() == [(1, FLOW_CONTROL_ERROR)]
    assert len(cancelled) == 1
    assert client.goaway is None


def test_a_peer_that_takes_its_leave_gets_what_it_has_asked_for(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    client = RawClient(surface)
    client.send(head(1, POST, ends=False) + frame(GOAWAY, 0, 0, bytes(8)) + frame(DATA, END_STREAM, 1, BODY))
    surface.clock.advance(5)
    assert client.goaway is None
    waiting.callback(COMPLETION)
    client.take()
    assert client.statuses() == {1: 200}
    surface.clock.advance(1)
    client.take()
    assert client.goaway == 0


def test_a_peer_that_takes_its_leave_with_nothing_under_way(surface: Surface) -> None:
    client = RawClient(surface)
    client.send(head(1) + frame(GOAWAY, 0, 0, bytes(8)))
    surface.clock.advance(1)
    client.take()
    assert client.statuses() == {1: 200}
    assert client.goaway == 0


def test_what_no_frame_should_do_is_no_traceback(surface: Surface, monkeypatch: pytest.MonkeyPatch) -> None:
    """h2 is not meant to fail in any other way than by its own errors. It has."""
    client = RawClient(surface)

    def stumble(data: bytes) -> None:
        raise KeyError(data)

    monkeypatch.setattr(codec(client).h2, "receive_data", stumble)
    with clean_log():
        client.send(head(1))
    assert client.goaway == INTERNAL_ERROR


def test_a_packet_is_read_a_little_in_each_turn(surface: Surface) -> None:
    client = Http2Client(surface.connections, surface.site)
    client.connection.dataReceived(b"".join(head(stream) for stream in range(1, 2001, 2)))
    turns = 0
    while surface.clock.calls:
        assert client.transport.producerState == "paused"
        before = len(surface.recorder.finished)
        call = surface.clock.calls.pop(0)
        call.called = 1
        call.func()
        assert len(surface.recorder.finished) - before <= 16
        turns += 1
    assert turns >= 60
    assert len(surface.recorder.finished) == 1000
    assert client.transport.producerState == "producing"


@pytest.mark.parametrize(
    ("flood", "looked_at"),
    [
        (window(1) * 900, 900),
        (settings() * 900, 0),
        (settings(initial_window_size=0) * 900, 0),
        ((settings(initial_window_size=1) + settings(initial_window_size=0)) * 450, 900),
        (b"".join(settings(initial_window_size=size) for size in range(1, 901)), 2500),
        (b"".join(window(1, stream) for stream in range(1, 201, 2)) * 9, 900),
    ],
)
def test_many_waiting_streams_are_not_looked_at_for_every_frame(
    surface: Surface, monkeypatch: pytest.MonkeyPatch, flood: bytes, looked_at: int
) -> None:
    """There may be a hundred of them for each of some hundreds of frames: those of one turn are worked off at once."""
    client = RawClient(surface)
    client.send(settings(initial_window_size=0) + b"".join(head(stream) for stream in range(1, 201, 2)))
    while surface.clock.calls:
        surface.clock.advance(0)
    looks: list[int] = []
    flush = Stream.flush
    monkeypatch.setattr(Stream, "flush", lambda stream: (looks.append(stream.id), flush(stream)))
    before = 0
    client.send(flood, turns=False)
    while True:
        assert len(looks) - before <= 8000 // 60 + 1, "in one turn"
        before = len(looks)
        if not surface.clock.calls:
            break
        call = surface.clock.calls.pop(0)
        call.called = 1
        call.func()
    assert len(looks) <= looked_at
    client.transport.clear()
    client.connection.connectionLost(Failure(ConnectionDone()))


FRAMES = st.one_of(
    st.sampled_from([b"", b"x", BODY, b'{"content": "x", "stream": true}', bytes(8), b"\0\1a\1b", block(GET)]).flatmap(
        lambda payload: st.builds(
            frame, st.integers(0, 11), st.integers(0, 255), st.integers(0, 9), st.sampled_from([payload])
        )
    ),
    st.builds(head, st.integers(0, 11), st.sampled_from([GET, POST, GET[1:], POST[1:]]), ends=st.booleans()),
    st.builds(frame, st.just(DATA), st.sampled_from([0, 1]), st.integers(0, 11), st.just(BODY)),
    st.builds(window, st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1]), st.integers(0, 9)),
    st.builds(settings, initial_window_size=st.sampled_from([0, 1, 2**31 - 1]), header_table_size=st.integers(0, 5000)),
    st.binary(max_size=20),
)


@given(st.data())
def test_no_mixture_of_frames_breaks_it(data: st.DataObject) -> None:
    surface = make_surface()
    surface.pipeline.answer = data.draw(st.sampled_from([lambda: Deferred(), surface.pipeline.answer]))
    with clean_log():
        client = RawClient(surface)
        for piece in data.draw(st.lists(FRAMES, max_size=20)):
            client.connection.dataReceived(piece)
            surface.clock.advance(data.draw(st.sampled_from([0, 0, 5, 31])))
            surface.connections._check_deadlines()
        client.connection.connectionLost(Failure(ConnectionDone()))
    assert surface.recorder.in_flight == 0
    assert not surface.clock.getDelayedCalls()
