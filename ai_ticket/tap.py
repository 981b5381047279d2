"""The composition root: the one place that imports a reactor, and that puts the rooms together."""

import os
import secrets
import sys
from random import Random
from typing import Any
from uuid import uuid4

from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.usage import Options as UsageOptions

from ai_ticket import preflight, twistd
from ai_ticket.assembly import (
    forgetting,
    make_limiter,
    make_memory_watch,
    make_pipeline,
    make_pool,
)
from ai_ticket.drain import Drain
from ai_ticket.environment import ConfigurationError, Loaded, load
from ai_ticket.event import EventLimits
from ai_ticket.limit.memory import MemoryLimiter
from ai_ticket.listening import Endpoint, Listeners
from ai_ticket.memory import memory_limit, settle_memory
from ai_ticket.overload import LoopWatch
from ai_ticket.pipeline.generations import Generations
from ai_ticket.reload import LiveSettings, Reloadable
from ai_ticket.service import AITicket
from ai_ticket.systemd import Systemd, environment_at_start, passed_sockets
from ai_ticket.telemetry.logs import Logs
from ai_ticket.telemetry.logs_output import Stream
from ai_ticket.telemetry.metrics import Metrics, Scrapes
from ai_ticket.telemetry.payloads import payloads_a_minute
from ai_ticket.telemetry.tracing_setup import make_tracing
from ai_ticket.tokens import parse_token_list
from ai_ticket.web.auth import INVALID_TOKENS, INVALID_TOKENS_SECONDS, Authenticator, TokenFile
from ai_ticket.web.connections import ConnectionFactory, Connections, Timeouts
from ai_ticket.web.cors import Cors, parse_origins
from ai_ticket.web.gate import Gate
from ai_ticket.web.http1 import Http1
from ai_ticket.web.http2 import Http2
from ai_ticket.web.intake import Intake
from ai_ticket.web.kobold import KoboldRoutes
from ai_ticket.web.openai import OpenAIRoutes
from ai_ticket.web.openapi import openapi_route
from ai_ticket.web.routes import BodyLimits, EventRoutes, HealthRoutes, metrics_route
from ai_ticket.web.site import Site
from ai_ticket.web.tls import TlsConnections, server_context

MAX_EXPORTER_CONNECTIONS = 100


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
    logs = Logs(
        settings.log_level, settings.log_format, payloads_a_minute(settings.log_payloads), reactor=reactor, out=log
    )
    random = Random()  # noqa: S311 - only jitter comes from it
    registry = CollectorRegistry()
    metrics = Metrics(settings.metrics_namespace, registry)
    invalid_tokens = MemoryLimiter(
        reactor, limit=INVALID_TOKENS, window=INVALID_TOKENS_SECONDS, max_clients=settings.rate_limit_max_clients
    )
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
    metrics.watch("tracing_dropped_spans", "Spans that ended and were not exported.", lambda: tracing.dropped)
    pool, children = make_pool(settings, reactor, random, registry)
    timeouts = Timeouts(
        header=settings.header_timeout_seconds,
        body=settings.body_timeout_seconds,
        keepalive=settings.keepalive_timeout_seconds,
        idle=settings.koboldcpp_idle_timeout_seconds,
    )

    def make_connections(limit: int, per_client: int | None) -> Connections:
        return Connections(
            reactor,
            limit=limit,
            per_client=per_client,
            timeouts=timeouts,
            recorder=metrics,
            http1=Http1,
            http2=Http2,
        )

    # Behind proxies, all callers come from the same few addresses.
    per_client = None if settings.trust_proxy_count else settings.max_connections_per_client
    callers = make_connections(settings.max_connections, per_client)
    scrapers = make_connections(MAX_EXPORTER_CONNECTIONS, None)
    metrics_routes = [metrics_route(Scrapes(metrics.render, reactor).get)]
    pipeline = make_pipeline(settings, reactor, pool, registry)
    generations = Generations(pipeline, reactor, lambda: (pipeline.depth, pipeline.in_flight))
    limiter, limiting = make_limiter(settings, reactor, metrics)
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
        pipeline=generations,
        clock=reactor,
        max_body=settings.max_body_bytes,
        request_timeout=settings.request_timeout_seconds,
        sampling=logs.payloads.sampling,
    )
    limits = EventLimits(settings.max_tokens_limit, settings.default_max_tokens)
    events = EventRoutes(
        intake, limits=limits, bodies=BodyLimits(settings.max_batch_body_bytes, settings.max_batch_events)
    )
    openai = OpenAIRoutes(intake, limits=limits, clock=reactor, backends=lambda: pool.states)
    kobold = KoboldRoutes(
        intake,
        limits=limits,
        clock=reactor,
        backends=lambda: pool.states,
        generations=generations,
        tokenize=pool.tokenize,
        protected=settings.ai_ticket_auth,
    )
    loop = LoopWatch(reactor, metrics.reactor_lag)
    health = HealthRoutes(
        lambda: pool.states,
        draining=lambda: drain.announced,
        overload=lambda: "memory" if memory.refusing else "lag" if loop.lagging else None,
    )

    def make_site(routes: list[Any]) -> Site:
        return Site(
            routes,
            clock=reactor,
            recorder=metrics,
            tracer=tracing.tracer,
            new_request_id=lambda: secrets.token_hex(16),
            hsts_seconds=settings.hsts_seconds,
            cors=Cors(parse_origins(settings.cors_allow_origins or "")),
        )

    site = make_site(
        [
            *events.routes(),
            *openai.routes(),
            *kobold.routes(),
            *health.routes(),
            openapi_route(limits, settings.max_batch_events),
            *(metrics_routes if settings.metrics_on_tls else []),
        ]
    )
    tls = TlsConnections(server_context(certificate_file, key_file, settings.tls_profile))
    secure = TLSMemoryBIOFactory(tls, False, ConnectionFactory(callers, site, secure=True), reactor)
    secure.noisy = False
    plain = ConnectionFactory(callers, site, secure=False)
    exporter = ConnectionFactory(scrapers, make_site(metrics_routes), secure=False)
    listeners = Listeners(
        reactor,
        [
            Endpoint("https", "TLS_PORT", settings.bind_host, settings.tls_port, secure),
            Endpoint("http", "HTTP_PORT", settings.bind_host, settings.http_port, plain),
            Endpoint(
                "metrics",
                "OTEL_PROMETHEUS_PORT",
                settings.otel_prometheus_host,
                settings.otel_prometheus_port,
                exporter,
                always=True,
            ),
        ],
        lambda names: passed_sockets(environment_at_start(), names),
    )
    memory = make_memory_watch(settings, reactor, metrics, callers, listeners)
    systemd = Systemd(os.environ, reactor)
    drain = Drain(
        reactor,
        delay=settings.shutdown_delay_seconds,
        grace=settings.shutdown_grace_seconds,
        listeners=listeners,
        callers=callers,
        scrapers=scrapers,
        site=site,
        pipeline=pipeline,
        stopped_at_backends=lambda: Deferred.fromCoroutine(pool.settle()),
        systemd=systemd,
    )
    live_settings = LiveSettings(
        loaded,
        {
            "AI_TICKET_AUTH_TOKEN": lambda text: authenticator.configure(parse_token_list(text or "")),
            "LOG_LEVEL": lambda level: setattr(logs, "level", level),
            "LOG_PAYLOADS": lambda text: setattr(logs.payloads, "a_minute", payloads_a_minute(text)),
            "MAX_CONCURRENCY": pipeline.set_max_concurrency,
            "MEMORY_LIMIT_MB": lambda megabytes: setattr(memory, "limit", memory_limit(megabytes)),
        },
    )
    service = AITicket(
        reactor=reactor,
        logs=logs,
        warnings=[*loaded.warnings, *preflight.warnings(loaded)],
        listeners=listeners,
        connections=[callers, scrapers],
        drain=drain,
        systemd=systemd,
        reloadable=Reloadable(
            settings=live_settings,
            token_file=token_file,
            tls=tls,
            certificate_file=certificate_file,
            key_file=key_file,
            tls_profile=settings.tls_profile,
        ),
        reload_interval=settings.ai_ticket_auth_token_reload_interval,
        in_thread=lambda call: deferToThreadPool(reactor, reactor.getThreadPool(), call),
        settle=settle_memory,
        leave=lambda seconds: twistd.leave(seconds, logs.stop),
    )
    metrics.watch("server_connections", "Open connections of callers.", lambda: len(callers))
    metrics.watch("server_streams", "Answers in pieces under way.", lambda: site.streams)
    metrics.watch("tls_certificate_expiry_timestamp_seconds", "When the certificate expires.", lambda: tls.expires)
    # They end in this order: callers' quotas after what they ask for, and last tracing, which tells of all.
    for child in (loop, memory, pipeline, *children, *limiting, forgetting(invalid_tokens, reactor), tracing):
        child.setServiceParent(service)
    return service
