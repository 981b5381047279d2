"""Parts of the service put together from its settings, for `tap`, the composition root."""

import gc
import os
import secrets
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry
from twisted.application.internet import TimerService
from twisted.application.service import Service

from ai_ticket.backend.address import BackendAddress, Location, parse_api_urls, parse_passwords, parse_slots
from ai_ticket.backend.dialect import ENDPOINTS
from ai_ticket.backend.http_client import make_http_client
from ai_ticket.backend.kobold import BackendTimeouts, KoboldBackend
from ai_ticket.backend.local import LocalServer
from ai_ticket.backend.model import model_file
from ai_ticket.backend.pool import Pool
from ai_ticket.backend.prober import Prober
from ai_ticket.backend.retry import make_retry_policy
from ai_ticket.backend.server import ModelServer
from ai_ticket.interfaces import Backend, Limiter
from ai_ticket.limit.address import parse_redis_url
from ai_ticket.limit.memory import MemoryLimiter
from ai_ticket.listening import Listeners
from ai_ticket.memory import release_memory
from ai_ticket.overload import MemoryWatch, Strain
from ai_ticket.pipeline.fair import FairPipeline
from ai_ticket.settings import Settings, variables
from ai_ticket.telemetry.backend_metrics import BackendMetrics, watch_backends
from ai_ticket.telemetry.metrics import Metrics
from ai_ticket.telemetry.pipeline_metrics import PipelineMetrics
from ai_ticket.tokens import Token
from ai_ticket.web.auth import INVALID_TOKENS, INVALID_TOKENS_SECONDS, AcceptsTokens, Authenticator, TokenFile
from ai_ticket.web.connections import Connections

SHED_AT_A_TIME = 256
"""Idle connections that are closed each second when memory is short: more would hold up those that are not idle."""


def make_limiter(settings: Settings, reactor: Any, metrics: Metrics) -> tuple[Limiter | None, list[Service]]:
    """The quotas, if there are any, and what runs for them in the background."""
    if not settings.rate_limit_requests:
        return None, []
    limit, window = settings.rate_limit_requests, settings.rate_limit_window_seconds
    memory = MemoryLimiter(reactor, limit=limit, window=window, max_clients=settings.rate_limit_max_clients)
    forgets = forgetting(memory, reactor)
    if settings.rate_limit_backend == "memory" or settings.redis_url is None:
        return memory, [forgets]
    # Imported here, because the package that they need is an extra, and imports the global reactor.
    from ai_ticket.limit.fallback import FallbackLimiter  # noqa: PLC0415
    from ai_ticket.limit.redis import RedisLimiter  # noqa: PLC0415

    redis = RedisLimiter(reactor, parse_redis_url(settings.redis_url), limit=limit, window=window)
    fallback = FallbackLimiter(redis, memory, reactor)
    metrics.watch(
        "rate_limit_redis_up",
        "1 while calls are counted in Redis, 0 while in the memory of this process.",
        lambda: fallback.available,
    )
    return fallback, [fallback, forgets]


def make_invalid_tokens(settings: Settings, reactor: Any) -> MemoryLimiter:
    """How many invalid tokens an address may send."""
    return MemoryLimiter(
        reactor, limit=INVALID_TOKENS, window=INVALID_TOKENS_SECONDS, max_clients=settings.rate_limit_max_clients
    )


def make_authenticator(
    settings: Settings, tokens: list[Token], metrics: Metrics, invalid_tokens: Limiter
) -> Authenticator:
    """What knows callers by these tokens of the settings, and by those of the token file once it is told them."""
    return Authenticator(
        tokens,
        enabled=settings.ai_ticket_auth,
        recorder=metrics,
        invalid_tokens=invalid_tokens,
        trusted_proxies=settings.trust_proxy_count,
        quota_by=settings.rate_limit_by,
    )


def read_token_file(settings: Settings, authenticator: AcceptsTokens) -> TokenFile | None:
    """The token file, if there is one, whose tokens are in force from now on. Blocks while it is read.

    @raise OSError: it can't be read. @raise ValueError: it is malformed or empty.
    """
    if not settings.ai_ticket_auth or settings.ai_ticket_auth_token_file is None:
        return None
    # Absolute, for twistd may change the folder before it is read again.
    token_file = TokenFile(os.path.abspath(settings.ai_ticket_auth_token_file), authenticator)
    token_file.load()
    return token_file


def forgetting(limiter: MemoryLimiter, reactor: Any) -> Service:
    """Frees the memory of clients who no longer call."""
    timer = TimerService(1.0, limiter.forget_idle)
    timer.clock = reactor
    return timer


def make_pipeline(settings: Settings, reactor: Any, pool: Pool, registry: CollectorRegistry) -> FairPipeline:
    """The queue before the pool, and its metrics."""
    metrics = PipelineMetrics(settings.metrics_namespace, registry)
    pipeline = FairPipeline(
        pool,
        clock=reactor,
        recorder=metrics,
        max_concurrency=settings.max_concurrency,
        queue_limit=settings.queue_limit,
        batch_size=settings.batch_size,
        batch_linger=settings.batch_linger_seconds,
        check_backend=pool.check,
    )
    pool.watch(pipeline.look_again)
    metrics.watch(
        depth=lambda: pipeline.depth,
        in_flight=lambda: pipeline.in_flight,
        max_concurrency=lambda: pipeline.max_concurrency,
    )
    return pipeline


Locate = Callable[[], Location | None]
"""Says where a model server is now."""


def make_pool(
    settings: Settings,
    reactor: Any,
    random: Random,
    registry: CollectorRegistry,
    share: Callable[[int, KoboldBackend, Locate], Backend] = lambda number, backend, locate: backend,
) -> tuple[Pool, list[Service]]:
    """The backends with their metrics, and what runs for them in the background.

    @param share: what the pool is to have in the place of a backend, given its number in order of rank.
    """
    children: list[Service] = []

    def run_local(address: BackendAddress, slots: int | None) -> Locate:
        local = _make_local(address, slots, reactor, random)
        children.append(local)
        return local.location

    numbers = count()
    pool = Pool(
        [
            [share(next(numbers), backend, locate) for backend, locate in rank]
            for rank in make_backends(settings, reactor, registry, run_local)
        ],
        clock=reactor,
        random=random.random,
        policy=make_retry_policy(
            max_attempts=settings.koboldcpp_max_attempts,
            silence_is_curable=settings.koboldcpp_first_token_timeout_seconds is not None,
            random=random.random,
        ),
    )
    watch_backends(settings.metrics_namespace, registry, pool.members)
    children += [Prober(member, reactor, random.random) for member in pool.members]
    return pool, children


def make_backends(
    settings: Settings,
    reactor: Any,
    registry: CollectorRegistry,
    locate_local: Callable[[BackendAddress, int | None], Locate],
) -> list[list[tuple[KoboldBackend, Locate]]]:
    """The backends by rank, each with what says where it is.

    @param locate_local: the same for a bundled one that is to have so many slots.
    """
    ranks = parse_api_urls(settings.koboldcpp_api_url)
    recorder = BackendMetrics(
        settings.metrics_namespace,
        registry,
        [address.name for rank in ranks for address in rank],
        [endpoint.path for endpoint in ENDPOINTS],
    )
    total = sum(len(rank) for rank in ranks)
    passwords = iter(parse_passwords(settings.koboldcpp_password, total))
    slots = iter(parse_slots(settings.koboldcpp_slots, total))
    http = make_http_client(
        reactor,
        ca_file=settings.koboldcpp_ca_file,
        connect_timeout=settings.koboldcpp_connect_timeout_seconds,
    )

    def make_backend(address: BackendAddress) -> tuple[KoboldBackend, Locate]:
        password, own_slots = next(passwords), next(slots)
        if address.url is None:
            locate = locate_local(address, own_slots)
        else:
            location = Location(address.url, password)
            locate = lambda: location  # noqa: E731
        backend = KoboldBackend(
            address.name,
            ModelServer(http, reactor, locate),
            clock=reactor,
            timeouts=BackendTimeouts(
                settings.koboldcpp_first_token_timeout_seconds, settings.koboldcpp_idle_timeout_seconds
            ),
            slots=own_slots,
            new_key=lambda: "AT" + secrets.token_hex(16),
            recorder=recorder,
        )
        return backend, locate

    return [[make_backend(address) for address in rank] for rank in ranks]


def environment_of_children() -> dict[str, str]:
    """What the processes that we start find in their environment: what we do, but for our settings."""
    return {name: value for name, value in os.environ.items() if name not in variables()}


def _make_local(address: BackendAddress, slots: int | None, reactor: Any, random: Random) -> LocalServer:
    return LocalServer(
        processes=reactor,
        clock=reactor,
        model=model_file(address.model_path),
        slots=slots or 1,
        make_key=lambda: secrets.token_hex(32),
        jitter=random.random,
        environ=environment_of_children()
        # llama.cpp's threads else spin while they wait for each other: on a busy machine that took ten times as long.
        | {"OMP_WAIT_POLICY": "passive"},
    )


def make_memory_watch(
    reactor: Any,
    metrics: Metrics,
    callers: Connections,
    listeners: Listeners,
    *,
    limit: int | None,
    used: Callable[[], int | None],
) -> MemoryWatch:
    """What keeps the memory within its limit, and its metrics. `limit`, `used`: as `MemoryWatch` has them."""

    def relieve(strain: Strain) -> None:
        callers.keep(strain < Strain.BRIEF)
        if strain >= Strain.REFUSING:
            callers.shed(SHED_AT_A_TIME)
        listeners.accept(strain < Strain.CLOSED)

    watch = MemoryWatch(
        reactor,
        limit=limit,
        used=used,
        release=release_memory,
        collect=gc.collect,
        act=relieve,
    )
    metrics.watch(
        "overload_level",
        "Memory is short: 0 no, 1 connections are not kept, 2 and events refused, 3 and nobody let in.",
        lambda: watch.strain,
    )
    metrics.watch("memory_limit_bytes", "What memory is measured against; 0: nothing.", lambda: watch.limit or 0)
    return watch
