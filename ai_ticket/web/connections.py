"""All open connections: how many there may be, whose time is up, and how they are closed."""

from collections.abc import Callable, Iterator
from email.utils import formatdate
from itertools import islice

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import Factory
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from ai_ticket.interfaces import Recorder
from ai_ticket.web.caps import Caps
from ai_ticket.web.codec import Listener
from ai_ticket.web.connection import CodecFactory, Connection, Timeouts

SWEEP_SECONDS = 1.0
SWEPT_WITHIN = 0.8
"""Seconds of them that it takes to go through all connections, if nothing else is to be done."""

SWEPT_A_TURN = 25
"""Connections whose deadlines are checked in a turn: of slow ones the kernel is asked, and all may have to be cut."""


class Connections:
    """All open connections of the service's endpoints. `now` is the clock's time in seconds.

    `draining`: an answer from now on is the last on its connection. `leaving`: an idle connection is closed, too.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        *,
        limit: int,
        per_client: int | None,
        timeouts: Timeouts,
        recorder: Recorder,
        http1: CodecFactory,
        http2: CodecFactory,
    ):
        """@param limit: how many there may be. @param per_client: how many of one client; None: as many."""
        self._clock = clock
        self.now: Callable[[], float] = clock.seconds
        self._open: Caps[Connection] = Caps(
            clock.seconds, limit=limit, per_client=per_client, ended=recorder.connection_ended
        )
        self._sweep = LoopingCall(self._check_deadlines)
        self._sweep.clock = clock
        self._sweeping: IDelayedCall | None = None
        self._date = (-1, b"")
        self.timeouts = timeouts
        self.recorder = recorder
        self.http1 = http1
        self.http2 = http2
        self._told_to_drain = False
        self.draining = False
        self.leaving = False

    def __len__(self) -> int:
        return len(self._open)

    def start(self) -> None:
        """Begin to watch deadlines."""
        self._sweep.start(SWEEP_SECONDS, now=False).addErrback(
            lambda failure: self._log.failure("watching connections failed", failure)
        )

    @property
    def lagging(self) -> bool:
        """Whether there is a caller who has not taken much of what is ready to be sent."""
        return any(connection.full for connection in self._open)

    def stop(self) -> None:
        """Abort what is open, other than to send the last of an answer, and no longer watch."""
        for connection in list(self._open):
            if not connection.closing:
                connection.abort()
        if self._sweep.running:
            self._sweep.stop()
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    def drain(self) -> None:
        """Have every connection close behind its next answer.

        The idle ones stay open: to close one crosses the request that its caller may just be sending, and which then
        gets no answer.
        """
        self._told_to_drain = self.draining = True

    def keep(self, keep: bool) -> None:
        """Whether a connection is kept behind its next answer, unless we drain; kept it is at first."""
        self.draining = self._told_to_drain or not keep

    def shed(self, most: int) -> None:
        """Close idle connections, so many at the most."""
        idle = (connection for connection in self._open if connection.idle)
        for connection in list(islice(idle, most)):
            if connection.codec is not None:
                connection.codec.leave()

    def leave(self) -> None:
        """Close the idle connections; the others close as soon as nothing is under way on them."""
        self._told_to_drain = self.draining = self.leaving = True
        for connection in list(self._open):
            if connection.codec is not None:
                connection.codec.leave()

    def later(self, seconds: float, call: Callable[[], None]) -> IDelayedCall:
        """Call this after so long."""
        return self._clock.callLater(seconds, call)

    def in_next_turn(self, call: Callable[[], None]) -> IDelayedCall:
        """Call this once the reactor has seen to the others."""
        return self._clock.callLater(0, call)

    def date(self) -> bytes:
        """The value of a Date header, made once a second."""
        now = int(self.now())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True).encode())
        return self._date[1]

    def opened(self, connection: Connection) -> bool:
        """Count a new connection, if there is a place for it."""
        return self._open.enter(connection)

    def closed(self, connection: Connection) -> None:
        """A connection is gone."""
        self._open.leave(connection)

    def _check_deadlines(self) -> None:
        self._open.report()
        if self._sweeping is None:
            turns = len(self._open) / SWEPT_A_TURN
            self._check_some(iter(list(self._open)), self.now(), SWEPT_WITHIN / (turns + 1))

    def _check_some(self, unchecked: Iterator[Connection], due: float, pause: float) -> None:
        """Check those whose turn it is, which was due at this time, and the others after a pause."""
        self._sweeping = None
        now = self.now()
        turn = list(islice(unchecked, SWEPT_A_TURN))
        for connection in turn:
            if connection not in self._open:
                continue
            try:
                connection.check_deadlines(now)
            except Exception:
                # The others are still to be looked at, now and later.
                self._log.failure("a connection's deadlines can't be checked, it is cut", peer=connection.peer)
                self.closed(connection)
                connection.abort()
        if len(turn) == SWEPT_A_TURN:
            # Those who came together are cut one after the other, and not all once a second. Pauses are counted from
            # when they should have begun: the reactor wakes a little late each time.
            due += pause
            self._sweeping = self.later(max(0.0, due - now), lambda: self._check_some(unchecked, due, pause))


class ConnectionFactory(Factory):
    """Makes a `Connection` of each accepted socket."""

    noisy = False

    def __init__(self, connections: Connections, listener: Listener, *, secure: bool):
        self._connections = connections
        self._listener = listener
        self._secure = secure

    def buildProtocol(self, addr: object) -> Connection:
        """A connection from this address."""
        host = str(getattr(addr, "host", ""))
        return Connection(self._connections, self._listener, host.removeprefix("::ffff:"), self._secure)
