"""The one request seam for HTTP/1.1 and HTTP/2: a head, a body handed on as it arrives, and one answer.

A connection makes a `Request` as soon as the head is there, passes it to the site, and then feeds it the body. The site
may answer at any time, also before the body has come: what is left of the body is the connection's business.
"""

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer

from ai_ticket.spans import NO_SPAN, Span
from ai_ticket.web.body import Body, BodySource

HeaderList = list[tuple[bytes, bytes]]

NO_CONTENT = 204
"""The status of an answer that has no body, and says nothing of one (RFC 9110, 8.6)."""


class Response(Struct, frozen=True):
    """A whole answer. `headers` are those beside the ones that every answer has."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Exchange(BodySource, Protocol):
    """The connection (HTTP/1.1) or stream (HTTP/2) that a request came on, as its request sees it."""

    def send(self, status: int, headers: HeaderList, body: bytes, content_length: int) -> None:
        """Send the one answer. `body` is empty for HEAD, whatever `content_length` says."""

    def start(self, status: int, headers: HeaderList, producer: IPushProducer) -> None:
        """Begin an answer of unknown length. `producer` is paused while the caller does not keep up."""

    def write(self, data: bytes) -> None:
        """Send some of the answer that was begun."""

    def finish(self) -> None:
        """The answer that was begun is complete."""

    def abort(self) -> None:
        """Cut the answer that was begun, so that the caller can tell."""


class Request:
    """A caller's request.

    `headers` has lower-case names; a repeated header's values are joined with a comma (RFC 9110, 5.2). `path` is as
    sent, without the query. `arrived` is the clock's time when the head was complete. `id`, and `common_headers` that
    the answer has whatever it is, are the site's to set.

    `span` is its operation in a trace. `facts` are what its handler found out that the log is to tell; `elsewhere` is
    how many seconds it has waited for its body, its turn and the backend, if it came so far.

    `lost`: the caller is gone, or was cut off. `broken`: the rest of the body can't be read, though the caller may wait
    for an answer. `last`: its connection (HTTP/1 only) takes no further request.
    `responded`: the answer was begun. `streaming`: it was begun, and is neither complete nor cut.
    """

    __slots__ = (
        "_exchange",
        "_on_lost",
        "arrived",
        "body",
        "broken",
        "common_headers",
        "elsewhere",
        "facts",
        "headers",
        "id",
        "last",
        "lost",
        "method",
        "path",
        "peer",
        "responded",
        "secure",
        "span",
        "streaming",
        "version",
    )

    def __init__(
        self,
        exchange: Exchange,
        *,
        method: str,
        target: bytes,
        version: str,
        headers: dict[bytes, bytes],
        peer: str,
        secure: bool,
        arrived: float,
    ):
        self._exchange = exchange
        self.method = method
        self.path = _path(target)
        self.version = version
        self.headers = headers
        self.peer = peer
        self.secure = secure
        self.arrived = arrived
        self.id = ""
        self.common_headers: HeaderList = []
        self.span: Span = NO_SPAN
        self.facts: dict[str, object] = {}
        self.elsewhere: float | None = None
        self.responded = False
        self.streaming = False
        self.body = Body(exchange, headers)
        self.last = False
        self.lost = False
        self.broken = False
        self._on_lost: Callable[[], object] | None = None

    @property
    def content_length(self) -> int | None:
        """The announced size of the body in bytes, or None where it is not announced."""
        return self.body.announced

    def when_lost(self, call: Callable[[], object]) -> None:
        """Call this, once, when the caller goes away before the answer was sent."""
        self._on_lost = call

    def read_body(self, limit: int) -> Deferred[bytes]:
        """The whole body, once it is there.

        The Deferred fails with `PayloadTooLarge` at the first byte over the limit.
        """
        return self.body.read_all(limit)

    def read_some(self) -> Deferred[bytes]:
        """The next piece of the body, b"" at its end: for bodies of any length, by one reader at a time.

        Nobody asking, the caller is kept waiting once about 64 KiB have come. The Deferred fails with `CancelledError`
        when the caller is gone or the answer is complete; who cancels it loses nothing of the body.
        """
        return self.body.read_some()

    def invite_body(self) -> None:
        """Tell a caller who waits for it to send the body, before an answer is begun."""
        self.body.invite()

    def renew_body_time(self) -> None:
        """Give the caller all of the time for a body again: what has come so far is enough of it for a while."""
        self._exchange.body_time.renew()

    def respond(self, response: Response) -> None:
        """Send the answer; nothing happens if the caller is gone or has one already."""
        if self.responded or self.lost:
            return
        self.responded = True
        self.body.drop()
        body = b"" if self.method == "HEAD" else response.body
        head = [*self.common_headers, *response.headers]
        if response.status != NO_CONTENT:
            head.insert(0, (b"content-type", response.content_type))
        self._exchange.send(response.status, head, body, len(response.body))

    def start(self, response: Response, producer: IPushProducer) -> None:
        """Begin an answer that comes in pieces; `response` has its head. `producer` is paused while the caller lags.

        The body may still be coming, and can be read on until the answer is complete.
        """
        if self.lost:
            return
        self.responded = self.streaming = True
        self.body.refrain()
        head = [(b"content-type", response.content_type), *self.common_headers, *response.headers]
        self._exchange.start(response.status, head, producer)

    def write(self, data: bytes) -> None:
        """Send a piece of the answer, unless it is empty (to HTTP/1 that is the end) or the caller is gone."""
        if self.streaming and data:
            self._exchange.write(data)

    def finish(self) -> None:
        """The answer in pieces is complete."""
        if self.streaming:
            self.streaming = False
            self.body.drop()
            self._exchange.finish()

    def abort(self) -> None:
        """Cut the answer in pieces."""
        if self.streaming:
            self.streaming = False
            self.body.drop()
            self._exchange.abort()

    # What the connection tells the request.

    def body_received(self, data: bytes | bytearray) -> None:
        """Some of the body has come."""
        self.body.received(data)

    def body_ended(self) -> None:
        """All of the body has come."""
        self.body.end()

    def body_broken(self) -> None:
        """The rest of the body can't be read, and no answer was begun: who is to give one is told to give up."""
        self.broken = True
        if self._on_lost is not None:
            self._on_lost()

    def connection_lost(self, reason: str | None = None) -> None:
        """The caller is gone, or was cut off: then for this `reason`, which the log tells."""
        if reason is not None:
            self.facts["error"] = reason
        self.lost = True
        unanswered = self.streaming or not self.responded
        self.streaming = False
        if self._on_lost is not None and unanswered:
            on_lost, self._on_lost = self._on_lost, None
            on_lost()
        self.body.lose()


def _path(target: bytes) -> str:
    """The path of a request target in origin or absolute form (RFC 9112, 3.2)."""
    path = target.partition(b"?")[0]
    if not path.startswith(b"/"):
        _, separator, rest = path.partition(b"://")
        if separator:
            path = b"/" + rest.partition(b"/")[2]
    return path.decode("latin-1")
