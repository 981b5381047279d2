"""The composition root: the one place that imports a reactor, and that puts the rooms together."""

import os
import socket
import sys
from importlib import import_module
from random import Random
from typing import Any
from uuid import uuid4

from prometheus_client import CollectorRegistry
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import globalLogBeginner
from twisted.python.usage import Options as UsageOptions

from ai_ticket import preflight, twistd
from ai_ticket.assembly import (
    forgetting,
    make_authenticator,
    make_invalid_tokens,
    make_limiter,
    make_pipeline,
    make_pool,
    read_token_file,
)
from ai_ticket.environment import ConfigurationError, Loaded, load
from ai_ticket.listening import Listeners
from ai_ticket.memory import memory_limit, settle_memory, used_memory
from ai_ticket.pipeline.generations import Generations
from ai_ticket.reload import LiveSettings, Reloadable
from ai_ticket.service import AITicket
from ai_ticket.surface import make_surface
from ai_ticket.systemd import Systemd, sockets_at_start
from ai_ticket.telemetry.logs import Logs
from ai_ticket.telemetry.logs_output import Stream
from ai_ticket.telemetry.metrics import Metrics, Scrapes
from ai_ticket.telemetry.payloads import payloads_a_minute
from ai_ticket.telemetry.tracing_setup import make_tracing
from ai_ticket.tokens import parse_token_list
from ai_ticket.web.tls import TlsConnections, server_context
from ai_ticket.workers.channel import from_parent, read_one
from ai_ticket.workers.cores import worker_count
from ai_ticket.workers.parent import build_parent
from ai_ticket.workers.process import CHANNEL_FD
from ai_ticket.workers.worker import build_worker


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
        return build_parent(loaded, reactor, log, count)
    logs = Logs(
        settings.log_level, settings.log_format, payloads_a_minute(settings.log_payloads), reactor=reactor, out=log
    )
    random = Random()  # noqa: S311 - only jitter comes from it
    registry = CollectorRegistry()
    metrics = Metrics(settings.metrics_namespace, registry)
    invalid_tokens = make_invalid_tokens(settings, reactor)
    authenticator = make_authenticator(
        settings, parse_token_list(settings.ai_ticket_auth_token or ""), metrics, invalid_tokens
    )
    # Absolute, for twistd may change the folder before they are read again.
    certificate_file, key_file = os.path.abspath(settings.tls_cert_file), os.path.abspath(settings.tls_key_file)
    token_file = read_token_file(settings, authenticator)
    tracing = make_tracing(
        settings,
        clock=reactor,
        call_in_reactor=reactor.callFromThread,
        random=random,
        instance_id=str(uuid4()),
    )
    pool, children = make_pool(settings, reactor, random, registry)
    pipeline = make_pipeline(settings, reactor, pool, registry)
    generations = Generations(pipeline, reactor, lambda: (pipeline.depth, pipeline.in_flight))
    limiter, limiting = make_limiter(settings, reactor, metrics)
    tls = TlsConnections(server_context(certificate_file, key_file, settings.tls_profile))
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
        pipeline=generations,
        drained=pipeline,
        generations=generations,
        tokenize=pool.tokenize,
        states=lambda: pool.states,
        settle=lambda: Deferred.fromCoroutine(pool.settle()),
        tls=tls,
        render=Scrapes(render, reactor).get,
        exported=True,
        listen=lambda endpoints: Listeners(reactor, endpoints, sockets_at_start),
        systemd=systemd,
        memory_limit=memory_limit(settings.memory_limit_mb),
        used_memory=used_memory,
    )
    live_settings = LiveSettings(
        loaded,
        {
            "AI_TICKET_AUTH_TOKEN": lambda text: authenticator.configure(parse_token_list(text or "")),
            "LOG_LEVEL": lambda level: setattr(logs, "level", level),
            "LOG_PAYLOADS": lambda text: setattr(logs.payloads, "a_minute", payloads_a_minute(text)),
            "MAX_CONCURRENCY": pipeline.set_max_concurrency,
            "MEMORY_LIMIT_MB": lambda megabytes: setattr(surface.memory, "limit", memory_limit(megabytes)),
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
            tls_profile=settings.tls_profile,
        ),
        reload_interval=settings.ai_ticket_auth_token_reload_interval,
        in_thread=lambda call: deferToThreadPool(reactor, reactor.getThreadPool(), call),
        settle=settle_memory,
        leave=lambda seconds: twistd.leave(seconds, logs.stop),
    )
    metrics.watch("server_workers", "Processes that serve callers.", lambda: 1)
    # They end in this order: callers' quotas after what they ask for, and last tracing, which tells of all.
    background = (surface.loop, surface.memory, pipeline, *children, *limiting)
    for child in (*background, forgetting(invalid_tokens, reactor), tracing):
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

    service: Any = build_worker(start, channel, reactor)
    globalLogBeginner.beginLoggingTo([service.logs])
    service.startService()
    running: Any = reactor
    running.addSystemEventTrigger("before", "shutdown", service.stopService)
    running.run(installSignalHandlers=False)
