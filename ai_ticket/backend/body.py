"""Reading a model server's answer as it comes, with time-outs, and with a cancellation that closes the connection."""

from collections.abc import Callable
from typing import Any

from OpenSSL import SSL
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IConsumer, IDelayedCall, IPushProducer, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IBodyProducer, IResponse
from zope.interface import implementer

from ai_ticket.errors import ApiConnectionError, ApiResponseStructureError, CallerTooSlow, DeadlineExceeded, DomainError
from ai_ticket.server_identity import IDENTITY_ERRORS

LAST_SECONDS = 1.0
"""How long a body may go on after all that is wanted of it has come."""


@implementer(IBodyProducer)
class BytesProducer:
    """A request's body, written at once. treq's own producer for bytes takes turns of the global reactor."""

    def __init__(self, data: bytes, sent: Callable[[], object] = lambda: None):
        """@param sent: is called when the data is on its way."""
        self.length = len(data)
        self._data = data
        self._sent = sent

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """Write all of it."""
        consumer.write(self._data)
        self._sent()
        return succeed(None)

    def pauseProducing(self) -> None:
        """There is nothing left to pause."""

    def resumeProducing(self) -> None:
        """There is nothing left to resume."""

    def stopProducing(self) -> None:
        """There is nothing left to stop."""


@implementer(IPushProducer)
class Body(Protocol):
    """Delivers a response's body to a callable. `finished` fires when it has ended; cancelling it aborts.

    `finished` fails with `DeadlineExceeded` where nothing came for longer than allowed, with `ApiConnectionError` where
    the connection broke, with `ApiResponseStructureError` where the body ended before its announced end, and with what
    the callable raises.
    """

    def __init__(self, clock: IReactorTime, received: Callable[[bytes], None], first: float, idle: float):
        """@param first, idle: the longest silence in seconds before the first data, and after it (see `alive`)."""
        self._clock = clock
        self._received = received
        self._allowed = first
        self._idle = idle
        self._over = False
        self._connection: Any = None
        self._paused = False
        self.finished: Deferred[None] = Deferred(self._cancelled)
        self._silence: IDelayedCall | None = clock.callLater(max(0.0, first), self._timed_out)

    def read(self, response: IResponse) -> Deferred[None]:
        """Begin to read; the result is `finished`."""
        response.deliverBody(self)
        return self.finished

    def dataReceived(self, data: bytes) -> None:
        """Some of the body has come."""
        if self.finished.called:
            return
        try:
            self._received(data)
        except DomainError:
            self._end(Failure())
            self._abort()

    def alive(self) -> None:
        """What was wanted has come, such as a token: from now on the shorter silence counts."""
        if self._silence is not None and not self.finished.called:
            self._allowed = self._idle
            self._silence.reset(self._idle)

    def complete(self) -> None:
        """Nothing more is wanted: `finished` fires. The body is given a moment to end by itself, which keeps the

        connection for another request; then it is aborted.
        """
        self._end(None)
        if not self._over:
            self._silence = self._clock.callLater(LAST_SECONDS, self._abort_silently)

    def _abort_silently(self) -> None:
        self._silence = None
        self._abort()

    # Whoever takes the text slows the stream down; a stream that is held for too long counts as silent.

    def pauseProducing(self) -> None:
        """Read no more for now."""
        self._paused = True
        if not self._over and self.transport is not None:
            self.transport.pauseProducing()  # type: ignore[attr-defined]

    def resumeProducing(self) -> None:
        """Read on."""
        self._paused = False
        if not self._over and self.transport is not None:
            self.transport.resumeProducing()  # type: ignore[attr-defined]

    def stopProducing(self) -> None:
        """Whoever takes the text is gone; what waits for `finished` cancels it."""

    def connectionMade(self) -> None:
        """The body begins."""
        self._connection = getattr(self.transport, "_producer", None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The body has ended, or the connection has."""
        self._over = True
        if reason.check(PotentialDataLoss) and _broke(self._connection):
            self._end(Failure(ApiConnectionError("the connection broke")))
        elif reason.check(ResponseDone, PotentialDataLoss):
            self._end(None)
        else:
            self._end(Failure(connection_error(reason.value)))

    def _cancelled(self, finished: Deferred[None]) -> None:
        finished.errback(CancelledError())  # first: the abort ends the body too, which would look like its end
        self._abort()

    def _timed_out(self) -> None:
        self._silence = None
        if not self.finished.called:
            if self._paused:
                self.finished.errback(CallerTooSlow(f"nothing was read for {self._allowed:g} s"))
            else:
                self.finished.errback(DeadlineExceeded(f"the model server was silent for {self._allowed:g} s"))
        self._abort()

    def _end(self, failure: Failure | None) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        if not self.finished.called:
            self.finished.callback(failure)

    def _abort(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        abort_connection(self.transport)


def remember_end(protocol: Any) -> Any:
    """Have a connection's transport remember why it ended.

    Twisted's client says `PotentialDataLoss` of every body that ends with its connection, as KoboldCPP's all do,
    whether it was closed or reset.
    """
    lost = protocol.connectionLost

    def connection_lost(reason: Failure) -> None:
        protocol.transport.lost_reason = reason
        lost(reason)

    protocol.connectionLost = connection_lost
    return protocol


def _untrusted(reason: Failure) -> bool:
    return reason.check(SSL.Error) is not None and "certificate verify failed" in str(reason.value)


def _broke(connection: Any) -> bool:
    reason: Failure | None = getattr(connection, "lost_reason", None)
    return reason is not None and reason.check(ConnectionLost, SSL.Error) is not None


def abort_connection(transport: Any) -> None:
    """Close the connection under a response's body at once.

    The transport that a body is delivered on is a proxy that can only ask for an orderly close, which under TLS waits
    for the peer; what it stands for is reached by its private attribute. It is gone when the response has ended.
    """
    connection = getattr(transport, "_producer", transport)
    if connection is not None:
        abort = getattr(connection, "abortConnection", None) or connection.loseConnection
        abort()


def connection_error(error: BaseException | None) -> DomainError:
    """Which fault it is when a connection ends early: an answer that stops or stays out, or one that breaks."""
    if isinstance(error, ResponseFailed) and any(reason.check(*IDENTITY_ERRORS) for reason in error.reasons):
        return ApiConnectionError("the server's certificate is for another host")
    if isinstance(error, ResponseFailed) and any(_untrusted(reason) for reason in error.reasons):
        return ApiConnectionError("the server's certificate is not trusted")
    if isinstance(error, ResponseFailed) and not any(
        reason.check(ConnectionLost, SSL.Error) for reason in error.reasons
    ):
        nothing = isinstance(error, ResponseNeverReceived)
        return ApiResponseStructureError(
            "the server closed the connection without an answer" if nothing else "the answer ended before its end"
        )
    return ApiConnectionError("the connection broke")


def cancellable(operation: Deferred[Any]) -> Deferred[Any]:
    """The operation, but cancelling it ends in `CancelledError` whatever the operation itself makes of it.

    A cancelled request of Twisted's Agent fails like one whose connection broke, which would put the blame on the peer.
    """

    def forward(result: Any) -> None:
        if not outer.called:
            outer.callback(result)

    def cancel(_: Deferred[Any]) -> None:
        outer.errback(CancelledError())
        operation.cancel()

    outer: Deferred[Any] = Deferred(cancel)
    operation.addBoth(forward)
    return outer
