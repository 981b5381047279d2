"""The pipeline before a real pool: backends that come and go."""

from typing import Any

import pytest
from harness import COMPLETION, MemoryBackend
from msgspec.structs import replace
from simulation import RecordedEvents, at_once, make_job
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ai_ticket.backend.circuit import CircuitState
from ai_ticket.backend.pool import Pool
from ai_ticket.backend.retry import make_retry_policy
from ai_ticket.errors import NoBackendAvailable
from ai_ticket.pipeline.fair import FairPipeline


class World:
    """Some servers in a pool, and a pipeline before it."""

    def __init__(self, *slots: int) -> None:
        self.clock = Clock()
        self.servers = [MemoryBackend(count) for count in slots]
        policy = make_retry_policy(max_attempts=3, silence_is_curable=False, random=lambda: 1.0)
        self.pool = Pool([self.servers], clock=self.clock, random=lambda: 1.0, policy=policy)
        self.recorded = RecordedEvents()
        self.pipeline = FairPipeline(
            self.pool,
            clock=self.clock,
            recorder=self.recorded,
            max_concurrency=None,
            queue_limit=1000,
            batch_size=16,
            batch_linger=0.0,
            check_backend=self.pool.check,
        )
        self.pool.watch(self.pipeline.look_again)
        self.outcomes: list[Any] = []

    def submit(self, count: int) -> None:
        for _ in range(count):
            job = make_job("?", deadline=self.clock.seconds() + 1000)
            Deferred.fromCoroutine(self.pipeline.submit(job)).addErrback(lambda failure: failure.value).addCallback(
                self.outcomes.append
            )
        self.clock.advance(0)
        assert self.waiting_in_the_pool == 0

    @property
    def running(self) -> list[int]:
        return [sum(not answer.called for _, answer in server.calls) for server in self.servers]

    @property
    def waiting_in_the_pool(self) -> int:
        return self.pipeline.in_flight - sum(self.running)

    def open(self, number: int) -> None:
        circuit = self.pool.members[number].circuit
        while circuit.state is not CircuitState.OPEN:
            circuit.failed(circuit.enter())

    def probe(self, number: int, **found: Any) -> None:
        self.servers[number].state = replace(self.servers[number].state, **found)
        Deferred.fromCoroutine(self.pool.members[number].probe())
        self.clock.advance(0)

    def finish(self, number: int) -> None:
        next(answer for _, answer in self.servers[number].calls if not answer.called).callback(COMPLETION)
        self.clock.advance(0)

    def settle(self) -> None:
        while any(self.running):
            for number, count in enumerate(self.running):
                if count:
                    self.finish(number)
        assert self.outcomes
        assert not self.clock.getDelayedCalls()


def test_nobody_waits_in_the_pool_where_nothing_is_fair() -> None:
    world = World(4, 2)
    world.probe(0, up=False)
    world.submit(10)
    assert (world.running, world.pipeline.depth) == ([0, 2], 8)
    world.probe(0, up=True)
    assert (world.running, world.pipeline.depth) == ([4, 2], 4)
    world.settle()
    assert world.outcomes == [COMPLETION] * 10


def test_slots_that_a_probe_learns_are_used_at_once() -> None:
    world = World(1)
    world.submit(10)
    assert world.running == [1]
    world.probe(0, slots=4)
    assert (world.running, world.waiting_in_the_pool) == ([4], 0)
    world.settle()


def test_a_trial_begins_when_its_time_has_come_though_nothing_else_happens() -> None:
    world = World(4, 1)
    world.open(0)
    world.submit(1)
    world.submit(5)
    assert world.running == [0, 1]
    world.clock.advance(1)
    assert (world.running, world.waiting_in_the_pool) == ([1, 1], 0)
    world.finish(0)
    assert (world.running, world.waiting_in_the_pool) == ([4, 1], 0), "it went well"
    world.settle()


def test_every_circuit_open_is_told_at_once_also_beside_a_long_answer() -> None:
    world = World(2, 2)
    world.submit(3)
    world.open(0)
    world.open(1)
    world.submit(200)
    assert world.running == [1, 2] or world.running == [2, 1]
    assert len(world.outcomes) == 200
    assert all(isinstance(found, NoBackendAvailable) for found in world.outcomes)
    world.clock.advance(5)
    world.submit(1)
    world.settle()


def test_that_no_backend_is_available_is_known_from_the_head_and_counted() -> None:
    world = World(1, 1)
    client = make_job("?", deadline=None).client
    world.open(0)
    at_once(world.pipeline.check_room(client, 100))
    world.open(1)
    with pytest.raises(NoBackendAvailable):
        at_once(world.pipeline.check_room(client, 100))
    assert world.recorded.outcomes == ["no_backend_available"]
