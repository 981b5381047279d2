"""Connections in memory, on a clock: what one end writes the other receives, with ends, resets and back-pressure."""

from collections import deque
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, IPushProducer, IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket.backend.http1 import Origin

LARGEST_BUFFER = 65_536


@implementer(IConsumer)
class End:
    """One end's transport. What arrives is delivered by the clock, in order, the end of the connection included."""

    def __init__(self, clock: IReactorTime, protocol: Any):
        self.peer: End
        self.protocol = protocol
        self.lost = False
        self.disconnecting = False
        self.buffered = 0
        self._clock = clock
        self._inbox: deque[bytes | Exception] = deque()
        self._paused = False
        self._delivering = False
        self._producer: IPushProducer | None = None

    def write(self, data: bytes) -> None:
        if data and not self.lost and not self.disconnecting:
            self.peer.arrive(data)
            if self._producer is not None and self.peer.buffered > LARGEST_BUFFER:
                self._producer.pauseProducing()

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        if not self.lost and not self.disconnecting:
            self.disconnecting = True
            if self._producer is None:
                self._end(ConnectionDone(), ConnectionDone())

    def abortConnection(self) -> None:
        if not self.lost:
            self.disconnecting = True
            self._end(ConnectionLost(), ConnectionAborted())

    def _end(self, theirs: Exception, ours: Exception) -> None:
        self.peer.arrive(theirs)
        self._clock.callLater(0, self.lose, ours)

    def lose(self, reason: Exception) -> None:
        if not self.lost:
            self.lost = True
            self._inbox.clear()
            self.protocol.connectionLost(Failure(reason))

    def arrive(self, item: bytes | Exception) -> None:
        self._inbox.append(item)
        self.buffered += len(item) if isinstance(item, bytes) else 0
        self._deliver_later()

    def _deliver_later(self) -> None:
        if self._inbox and not self._paused and not self._delivering and not self.lost:
            self._delivering = True
            self._clock.callLater(0, self._deliver)

    def _deliver(self) -> None:
        self._delivering = False
        if self.lost or self._paused or not self._inbox:
            return
        item = self._inbox.popleft()
        if isinstance(item, bytes):
            self.buffered -= len(item)
            self.protocol.dataReceived(item)
        else:
            self.lose(item)
        self.peer.drained(self.buffered)
        self._deliver_later()

    def drained(self, left: int) -> None:
        if self._producer is not None and not left:
            self._producer.resumeProducing()

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        self._deliver_later()

    def stopProducing(self) -> None:
        self.loseConnection()

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        self._producer = producer

    def unregisterProducer(self) -> None:
        self._producer = None
        if self.disconnecting and not self.lost:
            self._end(ConnectionDone(), ConnectionDone())

    def getPeer(self) -> None:
        return None

    def getHost(self) -> None:
        return None

    def setTcpNoDelay(self, enabled: bool) -> None:
        pass


class Caller(Protocol):
    """The caller's end of a raw connection: what it got, and how that ended."""

    def __init__(self) -> None:
        self.received = b""
        self.ended: str | None = None

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = Failure(ConnectionDone())) -> None:  # noqa: B008
        self.ended = "closed" if reason.check(ConnectionDone) else "reset"


@implementer(IStreamClientEndpoint)
class Network:
    """A network with one server on it: whatever host is asked for, `http` talks to that server."""

    def __init__(self, clock: Any, server: Factory):
        self.ends: list[End] = []
        self._clock = clock
        self._server = server

    def http(self, url: Any) -> Origin:
        return Origin(self._clock, self, secure=False, connect_timeout=5.0)

    def connect(self, protocolFactory: Factory) -> Deferred[Any]:
        return succeed(self.link(protocolFactory.buildProtocol(None)))  # type: ignore[arg-type]

    def link(self, protocol: Any) -> Any:
        """Connect this protocol to the server."""
        near, far = End(self._clock, protocol), End(self._clock, self._server.buildProtocol(None))
        near.peer, far.peer = far, near
        self.ends += [near, far]
        far.protocol.makeConnection(far)
        protocol.makeConnection(near)
        return protocol
