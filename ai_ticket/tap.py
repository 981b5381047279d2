"""The composition root: the one place that imports a reactor, and that puts the rooms together."""

import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from importlib import import_module
from random import Random
from typing import Any
from uuid import uuid4

from msgspec import Struct
from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import globalLogBeginner
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.usage import Options as UsageOptions

from ai_ticket import preflight, twistd
from ai_ticket.assembly import forgetting, make_invalid_tokens, make_limiter, make_pipeline, make_pool
from ai_ticket.drain import Drain, ServedPipeline
from ai_ticket.environment import ConfigurationError, Loaded, load
from ai_ticket.event import EventLimits
from ai_ticket.interfaces import BackendState, Limiter
from ai_ticket.listening import Endpoint, Listeners
from ai_ticket.reload import LiveSettings, Reloadable
from ai_ticket.service import AITicket
from ai_ticket.settings import Settings
from ai_ticket.spans import Tracer
from ai_ticket.systemd import Systemd, environment_at_start, passed_sockets
from ai_ticket.telemetry.logs import Logs
from ai_ticket.telemetry.logs_output import Stream
from ai_ticket.telemetry.metrics import Metrics
from ai_ticket.telemetry.payloads import payloads_a_minute
from ai_ticket.telemetry.tracing import ForwardingTracer
from ai_ticket.telemetry.tracing_setup import Tracing, make_tracing
from ai_ticket.tokens import parse_token_list
from ai_ticket.web.auth import Authenticator, TokenFile
from ai_ticket.web.connections import ConnectionFactory, Connections, Timeouts
from ai_ticket.web.gate import Gate
from ai_ticket.web.http1 import Http1
from ai_ticket.web.http2 import Http2
from ai_ticket.web.routes import BodyLimits, EventRoutes, HealthRoutes, metrics_route
from ai_ticket.web.site import Route, Site
from ai_ticket.web.tls import TlsConnections, server_context
from ai_ticket.workers.channel import from_parent, read_one
from ai_ticket.workers.cores import worker_count
from ai_ticket.workers.parent import build_parent
from ai_ticket.workers.process import CHANNEL_FD
from ai_ticket.workers.worker import build_worker

MAX_EXPORTER_CONNECTIONS = 100

Render = Callable[[str], Awaitable[tuple[bytes, str]]]
"""The metrics and their type, for an Accept header."""


class Options(UsageOptions):
    """`twistd ai-ticket` has none: its settings are environment variables (`ai-ticket check-config` lists them)."""

    longdesc = (
        "AI Ticket: takes events over HTTPS and answers them with a self-hosted language model. Settings come from "
        "environment variables and the file AI_TICKET_ENV_FILE (.env); `ai-ticket check-config` shows those in force."
    )


def makeService(options: UsageOptions, reactor: Any = None) -> AITicket:
    """The service, with the settings of the environment. Nothing is opened or started yet.

    @raise SystemExit: the settings can't be used; standard error says why, a line for each problem.
    """
    if reactor is None:
        from twisted.internet import reactor  # noqa: PLC0415
    try:
        loaded = load(os.environ)
        problems = preflight.problems(loaded.settings)
        if problems:
            raise ConfigurationError(problems)
        log = twistd.log_file(options, sys.argv)
    except ConfigurationError as error:
        for problem in error.problems:
            print(f"ai-ticket: {problem}", file=sys.stderr)  # noqa: T201
        raise SystemExit(1)
    return build(loaded, reactor, log)


def build(loaded: Loaded, reactor: Any, log: Stream | None = None) -> AITicket:
    """The service with these settings, which have passed `preflight`, on this reactor.

    @param log: where the log goes; standard output by default.
    """
    settings = loaded.settings
    count = worker_count(settings)
    if count > 1:
        return build_parent(loaded, reactor, log, count, make_exporter)
    logs = Logs(
        settings.log_level, settings.log_format, payloads_a_minute(settings.log_payloads), reactor=reactor, out=log
    )
    random = Random()  # noqa: S311 - only jitter comes from it
    registry = CollectorRegistry()
    metrics = Metrics(settings.metrics_namespace, registry)
    invalid_tokens = make_invalid_tokens(settings, reactor)
    authenticator = Authenticator(
        parse_token_list(settings.ai_ticket_auth_token or ""),
        enabled=settings.ai_ticket_auth,
        recorder=metrics,
        invalid_tokens=invalid_tokens,
        trusted_proxies=settings.trust_proxy_count,
        quota_by=settings.rate_limit_by,
    )
    # Absolute, for twistd may change the folder before they are read again.
    certificate_file, key_file = os.path.abspath(settings.tls_cert_file), os.path.abspath(settings.tls_key_file)
    token_file = None
    if settings.ai_ticket_auth and settings.ai_ticket_auth_token_file is not None:
        token_file = TokenFile(os.path.abspath(settings.ai_ticket_auth_token_file), authenticator)
        token_file.load()

    tracing = make_tracing(
        settings,
        clock=reactor,
        call_in_reactor=reactor.callFromThread,
        random=random,
        instance_id=str(uuid4()),
    )
    pool, children = make_pool(settings, reactor, random, registry)
    pipeline = make_pipeline(settings, reactor, pool, registry)
    limiter, limiting = make_limiter(settings, reactor, metrics)
    tls = TlsConnections(server_context(certificate_file, key_file))
    systemd = Systemd(os.environ, reactor)

    async def render(accept: str) -> tuple[bytes, str]:
        return metrics.render(accept)

    surface = make_surface(
        settings,
        reactor,
        logs=logs,
        metrics=metrics,
        tracing=tracing,
        authenticator=authenticator,
        limiter=limiter,
        pipeline=pipeline,
        states=lambda: pool.states,
        settle=lambda: Deferred.fromCoroutine(pool.settle()),
        tls=tls,
        render=render,
        exported=True,
        listen=lambda endpoints: Listeners(
            reactor, endpoints, lambda names: passed_sockets(environment_at_start(), names)
        ),
        systemd=systemd,
    )
    live_settings = LiveSettings(
        loaded,
        {
            "AI_TICKET_AUTH_TOKEN": lambda text: authenticator.configure(parse_token_list(text or "")),
            "LOG_LEVEL": lambda level: setattr(logs, "level", level),
            "LOG_PAYLOADS": lambda text: setattr(logs.payloads, "a_minute", payloads_a_minute(text)),
            "MAX_CONCURRENCY": pipeline.set_max_concurrency,
        },
    )
    service = AITicket(
        reactor=reactor,
        logs=logs,
        warnings=[*loaded.warnings, *preflight.warnings(loaded)],
        listeners=surface.listeners,
        connections=[surface.callers, surface.scrapers],
        drain=surface.drain,
        systemd=systemd,
        reloadable=Reloadable(
            settings=live_settings,
            token_file=token_file,
            tls=tls,
            certificate_file=certificate_file,
            key_file=key_file,
        ),
        reload_interval=settings.ai_ticket_auth_token_reload_interval,
        in_thread=lambda call: deferToThreadPool(reactor, reactor.getThreadPool(), call),
    )
    metrics.watch("server_workers", "Processes that serve callers.", lambda: 1)
    # They end in this order: callers' quotas after what they ask for, and last tracing, which tells of all.
    for child in (pipeline, *children, *limiting, forgetting(invalid_tokens, reactor), tracing):
        child.setServiceParent(service)
    return service


def run_worker() -> None:
    """The whole life of a worker process: from the parent's first message on to the end."""
    channel = socket.socket(fileno=CHANNEL_FD)
    try:
        start = read_one(channel, from_parent)
    except EOFError:
        return  # the parent is gone, or wants no workers any more
    import_module(start.reactor).install()
    from twisted.internet import reactor  # noqa: PLC0415

    service: Any = build_worker(start, channel, reactor, make_surface)
    globalLogBeginner.beginLoggingTo([service.logs])
    service.startService()
    running: Any = reactor
    running.addSystemEventTrigger("before", "shutdown", service.stopService)
    running.run(installSignalHandlers=False)


class Surface(Struct, frozen=True):
    """What faces the callers of a process, and how that ends."""

    callers: Connections
    scrapers: Connections
    listeners: Listeners
    drain: Drain


def make_surface(
    settings: Settings,
    reactor: Any,
    *,
    logs: Logs,
    metrics: Metrics,
    tracing: Tracing,
    authenticator: Authenticator,
    limiter: Limiter | None,
    pipeline: ServedPipeline,
    states: Callable[[], list[BackendState]],
    settle: Callable[[], Deferred[None]],
    tls: TlsConnections,
    render: Render,
    exported: bool,
    listen: Callable[[list[Endpoint]], Listeners],
    systemd: Systemd,
    announced: Callable[[int], None] | None = None,
) -> Surface:
    """What faces the callers; nothing is opened yet.

    @param states: of the backends, in order of rank. @param settle: waits until they know of all that was cut.
    @param render: the metrics. @param exported: whether this process has the exporter's port as well.
    @param listen: makes the ports of these endpoints. @param announced: as `Drain` has it.
    """
    metrics.watch("tracing_dropped_spans", "Spans that ended and were not exported.", lambda: tracing.dropped)
    callers = make_connections(settings, reactor, settings.max_connections)
    gate = Gate(
        authenticator=authenticator,
        limiter=limiter,
        clock=reactor,
        recorder=metrics,
        draining=lambda: drain.refusing,
    )
    events = EventRoutes(
        gate=gate,
        pipeline=pipeline,
        clock=reactor,
        limits=EventLimits(settings.max_tokens_limit, settings.default_max_tokens),
        bodies=BodyLimits(settings.max_body_bytes, settings.max_batch_body_bytes, settings.max_batch_events),
        request_timeout=settings.request_timeout_seconds,
        sampling=logs.payloads.sampling,
    )
    health = HealthRoutes(states, draining=lambda: drain.announced)
    site = make_site(
        settings,
        reactor,
        [*events.routes(), *health.routes(), *([metrics_route(render)] if settings.metrics_on_tls else [])],
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
    drain = Drain(
        reactor,
        delay=settings.shutdown_delay_seconds,
        grace=settings.shutdown_grace_seconds,
        listeners=listeners,
        callers=callers,
        scrapers=scrapers,
        site=site,
        pipeline=pipeline,
        stopped_at_backends=settle,
        systemd=systemd,
        announced=announced,
    )
    metrics.watch("server_connections", "Open connections of callers.", lambda: len(callers))
    metrics.watch("server_streams", "Answers in pieces under way.", lambda: site.streams)
    metrics.watch("tls_certificate_expiry_timestamp_seconds", "When the certificate expires.", lambda: tls.expires)
    return Surface(callers, scrapers, listeners, drain)


def make_exporter(settings: Settings, reactor: Any, metrics: Metrics, render: Render) -> tuple[Connections, Endpoint]:
    """The connections of those who watch, and where they find the metrics."""
    scrapers = make_connections(settings, reactor, MAX_EXPORTER_CONNECTIONS)
    site = make_site(settings, reactor, [metrics_route(render)], metrics, ForwardingTracer())
    return scrapers, Endpoint(
        "metrics",
        "OTEL_PROMETHEUS_PORT",
        settings.otel_prometheus_host,
        settings.otel_prometheus_port,
        ConnectionFactory(scrapers, site, secure=False),
    )


def make_connections(settings: Settings, reactor: Any, limit: int) -> Connections:
    """Open connections, at the most so many."""
    timeouts = Timeouts(
        header=settings.header_timeout_seconds,
        body=settings.body_timeout_seconds,
        keepalive=settings.keepalive_timeout_seconds,
        idle=settings.koboldcpp_idle_timeout_seconds,
    )
    return Connections(reactor, limit=limit, timeouts=timeouts, http1=Http1, http2=Http2)


def make_site(settings: Settings, reactor: Any, routes: list[Route], metrics: Metrics, tracer: Tracer) -> Site:
    """A site with these routes."""
    return Site(
        routes,
        clock=reactor,
        recorder=metrics,
        tracer=tracer,
        new_request_id=lambda: secrets.token_hex(16),
        hsts_seconds=settings.hsts_seconds,
    )
