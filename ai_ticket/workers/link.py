"""The parent's end of a worker: what the worker asks is done here, by the quotas and the queue of the whole service."""

from collections.abc import Callable, Mapping
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from ai_ticket.errors import DomainError, InternalError
from ai_ticket.interfaces import Admission, Job, Limiter, Pipeline
from ai_ticket.workers.channel import Channel, Questions, from_worker
from ai_ticket.workers.generations import (
    GenerationsOfAll,
    LinkLost,
    RemoteGenerations,
    answering,
    taking_answers,
)
from ai_ticket.workers.message import Fault, Handlers, Message
from ai_ticket.workers.messages import (
    Admit,
    Admitted,
    AskMetrics,
    AskRoom,
    AskSamples,
    Attempt,
    Attempted,
    Cancel,
    Ended,
    Family,
    Metrics,
    Ping,
    Place,
    Pong,
    Ready,
    Room,
    Samples,
    Stopped,
    Stopping,
    Submit,
)
from ai_ticket.workers.relayed import event_elsewhere


class Service(Protocol):
    """What a worker's end needs of the service as a whole."""

    @property
    def clock(self) -> IReactorTime:
        """The time."""

    @property
    def limiters(self) -> Mapping[str, Limiter]:
        """By their names."""

    @property
    def pipeline(self) -> Pipeline:
        """The one of all workers."""

    @property
    def generations(self) -> GenerationsOfAll:
        """Those of all workers."""

    def look(self) -> None:
        """Something in the pipeline has changed."""

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """The metrics of the whole service, and their type, for an Accept header."""


class Link:
    """A worker, as far as messages go.

    `heard_at`: when it last answered a ping; `connections`, `memory`: what it then had. `in_flight`, `stopped`: what it
    has said of its end. `gone`: it is lost. `generations`: its own.
    """

    _log = Logger()

    def __init__(
        self,
        service: Service,
        *,
        ready: Callable[[], None],
        lost: Callable[[], None],
    ):
        """@param ready: the worker has said that it serves. @param lost: the channel is closed."""
        self._service = service
        self._ready = ready
        self._when_lost = lost
        self._jobs: dict[int, Job] = {}
        self._submitted: dict[int, Deferred[None]] = {}
        self._attempts: dict[int, Deferred[None]] = {}
        self._changed = False
        self.channel = Channel(from_worker, self.received, self._lost, self._read)
        self._questions = Questions(self.channel.send)
        self.heard_at = service.clock.seconds()
        self.in_flight: int | None = None
        self.stopped: Stopped | None = None
        self.generations = RemoteGenerations(self._questions)
        self.connections = 0
        self.memory = 0
        self.gone = False
        self._handlers: Handlers = {
            Ready: lambda _: self._ready(),
            Admit: self._admit,
            AskRoom: self._ask_room,
            Submit: self._submit,
            Cancel: self._cancel,
            Attempted: self._attempted,
            Samples: lambda message: self._questions.answered(message.number, message.families),
            AskMetrics: self._ask_metrics,
            Pong: self._pong,
            Stopping: self._take_stopping,
            Stopped: self._take_stopped,
            **answering(service.generations, self.send),
            **taking_answers(self._questions),
        }

    def send(self, message: Message) -> None:
        """Tell the worker."""
        self.channel.send(message)

    def ping(self, connections: float, memory: int, lagging: bool) -> None:
        """Have it show that its reactor turns. `memory`: of all processes; otherwise as `Ping` has it."""
        self.send(Ping(connections, memory - self.memory, lagging))

    def samples(self) -> Deferred[list[Family]]:
        """Its metrics."""
        return self._questions.ask(AskSamples)

    def tell_places(self) -> None:
        """Tell it the places of events whose callers are told."""
        for number, job in self._jobs.items():
            if job.event.stream:
                place = self._service.pipeline.position(job)
                if place is not None:
                    self.send(Place(number, place))

    def received(self, message: Message) -> None:
        """The worker tells or asks something."""
        self._handlers[type(message)](message)

    def _pong(self, message: Pong) -> None:
        self.connections = message.connections
        self.memory = message.memory
        self.heard_at = self._service.clock.seconds()

    def _take_stopping(self, message: Stopping) -> None:
        self.in_flight = message.in_flight

    def _take_stopped(self, message: Stopped) -> None:
        self.stopped = message

    def _lost(self) -> None:
        """The worker is gone: nobody waits any more for what it had begun."""
        self.gone = True
        for submitted in list(self._submitted.values()):
            submitted.cancel()
        self._questions.fail(LinkLost())
        self._when_lost()

    def _later(self, answering: "Deferred[None]") -> None:
        answering.addErrback(self._failed)

    def _failed(self, failure: Failure) -> None:
        self._log.failure("a worker gets no answer", failure)

    # Quotas.

    def _admit(self, message: Admit) -> None:
        def answer(admission: Admission) -> None:
            self.send(Admitted(message.number, admission))

        self._later(self._service.limiters[message.limiter].admit(message.client).addCallback(answer))

    # The pipeline.

    def _ask_room(self, message: AskRoom) -> None:
        self._later(Deferred.fromCoroutine(self._check_room(message)))

    async def _check_room(self, message: AskRoom) -> None:
        fault = None
        try:
            await self._service.pipeline.check_room(message.client, message.deadline)
        except DomainError as error:
            fault = Fault.of(error)
        self.send(Room(message.number, fault))

    def _submit(self, message: Submit) -> None:
        number = message.number
        job = Job(
            event=event_elsewhere(self, number, stream=message.stream, key=message.key),
            client=message.client,
            timeout=message.timeout,
            deadline=message.deadline,
            batch=message.batch,
        )
        self._jobs[number] = job
        submitted = Deferred.fromCoroutine(self._run(number, job))
        if number in self._jobs:
            self._submitted[number] = submitted
        self._later(submitted)
        self._look()

    async def _run(self, number: int, job: Job) -> None:
        try:
            with self._service.generations.under_way(job.client.key, job.event.key, self.generations):
                await self._service.pipeline.submit(job)
        except DomainError as error:
            self.send(Ended(number, Fault.of(error)))
        except CancelledError:
            pass  # by the worker, which knows, or because it is gone
        except Exception:
            self._log.failure("an event failed")
            self.send(Ended(number, Fault.of(InternalError())))
        finally:
            del self._jobs[number]
            self._submitted.pop(number, None)
            self._look()

    def _look(self) -> None:
        """Something in the pipeline has changed: of all that messages change that came together, once."""
        if self.channel.reading:
            self._changed = True
        else:
            self._service.look()

    def _read(self) -> None:
        if self._changed:
            self._changed = False
            self._service.look()

    def _cancel(self, message: Cancel) -> None:
        submitted = self._submitted.get(message.number)
        if submitted is not None:
            submitted.cancel()

    async def attempt(self, number: int, backend: int, deadline: float) -> None:
        """Have the worker make an attempt at an event. Who cancels this ends the event, and the worker is told that.

        @raise DomainError: how it failed.
        """
        outcome: Deferred[None] = Deferred()
        self._attempts[number] = outcome
        began_at = self._jobs[number].began_at
        self.send(Attempt(number, backend, deadline, self._service.clock.seconds() if began_at is None else began_at))
        try:
            await outcome
        finally:
            del self._attempts[number]

    def _attempted(self, message: Attempted) -> None:
        outcome = self._attempts.get(message.number)
        if outcome is not None and not outcome.called:
            if message.fault is None:
                outcome.callback(None)
            else:
                outcome.errback(message.fault.error())

    # Metrics.

    def _ask_metrics(self, message: AskMetrics) -> None:
        self._later(Deferred.fromCoroutine(self._render(message)))

    async def _render(self, message: AskMetrics) -> None:
        text, content_type = await self._service.metrics(message.accept)
        self.send(Metrics(message.number, text, content_type))
