"""A parent and its workers in one process: what one end of a channel sends the other has at once."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from harness import MemoryBackend
from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from ai_ticket.interfaces import Backend, BackendState, Limiter
from ai_ticket.pipeline.fair import FairPipeline
from ai_ticket.pipeline.generations import Generations
from ai_ticket.telemetry.pipeline_metrics import PipelineMetrics
from ai_ticket.workers.generations import RemoteGenerations, answering
from ai_ticket.workers.link import Link
from ai_ticket.workers.messages import Attempt, Ended, Learnt, Outlook, Place
from ai_ticket.workers.parent import Office
from ai_ticket.workers.relayed import RelayedBackend
from ai_ticket.workers.remote import RemotePipeline
from ai_ticket.workers.worker import ParentEnd


class Wire:
    """A channel's transport that is connected with another's protocol. `held`: it keeps what is sent for later."""

    def __init__(self) -> None:
        self.other: Wire
        self.protocol: Any = None
        self.held = False
        self._sent: deque[bytes] = deque()
        self._delivering = False
        self.closed = False
        self.producer: Any = None

    def write(self, data: bytes) -> None:
        self._sent.append(data)
        if not self.held:
            self.release()

    def release(self) -> None:
        """Deliver what was sent, one after the other."""
        self.held = False
        if self._delivering:
            return
        self._delivering = True
        while self._sent and not self.closed:
            self.other.protocol.dataReceived(self._sent.popleft())
        self._delivering = False

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def loseConnection(self) -> None:
        for wire in (self, self.other):
            if not wire.closed:
                wire.closed = True
                wire.protocol.connectionLost(Failure(Exception()))

    abortConnection = loseConnection


def connect(one: Any, other: Any) -> tuple[Wire, Wire]:
    """Connect two protocols."""
    wires = Wire(), Wire()
    for wire, its, opposite in zip(wires, (one, other), reversed(wires), strict=True):
        wire.protocol, wire.other = its, opposite
    for wire in wires:
        wire.protocol.makeConnection(wire)
    return wires


class Probed:
    """A backend of the parent's, as far as it goes there: it has a state."""

    def __init__(self, state: BackendState) -> None:
        self.state = state

    def adopt(self, state: BackendState) -> None:
        self.state = state

    async def probe(self) -> BackendState:
        return self.state


class Follower(Probed):
    """The parent's view of a backend in memory that a test changes."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    @property
    def state(self) -> BackendState:  # type: ignore[override]
        found: BackendState = self._backend.state
        return found

    def adopt(self, state: BackendState) -> None:
        self._backend.state = state


class Told:
    """A crew, as far as it is told something."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.links: list[Link] = []

    @property
    def generations(self) -> list[RemoteGenerations]:
        return [link.generations for link in self.links if not link.gone]

    def tell(self, message: Any) -> None:
        self.messages.append(message)
        for link in self.links:
            link.send(message)


class Worker:
    """A worker's end, whose pipeline uses these backends."""

    def __init__(self, office: Office, crew: Told, clock: Clock, backends: Sequence[Backend]) -> None:
        self.parent = ParentEnd()
        self.lost: list[None] = []
        self.link = Link(office, ready=lambda: None, lost=lambda: self.lost.append(None))
        crew.links.append(self.link)
        self.wire, self.parent_wire = connect(self.parent.channel, self.link.channel)
        self.pipeline = RemotePipeline(
            self.parent.questions,
            self.parent.channel.send,
            clock=clock,
            backends=backends,
            outlook=office.outlook,
            timeout=120,
        )
        self.parent.handlers |= {
            Attempt: self.pipeline.attempt,
            Ended: self.pipeline.ended,
            Place: self.pipeline.place,
            Outlook: self._see,
            Learnt: lambda _: None,
        }
        self.own_generations = Generations(self.pipeline, clock, lambda: (0, 0))
        self.generations = RemoteGenerations(self.parent.questions)
        self.parent.handlers |= answering(self.own_generations, self.parent.channel.send)

    def _see(self, outlook: Outlook) -> None:
        self.pipeline.outlook = outlook

    def die(self) -> None:
        """As a process that is killed: its end of the channel is closed, and it does nothing more."""
        self.parent.handlers.clear()
        self.parent_wire.loseConnection()


def make_pipeline(clock: Clock, backend: Any = None, recorder: Any = None) -> FairPipeline:
    """The parent's, before a backend in memory."""
    return FairPipeline(
        MemoryBackend() if backend is None else backend,
        clock=clock,
        recorder=PipelineMetrics("ns", CollectorRegistry()) if recorder is None else recorder,
        max_concurrency=None,
        queue_limit=10,
        batch_size=16,
        batch_linger=0.0,
        check_backend=getattr(backend, "check", lambda: None),
    )


def make_office(clock: Clock, pipeline: FairPipeline, crew: Told, **limiters: Limiter) -> Office:
    office = Office(clock, limiters=limiters, pipeline=pipeline, registry=CollectorRegistry(), timeout=120)
    office.crew = crew  # type: ignore[assignment]
    return office


def relayed(backend: Any, crew: Told, number: int = 0) -> RelayedBackend:
    """The parent's view of a backend in memory."""
    return RelayedBackend(number, Follower(backend), lambda: None, crew.tell)  # type: ignore[arg-type]


def result_of(deferred: Deferred[Any]) -> Any:
    """What has become of it: it must be known."""
    found: list[Any] = []
    deferred.addBoth(found.append)
    assert found, "nothing yet"
    return found[0].value if isinstance(found[0], Failure) else found[0]
