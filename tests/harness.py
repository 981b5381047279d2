"""Doubles and memory transports that several tests use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket.backend.http1 import Origin
from ai_ticket.errors import DomainError
from ai_ticket.event import Completion, Event, Usage
from ai_ticket.interfaces import Admission, AttemptOutcome, BackendState, Client, Job, Sink
from ai_ticket.spans import NO_SPAN, Span
from ai_ticket.web.codec import Listener
from ai_ticket.web.connection import Connection, Timeouts
from ai_ticket.web.connections import Connections
from ai_ticket.web.http1 import Http1
from ai_ticket.web.http2 import Http2

HERE = Path(__file__).parent
CAPTURES = HERE / "captures"
TIMEOUTS = Timeouts(header=10.0, body=30.0, keepalive=75.0, idle=30.0)
COMPLETION = Completion("Fine.", "stop", "a-model", Usage(3, 2, 5))


@dataclass
class Recorded:
    """A `Recorder` that remembers."""

    in_flight: int = 0
    finished: list[tuple[str, str, int]] = field(default_factory=list)
    auth_failures: list[str] = field(default_factory=list)
    overheads: list[tuple[str, float]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    handshake_failures: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def request_started(self) -> None:
        self.in_flight += 1

    def request_finished(
        self, route: str, method: str, status: int, seconds: float, trace_id: str | None = None
    ) -> None:
        self.in_flight -= 1
        self.finished.append((route, method, status))

    def overhead(self, route: str, seconds: float) -> None:
        self.overheads.append((route, seconds))

    def authentication_failed(self, reason: str) -> None:
        self.auth_failures.append(reason)

    def rate_limited(self, reason: str) -> None:
        self.refused.append(reason)

    def tls_handshake_failed(self, reason: str) -> None:
        self.handshake_failures.append(reason)

    def connection_ended(self, reason: str) -> None:
        self.ended.append(reason)


class Attempts(list[AttemptOutcome]):
    """A `BackendRecorder` that remembers."""

    def attempt_ended(self, attempt: AttemptOutcome) -> None:
        self.append(attempt)


class MemoryBackend:
    """A `Backend` in memory: each event waits in `calls` until the test fires its Deferred."""

    def __init__(self, slots: int = 1, *, instant: bool = False) -> None:
        self.state = BackendState(name="memory:1", up=True, slots=slots)
        self.calls: list[tuple[Event, Deferred[Completion]]] = []
        self.cancelled: list[Event] = []
        self._instant = instant

    async def complete(
        self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
    ) -> Completion:
        answer: Deferred[Completion] = Deferred(lambda _: self.cancelled.append(event))
        self.calls.append((event, answer))
        if self._instant:
            answer.callback(COMPLETION)
        return await answer

    async def probe(self) -> BackendState:
        return self.state


class MemoryPipeline:
    """A `Pipeline` that answers at once, and remembers what came."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.answer: Callable[[], Any] = lambda: succeed(COMPLETION)
        self.refusal: DomainError | None = None
        self.place: int | None = None
        self.batch_window = 8

    @property
    def events(self) -> list[Event]:
        return [job.event for job in self.jobs]

    async def submit(self, job: Job) -> Completion:
        self.jobs.append(job)
        found: Completion = await self.answer()
        return found

    async def check_room(self, client: Client, deadline: float) -> None:
        if self.refusal is not None:
            raise self.refusal

    def position(self, job: Job) -> int | None:
        return self.place


class ScriptedLimiter:
    """A `Limiter` that admits all, or says what the test wants said, and remembers who asked."""

    limit = 120
    window = 60.0

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.admissions: list[Admission] = []

    def admit(self, client: str) -> Deferred[Admission]:
        self.asked.append(client)
        return succeed(self.admissions.pop(0) if self.admissions else Admission(True, 119, 0.0))


class MemoryTransport(StringTransport):
    """A connection's transport in memory, that also tells whether it was aborted.

    `full_at`: with so many bytes that nobody has taken, it asks for no more, as a real one does.
    """

    aborted = False
    full_at: int | None = None
    negotiatedProtocol: bytes | None = None

    def write(self, data: bytes) -> None:
        super().write(data)
        if self.producer is not None and self.full_at is not None and len(self.value()) > self.full_at:
            self.producer.pauseProducing()

    def abortConnection(self) -> None:
        self.aborted = True
        self.loseConnection()

    def setTcpNoDelay(self, enabled: bool) -> None:
        pass


def make_connections(clock: Clock, *, limit: int = 100, per_client: int | None = None) -> Connections:
    return Connections(
        clock,
        limit=limit,
        per_client=per_client,
        timeouts=TIMEOUTS,
        recorder=Recorded(),
        http1=Http1,
        http2=Http2,
    )


def connect(
    connections: Connections,
    listener: Listener,
    *,
    secure: bool = False,
    protocol: bytes | None = None,
    peer: str = "192.0.2.7",
) -> tuple[Connection, MemoryTransport]:
    """A new connection; it speaks HTTP/1.1, unless `protocol` is what TLS has negotiated."""
    connection = Connection(connections, listener, peer, secure)
    transport = MemoryTransport()
    transport.negotiatedProtocol = protocol
    connection.makeConnection(transport)
    if secure:
        connection.handshakeCompleted()
    return connection, transport


class Http2Client:
    """The other end of an HTTP/2 connection in memory."""

    def __init__(self, connections: Connections, listener: Listener) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.connection = Connection(connections, listener, "192.0.2.7", True)
        self.transport = MemoryTransport()
        self.transport.negotiatedProtocol = b"h2"
        self.connection.makeConnection(self.transport)
        self.connection.handshakeCompleted()
        self.events: list[h2.events.Event] = []
        self.h2.initiate_connection()
        self.exchange()

    def exchange(self) -> list[h2.events.Event]:
        """Send what we have, take what there is, until nothing moves."""
        new: list[h2.events.Event] = []
        while True:
            data = self.h2.data_to_send()
            if data:
                self.connection.dataReceived(data)
            answer = self.transport.value()
            self.transport.clear()
            if answer:
                new += self.h2.receive_data(answer)
            elif not data:
                self.events += new
                return new

    def request(self, method: str, path: str, headers: list[tuple[str, str]] = [], body: bytes | None = None) -> int:  # noqa: B006
        stream_id = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":path", path), (":scheme", "https"), (":authority", "localhost"), *headers]
        self.h2.send_headers(stream_id, head, end_stream=body is None)
        if body is not None:
            self.h2.send_data(stream_id, body, end_stream=True)
        self.exchange()
        return stream_id

    def response(self, stream_id: int) -> tuple[int, dict[str, str], bytes]:
        """The answer that came on a stream."""
        headers: dict[str, str] = {}
        body = b""
        for event in self.events:
            if getattr(event, "stream_id", None) != stream_id:
                continue
            if isinstance(event, h2.events.ResponseReceived):
                headers = dict(event.headers)  # type: ignore[arg-type]
            elif isinstance(event, h2.events.DataReceived):
                body += event.data
        return int(headers.get(":status", 0)), headers, body


def parse_responses(data: bytes) -> Iterator[tuple[int, dict[str, str], bytes]]:
    """The HTTP/1.1 answers in these bytes; for requests other than HEAD."""
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status_line, *lines = head.decode().split("\r\n")
        status = int(status_line.split()[1])
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", 0))
        yield status, headers, data[:size]
        data = data[size:]


def capture(name: str) -> tuple[str, bytes]:
    """The request body and the raw answer of a recorded exchange."""
    text = (CAPTURES / name).read_bytes()
    request, _, response = text.partition(b"### RESPONSE\n")
    if response.startswith(b"curl:"):
        response = response.partition(b"\n")[2]
    head, _, body = response.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/"):
        return request.decode(), b""
    fields = {name.lower(): value for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])}
    if fields.get(b"transfer-encoding", b"").strip() == b"chunked":
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    elif b"content-length" in fields:
        # A path was taken out of some recordings, which made them shorter than they say.
        said = fields[b"content-length"]
        body = body[: int(said)].rstrip(b"\n")
        head = head.replace(b"ength:" + said, b"ength: %d" % len(body))
    return request.decode(), head + b"\r\n\r\n" + body


@dataclass
class Answer:
    """What a `MemoryServer` does with a request: the pieces that it sends, and how it ends."""

    pieces: list[bytes]
    ends: Exception | None = field(default_factory=ConnectionDone)


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, server: "MemoryServer"):
        self._server = server

    def connect(self, factory: Factory) -> Deferred[Any]:
        if self._server.refusal is not None:
            return Deferred() if self._server.refusal is _NEVER else _failed(self._server.refusal)
        protocol: Any = factory.buildProtocol(None)  # type: ignore[arg-type]
        transport = ServerTransport(self._server, protocol)
        self._server.transports.append(transport)
        protocol.makeConnection(transport)
        return succeed(protocol)


def _failed(error: Exception) -> Deferred[Any]:
    failing: Deferred[Any] = Deferred()
    failing.errback(Failure(error))
    return failing


_NEVER = Exception("never connects")


class ServerTransport(MemoryTransport):
    """The client's end of a connection to a `MemoryServer`."""

    def __init__(self, server: "MemoryServer", protocol: Any) -> None:
        super().__init__()
        self._server = server
        self.protocol_: Any = protocol
        self.lost = False

    def write(self, data: bytes) -> None:
        super().write(data)
        self._server.written(self)

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def lose(self, reason: Exception) -> None:
        if not self.lost:
            self.lost = True
            self.protocol_.connectionLost(Failure(reason))

    def loseConnection(self) -> None:
        super().loseConnection()
        self.lose(ConnectionDone())

    def abortConnection(self) -> None:
        self.aborted = True
        self.lose(ConnectionLost())


class MemoryServer:
    """A model server in memory that plays answers by method and path; `requests` holds what it was sent."""

    def __init__(self, clock: Clock, answers: dict[str, Answer]) -> None:
        self.answers = answers
        self.requests: list[tuple[str, bytes, bytes]] = []
        self.transports: list[ServerTransport] = []
        self.refusal: Exception | None = None
        self._clock = clock

    def never_connect(self) -> None:
        self.refusal = _NEVER

    def http(self, url: Any) -> Origin:
        return Origin(self._clock, _Endpoint(self), secure=False, connect_timeout=5.0)

    def written(self, transport: ServerTransport) -> None:
        head, separator, body = transport.value().partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        size = next((int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length")), 0)
        if not separator or len(body) < size:
            return
        method, path, _ = lines[0].decode().split()
        self.requests.append((f"{method} {path}", head, body))
        transport.clear()
        answer = self.answers.get(f"{method} {path}", NOT_FOUND)
        self._clock.callLater(0, self._play, transport, answer)

    def _play(self, transport: ServerTransport, answer: Answer) -> None:
        for piece in answer.pieces:
            if not transport.lost:
                transport.protocol_.dataReceived(piece)
        if answer.ends is not None:
            transport.lose(answer.ends)


NOT_FOUND = Answer([b"HTTP/1.0 404 Not Found\r\ncontent-type: text/html\r\n\r\n"])


def recorded(name: str) -> Answer:
    """The answer of a recorded exchange."""
    return Answer([capture(name)[1]])
