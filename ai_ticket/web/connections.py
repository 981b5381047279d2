"""Open connections: which protocol each speaks, how many there may be, and when one has been silent for too long."""

from collections.abc import Callable
from email.utils import formatdate
from itertools import islice

from msgspec import Struct
from twisted.internet.interfaces import IDelayedCall, IHandshakeListener, IPushProducer, IReactorTime, ITransport
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket.interfaces import Recorder
from ai_ticket.web.caps import Caps
from ai_ticket.web.client_address import quota_key
from ai_ticket.web.codec import Codec, Listener
from ai_ticket.web.tcp import ask_tcp
from ai_ticket.web.tls import handshake_fault

SWEEP_SECONDS = 1.0
SWEPT_A_TURN = 25
"""Connections whose deadlines are checked in a turn: of slow ones the kernel is asked, and all may have to be cut."""

TLS_HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 5.0
"""How long a connection that was asked to close may take before it is aborted."""

TURN_MICROSECONDS = 8000
"""What may be done for one connection before the reactor sees to the others again."""

REQUEST_MICROSECONDS = 500
"""What the beginning of a request is taken to cost."""


class Timeouts(Struct, frozen=True):
    """Deadlines of a connection, in seconds: for a whole head, for a whole body, for a connection without a request,

    and for a caller who takes nothing of what waits for it (`idle`).
    """

    header: float
    body: float
    keepalive: float
    idle: float


CodecFactory = Callable[["Connection"], Codec]


@implementer(IHandshakeListener, IPushProducer)
class Connection(Protocol):
    """A caller's connection, with TLS or without. The codec is chosen when it is known what the peer speaks.

    `full`: the transport holds as much as it should of what the caller has not taken yet. `reading`: not paused.
    `client`: whose it is, by its address. `asked_at`: when its latest request began, or it was opened.
    """

    _log = Logger()

    transport: ITransport

    def __init__(self, connections: "Connections", listener: Listener, peer: str, secure: bool):
        self.connections = connections
        self.listener = listener
        self.peer = peer
        self.client = quota_key(peer)
        self.asked_at = connections.now()
        self.secure = secure
        self.codec: Codec | None = None
        self.full = False
        self.reading = True
        self._stopped_reading = 0.0
        self._unread_seconds = 0.0
        self.closing = False
        self._left = TURN_MICROSECONDS
        self._next_turn: IDelayedCall | None = None
        # By when TLS must be up, or the caller must have taken some of what waits for it, or the connection be closed.
        self._deadline: float | None = connections.now() + TLS_HANDSHAKE_SECONDS
        self._patience = 0.0
        self._acked = 0
        self._aborted = False

    @property
    def idle(self) -> bool:
        """Whether no request is under way, and nothing is left to be sent."""
        return self.codec is not None and self.codec.idle and not self.closing

    def connectionMade(self) -> None:
        """Speak HTTP/1.1 at once without TLS; with TLS the handshake decides."""
        if not self.connections.opened(self):
            self.abort()
            return
        if hasattr(self.transport, "setTcpNoDelay"):
            self.transport.setTcpNoDelay(True)
        if not self.secure:
            self._speak(self.connections.http1)

    def handshakeCompleted(self) -> None:
        """TLS is up: the protocol is the one negotiated by ALPN."""
        negotiated = getattr(self.transport, "negotiatedProtocol", None)
        self._speak(self.connections.http2 if negotiated == b"h2" else self.connections.http1)

    def _speak(self, factory: CodecFactory) -> None:
        self._deadline = None
        self.transport.registerProducer(self, True)  # type: ignore[attr-defined]
        self.codec = factory(self)

    def dataReceived(self, data: bytes) -> None:
        """Bytes have come."""
        if self.codec is not None:
            self.codec.received(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self.connections.closed(self)
        if self.secure and self.codec is None and not self._aborted:
            self._handshake_failed(*handshake_fault(reason))
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        codec, self.codec = self.codec, None  # each knows the other: else both would be garbage to be searched for
        if codec is not None:
            codec.lost()

    def _handshake_failed(self, reason: str, details: str) -> None:
        self.connections.recorder.tls_handshake_failed(reason)
        self._log.debug("no TLS with {peer}: {details}", peer=self.peer, details=details)

    def pause_reading(self) -> None:
        """Let the caller wait with what it sends.

        That it has gone shows only when the kernel is asked (see `check_deadlines`), and only once all that it has sent
        has arrived there, or something was sent to it in vain.
        """
        if self.reading and not self.closing:
            self.reading = False
            self._stopped_reading = self.connections.now()
            self.transport.pauseProducing()  # type: ignore[attr-defined]

    def resume_reading(self) -> None:
        """Take what the caller sends."""
        if not self.reading:
            self.reading = True
            self._unread_seconds += self.connections.now() - self._stopped_reading
            self.transport.resumeProducing()  # type: ignore[attr-defined]

    def reading_time(self) -> float:
        """A clock, in seconds, that stands still while nothing is read."""
        return (self.connections.now() if self.reading else self._stopped_reading) - self._unread_seconds

    # What is done in a turn of the reactor. What things cost is estimated by those who do them and not measured, so the
    # same bytes always take the same turns; and the share is made up only in a next turn, once it is used up.

    @property
    def turn_over(self) -> bool:
        """Whether what is left to do waits for the next turn, which calls `Codec.advance`."""
        return self._next_turn is not None

    def has_turn(self) -> bool:
        """Whether more may be done in this turn; if not, the next one calls `Codec.advance`."""
        if self._left > 0:
            return True
        if self._next_turn is None:
            self._next_turn = self.connections.in_next_turn(self._go_on)
        return False

    def spend(self, microseconds: int) -> None:
        """About this much was done."""
        self._left -= microseconds

    def request_begins(self) -> None:
        """A request is handed on."""
        self.spend(REQUEST_MICROSECONDS)
        self.asked_at = self.connections.now()

    def _go_on(self) -> None:
        self._next_turn = None
        self._left = TURN_MICROSECONDS
        if self.codec is not None:
            self.codec.advance()

    def close(self) -> None:
        """Close once what was written is sent, and abort if that takes too long."""
        if self.closing:
            return
        self.resume_reading()  # or the caller's own good-bye is not heard
        self.closing = True
        self._be_patient(self.connections.timeouts.idle if self.full else CLOSE_SECONDS)
        self.transport.unregisterProducer()  # type: ignore[attr-defined]  # TLS says no good-bye while there is one
        self.transport.loseConnection()

    def abort(self) -> None:
        """Close at once, losing what was not yet sent."""
        self._aborted = True
        self.transport.abortConnection()  # type: ignore[attr-defined]

    def check_deadlines(self, now: float) -> None:
        """End what has taken too long, and what has gone while nothing was read."""
        if self.closing or self.full or not self.reading:
            tcp = ask_tcp(self.transport)
            if tcp is not None and not tcp.established and not self.closing:
                self.abort()
                return
            if tcp is not None and tcp.acked != self._acked:
                self._acked = tcp.acked
                if self._deadline is not None:
                    self._deadline = now + self._patience
        if self._deadline is not None:
            if now >= self._deadline:
                if self.codec is None:
                    self._handshake_failed("timeout", f"not up within {TLS_HANDSHAKE_SECONDS:g} s")
                self.abort()
        elif self.codec is not None:
            self.codec.check_deadlines(now)

    def _be_patient(self, seconds: float) -> None:
        """From now on the caller must take something within so many seconds, time and again."""
        self._patience = seconds
        self._deadline = self.connections.now() + seconds

    # The transport's flow control.

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        if not self.full:
            self.full = True
            self._be_patient(self.connections.timeouts.idle)
            if self.codec is not None:
                self.codec.slow_down()

    def resumeProducing(self) -> None:
        """The transport's buffer is empty."""
        if self.full:
            self.full = False
            self._deadline = None
            if self.codec is not None:
                self.codec.speed_up()

    def stopProducing(self) -> None:
        """The transport takes no more; `connectionLost` says so too."""


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
        self._open: Caps[Connection] = Caps(clock.seconds, limit=limit, per_client=per_client)
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
            self._check_some(list(self._open), SWEEP_SECONDS / (turns + 1))

    def _check_some(self, unchecked: list[Connection], pause: float) -> None:
        self._sweeping = None
        now = self.now()
        for connection in unchecked[:SWEPT_A_TURN]:
            if connection not in self._open:
                continue
            try:
                connection.check_deadlines(now)
            except Exception:
                # The others are still to be looked at, now and later.
                self._log.failure("a connection's deadlines can't be checked, it is cut", peer=connection.peer)
                self.closed(connection)
                connection.abort()
        left = unchecked[SWEPT_A_TURN:]
        if left:
            # Those who came together are cut one after the other, and not all once a second.
            self._sweeping = self.later(pause, lambda: self._check_some(left, pause))


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
