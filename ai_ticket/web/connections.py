"""Open connections: which protocol each speaks, how many there may be, and when one has been silent for too long."""

from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Protocol as Interface

from msgspec import Struct
from twisted.internet.interfaces import (
    IHandshakeListener,
    IReactorTime,
    ITransport,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket.web.request import HeaderList, Request

SWEEP_SECONDS = 1.0
TLS_HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 5.0
"""How long a connection that was asked to close may take before it is aborted."""


class Timeouts(Struct, frozen=True):
    """Deadlines of a connection, in seconds: for a whole head, for a whole body, and for being idle."""

    header: float
    body: float
    keepalive: float


class Codec(Interface):
    """One HTTP version on one connection."""

    deadline: float | None

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""

    def received(self, data: bytes) -> None:
        """Bytes have come."""

    def lost(self) -> None:
        """The connection is gone."""

    def check_deadlines(self, now: float) -> None:
        """End what has taken too long."""

    def drain(self) -> None:
        """Close when idle, and tell the peer that this connection takes no new requests."""


class Listener(Interface):
    """What takes the requests that come in on connections."""

    def received(self, request: Request) -> None:
        """A request's head is complete."""

    def refuse(self, status: int) -> tuple[HeaderList, bytes]:
        """Headers and body of the answer to what could not be read as a request."""


CodecFactory = Callable[["Connection"], Codec]


@implementer(IHandshakeListener)
class Connection(Protocol):
    """A caller's connection, with TLS or without. The codec is chosen when it is known what the peer speaks."""

    transport: ITransport

    def __init__(self, connections: "Connections", listener: Listener, peer: str, secure: bool):
        self.connections = connections
        self.listener = listener
        self.peer = peer
        self.secure = secure
        self.codec: Codec | None = None
        self.close_deadline: float | None = connections.now() + TLS_HANDSHAKE_SECONDS

    def connectionMade(self) -> None:
        """Speak HTTP/1.1 at once without TLS; with TLS the handshake decides."""
        self.connections.opened(self)
        if hasattr(self.transport, "setTcpNoDelay"):
            self.transport.setTcpNoDelay(True)
        if not self.secure:
            self._speak(self.connections.http1)

    def handshakeCompleted(self) -> None:
        """TLS is up: the protocol is the one negotiated by ALPN."""
        negotiated = getattr(self.transport, "negotiatedProtocol", None)
        self._speak(self.connections.http2 if negotiated == b"h2" else self.connections.http1)

    def _speak(self, factory: CodecFactory) -> None:
        self.close_deadline = None
        self.codec = factory(self)

    def dataReceived(self, data: bytes) -> None:
        """Bytes have come."""
        if self.codec is not None:
            self.codec.received(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self.connections.closed(self)
        if self.codec is not None:
            self.codec.lost()

    def close(self) -> None:
        """Close once what was written is sent, and abort if that takes too long."""
        self.close_deadline = self.connections.now() + CLOSE_SECONDS
        self.transport.loseConnection()

    def abort(self) -> None:
        """Close at once, losing what was not yet sent."""
        self.transport.abortConnection()  # type: ignore[attr-defined]

    def check_deadlines(self, now: float) -> None:
        """End what has taken too long."""
        if self.close_deadline is not None and now >= self.close_deadline:
            self.abort()
        elif self.codec is not None:
            self.codec.check_deadlines(now)


class Connections:
    """All open connections of the service's endpoints."""

    _log = Logger()

    def __init__(
        self, clock: IReactorTime, *, limit: int, timeouts: Timeouts, http1: CodecFactory, http2: CodecFactory
    ):
        self._clock = clock
        self._limit = limit
        self._open: dict[Connection, None] = {}
        self._sweep = LoopingCall(self._check_deadlines)
        self._sweep.clock = clock
        self._date = (-1, b"")
        self._refusals = 0
        self.timeouts = timeouts
        self.http1 = http1
        self.http2 = http2
        self.draining = False

    def __len__(self) -> int:
        return len(self._open)

    def start(self) -> None:
        """Begin to watch deadlines."""
        self._sweep.start(SWEEP_SECONDS, now=False).addErrback(
            lambda failure: self._log.failure("watching connections failed", failure)
        )

    def stop(self) -> None:
        """Abort what is open, and no longer watch."""
        for connection in list(self._open):
            connection.abort()
        if self._sweep.running:
            self._sweep.stop()

    def drain(self) -> None:
        """Ask every connection to close as soon as no request is under way on it."""
        self.draining = True
        for connection in list(self._open):
            if connection.codec is not None:
                connection.codec.drain()

    def now(self) -> float:
        """The clock's time in seconds."""
        return self._clock.seconds()

    def date(self) -> bytes:
        """The value of a Date header, made once a second."""
        now = int(self._clock.seconds())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True).encode())
        return self._date[1]

    def opened(self, connection: Connection) -> None:
        """Count a new connection; where there are too many, the one that has been idle for longest makes room."""
        if len(self._open) >= self._limit:
            oldest = next(self._idle(), None)
            self._refusals += 1
            if self._refusals == 1:
                self._log.warn("MAX_CONNECTIONS={limit} reached: closing idle connections", limit=self._limit)
            if oldest is None:
                connection.abort()
                return
            del self._open[oldest]  # it closes a little later; the next newcomer must not count on it again
            oldest.abort()
        self._open[connection] = None

    def closed(self, connection: Connection) -> None:
        """A connection is gone."""
        self._open.pop(connection, None)

    def _idle(self) -> Iterator[Connection]:
        return (connection for connection in self._open if connection.codec is not None and connection.codec.idle)

    def _check_deadlines(self) -> None:
        if self._refusals > 1:
            self._log.warn("{count} more connections closed for room", count=self._refusals - 1)
        self._refusals = 0
        now = self.now()
        for connection in list(self._open):
            connection.check_deadlines(now)


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
