"""One connection to a model server, with one request at a time, and the answers that come on it."""

from collections.abc import Callable
from typing import Protocol

from twisted.internet import protocol
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IDelayedCall, IHandshakeListener, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket import eager
from ai_ticket.backend.http1_errors import ended_error, handshake_error
from ai_ticket.backend.http1_parser import ResponseParser
from ai_ticket.errors import ApiResponseFormatError, DomainError

KEPT_SECONDS = 2.0
"""How long an idle connection is kept: less than the 5 s after which llama.cpp closes one, with a margin."""

MOST_KEPT = 16

CLOSE_SECONDS = 1.0
"""How long an orderly close may take: under TLS it waits for the server."""


class Reader(Protocol):
    """Takes a body."""

    def received(self, data: bytes) -> None:
        """A piece of it has come."""

    def ended(self, error: DomainError | None) -> None:
        """It is complete, or broke off."""


class Response:
    """An answer, from its head on. Its body waits for a reader.

    `media_type` is its Content-Type in lower case and without parameters; empty where it has none.
    """

    def __init__(self, connection: "Connection", status: int, media_type: str):
        self.status = status
        self.media_type = media_type
        self._connection: Connection | None = connection
        self._reader: Reader | None = None
        self._unread = b""
        self._outcome: tuple[DomainError | None] | None = None

    def deliver(self, reader: Reader) -> None:
        """Hand the body on, as it comes."""
        self._reader = reader
        if self._unread:
            unread, self._unread = self._unread, b""
            self.resume()
            reader.received(unread)
        if self._outcome is not None:
            reader.ended(*self._outcome)

    def pause(self) -> None:
        """Receive no more for now; in the end that stops the server."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """Receive on."""
        if self._connection is not None:
            self._connection.resume()

    def abort(self) -> None:
        """Close the connection at once, unless the answer is complete. Its reader hears no more."""
        self._reader = None
        if self._connection is not None:
            self._connection.abort()

    # What the connection tells.

    def received(self, data: bytes) -> None:
        """A piece of the body has come."""
        if self._reader is not None:
            self._reader.received(data)
        else:
            self._unread += data
            self.pause()

    def detach(self) -> None:
        """The connection has nothing more to do with this answer."""
        self._connection = None

    def ended(self, error: DomainError | None) -> None:
        """The body is complete, or broke off."""
        self._outcome = (error,)
        if self._reader is not None:
            self._reader.ended(error)


class Connection(protocol.Protocol):
    """A connection. After an answer it goes to those that are kept, or closes.

    `heard`: something of the answer to the last request has come.
    """

    def __init__(self, clock: IReactorTime, kept: list["Connection"] | None):
        """@param kept: where idle connections wait for another request; None where they are not kept."""
        self._clock = clock
        self._kept = kept
        self._parser: ResponseParser | None = None
        self._answered: Deferred[Response] | None = None
        self._response: Response | None = None
        self._paused = False
        self._timer: IDelayedCall | None = None
        self.heard = False

    def request(self, data: bytes, sent: Callable[[], object]) -> Deferred[Response]:
        """Send a request; cancelling closes the connection.

        @param data: the whole of it.
        @param sent: is called when it is on its way.
        """
        self._stop_timer()
        self.heard = False
        self._parser = ResponseParser()
        answered: Deferred[Response] = Deferred(lambda _: self.abort())
        self._answered = answered
        eager.write(self.transport, data)
        sent()
        return answered

    def pause(self) -> None:
        """Receive no more for now."""
        self._paused = True
        self.transport.pauseProducing()  # type: ignore[union-attr]

    def resume(self) -> None:
        """Receive on."""
        self._paused = False
        self.transport.resumeProducing()  # type: ignore[union-attr]

    def abort(self) -> None:
        """Close at once. Nobody is told."""
        self._detach()
        self._answered = None
        self._stop_timer()
        self.transport.abortConnection()  # type: ignore[union-attr]

    def close(self) -> None:
        """Close in order, which has a moment."""
        self._forget()
        self._stop_timer()
        self._timer = self._clock.callLater(CLOSE_SECONDS, self._close_took_too_long)
        self.transport.loseConnection()  # type: ignore[union-attr]

    def _close_took_too_long(self) -> None:
        self._timer = None
        self.abort()

    def connectionMade(self) -> None:
        """A request is one write, of which nothing is to wait for the server's acknowledgement."""
        self.transport.setTcpNoDelay(True)  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        """Something has come, of the answer or unasked."""
        parser = self._parser
        if parser is None:
            self._forget()
            self.abort()
            return
        self.heard = True
        body = parser.feed(data)
        answered, error = None, None
        if self._response is None and parser.status:
            answered, self._answered = self._answered, None
            self._response = Response(self, parser.status, parser.media_type)
        response = self._response
        if parser.problem is not None:
            error = ApiResponseFormatError(parser.problem)
            answered = answered or self._answered
            self.abort()
        elif parser.complete:
            # Before anybody hears of it: who gets the last piece may ask again at once.
            self._finish(parser.reusable)
        if answered is not None and response is None:
            answered.errback(error)
        if response is None:
            return
        if answered is not None:
            answered.callback(response)
        if body:
            response.received(body)
        if parser.complete or error is not None:
            response.ended(error)

    def _finish(self, reusable: bool) -> None:
        self._detach()
        if self._paused:
            self.resume()
        if self._kept is None or not reusable or len(self._kept) >= MOST_KEPT:
            self.close()
            return
        self._kept.append(self)
        self._timer = self._clock.callLater(KEPT_SECONDS, self._idled)

    def _idled(self) -> None:
        self._timer = None
        self.close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is closed."""
        self._forget()
        self._stop_timer()
        parser, response, answered = self._parser, self._response, self._answered
        self._answered = None
        self._detach()
        if parser is None:
            return
        if response is not None:
            whole = not parser.framed and reason.check(ConnectionDone) is not None
            response.ended(None if whole else ended_error(reason.value, heard=True))
        elif answered is not None:
            answered.errback(ended_error(reason.value, heard=self.heard))

    def _detach(self) -> None:
        if self._response is not None:
            self._response.detach()
        if self._parser is not None:
            self._parser.stop()
        self._parser = self._response = None

    def _forget(self) -> None:
        if self._kept is not None and self in self._kept:
            self._kept.remove(self)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@implementer(IHandshakeListener)
class SecureConnection(Connection):
    """A connection over TLS. `secured` fires with it after the handshake; cancelling closes it."""

    def __init__(self, clock: IReactorTime, kept: list[Connection] | None):
        super().__init__(clock, kept)
        self.secured: Deferred[Connection] = Deferred(self._cancelled)

    def _cancelled(self, secured: Deferred[Connection]) -> None:
        secured.errback(CancelledError())  # first: the abort may end the connection, which would look like its fault
        self.abort()

    def handshakeCompleted(self) -> None:
        """Requests may be sent."""
        if not self.secured.called:
            self.secured.callback(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is closed, perhaps before the handshake was complete."""
        super().connectionLost(reason)
        if not self.secured.called:
            self.secured.errback(handshake_error(reason.value))
