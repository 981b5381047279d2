"""An open connection: which protocol it speaks, what is done for it in a turn, and when it has been silent too long."""

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct
from twisted.internet import protocol
from twisted.internet.interfaces import IDelayedCall, IHandshakeListener, IPushProducer, ITransport
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket.interfaces import Recorder
from ai_ticket.web.client_address import quota_key
from ai_ticket.web.codec import Codec, Listener
from ai_ticket.web.tcp import ask_tcp
from ai_ticket.web.tls import handshake_fault

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


class Surroundings(Protocol):
    """All open connections, as one of them and its codec see them (see `Connections`)."""

    timeouts: Timeouts
    recorder: Recorder
    http1: CodecFactory
    http2: CodecFactory
    draining: bool
    leaving: bool

    def now(self) -> float:
        """The clock's time in seconds."""

    def later(self, seconds: float, call: Callable[[], None]) -> IDelayedCall:
        """Call this after so long."""

    def in_next_turn(self, call: Callable[[], None]) -> IDelayedCall:
        """Call this once the reactor has seen to the others."""

    def date(self) -> bytes:
        """The value of a Date header."""

    def opened(self, connection: "Connection") -> bool:
        """Count a new connection, if there is a place for it."""

    def closed(self, connection: "Connection") -> None:
        """A connection is gone."""


@implementer(IHandshakeListener, IPushProducer)
class Connection(protocol.Protocol):
    """A caller's connection, with TLS or without. The codec is chosen when it is known what the peer speaks.

    `full`: the transport holds as much as it should of what the caller has not taken yet. `reading`: not paused.
    `client`: whose it is, by its address. `asked_at`: when its latest request began, or it was opened.
    `ended`: for which reason we ended it, if we did (see `Recorder.connection_ended`).
    """

    _log = Logger()

    transport: ITransport

    def __init__(self, connections: Surroundings, listener: Listener, peer: str, secure: bool):
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
        self.ended: str | None = None

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

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:
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

    def end(self, reason: str) -> None:
        """Close at once, for what the caller has not done in time."""
        self.note_end(reason)
        self.abort()

    def note_end(self, reason: str) -> None:
        """We end it, for this reason. It counts once."""
        if self.ended is None:
            self.ended = reason
            self.tell_end("connection", reason)

    def tell_end(self, what: str, reason: str) -> None:
        """Count the end of this connection, or of a stream on it."""
        self.connections.recorder.connection_ended(reason)
        self._log.debug("{what} of {peer} ended: {reason}", what=what, peer=self.peer, reason=reason)

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
                else:
                    self.end("unread" if self.full else "close_timeout")
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
