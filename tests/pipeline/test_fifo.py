"""The queue before the slots: order, bounds, deadlines, cancellation."""

from typing import Any

import pytest
from harness import COMPLETION, MemoryBackend
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from ai_ticket.errors import ApiServerError, DeadlineExceeded, Overloaded
from ai_ticket.event import Completion, Event, Message, Parameters
from ai_ticket.interfaces import BackendState, Client, Job, Sink
from ai_ticket.pipeline.fifo import FifoPipeline

CLIENT = Client("k", None, "192.0.2.1")


def event(number: int) -> Event:
    return Event([Message("user", str(number))], Parameters(max_tokens=5))


def job(number: int, deadline: float) -> Job:
    return Job(event=event(number), client=CLIENT, timeout=100, deadline=deadline)


class World:
    """A pipeline before a backend in memory."""

    def __init__(self, slots: int = 1, queue_limit: int = 10):
        self.clock = Clock()
        self.backend = MemoryBackend(slots)
        self.pipeline = FifoPipeline(self.backend, self.clock, queue_limit)

    def submit(self, number: int, seconds: float = 100) -> Deferred[Any]:
        return Deferred.fromCoroutine(self.pipeline.submit(job(number, self.clock.seconds() + seconds)))

    @property
    def running(self) -> list[str]:
        return [event.prompt for event, answer in self.backend.calls if not answer.called]

    def finish(self, number: int, result: Any = COMPLETION) -> None:
        [answer] = [answer for event, answer in self.backend.calls if event.prompt == str(number)]
        answer.callback(result) if isinstance(result, Completion) else answer.errback(result)


def outcome(submitted: Deferred[Any]) -> type:
    found: list[Any] = []
    submitted.addBoth(found.append)
    return type(found[0]) if isinstance(found[0], Completion) else found[0].type  # type: ignore[no-any-return]


def test_no_more_run_than_there_are_slots_and_the_others_in_order() -> None:
    world = World(slots=2)
    submitted = [world.submit(number) for number in range(5)]
    assert world.running == ["0", "1"]
    world.finish(1)
    assert world.running == ["0", "2"]
    world.finish(0)
    world.finish(2)
    assert world.running == ["3", "4"]
    world.finish(3)
    world.finish(4)
    assert [outcome(one) for one in submitted] == [Completion] * 5
    assert not world.clock.getDelayedCalls()


def test_a_failure_frees_its_slot() -> None:
    world = World()
    first, second = world.submit(0), world.submit(1)
    world.finish(0, ApiServerError())
    assert outcome(first) is ApiServerError
    world.finish(1)
    assert outcome(second) is Completion


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    world = World(queue_limit=2)
    kept = [world.submit(number) for number in range(3)]
    refused = world.submit(3)
    failures: list[Any] = []
    refused.addErrback(failures.append)
    assert failures[0].check(Overloaded)
    assert failures[0].value.retry_after > 0
    for number in range(3):
        world.finish(number)
    assert [outcome(one) for one in kept] == [Completion] * 3


def test_retry_after_follows_the_measured_times() -> None:
    world = World(queue_limit=0)
    for number in range(30):
        world.submit(number)
        world.clock.advance(20)
        world.finish(number)
    world.submit(100)
    failures: list[Any] = []
    world.submit(101).addErrback(failures.append)
    assert 15 < failures[0].value.retry_after < 25
    world.finish(100)


def test_a_queue_limit_of_nothing() -> None:
    world = World(queue_limit=0)
    first = world.submit(0)
    assert outcome(world.submit(1)) is Overloaded
    world.finish(0)
    assert outcome(first) is Completion


def test_a_deadline_in_the_queue_leaves_it() -> None:
    world = World(queue_limit=1)
    first, second = world.submit(0), world.submit(1, seconds=5)
    world.clock.advance(6)
    assert outcome(second) is DeadlineExceeded
    third = world.submit(2)
    world.finish(0)
    assert world.running == ["2"]
    world.finish(2)
    assert (outcome(first), outcome(third)) == (Completion, Completion)


def test_a_deadline_while_running_stops_the_generation() -> None:
    world = World()
    first = world.submit(0, seconds=5)
    world.clock.advance(6)
    assert outcome(first) is DeadlineExceeded
    assert [event.prompt for event in world.backend.cancelled] == ["0"]
    second = world.submit(1)
    world.finish(1)
    assert outcome(second) is Completion


class RefusingBackend:
    """A `Backend` that fails at once."""

    state = BackendState(name="b", up=True, slots=1)

    def __init__(self) -> None:
        self.gate: Deferred[None] | None = Deferred()

    async def complete(self, event: Event, deadline: float, sink: Sink | None = None) -> Completion:
        if self.gate is not None:
            await self.gate
        raise ApiServerError

    async def probe(self) -> BackendState:
        return self.state


def test_a_newcomer_does_not_take_a_new_slot_before_those_who_wait() -> None:
    world = World(slots=1)
    for number in range(3):
        world.submit(number)
    world.backend.state = replace(world.backend.state, slots=2)
    world.submit(3)
    assert world.running == ["0", "1"]
    for number in range(4):
        world.finish(number)


def test_a_long_queue_that_fails_at_once_does_not_overflow_the_stack() -> None:
    clock, backend = Clock(), RefusingBackend()
    pipeline = FifoPipeline(backend, clock, 5000)
    submitted = [Deferred.fromCoroutine(pipeline.submit(job(0, 100.0))) for _ in range(5000)]
    gate, backend.gate = backend.gate, None
    assert gate is not None
    gate.callback(None)
    assert {outcome(one) for one in submitted} == {ApiServerError}
    assert (pipeline.depth, pipeline.in_flight) == (0, 0)
    assert not clock.getDelayedCalls()


def test_a_caller_who_leaves() -> None:
    world = World()
    running, waiting, last = world.submit(0), world.submit(1), world.submit(2)
    waiting.cancel()
    running.cancel()
    assert (outcome(running), outcome(waiting)) == (CancelledError, CancelledError)
    assert world.running == ["2"]
    world.finish(2)
    assert outcome(last) is Completion
    assert not world.clock.getDelayedCalls()


def test_slots_that_are_learnt_later_are_used() -> None:
    world = World(slots=1)
    submitted = [world.submit(number) for number in range(4)]
    world.backend.state = replace(world.backend.state, slots=3)
    world.finish(0)
    assert world.running == ["1", "2", "3"]
    for number in (1, 2, 3):
        world.finish(number)
    assert [outcome(one) for one in submitted] == [Completion] * 4


@given(
    slots=st.integers(1, 3),
    limit=st.integers(0, 4),
    steps=st.lists(st.tuples(st.sampled_from(["submit", "finish", "fail", "cancel", "wait"]), st.integers(0, 9))),
)
def test_nothing_is_lost_doubled_or_over_the_bounds(slots: int, limit: int, steps: list[tuple[str, int]]) -> None:
    world = World(slots, limit)
    submitted: list[Deferred[Any]] = []
    outcomes: dict[int, int] = {}

    def ended(result: Any, number: int) -> None:
        outcomes[number] = outcomes.get(number, 0) + 1

    for step, choice in steps:
        running = [answer for _, answer in world.backend.calls if not answer.called]
        if step == "submit":
            number = len(submitted)
            submitted.append(world.submit(number, seconds=10 + choice))
            submitted[-1].addBoth(ended, number)
        elif step == "wait":
            world.clock.advance(choice)
        elif step == "cancel" and submitted:
            submitted[choice % len(submitted)].cancel()
        elif running and step == "finish":
            running[choice % len(running)].callback(COMPLETION)
        elif running and step == "fail":
            running[choice % len(running)].errback(ApiServerError())
        assert len(world.running) <= slots
        waiting = len(submitted) - len(outcomes) - len(world.running)
        assert 0 <= waiting <= limit
        assert waiting == 0 or len(world.running) == slots
    world.clock.advance(1000)
    assert outcomes == dict.fromkeys(range(len(submitted)), 1)
    assert not world.clock.getDelayedCalls()


@pytest.mark.parametrize("slots", [1, 4])
def test_every_event_is_given_its_deadline(slots: int) -> None:
    world = World(slots)
    world.clock.advance(7)
    submitted = world.submit(0, seconds=50)
    world.finish(0)
    assert outcome(submitted) is Completion
