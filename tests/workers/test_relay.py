"""An event's way between the processes: slots, attempts and their outcomes."""

from typing import Any

import pytest
from harness import COMPLETION, MemoryBackend
from linked import Told, Worker, make_office, make_pipeline, relayed, result_of
from memory_tracer import MemoryTracer
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from ai_ticket.backend.pool import Pool
from ai_ticket.backend.retry import make_retry_policy
from ai_ticket.errors import ApiConnectionError, ApiServerError, ContextLengthExceeded, DomainError, NoBackendAvailable
from ai_ticket.event import Event, Message, Parameters
from ai_ticket.interfaces import BackendState, Client, Job
from ai_ticket.workers.messages import Learnt, Outlook, Place


class World:
    """A parent with a pool of these backends, and two workers that use them."""

    def __init__(self, *backends: MemoryBackend) -> None:
        self.clock = Clock()
        self.backends = backends or (MemoryBackend(),)
        self.crew = Told()
        self.pool = Pool(
            [[relayed(backend, self.crew, number)] for number, backend in enumerate(self.backends)],
            clock=self.clock,
            random=lambda: 0.5,
            policy=make_retry_policy(max_attempts=3, silence_is_curable=False, random=lambda: 0.5),
        )
        self.pipeline = make_pipeline(self.clock, self.pool)
        self.pool.watch(self.pipeline.look_again)
        self.office = make_office(self.clock, self.pipeline, self.crew)
        self.workers = [Worker(self.office, self.crew, self.clock, self.backends) for _ in range(2)]

    def submit(self, worker: int, job: Job) -> Deferred[Any]:
        submitted = Deferred.fromCoroutine(self.workers[worker].pipeline.submit(job))
        self.clock.advance(0)
        return submitted

    def answer(self, backend: int = 0, result: Any = COMPLETION) -> None:
        """End the generation that is under way for the longest."""
        calls = self.backends[backend].calls
        [call, *_] = [call for _, call in calls if not call.called]
        call.errback(result) if isinstance(result, Exception) else call.callback(result)
        self.clock.advance(0)

    @property
    def under_way(self) -> int:
        return sum(not call.called for backend in self.backends for _, call in backend.calls)

    def settled(self) -> None:
        """Nothing is left of anything."""
        assert self.under_way == 0
        assert (self.pipeline.depth, self.pipeline.in_flight) == (0, 0)
        assert [member.running for member in self.pool.members] == [0] * len(self.backends)
        for worker in self.workers:
            assert not worker.link._jobs
            assert not worker.link._submitted
            assert not worker.link._attempts
            assert not worker.pipeline._passages
            assert not worker.pipeline._by_job


def job(name: str = "x", client: str = "a", *, timeout: float = 100, batch: bool = False) -> Job:
    event = Event([Message("user", name)], Parameters(max_tokens=5))
    return Job(event=event, client=Client(client, None, "192.0.2.1"), timeout=timeout, batch=batch)


def test_the_slots_are_those_of_all_workers() -> None:
    world = World(MemoryBackend(slots=2))
    asked = [world.submit(number % 2, job(str(number))) for number in range(5)]
    for left in (5, 4, 3, 2, 1):
        assert world.under_way == min(2, left)
        assert world.pipeline.in_flight == min(2, left)
        world.answer()
    assert [result_of(each) for each in asked] == [COMPLETION] * 5
    world.settled()


def test_clients_of_different_workers_are_served_in_turn() -> None:
    world = World()
    begun = []
    for number in range(3):
        world.submit(0, job(f"noisy {number}", "noisy"))
    world.submit(1, job("quiet", "quiet"))
    while world.under_way:
        begun.append(world.backends[0].calls[-1][0].prompt)
        world.answer()
    assert begun == ["noisy 0", "quiet", "noisy 1", "noisy 2"]
    world.settled()


def test_times_are_those_of_its_way() -> None:
    world = World()
    first, second = job("first"), job("second")
    world.submit(0, first)
    world.clock.advance(1)
    world.submit(1, second)
    world.clock.advance(2)
    assert second.queue_seconds(world.clock.seconds()) == 2
    world.answer()
    world.clock.advance(4)
    world.answer()
    assert (second.queued_at, second.began_at, second.ended_at) == (1, 3, 7)
    assert (second.queue_seconds(9), second.backend_seconds(9)) == (2, 4)
    world.settled()


def test_the_deadline_of_a_batch_begins_with_its_turn_and_reaches_the_attempt() -> None:
    world = World()
    one = job(batch=True, timeout=30)
    world.submit(0, job("before"))
    asked = world.submit(1, one)
    world.clock.advance(50)
    world.answer()
    assert one.deadline == 80
    world.answer(result=ContextLengthExceeded())
    assert isinstance(result_of(asked), ContextLengthExceeded)
    world.settled()


def test_a_failure_is_tried_again_elsewhere_by_the_same_worker() -> None:
    world = World(MemoryBackend(), MemoryBackend())
    asked = world.submit(1, job())
    world.answer(0, ApiServerError("broken"))
    assert world.under_way == 1
    world.answer(1)
    assert result_of(asked) == COMPLETION
    world.settled()


def test_what_can_not_be_cured_is_told_in_full() -> None:
    world = World()
    asked = world.submit(0, job())
    error = ApiServerError("half an answer")
    error.after_first_token = True
    world.answer(0, error)
    found = result_of(asked)
    assert type(found) is ApiServerError
    assert (found.details, found.after_first_token, found.backend) == ("half an answer", True, "memory:1")
    world.settled()


def test_a_connection_that_fails_is_known_to_all() -> None:
    world = World()
    asked = world.submit(0, job())
    world.answer(0, ApiConnectionError("refused"))
    [learnt] = [each for each in world.crew.messages if isinstance(each, Learnt)]
    assert learnt.state == BackendState("memory:1", False, 1, error="refused")
    while not asked.called:
        world.clock.advance(1)
        for _ in range(world.under_way):
            world.answer()
    assert result_of(asked) == COMPLETION
    assert world.crew.messages[-1].state.up, "that it answers again, too"
    world.settled()


def test_an_open_circuit_is_seen_from_the_head() -> None:
    world = World()
    for _ in range(10):
        asked = world.submit(0, job())
        while not asked.called:
            world.clock.advance(0.5)
            for _ in range(world.under_way):
                world.answer(0, ApiServerError("broken"))
        result_of(asked)
    world.office.look()
    client = job().client
    checking = Deferred.fromCoroutine(world.workers[1].pipeline.check_room(client, world.clock.seconds() + 100))
    assert isinstance(result_of(checking), NoBackendAvailable)
    world.settled()


def test_a_queue_that_fills_is_told_once_however_many_events_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    sent: list[bytes] = []
    write = world.workers[0].wire.write
    world.workers[0].wire.write = sent.append  # type: ignore[method-assign]
    asked = [Deferred.fromCoroutine(world.workers[0].pipeline.submit(job(str(number)))) for number in range(9)]
    world.workers[0].wire.write = write  # type: ignore[method-assign]
    assert not world.crew.messages
    looks = 0
    look = world.office.look

    def count() -> None:
        nonlocal looks
        looks += 1
        look()

    monkeypatch.setattr(world.office, "look", count)
    write(b"".join(sent))
    assert looks == 1
    world.clock.advance(0)
    assert world.crew.messages == [Outlook(world.pipeline.batch_window, False)]
    assert not world.workers[1].pipeline.outlook.roomy
    for _ in range(9):
        world.answer()
    assert world.workers[1].pipeline.outlook.roomy
    assert [result_of(each) for each in asked] == [COMPLETION] * 9
    world.settled()


def test_who_leaves_stops_the_generation_before_its_slot_is_given_away() -> None:
    world = World()
    first, _ = world.submit(0, job("first")), world.submit(1, job("second"))
    assert world.under_way == 1
    world.workers[0].parent_wire.held = world.workers[0].wire.held = True
    first.cancel()
    world.clock.advance(0)
    assert [event.prompt for event in world.backends[0].cancelled] == ["first"]
    assert world.under_way == 0
    assert world.pipeline.in_flight == 1, "the parent has not heard of it"
    world.workers[0].wire.release()
    world.clock.advance(0)
    assert world.under_way == 1
    world.answer()
    assert isinstance(result_of(first), CancelledError)
    world.settled()


def test_who_leaves_the_queue() -> None:
    world = World()
    world.submit(0, job("first"))
    second = world.submit(1, job("second"))
    assert world.pipeline.depth == 1
    second.cancel()
    assert world.pipeline.depth == 0
    assert isinstance(result_of(second), CancelledError)
    world.answer()
    world.settled()


def test_an_attempt_that_crosses_with_the_cancelling_is_not_made() -> None:
    world = World()
    world.submit(0, job("first"))
    second = world.submit(1, job("second"))
    world.workers[1].parent_wire.held = True
    world.answer()
    second.cancel()
    world.workers[1].parent_wire.release()
    world.clock.advance(0)
    assert [event.prompt for event, _ in world.backends[0].calls] == ["first"]
    assert isinstance(result_of(second), CancelledError)
    world.settled()


def test_the_end_of_an_event_stops_its_attempt() -> None:
    """As when the backend does not keep the deadline."""
    world = World()
    asked = world.submit(0, job(timeout=10))
    world.clock.advance(10)
    world.clock.advance(1)
    assert result_of(asked).code == "deadline_exceeded"
    assert len(world.backends[0].cancelled) == 1
    world.settled()


def test_a_worker_that_dies_gives_back_its_slots_and_its_places() -> None:
    world = World(MemoryBackend(slots=2))
    dying = [world.submit(0, job(f"dying {number}")) for number in range(4)]
    waiting = world.submit(1, job("waiting", "b"))
    assert (world.pipeline.in_flight, world.pipeline.depth) == (2, 3)
    for _, call in world.backends[0].calls:
        call.addErrback(lambda _: None)
    world.workers[0].die()
    world.clock.advance(0)
    assert (world.pipeline.in_flight, world.pipeline.depth) == (1, 0)
    assert world.workers[0].lost == [None]
    assert world.backends[0].calls[-1][0].prompt == "waiting"
    world.backends[0].calls[-1][1].callback(COMPLETION)
    assert result_of(waiting) == COMPLETION
    assert [member.running for member in world.pool.members] == [0]
    assert not any(each.called for each in dying), "there is nobody left to hear of it"


@pytest.mark.expects_logged_failure
def test_a_bug_in_the_parent_is_an_internal_error() -> None:
    world = World()

    async def fail(job: Job) -> None:
        raise RuntimeError("a bug")

    world.pipeline.submit = fail  # type: ignore[assignment, method-assign]
    found = result_of(world.submit(0, job()))
    assert isinstance(found, DomainError)
    assert found.code == "internal_error"
    world.settled()


def test_places_are_told_to_those_whose_callers_are_told() -> None:
    world = World()
    jobs = [job(str(number)) for number in range(3)]
    jobs[2].sink = object()  # type: ignore[assignment]
    for each in jobs:
        world.submit(0, each)
    pipeline = world.workers[0].pipeline
    assert pipeline.position(jobs[2]) is None
    world.workers[0].link.tell_places()
    assert [pipeline.position(each) for each in jobs] == [None, None, 2]
    world.answer()
    world.workers[0].link.tell_places()
    assert pipeline.position(jobs[2]) == 1
    world.workers[0].parent.handlers[Place](Place(1, 7))
    assert pipeline.position(jobs[1]) is None, "it has begun: that was on its way"
    world.answer()
    assert pipeline.position(jobs[2]) is None
    world.answer()
    assert pipeline.position(jobs[2]) is None
    world.settled()


def test_there_is_room_without_asking_while_there_is_plenty() -> None:
    world = World()
    pipeline = world.workers[0].pipeline
    client = job().client
    world.workers[0].wire.held = True
    assert pipeline.outlook.roomy
    assert result_of(Deferred.fromCoroutine(pipeline.check_room(client, 100))) is None
    asked = Deferred.fromCoroutine(pipeline.check_room(client, 10))
    assert not asked.called, "with little time left it is asked"
    world.workers[0].wire.release()
    assert result_of(asked) is None
    for number in range(7):
        world.submit(1, job(str(number)))
    assert not pipeline.outlook.roomy, "half of the places are taken"
    assert pipeline.batch_window == 17
    world.workers[0].wire.held = True
    asked = Deferred.fromCoroutine(pipeline.check_room(client, 100))
    assert not asked.called
    world.workers[0].wire.release()
    while world.under_way:
        world.answer()
    assert pipeline.outlook.roomy
    world.settled()


class TestSpans:
    def test_those_of_an_event(self) -> None:
        world = World()
        tracer = MemoryTracer(world.clock)
        one = job()
        world.submit(1, job("before"))
        world.clock.advance(2)
        one.span = tracer.start("POST /event")
        world.submit(0, one)
        world.clock.advance(3)
        world.answer()
        world.clock.advance(4)
        world.answer()
        span = tracer.named("pipeline.handle")
        assert span.attributes == {"ai_ticket.queue.seconds": 3, "ai_ticket.batch": False}
        assert (span.began, span.ended) == (5, 9)
        world.settled()

    def test_how_they_fail(self) -> None:
        world = World()
        tracer = MemoryTracer(world.clock)
        for end, code in (
            (lambda asked: world.answer(0, ContextLengthExceeded()), "context_length_exceeded"),
            (lambda asked: asked.cancel(), "cancelled"),
        ):
            one = job()
            one.span = tracer.start("POST /event")
            asked = world.submit(0, one)
            end(asked)
            result_of(asked)
            assert tracer.ended[-1].error == code
        world.settled()
