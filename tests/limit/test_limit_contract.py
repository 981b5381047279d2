"""What every limiter promises, in memory as in Redis, and as seen from a worker process."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limiter_worlds import STEP, World, memory_world, redis_world, remote_world
from pytest_twisted import blockon, ensureDeferred
from redis_server import RedisServer
from twisted.internet.defer import Deferred

WINDOW = 60.0
Make = Callable[[int], World]


@pytest.fixture(params=["memory", "remote", "redis"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes a world whose limiter has that limit."""
    if request.param == "memory":
        yield memory_world
        return
    if request.param == "remote":
        yield remote_world
        return
    server: RedisServer = request.getfixturevalue("redis")
    worlds = []

    def make_world(limit: int) -> World:
        worlds.append(redis_world(server.url, limit))
        return worlds[-1]

    yield make_world
    for world in worlds:
        blockon(Deferred.fromCoroutine(world.close()))


@ensureDeferred
async def test_so_many_are_admitted_and_no_more(make: Make) -> None:
    world = make(3)
    answers = [await world.admit() for _ in range(5)]
    assert [answer.admitted for answer in answers] == [True, True, True, False, False]
    assert [answer.remaining for answer in answers] == [2, 1, 0, 0, 0]
    assert [answer.retry_after for answer in answers] == [WINDOW] * 5


@ensureDeferred
async def test_clients_are_counted_apart(make: Make) -> None:
    world = make(1)
    assert (await world.admit("a")).admitted
    assert (await world.admit("b")).admitted
    assert not (await world.admit("a")).admitted


@ensureDeferred
async def test_the_window_slides(make: Make) -> None:
    """At the end of one window and the start of the next it is not twice the limit that gets through."""
    world = make(4)
    world.move(30.0)
    assert await world.admitted(2) == 2
    world.move(29.5)
    assert await world.admitted(4) == 2
    world.move(30.5)
    assert await world.admitted(4) == 2
    world.move(29.5)
    assert await world.admitted(4) == 2


@ensureDeferred
async def test_a_refused_call_uses_nothing_up(make: Make) -> None:
    world = make(2)
    assert await world.admitted(2) == 2
    for _ in range(59):
        world.move(1.0)
        assert await world.admitted(3) == 0
    world.move(1.0)
    assert await world.admitted(3) == 2


@ensureDeferred
async def test_a_call_at_the_time_that_was_said_is_admitted_and_none_before(make: Make) -> None:
    world = make(2)
    await world.admit()
    world.move(STEP)
    await world.admit()
    world.move(7.0)
    refused = await world.admit()
    assert refused.retry_after == WINDOW - 7.0 - STEP
    world.move(refused.retry_after - world.tick)
    assert not (await world.admit()).admitted
    world.move(world.tick)
    assert (await world.admit()).admitted
    again = await world.admit()
    assert (again.admitted, again.retry_after) == (False, STEP)


@ensureDeferred
async def test_an_admitted_call_hears_when_more_than_what_remains_will_be(make: Make) -> None:
    world = make(2)
    await world.admit()
    world.move(20.0)
    answer = await world.admit()
    assert (answer.remaining, answer.retry_after) == (0, 40.0)
    world.move(40.0)
    answer = await world.admit()
    assert (answer.admitted, answer.remaining, answer.retry_after) == (True, 0, 20.0)


@ensureDeferred
async def test_calls_expire_one_by_one(make: Make) -> None:
    """Many of them, so that it matters how the first that counts is found."""
    world = make(300)
    for _ in range(300):
        assert (await world.admit()).admitted
        world.move(STEP)
    assert not (await world.admit()).admitted
    world.move(WINDOW - 300 * STEP)
    for already in range(1, 301, 7):
        assert (await world.admit()).remaining + 1 == already - already // 7
        world.move(7 * STEP)


@pytest.mark.parametrize("pause", [60.0, 61.0, 1023.99, 1024.0, 1024.5, 3600.0, 86400.0, 30 * 86400.0])
@ensureDeferred
async def test_nothing_comes_back_after_a_long_time(make: Make, pause: float) -> None:
    world = make(5)
    for _ in range(5):
        assert await world.admitted(7) == 5
        world.move(pause)


@pytest.mark.parametrize("seconds", [STEP, 1.0, 59.0, 3600.0, 1e6])
@ensureDeferred
async def test_where_the_clock_is_set_back_time_stands_still_for_once(make: Make, seconds: float) -> None:
    world = make(2)
    await world.admit()
    world.move(10.0)
    await world.admit()
    world.move(-seconds)
    refused = await world.admit()
    assert not refused.admitted
    assert refused.retry_after == WINDOW - 10.0
    world.move(refused.retry_after - world.tick)
    assert not (await world.admit()).admitted
    world.move(world.tick)
    assert (await world.admit()).admitted
    assert not (await world.admit()).admitted


MOVES = st.one_of(
    st.just(0.0),
    st.integers(0, 20).map(lambda steps: steps * STEP),
    st.integers(0, 4000).map(lambda steps: steps * STEP),
    st.sampled_from(["at the time", "a tick before", "a window", "a tick less than a window", "a day"]),
)


async def check_any_sequence(world: World, limit: int, moves: list[float | str]) -> None:
    """No window of any placement admits more than the limit, and none is refused that could be admitted."""
    when, retry_after = 0.0, 0.0
    admitted: list[float] = []
    for move in moves:
        seconds = {
            "at the time": retry_after,
            "a tick before": max(0.0, retry_after - world.tick),
            "a window": WINDOW,
            "a tick less than a window": WINDOW - world.tick,
            "a day": 86400.0,
        }.get(move, move)  # type: ignore[arg-type]
        world.move(seconds)  # type: ignore[arg-type]
        when = round(when + seconds, 9)  # type: ignore[operator]
        answer = await world.admit()
        counting = [time for time in admitted if round(when - time, 9) < WINDOW - world.tick / 2]
        assert answer.admitted == (len(counting) < limit)
        if answer.admitted:
            admitted.append(when)
            counting.append(when)
        assert answer.remaining == limit - len(counting)
        assert answer.retry_after == pytest.approx(counting[0] + WINDOW - when, abs=world.tick / 2)
        retry_after = answer.retry_after
    for first, last in zip(admitted, admitted[limit:], strict=False):
        assert last - first > WINDOW - world.tick / 2


async def check_any_setting_back(world: World, limit: int, moves: list[float]) -> None:
    """However the clock is set back, no window of time as it really passes has more than the limit, and no wait is
    longer than a window."""
    when = 0.0
    admitted: list[float] = []
    for move in moves:
        world.move(move)
        when += max(0.0, move)
        answer = await world.admit()
        assert 0 < answer.retry_after <= WINDOW
        if answer.admitted:
            admitted.append(when)
    for first, last in zip(admitted, admitted[limit:], strict=False):
        assert last - first >= WINDOW


ANY_MOVES = st.lists(MOVES, min_size=1, max_size=60)
ANY_SETTINGS = st.lists(st.integers(-8000, 8000).map(lambda steps: steps * STEP), min_size=1, max_size=60)


@given(st.integers(1, 9), ANY_MOVES)
@settings(deadline=None, max_examples=300)
@ensureDeferred
async def test_any_sequence_in_memory(limit: int, moves: list[float | str]) -> None:
    await check_any_sequence(memory_world(limit), limit, moves)


@given(limit=st.integers(1, 9), moves=ANY_MOVES)
@settings(deadline=None, max_examples=40)
@ensureDeferred
async def test_any_sequence_in_redis(redis: RedisServer, limit: int, moves: list[float | str]) -> None:
    world = redis_world(redis.url, limit)
    await check_any_sequence(world, limit, moves)
    await world.close()


@given(st.integers(1, 9), ANY_SETTINGS)
@settings(deadline=None, max_examples=300)
@ensureDeferred
async def test_any_setting_back_in_memory(limit: int, moves: list[float]) -> None:
    await check_any_setting_back(memory_world(limit), limit, moves)


@given(limit=st.integers(1, 9), moves=ANY_SETTINGS)
@settings(deadline=None, max_examples=40)
@ensureDeferred
async def test_any_setting_back_in_redis(redis: RedisServer, limit: int, moves: list[float]) -> None:
    world = redis_world(redis.url, limit)
    await check_any_setting_back(world, limit, moves)
    await world.close()
