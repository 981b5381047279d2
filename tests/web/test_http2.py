"""HTTP/2: the same answers as HTTP/1.1, flow control, resets, deadlines, draining."""

import json
from typing import Any

import h2.events
import h2.settings
import pytest
from frames import GET, GOAWAY, POST, RawClient, frame, head
from harness import COMPLETION, Http2Client
from hypothesis import given
from hypothesis import strategies as st
from logged import logged, logged_facts
from msgspec.structs import replace
from surface import MAX_BODY, Surface, make_surface
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure

from ai_ticket.web.http2 import GOAWAY_SECONDS

BODY = b'{"content": "hello"}'
HEADERS = [("authorization", "Bearer secret"), ("content-type", "application/json")]


def test_one_answer(surface: Surface) -> None:
    client = surface.connect2()
    stream = client.request("POST", "/event", HEADERS, BODY)
    status, headers, body = client.response(stream)
    assert status == 200
    assert json.loads(body)["completion"] == COMPLETION.text
    assert headers["x-request-id"] == "id0"
    assert "server" not in headers
    assert "connection" not in headers


def test_many_streams_at_a_time_in_any_order(surface: Surface) -> None:
    waiting: list[Deferred[object]] = []

    def answer() -> Deferred[object]:
        waiting.append(Deferred())
        return waiting[-1]

    surface.pipeline.answer = answer
    client = surface.connect2()
    streams = [client.request("POST", "/event", HEADERS, BODY) for _ in range(3)]
    for one in reversed(waiting):
        one.callback(COMPLETION)
    client.exchange()
    assert [client.response(stream)[0] for stream in streams] == [200] * 3


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/event", [("content-type", "application/json")], 401),
        ("POST", "/nope", HEADERS, 404),
        ("PUT", "/event", HEADERS, 405),
        ("POST", "/event", [HEADERS[0], ("content-type", "text/plain")], 415),
        ("POST", "/event", [*HEADERS, ("content-length", "1000000")], 413),
    ],
)
def test_refused_from_the_head(
    surface: Surface, method: str, path: str, headers: list[tuple[str, str]], status: int
) -> None:
    """The answer is there before the body; the stream is reset only if the caller goes on regardless."""
    client = surface.connect2()
    stream = client.h2.get_next_available_stream_id()
    head = [(":method", method), (":path", path), (":scheme", "https"), (":authority", "x"), *headers]
    client.h2.send_headers(stream, head)
    client.exchange()
    assert client.response(stream)[0] == status
    assert any(isinstance(event, h2.events.StreamEnded) for event in client.events)
    for _ in range(3):
        client.h2.send_data(stream, b"x" * 10_000)
        client.exchange()
    assert not any(isinstance(event, h2.events.StreamReset) for event in client.events)
    surface.clock.advance(6)
    surface.connections._check_deadlines()
    client.exchange()
    [reset] = [event for event in client.events if isinstance(event, h2.events.StreamReset)]
    assert reset.error_code == 0
    again = client.request("GET", "/health/live")
    assert client.response(again)[0] == 200


def test_a_body_without_length_is_refused_at_the_first_byte_over_the_limit(surface: Surface) -> None:
    client = surface.connect2()
    stream = client.h2.get_next_available_stream_id()
    head = [(":method", "POST"), (":path", "/event"), (":scheme", "https"), (":authority", "x"), *HEADERS]
    client.h2.send_headers(stream, head)
    client.h2.send_data(stream, b"x" * MAX_BODY)
    client.exchange()
    assert client.response(stream)[0] == 0
    client.h2.send_data(stream, b"x")
    client.exchange()
    assert client.response(stream)[0] == 413


def test_a_refused_caller_who_stops_short_leaves_the_other_streams_alone(surface: Surface) -> None:
    """As curl does it: it ends the body where it is, which is less than it had announced."""
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    client = surface.connect2()
    other = client.request("POST", "/event", HEADERS, BODY)
    client.h2.send_headers(
        3,
        [(":method", "POST"), (":path", "/nope"), (":scheme", "https"), (":authority", "x"), ("content-length", "999")],
    )
    client.exchange()
    assert client.response(3)[0] == 404
    client.h2.send_data(3, b"some", end_stream=True)
    client.exchange()
    waiting.callback(COMPLETION)
    client.exchange()
    assert client.response(other)[0] == 200
    assert not client.transport.disconnecting


def test_what_ends_within_the_packet_that_begins_it(surface: Surface) -> None:
    """Whatever comes of it, nothing is left under way."""
    surface.pipeline.answer = lambda: Deferred()
    fields = [(":method", "GET"), (":path", "/health/live"), (":scheme", "https"), (":authority", "x")]
    client = surface.connect2()
    client.h2.send_headers(1, fields, end_stream=True)
    client.h2.reset_stream(1)
    client.h2.send_headers(3, [*fields, ("expect", "100-continue")])
    client.h2.reset_stream(3)
    client.h2.send_headers(5, fields, end_stream=True)
    client.exchange()
    assert surface.recorder.in_flight == 0
    last = RawClient(surface)
    last.send(head(1) + frame(GOAWAY, payload=bytes(4) + b"\0\0\0\1"))
    assert surface.recorder.in_flight == 0
    assert last.transport.disconnecting


def test_a_token_that_is_refused_is_not_logged(surface: Surface) -> None:
    logged: list[str] = []

    def observe(event: dict[str, object]) -> None:
        logged.append(str(event))

    globalLogPublisher.addObserver(observe)
    client = RawClient(surface)
    client.send(head(1, [*POST, (b"x-api-key", b"canary ")]))
    client.send(head(3, POST, ends=False) + head(3, [(b"x-api-key", b"canary")], ends=False))
    globalLogPublisher.removeObserver(observe)
    assert any("protocol error" in line for line in logged)
    assert "canary" not in "".join(logged)


def test_an_empty_body_of_a_refused_request(surface: Surface) -> None:
    """Its end comes as a frame of data with nothing in it."""
    client = surface.connect2()
    stream = client.h2.get_next_available_stream_id()
    client.h2.send_headers(stream, [(":method", "POST"), (":path", "/nope"), (":scheme", "https"), (":authority", "x")])
    client.h2.send_data(stream, b"", end_stream=True)
    client.exchange()
    assert client.response(stream)[0] == 404
    assert client.connection.codec is not None
    assert client.connection.codec.idle


def test_bodies_larger_than_the_window_are_let_in_as_they_are_read(surface: Surface) -> None:
    client = surface.connect2()
    for _ in range(20):
        stream = client.request("POST", "/event", HEADERS, b'{"content": "%s"}' % (b"x" * 9000))
        surface.clock.advance(0)
        client.exchange()
        assert client.response(stream)[0] == 200


def test_a_large_answer_waits_for_the_callers_window(surface: Surface) -> None:
    text = "x" * 200_000
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text=text))
    client = surface.connect2()
    stream = client.request("POST", "/event", HEADERS, BODY)
    assert len(client.response(stream)[2]) == 65_535
    while not any(isinstance(event, h2.events.StreamEnded) for event in client.events):
        client.h2.increment_flow_control_window(30_000)
        client.h2.increment_flow_control_window(30_000, stream)
        assert client.exchange()
    assert json.loads(client.response(stream)[2])["completion"] == text


def test_a_transport_with_a_full_buffer_is_not_written_to(surface: Surface) -> None:
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text="x" * 50_000))
    client = surface.connect2()
    stream = client.h2.get_next_available_stream_id()
    head = [(":method", "POST"), (":path", "/event"), (":scheme", "https"), (":authority", "x"), *HEADERS]
    client.h2.send_headers(stream, head)
    client.exchange()
    client.connection.pauseProducing()
    client.h2.send_data(stream, BODY, end_stream=True)
    client.exchange()
    assert client.response(stream)[2] == b""
    client.connection.resumeProducing()
    client.exchange()
    assert len(client.response(stream)[2]) > 50_000


def test_requests_take_turns_with_the_rest_of_the_service(surface: Surface) -> None:
    client = surface.connect2()
    head = [(":method", "GET"), (":path", "/health/live"), (":scheme", "https"), (":authority", "x")]
    streams = range(1, 101, 2)
    for stream in streams:
        client.h2.send_headers(stream, head, end_stream=True)
    client.exchange()
    assert len(surface.recorder.finished) == 16
    assert client.transport.producerState == "paused"
    surface.clock.advance(0)
    client.exchange()
    assert [client.response(stream)[0] for stream in streams] == [200] * 50
    assert client.transport.producerState == "producing"


def test_who_leaves_between_turns_leaves_nothing_behind(surface: Surface) -> None:
    client = surface.connect2()
    head = [(":method", "GET"), (":path", "/health/live"), (":scheme", "https"), (":authority", "x")]
    for stream in range(1, 101, 2):
        client.h2.send_headers(stream, head, end_stream=True)
    client.exchange()
    client.connection.connectionLost(Failure(ConnectionDone()))
    assert not surface.clock.getDelayedCalls()
    assert len(surface.recorder.finished) == 16


def test_a_drain_waits_for_the_requests_of_the_next_turn(surface: Surface) -> None:
    client = surface.connect2()
    head = [(":method", "GET"), (":path", "/health/live"), (":scheme", "https"), (":authority", "x")]
    for stream in range(1, 41, 2):
        client.h2.send_headers(stream, head, end_stream=True)
    client.exchange()
    surface.connections.leave()
    assert not client.transport.disconnecting
    surface.clock.advance(0)
    surface.clock.advance(GOAWAY_SECONDS)
    assert client.transport.disconnecting
    assert goaway(client) == 39, "the last stream that was taken"
    assert surface.recorder.finished == [("/health/live", "GET", 200)] * 20


def test_streams_take_turns_where_the_transport_is_slow(surface: Surface) -> None:
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text="x" * 400_000))
    client = surface.connect2()
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 10**6})
    client.h2.increment_flow_control_window(10**6)
    client.exchange()
    client.transport.full_at = 30_000
    streams = [client.request("POST", "/event", HEADERS, BODY) for _ in range(3)]
    for _ in range(3):
        client.connection.resumeProducing()
        client.exchange()
    assert all(client.response(stream)[2] for stream in streams)


def test_answers_that_nobody_takes_end_the_reading(surface: Surface) -> None:
    """Heads of answers have no window that would hold them back."""
    surface.pipeline.answer = lambda: Deferred()
    client = RawClient(surface)
    client.connection.pauseProducing()
    taken = 0
    for stream in range(1, 4001, 2):
        if client.transport.producerState == "producing":
            fields = [(b":method", b"HEAD"), *GET[1:], (b"x-request-id", b"%0128d" % stream)]
            client.send(head(stream, fields))
            taken += 1
    assert client.transport.producerState == "paused"
    assert 200 < taken < 2000
    client.connection.resumeProducing()
    assert client.transport.producerState == "producing"


def ended(surface: Surface) -> list[str]:
    recorder: Any = surface.connections.recorder
    found: list[str] = recorder.ended
    return found


def test_a_caller_who_does_not_read_is_cut_off(surface: Surface) -> None:
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text="x" * 200_000))
    client = surface.connect2()
    client.request("POST", "/event", HEADERS, BODY)
    surface.clock.advance(31)
    with logged() as lines:
        surface.connections._check_deadlines()
    client.exchange()
    assert any(isinstance(event, h2.events.StreamReset) for event in client.events)
    assert ended(surface) == ["unread"]
    assert lines == ["debug: stream of 192.0.2.7 ended: unread"]


def test_a_stream_reset_cancels_its_event_only(surface: Surface) -> None:
    cancelled: list[object] = []
    surface.pipeline.answer = lambda: Deferred(cancelled.append)
    client = surface.connect2()
    stream = client.request("POST", "/event", HEADERS, BODY)
    client.request("POST", "/event", HEADERS, BODY)
    client.h2.reset_stream(stream)
    client.exchange()
    assert len(cancelled) == 1
    assert surface.recorder.finished == [("/event", "POST", 499)]
    client.connection.connectionLost(Failure(ConnectionDone()))
    assert len(cancelled) == 2
    assert surface.recorder.in_flight == 0


def test_a_body_must_come_in_time(surface: Surface) -> None:
    client = surface.connect2()
    head = [(":method", "POST"), (":path", "/event"), (":scheme", "https"), (":authority", "x"), *HEADERS]
    client.h2.send_headers(1, head)
    client.exchange()
    with logged_facts("POST /event 499") as lines:
        for _ in range(31):
            client.h2.send_data(1, b" ")
            surface.clock.advance(1)
            surface.connections._check_deadlines()
            if client.exchange() and client.h2.open_outbound_streams == 0:
                break
    assert any(isinstance(event, h2.events.StreamReset) for event in client.events)
    assert surface.recorder.finished == [("/event", "POST", 499)]
    assert [facts["error"] for facts in lines] == ended(surface) == ["body_timeout"]


@pytest.mark.parametrize(
    ("asked", "more", "reason"),
    [(False, b"", "header_timeout"), (True, b"", "keepalive_timeout"), (True, b"\0\0\x09\x01", "header_timeout")],
)
def test_why_a_connection_was_ended_counts_once(surface: Surface, asked: bool, more: bytes, reason: str) -> None:
    client = surface.connect2()
    if asked:
        client.request("GET", "/health/live")
    client.connection.dataReceived(more)
    for _ in range(90):
        surface.clock.advance(1)
        surface.connections._check_deadlines()
    assert client.transport.aborted
    assert ended(surface) == [reason]


def test_an_idle_connection_is_closed_whatever_pings_come(surface: Surface) -> None:
    client = surface.connect2()
    client.request("GET", "/health/live")
    for _ in range(80):
        surface.clock.advance(1)
        surface.connections._check_deadlines()
        if client.transport.disconnecting:
            break
        client.h2.ping(b"12345678")
        client.exchange()
    assert client.transport.disconnecting
    client.exchange()
    assert any(isinstance(event, h2.events.ConnectionTerminated) for event in client.events)


def test_a_waiting_stream_outlives_every_timeout(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    client = surface.connect2()
    stream = client.request("POST", "/event", HEADERS, BODY)
    surface.clock.advance(1000)
    surface.connections._check_deadlines()
    waiting.callback(COMPLETION)
    client.exchange()
    assert client.response(stream)[0] == 200


def goaway(client: Http2Client) -> int | None:
    """The last stream that was taken, by the GOAWAY that came."""
    client.exchange()
    [last] = [event.last_stream_id for event in client.events if isinstance(event, h2.events.ConnectionTerminated)]
    return last


@pytest.mark.parametrize("leaving", [False, True])
def test_draining_sends_goaway_after_the_last_answer(surface: Surface, leaving: bool) -> None:
    """Some clients give up all of their streams when it comes before they have read that; so there is a pause."""
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    client = surface.connect2()
    stream = client.request("POST", "/event", HEADERS, BODY)
    surface.draining = True
    surface.connections.leave() if leaving else surface.connections.drain()
    assert not client.transport.value()
    refused = client.request("POST", "/event", HEADERS, BODY)
    status, headers, _ = client.response(refused)
    assert (status, headers["retry-after"]) == (503, "5")
    assert not client.transport.disconnecting
    waiting.callback(COMPLETION)
    client.exchange()
    surface.connections.leave()
    assert not client.transport.disconnecting
    assert client.transport.producerState == "paused", "the next request is not taken, and its caller told so"
    surface.clock.advance(GOAWAY_SECONDS)
    assert client.transport.producerState == "producing", "to hear the caller's good-bye"
    assert goaway(client) == refused
    assert client.response(stream)[0] == 200
    assert client.transport.disconnecting


def test_a_caller_who_goes_as_we_take_our_leave_leaves_nothing_behind(surface: Surface) -> None:
    client = surface.connect2()
    surface.connections.drain()
    client.request("GET", "/health/live")
    assert surface.clock.getDelayedCalls()
    client.connection.connectionLost(Failure(ConnectionDone()))
    assert not surface.clock.getDelayedCalls()


def test_an_idle_connection_is_left_with_a_goaway(surface: Surface) -> None:
    client = surface.connect2()
    taken = client.request("GET", "/health/live")
    surface.connections.drain()
    assert not client.transport.disconnecting
    surface.connections.leave()
    surface.connections.leave()
    assert goaway(client) == taken
    assert client.transport.disconnecting


def test_a_stream_that_is_cut_is_reset_before_we_leave(surface: Surface) -> None:
    """Its caller can tell that the answer is not all."""
    client = surface.connect2()
    head = [(":method", "POST"), (":path", "/events"), (":scheme", "https"), (":authority", "x")]
    client.h2.send_headers(1, [*head, ("x-api-key", "secret"), ("content-type", "application/x-ndjson")])
    client.exchange()
    surface.connections.drain()
    surface.site.cut()
    surface.clock.advance(GOAWAY_SECONDS)
    assert goaway(client) == 1
    assert [event.stream_id for event in client.events if isinstance(event, h2.events.StreamReset)] == [1]


def test_head_and_expect(surface: Surface) -> None:
    client = surface.connect2()
    status, headers, body = client.response(client.request("HEAD", "/health/live"))
    assert (status, headers["content-length"], body) == (200, "18", b"")
    client.h2.send_headers(
        3,
        [
            (":method", "POST"),
            (":path", "/event"),
            (":scheme", "https"),
            (":authority", "x"),
            *HEADERS,
            ("expect", "100-continue"),
        ],
    )
    client.exchange()
    assert any(isinstance(event, h2.events.InformationalResponseReceived) for event in client.events)
    client.h2.send_data(3, BODY, end_stream=True)
    client.exchange()
    assert client.response(3)[0] == 200


def test_endless_resets_end_the_connection(surface: Surface) -> None:
    surface.pipeline.answer = lambda: Deferred()
    client = surface.connect2()
    for _ in range(300):
        stream = client.request("POST", "/event", HEADERS, BODY)
        client.h2.reset_stream(stream)
        client.exchange()
        surface.clock.advance(0)
        if client.transport.disconnecting:
            break
    assert client.transport.disconnecting
    assert surface.recorder.in_flight == 0


@given(st.binary(max_size=200))
def test_no_bytes_break_it(data: bytes) -> None:
    surface = make_surface()
    client = Http2Client(surface.connections, surface.site)
    client.request("GET", "/health/live")
    client.connection.dataReceived(data)
    client.connection.connectionLost(Failure(ConnectionDone()))
    assert surface.recorder.in_flight == 0
