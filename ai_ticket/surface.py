"""What faces the callers of a process, put together from its settings, for `tap` and for worker processes."""

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.protocols.tls import TLSMemoryBIOFactory

from ai_ticket.assembly import make_memory_watch
from ai_ticket.drain import Drain, DrainedPipeline
from ai_ticket.event import EventLimits
from ai_ticket.interfaces import BackendState, Generations, Limiter, Pipeline, Tokens
from ai_ticket.listening import Endpoint, Listeners
from ai_ticket.overload import LoopWatch, MemoryWatch
from ai_ticket.settings import Settings
from ai_ticket.spans import Tracer
from ai_ticket.systemd import Systemd
from ai_ticket.telemetry.logs import Logs
from ai_ticket.telemetry.metrics import Metrics, Render
from ai_ticket.telemetry.tracing import ForwardingTracer
from ai_ticket.telemetry.tracing_setup import Tracing
from ai_ticket.web.auth import Authenticator
from ai_ticket.web.connection import Timeouts
from ai_ticket.web.connections import ConnectionFactory, Connections
from ai_ticket.web.cors import Cors, parse_origins
from ai_ticket.web.gate import Gate
from ai_ticket.web.http1 import Http1
from ai_ticket.web.http2 import Http2
from ai_ticket.web.intake import Intake
from ai_ticket.web.kobold import KoboldRoutes
from ai_ticket.web.openai import OpenAIRoutes
from ai_ticket.web.openapi import openapi_route
from ai_ticket.web.routes import BodyLimits, EventRoutes, HealthRoutes, metrics_route
from ai_ticket.web.site import Route, Site
from ai_ticket.web.tls import TlsConnections

MAX_EXPORTER_CONNECTIONS = 100


class Surface(Struct, frozen=True):
    """What faces the callers of a process, and how that ends."""

    callers: Connections
    scrapers: Connections
    listeners: Listeners
    drain: Drain
    memory: MemoryWatch
    loop: LoopWatch


def make_surface(
    settings: Settings,
    reactor: Any,
    *,
    logs: Logs,
    metrics: Metrics,
    tracing: Tracing,
    authenticator: Authenticator,
    limiter: Limiter | None,
    pipeline: Pipeline,
    drained: DrainedPipeline,
    generations: Generations,
    tokenize: Callable[[str], Awaitable[Tokens | None]],
    states: Callable[[], list[BackendState]],
    settle: Callable[[], Deferred[None]],
    tls: TlsConnections,
    render: Render,
    exported: bool,
    listen: Callable[[list[Endpoint]], Listeners],
    systemd: Systemd,
    memory_limit: int | None,
    used_memory: Callable[[], int | None],
    lagging: Callable[[], bool] = lambda: False,
    announced: Callable[[int], None] | None = None,
) -> Surface:
    """What faces the callers; nothing is opened yet.

    @param drained: the pipeline as far as its end goes. @param states: of the backends, in order of rank.
    @param settle: waits until they know of all that was cut.
    @param render: the metrics. @param exported: whether this process has the exporter's port as well.
    @param listen: makes the ports of these endpoints. @param memory_limit, used_memory: as `MemoryWatch` has them.
    @param lagging: whether another process is late that this one waits for. @param announced: as `Drain` has it.
    """
    metrics.watch("tracing_dropped_spans", "Spans that ended and were not exported.", lambda: tracing.dropped)
    # Behind proxies, all callers come from the same few addresses.
    per_client = None if settings.trust_proxy_count else settings.max_connections_per_client
    callers = make_connections(settings, reactor, metrics, settings.max_connections, per_client)
    gate = Gate(
        authenticator=authenticator,
        limiter=limiter,
        clock=reactor,
        recorder=metrics,
        draining=lambda: drain.refusing,
        short_of_memory=lambda: memory.refusing,
    )
    intake = Intake(
        gate=gate,
        pipeline=pipeline,
        clock=reactor,
        max_body=settings.max_body_bytes,
        request_timeout=settings.request_timeout_seconds,
        sampling=logs.payloads.sampling,
    )
    limits = EventLimits(settings.max_tokens_limit, settings.default_max_tokens)
    events = EventRoutes(
        intake, limits=limits, bodies=BodyLimits(settings.max_batch_body_bytes, settings.max_batch_events)
    )
    openai = OpenAIRoutes(intake, limits=limits, clock=reactor, backends=states)
    kobold = KoboldRoutes(
        intake,
        limits=limits,
        clock=reactor,
        backends=states,
        generations=generations,
        tokenize=tokenize,
        protected=settings.ai_ticket_auth,
    )
    loop = LoopWatch(reactor, metrics.reactor_lag)
    health = HealthRoutes(
        states,
        draining=lambda: drain.announced,
        overload=lambda: "memory" if memory.refusing else "lag" if loop.lagging or lagging() else None,
    )
    site = make_site(
        settings,
        reactor,
        [
            *events.routes(),
            *openai.routes(),
            *kobold.routes(),
            *health.routes(),
            openapi_route(limits, settings.max_batch_events),
            *([metrics_route(render)] if settings.metrics_on_tls else []),
        ],
        metrics,
        tracing.tracer,
    )
    secure = TLSMemoryBIOFactory(tls, False, ConnectionFactory(callers, site, secure=True), reactor)
    secure.noisy = False
    plain = ConnectionFactory(callers, site, secure=False)
    scrapers, exporter = make_exporter(settings, reactor, metrics, render)
    listeners = listen(
        [
            Endpoint("https", "TLS_PORT", settings.bind_host, settings.tls_port, secure),
            Endpoint("http", "HTTP_PORT", settings.bind_host, settings.http_port, plain),
            *([exporter] if exported else []),
        ]
    )
    memory = make_memory_watch(reactor, metrics, callers, listeners, limit=memory_limit, used=used_memory)
    drain = Drain(
        reactor,
        delay=settings.shutdown_delay_seconds,
        grace=settings.shutdown_grace_seconds,
        listeners=listeners,
        callers=callers,
        scrapers=scrapers,
        site=site,
        pipeline=drained,
        stopped_at_backends=settle,
        systemd=systemd,
        announced=announced,
    )
    metrics.watch("server_connections", "Open connections of callers.", lambda: len(callers))
    metrics.watch("server_streams", "Answers in pieces under way.", lambda: site.streams)
    metrics.watch("tls_certificate_expiry_timestamp_seconds", "When the certificate expires.", lambda: tls.expires)
    return Surface(callers, scrapers, listeners, drain, memory, loop)


def make_exporter(settings: Settings, reactor: Any, metrics: Metrics, render: Render) -> tuple[Connections, Endpoint]:
    """The connections of those who watch, and where they find the metrics."""
    scrapers = make_connections(settings, reactor, metrics, MAX_EXPORTER_CONNECTIONS, None)
    site = make_site(settings, reactor, [metrics_route(render)], metrics, ForwardingTracer())
    return scrapers, Endpoint(
        "metrics",
        "OTEL_PROMETHEUS_PORT",
        settings.otel_prometheus_host,
        settings.otel_prometheus_port,
        ConnectionFactory(scrapers, site, secure=False),
        always=True,
    )


def make_connections(
    settings: Settings, reactor: Any, metrics: Metrics, limit: int, per_client: int | None
) -> Connections:
    """Open connections, at the most so many, and of each client."""
    timeouts = Timeouts(
        header=settings.header_timeout_seconds,
        body=settings.body_timeout_seconds,
        keepalive=settings.keepalive_timeout_seconds,
        idle=settings.koboldcpp_idle_timeout_seconds,
    )
    return Connections(
        reactor,
        limit=limit,
        per_client=per_client,
        timeouts=timeouts,
        recorder=metrics,
        http1=Http1,
        http2=Http2,
    )


def make_site(settings: Settings, reactor: Any, routes: list[Route], metrics: Metrics, tracer: Tracer) -> Site:
    """A site with these routes."""
    return Site(
        routes,
        clock=reactor,
        recorder=metrics,
        tracer=tracer,
        new_request_id=lambda: secrets.token_hex(16),
        hsts_seconds=settings.hsts_seconds,
        cors=Cors(parse_origins(settings.cors_allow_origins or "")),
    )
