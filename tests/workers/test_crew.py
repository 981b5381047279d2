"""The workers of a service, on a clock: they start, are started again when they end, and end together."""

from collections.abc import Callable, Iterator

import pytest
from linked import Wire, connect, make_office, make_pipeline, result_of
from logged import logged
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ai_ticket.listening import CannotStart
from ai_ticket.settings import Settings
from ai_ticket.web.site import Tally
from ai_ticket.workers.channel import Channel, from_parent
from ai_ticket.workers.crew import END_SECONDS, HUNG_SECONDS, START_SECONDS, STEADY, TOLD_SECONDS, Crew
from ai_ticket.workers.ending import CrewDrain
from ai_ticket.workers.link import Link
from ai_ticket.workers.message import Message
from ai_ticket.workers.messages import (
    AskSamples,
    Family,
    Hurry,
    InForce,
    Outlook,
    Pem,
    Ping,
    Pong,
    Ready,
    Sample,
    Samples,
    Start,
    Stop,
    Stopped,
    Stopping,
)
from ai_ticket.workers.process import NotReady

DELAY, GRACE = 3.0, 60.0


class FakeProcess:
    """A worker process that answers pings, unless it `hangs`; else it does what the test says."""

    def __init__(self, ended: Callable[[str], None], pid: int, fails: str | None) -> None:
        self.pid: int | None = pid
        self.told: list[Message] = []
        self.hangs = False
        self.counted = self.connections = 0
        self.memory = 100
        self.killed = False
        self.immortal = False
        self._ended = ended
        self._fails = fails
        self.channel = Channel(from_parent, self._take, lambda: None)
        self.wire: Wire

    def begin(self, start: Start) -> None:
        self.told.append(start)

    def wait_ready(self, seconds: float) -> None:
        if self._fails is not None:
            raise NotReady(self._fails)

    def connect(self, channel: Channel) -> None:
        self.wire, _ = connect(self.channel, channel)

    def kill(self) -> None:
        self.killed = True
        if not self.immortal:
            self.end("was ended by signal 9")

    def end(self, how: str = "ended with status 0") -> None:
        if self.pid is not None:
            self.pid = None
            if hasattr(self, "wire"):
                self.wire.loseConnection()
            self._ended(how)

    def say(self, message: Message) -> None:
        self.channel.send(message)

    def _take(self, message: Message) -> None:
        self.told.append(message)
        if isinstance(message, Ping) and not self.hangs:
            self.say(Pong(self.connections, self.memory))
        if isinstance(message, AskSamples) and not self.hangs:
            family = Family("events", "counter", "What.", [Sample("events_total", {}, self.counted)])
            self.say(Samples(message.number, [family]))

    def heard(self, kind: type[Message]) -> int:
        return sum(isinstance(each, kind) for each in self.told)


class World:
    """A crew of two, and its end."""

    def __init__(self, clock: Clock, fails: dict[int, str] | None = None) -> None:
        self.clock = clock
        self.launched: list[FakeProcess] = []
        self.fails = fails or {}
        self.lagging = False
        self.refusing: list[OSError] = []
        self.told: list[str] = []
        self.pipeline = make_pipeline(self.clock)
        office = make_office(self.clock, self.pipeline, None)  # type: ignore[arg-type]
        self.crew = Crew(
            2,
            clock=self.clock,
            launch=self._launch,
            make_link=lambda **told: Link(office, **told),
            start=self._start,
            used_memory=lambda: 1000,
            lagging=lambda: self.lagging,
            jitter=lambda: 1.0,
        )
        office.crew = self.crew
        self.ending = CrewDrain(
            self.clock,
            delay=DELAY,
            grace=GRACE,
            crew=self.crew,
            listeners=self,  # type: ignore[arg-type]
            scrapers=self,  # type: ignore[arg-type]
            pipeline=self,
            systemd=self,  # type: ignore[arg-type]
        )

    def _launch(self, ended: Callable[[str], None]) -> FakeProcess:
        if self.refusing:
            raise self.refusing.pop()
        number = len(self.launched)
        process = FakeProcess(ended, 100 + number, self.fails.get(number))
        self.launched.append(process)
        return process

    def _start(self, number: int) -> Start:
        in_force = InForce("INFO", 0, [], [], Pem(b"", b""), None)
        return Start(number, "a.reactor", Settings(), [], in_force, [], Outlook(1, True))

    # What the end calls.

    async def close(self) -> None:
        self.told.append("ports close")

    def drain(self, deadline: float = 0.0) -> None:
        """Of the pipeline, which gets a deadline, and of the scrapers."""
        self.told.append(f"drained by {deadline:g}" if deadline else "scrapers drain")

    def leave(self) -> None:
        self.told.append("scrapers leave")

    def stopping(self, status: str, seconds: float) -> None:
        self.told.append(f"{status} within {seconds:g}")

    def status(self, text: str) -> None:
        self.told.append(text)

    # What the test does.

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.25)):
            self.clock.advance(0.25)

    @property
    def alive(self) -> list[FakeProcess]:
        return [process for process in self.launched if process.pid is not None]

    def stop(self) -> Deferred[None]:
        stopping = self.crew.stopService()
        self.clock.advance(0)
        return stopping

    async def counted(self) -> float:
        [family] = await self.crew.families()
        return sum(sample.value for sample in family.samples)


@pytest.fixture
def world() -> Iterator[World]:
    clock = Clock()
    found = World(clock)
    found.crew.startService()
    assert found.crew.serving == 2
    yield found
    stopping = found.stop()
    for process in found.alive:
        process.end()
    found.run(1)
    assert result_of(stopping) is None
    assert not clock.getDelayedCalls()


class TestStarting:
    def test_each_is_told_what_it_is(self, world: World) -> None:
        assert [process.told[0].worker for process in world.launched] == [0, 1]  # type: ignore[attr-defined]

    def test_one_that_does_not_get_so_far_ends_the_start(self) -> None:
        world = World(Clock(), {1: "it has ended"})
        with logged() as lines, pytest.raises(CannotStart, match="worker 1 did not start: it has ended"):
            world.crew.startService()
        assert lines == ["critical: worker 1 did not start: it has ended"]
        assert not world.alive
        assert not world.clock.getDelayedCalls()

    def test_nor_does_it_start_where_there_can_be_no_further_process(self) -> None:
        world = World(Clock())
        world.refusing = [OSError(11, "Resource temporarily unavailable")]
        with logged(), pytest.raises(CannotStart, match="Resource temporarily unavailable"):
            world.crew.startService()
        assert not world.alive


class TestStartingAgain:
    def first(self, world: World) -> FakeProcess:
        """Whichever is the first worker now."""
        [found] = [process for process in world.alive if process is not world.launched[1]]
        return found

    def test_one_that_ends_is_replaced(self, world: World) -> None:
        with logged() as lines:
            world.launched[0].end("was ended by signal 9")
        assert lines == ["error: worker 0 was ended by signal 9; it is started again in 0.1 s"]
        assert world.crew.serving == 1
        world.run(0.25)
        assert len(world.alive) == 2
        again = world.launched[2]
        assert again.told[0] == world._start(0)
        assert world.crew.serving == 1
        again.say(Ready())
        assert world.crew.serving == 2

    def test_one_that_ends_again_and_again_takes_ever_longer(self, world: World) -> None:
        waits = []
        for _ in range(12):
            self.first(world).end()
            assert len(world.alive) == 1
            began = world.clock.seconds()
            while len(world.alive) == 1:
                world.clock.advance(1 / 64)
            waits.append(world.clock.seconds() - began)
        assert waits == pytest.approx([min(0.1 * 2**n, 30) for n in range(12)], abs=0.05)
        self.first(world).say(Ready())
        world.run(STEADY)
        with logged() as lines:
            self.first(world).end()
        assert "in 0.1 s" in lines[0], "it had served for a while"

    def test_one_whose_channel_breaks_is_of_no_use(self, world: World) -> None:
        world.launched[1].wire.loseConnection()
        assert world.launched[1].killed
        world.run(0.25)
        assert len(world.alive) == 2

    def test_where_there_can_be_no_further_process_it_is_tried_again(self, world: World) -> None:
        world.refusing = [OSError(11, "no more"), OSError(11, "no more")]
        with logged() as lines:
            world.launched[0].end()
            world.run(2)
        assert "could not be started (no more)" in lines[1]
        assert len(world.alive) == 2

    def test_one_that_takes_too_long_to_start_is_killed(self, world: World) -> None:
        world.launched[0].end()
        world.run(0.25)
        late = world.launched[2]
        world.run(START_SECONDS - 2)
        assert not late.killed
        world.run(3)
        assert late.killed


class TestLookingAfter:
    def test_one_that_hangs_is_killed_and_replaced(self, world: World) -> None:
        world.run(20)
        assert world.crew.well
        world.launched[1].hangs = True
        world.run(HUNG_SECONDS - 2)
        assert not world.launched[1].killed
        assert world.crew.well
        with logged() as lines:
            world.run(4)
        assert lines[0] == "error: worker 1 hangs, and is killed"
        assert not world.launched[0].killed
        assert len(world.alive) == 2

    def test_one_that_can_not_be_killed_is_not_well(self, world: World) -> None:
        world.launched[0].hangs = world.launched[0].immortal = True
        with logged():
            world.run(HUNG_SECONDS + 4)
        assert not world.crew.well

    def test_each_hears_how_many_callers_there_are_for_each(self, world: World) -> None:
        world.launched[0].connections, world.launched[1].connections = 5, 2
        world.run(2)
        for process in world.launched:
            assert [each for each in process.told if isinstance(each, Ping)][-1] == Ping(3.5, 1100, False)

    def test_and_how_much_memory_the_others_use_and_whether_the_parent_is_late(self, world: World) -> None:
        world.launched[0].memory = 70
        world.run(2)
        world.lagging = True
        world.run(1)
        heard = [[each for each in process.told if isinstance(each, Ping)][-1] for process in world.launched]
        assert heard == [Ping(0.0, 1100, True), Ping(0.0, 1070, True)]


class TestMetrics:
    def test_all_are_summed_and_none_is_lost_with_its_process(self, world: World) -> None:
        world.launched[0].counted, world.launched[1].counted = 5, 7
        assert result_of(Deferred.fromCoroutine(world.counted())) == 12
        world.launched[0].counted = 6
        world.run(1)
        with logged():
            world.launched[0].end()
        assert result_of(Deferred.fromCoroutine(world.counted())) == 13
        world.run(0.25)
        world.launched[2].say(Ready())
        world.launched[2].counted = 1
        assert result_of(Deferred.fromCoroutine(world.counted())) == 14

    def test_one_that_is_slow_is_as_it_was(self, world: World) -> None:
        world.launched[0].counted, world.launched[1].counted = 5, 7
        world.run(1)
        world.launched[0].hangs = True
        world.launched[0].counted, world.launched[1].counted = 50, 8
        asking = Deferred.fromCoroutine(world.counted())
        assert not asking.called
        world.run(1)
        assert result_of(asking) == 13

    def test_one_that_ends_meanwhile(self, world: World) -> None:
        world.launched[0].counted, world.launched[1].counted = 5, 7
        world.run(1)
        world.launched[0].hangs = True
        asking = Deferred.fromCoroutine(world.counted())
        with logged():
            world.launched[0].end()
        assert result_of(asking) == 12


class TestTheEnd:
    def test_it_waits_for_each_and_sums_what_they_say(self, world: World) -> None:
        running = Deferred.fromCoroutine(world.ending.run())
        assert [process.heard(Stop) for process in world.launched] == [1, 1]
        with logged() as lines:
            for process, count in zip(world.launched, (2, 3), strict=True):
                process.say(Stopping(count))
            world.run(0.25)
        assert lines == ["info: stopping: 5 requests in flight"]
        assert world.told == ["stopping within 63", "scrapers drain", "stopping: 5 requests in flight"]
        world.run(DELAY)
        assert world.told[3:] == ["drained by 63", "ports close", "no longer listening"]
        world.launched[0].say(Stopped(Tally(finished=2, refused=1)))
        world.launched[0].end()
        world.run(10)
        assert not running.called
        world.launched[1].say(Stopped(Tally(finished=2, cut=1, left=4)))
        world.run(0.25)
        assert result_of(running) is None
        assert world.told[6:] == ["scrapers leave"]
        with logged() as lines:
            world.ending.report()
        assert lines == ["info: stopped: 4 requests finished, 1 cut, 1 refused, 4 given up by their callers"]
        assert len(world.launched) == 2, "none was started again"

    def test_what_one_had_that_is_gone_is_cut(self, world: World) -> None:
        running = Deferred.fromCoroutine(world.ending.run())
        for process, count in zip(world.launched, (2, 3), strict=True):
            process.say(Stopping(count))
        world.run(DELAY + 1)
        world.launched[0].say(Stopped(Tally(finished=2)))
        world.launched[1].end("was ended by signal 9")
        world.run(1)
        assert result_of(running) is None
        assert world.crew.tally == Tally(finished=2, cut=3)

    def test_one_that_says_nothing_is_not_waited_for_for_ever(self, world: World) -> None:
        running = Deferred.fromCoroutine(world.ending.run())
        world.launched[0].say(Stopping(0))
        with logged() as lines:
            world.run(TOLD_SECONDS + 0.5)
            assert lines == ["info: stopping: 0 requests in flight"]
            world.launched[0].say(Stopped(Tally()))
            world.run(DELAY + GRACE)
            assert not running.called
            world.run(15)
        assert "warn: a worker has not finished in time" in lines
        assert result_of(running) is None
        stopping = world.stop()
        world.launched[0].end()
        world.run(END_SECONDS + 1)
        assert world.launched[1].killed
        assert result_of(stopping) is None

    def test_a_second_signal_hurries_all(self, world: World) -> None:
        running = Deferred.fromCoroutine(world.ending.run())
        world.run(0.5)
        ended: list[object] = []
        running.addBoth(ended.append)
        running.cancel()
        assert [process.heard(Hurry) for process in world.launched] == [1, 1]
        assert not ended
        for process in world.launched:
            process.say(Stopped(Tally(cut=1)))
        world.run(0.25)
        assert ended == [None]
        assert world.crew.tally == Tally(cut=2)

    def test_without_a_drain_all_is_cut(self, world: World) -> None:
        stopping = world.stop()
        assert [process.heard(Hurry) for process in world.launched] == [1, 1]
        for process in world.launched:
            process.end()
        world.run(0.25)
        assert result_of(stopping) is None

    def test_who_does_not_want_to_wait_has_them_killed(self, world: World) -> None:
        stopping = world.stop()
        with logged():
            stopping.cancel()
        assert all(process.killed for process in world.launched)
        world.run(0.25)
        assert stopping.called
        result_of(stopping)

    def test_one_that_was_to_be_started_again_is_not(self, world: World) -> None:
        with logged():
            world.launched[0].end()
        Deferred.fromCoroutine(world.crew.stop())
        world.run(5)
        assert len(world.launched) == 2
