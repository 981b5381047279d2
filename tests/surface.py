"""The HTTP surface on a clock, with a pipeline in memory."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from few_calls import FewCalls
from harness import (
    Http2Client,
    MemoryPipeline,
    MemoryTransport,
    Recorded,
    ScriptedLimiter,
    connect,
    make_connections,
    parse_responses,
)
from memory_tracer import MemoryTracer
from twisted.internet.task import Clock

from ai_ticket.event import EventLimits
from ai_ticket.interfaces import BackendState, Tokens
from ai_ticket.pipeline.generations import Generations
from ai_ticket.telemetry.payloads import PayloadSampler
from ai_ticket.tokens import parse_token_list
from ai_ticket.web.auth import Authenticator
from ai_ticket.web.connection import Connection
from ai_ticket.web.connections import Connections
from ai_ticket.web.cors import Cors
from ai_ticket.web.gate import Gate
from ai_ticket.web.intake import Intake
from ai_ticket.web.kobold import KoboldRoutes
from ai_ticket.web.openai import OpenAIRoutes
from ai_ticket.web.openapi import openapi_route
from ai_ticket.web.routes import BodyLimits, EventRoutes, HealthRoutes, metrics_route
from ai_ticket.web.site import Route, Site

MAX_BODY = 10_000


async def no_tokens(text: str) -> None:
    """No backend counts tokens."""


@dataclass
class Surface:
    """The HTTP surface in memory."""

    clock: Clock
    site: Site
    connections: Connections
    pipeline: MemoryPipeline
    limiter: ScriptedLimiter
    recorder: Recorded
    tracer: MemoryTracer
    backends: list[BackendState]
    routes: list[Route]
    draining: bool = False
    short_of_memory: bool = False
    overload: str | None = None
    tokenize: Callable[[str], Awaitable[Tokens | None]] = no_tokens

    def connect(self, *, secure: bool = False) -> tuple[Connection, MemoryTransport]:
        return connect(self.connections, self.site, secure=secure)

    def connect2(self) -> Http2Client:
        return Http2Client(self.connections, self.site)

    def connect_http2(self) -> tuple[Connection, MemoryTransport]:
        """A new HTTP/2 connection, of which nothing is known but that."""
        return connect(self.connections, self.site, secure=True, protocol=b"h2")

    def http1(self, data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
        """What comes back for these bytes on a new connection."""
        connection, transport = self.connect()
        connection.dataReceived(data)
        return list(parse_responses(transport.value()))


async def _metrics(accept: str) -> tuple[bytes, str]:
    return b"x 1\n", "text/plain; version=0.0.4"


def make_surface() -> Surface:
    clock = Clock()
    recorder = Recorded()
    pipeline = MemoryPipeline()
    tracer = MemoryTracer(clock)
    ids = iter(range(10**6))
    load = (3, 1)
    backends = [BackendState(name="a:1", up=True, slots=1, model="m")]
    authenticator = Authenticator(
        parse_token_list("secret, other"), enabled=True, recorder=recorder, invalid_tokens=FewCalls()
    )
    limiter = ScriptedLimiter()
    gate = Gate(
        authenticator=authenticator,
        limiter=limiter,
        clock=clock,
        recorder=recorder,
        draining=lambda: found.draining,
        short_of_memory=lambda: found.short_of_memory,
    )
    generations = Generations(pipeline, clock, lambda: load)
    intake = Intake(
        gate=gate,
        pipeline=generations,
        clock=clock,
        max_body=MAX_BODY,
        request_timeout=120,
        sampling=PayloadSampler(0, clock, lambda: False).sampling,
    )
    limits = EventLimits(4096, 512)
    events = EventRoutes(intake, limits=limits, bodies=BodyLimits(3 * MAX_BODY, 20))
    openai = OpenAIRoutes(intake, limits=limits, clock=clock, backends=lambda: backends)
    kobold = KoboldRoutes(
        intake,
        limits=limits,
        clock=clock,
        backends=lambda: backends,
        generations=generations,
        tokenize=lambda text: found.tokenize(text),
        protected=True,
    )
    health = HealthRoutes(lambda: backends, lambda: found.draining, lambda: found.overload)
    routes = [
        *events.routes(),
        *openai.routes(),
        *kobold.routes(),
        *health.routes(),
        openapi_route(limits, 20),
        metrics_route(_metrics),
    ]
    site = Site(
        routes,
        clock=clock,
        recorder=recorder,
        tracer=tracer,
        new_request_id=lambda: f"id{next(ids)}",
        hsts_seconds=99,
        cors=Cors(["https://page.test"]),
    )
    found = Surface(clock, site, make_connections(clock), pipeline, limiter, recorder, tracer, backends, routes)
    return found
