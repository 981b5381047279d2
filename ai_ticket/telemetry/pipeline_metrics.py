"""Prometheus metrics of the pipeline."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ai_ticket import errors
from ai_ticket.errors import InternalError
from ai_ticket.telemetry.metrics import SECONDS

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OUTCOMES = (
    "ok",
    "cancelled",
    *sorted({one.code for one in vars(errors).values() if isinstance(one, type) and hasattr(one, "code")}),
)


class PipelineMetrics:
    """Counts what happens in the pipeline (the `PipelineRecorder` seam)."""

    def __init__(self, namespace: str, registry: CollectorRegistry):
        self._namespace = namespace
        self._registry = registry
        events = Counter(
            "pipeline_events",
            "Events that have ended, those that were refused included.",
            ("outcome",),
            namespace=namespace,
            registry=registry,
        )
        self._events = {outcome: events.labels(outcome) for outcome in OUTCOMES}
        self._waits = self._histogram("queue_wait_seconds", "Time from an event's arrival in the queue to its turn.")
        self._handler_durations = self._histogram(
            "handler_duration_seconds", "Time from an event's turn to its end, retries included."
        )
        self._batch_durations = self._histogram(
            "batch_duration_seconds", "Time until the last of the events that were taken together has ended."
        )
        self._batch_sizes = self._histogram("batch_size", "Events taken from the queue together.", SIZES)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(f"pipeline_{name}", what, namespace=self._namespace, registry=self._registry, buckets=buckets)

    def watch(
        self, *, depth: Callable[[], float], in_flight: Callable[[], float], max_concurrency: Callable[[], float]
    ) -> None:
        """Read these whenever the metrics are rendered."""
        for name, what, value in (
            ("queue_depth", "Events that wait for a slot, those of batches included.", depth),
            ("in_flight", "Events under way.", in_flight),
            ("max_concurrency", "Events that may be under way at a time.", max_concurrency),
        ):
            gauge = Gauge(f"pipeline_{name}", what, namespace=self._namespace, registry=self._registry)
            gauge.set_function(value)

    def event_began(self, waited: float) -> None:
        """An event's turn has come."""
        self._waits.observe(waited)

    def event_ended(self, outcome: str, handled: float | None) -> None:
        """An event has ended."""
        self._events[outcome if outcome in self._events else InternalError.code].inc()
        if handled is not None:
            self._handler_durations.observe(handled)

    def batch_ended(self, size: int, seconds: float) -> None:
        """The last of the events that were taken together has ended."""
        self._batch_sizes.observe(size)
        self._batch_durations.observe(seconds)
