"""HTTP/1.1: framing, early answers, keep-alive, pipelining, deadlines."""

import json
from typing import Any

import pytest
from harness import COMPLETION, make_connections, parse_responses
from hypothesis import given
from hypothesis import strategies as st
from logged import logged, logged_facts
from surface import MAX_BODY, Surface, make_surface
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

BODY = b'{"content": "hello"}'
HEAD = b"POST /event HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
POST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def test_one_answer_in_one_write(surface: Surface) -> None:
    [(status, headers, body)] = surface.http1(POST)
    assert status == 200
    assert json.loads(body)["completion"] == COMPLETION.text
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == json.loads(body)["request_id"] == "id0"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers
    assert "connection" not in headers
    assert "strict-transport-security" not in headers


def test_hsts_only_over_tls(surface: Surface) -> None:
    connection, transport = surface.connect(secure=True)
    connection.dataReceived(GET)
    [(_, headers, _)] = parse_responses(transport.value())
    assert headers["strict-transport-security"] == "max-age=99"


def test_chunked_body(surface: Surface) -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (len(BODY), BODY)
    assert [found[0] for found in surface.http1(chunked)] == [200]


@pytest.mark.parametrize("size", [1, 7, 30])
def test_any_pace(surface: Surface, size: int) -> None:
    connection, transport = surface.connect()
    data = POST + GET
    for start in range(0, len(data), size):
        connection.dataReceived(data[start : start + size])
    assert [found[0] for found in parse_responses(transport.value())] == [200, 200]


def test_pipelined_requests_are_answered_in_order(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    connection, transport = surface.connect()
    connection.dataReceived(POST + GET * 3)
    assert transport.value() == b""
    waiting.callback(COMPLETION)
    answers = list(parse_responses(transport.value()))
    assert [found[0] for found in answers] == [200] * 4
    assert b"completion" in answers[0][2]


def test_a_pipelined_request_to_close_closes_behind_its_own_answer(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    connection, transport = surface.connect()
    connection.dataReceived(POST + GET.replace(b"Host: x", b"Host: x\r\nConnection: close"))
    waiting.callback(COMPLETION)
    answers = list(parse_responses(transport.value()))
    assert [(status, headers.get("connection")) for status, headers, _ in answers] == [(200, None), (200, "close")]


def test_many_pipelined_requests_pause_reading_until_there_is_room(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    connection, transport = surface.connect()
    connection.dataReceived(POST + GET * 2000)
    assert transport.producerState == "paused"
    waiting.callback(COMPLETION)
    surface.clock.advance(0)
    assert transport.producerState == "producing"
    assert len(list(parse_responses(transport.value()))) == 2001


def test_pipelined_requests_take_turns_with_the_rest_of_the_service(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(GET * 100)
    begun = len(surface.recorder.finished)
    assert 0 < begun <= 16
    assert transport.producerState == "paused"
    connection.dataReceived(GET)
    assert len(surface.recorder.finished) == begun, "what else comes does not bring the next turn about"
    assert len(surface.clock.getDelayedCalls()) == 1
    surface.clock.advance(0)
    assert [found[0] for found in parse_responses(transport.value())] == [200] * 101
    assert transport.producerState == "producing"


def test_nothing_begins_while_the_caller_takes_no_answers(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(GET)
    connection.pauseProducing()
    connection.dataReceived(GET * 10)
    surface.clock.pump([1] * 10)
    assert len(surface.recorder.finished) == 1
    connection.resumeProducing()
    assert [found[0] for found in parse_responses(transport.value())] == [200] * 11


def test_who_leaves_between_turns_leaves_nothing_behind(surface: Surface) -> None:
    connection, _ = surface.connect()
    connection.dataReceived(GET * 100)
    assert surface.clock.getDelayedCalls()
    connection.connectionLost(Failure(ConnectionDone()))
    assert not surface.clock.getDelayedCalls()
    assert len(surface.recorder.finished) <= 16


def test_a_connection_with_pipelined_requests_is_not_idle(surface: Surface) -> None:
    """Neither a newcomer nor our leaving closes it before they are answered."""
    surface.connections = make_connections(surface.clock, limit=1)
    connection, transport = surface.connect()
    connection.dataReceived(GET * 20)
    surface.connections.leave()
    assert not transport.disconnecting
    surface.clock.advance(0)
    assert len(list(parse_responses(transport.value()))) == 17, "the first answer since it began to drain is the last"
    assert transport.disconnecting


def test_a_connection_whose_answer_is_still_being_taken_makes_no_room(surface: Surface) -> None:
    surface.connections = make_connections(surface.clock, limit=1)
    connection, transport = surface.connect()
    connection.dataReceived(GET)
    connection.pauseProducing()
    assert surface.connect()[1].aborted
    assert surface.connections.lagging
    surface.connections.leave()
    assert not transport.disconnecting
    connection.resumeProducing()
    assert transport.disconnecting


def test_a_pipelined_body_does_not_fill_the_memory(surface: Surface) -> None:
    surface.pipeline.answer = lambda: Deferred()
    connection, transport = surface.connect()
    connection.dataReceived(POST + HEAD + b"Content-Length: 1000000\r\n\r\n")
    for _ in range(10):
        if transport.producerState == "paused":
            break
        connection.dataReceived(b"x" * 20_000)
    assert transport.producerState == "paused"
    connection.connectionLost(Failure(ConnectionDone()))


def test_an_answer_that_is_still_being_taken_is_not_cut_for_the_next_request(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(GET)
    connection.pauseProducing()
    for _ in range(10):
        sweep(surface, 20)
        connection.resumeProducing()
        connection.pauseProducing()
    assert not transport.aborted
    connection.resumeProducing()
    sweep(surface, 74)
    assert not transport.aborted
    sweep(surface, 2)
    assert transport.aborted


@pytest.mark.parametrize(
    ("request_head", "status", "code"),
    [
        (HEAD.replace(b"secret", b"wrong"), 401, "unauthorised"),
        (HEAD.replace(b"/event", b"/nope"), 404, "not_found"),
        (HEAD.replace(b"POST", b"PUT"), 405, "method_not_allowed"),
        (HEAD.replace(b"application/json", b"text/plain"), 415, "unsupported_media_type"),
        (HEAD, 413, "payload_too_large"),
    ],
)
def test_refused_from_the_head(surface: Surface, request_head: bytes, status: int, code: str) -> None:
    """The answer is there before any of a large body is; then the connection is closed."""
    connection, transport = surface.connect()
    connection.dataReceived(request_head + b"Content-Length: 1000000\r\n\r\n")
    [(found, headers, body)] = parse_responses(transport.value())
    assert (found, json.loads(body)["error"]) == (status, code)
    assert headers["connection"] == "close"
    for _ in range(10):
        connection.dataReceived(b"x" * 1000)
    assert not transport.disconnecting
    surface.clock.advance(6)
    surface.connections._check_deadlines()
    assert transport.aborted


def test_a_connection_refused_early_is_closed_where_the_body_ends(surface: Surface) -> None:
    connection, transport = surface.connect()
    size = MAX_BODY + 10_000
    connection.dataReceived(HEAD + b"Content-Length: %d\r\n\r\n" % size)
    connection.dataReceived(b"x" * size)
    assert transport.disconnecting
    assert not transport.aborted


def test_a_small_body_refused_early_keeps_the_connection(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(POST.replace(b"secret", b"wrong")[:-5])
    connection.dataReceived(BODY[-5:] + GET)
    assert [found[0] for found in parse_responses(transport.value())] == [401, 200]
    assert not transport.disconnecting


def test_a_chunked_body_is_refused_at_the_first_byte_over_the_limit(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"ffffff\r\n" + b"x" * MAX_BODY)
    assert transport.value() == b""
    connection.dataReceived(b"x")
    [(status, headers, _)] = parse_responses(transport.value())
    assert (status, headers["connection"]) == (413, "close")
    assert surface.pipeline.events == []


def test_a_body_of_unknown_length_is_411(surface: Surface) -> None:
    [(status, _, body)] = surface.http1(HEAD + b"\r\n")
    assert (status, json.loads(body)["error"]) == (411, "length_required")


def test_expect_continue(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
    assert transport.value() == b"HTTP/1.1 100 Continue\r\n\r\n"
    transport.clear()
    connection.dataReceived(BODY)
    assert [found[0] for found in parse_responses(transport.value())] == [200]


def test_expect_continue_is_not_given_to_the_refused(surface: Surface) -> None:
    connection, transport = surface.connect()
    wrong = HEAD.replace(b"secret", b"wrong")
    connection.dataReceived(wrong + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
    [(status, headers, _)] = parse_responses(transport.value())
    assert (status, headers["connection"]) == (401, "close")


def test_head_has_the_length_but_no_body(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(GET.replace(b"GET", b"HEAD"))
    head, _, body = transport.value().partition(b"\r\n\r\n")
    assert b"content-length: 18" in head
    assert body == b""


def test_connection_close_and_http10(surface: Surface) -> None:
    for data in (GET.replace(b"Host: x", b"Host: x\r\nConnection: close"), b"GET /health/live HTTP/1.0\r\n\r\n"):
        connection, transport = surface.connect()
        connection.dataReceived(data)
        [(status, headers, _)] = parse_responses(transport.value())
        assert (status, headers["connection"]) == (200, "close")
        assert transport.disconnecting


@pytest.mark.parametrize("offer", [b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n"])
def test_an_offered_upgrade_is_declined(surface: Surface, offer: bytes) -> None:
    """As `curl --http2` offers it without TLS, also with a body, also with a request behind."""
    with_offer = POST.replace(b"Host: x\r\n", b"Host: x\r\n" + offer)
    assert [found[0] for found in surface.http1(with_offer + with_offer + GET)] == [200, 200, 200]


def test_connect_and_trace_are_refused(surface: Surface) -> None:
    assert [found[0] for found in surface.http1(b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n")] == [404]
    assert [found[0] for found in surface.http1(GET.replace(b"GET", b"TRACE"))] == [405]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"rubbish\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc", 400),
        (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 17_000, 431),
        (b"GET /" + b"x" * 17_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
    ],
)
def test_what_is_not_http(surface: Surface, data: bytes, status: int) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(data)
    [(found, headers, body)] = parse_responses(transport.value())
    assert found == status
    assert headers["connection"] == "close"
    assert headers["x-request-id"]
    assert json.loads(body)["error"] == "invalid_request"
    assert transport.disconnecting
    assert surface.recorder.in_flight == 0


@pytest.mark.parametrize("rubbish", [b"zz\r\n", b"3\r\nabcde", b"fffffffffffffffff\r\n"])
def test_a_chunked_body_that_is_malformed(surface: Surface, rubbish: bytes) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    connection.dataReceived(rubbish)
    [(status, headers, _)] = parse_responses(transport.value())
    assert (status, headers["connection"]) == (400, "close")
    assert transport.disconnecting
    assert surface.recorder.in_flight == 0
    assert surface.pipeline.events == []


def test_rubbish_behind_a_request_waits_for_its_answer(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    connection, transport = surface.connect()
    connection.dataReceived(POST + b"rubbish\r\n\r\n")
    assert transport.value() == b""
    waiting.callback(COMPLETION)
    assert [found[0] for found in parse_responses(transport.value())] == [200, 400]


def sweep(surface: Surface, seconds: float) -> None:
    surface.clock.advance(seconds)
    surface.connections._check_deadlines()


DEADLINES = [
    (b"", 11, "header_timeout"),
    (GET[:9], 11, "header_timeout"),
    (GET + GET[:9], 11, "header_timeout"),
    (GET, 76, "keepalive_timeout"),
    (POST[:-1], 31, "body_timeout"),
    (HEAD + b"Content-Length: 9999999\r\n\r\n", 6, "close_timeout"),
]


@pytest.mark.parametrize(("data", "seconds", "reason"), DEADLINES)
def test_an_operator_can_see_why_a_connection_was_ended(
    surface: Surface, data: bytes, seconds: float, reason: str
) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(data)
    with logged() as lines:
        sweep(surface, seconds)
        sweep(surface, 1)
    assert transport.aborted
    recorder: Any = surface.connections.recorder
    assert recorder.ended == [reason]
    assert lines == [f"debug: connection of 192.0.2.7 ended: {reason}"]
    connection.connectionLost(Failure(ConnectionDone()))


def test_who_leaves_or_parts_behind_the_last_answer_was_not_ended(surface: Surface) -> None:
    for data in (GET, POST[:-1], GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")):
        connection, _ = surface.connect()
        connection.dataReceived(data)
        connection.connectionLost(Failure(ConnectionDone()))
    recorder: Any = surface.connections.recorder
    assert recorder.ended == []


@pytest.mark.parametrize("last", [True, False])
def test_a_caller_who_takes_nothing_of_an_answer_is_seen(surface: Surface, last: bool) -> None:
    """Its request was answered with 200 long before."""
    connection, transport = surface.connect()
    connection.pauseProducing()
    connection.dataReceived(GET if not last else GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    with logged() as lines:
        sweep(surface, 31)
        sweep(surface, 1)
    assert transport.aborted
    recorder: Any = surface.connections.recorder
    assert recorder.ended == ["unread"]
    assert lines == ["debug: connection of 192.0.2.7 ended: unread"]


@pytest.mark.parametrize("in_time", [True, False])
def test_the_access_line_tells_a_body_that_came_too_late_from_a_caller_who_left(
    surface: Surface, in_time: bool
) -> None:
    connection, _ = surface.connect()
    connection.dataReceived(POST[:-1])
    sweep(surface, 1 if in_time else 31)
    with logged_facts("POST /event 499") as lines:
        connection.connectionLost(Failure(ConnectionDone()))
    [facts] = lines
    assert facts.get("error") == (None if in_time else "body_timeout")


def test_who_sent_a_malformed_request_is_told_and_nothing_of_what_it_was(surface: Surface) -> None:
    connection, _ = surface.connect()
    with logged_facts("malformed request") as lines:
        connection.dataReceived(b"SECRET secret\r\n\r\n")
    assert lines == [{"status": 400, "request_id": "id0", "peer": "192.0.2.7"}]


def test_a_head_must_be_whole_in_time_however_it_drips(surface: Surface) -> None:
    connection, transport = surface.connect()
    for byte in GET[:9]:
        connection.dataReceived(bytes([byte]))
        sweep(surface, 1)
        assert not transport.aborted
    connection.dataReceived(b"x")
    sweep(surface, 1.5)
    assert transport.aborted


def test_the_rest_of_a_small_body_must_come_in_time_though_its_request_is_refused(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(POST.replace(b"secret", b"wrong")[:-5])
    sweep(surface, 29)
    assert not transport.aborted
    sweep(surface, 2)
    assert transport.aborted


def test_who_sent_too_slowly_has_as_long_as_others_to_take_the_last_answer(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    sweep(surface, 28)
    connection.dataReceived(b"ffffff\r\n" + b"x" * (MAX_BODY + 1))
    assert b" 413 " in transport.value()
    sweep(surface, 4)
    assert not transport.aborted
    sweep(surface, 2)
    assert transport.aborted


def test_a_body_must_be_whole_in_time_however_it_drips(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(POST[:-1])
    sweep(surface, 29)
    assert not transport.aborted
    sweep(surface, 2)
    assert transport.aborted
    connection.connectionLost(Failure(ConnectionDone()))
    assert surface.recorder.finished == [("/event", "POST", 499)]


def test_an_idle_connection_is_kept_for_a_while(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(GET)
    sweep(surface, 74)
    assert not transport.aborted
    connection.dataReceived(GET)
    sweep(surface, 74)
    assert not transport.aborted
    sweep(surface, 2)
    assert transport.aborted


def test_no_deadline_runs_while_an_answer_is_awaited(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    connection, transport = surface.connect()
    connection.dataReceived(POST)
    sweep(surface, 1000)
    assert not transport.aborted
    waiting.callback(COMPLETION)
    assert [found[0] for found in parse_responses(transport.value())] == [200]


def test_a_caller_who_leaves_cancels_the_event(surface: Surface) -> None:
    cancelled: list[object] = []
    surface.pipeline.answer = lambda: Deferred(cancelled.append)
    connection, _ = surface.connect()
    connection.dataReceived(POST)
    connection.connectionLost(Failure(ConnectionDone()))
    assert len(cancelled) == 1
    assert surface.recorder.finished == [("/event", "POST", 499)]
    assert surface.recorder.in_flight == 0
    assert surface.site.in_flight == 0
    assert surface.site.tally.left == 1


def test_draining_closes_connections_behind_their_next_answer(surface: Surface) -> None:
    """An idle one too: its caller, who may just be sending a request, is answered."""
    connection, transport = surface.connect()
    connection.dataReceived(GET)
    surface.draining = True
    surface.connections.drain()
    assert not transport.disconnecting
    connection.dataReceived(POST)
    _, (status, headers, body) = parse_responses(transport.value())
    assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "5")
    assert json.loads(body)["error"] == "shutting_down"
    assert transport.disconnecting
    assert (surface.site.tally.finished, surface.site.tally.refused) == (0, 1)


def test_leaving_closes_idle_connections_and_the_others_after_their_answer(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    _, idle = surface.connect()
    busy, transport = surface.connect()
    busy.dataReceived(POST)
    surface.draining = True
    surface.connections.leave()
    assert idle.disconnecting
    assert not transport.disconnecting
    waiting.callback(COMPLETION)
    [(status, headers, _)] = parse_responses(transport.value())
    assert (status, headers["connection"]) == (200, "close")
    assert transport.disconnecting
    assert (surface.site.tally.finished, surface.site.tally.refused) == (1, 0)


def test_what_has_its_last_answer_on_the_way_is_not_aborted_at_the_end(surface: Surface) -> None:
    """As it would be lost, for the kernel then drops what it has not sent yet."""
    surface.pipeline.answer = lambda: Deferred()
    (cut, last), (_, silent) = surface.connect(), surface.connect()
    cut.dataReceived(POST)
    surface.connections.drain()
    surface.site.cut()
    surface.connections.stop()
    assert last.disconnecting
    assert not last.aborted
    assert silent.aborted


def test_a_burst_of_newcomers_does_not_outnumber_the_limit(surface: Surface) -> None:
    """An aborted connection is gone only a little later; it makes room for one newcomer all the same, not for all."""
    surface.connections = make_connections(surface.clock, limit=2)
    transports = [surface.connect()[1] for _ in range(50)]
    assert len([transport for transport in transports if not transport.aborted]) == 2
    assert len(surface.connections) == 2


def test_what_is_cut_is_told_so(surface: Surface) -> None:
    cancelled: list[object] = []
    surface.pipeline.answer = lambda: Deferred(cancelled.append)
    connection, transport = surface.connect()
    connection.dataReceived(POST)
    surface.connections.drain()
    surface.site.cut()
    [(status, headers, body)] = parse_responses(transport.value())
    assert (status, json.loads(body)["error"], headers["connection"]) == (503, "shutting_down", "close")
    assert len(cancelled) == 1
    assert surface.site.in_flight == 0
    assert (surface.site.tally.finished, surface.site.tally.cut) == (0, 1)


def test_over_the_limit_the_oldest_idle_connection_makes_room(surface: Surface) -> None:
    surface.connections = make_connections(surface.clock, limit=2)
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    busy, busy_transport = surface.connect()
    busy.dataReceived(POST)
    _, idle_transport = surface.connect()
    _, new_transport = surface.connect()
    assert idle_transport.aborted
    assert not busy_transport.aborted
    assert not new_transport.aborted
    waiting.callback(COMPLETION)


@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_no_bytes_break_it(data: bytes, cut: int) -> None:
    surface = make_surface()
    for payload in (
        data,
        b"GET " + data,
        POST[: cut % len(POST)] + data,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + data,
    ):
        connection, transport = surface.connect()
        connection.dataReceived(payload[:cut])
        connection.dataReceived(payload[cut:])
        assert b"500" not in transport.value()[:16]
        connection.connectionLost(Failure(ConnectionDone()))
    assert surface.recorder.in_flight == 0
