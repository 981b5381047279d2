"""Steps against short memory, and the watch on the event loop, on a clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logged import logged
from twisted.internet.task import Clock

from ai_ticket.memory import MEGABYTE
from ai_ticket.overload import LAG_WINDOW_SECONDS, MEASURE_SECONDS, LoopWatch, MemoryWatch, Strain, strain_at

LIMIT = 1000 * MEGABYTE


@pytest.mark.parametrize(
    ("share", "before", "after"),
    [
        (0.79, 0, 0),
        (0.80, 0, 1),
        (0.90, 0, 2),
        (0.95, 0, 3),
        (2.00, 0, 3),
        (0.89, 1, 1),
        (0.94, 2, 2),
        # On the way down, each ends a little later than it began on the way up.
        (0.76, 1, 1),
        (0.74, 1, 0),
        (0.86, 2, 2),
        (0.84, 2, 1),
        (0.91, 3, 3),
        (0.89, 3, 2),
        (0.10, 3, 0),
        # A step that had not begun does not begin below where it begins.
        (0.86, 1, 1),
        (0.91, 2, 2),
    ],
)
def test_where_each_step_begins_and_ends(share: float, before: int, after: int) -> None:
    assert strain_at(share, Strain(before)) == Strain(after)


@given(st.lists(st.floats(0, 2), max_size=50))
def test_no_share_makes_it_go_to_and_fro(shares: list[float]) -> None:
    strain = Strain.NONE
    for share in shares:
        strain = strain_at(share, strain)
        assert strain_at(share, strain) is strain


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.used: int | None = 0
        self.acted: list[Strain] = []
        self.released = 0
        self.garbage = 0
        self.searches = 0
        self.watch = MemoryWatch(
            self.clock,
            limit=LIMIT,
            used=lambda: self.used,
            release=self.release,
            collect=self.collect,
            act=self.acted.append,
        )
        self.watch.startService()

    def release(self) -> None:
        self.released += 1

    def collect(self) -> None:
        self.searches += 1
        if self.used is not None:
            self.used -= self.garbage
        self.garbage = 0

    def use(self, megabytes: int | None) -> list[Strain]:
        """What is done once so much is used."""
        self.used = None if megabytes is None else megabytes * MEGABYTE
        self.acted.clear()
        self.clock.advance(MEASURE_SECONDS)
        return self.acted


def test_steps_up_and_down_are_logged_and_acted_on() -> None:
    world = World()
    with logged() as lines:
        assert world.use(700) == []
        assert world.use(810) == [Strain.BRIEF]
        assert not world.watch.refusing
        assert world.use(920) == [Strain.REFUSING]
        assert world.watch.refusing
        assert world.use(930) == [Strain.REFUSING], "again each second: there may be more to close"
        assert world.use(1200) == [Strain.CLOSED]
        assert world.watch.refusing
        assert world.use(200) == [Strain.NONE]
        assert world.use(200) == []
    world.watch.stopService()
    assert lines == [
        "warn: memory: 810 of 1000 MB in use: connections are closed behind their answers",
        "warn: memory: 920 of 1000 MB in use: new events are refused, connections closed",
        "warn: memory: 1200 of 1000 MB in use: new events are refused, connections closed, and nobody is let in",
        "info: memory: 200 of 1000 MB in use: all is served as usual again",
    ]


def test_it_looks_no_more_than_once_a_second() -> None:
    world = World()
    world.used = LIMIT
    world.clock.pump([0.1] * 9)
    assert world.watch.strain is Strain.NONE
    world.clock.advance(0.2)
    assert world.watch.strain is Strain.CLOSED
    world.watch.stopService()
    assert world.clock.getDelayedCalls() == []


def test_what_was_freed_is_given_back() -> None:
    """Each second while memory is short, for else it would stay short; and now and then."""
    world = World()
    world.clock.pump([MEASURE_SECONDS] * 119)
    assert world.released == 2
    world.use(850)
    assert world.released == 2
    for expected in (3, 4, 5):
        world.use(850)
        assert world.released == expected
    world.watch.stopService()


def test_garbage_is_searched_for_where_memory_is_short() -> None:
    """Nobody is let in, so nothing is made that would have the interpreter do it: it would stay shut for good."""
    world = World()
    world.garbage = 600 * MEGABYTE
    world.use(1000)
    assert world.watch.strain is Strain.CLOSED
    world.clock.pump([MEASURE_SECONDS] * 6)
    assert world.watch.strain is Strain.NONE
    world.watch.stopService()


def test_garbage_is_not_searched_for_all_the_time() -> None:
    world = World()
    world.clock.pump([MEASURE_SECONDS] * 119)
    assert world.searches == 2
    world.used = LIMIT
    world.clock.pump([MEASURE_SECONDS] * 20)
    assert world.searches == 6
    world.watch.stopService()


def test_a_limit_that_changes() -> None:
    world = World()
    assert world.use(500) == []
    world.watch.limit = 500 * MEGABYTE
    assert world.use(500) == [Strain.CLOSED]
    world.watch.limit = None
    assert world.use(500) == [Strain.NONE]
    assert world.use(10**6) == []
    world.watch.stopService()


def test_memory_that_is_not_known_is_not_short() -> None:
    world = World()
    world.use(950)
    assert world.use(None) == [Strain.NONE]
    world.watch.stopService()


class Loop:
    """An event loop that can be held up."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.lags: list[float] = []
        self.watch = LoopWatch(self.clock, self.lags.append)
        self.watch.startService()

    def turn(self, seconds: float) -> None:
        for _ in range(round(seconds * 64)):
            self.clock.advance(1 / 64)

    def hold(self, seconds: float) -> None:
        """For so long nothing else can be done; then all that was due is."""
        self.clock.rightNow += seconds
        self.clock.advance(0)


def test_a_loop_that_is_never_late() -> None:
    loop = Loop()
    loop.turn(30)
    assert len(loop.lags) > 250
    assert max(loop.lags) < 1 / 64
    assert not loop.watch.lagging
    loop.watch.stopService()
    assert loop.clock.getDelayedCalls() == []


def test_a_single_hiccup_however_long_is_none_of_anybodys_business() -> None:
    loop = Loop()
    loop.turn(1)
    loop.hold(5)
    assert max(loop.lags) == pytest.approx(5, abs=0.1)
    assert not loop.watch.lagging
    loop.watch.stopService()


def test_a_loop_that_is_late_again_and_again() -> None:
    loop = Loop()
    for lagging in (False, False, True, True):
        loop.turn(0.5)
        loop.hold(0.5)
        assert loop.watch.lagging == lagging
    loop.turn(LAG_WINDOW_SECONDS - 3)
    assert loop.watch.lagging, "not to and fro"
    loop.turn(1)
    assert not loop.watch.lagging
    loop.watch.stopService()


def test_small_delays_do_not_count() -> None:
    loop = Loop()
    for _ in range(20):
        loop.turn(0.2)
        loop.hold(0.24)
    assert not loop.watch.lagging
    loop.watch.stopService()


def test_rare_delays_do_not_count() -> None:
    loop = Loop()
    for _ in range(10):
        loop.turn(5)
        loop.hold(1)
        assert not loop.watch.lagging
    loop.watch.stopService()
