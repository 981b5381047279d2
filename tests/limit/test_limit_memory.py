"""The limiter in memory: what it forgets and when, clients beyond the most, ticks that wrap around."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limiter_worlds import STEP, TODAY, World, memory_world, today
from twisted.internet.task import Clock

from ai_ticket.interfaces import Admission
from ai_ticket.limit.memory import MOST_FORGOTTEN, MemoryLimiter

WINDOW = 60.0
WRAP = 2**32 / 2**22  # s, after which the ticks of such a window come around


def ask(limiter: MemoryLimiter, client: str = "a") -> Admission:
    """The answer, which is there at once."""
    answers: list[Admission] = []
    limiter.admit(client).addCallback(answers.append)
    return answers[0]


def admitted(world: World, client: str, times: int) -> int:
    return sum(ask(world.limiter, client).admitted for _ in range(times))  # type: ignore[arg-type]


def test_fifty_callers_at_the_same_time_get_the_limit_and_no_more() -> None:
    world = memory_world(120)
    callers = [admitted(world, "a", 5) for _ in range(50)]
    assert sum(callers) == 120


class TestForgetting:
    """Idle clients."""

    def test_who_has_not_been_admitted_for_a_window_is_forgotten(self) -> None:
        world = memory_world(5)
        limiter = world.limiter
        admitted(world, "a", 1)
        world.move(1.0)
        admitted(world, "b", 1)
        world.move(WINDOW - 1.0 - world.tick)
        limiter.forget_idle()
        assert len(limiter) == 2
        world.move(world.tick)
        limiter.forget_idle()
        assert len(limiter) == 1
        world.move(1.0)
        limiter.forget_idle()
        assert len(limiter) == 0

    def test_who_calls_again_is_kept(self) -> None:
        world = memory_world(5)
        for client in ("a", "b", "c"):
            admitted(world, client, 1)
        world.move(WINDOW - 1.0)
        admitted(world, "a", 1)
        world.move(1.0)
        world.limiter.forget_idle()
        assert len(world.limiter) == 1
        assert admitted(world, "a", 5) == 4

    def test_a_refused_call_keeps_nobody(self) -> None:
        world = memory_world(1)
        admitted(world, "a", 1)
        world.move(WINDOW - 1.0)
        admitted(world, "a", 1)
        world.move(1.0)
        world.limiter.forget_idle()
        assert len(world.limiter) == 0

    def test_a_burst_that_goes_idle_is_forgotten_bit_by_bit(self) -> None:
        world = memory_world(1, max_clients=10_000)
        clients = 2 * MOST_FORGOTTEN + 10
        for number in range(clients):
            admitted(world, str(number), 1)
        world.move(WINDOW)
        left = []
        for _ in range(3):
            world.limiter.forget_idle()
            left.append(len(world.limiter))
        assert left == [clients - MOST_FORGOTTEN, clients - 2 * MOST_FORGOTTEN, 0]

    def test_newcomers_alone_keep_the_number_down(self) -> None:
        """Without the call every second, too, there are never more than those of the last two windows."""
        world = memory_world(1, max_clients=10_000)
        for number in range(1000):
            admitted(world, str(number), 1)
            world.move(WINDOW / 100)
        assert len(world.limiter) <= 101

    def test_newcomers_alone_make_those_that_a_burst_has_left_fewer(self) -> None:
        world = memory_world(1, max_clients=10_000)
        for number in range(1000):
            admitted(world, str(number), 1)
        world.move(WINDOW)
        for number in range(100):
            admitted(world, f"new {number}", 1)
        assert len(world.limiter) == 900


class TestMostClients:
    """Clients beyond the most that are counted each for itself."""

    def test_they_share_one_quota(self) -> None:
        world = memory_world(3, max_clients=2)
        assert admitted(world, "a", 1) + admitted(world, "b", 1) == 2
        assert admitted(world, "c", 2) == 2
        assert admitted(world, "d", 2) == 1
        assert admitted(world, "e", 1) == 0
        assert len(world.limiter) == 2

    def test_those_that_came_before_are_not_touched(self) -> None:
        world = memory_world(3, max_clients=2)
        admitted(world, "a", 1)
        admitted(world, "b", 1)
        for number in range(100):
            admitted(world, str(number), 3)
        assert admitted(world, "a", 5) == 2
        assert admitted(world, "b", 5) == 2

    def test_as_soon_as_one_is_idle_its_place_is_taken(self) -> None:
        world = memory_world(3, max_clients=1)
        admitted(world, "a", 1)
        world.move(WINDOW - world.tick)
        assert admitted(world, "b", 1) == 1
        world.move(world.tick)
        assert admitted(world, "b", 1) == 1
        assert admitted(world, "c", 5) == 2, "the shared quota, of which b had one"
        assert admitted(world, "b", 5) == 1, "its own, which began with what it had of the shared one"

    def test_a_place_of_ones_own_does_not_give_more_than_the_limit(self) -> None:
        world = memory_world(3, max_clients=1)
        admitted(world, "a", 1)
        world.move(WINDOW - 1.0)
        assert admitted(world, "b", 5) == 3
        world.move(1.0)
        refused = ask(world.limiter, "b")  # type: ignore[arg-type]
        assert (refused.admitted, refused.retry_after) == (False, WINDOW - 1.0)
        world.move(refused.retry_after)
        assert admitted(world, "b", 5) == 3
        assert admitted(world, "c", 5) == 3

    def test_who_is_refused_takes_no_place(self) -> None:
        world = memory_world(1, max_clients=1)
        admitted(world, "a", 1)
        world.move(WINDOW - 1.0)
        admitted(world, "b", 1)
        world.move(1.0)
        world.limiter.forget_idle()
        assert admitted(world, "c", 1) == 0
        assert len(world.limiter) == 0

    @given(
        st.integers(1, 4),
        st.integers(1, 4),
        st.lists(st.tuples(st.integers(0, 2000), st.sampled_from("abcdef")), min_size=1, max_size=150),
    )
    @settings(deadline=None)
    def test_any_sequence(self, limit: int, max_clients: int, calls: list[tuple[int, str]]) -> None:
        """Nobody gets more than the limit in any window; nobody gets less while there are places."""
        world = memory_world(limit, max_clients=max_clients)
        when = 0.0
        times: dict[str, list[float]] = {client: [] for client in "abcdef"}
        last_crowd = -math.inf
        for steps, client in calls:
            world.move(steps * STEP)
            when += steps * STEP
            before = [time for time in times[client] if when - time < WINDOW]
            others = [name for name in times if name != client and times[name] and when - times[name][-1] < WINDOW]
            answer = ask(world.limiter, client)  # type: ignore[arg-type]
            if len(others) >= max_clients:
                last_crowd = when
            if answer.admitted:
                times[client].append(when)
            elif when - last_crowd >= 2 * WINDOW:
                assert len(before) == limit
        for admissions in times.values():
            for first, last in zip(admissions, admissions[limit:], strict=False):
                assert last - first >= WINDOW
        assert len(world.limiter) <= max_clients


class TestTicks:
    """Times as whole numbers of 32 bits."""

    @given(
        st.floats(0.01, 511.9),
        st.integers(0, 2**33),
        st.lists(st.floats(0, 1), min_size=1, max_size=20),
        st.integers(1, 3),
    )
    @settings(deadline=None)
    def test_windows_of_any_length_are_exact(self, window: float, start: int, gaps: list[float], limit: int) -> None:
        """As exact as the clock: to the last bit of today's time."""
        clock = Clock()
        clock.rightNow = TODAY + start * 2**-22
        limiter = MemoryLimiter(clock, limit=limit, window=window, max_clients=1)
        times = []
        for gap in gaps:
            clock.rightNow += gap * window
            answer = ask(limiter)
            if not answer.admitted:
                due = clock.rightNow + answer.retry_after
                clock.rightNow = math.nextafter(due, 0)
                assert not ask(limiter).admitted
                clock.rightNow = due
                assert ask(limiter).admitted
            times.append(clock.rightNow)
        for first, last in zip(times, times[limit:], strict=False):
            assert last - first >= window

    @pytest.mark.parametrize(("window", "tick"), [(512.0, 2**-21), (3600.0, 2**-19), (86400.0, 2**-14)])
    def test_longer_windows_have_coarser_ticks(self, window: float, tick: float) -> None:
        clock = today()
        limiter = MemoryLimiter(clock, limit=2, window=window, max_clients=1)
        assert ask(limiter).admitted
        clock.rightNow += window / 2
        assert ask(limiter).admitted
        clock.rightNow += window / 2 - tick
        assert not ask(limiter).admitted
        clock.rightNow += tick
        assert ask(limiter).admitted
        assert ask(limiter).retry_after == window / 2

    @given(st.integers(-70, 70), st.lists(st.integers(0, 2000), min_size=1, max_size=60))
    @settings(deadline=None)
    def test_calls_around_the_time_where_ticks_begin_anew(self, start: int, gaps: list[int]) -> None:
        clock = Clock()
        clock.rightNow = 1_748_046 * WRAP + start
        limiter = MemoryLimiter(clock, limit=3, window=WINDOW, max_clients=1)
        times: list[float] = []
        for gap in gaps:
            clock.rightNow += gap * STEP
            counting = [time for time in times if clock.rightNow - time < WINDOW]
            answer = ask(limiter)
            assert answer.admitted == (len(counting) < 3)
            if answer.admitted:
                times.append(clock.rightNow)

    @pytest.mark.parametrize("window", [WINDOW, 511.0, 512.0, 86400.0])
    @pytest.mark.parametrize("wraps", [1, 2, 1000])
    def test_ticks_that_look_the_same_again_do_not_count_again(self, window: float, wraps: int) -> None:
        """Neither those of a client, nor the shared ones, nor those of one that others keep from being forgotten."""
        per_second = 2.0 ** min(22, 31 - math.frexp(window)[1])
        clock = today()
        limiter = MemoryLimiter(clock, limit=2, window=window, max_clients=3)
        for client in ("a", "b", "c", "shared"):
            assert [ask(limiter, client).admitted for _ in range(3)] == [True, True, False]
        clock.rightNow += wraps * 2**32 / per_second
        for client in ("c", "a", "b", "shared"):
            assert [ask(limiter, client).admitted for _ in range(3)] == [True, True, False]

    def test_a_large_limit_grows_and_wraps_around_in_its_ring(self) -> None:
        world = memory_world(5000)
        for _ in range(5):
            assert admitted(world, "a", 3000) == 3000
            world.move(20.0)
            assert admitted(world, "a", 3000) == 2000
            world.move(40.0)
            assert ask(world.limiter).remaining == 2999  # type: ignore[arg-type]
            world.move(20.0)
            world.move(WINDOW)
