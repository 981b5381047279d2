"""Prometheus metrics of the backends."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ai_ticket.interfaces import AttemptOutcome, BackendState
from ai_ticket.telemetry.metrics import SECONDS
from ai_ticket.telemetry.pipeline_metrics import OUTCOMES

_FAILURES = [outcome for outcome in OUTCOMES if outcome.startswith("api_")]
ATTEMPT_OUTCOMES = ("ok", "cancelled", "deadline_exceeded", "context_length_exceeded", "internal_error", *_FAILURES)


class BackendMetrics:
    """Counts what happens at the backends (the `BackendRecorder` seam)."""

    def __init__(self, namespace: str, registry: CollectorRegistry, backends: Sequence[str], endpoints: Sequence[str]):
        """@param backends, endpoints: all that there may be."""

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, namespace=namespace, registry=registry)

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(name, what, ("backend",), namespace=namespace, registry=registry, buckets=SECONDS)

        requests = counter("kobold_requests", "Attempts at a completion.", "backend", "endpoint", "outcome")
        self._requests = {
            (backend, endpoint, outcome): requests.labels(backend, endpoint, outcome)
            for backend in backends
            for endpoint in endpoints
            for outcome in ATTEMPT_OUTCOMES
        }
        failures = counter("kobold_request_failures", "Attempts that failed.", "backend", "error")
        self._failures = {
            (backend, error): failures.labels(backend, error)
            for backend in backends
            for error in ATTEMPT_OUTCOMES
            if error not in ("ok", "cancelled")
        }
        durations = histogram("kobold_request_duration_seconds", "Time from an attempt's begin to its end.")
        self._durations = {backend: durations.labels(backend) for backend in backends}
        first_tokens = histogram("kobold_time_to_first_token_seconds", "Time until some text came.")
        self._first_tokens = {backend: first_tokens.labels(backend) for backend in backends}
        tokens = counter("kobold_tokens", "Tokens, as far as the backends tell them.", "backend", "kind")
        self._tokens = {
            (backend, kind): tokens.labels(backend, kind) for backend in backends for kind in ("prompt", "completion")
        }

    def attempt_ended(self, attempt: AttemptOutcome) -> None:
        """An attempt has ended."""
        outcome = attempt.outcome if attempt.outcome in ATTEMPT_OUTCOMES else "internal_error"
        self._requests[attempt.backend, attempt.endpoint, outcome].inc()
        if (attempt.backend, outcome) in self._failures:
            self._failures[attempt.backend, outcome].inc()
        self._durations[attempt.backend].observe(attempt.seconds)
        if attempt.first_token is not None:
            self._first_tokens[attempt.backend].observe(attempt.first_token)
        if attempt.usage is not None:
            self._tokens[attempt.backend, "prompt"].inc(attempt.usage.prompt_tokens)
            self._tokens[attempt.backend, "completion"].inc(attempt.usage.completion_tokens)


class _Circuit(Protocol):
    @property
    def state(self) -> int:
        """0 closed, 1 half-open, 2 open."""


class BackendGauges(Protocol):
    """A backend as it is now."""

    @property
    def state(self) -> BackendState:
        """What was last learnt of it."""

    @property
    def circuit(self) -> _Circuit:
        """Its circuit."""

    @property
    def running(self) -> int:
        """Attempts under way."""


def watch_backends(namespace: str, registry: CollectorRegistry, members: Sequence[BackendGauges]) -> None:
    """Read these whenever the metrics are rendered."""

    def gauge(name: str, what: str, value: Callable[[BackendGauges], float]) -> None:
        family = Gauge(name, what, ("backend",), namespace=namespace, registry=registry)
        for member in members:
            family.labels(member.state.name).set_function(partial(value, member))

    gauge("kobold_backend_up", "1 while the backend answers, 0 while it does not.", lambda member: member.state.up)
    gauge("kobold_backend_in_flight", "Attempts under way.", lambda member: member.running)
    gauge("kobold_circuit_state", "0 closed, 1 half-open, 2 open.", lambda member: member.circuit.state)
