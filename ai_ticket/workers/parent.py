"""The parent process: the ports, the quotas, the queue and the slots of all workers, and the workers themselves."""

import gc
import os
from collections.abc import Callable
from math import ceil
from random import Random
from typing import Any

from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from twisted.internet.interfaces import IReactorTime
from twisted.internet.threads import deferToThreadPool

from ai_ticket import preflight, twistd
from ai_ticket.assembly import (
    Locate,
    environment_of_children,
    forgetting,
    make_invalid_tokens,
    make_limiter,
    make_pipeline,
    make_pool,
    read_token_file,
)
from ai_ticket.backend.kobold import KoboldBackend
from ai_ticket.environment import Loaded
from ai_ticket.interfaces import Limiter
from ai_ticket.listening import Endpoint, Listeners
from ai_ticket.memory import memory_limit, used_memory
from ai_ticket.overload import LoopWatch
from ai_ticket.pipeline.fair import FairPipeline
from ai_ticket.reload import LiveSettings, Reloadable
from ai_ticket.service import AITicket
from ai_ticket.settings import Settings
from ai_ticket.surface import make_exporter
from ai_ticket.systemd import Systemd, sockets_at_start
from ai_ticket.telemetry.logs import Logs
from ai_ticket.telemetry.logs_output import Descriptor, Stream, standard_output
from ai_ticket.telemetry.metrics import Metrics, Scrapes, rendered
from ai_ticket.telemetry.payloads import payloads_a_minute
from ai_ticket.tokens import Token, merge, parse_token_list
from ai_ticket.web.tls import TlsConnections
from ai_ticket.workers.certificate import context_of, read_pem
from ai_ticket.workers.crew import Crew
from ai_ticket.workers.ending import CrewDrain
from ai_ticket.workers.families import Collected, collected, merged
from ai_ticket.workers.generations import GenerationsOfAll
from ai_ticket.workers.link import Link
from ai_ticket.workers.messages import InForce, Learnt, Outlook, Pem, Start
from ai_ticket.workers.process import Launcher, Port, passed
from ai_ticket.workers.relayed import RelayedBackend

_NOT_THEIRS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID")


class Shared:
    """What is in force in all workers. A change is told to all, and to those that start later."""

    def __init__(self, settings: Settings, count: int, pem: Pem):
        self._count = count
        self._enabled = settings.ai_ticket_auth
        self._payloads = payloads_a_minute(settings.log_payloads)
        configured = parse_token_list(settings.ai_ticket_auth_token or "")
        self._in_force = InForce(settings.log_level, 0, configured, [], pem, memory_limit(settings.memory_limit_mb))
        self.tell: Callable[[], None] = lambda: None

    def for_worker(self, number: int) -> InForce:
        """What is in force in a worker: of the payloads that may be logged it has its share."""
        return replace(self._in_force, payloads=(self._payloads + number) // self._count)

    def configure(self, tokens: list[Token]) -> None:
        """Accept these of the settings, as `Authenticator.configure`.

        @raise ValueError: nobody could call any more.
        """
        if self._enabled and not merge(tokens, self._in_force.file_tokens):
            raise ValueError("no token would be left")
        self._change(configured_tokens=tokens)

    def accept(self, tokens: list[Token]) -> None:
        """Accept these of the token file, as `Authenticator.accept`."""
        self._change(file_tokens=tokens)

    def log_from(self, level: str) -> None:
        """Log from this level on."""
        self._change(log_level=level)

    def log_payloads(self, a_minute: int) -> None:
        """Log so many payloads a minute, all workers together."""
        self._payloads = a_minute
        self._change()

    def limit_memory(self, limit: int | None) -> None:
        """Keep the memory of all processes within so many bytes."""
        self._change(memory_limit=limit)

    def serve(self, pem: Pem) -> None:
        """Show new connections this certificate."""
        self._change(pem=pem)

    def _change(self, **fields: Any) -> None:
        self._in_force = replace(self._in_force, **fields)
        self.tell()


class Office:
    """What the parent does for all workers (see `link.Service`)."""

    def __init__(
        self,
        clock: IReactorTime,
        *,
        limiters: dict[str, Limiter],
        pipeline: FairPipeline,
        registry: CollectorRegistry,
        timeout: float,
    ):
        """@param timeout: of an event, in seconds."""
        self.clock = clock
        self.limiters = limiters
        self.pipeline = pipeline
        self.crew: Crew
        self.generations = GenerationsOfAll(
            lambda: (pipeline.depth, pipeline.in_flight), lambda: [*self.crew.generations]
        )
        self.metrics = Scrapes(self._render, clock).get
        """The metrics of the whole service, and their type, for an Accept header."""
        self._registry = registry
        self._timeout = timeout
        self._outlook = self.outlook

    @property
    def outlook(self) -> Outlook:
        """How things are in the pipeline."""
        return Outlook(self.pipeline.batch_window, self.pipeline.is_roomy(self._timeout))

    def slots_changed(self) -> None:
        """There may be more slots, or fewer."""
        self.pipeline.look_again()
        self.look()

    def set_max_concurrency(self, most: int | None) -> None:
        """As `FairPipeline.set_max_concurrency`."""
        self.pipeline.set_max_concurrency(most)
        self.look()

    def look(self) -> None:
        """Tell all workers how things are in the pipeline, if that has changed."""
        found = self.outlook
        if found != self._outlook:
            self._outlook = found
            self.crew.tell(found)

    async def _render(self, accept: str) -> tuple[bytes, str]:
        families = await self.crew.families()
        return rendered(Collected(merged([collected(self._registry), families])), accept)


def build_parent(loaded: Loaded, reactor: Any, log: Stream | None, count: int) -> AITicket:
    """The service with so many workers."""
    settings = loaded.settings
    logs = Logs(settings.log_level, settings.log_format, 0, reactor=reactor, out=log)
    random = Random()  # noqa: S311 - only jitter comes from it
    registry = CollectorRegistry()
    metrics = Metrics(settings.metrics_namespace, registry)
    invalid_tokens = make_invalid_tokens(settings, reactor)
    limiter, limiting = make_limiter(settings, reactor, metrics)
    relayed: list[RelayedBackend] = []

    def tell(learnt: Learnt) -> None:
        crew.tell(learnt)

    def share(number: int, backend: KoboldBackend, locate: Locate) -> RelayedBackend:
        relayed.append(RelayedBackend(number, backend, locate, tell))
        return relayed[-1]

    pool, children = make_pool(settings, reactor, random, registry, share)
    pipeline = make_pipeline(settings, reactor, pool, registry)
    office = Office(
        reactor,
        limiters={"invalid_tokens": invalid_tokens} | ({} if limiter is None else {"quota": limiter}),
        pipeline=pipeline,
        registry=registry,
        timeout=settings.request_timeout_seconds,
    )

    pool.watch(office.slots_changed)
    # Absolute, for twistd may change the folder before they are read again.
    certificate_files = os.path.abspath(settings.tls_cert_file), os.path.abspath(settings.tls_key_file)
    pem = read_pem(*certificate_files, settings.tls_profile)
    shared = Shared(settings, count, pem)
    tls = TlsConnections(context_of(pem, settings.tls_profile))
    token_file = read_token_file(settings, shared)
    scrapers, exporter = make_exporter(settings, reactor, metrics, office.metrics)
    listeners = Listeners(
        reactor,
        [
            Endpoint("https", "TLS_PORT", settings.bind_host, settings.tls_port, None),
            Endpoint("http", "HTTP_PORT", settings.bind_host, settings.http_port, None),
            exporter,
        ],
        sockets_at_start,
    )

    def ports() -> list[Port]:
        return [Port(held.name, held.listening.fileno(), held.ours) for held in listeners.held]

    def start(number: int) -> Start:
        return Start(
            worker=number,
            reactor=type(reactor).__module__,
            settings=settings_of_worker(settings, count),
            ports=passed(ports()),
            in_force=shared.for_worker(number),
            backends=[backend.learnt for backend in relayed],
            outlook=office.outlook,
        )

    loop = LoopWatch(reactor, metrics.reactor_lag)
    crew = office.crew = Crew(
        count,
        clock=reactor,
        launch=Launcher(
            reactor,
            environ={name: value for name, value in environment_of_children().items() if name not in _NOT_THEIRS},
            folder=loaded.origin.folder,
            log_fd=(log if isinstance(log, Descriptor) else standard_output()).fileno(),
            ports=ports,
        ),
        make_link=lambda **told: Link(office, **told),
        start=start,
        used_memory=used_memory,
        lagging=lambda: loop.lagging,
        jitter=random.random,
    )
    shared.tell = lambda: crew.tell_each(shared.for_worker)
    metrics.watch("server_workers", "Processes that serve callers.", lambda: crew.serving)
    systemd = Systemd(os.environ, reactor, well=lambda: crew.well)

    def read_certificate() -> Callable[[], None]:
        pem = read_pem(*certificate_files, settings.tls_profile)
        context = context_of(pem, settings.tls_profile)

        def put_into_force() -> None:
            tls.context = context
            shared.serve(pem)

        return put_into_force

    def set_log_level(level: str) -> None:
        logs.level = level
        shared.log_from(level)

    service = AITicket(
        reactor=reactor,
        logs=logs,
        warnings=[*loaded.warnings, *preflight.warnings(loaded)],
        listeners=listeners,
        connections=[scrapers],
        drain=CrewDrain(
            reactor,
            delay=settings.shutdown_delay_seconds,
            grace=settings.shutdown_grace_seconds,
            crew=crew,
            listeners=listeners,
            scrapers=scrapers,
            pipeline=pipeline,
            systemd=systemd,
        ),
        systemd=systemd,
        reloadable=Reloadable(
            settings=LiveSettings(
                loaded,
                {
                    "AI_TICKET_AUTH_TOKEN": lambda text: shared.configure(parse_token_list(text or "")),
                    "LOG_LEVEL": set_log_level,
                    "LOG_PAYLOADS": lambda text: shared.log_payloads(payloads_a_minute(text)),
                    "MAX_CONCURRENCY": office.set_max_concurrency,
                    "MEMORY_LIMIT_MB": lambda megabytes: shared.limit_memory(memory_limit(megabytes)),
                },
            ),
            token_file=token_file,
            tls=tls,
            certificate_file=certificate_files[0],
            key_file=certificate_files[1],
            tls_profile=settings.tls_profile,
            read_certificate=read_certificate,
        ),
        reload_interval=settings.ai_ticket_auth_token_reload_interval,
        in_thread=lambda call: deferToThreadPool(reactor, reactor.getThreadPool(), call),
        settle=gc.freeze,
        leave=lambda seconds: twistd.leave(seconds, logs.stop),
    )
    # They end in this order.
    for child in (crew, loop, pipeline, *children, *limiting, forgetting(invalid_tokens, reactor)):
        child.setServiceParent(service)
    return service


def settings_of_worker(settings: Settings, count: int) -> Settings:
    """The settings for a worker: without what it need not know, and with its share of what there may be in all."""
    return replace(
        settings,
        ai_ticket_auth_token=None,
        redis_url=None,
        max_connections=ceil(settings.max_connections / count),
        max_connections_per_client=ceil(settings.max_connections_per_client / count),
    )
