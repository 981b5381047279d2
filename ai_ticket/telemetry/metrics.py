"""Prometheus metrics of the HTTP surface, in a registry of their own."""

from collections.abc import Callable

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

from ai_ticket import __version__

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
OVERHEAD_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
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

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All families, as `rendered`."""
        return rendered(self._registry, accept)


def rendered(families: Collector, accept: str) -> tuple[bytes, str]:
    """All families, and the type of the text: OpenMetrics, with exemplars, for who accepts it."""
    if "application/openmetrics-text" in accept:
        text: bytes = openmetrics.generate_latest(families)  # type: ignore[no-untyped-call]
        return text, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(families), CONTENT_TYPE_PLAIN_0_0_4
