"""The composition root: the one place that imports a reactor, and that puts the rooms together."""

import os
import secrets
import sys
from collections.abc import Callable
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry
from twisted.application.service import Service
from twisted.internet.threads import deferToThreadPool
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.usage import Options as UsageOptions

from ai_ticket import preflight
from ai_ticket.backend.address import BackendAddress, Location, parse_api_urls, parse_passwords, parse_slots
from ai_ticket.backend.http_client import make_http_client
from ai_ticket.backend.kobold import BackendTimeouts, KoboldBackend
from ai_ticket.backend.local import LocalServer
from ai_ticket.backend.model import model_file
from ai_ticket.backend.pool import Pool
from ai_ticket.backend.prober import Prober
from ai_ticket.backend.retry import make_retry_policy
from ai_ticket.backend.server import ModelServer
from ai_ticket.environment import ConfigurationError, Loaded, load
from ai_ticket.event import EventLimits
from ai_ticket.pipeline.fifo import FifoPipeline
from ai_ticket.service import AITicket, Endpoint, Reloadable
from ai_ticket.settings import Settings, variables
from ai_ticket.telemetry.logs import Logs
from ai_ticket.telemetry.metrics import CONTENT_TYPE, Metrics
from ai_ticket.telemetry.payloads import payloads_a_minute
from ai_ticket.web.auth import Authenticator, TokenFile, parse_token_list
from ai_ticket.web.connections import ConnectionFactory, Connections, Timeouts
from ai_ticket.web.http1 import Http1
from ai_ticket.web.http2 import Http2
from ai_ticket.web.routes import EventRoutes, HealthRoutes, metrics_route
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
    except ConfigurationError as error:
        for problem in error.problems:
            print(f"ai-ticket: {problem}", file=sys.stderr)  # noqa: T201
        raise SystemExit(1)
    return build(loaded, reactor)


def build(loaded: Loaded, reactor: Any) -> AITicket:
    """The service with these settings, which have passed `preflight`, on this reactor."""
    settings = loaded.settings
    random = Random()  # noqa: S311 - only jitter comes from it
    metrics = Metrics(settings.metrics_namespace, CollectorRegistry())
    authenticator = Authenticator(
        parse_token_list(settings.ai_ticket_auth_token or ""), enabled=settings.ai_ticket_auth, recorder=metrics
    )
    token_file = None
    if settings.ai_ticket_auth and settings.ai_ticket_auth_token_file is not None:
        token_file = TokenFile(settings.ai_ticket_auth_token_file, authenticator)
        token_file.load()

    pool, children = _make_pool(settings, reactor, random)
    timeouts = Timeouts(
        settings.header_timeout_seconds, settings.body_timeout_seconds, settings.keepalive_timeout_seconds
    )
    callers = Connections(reactor, limit=settings.max_connections, timeouts=timeouts, http1=Http1, http2=Http2)
    scrapers = Connections(reactor, limit=MAX_EXPORTER_CONNECTIONS, timeouts=timeouts, http1=Http1, http2=Http2)
    metrics_routes = [metrics_route(metrics.render, CONTENT_TYPE)]
    pipeline = FifoPipeline(pool, reactor, settings.queue_limit)
    metrics.watch_pipeline(lambda: pipeline.depth, lambda: pipeline.in_flight)
    events = EventRoutes(
        authenticator=authenticator,
        pipeline=pipeline,
        clock=reactor,
        limits=EventLimits(settings.max_tokens_limit, settings.default_max_tokens),
        max_body_bytes=settings.max_body_bytes,
        request_timeout=settings.request_timeout_seconds,
        draining=lambda: service.draining,
    )
    health = HealthRoutes(lambda: pool.states, draining=lambda: service.draining)

    def make_site(routes: list[Any]) -> Site:
        return Site(
            routes,
            clock=reactor,
            recorder=metrics,
            new_request_id=lambda: secrets.token_hex(16),
            hsts_seconds=settings.hsts_seconds,
        )

    site = make_site([*events.routes(), *health.routes(), *(metrics_routes if settings.metrics_on_tls else [])])
    tls = TlsConnections(server_context(settings.tls_cert_file, settings.tls_key_file))
    secure = TLSMemoryBIOFactory(tls, False, ConnectionFactory(callers, site, secure=True), reactor)
    secure.noisy = False
    endpoints = [Endpoint("https", "TLS_PORT", settings.bind_host, settings.tls_port, secure)]
    if settings.http_port is not None:
        plain = ConnectionFactory(callers, site, secure=False)
        endpoints.append(Endpoint("http", "HTTP_PORT", settings.bind_host, settings.http_port, plain))
    exporter = ConnectionFactory(scrapers, make_site(metrics_routes), secure=False)
    endpoints.append(
        Endpoint(
            "metrics", "OTEL_PROMETHEUS_PORT", settings.otel_prometheus_host, settings.otel_prometheus_port, exporter
        )
    )
    service = AITicket(
        reactor=reactor,
        logs=Logs(settings.log_level, settings.log_format, payloads_a_minute(settings.log_payloads), reactor=reactor),
        warnings=loaded.warnings,
        endpoints=endpoints,
        connections=[callers, scrapers],
        site=site,
        reloadable=Reloadable(token_file, tls, settings.tls_cert_file, settings.tls_key_file),
        reload_interval=settings.ai_ticket_auth_token_reload_interval,
        grace=settings.shutdown_grace_seconds,
        in_thread=lambda call: deferToThreadPool(reactor, reactor.getThreadPool(), call),
    )
    for child in children:
        child.setServiceParent(service)
    return service


def _make_pool(settings: Settings, reactor: Any, random: Random) -> tuple[Pool, list[Service]]:
    ranks = parse_api_urls(settings.koboldcpp_api_url)
    count = sum(len(rank) for rank in ranks)
    passwords = iter(parse_passwords(settings.koboldcpp_password, count))
    slots = iter(parse_slots(settings.koboldcpp_slots, count))
    children: list[Service] = []
    http, kept_http = (
        make_http_client(
            reactor,
            ca_file=settings.koboldcpp_ca_file,
            connect_timeout=settings.koboldcpp_connect_timeout_seconds,
            keep=keep,
        )
        for keep in (False, True)
    )

    def make_backend(address: BackendAddress) -> KoboldBackend:
        password, own_slots = next(passwords), next(slots)
        if address.url is None:
            local = _make_local(address, own_slots, reactor, random)
            children.append(local)
            locate: Callable[[], Location | None] = local.location
        else:
            location = Location(address.url, password)
            locate = lambda: location  # noqa: E731
        return KoboldBackend(
            address.name,
            ModelServer(http, kept_http, reactor, locate),
            clock=reactor,
            timeouts=BackendTimeouts(
                settings.koboldcpp_first_token_timeout_seconds, settings.koboldcpp_idle_timeout_seconds
            ),
            slots=own_slots,
            new_key=lambda: "AT" + secrets.token_hex(16),
        )

    pool = Pool(
        [[make_backend(address) for address in rank] for rank in ranks],
        clock=reactor,
        random=random.random,
        policy=make_retry_policy(
            max_attempts=settings.koboldcpp_max_attempts,
            silence_is_curable=settings.koboldcpp_first_token_timeout_seconds is not None,
            random=random.random,
        ),
    )
    children += [Prober(member, reactor, random.random) for member in pool.members]
    return pool, children


def _make_local(address: BackendAddress, slots: int | None, reactor: Any, random: Random) -> LocalServer:
    return LocalServer(
        processes=reactor,
        clock=reactor,
        model=model_file(address.model_path),
        slots=slots or 1,
        make_key=lambda: secrets.token_hex(32),
        jitter=random.random,
        environ={name: value for name, value in os.environ.items() if name not in variables()}
        # llama.cpp's threads else spin while they wait for each other: on a busy machine that took ten times as long.
        | {"OMP_WAIT_POLICY": "passive"},
    )
