"""The fake's connections: one request each, and each with a thread of its own for as long as it is open."""

from collections import deque
from collections.abc import Callable

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from msgspec import Struct
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

LARGEST_BODY = 33_554_432


class Request(Struct, frozen=True):
    """What was asked. The path has its query; names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    too_big: bool = False


class Threads:
    """What serves connections: so many at a time, idle ones included. The others are neither read nor answered."""

    def __init__(self, count: int):
        self.open: list[Connection] = []
        self.most = 0
        self._count = count
        self._serving: set[Connection] = set()
        self._waiting: deque[Connection] = deque()
        self._stalled = False

    @property
    def stalled(self) -> bool:
        """Whether connections are left waiting although there are threads, as if the server did not accept any."""
        return self._stalled

    @stalled.setter
    def stalled(self, stalled: bool) -> None:
        self._stalled = stalled
        self._serve_next()

    def enter(self, connection: "Connection") -> None:
        """A connection was made."""
        self.open.append(connection)
        self.most = max(self.most, len(self.open))
        self._waiting.append(connection)
        connection.hold()
        self._serve_next()

    def leave(self, connection: "Connection") -> None:
        """A connection was lost."""
        self.open.remove(connection)
        self._serving.discard(connection)
        if connection in self._waiting:
            self._waiting.remove(connection)
        self._serve_next()

    def _serve_next(self) -> None:
        while self._waiting and len(self._serving) < self._count and not self._stalled:
            connection = self._waiting.popleft()
            self._serving.add(connection)
            connection.serve()


class Connection(Protocol):
    """One connection, which carries one request and is closed after its answer."""

    def __init__(self, threads: Threads, handle: "Callable[[Connection, Request], None]"):
        self.lost = False
        self.on_lost: Callable[[], None] | None = None
        self._threads = threads
        self._handle = handle
        self._parser: HttpRequestParser | None = None
        self._held = b""
        self._asked = False
        self._producing = False
        self._path = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    def connectionMade(self) -> None:
        """Wait for a thread."""
        self._threads.enter(self)

    def hold(self) -> None:
        """There may be no thread for it: what the caller sends stays where it is."""
        self._transport.pauseProducing()

    def serve(self) -> None:
        """A thread has turned to it."""
        self._parser = HttpRequestParser(self)
        self._transport.resumeProducing()
        held, self._held = self._held, b""
        if held:
            self.dataReceived(held)

    def dataReceived(self, data: bytes) -> None:
        """Read the request; whatever follows it is ignored."""
        if self._parser is None:
            self._held += data
        elif not self._asked:
            try:
                self._parser.feed_data(data)
            except HttpParserUpgrade:
                pass
            except HttpParserError:
                self.close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The caller has gone, or we have closed it. A half-close counts as gone."""
        self.lost = True
        self._threads.leave(self)
        if self.on_lost is not None:
            self.on_lost()

    # What the parser tells.

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The request's head has come. A body that is too large is not waited for."""
        length = self._headers.get("content-length", "0")
        if length.isdigit() and int(length) > LARGEST_BODY:
            self._ask(too_big=True)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The request has come."""
        self._ask()

    def _ask(self, *, too_big: bool = False) -> None:
        if self._asked or self._parser is None:
            return
        self._asked = True
        method = self._parser.get_method().decode("ascii")
        path = self._path.decode("latin-1")
        self._handle(self, Request(method, path, self._headers, b"".join(self._body), too_big))

    # What the server does with it.

    def write(self, data: bytes) -> None:
        """Send some of the answer."""
        if not self.lost:
            self._transport.write(data)

    def produce(self, producer: IPushProducer) -> None:
        """Let the caller's reading pace what writes."""
        if not self.lost:
            self._transport.registerProducer(producer, True)
            self._producing = True

    def close(self) -> None:
        """End it in order, after what was written."""
        self._unregister()
        if not self.lost:
            self._transport.loseConnection()

    def reset(self) -> None:
        """Break it."""
        self._unregister()
        if not self.lost:
            self._transport.abortConnection()

    @property
    def _transport(self) -> "_Transport":
        return self.transport  # type: ignore[return-value]

    def _unregister(self) -> None:
        if self._producing and not self.lost:
            self._transport.unregisterProducer()
        self._producing = False


class _Transport:
    """What is used of a TCP transport, or one in memory."""

    write: Callable[[bytes], None]
    pauseProducing: Callable[[], None]
    resumeProducing: Callable[[], None]
    registerProducer: Callable[[IPushProducer, bool], None]
    unregisterProducer: Callable[[], None]
    loseConnection: Callable[[], None]
    abortConnection: Callable[[], None]
