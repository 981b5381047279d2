"""A tracer whose spans stay in memory, for tests."""

from random import Random

from twisted.internet.interfaces import IReactorTime

from ai_ticket.telemetry.tracing import RecordedSpan, Sampler, SpanLimits, SpanTracer, make_sampler


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
