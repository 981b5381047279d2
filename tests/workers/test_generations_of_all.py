"""A client's generations, wherever they are: asked after and stopped from any worker."""

from collections.abc import Iterator
from typing import Any

import pytest
from harness import COMPLETION, MemoryBackend
from linked import Told, Worker, make_office, make_pipeline, relayed, result_of
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ai_ticket.backend.pool import Pool
from ai_ticket.backend.retry import make_retry_policy
from ai_ticket.errors import InternalError, Overloaded
from ai_ticket.event import Completion, Event, Parameters
from ai_ticket.interfaces import Client, Figures, Job
from ai_ticket.workers import generations as module
from ai_ticket.workers.generations import LinkLost


class World:
    """A parent and two workers, and a model server with four slots."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.backend = MemoryBackend(slots=4)
        crew = Told()
        pool = Pool(
            [[relayed(self.backend, crew)]],
            clock=self.clock,
            random=lambda: 0.5,
            policy=make_retry_policy(max_attempts=3, silence_is_curable=False, random=lambda: 0.5),
        )
        pipeline = make_pipeline(self.clock, pool)
        self.office = make_office(self.clock, pipeline, crew)
        self.workers = [Worker(self.office, crew, self.clock, [self.backend]) for _ in range(2)]
        self.submitted: list[Deferred[Completion]] = []

    def submit(self, worker: int, key: str | None, client: str = "anne") -> Job:
        event = Event([], Parameters(max_tokens=9), raw_prompt="x", key=key)
        job = Job(event=event, client=Client(client, None, "192.0.2.1"), timeout=120)
        submitting = Deferred.fromCoroutine(self.workers[worker].own_generations.submit(job))
        submitting.addErrback(lambda failure: failure.value)
        self.submitted.append(submitting)
        self.clock.advance(0)
        return job

    def write(self, job: Job, text: str) -> None:
        assert job.sink is not None
        job.sink.write(text)

    def text(self, worker: int, key: str, client: str = "anne") -> Any:
        return result_of(Deferred.fromCoroutine(self.workers[worker].generations.text(client, key)))

    def stop(self, worker: int, key: str, client: str = "anne") -> Any:
        return result_of(Deferred.fromCoroutine(self.workers[worker].generations.stop(client, key)))

    def figures(self, worker: int, client: str = "anne") -> Any:
        return result_of(Deferred.fromCoroutine(self.workers[worker].generations.figures(client)))

    def end(self) -> None:
        """Of the generation that is under way for the longest."""
        [call, *_] = [call for _, call in self.backend.calls if not call.called]
        call.callback(COMPLETION)
        self.clock.advance(0)


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    yield found
    while any(not call.called for _, call in found.backend.calls):
        found.end()
    assert not found.office.generations._under_way._of


@pytest.mark.parametrize("asked", [0, 1])
def test_the_text_is_told_wherever_it_is_asked_for(world: World, asked: int) -> None:
    world.write(world.submit(0, "k"), "so ")
    world.write(world.submit(1, "other"), "no")
    assert world.text(asked, "k") == "so "
    assert world.text(asked, "k", "bob") == world.text(asked, "none") == ""
    assert world.text(asked, "") == "", "it is not the only one"


def test_the_only_one_needs_no_key(world: World) -> None:
    world.write(world.submit(1, "k"), "so ")
    world.submit(0, None)
    assert world.text(0, "") == "so "
    assert world.stop(0, "") is True
    assert result_of(world.submitted[0]).text == "so "
    assert world.stop(0, "") is True, "there is none that has a key"
    assert world.stop(0, "k") is False


def test_of_several_of_a_key_the_last_is_told_and_all_are_stopped(world: World) -> None:
    for worker, text in ((0, "first"), (1, "second"), (0, "last")):
        world.write(world.submit(worker, "k"), text)
    assert world.text(1, "k") == "last"
    assert world.stop(1, "k", "bob") is False
    assert world.stop(1, "k") is True
    assert [result_of(each).text for each in world.submitted] == ["first", "second", "last"]
    assert world.text(1, "k") == ""


def test_figures_are_those_of_all(world: World) -> None:
    assert world.figures(0) == Figures(0, 0)
    world.submit(0, "a")
    world.clock.advance(3)
    world.end()
    world.submit(1, "b")
    world.clock.advance(5)
    world.end()
    world.clock.advance(7)
    world.submit(1, None, "bob")
    for worker in (0, 1):
        found = world.figures(worker)
        assert (found.generations, found.idle_seconds, found.prompt_seconds) == (2, 7, 5)
        assert (found.queue, found.in_flight) == (0, 1)


def test_a_worker_that_dies_meanwhile_has_nothing(world: World) -> None:
    world.write(world.submit(1, "k"), "so ")
    world.submit(0, "mine")
    world.workers[1].wire.held = True
    asked = [
        Deferred.fromCoroutine(world.workers[0].generations.text("anne", "k")),
        Deferred.fromCoroutine(world.workers[0].generations.stop("anne", "k")),
        Deferred.fromCoroutine(world.workers[0].generations.figures("anne")),
    ]
    world.workers[1].die()
    assert [result_of(each) for each in asked] == ["", False, Figures(0, 2)]
    lost = result_of(Deferred.fromCoroutine(world.workers[1].link.generations.figures("anne")))
    assert isinstance(lost, LinkLost)
    assert world.text(0, "") == "", "of the other's nothing is left"
    assert world.stop(0, "k") is False


def test_texts_come_one_at_a_time_and_not_too_many_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ASKING", 2)
    world.write(world.submit(1, "k"), "so ")
    world.workers[1].wire.held = True
    asked = [Deferred.fromCoroutine(world.workers[0].generations.text("anne", "k")) for _ in range(4)]
    refused = result_of(asked.pop())
    assert isinstance(refused, Overloaded)
    assert refused.retry_after == 1.0
    world.workers[1].wire.release()
    assert [result_of(each) for each in asked] == ["so "] * 3


def test_a_text_that_is_too_long_is_refused_rather_than_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_TOLD", 5)
    job = world.submit(1, "k")
    world.write(job, "12345")
    assert world.text(0, "k") == "12345"
    world.write(job, "6")
    assert isinstance(world.text(0, "k"), Overloaded)


@pytest.mark.expects_logged_failure
def test_a_fault_of_ours_is_told_as_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(client: str, key: str) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(world.office.generations, "stop", broken)
    assert isinstance(world.stop(0, "k"), InternalError)
