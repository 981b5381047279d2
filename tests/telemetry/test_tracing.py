"""Spans: whose trace they belong to, what they keep, which of them are recorded."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_tracer import MemoryTracer
from opentelemetry.sdk.trace import sampling
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from twisted.internet.task import Clock

from ai_ticket.interfaces import NO_SPAN, Span, Tracer
from ai_ticket.telemetry.tracing import ForwardingTracer, SpanLimits, make_sampler
from ai_ticket.telemetry.tracing_context import TraceContext, parse

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{CALLER}-01".encode()
NOT_SAMPLED = f"00-{TRACE}-{CALLER}-00".encode()


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.advance(1000.0)
    return clock


class TestContext:
    """W3C headers in and out."""

    def test_a_callers_trace_goes_on(self) -> None:
        context = parse(SAMPLED, b"congo=t61rcWkgMzE , rojo=00f067aa0ba902b7")
        assert context == TraceContext(TRACE, CALLER, 1, "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7")
        assert context.headers() == {
            "traceparent": SAMPLED.decode(),
            "tracestate": "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7",
        }

    @pytest.mark.parametrize(
        "traceparent",
        [
            b"",
            b"nonsense",
            SAMPLED.upper(),
            SAMPLED[:-1],
            SAMPLED + b"0",
            SAMPLED + b"-more",
            SAMPLED + b"\n",
            SAMPLED + b"," + SAMPLED,
            b"ff" + SAMPLED[2:],
            f"00-{'0' * 32}-{CALLER}-01".encode(),
            f"00-{TRACE}-{'0' * 16}-01".encode(),
            f"00-{TRACE}-{CALLER}-0g".encode(),
            b"01" + SAMPLED[2:] + b"more",
            b"01" + SAMPLED[2:] + b"-" + b"x" * 500,
            SAMPLED.replace(b"0af", "\u0660af".encode()),
            b"\xff" * 55,
        ],
    )
    def test_a_malformed_traceparent_counts_as_absent(self, traceparent: bytes) -> None:
        assert parse(traceparent, b"a=b") is None

    def test_later_versions_may_say_more(self) -> None:
        assert parse(b"01" + SAMPLED[2:] + b"-what-else", None) == TraceContext(TRACE, CALLER, 1)
        assert parse(b"cc" + SAMPLED[2:], None) == TraceContext(TRACE, CALLER, 1)

    def test_flags_that_nobody_has_defined_are_not_handed_on(self) -> None:
        context = parse(SAMPLED[:-2] + b"ff", None)
        assert context is not None
        assert context.headers()["traceparent"].endswith("-03")

    @pytest.mark.parametrize(
        "tracestate",
        [
            b"",
            b"=b",
            b"a",
            b"A=b",
            b"a=b,a=c",
            b"a=b\r\nX-Evil: 1",
            "a=ä".encode(),
            b"a=" + b"x" * 600,
            b"a=\x00",
            ",".join(f"k{n}=v" for n in range(33)).encode(),
        ],
    )
    def test_a_malformed_tracestate_counts_as_absent(self, tracestate: bytes) -> None:
        assert parse(SAMPLED, tracestate) == TraceContext(TRACE, CALLER, 1)

    @given(
        st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[a-z]{0,3})?", fullmatch=True),
        st.from_regex(r"([a-z0-9]{1,3}@?[a-z]?=[ -~]{0,4}\s?,){0,3}", fullmatch=True),
    )
    def test_reads_what_opentelemetry_reads(self, traceparent: str, tracestate: str) -> None:
        carrier = {"traceparent": traceparent, "tracestate": tracestate}
        theirs = TraceContextTextMapPropagator().extract(carrier)
        ours = parse(traceparent.encode(), tracestate.encode())
        sent: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(sent, theirs)
        assert (ours is None) == (sent == {})
        if ours is not None:
            assert ours.headers()["traceparent"][:-2] == sent["traceparent"][:-2]
            assert ours.headers().get("tracestate") == sent.get("tracestate")


class TestSampler:
    """OTEL_TRACES_SAMPLER."""

    @pytest.mark.parametrize("name", sorted(sampling._KNOWN_SAMPLERS))
    @pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
    def test_picks_the_same_as_opentelemetrys(self, name: str, ratio: float) -> None:
        theirs = sampling._KNOWN_SAMPLERS[name]
        theirs = theirs if isinstance(theirs, sampling.Sampler) else theirs(ratio)
        ours = make_sampler(name, ratio)
        random = Random(5)
        for _ in range(300):
            trace_id = random.getrandbits(128)
            for parent in (None, True, False):
                context = None
                if parent is not None:
                    span = SpanContext(trace_id, 1, True, TraceFlags(int(parent)))
                    context = set_span_in_context(NonRecordingSpan(span))
                expected = theirs.should_sample(context, trace_id, "name").decision.is_sampled()
                assert ours(f"{trace_id:032x}", parent) is expected

    def test_a_share(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock, sampler=make_sampler("parentbased_traceidratio", 0.1))
        recorded = sum(tracer.start("x").recording for _ in range(5000))
        assert 400 < recorded < 600

    def test_a_caller_decides(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock, sampler=make_sampler("parentbased_always_off", 1.0))
        assert tracer.start("x", traceparent=SAMPLED).recording
        assert not tracer.start("x", traceparent=NOT_SAMPLED).recording
        assert not tracer.start("x").recording


class TestRecordedSpans:
    """What is kept of an operation."""

    def test_three_levels_of_a_callers_trace(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock)
        request = tracer.start("POST /event", kind="server", traceparent=SAMPLED, tracestate=b"a=b")
        clock.advance(1)
        handle = request.child("pipeline.handle")
        attempt = handle.child("kobold.get_completion", kind="client", attributes={"gen_ai.operation.name": "chat"})
        sent = attempt.headers()
        clock.advance(2)
        attempt.end()
        handle.end()
        request.end()
        spans = tracer.ended
        assert [span.name for span in spans] == ["kobold.get_completion", "pipeline.handle", "POST /event"]
        assert {span.trace_id for span in spans} == {TRACE}
        assert [span.parent_id for span in spans] == [handle.span_id, request.span_id, CALLER]
        assert [span.remote for span in spans] == [False, False, True]
        assert [span.kind for span in spans] == ["client", "internal", "server"]
        assert [(span.began, span.ended) for span in spans] == [(1001, 1003), (1001, 1003), (1000, 1003)]
        assert len({span.span_id for span in spans}) == 3
        assert sent == {"traceparent": f"00-{TRACE}-{attempt.span_id}-01", "tracestate": "a=b"}

    def test_a_trace_of_its_own(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock)
        for traceparent in (None, b"malformed"):
            span = tracer.start("x", traceparent=traceparent, tracestate=b"a=b")
            span.end()
            assert span.headers() == {"traceparent": f"00-{span.trace_id}-{span.span_id}-03"}
        first, second = tracer.ended
        assert first.parent_id is None
        assert first.trace_id != second.trace_id
        assert len(first.context.trace_id) == 32
        assert len(first.context.span_id) == 16

    def test_begins_and_ends_when_it_is_told(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock)
        span = tracer.start("x", at=990.0)
        span.child("y", at=995.5).end(at=998.0)
        span.end(at=999.0)
        assert [(one.began, one.ended) for one in tracer.ended] == [(995.5, 998.0), (990.0, 999.0)]

    def test_never_ends_before_it_began(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock)
        tracer.start("x").end(at=5.0)
        assert tracer.ended[0].ended == 1000.0

    def test_nothing_changes_after_the_end(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock)
        span = tracer.start("x", attributes={"a": 1})
        span.end()
        clock.advance(1)
        span.set({"a": 2})
        span.fail("late")
        span.link(tracer.start("y"))
        span.end()
        [one] = tracer.ended
        assert (one.attributes, one.error, one.links, one.ended) == ({"a": 1}, None, [], 1000.0)

    def test_an_error_is_its_code(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock)
        span = tracer.start("x")
        span.fail("api_connection_error")
        span.end()
        assert tracer.ended[0].error == "api_connection_error"
        assert tracer.ended[0].attributes == {"error.type": "api_connection_error"}

    def test_links_to_other_spans(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock)
        events = [tracer.start("event") for _ in range(3)]
        batch = tracer.start("batch", links=[events[0], NO_SPAN])
        batch.link(events[1])
        part = batch.child("part", links=[events[2]])
        part.end()
        batch.end()
        contexts = [(event.trace_id, event.span_id) for event in events]
        assert tracer.named("batch").links == contexts[:2]
        assert tracer.named("part").links == contexts[2:]

    def test_holds_no_more_than_its_limits(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock, limits=SpanLimits(attributes=2, characters=3, links=1))
        span = tracer.start("x", attributes={"a": "xxxxx", "b": ["yyyyy"], "c": 1}, links=[tracer.start("y")] * 2)
        span.set({"a": "again", "d": 1})
        span.end()
        assert tracer.ended[0].attributes == {"a": "aga", "b": ["yyy"]}
        assert len(tracer.ended[0].links) == 1

    def test_values_are_such_as_can_be_exported(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock)
        span = tracer.start("x")
        span.set({"none": None, "big": 2**63, "small": -(2**63), "surrogate": "a\ud800", "nan": float("nan")})
        span.set({"yes": True, "half": 0.5, "list": ("ä", "b")})
        span.end()
        assert tracer.ended[0].attributes == {
            "big": "9223372036854775808",
            "small": -(2**63),
            "surrogate": "a?",
            "nan": "nan",
            "yes": True,
            "half": 0.5,
            "list": ["ä", "b"],
        }


class TestUnrecordedSpans:
    """They cost next to nothing, and hand on what they were given."""

    def test_an_unsampled_span_is_its_own_child(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock, sampler=make_sampler("parentbased_always_on", 1.0))
        span = tracer.start("x", traceparent=NOT_SAMPLED, tracestate=b"a=b")
        child = span.child("y", kind="client", attributes={"a": 1}, links=[span])
        assert child is span
        child.set({"a": 1})
        child.link(span)
        child.fail("code")
        child.end()
        assert not span.recording
        assert tracer.ended == []
        assert span.trace_id == TRACE
        assert span.span_id != CALLER
        assert span.headers() == {"traceparent": f"00-{TRACE}-{span.span_id}-00", "tracestate": "a=b"}

    def test_an_unsampled_trace_of_its_own_says_so_to_others(self, clock: Clock) -> None:
        tracer = MemoryTracer(clock, sampler=make_sampler("always_off", 1.0))
        span = tracer.start("x")
        assert span.headers() == {"traceparent": f"00-{span.trace_id}-{span.span_id}-02"}
        assert tracer.start("x", traceparent=SAMPLED).headers()["traceparent"].endswith("-00")

    def test_without_tracing_a_callers_trace_is_handed_on(self) -> None:
        tracer: Tracer = ForwardingTracer()
        span: Span = tracer.start("x", traceparent=SAMPLED, tracestate=b"a=b")
        assert span.child("y").headers() == {"traceparent": SAMPLED.decode(), "tracestate": "a=b"}
        assert span.trace_id == TRACE
        assert not span.recording

    @pytest.mark.parametrize("traceparent", [None, b"malformed"])
    def test_without_tracing_no_trace_is_begun(self, traceparent: bytes | None) -> None:
        span = ForwardingTracer().start("x", traceparent=traceparent, tracestate=b"a=b")
        assert span is NO_SPAN
        assert span.child("y") is NO_SPAN
        assert (span.trace_id, span.span_id, span.headers(), span.recording) == (None, None, {}, False)
        span.set({"a": 1})
        span.link(span)
        span.fail("code")
        span.end()
