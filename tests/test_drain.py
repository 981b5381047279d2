"""How the service comes to its end, on a clock: who is still served, who is waited for, and what is cut."""

import json
from typing import Any

import pytest
from harness import MemoryTransport, Recorded, connect, make_connections, parse_responses
from logged import logged
from memory_tracer import MemoryTracer
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from ai_ticket.drain import ABORT_SECONDS, BRIEFLY_SECONDS, FAREWELL_SECONDS, LINGER_SECONDS, Drain, Phase
from ai_ticket.errors import ShuttingDown
from ai_ticket.web.connection import CLOSE_SECONDS, Connection
from ai_ticket.web.cors import Cors
from ai_ticket.web.request import Request, Response
from ai_ticket.web.site import Route, Site

DELAY, GRACE = 7.0, 60.0
STEP = 1 / 16
"""Exact in binary, and a little more than what the drain takes between two looks."""

WORK = b"POST /work HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
LOOK = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


class World:
    """A site with one path, on which there is work until the test says that it is done."""

    def __init__(self, *, delay: float = 0.0) -> None:
        self.clock = Clock()
        self.work: list[Deferred[Response]] = []
        self.cancelled = 0
        self.site = Site(
            [Route("/work", {"POST": self._work}), Route("/health", {"GET": self._health})],
            clock=self.clock,
            recorder=Recorded(),
            tracer=MemoryTracer(self.clock),
            new_request_id=lambda: "id",
            hsts_seconds=0,
            cors=Cors([]),
        )
        self.callers, self.scrapers = make_connections(self.clock), make_connections(self.clock)
        self.open: list[tuple[Connection, MemoryTransport]] = []
        self.told: list[str] = []
        self.drained_by: list[float] = []
        self.closed = succeed(None)
        self.settled: Deferred[None] = succeed(None)
        self.drain_ = Drain(
            self.clock,
            delay=delay,
            grace=GRACE,
            listeners=self,  # type: ignore[arg-type]
            callers=self.callers,
            scrapers=self.scrapers,
            site=self.site,
            pipeline=self,
            stopped_at_backends=lambda: self.settled,
            systemd=self,  # type: ignore[arg-type]
        )
        self.running: Deferred[None] | None = None
        self.ended: list[None] = []

    async def _work(self, request: Request) -> Response:
        if self.drain_.refusing:
            raise ShuttingDown
        self.work.append(Deferred(self._cancelled))
        return await self.work[-1]

    def _cancelled(self, _: Deferred[Response]) -> None:
        self.cancelled += 1

    async def _health(self, request: Request) -> Response:
        return Response(503 if self.drain_.announced else 200, b"{}")

    # What the drain calls.

    async def close(self) -> None:
        self.told.append("ports close")
        await self.closed

    def drain(self, deadline: float) -> None:
        self.drained_by.append(deadline)

    def stopping(self, status: str, seconds: float) -> None:
        self.told.append(f"stopping within {seconds:g}: {status}")

    def status(self, text: str) -> None:
        self.told.append(text)

    # What the test does.

    def connect(self, data: bytes = b"") -> MemoryTransport:
        found = connect(self.callers, self.site)
        self.open.append(found)
        found[0].dataReceived(data)
        self.settle()
        return found[1]

    def send(self, transport: MemoryTransport, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request, and what comes as its answer."""
        [connection] = [connection for connection, its in self.open if its is transport]
        transport.clear()
        connection.dataReceived(data)
        [answer] = parse_responses(transport.value())
        self.settle()
        return answer

    def finish(self) -> None:
        self.work.pop(0).callback(Response(200, b'{"done": true}'))
        self.settle()

    def settle(self) -> None:
        """Let connections be gone that have been closed."""
        for found in list(self.open):
            if found[1].disconnecting and not found[0].full:
                self.open.remove(found)
                found[0].connectionLost(Failure(Exception()))

    def begin(self) -> None:
        self.running = Deferred.fromCoroutine(self.drain_.run())
        self.running.addCallback(self.ended.append)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.clock.advance(STEP)
            self.settle()

    @property
    def over(self) -> bool:
        return self.ended == [None]

    def report(self) -> str:
        with logged() as lines:
            self.drain_.report()
        [line] = lines
        return line


def test_with_nothing_to_wait_for_it_is_over_at_once() -> None:
    world = World()
    world.begin()
    assert world.over
    assert world.drain_.phase is Phase.OVER
    assert world.told == [
        "stopping within 60: stopping: 0 requests in flight",
        "ports close",
        "no longer listening: 0 requests in flight",
    ]
    assert not world.clock.getDelayedCalls()


def test_during_the_delay_requests_are_served_and_health_says_what_is_to_come() -> None:
    world = World(delay=DELAY)
    transport, other = world.connect(), world.connect()
    world.begin()
    assert (world.drain_.announced, world.drain_.refusing) == (True, False)
    assert world.send(other, LOOK)[0] == 503
    world.run(DELAY - 1)
    world.connect(WORK)
    assert world.told == ["stopping within 67: stopping: 0 requests in flight"], "and newcomers are let in"
    world.finish()
    status, headers, _ = world.send(world.connect(), LOOK)
    assert (status, headers["connection"]) == (503, "close")
    assert not transport.disconnecting, "its caller may be sending a request"
    assert not world.drained_by
    world.run(1)
    assert world.drain_.refusing
    assert world.drained_by == [pytest.approx(DELAY + GRACE)]
    assert "ports close" in world.told
    status, headers, body = world.send(transport, WORK)
    assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "5")
    assert json.loads(body)["error"] == "shutting_down"
    world.run(STEP)
    assert world.over
    assert world.report() == "info: stopped: 1 requests finished, 0 cut, 1 refused, 0 given up by their callers"


def test_who_is_let_in_while_the_ports_close_is_told() -> None:
    world = World()
    closed = world.closed = Deferred()
    world.begin()
    assert world.send(world.connect(), WORK)[0] == 503
    closed.callback(None)
    assert world.over
    assert world.site.tally.refused == 1


def test_an_idle_connection_is_kept_for_a_while_for_the_request_that_may_be_on_its_way() -> None:
    world = World()
    idle, late = world.connect(), world.connect()
    world.begin()
    world.run(LINGER_SECONDS - STEP)
    assert not idle.disconnecting
    assert world.send(late, WORK)[0] == 503
    world.run(2 * STEP)
    assert idle.disconnecting
    assert not idle.aborted
    world.run(STEP)
    assert world.over


def test_what_is_under_way_finishes_and_idle_connections_last_as_long() -> None:
    world = World()
    busy, idle = world.connect(WORK), world.connect()
    with logged() as lines:
        world.begin()
    assert lines == ["info: stopping: 1 requests in flight"]
    world.run(GRACE - 10)
    assert not world.over
    assert world.send(idle, WORK)[0] == 503
    assert not busy.value()
    world.finish()
    [(status, headers, _)] = parse_responses(busy.value())
    assert (status, headers["connection"]) == (200, "close")
    world.run(STEP)
    assert world.over
    assert world.report() == "info: stopped: 1 requests finished, 0 cut, 1 refused, 0 given up by their callers"
    assert world.cancelled == 0


def test_an_idle_connection_is_kept_for_a_while_after_the_last_has_finished() -> None:
    """It may be that of a stream that had begun before, whose caller does not know yet."""
    world = World()
    world.connect(WORK)
    idle = world.connect()
    world.begin()
    world.run(LINGER_SECONDS + 3)
    world.finish()
    world.run(LINGER_SECONDS - STEP)
    assert not idle.disconnecting
    assert world.send(idle, WORK)[0] == 503
    world.run(STEP)
    assert world.over


def test_those_who_watch_are_not_waited_for() -> None:
    """Prometheus keeps its connection."""
    world = World()
    watching = connect(world.scrapers, world.site)
    world.open.append(watching)
    world.begin()
    assert watching[1].disconnecting
    world.run(2 * STEP)
    assert world.over


def test_after_the_grace_period_the_rest_is_cut_and_the_backends_are_told() -> None:
    world = World()
    cut, _ = world.connect(WORK), world.connect(WORK)
    settled = world.settled = Deferred()
    world.begin()
    world.run(1)
    world.open[1][0].connectionLost(Failure(Exception()))
    with logged() as lines:
        world.run(GRACE - 1)
    assert "warn: the time to finish is over: 1 requests are cut" in lines
    [(status, headers, body)] = parse_responses(cut.value())
    assert (status, headers["retry-after"], headers["connection"]) == (503, "5", "close")
    assert json.loads(body)["error"] == "shutting_down"
    assert world.cancelled == 2
    assert (world.drain_.phase, world.over) == (Phase.CUTTING, False), "until the backends have heard of it"
    settled.callback(None)
    world.run(STEP)
    assert world.over
    assert world.report() == "info: stopped: 0 requests finished, 1 cut, 0 refused, 1 given up by their callers"


def test_backends_that_do_not_answer_are_not_waited_for_for_long() -> None:
    world = World()
    world.connect(WORK)
    world.settled = Deferred()
    world.begin()
    world.run(GRACE)
    with logged() as lines:
        world.run(ABORT_SECONDS + STEP)
    assert lines == ["warn: a model server has not confirmed in time that it stops what was cut"]
    assert world.over


def test_a_caller_who_takes_its_answer_slowly_is_in_flight_until_it_has_it() -> None:
    world = World()
    slow = world.connect(WORK)
    [(connection, _)] = world.open
    world.begin()
    connection.pauseProducing()
    world.finish()
    world.run(LINGER_SECONDS + FAREWELL_SECONDS + CLOSE_SECONDS)
    assert (world.site.in_flight, world.over) == (0, False)
    connection.resumeProducing()
    world.run(2 * STEP)
    assert world.over
    assert slow.disconnecting


def test_a_caller_who_takes_nothing_has_little_more_than_the_grace_period() -> None:
    world = World()
    world.connect(WORK)
    world.open[0][0].pauseProducing()
    world.begin()
    world.run(GRACE)
    assert world.cancelled == 1
    world.run(CLOSE_SECONDS - 2 * STEP)
    assert not world.over
    world.run(3 * STEP)
    assert world.over


def test_a_caller_who_says_no_good_bye_is_hardly_waited_for() -> None:
    world = World()
    world.connect()
    connection, _ = world.open.pop()
    world.begin()
    world.run(LINGER_SECONDS + FAREWELL_SECONDS + 2 * STEP)
    assert world.over
    connection.connectionLost(Failure(Exception()))


@pytest.mark.parametrize("seconds", [0, DELAY + 1, DELAY + GRACE + 0.1])
def test_told_a_second_time_it_cuts_at_once_and_says_so(seconds: float) -> None:
    world = World(delay=DELAY)
    transport = world.connect(WORK)
    world.settled = Deferred()
    world.begin()
    world.run(seconds)
    assert world.running is not None
    assert not world.over
    world.running.cancel()
    assert [status for status, _, _ in parse_responses(transport.value())] == [503]
    world.run(BRIEFLY_SECONDS + STEP)
    assert world.over
    assert world.drain_.phase is Phase.OVER
    assert world.report() == "info: stopped: 0 requests finished, 1 cut, 0 refused, 0 given up by their callers"
    assert not world.clock.getDelayedCalls()


def test_a_third_time_changes_nothing() -> None:
    world = World()
    world.connect(WORK)
    world.begin()
    assert world.running is not None
    world.running.cancel()
    world.running.cancel()
    assert world.over
    assert not world.clock.getDelayedCalls()


def test_what_resists_being_cut_counts_as_cut() -> None:
    world = World()

    async def resist(request: Request) -> Response:
        hanging: Deferred[Any] = Deferred(lambda _: None)
        try:
            return await hanging
        except BaseException:
            return await Deferred()

    world.site._routes["/work"] = Route("/work", {"POST": resist})
    world.connect(WORK)
    world.begin()
    world.run(GRACE + 2 * CLOSE_SECONDS)
    assert world.over
    assert "0 requests finished, 1 cut" in world.report()


def test_what_was_before_the_stop_is_not_in_the_report() -> None:
    world = World()
    world.connect(WORK)
    world.finish()
    assert world.site.tally.finished == 1
    with logged() as lines:
        world.drain_.report()
    assert lines == [], "nothing was stopped"
    world.begin()
    assert "0 requests finished" in world.report()
