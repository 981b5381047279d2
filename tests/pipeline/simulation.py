"""A pipeline on a clock, before backends in memory."""

from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from harness import COMPLETION, MemoryBackend
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.python.failure import Failure

from ai_ticket.errors import DomainError
from ai_ticket.event import Completion, Event, Message, Parameters
from ai_ticket.interfaces import BackendState, Client, Job, Sink
from ai_ticket.pipeline.fair import FairPipeline
from ai_ticket.spans import NO_SPAN, Span


@dataclass
class RecordedEvents:
    """A `PipelineRecorder` that remembers."""

    began: list[float] = field(default_factory=list)
    ended: list[tuple[str, float | None]] = field(default_factory=list)
    batches: list[tuple[int, float]] = field(default_factory=list)

    def event_began(self, waited: float) -> None:
        self.began.append(waited)

    def event_ended(self, outcome: str, handled: float | None) -> None:
        self.ended.append((outcome, handled))

    def batch_ended(self, size: int, seconds: float) -> None:
        self.batches.append((size, seconds))

    @property
    def outcomes(self) -> list[str]:
        return [outcome for outcome, _ in self.ended]


class TimedBackend:
    """A `Backend` that takes as long for each event as the test says; `taken` has their prompts."""

    def __init__(self, clock: Clock, slots: int, seconds: float) -> None:
        self.state = BackendState(name="timed:1", up=True, slots=slots)
        self.seconds = seconds
        self.taken: list[str] = []
        self._clock = clock

    async def complete(
        self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
    ) -> Completion:
        self.taken.append(event.prompt)
        await deferLater(self._clock, self.seconds)
        return COMPLETION

    async def probe(self) -> BackendState:
        return self.state


def at_once(checking: Coroutine[Any, Any, None]) -> None:
    """What becomes of something that waits for nothing."""
    found: list[Any] = []
    Deferred.fromCoroutine(checking).addBoth(found.append)
    [result] = found
    if isinstance(result, Failure):
        result.raiseException()


def make_job(
    name: str, client: str = "a", *, weight: int = 1, batch: bool = False, timeout: float = 100, deadline: float | None
) -> Job:
    return Job(
        event=Event([Message("user", name)], Parameters(max_tokens=5)),
        client=Client(client, None, "192.0.2.1", weight=weight),
        timeout=timeout,
        deadline=deadline,
        batch=batch,
    )


class World:
    """A pipeline; `outcomes` has what became of each job, by the event's prompt."""

    def __init__(
        self,
        slots: int = 1,
        *,
        queue_limit: int = 10,
        max_concurrency: int | None = None,
        batch_size: int = 16,
        batch_linger: float = 0.0,
        service_seconds: float | None = None,
    ) -> None:
        self.clock = Clock()
        self.memory = MemoryBackend(slots)
        timed = None if service_seconds is None else TimedBackend(self.clock, slots, service_seconds)
        self.backend: Any = timed or self.memory
        self.recorder = RecordedEvents()
        self.pipeline = FairPipeline(
            self.backend,
            clock=self.clock,
            recorder=self.recorder,
            max_concurrency=max_concurrency,
            queue_limit=queue_limit,
            batch_size=batch_size,
            batch_linger=batch_linger,
        )
        self.jobs: dict[str, Job] = {}
        self.submitted: dict[str, Deferred[Any]] = {}
        self.outcomes: dict[str, Any] = {}
        self.refused = 0

    def check_room(self, client: Client, deadline: float) -> None:
        """As the pipeline's, which knows it at once; what is refused is an event that has ended."""
        try:
            at_once(self.pipeline.check_room(client, deadline))
        except DomainError:
            self.refused += 1
            raise

    def submit(
        self,
        name: object,
        client: str = "a",
        *,
        weight: int = 1,
        batch: bool = False,
        seconds: float = 100,
        settle: bool = True,
    ) -> Job:
        """Submit a job that has so many seconds, and see whether it begins."""
        deadline = None if batch else self.clock.seconds() + seconds
        job = make_job(str(name), client, weight=weight, batch=batch, timeout=seconds, deadline=deadline)
        self.jobs[str(name)] = job

        def ended(result: Any) -> None:
            assert str(name) not in self.outcomes, "an event ends once"
            self.outcomes[str(name)] = result if isinstance(result, Completion) else result.value

        self.submitted[str(name)] = Deferred.fromCoroutine(self.pipeline.submit(job)).addBoth(ended)
        if settle:
            self.clock.advance(0)
        return job

    def cancel(self, name: object) -> None:
        self.submitted[str(name)].cancel()
        self.clock.advance(0)

    @property
    def running(self) -> list[str]:
        return [event.prompt for event, answer in self.memory.calls if not answer.called]

    def finish(self, name: object, result: Any = COMPLETION) -> None:
        """End the generation of a job."""
        [answer] = [answer for event, answer in self.memory.calls if event.prompt == str(name) and not answer.called]
        answer.callback(result) if isinstance(result, Completion) else answer.errback(result)
        self.clock.advance(0)

    def run(self, seconds: float, step: float = 0.25) -> None:
        """Let time pass."""
        self.clock.pump([step] * round(seconds / step))

    def settle(self) -> None:
        """Answer all there is; then nothing may be left of it."""
        while self.running:
            self.finish(self.running[0])
        assert set(self.outcomes) == set(self.jobs)
        assert (self.pipeline.depth, self.pipeline.in_flight) == (0, 0)
        assert len(self.recorder.ended) == len(self.jobs) + self.refused
        assert len(self.recorder.began) == sum(size for size, _ in self.recorder.batches)
        assert not self.clock.getDelayedCalls()

    def kind(self, name: object) -> type:
        return type(self.outcomes[str(name)])

    def error(self, name: object) -> DomainError:
        found = self.outcomes[str(name)]
        assert isinstance(found, DomainError)
        return found
