"""A worker's limiters and pipeline: the parent's, over the channel. Only the exchange with a backend is done here."""

from collections.abc import Callable, Sequence
from itertools import count

from msgspec import Struct
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ai_ticket.errors import DomainError, InternalError
from ai_ticket.event import Completion
from ai_ticket.interfaces import Admission, Backend, Client, Job
from ai_ticket.spans import NO_SPAN, Span
from ai_ticket.workers.channel import Questions
from ai_ticket.workers.message import Fault, Message
from ai_ticket.workers.messages import Admit, AskRoom, Attempt, Attempted, Cancel, Ended, Outlook, Place, Submit


class RemoteLimiter:
    """A `Limiter` in the parent, by its name there."""

    def __init__(self, questions: Questions, name: str, limit: int, window: float):
        self.limit = limit
        self.window = window
        self._questions = questions
        self._name = name

    def admit(self, client: str) -> Deferred[Admission]:
        """Whether a call may go on. Who cancels has counted all the same."""
        return self._questions.ask(lambda number: Admit(number, self._name, client))


class _Passage(Struct, eq=False):
    """A job's way. `ended` fires with the answer; `attempt` is the one under way."""

    job: Job
    ended: Deferred[Completion]
    span: Span = NO_SPAN
    attempt: Deferred[None] | None = None
    place: int | None = None


class RemotePipeline:
    """The `Pipeline` in the parent. It says when and where to make an attempt at a job; here it is made."""

    _log = Logger()

    def __init__(
        self,
        questions: Questions,
        send: Callable[[Message], None],
        *,
        clock: IReactorTime,
        backends: Sequence[Backend],
        outlook: Outlook,
        timeout: float,
    ):
        """@param backends: in order of rank. @param timeout: of an event, in seconds."""
        self._questions = questions
        self._send = send
        self._clock = clock
        self._backends = backends
        self._numbers = count()
        self._passages: dict[int, _Passage] = {}
        self._by_job: dict[Job, _Passage] = {}
        self._timeout = timeout
        self.outlook = outlook

    @property
    def batch_window(self) -> int:
        """How many events a batch is to offer at a time."""
        return self.outlook.batch_window

    async def check_room(self, client: Client, deadline: float) -> None:
        """Whether an event of this client, submitted now, would be taken in.

        While there is plenty of room for all, that is known here. What would be refused in the moment until this shows
        is refused when it is submitted.

        @raise DomainError: what `submit` would raise, or `NoBackendAvailable`.
        """
        if self.outlook.roomy and 2 * (deadline - self._clock.seconds()) > self._timeout:
            return
        fault = await self._questions.ask(lambda number: AskRoom(number, client, deadline))
        if fault is not None:
            raise fault.error()

    def position(self, job: Job) -> int | None:
        """Which place in the queue it had a moment ago, 1 being the next; None once it has begun."""
        passage = self._by_job.get(job)
        return None if passage is None else passage.place

    async def submit(self, job: Job) -> Completion:
        """Wait for a slot and generate; cancelling leaves the queue, or stops the generation.

        @raise DomainError: what the parent's pipeline raises.
        """
        number = next(self._numbers)
        now = job.queued_at = self._clock.seconds()
        if job.deadline is None and not job.batch:
            job.deadline = now + job.timeout
        passage = _Passage(job, Deferred())
        self._passages[number] = self._by_job[job] = passage
        streams, key = job.sink is not None, job.event.key
        self._send(Submit(number, job.client, job.timeout, job.deadline, job.batch, streams, key))
        try:
            return await passage.ended
        except DomainError as error:
            passage.span.fail(error.code)
            raise
        except CancelledError:
            passage.span.fail("cancelled")
            self._stop(passage)  # first, so that the parent gives the slot to others when it is free
            self._send(Cancel(number))
            raise
        finally:
            del self._passages[number], self._by_job[job]
            if job.began_at is not None:
                job.ended_at = self._clock.seconds()
            passage.span.end()

    def drain(self, deadline: float) -> None:
        """The parent has its pipeline do that."""

    # What the parent says.

    def place(self, message: Place) -> None:
        """A job still waits."""
        passage = self._passages.get(message.number)
        if passage is not None and passage.job.began_at is None:
            passage.place = message.place

    def attempt(self, message: Attempt) -> None:
        """A job's turn has come, for the first time or again."""
        passage = self._passages.get(message.number)
        if passage is None:
            return  # it was cancelled, and the parent is about to hear of that
        if passage.job.began_at is None:
            self._begin(passage, message)
        passage.attempt = Deferred.fromCoroutine(self._attempt(passage, message))
        passage.attempt.addErrback(lambda failure: self._log.failure("an attempt failed", failure))

    def ended(self, message: Ended) -> None:
        """A job has failed for good."""
        passage = self._passages.get(message.number)
        if passage is not None and not passage.ended.called:
            self._stop(passage)
            passage.ended.errback(message.fault.error())

    def _begin(self, passage: _Passage, message: Attempt) -> None:
        job = passage.job
        job.began_at = message.began_at
        job.deadline = message.deadline
        passage.place = None
        passage.span = job.span.child("pipeline.handle", at=job.began_at)
        if passage.span.recording:
            waited = job.queue_seconds(job.began_at)
            passage.span.set({"ai_ticket.queue.seconds": waited, "ai_ticket.batch": job.batch})

    async def _attempt(self, passage: _Passage, message: Attempt) -> None:
        backend = self._backends[message.backend]
        job = passage.job
        try:
            completion = await backend.complete(job.event, message.deadline, job.sink, passage.span)
        except DomainError as error:
            self._send(Attempted(message.number, Fault.of(error)))
        except CancelledError:
            pass  # by `_stop`: the parent knows, or is told
        except Exception:
            if not passage.ended.called:
                passage.ended.errback()
            self._send(Attempted(message.number, Fault.of(InternalError())))
        else:
            self._send(Attempted(message.number))
            if not passage.ended.called:
                passage.ended.callback(completion)

    def _stop(self, passage: _Passage) -> None:
        if passage.attempt is not None:
            passage.attempt.cancel()
