"""Reading a model server's answer as it comes, with time-outs, and with a cancellation that closes the connection."""

from collections.abc import Callable

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket.backend.http1_connection import Response
from ai_ticket.errors import CallerTooSlow, DeadlineExceeded, DomainError

ALMOST = 0.001
"""Seconds by which a timer may be early."""

LAST_SECONDS = 1.0
"""How long a body may go on after all that is wanted of it has come."""


@implementer(IPushProducer)
class Body:
    """Delivers a response's body to a callable. `finished` fires when it has ended; cancelling it aborts.

    `finished` fails with `DeadlineExceeded` where nothing came for longer than allowed, with `ApiConnectionError` where
    the connection broke, with `ApiResponseStructureError` where the body ended before its announced end, with
    `ApiResponseFormatError` where it is not HTTP, and with what the callable raises.
    """

    def __init__(
        self,
        clock: IReactorTime,
        received: Callable[[bytes], None],
        first: float,
        idle: float,
        *,
        since: float | None = None,
    ):
        """@param first, idle: the longest silence in seconds before the first data, and after it (see `alive`).

        @param since: the clock's time from which on `first` counts, where that is not now.
        """
        self._clock = clock
        self._received: Callable[[bytes], None] | None = received
        self._begun = False
        self._heard_at = 0.0
        self._allowed = first
        self._idle = idle
        self._response: Response | None = None
        self._paused = False
        self.finished: Deferred[None] = Deferred(self._cancelled)
        waited = 0.0 if since is None else clock.seconds() - since
        self._silence = clock.callLater(max(0.0, first - waited), self._timed_out)

    def read(self, response: Response) -> Deferred[None]:
        """Begin to read; the result is `finished`."""
        self._response = response
        response.deliver(self)
        return self.finished

    def alive(self) -> None:
        """What was wanted has come, such as a token: from now on the shorter silence counts."""
        self._heard_at = self._clock.seconds()
        if not self._begun and not self.finished.called:
            self._begun = True
            self._allowed = self._idle
            self._restart(self._idle)

    def complete(self) -> None:
        """Nothing more is wanted: `finished` fires. The body is given a moment to end by itself, which keeps the

        connection for another request; then it is aborted.
        """
        if not self.finished.called:
            self._restart(LAST_SECONDS)
            self._received = None
            self.finished.callback(None)

    # What the response tells.

    def received(self, data: bytes) -> None:
        """Some of the body has come."""
        if self._received is None:
            return
        try:
            self._received(data)
        except Exception:
            self._fail(Failure())

    def ended(self, error: DomainError | None) -> None:
        """The body has ended, or the connection has."""
        self._response = None
        self._stop()
        if not self.finished.called:
            self.finished.callback(error if error is None else Failure(error))

    # Whoever takes the text slows the stream down; a stream that is held for too long counts as silent.

    def pauseProducing(self) -> None:
        """Read no more for now."""
        self._paused = True
        if self._response is not None:
            self._response.pause()

    def resumeProducing(self) -> None:
        """Read on."""
        self._paused = False
        if self._response is not None:
            self._response.resume()

    def stopProducing(self) -> None:
        """Whoever takes the text is gone; what waits for `finished` cancels it."""

    def _cancelled(self, finished: Deferred[None]) -> None:
        self._fail(Failure(CancelledError()))

    def _restart(self, seconds: float) -> None:
        """Set the timer anew. To reset it to an earlier time, Twisted looks for it among all there are."""
        self._silence.cancel()
        self._silence = self._clock.callLater(seconds, self._timed_out)

    def _timed_out(self) -> None:
        if self._begun and not self.finished.called:
            # The timer is not set anew for each token, so it may be that something has come meanwhile.
            left = self._heard_at + self._idle - self._clock.seconds()
            if left > ALMOST:
                self._silence = self._clock.callLater(left, self._timed_out)
                return
        error = DeadlineExceeded(f"the model server was silent for {self._allowed:g} s")
        if self._paused:
            error = CallerTooSlow(f"nothing was read for {self._allowed:g} s")
        self._fail(Failure(error))

    def _fail(self, failure: Failure) -> None:
        self._stop()
        response, self._response = self._response, None
        if response is not None:
            response.abort()
        if not self.finished.called:
            self.finished.errback(failure)

    def _stop(self) -> None:
        self._received = None  # which holds this object as a rule: a cycle for the garbage collector
        if self._silence.active():
            self._silence.cancel()
