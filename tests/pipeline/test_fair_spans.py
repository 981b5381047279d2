"""Spans on an event's way through the queue, the workers, the pool's retries and the clients of several fakes."""

import random
from collections import Counter
from typing import Any

import pytest
from harness import Attempts
from memory_network import Network
from memory_tracer import MemoryTracer
from simulation import RecordedEvents
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ai_ticket.backend import fake
from ai_ticket.backend.address import Location
from ai_ticket.backend.fake import FakeKobold, Fault, Pace, Script, Settings
from ai_ticket.backend.kobold import BackendTimeouts, KoboldBackend
from ai_ticket.backend.pool import Pool
from ai_ticket.backend.retry import make_retry_policy
from ai_ticket.backend.server import ModelServer
from ai_ticket.event import Completion, Event, Message, Parameters
from ai_ticket.interfaces import Client, Job
from ai_ticket.pipeline.fair import FairPipeline
from ai_ticket.spans import Span
from ai_ticket.telemetry.tracing import RecordedSpan, Sampler, make_sampler
from ai_ticket.telemetry.tracing_context import TraceContext

ROOT, HANDLE, ATTEMPT, BATCH = "POST /event", "pipeline.handle", "kobold.get_completion", "pipeline.batch"
STEP = 0.04


class CountingTracer(MemoryTracer):
    """Knows how many recorded spans were begun."""

    begun = 0

    def start(self, name: str, **options: Any) -> Span:
        span = super().start(name, **options)
        self.begun += span.recording
        return span

    def child_context(self, parent: TraceContext) -> TraceContext:
        self.begun += 1
        return super().child_context(parent)


class World:
    """A pipeline before a pool of fakes. `outcomes` has what became of each event, by its number."""

    def __init__(
        self, servers: int = 1, *, slots: int = 1, batch_size: int = 16, sampler: Sampler | None = None
    ) -> None:
        self.clock = Clock()
        self.clock.advance(1_700_000_000.0)
        self.tracer = CountingTracer(self.clock, sampler=sampler)
        settings = Settings(tokens_per_second=100.0, parallel=slots, pace=Pace(first_event=0.05))
        self.fakes = [FakeKobold(self.clock, settings) for _ in range(servers)]
        for one in self.fakes:
            one.behaviour = Script(tokens=10_000)  # until it is told to stop
        keys = iter(range(10_000))

        def backend(number: int) -> KoboldBackend:
            http = Network(self.clock, self.fakes[number]).http
            return KoboldBackend(
                f"fake:{number}",
                ModelServer(http, self.clock, lambda: Location(f"http://fake:{number}", None)),
                clock=self.clock,
                timeouts=BackendTimeouts(None, 10.0),
                slots=slots,
                new_key=lambda: f"key{next(keys)}",
                recorder=Attempts(),
            )

        policy = make_retry_policy(max_attempts=3, silence_is_curable=False, random=lambda: 1.0)
        pool = Pool([[backend(n) for n in range(servers)]], clock=self.clock, random=lambda: 1.0, policy=policy)
        self.pipeline = FairPipeline(
            pool,
            clock=self.clock,
            recorder=RecordedEvents(),
            max_concurrency=None,
            queue_limit=1000,
            batch_size=batch_size,
            batch_linger=0.0,
        )
        pool.watch(self.pipeline.look_again)
        probing = Deferred.fromCoroutine(pool.probe())
        self.run(3.0)
        assert probing.called
        self.roots: dict[str, Span] = {}
        self.submitted: dict[str, Deferred[Any]] = {}
        self.outcomes: dict[str, str] = {}

    def run(self, seconds: float = 0.0) -> None:
        """Let time pass."""
        for _ in range(max(1, round(seconds / STEP))):
            self.clock.advance(STEP)

    def submit(
        self,
        name: str,
        *,
        client: str = "a",
        root: Span | None = None,
        batch: bool = False,
        tokens: int = 20,
        seconds: float = 120.0,
    ) -> None:
        """Submit an event; it is in the trace of `root`, which goes on, or of a request of its own, that it ends."""
        span = self.roots[name] = root or self.tracer.start(ROOT, kind="server", attributes={"event": name})
        job = Job(
            event=Event([Message("user", name)], Parameters(max_tokens=tokens)),
            client=Client(client, None, "192.0.2.1"),
            timeout=seconds,
            deadline=None if batch else self.clock.seconds() + seconds,
            batch=batch,
            span=span,
        )

        def ended(result: Any) -> None:
            error = None if isinstance(result, Completion) else getattr(result.value, "code", "cancelled")
            self.outcomes[name] = error or "ok"
            if root is None:
                if error is not None:
                    span.fail(error)
                span.end()

        self.submitted[name] = Deferred.fromCoroutine(self.pipeline.submit(job)).addBoth(ended)

    def finish(self) -> None:
        """Let all events end."""
        for _ in range(20_000):
            if len(self.outcomes) == len(self.submitted):
                break
            self.run()
        assert set(self.outcomes) == set(self.submitted)

    def settle(self) -> None:
        """Let all events end, and check that so have all spans."""
        self.finish()
        assert len(self.tracer.ended) == self.tracer.begun
        assert len({span.span_id for span in self.tracer.ended}) == self.tracer.begun
        assert all(span.ended is not None and span.ended >= span.began for span in self.tracer.ended)
        self.clock.pump([0.5] * 120)  # aborts, and circuits that close

    def named(self, name: str) -> list[RecordedSpan]:
        return [span for span in self.tracer.ended if span.name == name]

    def under(self, parent: Span) -> list[RecordedSpan]:
        """The spans that are right under this one, in the order in which they ended."""
        return [span for span in self.tracer.ended if span.parent_id == parent.span_id]

    def handle(self, name: str) -> RecordedSpan:
        """The one `pipeline.handle` under an event's own request."""
        [found] = [span for span in self.under(self.roots[name]) if span.name == HANDLE]
        return found

    def attempts(self, name: str) -> list[RecordedSpan]:
        return [span for span in self.under(self.handle(name)) if span.name == ATTEMPT]

    def asked(self) -> list[tuple[str, str]]:
        """What the fakes were asked to generate: the prompt, and the span that it was said to be part of."""
        return [
            (seen.json["messages"][-1]["content"], seen.headers["traceparent"])
            for one in self.fakes
            for seen in one.requests
            if seen.json is not None and "messages" in seen.json
        ]


def errors(spans: list[RecordedSpan]) -> list[str | None]:
    assert all(span.attributes.get("error.type") == span.error for span in spans)
    return [span.error for span in spans]


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_no_span_gets_another_events_parent(seed: int) -> None:
    """Some hundred events at random, that fail, are tried again, wait, leave, are late, and come in batches."""
    chance = random.Random(seed)
    world = World(3, slots=2, batch_size=3)
    faults = (fake.SERVER_ERROR, fake.BUSY, fake.NULL, Script(fault=Fault.EOF), Script(fault=Fault.RESET))
    for one in world.fakes:
        for _ in range(12):
            one.script(chance.choice([*faults, Script(), Script(), Script(), Script()]))
    of_batch = world.tracer.start("POST /events", kind="server")
    for number in range(120):
        batch = number % 3 == 0
        world.submit(
            f"event {number}",
            client=chance.choice("abc"),
            root=of_batch if batch else None,
            batch=batch,
            seconds=chance.choice([0.4, 120.0, 120.0, 120.0]),
        )
        if chance.random() < 0.15:
            world.submitted[f"event {chance.randrange(number + 1)}"].cancel()
        world.run(chance.choice([0.0, 0.04, 0.12]))
    world.finish()
    of_batch.end()
    world.settle()
    seen = Counter(world.outcomes.values())
    assert set(seen) >= {"ok", "cancelled", "deadline_exceeded"}, "something of everything"

    spans = {span.span_id: span for span in world.tracer.ended}
    handles = {span.span_id: span for span in world.named(HANDLE)}
    assert all(span.parent_id in spans for span in handles.values())
    assert max(Counter(span.parent_id for span in world.named(ATTEMPT)).values()) > 1, "there were retries"
    for attempt in world.named(ATTEMPT):
        handle = handles[attempt.parent_id]
        assert attempt.trace_id == handle.trace_id
        assert handle.began <= attempt.began
        assert handle.ended is not None
        assert attempt.ended is not None
        assert attempt.ended <= handle.ended
    # What went over the wire says which event each span was for.
    handle_of: dict[str, set[str | None]] = {}
    for name, traceparent in world.asked():
        _, trace_id, span_id, flags = traceparent.split("-")
        attempt = spans[span_id]
        handle = handles[attempt.parent_id]
        assert (attempt.name, flags) == (ATTEMPT, "03")
        assert trace_id == attempt.trace_id == world.roots[name].trace_id
        assert handle.parent_id == world.roots[name].span_id
        handle_of.setdefault(name, set()).add(handle.span_id)
    assert len(handle_of) > 60
    assert all(len(found) == 1 for found in handle_of.values()), "all attempts of an event are under the same span"
    assert len(set.union(*handle_of.values())) == len(handle_of), "and no other event's"
    for name, root in world.roots.items():
        if root is not of_batch:
            below = [span for span in world.under(root) if span.name == HANDLE]
            outcome = world.outcomes[name]
            began = bool(below) or outcome == "ok" or outcome.startswith("api_")
            assert errors(below) == [None if outcome == "ok" else outcome] * began


class TestAttempts:
    def test_each_is_a_span_under_the_same_operation(self) -> None:
        world = World(2)
        world.fakes[0].script(fake.SERVER_ERROR)
        world.fakes[1].script(fake.BUSY)
        world.submit("x")
        world.settle()
        assert world.outcomes == {"x": "ok"}
        attempts = world.attempts("x")
        assert sorted(errors(attempts), key=str) == [None, "api_rate_limited", "api_server_error"]
        assert attempts[-1].error is None
        assert {span.kind for span in attempts} == {"client"}
        assert {span.attributes["server.address"] for span in attempts} == {"fake"}
        assert {span.attributes["server.port"] for span in attempts} == {0, 1}
        assert attempts[-1].attributes["gen_ai.response.finish_reasons"] == ["length"]
        assert world.handle("x").error is None
        assert world.handle("x").trace_id == world.roots["x"].trace_id

    def test_the_last_ones_error_is_the_operations(self) -> None:
        world = World()
        world.fakes[0].script(fake.SERVER_ERROR, times=2)
        world.fakes[0].script(fake.NULL)
        world.submit("x")
        world.settle()
        assert world.outcomes == {"x": "api_response_structure_error"}
        assert errors(world.attempts("x")) == ["api_server_error"] * 2 + ["api_response_structure_error"]
        assert world.handle("x").error == "api_response_structure_error"

    def test_an_endpoint_that_is_not_there_is_an_attempt_too(self) -> None:
        world = World()
        world.fakes[0].missing.add("/v1/chat/completions")
        world.submit("x")
        world.settle()
        [first, second] = world.attempts("x")
        assert (first.attributes["url.path"], first.error) == ("/v1/chat/completions", "api_client_error")
        assert (second.attributes["gen_ai.operation.name"], second.error) == ("text_completion", None)


class TestLeaving:
    def test_while_it_generates(self) -> None:
        world = World()
        world.submit("x", tokens=500)
        world.run(0.5)
        world.submitted["x"].cancel()
        world.settle()
        assert errors([world.handle("x"), *world.attempts("x")]) == ["cancelled"] * 2

    def test_while_it_waits(self) -> None:
        """It has not begun, and so has no span."""
        world = World()
        world.submit("x")
        world.submit("y")
        world.run(0.1)
        world.submitted["y"].cancel()
        world.settle()
        assert world.outcomes == {"x": "ok", "y": "cancelled"}
        assert world.under(world.roots["y"]) == []

    def test_between_two_attempts(self) -> None:
        world = World()
        world.fakes[0].script(fake.BUSY)
        world.submit("x")
        world.run(0.3)
        world.submitted["x"].cancel()
        world.settle()
        assert errors(world.attempts("x")) == ["api_rate_limited"]
        assert world.handle("x").error == "cancelled"

    def test_at_the_end_of_the_service(self) -> None:
        world = World()
        world.submit("x", tokens=500)
        world.submit("y")
        world.run(0.5)
        world.pipeline.stop()
        world.settle()
        assert world.outcomes == {"x": "shutting_down", "y": "shutting_down"}
        assert world.handle("x").error == "shutting_down"
        assert errors(world.attempts("x")) == ["cancelled"]

    def test_at_the_deadline(self) -> None:
        world = World()
        world.fakes[0].script(Script(before_headers=60.0))
        world.submit("x", seconds=2.0)
        world.settle()
        assert errors([world.handle("x"), *world.attempts("x")]) == ["deadline_exceeded"] * 2


class TestBatches:
    def test_it_is_linked_to_the_spans_of_its_events(self) -> None:
        world = World(slots=4, batch_size=3)
        names = [f"event {number}" for number in range(4)]
        for name in names:
            world.submit(name)
        world.settle()
        [batch] = world.named(BATCH)
        handles = [world.handle(name) for name in names[:3]]
        assert batch.links == [(span.trace_id, span.span_id) for span in handles]
        assert (batch.trace_id, batch.parent_id) == (handles[0].trace_id, handles[0].span_id)
        assert batch.attributes["ai_ticket.batch.size"] == 3
        assert (batch.began, batch.ended) == (
            min(span.began for span in handles),
            max(span.ended or 0.0 for span in handles),
        )

    def test_one_alone_is_none(self) -> None:
        world = World()
        world.submit("x")
        world.submit("y")
        world.settle()
        assert world.named(BATCH) == []

    def test_of_which_not_all_are_sampled(self) -> None:
        """What is not sampled is neither recorded nor linked to, and the server behind is told so."""
        sampled = make_sampler("traceidratio", 0.5)
        world = World(slots=8, sampler=sampled)
        for number in range(8):
            world.submit(f"event {number}")
        world.settle()
        recorded = [root for root in world.roots.values() if root.recording]
        assert 0 < len(recorded) < 8
        [batch] = world.named(BATCH)
        assert batch.attributes["ai_ticket.batch.size"] == 8
        assert sorted(trace_id for trace_id, _ in batch.links) == sorted(root.trace_id or "" for root in recorded)
        assert len(world.named(HANDLE)) == len(world.named(ATTEMPT)) == len(recorded)
        for name, traceparent in world.asked():
            _, trace_id, _, flags = traceparent.split("-")
            root = world.roots[name]
            assert (trace_id, flags) == (root.trace_id, "03" if root.recording else "02")
