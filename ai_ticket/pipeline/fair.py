"""Events between callers and slots: let in, queued fairly, and taken from there by cooperative workers."""

from collections.abc import Callable

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime

from ai_ticket.errors import DeadlineExceeded, DomainError, InternalError, ShuttingDown
from ai_ticket.event import Completion
from ai_ticket.interfaces import Backend, Client, Job, PipelineRecorder
from ai_ticket.pipeline.admission import AdmissionControl
from ai_ticket.pipeline.batches import Batches
from ai_ticket.pipeline.forecast import Forecast
from ai_ticket.pipeline.passage import Passage
from ai_ticket.pipeline.queue import FairQueue
from ai_ticket.pipeline.workers import Workers

LEAST_CONCURRENCY = 8
"""Of a pipeline that is told nothing else."""
PATIENCE_SECONDS = 0.5
"""How long after an event's deadline the backend may take to say so."""


class FairPipeline(Service):
    """Gives the backend no more events at a time than it has slots; the others wait for their fair turn.

    The number of slots is read anew whenever an event comes or begins; `look_again` is for when none does.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        clock: IReactorTime,
        recorder: PipelineRecorder,
        max_concurrency: int | None,
        queue_limit: int,
        batch_size: int,
        batch_linger: float,
        check_backend: Callable[[], None] = lambda: None,
    ):
        """@param max_concurrency: as for `set_max_concurrency`.

        @param queue_limit: events that may wait, those of batches not counted.
        @param batch_size: events that are taken from the queue together, at the most.
        @param batch_linger: how many seconds to wait for so many; 0: take what there is.
        @param check_backend: raises `NoBackendAvailable` while no event has a chance.
        """
        self._check_backend = check_backend
        self._backend = backend
        self._clock = clock
        self._recorder = recorder
        self._max_concurrency = max_concurrency
        self._queue = FairQueue()
        self._forecast = Forecast()
        self._waiting: dict[Job, Passage] = {}
        self._running: dict[Job, Passage] = {}  # in the order in which they began
        self._admission = AdmissionControl(clock.seconds, self._queue, self._forecast, self._running, queue_limit)
        self._workers = Workers(clock, self._begin)
        self._batches = Batches(clock, batch_size, batch_linger, self._call_worker)
        self._slots = 1  # that may be used, as it was last read
        self._stopped = False
        self._drained_by: float | None = None

    @property
    def depth(self) -> int:
        """Events that wait, those of batches included."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Events at the model server."""
        return len(self._running)

    @property
    def max_concurrency(self) -> int:
        """Events under way at a time, at the most."""
        return self._max_concurrency or max(LEAST_CONCURRENCY, self._backend.state.slots)

    @property
    def batch_window(self) -> int:
        """How many events a batch is to offer at a time: what can be under way, and another time taken together."""
        return self._slots + self._batches.size

    def set_max_concurrency(self, count: int | None) -> None:
        """Have so many events under way at a time, at the most; None: the larger of 8 and the backend's slots.

        More begin at once; where there are too many, what is under way ends first.
        """
        self._max_concurrency = count
        self.look_again()

    def look_again(self) -> None:
        """The backend may have more slots than it had."""
        self._read_slots()
        self._call_worker()

    def position(self, job: Job) -> int | None:
        """Which place in the queue it has, 1 being the next; None once it has begun."""
        return self._queue.position(job) if job in self._waiting else None

    def is_roomy(self, seconds: float) -> bool:
        """Whether there is plenty of room, for events of anybody with half of so many seconds left or more."""
        try:
            self._check_backend()
        except DomainError:
            return False
        return not self._stopped and self._admission.is_roomy(seconds, self._slots)

    async def check_room(self, client: Client, deadline: float) -> None:
        """Whether an event of this client, submitted now, would be taken in. One that would not has ended thereby.

        @raise DomainError: what `submit` would raise, or `NoBackendAvailable`.
        """
        try:
            self._check_backend()
            if self._stopped:
                raise ShuttingDown
            self._read_slots()
            self._admission.check(client, deadline, self._slots)
        except DomainError as error:
            self._recorder.event_ended(error.code, None)
            raise

    async def submit(self, job: Job) -> Completion:
        """Wait for a slot and generate; cancelling leaves the queue, or stops the generation.

        @raise DomainError: `Overloaded`, `DeadlineExceeded`, `ShuttingDown`, or what the backend raises.
        """
        outcome = "cancelled"
        try:
            passage = self._enter(job)
            deadline = await passage.turn
            waited = job.queue_seconds(self._clock.seconds())
            self._recorder.event_began(waited)
            completion = await passage.generate(self._backend, deadline, waited)
            outcome = "ok"
            return completion
        except DomainError as error:
            outcome = error.code
            raise
        except CancelledError:
            raise
        except Exception:
            outcome = InternalError.code
            raise
        finally:
            self._recorder.event_ended(outcome, self._end(job, outcome))

    def drain(self, deadline: float) -> None:
        """The service shuts down: what can't be answered by then, as things go, is refused now or when that shows.

        So are the events of batches that have not begun; their callers are told where the batch has stopped.
        """
        self._drained_by = deadline
        self._read_slots()
        for job in [job for job in self._waiting if job.batch]:
            self._refuse(job)
        self._refuse_late()

    def stop(self) -> None:
        """Cancel what waits and what is under way, and take in nothing more."""
        self._stopped = True
        while self._waiting:
            self._refuse(next(iter(self._waiting)))
        for passage in list(self._running.values()):
            self._fail(passage, ShuttingDown())
        self._workers.stop()

    def stopService(self) -> None:
        """Stop."""
        super().stopService()  # type: ignore[no-untyped-call]
        self.stop()

    def _enter(self, job: Job) -> Passage:
        """Let a job into the queue, or refuse it."""
        now = job.queued_at = self._clock.seconds()
        if self._stopped or (job.batch and self._drained_by is not None):
            raise ShuttingDown
        passage = Passage(job, Deferred(lambda _: self._leave(job)), Deferred())
        displaced = None
        self._read_slots()
        if not job.batch:
            if job.deadline is None:
                job.deadline = now + job.timeout
            displaced = self._admission.check(job.client, job.deadline, self._slots)
            passage.timer = self._clock.callLater(job.deadline - now, self._deadline_reached, passage)
        self._waiting[job] = passage
        self._queue.push(job)
        if displaced is not None:
            self._fail(self._waiting[displaced], self._admission.displaced(displaced, self._slots))
        self._refuse_late()
        self._call_worker()
        return passage

    def _refuse_late(self) -> None:
        """Refuse those that can't be answered before the service has to end, where it is known how long events take."""
        if self._drained_by is not None:
            for job in self._admission.late(self._drained_by, self._slots):
                self._refuse(job)

    def _refuse(self, job: Job) -> None:
        # Those refused before may have taken others with them.
        if job in self._waiting:
            self._fail(self._waiting[job], ShuttingDown())

    # The workers: one for each event under way.

    def _read_slots(self) -> None:
        slots = self._backend.state.slots
        self._slots = max(1, slots if self._max_concurrency is None else min(slots, self._max_concurrency))

    def _free(self) -> int:
        """How many more events may begin; none, or less, where slots were lost."""
        return self._slots - len(self._running)

    def _call_worker(self) -> None:
        """See to it that a worker comes for what waits, if there may be one more and none is coming already.

        One is enough: whoever takes something calls the next.
        """
        if (
            self._queue
            and len(self._workers) <= len(self._running) < self._slots
            and self._batches.ripe(len(self._queue), self._free())
        ):
            self._workers.call()

    def _begin(self) -> Deferred[None] | None:
        """Begin the next event, for a worker, who may be one too many.

        @return: fires when the event has ended.
        """
        waiting = len(self._queue)
        if not waiting:
            return None
        self._read_slots()
        free = self._free()
        if len(self._workers) > self._slots or not self._batches.ripe(waiting, free):
            return None
        batch = self._batches.take(waiting, free)
        job = self._queue.pop()
        passage = self._running[job] = self._waiting.pop(job)
        passage.batch = batch
        if not self._queue:
            self._batches.close()
        now = job.began_at = self._clock.seconds()
        if job.batch or job.deadline is None:
            job.deadline = now + job.timeout
            passage.timer = self._clock.callLater(job.timeout, self._deadline_reached, passage)
        self._call_worker()
        passage.turn.callback(job.deadline)
        return passage.ended

    # How an event ends.

    def _deadline_reached(self, passage: Passage) -> None:
        """The backend keeps the deadline itself, and knows best what to say of it; but it may take too long."""
        if passage.batch is None:
            self._fail(passage, DeadlineExceeded("its turn did not come in time"))
        else:
            passage.timer = self._clock.callLater(PATIENCE_SECONDS, self._fail, passage, DeadlineExceeded())

    def _fail(self, passage: Passage, error: DomainError) -> None:
        """End a job, whether it waits or is under way."""
        if passage.batch is None:
            self._leave(passage.job)
            passage.turn.errback(error)
        else:
            passage.cut(error)

    def _leave(self, job: Job) -> None:
        """A job leaves the queue before its turn."""
        self._queue.remove(job)
        self._waiting.pop(job).stop_timer()
        if not self._queue:
            self._batches.close()

    def _end(self, job: Job, outcome: str) -> float | None:
        """A job has ended. Its worker goes on, at the reactor's next turn.

        @return: how many seconds it was under way, if it was.
        """
        passage = self._running.pop(job, None)
        if passage is None:
            return None
        passage.ended.callback(None)
        passage.stop_timer()
        now = job.ended_at = self._clock.seconds()
        seconds = job.backend_seconds(now)
        if outcome == "ok":
            self._forecast.succeeded(seconds)
        elif outcome == DeadlineExceeded.code:
            self._forecast.cut(seconds)
        batch = passage.batch
        if batch is not None:
            batch.under_way -= 1
            if not batch.under_way:
                batch.room = 0
                self._recorder.batch_ended(batch.size, now - batch.began_at)
                batch.trace(now)
        self._refuse_late()
        return seconds
