"""The pipeline: order, deadlines, batches, cancellation; and that nothing is ever lost."""

from collections import Counter
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import pytest
from harness import COMPLETION
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from simulation import RecordedEvents, World, make_job
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from ai_ticket.errors import ApiServerError, DeadlineExceeded, DomainError, InternalError, ShuttingDown
from ai_ticket.event import Completion, Event
from ai_ticket.interfaces import BackendState, Client, Sink
from ai_ticket.pipeline.fair import PATIENCE_SECONDS, FairPipeline
from ai_ticket.spans import NO_SPAN, Span


class TestSlots:
    def test_no_more_run_than_there_are_slots_and_the_others_in_order(self) -> None:
        world = World(slots=2)
        for number in range(5):
            world.submit(number)
        assert world.running == ["0", "1"]
        assert (world.pipeline.depth, world.pipeline.in_flight) == (3, 2)
        world.finish(1)
        assert world.running == ["0", "2"]
        world.finish(0)
        world.finish(2)
        assert world.running == ["3", "4"]
        world.settle()
        assert list(world.outcomes.values()) == [COMPLETION] * 5

    def test_a_failure_frees_its_slot(self) -> None:
        world = World()
        world.submit(0)
        world.submit(1)
        world.finish(0, ApiServerError())
        assert world.kind(0) is ApiServerError
        world.settle()
        assert world.outcomes["1"] is COMPLETION

    def test_slots_that_are_learnt_later_are_used(self) -> None:
        world = World()
        for number in range(4):
            world.submit(number)
        world.backend.state = replace(world.backend.state, slots=3)
        world.finish(0)
        assert world.running == ["1", "2", "3"]
        world.settle()

    def test_at_once_where_the_backend_says_so(self) -> None:
        world = World()
        for number in range(4):
            world.submit(number)
        world.backend.state = replace(world.backend.state, slots=3)
        world.pipeline.look_again()
        world.clock.advance(0)
        assert world.running == ["0", "1", "2"]
        world.settle()

    def test_a_newcomer_does_not_take_a_new_slot_before_those_who_wait(self) -> None:
        world = World()
        for number in range(3):
            world.submit(number)
        world.backend.state = replace(world.backend.state, slots=2)
        world.submit(3)
        assert world.running == ["0", "1"]
        world.settle()

    def test_slots_that_are_lost_are_not_filled_again(self) -> None:
        world = World(slots=3)
        for number in range(6):
            world.submit(number)
        world.backend.state = replace(world.backend.state, slots=1)
        world.finish(0)
        world.finish(1)
        assert world.running == ["2"]
        world.finish(2)
        assert world.running == ["3"]
        world.settle()

    @pytest.mark.parametrize("batch", [False, True])
    def test_slots_that_were_lost_and_found_are_used(self, batch: bool) -> None:
        """Though nothing waited when they were found."""
        world = World(slots=3)
        for number in range(3):
            world.submit(number)
        world.backend.state = replace(world.backend.state, slots=1)
        world.pipeline.look_again()
        world.backend.state = replace(world.backend.state, slots=3)
        world.finish(0)
        world.submit("next", batch=batch)
        assert world.running == ["1", "2", "next"]
        world.settle()

    def test_a_backend_without_slots_is_asked_one_at_a_time(self) -> None:
        """It knows best why, and fails it."""
        world = World(slots=0)
        world.submit(0)
        world.submit(1)
        assert world.running == ["0"]
        world.settle()

    def test_max_concurrency(self) -> None:
        world = World(slots=4, max_concurrency=2, queue_limit=20)
        for number in range(9):
            world.submit(number)
        assert world.running == ["0", "1"]
        assert world.pipeline.max_concurrency == 2
        world.pipeline.set_max_concurrency(3)
        world.clock.advance(0)
        assert world.running == ["0", "1", "2"], "more begin at once"
        world.pipeline.set_max_concurrency(1)
        world.clock.advance(0)
        world.finish(0)
        world.finish(1)
        assert world.running == ["2"], "fewer as they end"
        world.finish(2)
        assert world.running == ["3"]
        world.pipeline.set_max_concurrency(None)
        world.clock.advance(0)
        assert world.running == ["3", "4", "5", "6"], "no more than there are slots"
        world.settle()

    @pytest.mark.parametrize(("slots", "expected"), [(1, 8), (8, 8), (20, 20)])
    def test_max_concurrency_if_nobody_says(self, slots: int, expected: int) -> None:
        world = World(slots=1)
        assert world.pipeline.max_concurrency == 8
        world.backend.state = replace(world.backend.state, slots=slots)
        assert world.pipeline.max_concurrency == expected


class TestFairness:
    @pytest.mark.parametrize("batch", [False, True])
    @pytest.mark.parametrize("weight", [1, 4, 50])
    @pytest.mark.parametrize("slots", [1, 4])
    def test_a_single_question_beside_a_thousand_events(self, slots: int, weight: int, batch: bool) -> None:
        world = World(slots, queue_limit=2000, service_seconds=2.0)
        for number in range(1000):
            world.submit(number, "noisy", weight=weight, batch=batch, seconds=10_000, settle=False)
        world.run(21.5)
        for asked in range(20):
            question = world.submit(f"q{asked}", "quiet" if weight == 1 else f"quiet{asked}")
            world.run(7.25)
            assert question.began_at is not None
            assert question.queue_seconds(world.clock.seconds()) < 2 * 2.0
        assert len(world.backend.taken) > 80 * slots, "and no slot is idle"
        world.pipeline.stop()
        world.settle()

    def test_a_single_question_beside_a_batch_of_its_own_client(self) -> None:
        world = World(service_seconds=2.0)
        for number in range(100):
            world.submit(number, batch=True)
        question = world.submit("question")
        world.run(4)
        assert question.queue_seconds(world.clock.seconds()) <= 2.0
        world.run(250)
        world.settle()

    def test_weights_hold(self) -> None:
        world = World(4, queue_limit=2000, service_seconds=1.0)
        for number in range(500):
            world.submit(f"light{number}", "light", seconds=5000, settle=False)
            world.submit(f"heavy{number}", "heavy", weight=4, seconds=5000, settle=False)
        world.run(100, 0.5)
        heavy = sum(name.startswith("heavy") for name in world.backend.taken)
        assert heavy == pytest.approx(0.8 * len(world.backend.taken), abs=4)
        world.pipeline.stop()
        world.settle()

    def test_interactive_before_batch(self) -> None:
        world = World()
        world.submit("running")
        world.submit("batch", batch=True)
        world.submit("question")
        world.finish("running")
        assert world.running == ["question"]
        world.settle()

    def test_position(self) -> None:
        world = World(queue_limit=20)
        world.submit("running", "a")
        for number in range(3):
            world.submit(number, "a")
        job = world.submit("mine", "b")
        last = world.submit("last", "b")
        seen = [(world.pipeline.position(job), world.pipeline.position(last))]
        while world.running != ["last"]:
            world.finish(world.running[0])
            seen.append((world.pipeline.position(job), world.pipeline.position(last)))
        assert seen == [(1, 3), (None, 2), (None, 1), (None, None)]
        world.settle()
        assert world.pipeline.position(job) is None


class TestDeadlines:
    def test_in_the_queue(self) -> None:
        world = World(queue_limit=1)
        world.submit(0)
        world.submit(1, seconds=5)
        world.clock.advance(5)
        assert world.kind(1) is DeadlineExceeded
        assert world.jobs["1"].began_at is None
        world.submit(2)
        world.finish(0)
        assert world.running == ["2"]
        world.settle()

    def test_one_that_has_passed_already(self) -> None:
        world = World()
        world.submit(0, seconds=0)
        assert world.kind(0) is DeadlineExceeded
        with pytest.raises(DeadlineExceeded):
            world.check_room(Client("a", None, ""), 0)
        world.settle()

    def test_a_backend_that_does_not_keep_it_is_stopped(self) -> None:
        world = World()
        world.submit(0, seconds=5)
        world.clock.advance(5)
        assert world.running == ["0"], "it may have something to say"
        world.clock.advance(PATIENCE_SECONDS)
        assert world.kind(0) is DeadlineExceeded
        assert [event.prompt for event in world.backend.cancelled] == ["0"]
        world.submit(1)
        assert world.running == ["1"]
        world.settle()

    @pytest.mark.parametrize("batch", [False, True])
    def test_the_backend_is_told_the_deadline(self, batch: bool) -> None:
        """Of an interactive event from its arrival, of one of a batch from its beginning."""
        world = World()
        told: list[float] = []
        complete = world.backend.complete
        world.backend.complete = lambda event, deadline, sink, span: (
            told.append(deadline) or complete(event, deadline, sink, span)
        )
        world.submit(0, seconds=1000)
        world.clock.advance(7)
        job = world.submit(1, seconds=50, batch=batch)
        world.clock.advance(13)
        world.finish(0)
        assert told == [1000, 70 if batch else 57]
        assert job.deadline == told[1]
        world.settle()

    def test_a_batch_has_none_while_it_waits(self) -> None:
        world = World()
        world.submit(0, seconds=5000)
        world.submit(1, seconds=10, batch=True).deadline = 5
        world.clock.advance(3000)
        world.finish(0)
        assert world.running == ["1"]
        world.clock.advance(10)
        world.clock.advance(PATIENCE_SECONDS)
        assert world.kind(1) is DeadlineExceeded
        world.settle()

    def test_times_are_noted_on_the_job(self) -> None:
        world = World()
        world.clock.advance(1)
        world.submit(0)
        job = world.submit(1)
        world.clock.advance(2)
        world.finish(0)
        world.clock.advance(3)
        assert (job.queue_seconds(6.0), job.backend_seconds(6.0)) == (2, 3)
        world.finish(1)
        assert (job.queued_at, job.began_at, job.ended_at) == (1, 3, 6)
        world.settle()


class TestBatches:
    def test_what_comes_together_is_taken_together(self) -> None:
        world = World(slots=4)
        for number in range(3):
            world.submit(number, settle=False)
        world.clock.advance(0)
        world.clock.advance(5)
        world.finish(0)
        world.finish(1)
        assert world.recorder.batches == []
        world.clock.advance(1)
        world.finish(2)
        assert world.recorder.batches == [(3, 6)]
        world.settle()

    def test_no_more_than_its_size(self) -> None:
        world = World(slots=8, batch_size=3)
        for number in range(8):
            world.submit(number, settle=False)
        world.clock.advance(0)
        assert len(world.running) == 8
        world.settle()
        assert sorted(size for size, _ in world.recorder.batches) == [2, 3, 3]

    def test_none_waits_for_the_slowest(self) -> None:
        world = World(slots=2)
        for number in range(4):
            world.submit(number, settle=False)
        world.clock.advance(0)
        world.finish(0)
        assert world.running == ["1", "2"]
        world.finish(2)
        assert world.running == ["1", "3"]
        world.settle()
        assert sorted(size for size, _ in world.recorder.batches) == [1, 1, 2]

    def test_one_that_leaves_while_its_batch_is_taken_leaves_no_room_in_it(self) -> None:
        world = World(slots=4)
        complete = world.backend.complete

        async def leave(event: Event, *rest: Any) -> Any:
            if event.prompt == "0":
                world.submitted["1"].cancel()
            return await complete(event, *rest)

        world.backend.complete = leave
        for number in range(3):
            world.submit(number, settle=False)
        world.clock.advance(0)
        world.submit(3)
        assert world.running == ["0", "2", "3"]
        world.settle()
        assert sorted(size for size, _ in world.recorder.batches) == [1, 2]

    def test_lingering(self) -> None:
        world = World(slots=4, batch_linger=0.5)
        world.submit(0)
        world.clock.advance(0.25)
        job = world.submit(1)
        assert not world.running
        assert (world.pipeline.depth, world.pipeline.position(job)) == (2, 2)
        world.clock.advance(0.25)
        assert world.running == ["0", "1"]
        world.submit(2)
        assert world.running == ["0", "1"], "the next lingers anew"
        world.clock.advance(0.5)
        world.settle()
        assert world.recorder.batches == [(2, 0.5), (1, 0)]
        assert world.recorder.began == [0.5, 0.25, 0.5]

    def test_no_longer_than_until_a_batch_is_full(self) -> None:
        world = World(slots=4, batch_size=2, batch_linger=0.5)
        world.submit(0)
        world.submit(1)
        assert world.running == ["0", "1"]
        world.submit(2)
        assert world.running == ["0", "1"], "the next lingers anew"
        world.clock.advance(0.5)
        assert world.running == ["0", "1", "2"]
        world.settle()

    def test_no_longer_than_until_there_is_work_for_all_free_slots(self) -> None:
        world = World(slots=2, batch_size=16, batch_linger=0.5)
        for number in range(5):
            world.submit(number)
        assert world.running == ["0", "1"]
        world.finish(0)
        assert world.running == ["1", "2"], "with a backlog nothing lingers"
        world.settle()

    def test_a_batch_that_lingered_for_nothing(self) -> None:
        world = World(slots=4, batch_linger=0.5)
        world.submit(0)
        world.clock.advance(0.4)
        world.cancel(0)
        assert not world.clock.getDelayedCalls()
        world.submit(1)
        world.clock.advance(0.4)
        assert not world.running
        world.clock.advance(0.1)
        assert world.running == ["1"]
        world.settle()

    def test_a_deadline_while_lingering(self) -> None:
        world = World(slots=4, batch_linger=5)
        world.submit(0, seconds=2)
        world.clock.advance(2)
        assert world.kind(0) is DeadlineExceeded
        world.settle()


class TestLeaving:
    def test_a_caller_who_leaves(self) -> None:
        world = World()
        for name in ("running", "waiting", "last"):
            world.submit(name)
        world.cancel("waiting")
        world.cancel("running")
        assert (world.kind("running"), world.kind("waiting")) == (CancelledError, CancelledError)
        assert world.running == ["last"]
        assert [event.prompt for event in world.backend.cancelled] == ["running"]
        world.settle()
        assert world.recorder.ended == [("cancelled", None), ("cancelled", 0), ("ok", 0)]

    def test_a_caller_who_leaves_at_once(self) -> None:
        """Before the worker that was called for its event has come."""
        world = World()
        world.submit(0, settle=False)
        world.cancel(0)
        world.clock.advance(0)
        assert not world.backend.calls
        world.settle()

    def test_a_batch_whose_caller_leaves(self) -> None:
        world = World()
        for number in range(4):
            world.submit(number, batch=True)
        for number in (1, 3, 0):
            world.cancel(number)
        assert world.running == ["2"]
        world.settle()

    def test_a_caller_who_leaves_between_deadline_and_patience(self) -> None:
        world = World()
        world.submit(0, seconds=5)
        world.clock.advance(5.25)
        world.cancel(0)
        assert world.kind(0) is CancelledError
        world.settle()

    def test_the_end(self) -> None:
        world = World(slots=2, batch_linger=0.5)
        for number in range(4):
            world.submit(number, batch=number == 3)
        world.submit("last", settle=False)
        world.pipeline.stop()
        assert not world.clock.getDelayedCalls()
        assert {type(found) for found in world.outcomes.values()} == {ShuttingDown}
        assert sorted(event.prompt for event in world.backend.cancelled) == ["0", "1"]
        world.submit("late")
        world.submit("late batch", batch=True)
        assert (world.kind("late"), world.kind("late batch")) == (ShuttingDown, ShuttingDown)
        with pytest.raises(ShuttingDown):
            world.check_room(Client("a", None, ""), 100)
        world.settle()

    def test_the_end_as_a_service(self) -> None:
        world = World()
        world.submit(0)
        world.pipeline.startService()
        world.pipeline.stopService()
        assert world.kind(0) is ShuttingDown
        world.settle()

    def test_the_end_amid_callers_who_take_others_with_them(self) -> None:
        world = World(slots=2)
        for number in range(5):
            world.submit(number)
        for number in range(5):
            others = [one for other, one in world.submitted.items() if other != str(number)]
            world.submitted[str(number)].addCallback(lambda _, others=others: [one.cancel() for one in others])
        world.pipeline.stop()
        world.settle()


class Instant:
    """A `Backend` that fails at once, each time taking a while of the clock's time."""

    state = BackendState(name="b", up=True, slots=4)

    def __init__(self, clock: Clock, seconds: float = 0.0) -> None:
        self.clock = clock
        self.seconds = seconds
        self.calls = 0

    async def complete(
        self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
    ) -> Completion:
        self.calls += 1
        self.clock.rightNow += self.seconds
        raise ApiServerError

    async def probe(self) -> BackendState:
        return self.state


def make_pipeline(backend: Any, clock: Clock, **settings: Any) -> FairPipeline:
    defaults = {
        "recorder": RecordedEvents(),
        "max_concurrency": None,
        "queue_limit": 20_000,
        "batch_size": 16,
        "batch_linger": 0.0,
    }
    return FairPipeline(backend, clock=clock, **(defaults | settings))


class TestWorkers:
    def test_ten_thousand_that_fail_at_once(self) -> None:
        """Handing on does not nest, which would end in a RecursionError."""
        clock = Clock()
        backend, recorder = Instant(clock), RecordedEvents()
        pipeline = make_pipeline(backend, clock, recorder=recorder)
        failures: Counter[Any] = Counter()
        for number in range(10_000):
            job = make_job(str(number), batch=True, deadline=None)
            Deferred.fromCoroutine(pipeline.submit(job)).addErrback(lambda failure: failures.update([failure.type]))
        clock.advance(0)
        assert failures == {ApiServerError: 10_000}
        assert backend.calls == sum(size for size, _ in recorder.batches) == 10_000
        assert not clock.getDelayedCalls()

    def test_one_caller_after_the_other_does_not_nest_either(self) -> None:
        clock = Clock()
        pipeline = make_pipeline(Instant(clock), clock, queue_limit=0)
        left = [5000]

        def again(_: object) -> None:
            if left[0]:
                left[0] -= 1
                Deferred.fromCoroutine(pipeline.submit(make_job("x", deadline=100.0))).addErrback(again)

        again(None)
        clock.advance(0)
        assert left == [0]
        assert not clock.getDelayedCalls()

    def test_the_reactor_gets_its_turns(self) -> None:
        """Workers that never wait give it up after some milliseconds."""
        clock = Clock()
        backend = Instant(clock, 0.002)
        pipeline = make_pipeline(backend, clock)
        for number in range(1000):
            job = make_job(str(number), deadline=100.0)
            Deferred.fromCoroutine(pipeline.submit(job)).addErrback(lambda _: None)
        turns: list[int] = []

        def turn() -> None:
            turns.append(backend.calls)
            if backend.calls < 1000:
                clock.callLater(0, turn)

        turn()
        clock.advance(0)
        clock.pump([0] * 1000)
        assert turns[-1] == 1000
        assert max(later - before for before, later in pairwise(turns)) <= 10

    def test_idle_workers_cost_nothing(self) -> None:
        world = World(slots=1000, max_concurrency=10_000)
        world.submit(0)
        world.settle()
        assert len(world.pipeline._workers) == 0

    def test_a_bug_is_an_internal_error_and_ends_nothing_else(self) -> None:
        world = World()
        world.submit(0)
        world.finish(0, RuntimeError("a bug"))
        assert world.kind(0) is RuntimeError
        assert world.recorder.outcomes == [InternalError.code]
        world.submit(1)
        world.settle()


VARIABLE: ContextVar[str] = ContextVar("VARIABLE")


def test_each_event_keeps_the_context_of_its_caller() -> None:
    """Tracing depends on it."""
    clock = Clock()
    seen: list[tuple[str, str]] = []

    class Looking(Instant):
        async def complete(
            self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
        ) -> Completion:
            seen.append((event.prompt, VARIABLE.get()))
            wait: Deferred[None] = Deferred()
            clock.callLater(1, wait.callback, None)
            await wait
            seen.append((event.prompt, VARIABLE.get()))
            VARIABLE.set("changed")
            return COMPLETION

    pipeline = make_pipeline(Looking(clock), clock, max_concurrency=2)
    found: list[str] = []

    async def caller(name: str) -> None:
        VARIABLE.set(name)
        await pipeline.submit(make_job(name, deadline=100.0))
        found.append(VARIABLE.get())

    names = [str(number) for number in range(7)]
    for name in names:
        Deferred.fromCoroutine(caller(name))
    clock.pump([0.5] * 10)
    assert sorted(seen) == sorted([(name, name) for name in names] * 2)
    assert found == names
    assert VARIABLE.get("unset") == "unset"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "batch", "finish", "fail", "cancel", "wait", "slots", "concurrency", "together"]),
        st.integers(0, 11),
    ),
    max_size=60,
)


@given(
    slots=st.integers(1, 3),
    limit=st.integers(0, 5),
    batch_size=st.integers(1, 4),
    linger=st.sampled_from([0.0, 1.5]),
    weights=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    steps=STEPS,
)
def test_nothing_is_lost_doubled_or_over_the_bounds(
    slots: int,
    limit: int,
    batch_size: int,
    linger: float,
    weights: tuple[int, int, int],
    steps: list[tuple[str, int]],
) -> None:
    """Whatever happens: each job ends once, no more run than may, no slot is left empty, the queue is bounded."""
    world = World(slots, queue_limit=limit, batch_size=batch_size, batch_linger=linger)

    def submit(choice: int, *, batch: bool = False, settle: bool = True) -> None:
        client = choice % 3
        seconds = 10 + choice
        world.submit(
            len(world.jobs), "abc"[client], weight=weights[client], batch=batch, seconds=seconds, settle=settle
        )

    for step, choice in steps:
        before = len(world.running)
        if step in ("submit", "batch"):
            submit(choice, batch=step == "batch")
        elif step == "together":
            for number in range(choice):
                submit(choice + number, batch=number % 4 == 0, settle=False)
            world.clock.advance(0)
        elif step == "wait":
            world.run(choice / 2)
        elif step == "cancel" and world.jobs:
            world.cancel(choice % len(world.jobs))
        elif step == "slots":
            world.backend.state = replace(world.backend.state, slots=1 + choice % 4)
            world.pipeline.look_again()
            world.clock.advance(0)
        elif step == "concurrency":
            world.pipeline.set_max_concurrency(choice or None)
            world.clock.advance(0)
        elif world.running and step in ("finish", "fail"):
            name = world.running[choice % len(world.running)]
            world.finish(name, COMPLETION if step == "finish" else ApiServerError())
        most = min(world.backend.state.slots, world.pipeline.max_concurrency)
        running = len(world.running)
        assert running <= max(most, before)
        waiting = [job for job in world.jobs.values() if world.pipeline.position(job) is not None]
        assert len(waiting) == world.pipeline.depth == len(world.jobs) - len(world.outcomes) - running
        assert len(world.pipeline._workers) == running, "nobody is idle"
        if not linger:
            assert not waiting or running >= most
        assert sum(not job.batch for job in waiting) <= limit + most
        positions = sorted(world.pipeline.position(job) or 0 for job in waiting)
        assert not positions or (positions[0] == 1 and positions[-1] <= len(waiting))
    world.run(1000, 5.0)
    assert set(world.outcomes) == set(world.jobs)
    world.settle()
    assert all(isinstance(found, Completion | DomainError | CancelledError) for found in world.outcomes.values())
