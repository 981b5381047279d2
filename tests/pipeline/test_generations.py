"""Generations by their clients' keys: a pipeline that is otherwise the one beneath it."""

from typing import Any

import pytest
from harness import COMPLETION, MemoryPipeline
from linked import result_of
from msgspec.structs import replace
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import Clock

from ai_ticket.errors import ApiResponseFormatError, Overloaded
from ai_ticket.event import Completion, Event, Parameters, Usage
from ai_ticket.interfaces import Client, Figures, Job
from ai_ticket.pipeline import generations as module
from ai_ticket.pipeline.generations import Generations

ANNE, BOB = Client("anne", None, "192.0.2.1"), Client("bob", None, "192.0.2.2")


class Collected:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def write(self, text: str) -> None:
        self.got.append(text)

    def relay(self, chunks: bytes) -> None:
        self.got.append(chunks)

    def attach(self, producer: Any) -> None:
        self.got.append(producer)


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.inner = MemoryPipeline()
        self.load = (0, 0)
        self.generations = Generations(self.inner, self.clock, lambda: self.load)
        self.answers: list[Deferred[Completion]] = []
        self.inner.answer = self._answer

    def _answer(self) -> Deferred[Completion]:
        self.answers.append(Deferred())
        return self.answers[-1]

    def submit(
        self, key: str | None = "k", client: Client = ANNE, sink: Collected | None = None
    ) -> tuple[Job, Deferred[Completion]]:
        event = Event([], Parameters(5), raw_prompt="Once", key=key, stream=sink is not None)
        job = Job(event=event, client=client, timeout=120, sink=sink, began_at=self.clock.seconds())
        return job, Deferred.fromCoroutine(self.generations.submit(job))

    def now(self, coroutine: Any) -> Any:
        return result_of(Deferred.fromCoroutine(coroutine))

    def text(self, key: str, client: str = "anne") -> str:
        return str(self.now(self.generations.text(client, key)))

    def stop(self, key: str, client: str = "anne") -> bool:
        return bool(self.now(self.generations.stop(client, key)))

    def figures(self, client: str = "anne") -> Figures:
        found: Figures = self.now(self.generations.figures(client))
        return found


@pytest.fixture
def world() -> World:
    return World()


def result(deferred: Deferred[Any]) -> Any:
    got: list[Any] = []
    deferred.addCallback(got.append)
    return got[0]


def test_it_is_the_pipeline_beneath(world: World) -> None:
    job, _ = world.submit()
    world.inner.place = 4
    assert (world.generations.position(job), world.generations.batch_window) == (4, 8)
    world.inner.refusal = Overloaded()
    assert isinstance(world.now(world.generations.check_room(ANNE, 5.0)), Overloaded)
    world.answers[0].callback(COMPLETION)


def test_without_a_key_it_keeps_nothing(world: World) -> None:
    job, done = world.submit(key=None)
    assert job.sink is None
    assert world.text("") == ""
    world.answers[0].callback(COMPLETION)
    assert result(done) is COMPLETION
    assert world.figures() == Figures(0, 0)


def test_the_text_is_both_kept_and_answered(world: World) -> None:
    job, done = world.submit()
    assert job.sink is not None
    job.sink.write("upon ")
    job.sink.write("a time")
    assert world.text("k") == "upon a time"
    world.answers[0].callback(replace(COMPLETION, text=""))
    assert result(done) == replace(COMPLETION, text="upon a time")
    assert world.text("k") == ""


def test_a_sink_gets_all_that_it_would(world: World) -> None:
    sink = Collected()
    job, done = world.submit(sink=sink)
    assert job.sink is not None
    job.sink.attach(None)  # type: ignore[arg-type]
    job.sink.write("upon")
    job.sink.relay(b"data: x\n\n")
    assert sink.got == [None, "upon", b"data: x\n\n"]
    world.answers[0].callback(replace(COMPLETION, text=""))
    assert result(done).text == ""


def test_what_is_stopped_ends_well(world: World) -> None:
    job, done = world.submit()
    assert job.sink is not None
    job.sink.write("upon")
    assert world.stop("k")
    assert result(done) == Completion("upon", "length", "", None)
    assert not world.stop("k")


def test_what_is_cancelled_does_not(world: World) -> None:
    """Its caller left, or the service ends."""
    _, done = world.submit()
    done.cancel()
    failed: list[Any] = []
    done.addErrback(lambda failure: failed.append(failure.check(CancelledError)))
    assert failed == [CancelledError]
    assert world.text("") == ""


def test_what_ends_by_itself_while_it_is_stopped(world: World) -> None:
    world.inner.answer = lambda: succeed(COMPLETION)
    _, done = world.submit()
    assert result(done) == replace(COMPLETION, text="")


def test_keys_are_each_clients_own(world: World) -> None:
    first, _ = world.submit()
    second, done = world.submit(client=BOB)
    for job, text in ((first, "anne's"), (second, "bob's")):
        assert job.sink is not None
        job.sink.write(text)
    assert (world.text("k"), world.text("k", "bob"), world.text("k", "eve")) == ("anne's", "bob's", "")
    assert not world.stop("k", "eve")
    assert world.stop("k")
    assert world.text("k", "bob") == "bob's"
    world.answers[1].callback(COMPLETION)
    assert result(done).text == "bob's"


def test_an_empty_key_means_the_only_one(world: World) -> None:
    first, _ = world.submit("a")
    assert first.sink is not None
    first.sink.write("upon")
    assert world.text("") == "upon"
    world.submit("b")
    assert (world.text(""), world.stop("")) == ("", False)
    assert world.stop("b")
    assert world.stop("")
    assert world.stop("")  # nothing is left, as it is meant to be
    assert not world.stop("a")


def test_a_model_that_never_stops(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_TEXT", 10)
    job, _ = world.submit()
    assert job.sink is not None
    job.sink.write("x" * 10)
    with pytest.raises(ApiResponseFormatError):
        job.sink.write("x")
    world.answers[0].callback(COMPLETION)


def test_figures(world: World) -> None:
    world.load = (7, 2)
    job, _ = world.submit()
    assert job.sink is not None
    world.clock.advance(1)
    job.sink.write("upon")
    world.clock.advance(2)
    world.answers[0].callback(replace(COMPLETION, usage=Usage(10, 20, 30), finish_reason="length"))
    world.clock.advance(4)
    assert world.figures() == Figures(7, 2, 1, 4, 10, 20, 1, 2, "length")
    assert world.figures("bob") == Figures(7, 2)
    world.submit()
    world.answers[1].callback(replace(COMPLETION, usage=None))
    assert world.figures() == Figures(7, 2, 2, 0, 0, 0, 0, 0, "stop")


def test_clients_are_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CLIENTS", 2)
    world.inner.answer = lambda: succeed(COMPLETION)
    for name in ("a", "b", "a", "c"):
        world.submit(client=Client(name, None, "192.0.2.1"))
    assert [world.figures(name).generations for name in "abc"] == [2, 0, 1]
