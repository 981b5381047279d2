"""Probing: often while a backend is down, seldom while it is up, never two at a time."""

from typing import Any

from msgspec.structs import replace
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ai_ticket.backend.prober import Prober
from ai_ticket.event import Completion, Event
from ai_ticket.interfaces import BackendState, Sink
from ai_ticket.spans import NO_SPAN, Span


class ProbedBackend:
    """A `Backend` that is only probed; each probe waits for the test."""

    def __init__(self) -> None:
        self.state = BackendState(name="b", up=False, slots=1)
        self.probes: list[Deferred[Any]] = []

    async def complete(
        self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
    ) -> Completion:
        raise NotImplementedError

    async def probe(self) -> BackendState:
        self.probes.append(Deferred())
        up = await self.probes[-1]
        self.state = replace(self.state, up=up, error=None if up else "gone")
        return self.state


def test_probing() -> None:
    clock, backend = Clock(), ProbedBackend()
    prober = Prober(backend, clock, lambda: 0.5)
    prober.startService()
    clock.advance(60)
    assert len(backend.probes) == 1, "the next waits for the one under way"
    backend.probes[0].callback(False)
    clock.advance(0.9)
    assert len(backend.probes) == 1
    clock.advance(0.2)
    backend.probes[1].callback(True)
    clock.advance(9.9)
    assert len(backend.probes) == 2
    clock.advance(0.2)
    assert len(backend.probes) == 3
    prober.stopService()
    assert not clock.getDelayedCalls()


def test_jitter() -> None:
    for random, seconds in ((0.0, 0.8), (1.0, 1.2)):
        clock, backend = Clock(), ProbedBackend()
        prober = Prober(backend, clock, lambda random=random: random)  # type: ignore[misc]
        prober.startService()
        backend.probes[0].callback(False)
        [call] = clock.getDelayedCalls()
        assert abs(call.getTime() - seconds) < 1e-9
        prober.stopService()


def test_stopping_between_probes_and_twice() -> None:
    clock, backend = Clock(), ProbedBackend()
    prober = Prober(backend, clock, lambda: 0.5)
    prober.startService()
    backend.probes[0].callback(True)
    prober.stopService()
    prober.stopService()
    assert not clock.getDelayedCalls()


def test_an_event_that_finds_it_down_brings_the_next_probe_forward() -> None:
    clock, backend = Clock(), ProbedBackend()
    prober = Prober(backend, clock, lambda: 0.5)
    prober.startService()
    backend.probes[0].callback(True)
    clock.advance(2.5)
    backend.state = replace(backend.state, up=False)
    clock.advance(1)
    assert len(backend.probes) == 2
    prober.stopService()
    assert not clock.getDelayedCalls()
