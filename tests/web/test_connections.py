"""All connections: caps, the sweep, and what is closed when memory is short."""

from itertools import pairwise
from math import ceil
from typing import Any

import pytest
from harness import COMPLETION, MemoryTransport, connect, make_connections, parse_responses
from logged import logged
from surface import Surface
from twisted.internet.base import DelayedCall
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from ai_ticket.web.connection import Connection
from ai_ticket.web.connections import SWEEP_SECONDS, SWEPT_A_TURN

BODY = b'{"content": "hello"}'
HEAD = b"POST /event HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
POST = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("secure", [True, False])
def test_a_newcomer_without_a_place_is_refused(surface: Surface, secure: bool) -> None:
    surface.connections = make_connections(surface.clock, limit=1)
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    busy, transport = surface.connect()
    busy.dataReceived(POST)
    newcomer = Connection(surface.connections, surface.site, "192.0.2.8", secure)
    refused = MemoryTransport()
    newcomer.makeConnection(refused)
    assert (refused.aborted, refused.producer, len(surface.connections)) == (True, None, 1)
    newcomer.connectionLost(Failure(ConnectionDone()))
    assert len(surface.connections) == 1
    recorder: Any = surface.connections.recorder
    assert recorder.handshake_failures == []
    assert recorder.ended == ["max_connections_refused"]
    waiting.callback(COMPLETION)
    assert transport.value().startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.7", "192.0.2.8", False),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
    ],
)
def test_whose_connections_are_counted_together(surface: Surface, first: str, second: str, same: bool) -> None:
    connections = make_connections(surface.clock, per_client=1)
    _, oldest = connect(connections, surface.site, peer=first)
    connect(connections, surface.site, peer=second)
    assert oldest.aborted == same


def test_a_request_makes_a_connection_young_again(surface: Surface) -> None:
    surface.connections = make_connections(surface.clock, limit=2)
    connections = []
    for _ in range(2):
        surface.clock.advance(1)
        connections.append(surface.connect())
    surface.clock.advance(1)
    connections[0][0].dataReceived(GET)
    surface.connect()
    assert [transport.aborted for _, transport in connections] == [False, True]


def test_one_that_closes_behind_its_answer_is_not_cut_for_room(surface: Surface) -> None:
    surface.connections = make_connections(surface.clock, limit=1)
    closing, transport = surface.connect()
    closing.dataReceived(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert closing.closing
    _, refused = surface.connect()
    assert (transport.aborted, refused.aborted) == (False, True)


@pytest.mark.expects_logged_failure
def test_one_connection_that_fails_the_sweep_does_not_keep_it_from_the_others(
    surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    surface.connections.start()
    (_, first), (bad, second), (_, third) = (surface.connect() for _ in range(3))

    def fail(now: float) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(bad, "check_deadlines", fail)
    with logged() as lines:
        surface.clock.pump([1.0] * 3)
    assert (first.aborted, second.aborted, third.aborted) == (False, True, False)
    assert lines == ["critical: a connection's deadlines can't be checked, it is cut"]
    surface.clock.pump([1.0] * 10)
    assert (first.aborted, third.aborted) == (True, True), "the sweep lives"
    surface.connections.stop()


def test_short_of_memory_no_connection_is_kept(surface: Surface) -> None:
    connection, transport = surface.connect()
    connection.dataReceived(GET)
    surface.connections.keep(False)
    assert not transport.disconnecting
    connection.dataReceived(GET)
    first, second = parse_responses(transport.value())
    assert (first[1].get("connection"), second[1].get("connection")) == (None, "close")
    assert transport.disconnecting
    surface.connections.keep(True)
    connection, transport = surface.connect()
    connection.dataReceived(GET)
    assert not transport.disconnecting


def test_nor_is_one_of_http2(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    client = surface.connect2()
    headers = [("authorization", "Bearer secret"), ("content-type", "application/json")]
    slow = client.request("POST", "/event", headers, BODY)
    surface.connections.keep(False)
    assert client.response(client.request("GET", "/health"))[0] == 200
    surface.clock.advance(1)
    assert not client.transport.disconnecting, "one stream goes on"
    waiting.callback(COMPLETION)
    surface.clock.advance(1)
    client.exchange()
    assert client.response(slow)[0] == 200
    assert type(client.events[-1]).__name__ == "ConnectionTerminated"
    assert client.transport.disconnecting


def test_when_the_memory_is_free_again_a_drain_is_still_one(surface: Surface) -> None:
    surface.connections.drain()
    surface.connections.keep(False)
    surface.connections.keep(True)
    assert surface.connections.draining


def test_idle_connections_are_shed_some_at_a_time(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    busy, busy_transport = surface.connect()
    busy.dataReceived(POST)
    begun, begun_transport = surface.connect()
    begun.dataReceived(GET[:9])
    idle = [surface.connect()[1] for _ in range(5)]
    surface.connections.shed(3)
    assert [transport.disconnecting for transport in idle] == [True, True, True, False, False]
    surface.connections.shed(3)
    assert all(transport.disconnecting for transport in idle)
    surface.connections.shed(3)
    assert not busy_transport.disconnecting
    assert not begun_transport.disconnecting
    waiting.callback(COMPLETION)


def test_many_deadlines_are_checked_in_turns(surface: Surface) -> None:
    """However many callers are late, others are seen to in between; and who has left meanwhile is left alone."""
    connections = make_connections(surface.clock, limit=1000)
    connections.start()
    late = [connect(connections, surface.site) for _ in range(4 * SWEPT_A_TURN)]
    surface.clock.advance(connections.timeouts.header)
    leaving, left_alone = late[-1]
    leaving.connectionLost(Failure(ConnectionDone()))
    cut = [sum(transport.aborted for _, transport in late)]
    for _ in range(10):
        surface.clock.advance(SWEEP_SECONDS / 10)
        cut.append(sum(transport.aborted for _, transport in late))
    assert cut[0] == SWEPT_A_TURN
    assert cut[-1] == len(late) - 1
    assert max(after - before for before, after in pairwise(cut)) == SWEPT_A_TURN
    assert not left_alone.aborted


class CoarseClock(Clock):
    """One that wakes those who wait at the next eighth of a second at the earliest."""

    def callLater(self, delay: float, callable: Any, *args: object, **kw: object) -> DelayedCall:
        return super().callLater(ceil((self.rightNow + delay) * 8) / 8 - self.rightNow, callable, *args, **kw)


def test_every_connection_is_checked_once_a_second_on_a_clock_that_wakes_late(
    surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = CoarseClock()
    connections = make_connections(clock, limit=1000)
    connections.start()
    seen: dict[Connection, list[float]] = {}
    monkeypatch.setattr(
        Connection, "check_deadlines", lambda connection, now: seen.setdefault(connection, []).append(clock.seconds())
    )
    for _ in range(20 * SWEPT_A_TURN):
        connect(connections, surface.site)
    clock.pump([1 / 16] * 164)
    assert len(seen) == 20 * SWEPT_A_TURN
    assert {len(times) for times in seen.values()} <= {9, 10}
    connections.stop()


def test_a_sweep_that_is_under_way_ends_with_the_service(surface: Surface, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = make_connections(surface.clock, limit=1000)
    connections.start()
    late = [connect(connections, surface.site) for _ in range(SWEPT_A_TURN + 1)]
    stopping: list[Any] = []

    def abort() -> None:
        if not stopping:
            stopping.append(surface.clock.callLater(0, connections.stop))

    monkeypatch.setattr(late[0][1], "abortConnection", abort)
    surface.clock.advance(connections.timeouts.header)
    assert stopping
    assert surface.clock.getDelayedCalls() == []
