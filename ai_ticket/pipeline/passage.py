"""One event's way through the pipeline."""

from msgspec import Struct
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall

from ai_ticket.errors import DomainError
from ai_ticket.event import Completion
from ai_ticket.interfaces import Backend, Job
from ai_ticket.pipeline.batches import Batch


class Passage(Struct, eq=False):
    """A job's way through the pipeline. It waits for its turn; then it belongs to a batch, and generates.

    `turn` fires with the deadline, `ended` for its worker. `timer` runs until the deadline. `error` is what it is to
    fail with, where we have cancelled it ourselves.
    """

    job: Job
    turn: Deferred[float]
    ended: Deferred[None]
    timer: IDelayedCall | None = None
    batch: Batch | None = None
    generating: Deferred[Completion] | None = None
    error: DomainError | None = None

    async def generate(self, backend: Backend, deadline: float, waited: float) -> Completion:
        """Have the backend answer, by that time of the clock, after a wait of so many seconds.

        @raise DomainError: what the backend raises, or what it was cut with.
        """
        job = self.job
        span = job.span.child("pipeline.handle", at=job.began_at)
        if span.recording:
            span.set({"ai_ticket.queue.seconds": waited, "ai_ticket.batch": job.batch})
            if self.batch is not None:
                self.batch.spans.append(span)
        self.generating = Deferred.fromCoroutine(backend.complete(job.event, deadline, job.sink, span))
        try:
            return await self.generating
        except DomainError as error:
            span.fail(error.code)
            raise
        except CancelledError:
            span.fail("cancelled" if self.error is None else self.error.code)
            if self.error is not None:
                raise self.error
            raise
        finally:
            span.end()

    def cut(self, error: DomainError) -> None:
        """Stop the generation under way, which fails with this."""
        if self.generating is not None:
            self.error = error
            self.generating.cancel()

    def stop_timer(self) -> None:
        """It has ended: its deadline no longer matters."""
        if self.timer is not None and self.timer.active():
            self.timer.cancel()
