"""For tests of traces: a tracer whose spans stay in memory, and a clock that is called from other threads."""

import queue
from collections.abc import Callable
from random import Random
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock

from ai_ticket.telemetry.tracing import RecordedSpan, Sampler, SpanLimits, SpanTracer, make_sampler

PATIENCE = 10.0
"""How many real seconds another thread may take before the test fails."""


class MemoryTracer(SpanTracer):
    """Records everything, or what the sampler picks. `ended` has the spans that have ended, in that order."""

    def __init__(
        self, clock: IReactorTime, *, sampler: Sampler | None = None, limits: SpanLimits | None = None, seed: int = 1
    ):
        self.ended: list[RecordedSpan] = []
        super().__init__(
            clock=clock,
            random=Random(seed),
            sampler=sampler or make_sampler("always_on", 1.0),
            limits=limits or SpanLimits(),
            finished=self.ended.append,
        )

    def named(self, name: str) -> RecordedSpan:
        """The one span of that name that has ended."""
        [span] = [span for span in self.ended if span.name == name]
        return span


class FakeReactor(Clock):
    """A clock, and calls from other threads, which are made when the test asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: queue.Queue[Callable[[], object]] = queue.Queue()

    def callFromThread(self, call: Callable[..., object], *args: Any) -> None:
        self._calls.put(lambda: call(*args))

    def run_until(self, true: Callable[[], bool]) -> None:
        """Make the calls of other threads until it is true. Fails if it takes too long."""
        while not true():
            self.run_call()

    def run_call(self) -> None:
        """Make the next one, when it comes."""
        self._calls.get(timeout=PATIENCE)()

    def run_calls(self) -> None:
        """Make those that have come."""
        while not self._calls.empty():
            self._calls.get()()


def stop(reactor: FakeReactor, service: Any) -> None:
    """Stop it, with the thread's part done."""
    done: list[object] = []
    service.stopService().addCallback(done.append)
    reactor.run_until(lambda: bool(done))
    assert reactor.getDelayedCalls() == []
