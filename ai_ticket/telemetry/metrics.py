"""Prometheus metrics of the HTTP surface, in a registry of their own."""

from collections.abc import Awaitable, Callable

from msgspec import Struct
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from twisted.internet.defer import DeferredLock
from twisted.internet.interfaces import IReactorTime

from ai_ticket import __version__

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
OVERHEAD_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SCRAPE_SECONDS = 1.0
END_REASONS = (
    "header_timeout",
    "body_timeout",
    "keepalive_timeout",
    "unread",
    "close_timeout",
    "max_connections",
    "max_connections_refused",
    "max_connections_per_client",
    "max_connections_per_client_refused",
)
_LABELS = ("route", "method", "status")


class Metrics:
    """Counts what happens at the HTTP surface (the `Recorder` seam), and renders it."""

    def __init__(self, namespace: str, registry: CollectorRegistry):
        self._namespace = namespace
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series, and nobody asks for them
        self._registry = registry
        self._requests = Counter(
            "server_requests", "Requests answered.", _LABELS, namespace=namespace, registry=registry
        )
        self._failures = Counter(
            "server_request_failures",
            "Requests answered with a status of 500 or above.",
            _LABELS,
            namespace=namespace,
            registry=registry,
        )
        self._durations = Histogram(
            "server_request_duration_seconds",
            "Time from a request's head to its answer.",
            _LABELS,
            namespace=namespace,
            registry=registry,
            buckets=SECONDS,
        )
        self._overheads = Histogram(
            "server_overhead_seconds",
            "Time that AI Ticket itself took of a request: less the wait for its body, its turn and the backend.",
            ("route",),
            namespace=namespace,
            registry=registry,
            buckets=OVERHEAD_SECONDS,
        )
        self._in_flight = Gauge(
            "server_requests_in_flight", "Requests being answered.", namespace=namespace, registry=registry
        )
        auth_failures = Counter(
            "server_auth_failures",
            "Requests refused for want of a valid token.",
            ("reason",),
            namespace=namespace,
            registry=registry,
        )
        self._auth_failures = {reason: auth_failures.labels(reason) for reason in ("missing", "invalid")}
        rate_limited = Counter(
            "server_rate_limited",
            "Requests refused because their client has sent too many.",
            ("reason",),
            namespace=namespace,
            registry=registry,
        )
        self._rate_limited = {reason: rate_limited.labels(reason) for reason in ("quota", "invalid_token")}
        handshakes = Counter(
            "tls_handshake_failures",
            "Connections that ended before TLS was up.",
            ("reason",),
            namespace=namespace,
            registry=registry,
        )
        self._handshakes = {reason: handshakes.labels(reason) for reason in ("protocol", "timeout", "closed")}
        ended = Counter(
            "server_connections_ended",
            "Connections, and streams of HTTP/2, that AI Ticket ended itself.",
            ("reason",),
            namespace=namespace,
            registry=registry,
        )
        self._ended = {reason: ended.labels(reason) for reason in END_REASONS}
        self._lag = Histogram(
            "reactor_lag_seconds",
            "How late the event loop was, asked ten times a second.",
            namespace=namespace,
            registry=registry,
            buckets=LAG_SECONDS,
        )
        build = Gauge("build_info", "The version that runs.", ("version",), namespace=namespace, registry=registry)
        build.labels(__version__).set(1)
        ProcessCollector(registry=registry)

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Read this whenever the metrics are rendered."""
        Gauge(name, what, namespace=self._namespace, registry=self._registry).set_function(value)

    def request_started(self) -> None:
        """A request's head has come."""
        self._in_flight.inc()

    def request_finished(
        self, route: str, method: str, status: int, seconds: float, trace_id: str | None = None
    ) -> None:
        """A request was answered, or its caller left."""
        labels = (route, method, str(status))
        self._in_flight.dec()
        self._requests.labels(*labels).inc()
        self._durations.labels(*labels).observe(seconds, None if trace_id is None else {"trace_id": trace_id})
        if status >= 500:
            self._failures.labels(*labels).inc()

    def overhead(self, route: str, seconds: float) -> None:
        """What of a request's time we took ourselves."""
        self._overheads.labels(route).observe(seconds)

    def authentication_failed(self, reason: str) -> None:
        """A request had no valid token."""
        self._auth_failures[reason].inc()

    def rate_limited(self, reason: str) -> None:
        """A request was refused because its client has sent too many."""
        self._rate_limited[reason].inc()

    def tls_handshake_failed(self, reason: str) -> None:
        """A connection ended before TLS was up."""
        self._handshakes[reason].inc()

    def connection_ended(self, reason: str) -> None:
        """We ended a connection, or a stream."""
        self._ended[reason].inc()

    def reactor_lag(self, seconds: float) -> None:
        """The event loop was so late."""
        self._lag.observe(seconds)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All families, as `rendered`."""
        return rendered(self._registry, accept)


def rendered(families: Collector, accept: str) -> tuple[bytes, str]:
    """All families, and the type of the text: OpenMetrics, with exemplars, for who accepts it."""
    if wants_openmetrics(accept):
        text: bytes = openmetrics.generate_latest(families)  # type: ignore[no-untyped-call]
        return text, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(families), CONTENT_TYPE_PLAIN_0_0_4


def wants_openmetrics(accept: str) -> bool:
    """Whether an Accept header names OpenMetrics."""
    return "application/openmetrics-text" in accept


Render = Callable[[str], Awaitable[tuple[bytes, str]]]
"""The metrics and the type of their text, for an Accept header."""


class _Scrape(Struct, frozen=True):
    """A rendered text, its type, and when it was made."""

    made: float
    answer: tuple[bytes, str]


class Scrapes:
    """What scrapers get: each form is rendered at most once a second, however many ask, for it takes milliseconds."""

    def __init__(self, render: Render, clock: IReactorTime):
        self._render = render
        self._clock = clock
        self._last: dict[bool, _Scrape] = {}
        self._one_at_a_time = DeferredLock()

    async def get(self, accept: str) -> tuple[bytes, str]:
        """The text and its type for an Accept header."""
        async with self._one_at_a_time:
            form = wants_openmetrics(accept)
            now = self._clock.seconds()
            last = self._last.get(form)
            if last is None or not 0 <= now - last.made < SCRAPE_SECONDS:
                last = self._last[form] = _Scrape(now, await self._render(accept))
            return last.answer
