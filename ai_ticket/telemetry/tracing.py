"""Spans: recorded here, in plain objects; what becomes of them once they have ended is `tracing_export`'s business."""

from collections.abc import Callable, Sequence
from math import isfinite
from random import Random

from msgspec import Struct
from twisted.internet.interfaces import IReactorTime

from ai_ticket.interfaces import NO_SPAN, Attributes, NoSpan, Span, SpanKind
from ai_ticket.telemetry.tracing_context import RANDOM, SAMPLED, TraceContext, parse

Attribute = str | bool | int | float | list[str]
Sampler = Callable[[str, bool | None], bool]
"""Whether to record a span of this trace (its id), whose caller records it, does not, or is not there (None)."""

_LARGEST = 2**63


class SpanLimits(Struct, frozen=True):
    """What a span may hold. What is beyond is left out; longer texts are cut."""

    attributes: int = 128
    characters: int = 4096
    links: int = 128


def make_sampler(name: str, ratio: float) -> Sampler:
    """The sampler that `OTEL_TRACES_SAMPLER` names.

    @param ratio: of the traces, 0 to 1; the same of them here as with every SDK of OpenTelemetry.
    """
    bound = {"always_on": 2**64, "always_off": 0, "traceidratio": round(ratio * 2**64)}[
        name.removeprefix("parentbased_")
    ]
    parent_decides = name.startswith("parentbased_")

    def sample(trace_id: str, parent: bool | None) -> bool:
        if parent_decides and parent is not None:
            return parent
        return int(trace_id[16:], 16) < bound

    return sample


class ForwardedSpan(NoSpan):
    """A span that is only handed on. All that is part of it is the same span."""

    __slots__ = ("context",)

    def __init__(self, context: TraceContext):
        self.context = context

    @property
    def trace_id(self) -> str | None:
        """32 hexadecimal digits."""
        return self.context.trace_id

    @property
    def span_id(self) -> str | None:
        """16 hexadecimal digits."""
        return self.context.span_id

    def headers(self) -> dict[str, str]:
        """`traceparent`, and `tracestate` where the caller sent one."""
        return self.context.headers()


class RecordedSpan(ForwardedSpan):
    """A span that is exported once it has ended. Times are the clock's, in seconds.

    `parent_id` is the span that it is part of, the caller's where `remote`; `links` are pairs of trace id and span id.
    """

    __slots__ = ("_tracer", "attributes", "began", "ended", "error", "kind", "links", "name", "parent_id", "remote")
    recording = True

    def __init__(
        self,
        tracer: "SpanTracer",
        *,
        name: str,
        kind: SpanKind,
        context: TraceContext,
        parent_id: str | None,
        remote: bool,
        began: float,
    ):
        super().__init__(context)
        self._tracer = tracer
        self.name = name
        self.kind = kind
        self.parent_id = parent_id
        self.remote = remote
        self.began = began
        self.ended: float | None = None
        self.error: str | None = None
        self.attributes: dict[str, Attribute] = {}
        self.links: list[tuple[str, str]] = []

    def child(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        attributes: Attributes | None = None,
        links: Sequence[Span] = (),
        at: float | None = None,
    ) -> Span:
        """Begin a span under this one."""
        context = self._tracer.child_context(self.context)
        began = self._tracer.now() if at is None else at
        span = RecordedSpan(
            self._tracer,
            name=name,
            kind=kind,
            context=context,
            parent_id=self.context.span_id,
            remote=False,
            began=began,
        )
        return span.begun_with(attributes, links)

    def begun_with(self, attributes: Attributes | None, links: Sequence[Span]) -> "RecordedSpan":
        """Itself, with these."""
        if attributes is not None:
            self.set(attributes)
        for other in links:
            self.link(other)
        return self

    def set(self, attributes: Attributes) -> None:
        """Keep these, within the limits."""
        if self.ended is not None:
            return
        limits = self._tracer.limits
        for name, value in attributes.items():
            if value is not None and (name in self.attributes or len(self.attributes) < limits.attributes):
                self.attributes[name] = _plain(value, limits.characters)

    def link(self, span: Span) -> None:
        """Keep a link to the other span, within the limits."""
        if self.ended is None and len(self.links) < self._tracer.limits.links:
            trace_id, span_id = span.trace_id, span.span_id
            if trace_id is not None and span_id is not None:
                self.links.append((trace_id, span_id))

    def fail(self, code: str) -> None:
        """Keep the code as `error.type`."""
        if self.ended is None:
            self.error = code
            self.attributes["error.type"] = code

    def end(self, at: float | None = None) -> None:
        """Hand it over to be exported. A clock that was set back meanwhile does not make it end before it began."""
        if self.ended is None:
            self.ended = max(self.began, self._tracer.now() if at is None else at)
            self._tracer.finished(self)


class SpanTracer:
    """Records what the sampler picks (the `Tracer` seam)."""

    def __init__(
        self,
        *,
        clock: IReactorTime,
        random: Random,
        sampler: Sampler,
        limits: SpanLimits,
        finished: Callable[[RecordedSpan], None],
    ):
        """@param finished: is handed each recorded span when it has ended."""
        self.now = clock.seconds
        self.limits = limits
        self.finished = finished
        self._bits = random.getrandbits
        self._sampler = sampler

    def start(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        traceparent: bytes | None = None,
        tracestate: bytes | None = None,
        attributes: Attributes | None = None,
        links: Sequence[Span] = (),
        at: float | None = None,
    ) -> Span:
        """Begin a span; where it is not sampled, one that only hands the trace on."""
        parent = None if traceparent is None else parse(traceparent, tracestate)
        if parent is None:
            trace_id, flags, state, parent_sampled = f"{self._bits(128) or 1:032x}", RANDOM, "", None
        else:
            trace_id, flags, state, parent_sampled = parent.trace_id, parent.flags, parent.state, parent.sampled
        sampled = self._sampler(trace_id, parent_sampled)
        context = TraceContext(trace_id, self._span_id(), flags | SAMPLED if sampled else flags & ~SAMPLED, state)
        if not sampled:
            return ForwardedSpan(context)
        span = RecordedSpan(
            self,
            name=name,
            kind=kind,
            context=context,
            parent_id=None if parent is None else parent.span_id,
            remote=parent is not None,
            began=self.now() if at is None else at,
        )
        return span.begun_with(attributes, links)

    def child_context(self, parent: TraceContext) -> TraceContext:
        """Of a new span in the same trace."""
        return TraceContext(parent.trace_id, self._span_id(), parent.flags, parent.state)

    def _span_id(self) -> str:
        return f"{self._bits(64) or 1:016x}"


class ForwardingTracer:
    """Records nothing: a caller's trace is handed on as it came, and none is begun (the `Tracer` seam)."""

    def start(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        traceparent: bytes | None = None,
        tracestate: bytes | None = None,
        attributes: Attributes | None = None,
        links: Sequence[Span] = (),
        at: float | None = None,
    ) -> Span:
        """The caller's own span, or none."""
        parent = None if traceparent is None else parse(traceparent, tracestate)
        return NO_SPAN if parent is None else ForwardedSpan(parent)


def _plain(value: str | bool | int | float | Sequence[str], characters: int) -> Attribute:
    """The value as every exporter can write it: one that it could not would take its whole batch with it."""
    if isinstance(value, str):
        return _text(value, characters)
    if isinstance(value, int):
        return value if -_LARGEST <= value < _LARGEST else str(value)
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    return [_text(item, characters) for item in value]


def _text(value: str, characters: int) -> str:
    value = value[:characters]
    return value if value.isascii() else value.encode(errors="replace").decode()
