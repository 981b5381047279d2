"""The service tree: starting, the order in which it ends, signals, and what it looks at from time to time."""

import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from harness import make_connections
from logged import logged
from memory_log import Reader
from twisted.application.service import Application, Service
from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import ILogObserver

from ai_ticket import service as module
from ai_ticket.service import CERTIFICATE_SECONDS, STOP_SECONDS, AITicket
from ai_ticket.telemetry.logs import Logs


class Reactor(MemoryReactorClock):
    """A reactor in memory that can be sent signals."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = 0

    def callFromThread(self, callable: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        callable(*args, **kwargs)

    def startup(self) -> None:
        [(hook, _, _)] = self.triggers["during"]["startup"]
        hook()

    def stop(self) -> None:
        self.stopped += 1


class Part(Service):
    """A part of the background, which ends when the test says so."""

    def __init__(self, name: str, diary: list[str]) -> None:
        self.name = name
        self.ending: Deferred[None] | None = None
        self._diary = diary

    def startService(self) -> None:
        super().startService()
        self._diary.append(f"{self.name} starts")

    def stopService(self) -> Deferred[None]:
        super().stopService()
        self._diary.append(f"{self.name} ends")
        self.ending = Deferred()
        return self.ending


class World:
    """A service with two parts, and its surroundings, which keep a diary."""

    def __init__(self, token_file: Any = None) -> None:
        self.token_file = token_file
        self.reactor = Reactor()
        self.diary: list[str] = []
        self.drained: Deferred[None] = Deferred()
        self.reloaded: list[Deferred[None]] = []
        self.doubts: list[str] = []
        self.connections = make_connections(self.reactor)
        self.service = AITicket(
            reactor=self.reactor,
            logs=Logs("INFO", "json", 0, reactor=self.reactor, out=Reader()),
            warnings=["look here"],
            listeners=self,  # type: ignore[arg-type]
            connections=[self.connections],
            drain=self,  # type: ignore[arg-type]
            systemd=self,  # type: ignore[arg-type]
            reloadable=self,  # type: ignore[arg-type]
            reload_interval=30,
            in_thread=execute,
            settle=lambda: self.diary.append("memory settled"),
            leave=lambda seconds: self.diary.append(f"leaves within {seconds} s"),
        )
        self.parts = [Part(name, self.diary) for name in ("first", "last")]
        for part in self.parts:
            part.setServiceParent(self.service)

    # What it is connected with.

    def open(self) -> None:
        self.diary.append("ports open")

    async def close_at_once(self) -> None:
        self.diary.append("ports close")

    async def run(self) -> None:
        self.diary.append("drain")
        with suppress(CancelledError):
            await self.drained

    def report(self) -> None:
        self.diary.append("report")

    def ready(self, status: str) -> None:
        self.diary.append("ready")

    def reloading(self) -> None:
        self.diary.append("reloading")

    def stop(self) -> None:
        self.diary.append("systemd hears no more")

    async def reload(self, in_thread: Any) -> None:
        self.reloaded.append(Deferred())
        await self.reloaded[-1]

    def certificate_warnings(self, now: float) -> list[str]:
        assert now == self.reactor.seconds()
        return self.doubts

    # What the test does.

    def start(self) -> None:
        self.service.startService()
        self.reactor.startup()
        self.diary.clear()

    def end(self) -> list[Any]:
        done: list[Any] = []
        self.service.stopService().addBoth(done.append)
        return done


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[..., None]]:
    found: dict[int, Callable[..., None]] = {}
    fake = SimpleNamespace(
        SIGHUP=signal.SIGHUP,
        signal=lambda number, handler: found.update({number: handler}),
    )
    monkeypatch.setattr(module, "signal", fake)
    return found


@pytest.fixture
def world(handlers: dict[int, Callable[..., None]]) -> Iterator[World]:
    found = World()
    yield found
    assert not found.reactor.getDelayedCalls()


def finish(world: World) -> None:
    done = world.end()
    for part in world.parts:
        assert part.ending is not None
        part.ending.callback(None)
    assert done == [None]


def test_ready_is_said_when_ports_are_open_parts_have_started_and_signals_are_ours(
    world: World, handlers: dict[int, Callable[..., None]]
) -> None:
    with logged() as lines:
        world.service.startService()
    assert "warn: look here" in lines
    assert world.diary == ["ports open", "first starts", "last starts"]
    assert set(handlers) == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}, "who is told to stop while it starts, does"
    handlers.clear()
    world.reactor.startup()
    assert world.diary[3:] == ["memory settled", "ready"]
    assert set(handlers) == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}, "the reactor has overwritten them"
    finish(world)


def test_it_gives_its_log_to_the_application(world: World) -> None:
    application = Application("test")
    world.service.setServiceParent(application)
    assert isinstance(application.getComponent(ILogObserver), Logs)


def test_parts_end_one_after_the_other_and_the_report_comes_last(world: World) -> None:
    world.start()
    done = world.end()
    assert world.diary == ["ports close", "first ends"]
    first, last = world.parts
    assert first.ending is not None
    first.ending.callback(None)
    assert world.diary[2:] == ["last ends"]
    assert last.ending is not None
    last.ending.callback(None)
    assert world.diary[3:] == ["report", "systemd hears no more"]
    assert done == [None]


def test_a_part_that_does_not_end_is_not_waited_for_for_ever(world: World) -> None:
    world.start()
    done = world.end()
    world.reactor.advance(STOP_SECONDS - 0.1)
    assert "last ends" not in world.diary
    with logged() as lines:
        world.reactor.advance(0.2)
    assert lines == ["warn: first did not end in time"]
    world.reactor.advance(STOP_SECONDS)
    assert done == [None]
    assert world.diary[-2:] == ["report", "systemd hears no more"]


@pytest.mark.expects_logged_failure
def test_a_part_that_fails_to_end_does_not_keep_the_others_from_it(world: World) -> None:
    world.start()
    done = world.end()
    first, last = world.parts
    assert first.ending is not None
    first.ending.errback(RuntimeError())
    assert last.ending is not None
    last.ending.callback(None)
    assert done == [None]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_begins_the_drain_and_its_end_stops_the_reactor(
    world: World, handlers: dict[int, Callable[..., None]], number: int
) -> None:
    world.start()
    handlers[number](number, None)
    assert world.diary == ["drain"]
    assert not world.reactor.stopped
    world.drained.callback(None)
    assert world.reactor.stopped == 1
    finish(world)
    assert world.diary[-1] == "leaves within 5.0 s"


@pytest.mark.expects_logged_failure
def test_a_drain_that_fails_ends_it_all_the_same(world: World, handlers: dict[int, Callable[..., None]]) -> None:
    world.start()
    handlers[signal.SIGTERM]()
    world.drained.errback(RuntimeError())
    assert world.reactor.stopped == 1
    finish(world)


def test_a_second_signal_ends_the_drain_and_leaves_the_parts_no_time(
    world: World, handlers: dict[int, Callable[..., None]]
) -> None:
    world.start()
    handlers[signal.SIGTERM]()
    handlers[signal.SIGINT]()
    assert world.reactor.stopped == 1
    done = world.end()
    world.reactor.pump([0, 0, 0])
    assert done == [None]
    assert world.reactor.seconds() == 0
    assert world.diary[-1] == "leaves within 0.5 s"


def test_a_second_signal_while_the_parts_end(world: World, handlers: dict[int, Callable[..., None]]) -> None:
    world.start()
    handlers[signal.SIGTERM]()
    world.drained.callback(None)
    done = world.end()
    assert world.diary[-1] == "first ends"
    handlers[signal.SIGTERM]()
    world.reactor.pump([0, 0])
    assert done == [None]
    assert world.reactor.stopped == 1


def test_systemd_is_told_of_a_reload(world: World, handlers: dict[int, Callable[..., None]]) -> None:
    """And that it is over when the last of several is."""
    world.start()
    handlers[signal.SIGHUP]()
    handlers[signal.SIGHUP]()
    assert world.diary == ["reloading", "reloading"]
    world.doubts = ["it expires"]
    with logged() as lines:
        world.reloaded[0].callback(None)
    assert "warn: it expires" in lines
    assert world.diary[2:] == []
    world.reloaded[1].callback(None)
    assert world.diary[2:] == ["ready"]
    finish(world)


@pytest.mark.expects_logged_failure
def test_a_reload_that_fails_is_over_too(world: World, handlers: dict[int, Callable[..., None]]) -> None:
    world.start()
    handlers[signal.SIGHUP]()
    world.reloaded[0].errback(RuntimeError())
    assert world.diary == ["reloading", "ready"]
    finish(world)


def test_the_certificate_is_looked_at_once_a_day(world: World) -> None:
    world.start()
    world.doubts = ["it expires"]
    with logged() as lines:
        world.reactor.advance(CERTIFICATE_SECONDS - 1)
        assert lines == []
        for day in range(1, 4):
            world.reactor.advance(CERTIFICATE_SECONDS)
            assert lines == ["warn: it expires"] * day
    finish(world)


def test_the_token_file_is_looked_at_until_the_end(handlers: dict[int, Callable[..., None]]) -> None:
    looks: list[float] = []

    class Tokens:
        async def reload(self, in_thread: Any) -> None:
            looks.append(world.reactor.seconds())

    world = World(Tokens())
    world.start()
    world.reactor.pump([15] * 5)
    assert looks == [30, 60]
    finish(world)
    assert not world.reactor.getDelayedCalls()
