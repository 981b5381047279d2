"""A generation on a slot: tokens that come with the clock, and the answer that carries them, streamed or whole."""

from collections.abc import Callable
from enum import Enum, auto
from math import inf
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from zope.interface import implementer

from ai_ticket.backend.fake import wire
from ai_ticket.backend.fake.ask import Ask
from ai_ticket.backend.fake.connection import Connection
from ai_ticket.backend.fake.script import Fault, Script
from ai_ticket.backend.fake.text import Plan

_ROUNDING = 1e-6


class Outcome(Enum):
    """How a generation ended. `BROKEN` is what a script made of it."""

    FINISHED = auto()
    ABORTED = auto()
    DISCONNECTED = auto()
    BROKEN = auto()


class Pace(Struct):
    """Seconds that the server takes, as they were measured.

    @ivar first_event: from the head of a stream to its first event, at the least. Tokens pile up meanwhile.
    @ivar poll: between two events, at the least.
    @ivar close: from the last event to the end of the connection; so long the slot stays taken.
    @ivar disconnect: until a stream whose caller has left stops.
    @ivar abort: until an abort is answered.
    """

    first_event: float = 0.35
    poll: float = 0.02
    close: float = 0.15
    disconnect: float = 0.4
    abort: float = 0.1


class Calls:
    """Calls to come, which can all be cancelled at once."""

    def __init__(self, clock: IReactorTime):
        self._clock = clock
        self._calls: set[IDelayedCall] = set()

    def later(self, seconds: float, function: Callable[..., None], *arguments: Any) -> IDelayedCall:
        """Call it then."""

        def called() -> None:
            self._calls.discard(call)
            function(*arguments)

        call = self._clock.callLater(seconds, called)
        self._calls = {waiting for waiting in self._calls if waiting.active()} | {call}
        return call

    def cancel(self) -> None:
        """Call none of them."""
        for call in self._calls:
            if call.active():
                call.cancel()
        self._calls = set()


class Job:
    """A generation with its answer.

    It ends once: `generated` is told when there will be no more tokens, and `ended` when the slot is free, which it is
    a moment later.
    """

    def __init__(
        self,
        clock: IReactorTime,
        connection: Connection,
        ask: Ask,
        *,
        plan: Plan,
        script: Script,
        pace: Pace,
        rate: float,
        prompt_tokens: int,
        number: int,
        model: str,
        generated: "Callable[[Job], None]",
        ended: "Callable[[Job, Outcome], None]",
    ):
        self.ask = ask
        self.plan = plan
        self.prompt_tokens = prompt_tokens
        self.started_at: float | None = None
        self._clock = clock
        self._calls = Calls(clock)
        self._pace = pace
        self._connection = connection
        self.rate = rate
        self.first_token = script.first_token
        self._script = script
        self._nothing_yet = wire.Made(number, model, "", "", prompt_tokens, 0)
        self._generated = generated
        self._ended = ended
        self._aborted_at: int | None = None
        self._done = False
        self._over = False

    def begin(self) -> None:
        """It has its slot."""
        self._connection.on_lost = self._caller_left
        self._calls.later(self._script.before_headers, self._start)
        if self._connection.lost:
            self._caller_left()

    def produced(self) -> int:
        """How many tokens there are by now."""
        if self._aborted_at is not None:
            return self._aborted_at
        if self.started_at is None:
            return 0
        since = self._clock.seconds() - self.started_at - self.first_token + _ROUNDING
        if since < 0:
            return 0
        return self.plan.tokens if self.rate == inf else min(self.plan.tokens, int(since * self.rate) + 1)

    def text(self) -> str:
        """What the model has said by now."""
        return "".join(self.plan.pieces[: self.produced()])

    def abort(self) -> None:
        """Generate no more."""
        if not self._over and self._aborted_at is None:
            self._aborted_at = self.produced()
            self._was_aborted()

    def kill(self) -> None:
        """Vanish, as with the process."""
        self._calls.cancel()
        self._connection.on_lost = None
        self._over = True

    def _start(self) -> None:
        self.started_at = self._clock.seconds()

    def _was_aborted(self) -> None:
        raise NotImplementedError

    def _caller_left(self) -> None:
        raise NotImplementedError

    @property
    def _target(self) -> int:
        """The token that it ends with, or breaks at."""
        if self._script.fault is None:
            return self.plan.tokens
        return min(self._script.after_tokens, self.plan.tokens)

    def _until(self, tokens: int) -> float:
        """Seconds until there are so many."""
        assert self.started_at is not None  # noqa: S101
        if tokens <= 0:
            return 0.0
        needed = self.first_token + ((tokens - 1) / self.rate if self.rate != inf else 0.0)
        return max(0.0, self.started_at + needed - self._clock.seconds())

    def _made(self) -> wire.Made:
        reason = self.plan.finish_reason if self._aborted_at is None else "length"
        reason = self._script.finish_reason or reason
        return replace(self._nothing_yet, text=self.text(), finish_reason=reason, completion_tokens=self.produced())

    def _break(self, fault: Fault) -> None:
        if fault is Fault.SILENCE:
            return
        if fault is Fault.EOF:
            self._connection.close()
        else:
            self._connection.reset()
        self._end(Outcome.BROKEN)

    def _end(self, outcome: Outcome) -> None:
        if not self._over:
            if not self._done:
                self._stopped()
            self.kill()
            self._ended(self, outcome)

    def _stopped(self) -> None:
        self._done = True
        self._generated(self)

    def _success(self) -> Outcome:
        return Outcome.FINISHED if self._aborted_at is None else Outcome.ABORTED


class Whole(Job):
    """A generation that is answered in one piece. It runs to its end also when its caller has left."""

    def _start(self) -> None:
        super()._start()
        if self._aborted_at is not None:
            self._answer()
        else:
            self._calls.later(self._until(self._target), self._reached)

    def _reached(self) -> None:
        if self._script.fault is None:
            self._answer()
        else:
            self._break(self._script.fault)

    def _was_aborted(self) -> None:
        if self.started_at is not None:
            self._answer()

    def _answer(self) -> None:
        self._stopped()
        body = self.ask.dialect.whole(self._made(), self._clock.seconds())
        length = len(body) + self._script.length_error
        self._connection.write(wire.head(200, "application/json", self._clock.seconds(), length=length) + body)
        self._connection.close()
        self._end(self._success())

    def _caller_left(self) -> None:
        if self._script.fault is Fault.SILENCE:  # it would never end
            self._end(Outcome.DISCONNECTED)


@implementer(IPushProducer)
class Stream(Job):
    """A generation that is streamed. It stops when its caller has left, which is noticed a little later."""

    _sent = 0
    _paused = False
    _polling: IDelayedCall | None = None

    def _start(self) -> None:
        super()._start()
        self._connection.write(wire.head(200, "text/event-stream", self._clock.seconds(), stream=True))
        self._poll_after(max(self._pace.first_event, self._until(min(1, self._target))))
        self._connection.produce(self)

    def pauseProducing(self) -> None:
        """The caller does not read as fast as this."""
        self._paused = True

    def resumeProducing(self) -> None:
        """The caller reads on."""
        self._paused = False
        if self._polling is None and not self._done and not self._over:
            self._poll_after(0.0)

    def stopProducing(self) -> None:
        """The connection is gone, of which we are told in another way as well."""

    def _poll_after(self, seconds: float) -> None:
        self._polling = self._calls.later(seconds, self._poll)

    def _poll(self) -> None:
        self._polling = None
        ready = min(self.produced(), self._target)
        while self._sent < ready:
            if self._paused:
                return
            self._send(min(ready - self._sent, self._script.tokens_per_event or ready))
        if self._aborted_at is None and ready < self._target:
            self._poll_after(max(self._pace.poll, self._until(ready + 1)))
        elif self._aborted_at is None and self._script.fault is not None:
            self._break(self._script.fault)
        else:
            self._finish()

    def _send(self, tokens: int) -> None:
        text = "".join(self.plan.pieces[self._sent : self._sent + tokens])
        self._sent += tokens
        if text:
            self._connection.write(self.ask.dialect.event(self._nothing_yet, text, None, self._clock.seconds()))

    def _finish(self) -> None:
        self._stopped()
        made, now, dialect = self._made(), self._clock.seconds(), self.ask.dialect
        self._connection.write(dialect.event(made, "", made.finish_reason, now))
        self._connection.write(dialect.trailer(made, now, usage=self.ask.usage))
        self._calls.later(self._pace.close, self._close)

    def _close(self) -> None:
        self._connection.close()
        self._end(self._success())

    def _was_aborted(self) -> None:
        if self.started_at is not None and self._polling is None and not self._done and not self._paused:
            self._poll_after(0.0)  # it was silent

    def _caller_left(self) -> None:
        if not self._done:
            self._calls.later(self._pace.disconnect, self._end, Outcome.DISCONNECTED)
