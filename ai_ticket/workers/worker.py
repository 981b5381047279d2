"""A worker process: callers on this side, the parent on the other."""

import signal
import socket
from collections.abc import Callable, Sequence
from random import Random
from typing import Any
from uuid import uuid4

from prometheus_client import CollectorRegistry
from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from ai_ticket import twistd
from ai_ticket.assembly import make_authenticator, make_backends
from ai_ticket.backend.address import Location
from ai_ticket.backend.counting import Counting
from ai_ticket.backend.kobold import KoboldBackend
from ai_ticket.memory import settle_memory, used_memory
from ai_ticket.pipeline.generations import Generations
from ai_ticket.service import ended, raise_file_limit
from ai_ticket.settings import Settings
from ai_ticket.surface import Surface, make_surface
from ai_ticket.systemd import Systemd
from ai_ticket.telemetry.logs import Logs
from ai_ticket.telemetry.metrics import Metrics
from ai_ticket.telemetry.tracing_setup import make_tracing
from ai_ticket.web.auth import INVALID_TOKENS, INVALID_TOKENS_SECONDS
from ai_ticket.web.tls import TlsConnections
from ai_ticket.workers import messages
from ai_ticket.workers.certificate import context_of
from ai_ticket.workers.channel import Channel, Questions, from_parent
from ai_ticket.workers.families import collected
from ai_ticket.workers.generations import RemoteGenerations, answering, taking_answers
from ai_ticket.workers.message import Handlers
from ai_ticket.workers.messages import (
    Admitted,
    AskMetrics,
    AskSamples,
    Attempt,
    Ended,
    Hurry,
    InForce,
    Learnt,
    Outlook,
    Ping,
    Place,
    Pong,
    Ready,
    Room,
    Samples,
    Start,
    Stop,
    Stopped,
    Stopping,
)
from ai_ticket.workers.ports import InheritedPorts
from ai_ticket.workers.remote import RemoteLimiter, RemotePipeline

END_SECONDS = 3.0
"""How long a part of the background may take to end."""

LEAVE_SECONDS = 0.5
"""How long the process may take to go once all has ended: a thread may still be waiting for a name server."""


class ParentEnd:
    """The worker's end of the channel. `when_lost` is called when that is closed."""

    def __init__(self) -> None:
        self.handlers: Handlers = {}
        self.channel = Channel(from_parent, lambda message: self.handlers[type(message)](message), self._lost)
        self.questions = Questions(self.channel.send)
        self.when_lost: Callable[[], None] = lambda: None
        self.handlers |= {
            Admitted: lambda message: self.questions.answered(message.number, message.admission),
            Room: lambda message: self.questions.answered(message.number, message.fault),
            messages.Metrics: lambda message: self.questions.answered(
                message.number, (message.text, message.content_type)
            ),
        }
        self.handlers |= taking_answers(self.questions)

    def _lost(self) -> None:
        self.when_lost()

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """The metrics of the whole service, and their type."""
        found: tuple[bytes, str] = await self.questions.ask(lambda number: AskMetrics(number, accept))
        return found


class WorkerService(MultiService):
    """A worker. Its children are what runs in the background."""

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        *,
        logs: Logs,
        parent: ParentEnd,
        channel: socket.socket,
        surface: Surface,
        settle: Callable[[], None],
        leave: Callable[[float], None],
    ):
        """@param settle, leave: as `AITicket` has it."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self.logs = logs
        self._parent = parent
        self._channel = channel
        self._surface = surface
        self._settle = settle
        self._leave = leave
        self._draining: Deferred[None] | None = None
        self._told_all = False
        parent.when_lost = self._lost
        parent.handlers |= {Stop: lambda _: self._stop_requested(), Hurry: lambda _: self._hurry()}

    def startService(self) -> None:
        """Serve."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(
                number, signal.SIG_IGN
            )  # a terminal, or a container, signals all; what is done the parent says
        self.logs.start()
        raise_file_limit()
        self._channel.setblocking(False)
        with self._channel:  # which is duplicated
            self._reactor.adoptStreamConnection(
                self._channel.fileno(),
                socket.AF_UNIX,
                Factory.forProtocol(lambda: self._parent.channel),
            )
        self._surface.listeners.open()
        for connections in (self._surface.callers, self._surface.scrapers):
            connections.start()
        super().startService()  # type: ignore[no-untyped-call]
        self._settle()
        self._parent.channel.send(Ready())

    def stopService(self) -> Deferred[None]:
        """Cut what is open, and end the background."""
        Service.stopService(self)
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        await self._surface.listeners.close_at_once()
        for connections in (self._surface.callers, self._surface.scrapers):
            connections.stop()
        for child in self:
            ending = maybeDeferred(child.stopService).addTimeout(END_SECONDS, self._reactor)
            await ended(child, ending, self._log, lambda: False)
        self._leave(LEAVE_SECONDS)

    def _stop_requested(self) -> None:
        if self._draining is None:
            self._draining = Deferred.fromCoroutine(self._surface.drain.run())
            self._draining.addErrback(lambda failure: self._log.failure("draining failed", failure))
            self._draining.addBoth(lambda _: self._tell_all())

    def _hurry(self) -> None:
        self._stop_requested()
        if self._draining is not None:
            self._draining.cancel()

    def _tell_all(self) -> None:
        """All is done: the parent hears how it went, and then closes the channel, or this closes it."""
        self._told_all = True
        self._parent.channel.send(Stopped(self._surface.drain.tally))
        self._parent.channel.close()

    def _lost(self) -> None:
        """The channel is closed: all is done, or the parent has gone. Without it nothing can go on."""
        if not self._told_all:
            self._log.error("the parent process is gone")
        self._reactor.stop()


def build_worker(start: Start, channel: socket.socket, reactor: Any) -> WorkerService:
    """The worker that the parent wants. Nothing is opened yet."""
    settings, in_force = start.settings, start.in_force
    logs = Logs(
        in_force.log_level,
        settings.log_format,
        in_force.payloads,
        reactor=reactor,
        worker=start.worker,
    )
    random = Random()  # noqa: S311 - only jitter and ids come from it
    registry = CollectorRegistry()
    metrics = Metrics(settings.metrics_namespace, registry)
    tracing = make_tracing(
        settings, clock=reactor, call_in_reactor=reactor.callFromThread, random=random, instance_id=str(uuid4())
    )
    parent = ParentEnd()
    locations = [learnt.location for learnt in start.backends]
    backends = _make_backends(settings, reactor, registry, locations)
    pipeline = RemotePipeline(
        parent.questions,
        parent.channel.send,
        clock=reactor,
        backends=backends,
        outlook=start.outlook,
        timeout=settings.request_timeout_seconds,
    )
    generations = Generations(pipeline, reactor, lambda: (0, 0))
    authenticator = make_authenticator(
        settings,
        in_force.configured_tokens,
        metrics,
        RemoteLimiter(parent.questions, "invalid_tokens", INVALID_TOKENS, INVALID_TOKENS_SECONDS),
    )
    tls = TlsConnections(context_of(in_force.pem, settings.tls_profile))
    limited = bool(settings.rate_limit_requests)

    def put_into_force(new: InForce) -> None:
        nonlocal in_force
        logs.level = new.log_level
        logs.payloads.a_minute = new.payloads
        authenticator.accept(new.file_tokens)
        authenticator.configure(new.configured_tokens)
        if new.pem != in_force.pem:
            tls.context = context_of(new.pem, settings.tls_profile)
        surface.memory.limit = new.memory_limit
        in_force = new

    def learn(learnt: Learnt) -> None:
        locations[learnt.backend] = learnt.location
        backends[learnt.backend].adopt(learnt.state)

    def see(outlook: Outlook) -> None:
        pipeline.outlook = outlook

    last_ping = Ping(0.0, 0, False)

    def answer(ping: Ping) -> None:
        nonlocal last_ping
        last_ping = ping
        parent.channel.send(Pong(len(surface.callers), used_memory() or 0))

    def used_by_all() -> int | None:
        own = used_memory()
        return None if own is None else own + last_ping.memory

    parent.handlers |= {
        InForce: put_into_force,
        Learnt: learn,
        Outlook: see,
        Attempt: pipeline.attempt,
        Ended: pipeline.ended,
        Place: pipeline.place,
        Ping: answer,
        AskSamples: lambda message: parent.channel.send(Samples(message.number, collected(registry))),
    }
    parent.handlers |= answering(generations, parent.channel.send)
    authenticator.accept(in_force.file_tokens)
    for learnt in start.backends:
        learn(learnt)
    surface = make_surface(
        settings,
        reactor,
        logs=logs,
        metrics=metrics,
        tracing=tracing,
        authenticator=authenticator,
        limiter=RemoteLimiter(
            parent.questions, "quota", settings.rate_limit_requests, settings.rate_limit_window_seconds
        )
        if limited
        else None,
        pipeline=generations,
        drained=pipeline,
        generations=RemoteGenerations(parent.questions),
        tokenize=Counting(backends).tokenize,
        states=lambda: [backend.state for backend in backends],
        settle=lambda: Deferred.fromCoroutine(_settle(backends)),
        tls=tls,
        render=parent.metrics,
        exported=False,
        listen=lambda endpoints: InheritedPorts(
            reactor, endpoints, start.ports, ahead=lambda: len(surface.callers) > last_ping.connections
        ),
        systemd=Systemd({}, reactor),
        memory_limit=in_force.memory_limit,
        used_memory=used_by_all,
        lagging=lambda: last_ping.lagging,
        announced=lambda in_flight: parent.channel.send(Stopping(in_flight)),
    )
    service = WorkerService(
        reactor,
        logs=logs,
        parent=parent,
        channel=channel,
        surface=surface,
        settle=settle_memory,
        leave=lambda seconds: twistd.leave(seconds, logs.stop),
    )
    for child in (surface.loop, surface.memory, tracing):
        child.setServiceParent(service)  # type: ignore[no-untyped-call]
    return service


def _make_backends(
    settings: Settings, reactor: Any, registry: CollectorRegistry, locations: list[Location | None]
) -> list[KoboldBackend]:
    """The backends in order of rank; the bundled ones are where the parent says."""
    numbers: dict[str, int] = {}
    ranks = make_backends(
        settings,
        reactor,
        registry,
        lambda address, slots: lambda: locations[numbers[address.name]],
    )
    backends = [backend for rank in ranks for backend, _ in rank]
    numbers |= {backend.state.name: number for number, backend in enumerate(backends)}
    return backends


async def _settle(backends: Sequence[KoboldBackend]) -> None:
    for backend in backends:
        await backend.settle()
