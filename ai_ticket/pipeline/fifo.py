"""A bounded queue, first in first out, in front of one backend's slots."""

from collections import deque

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from ai_ticket.errors import DeadlineExceeded, Overloaded
from ai_ticket.event import Completion
from ai_ticket.interfaces import Backend, Client, Job

PATIENCE_SECONDS = 0.5
"""How long after an event's deadline the backend may take to say so."""

_SMOOTHING = 0.2
_FIRST_GUESS_SECONDS = 2.0


class FifoPipeline:
    """Gives the backend no more events at a time than it has slots; the others wait, up to a limit.

    The number of slots is read anew whenever it matters: a probe may have learnt it meanwhile.
    """

    def __init__(self, backend: Backend, clock: IReactorTime, queue_limit: int):
        self._backend = backend
        self._clock = clock
        self._queue_limit = queue_limit
        self._waiting: deque[Deferred[None]] = deque()
        self._running = 0
        self._passing_on = False
        self._service_seconds = _FIRST_GUESS_SECONDS

    @property
    def depth(self) -> int:
        """Events that wait."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Events at the model server."""
        return self._running

    @property
    def max_concurrency(self) -> int:
        """Events at the model server, at the most."""
        return self._slots()

    def check_room(self, client: Client, deadline: float) -> None:
        """Whether an event would be taken in."""

    def position(self, job: Job) -> int | None:
        """Its place in the queue."""
        return None

    async def submit(self, job: Job) -> Completion:
        """Wait for a slot and generate; cancelling leaves the queue, or stops the generation."""
        event, deadline, sink = job.event, job.deadline or self._clock.seconds() + job.timeout, job.sink
        await self._take_slot(deadline)
        begun = self._clock.seconds()
        generating = Deferred.fromCoroutine(self._backend.complete(event, deadline, sink))
        # The backend keeps the deadline itself, and knows best what to say of it. This is for one that does not.
        generating.addTimeout(deadline - begun + PATIENCE_SECONDS, self._clock, onTimeoutCancel=_too_late)
        try:
            completion = await generating
        finally:
            self._release_slot()
        seconds = self._clock.seconds() - begun
        self._service_seconds += _SMOOTHING * (seconds - self._service_seconds)
        return completion

    async def _take_slot(self, deadline: float) -> None:
        left = deadline - self._clock.seconds()
        if left <= 0:
            raise DeadlineExceeded
        self._pass_on()  # a probe may have learnt of more slots
        if self._running < self._slots():
            self._running += 1
            return
        if len(self._waiting) >= self._queue_limit:
            turns = (len(self._waiting) + 1) / self._slots()
            raise Overloaded(f"{len(self._waiting)} events are waiting", retry_after=turns * self._service_seconds)
        turn: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(turn)
        turn.addTimeout(left, self._clock, onTimeoutCancel=_too_late)
        await turn

    def _release_slot(self) -> None:
        """Pass the slot on, or those that have come free.

        Events that fail at once release theirs within the turn that they are given, so that is not done in there:
        a long queue would overflow the stack.
        """
        self._running -= 1
        self._pass_on()

    def _pass_on(self) -> None:
        if self._passing_on:
            return
        self._passing_on = True
        try:
            while self._waiting and self._running < self._slots():
                self._running += 1
                self._waiting.popleft().callback(None)
        finally:
            self._passing_on = False

    def _slots(self) -> int:
        return max(1, self._backend.state.slots)


def _too_late(_: object, seconds: float) -> None:
    raise DeadlineExceeded
