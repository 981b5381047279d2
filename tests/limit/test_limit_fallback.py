"""Limits while Redis is away: who counts meanwhile, what is logged, and how it comes back."""

from collections.abc import Iterator
from typing import Any

import pytest
from pytest_twisted import blockon, ensureDeferred
from redis_server import RedisServer
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock, deferLater
from twisted.logger import LogLevel, capturedLogs, formatEvent

from ai_ticket.interfaces import Admission
from ai_ticket.limit.address import parse_redis_url
from ai_ticket.limit.fallback import CHECK_SECONDS, FallbackLimiter
from ai_ticket.limit.memory import MemoryLimiter
from ai_ticket.limit.redis import RedisLimiter, RedisUnavailable

reactor: Any = _reactor
FROM_REDIS = Admission(True, 999, 1.0)


class PlayedRedis:
    """A `RedisLimiter` that is there or not, as the test says, or does not answer."""

    limit = 2
    window = 60.0
    name = "cache:6379"

    def __init__(self) -> None:
        self.state = "there"
        self.calls = self.checks = self.closings = 0
        self.open: list[Deferred[Admission]] = []

    def admit(self, client: str) -> Deferred[Admission]:
        self.calls += 1
        return self._answer()

    def check(self) -> Deferred[Admission]:
        self.checks += 1
        return self._answer()

    def close(self) -> Deferred[None]:
        self.closings += 1
        return succeed(None)

    def _answer(self) -> Deferred[Admission]:
        if self.state == "silent":
            self.open.append(Deferred())
            return self.open[-1]
        return succeed(FROM_REDIS) if self.state == "there" else fail(RedisUnavailable(self.state))


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.redis: Any = PlayedRedis()
        memory = MemoryLimiter(self.clock, limit=2, window=60.0, max_clients=10)
        self.limiter = FallbackLimiter(self.redis, memory, self.clock)
        self.logged: list[Any] = []

    def ask(self) -> list[Admission]:
        answers: list[Admission] = []
        self.limiter.admit("a").addCallback(answers.append)
        return answers

    def said(self) -> list[tuple[LogLevel, str | None]]:
        return [(event["log_level"], formatEvent(event)) for event in self.logged]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    with capturedLogs() as made.logged:
        yield made
        if made.limiter.running:
            made.limiter.stopService()
    assert made.clock.getDelayedCalls() == []


AWAY = (LogLevel.warn, "Redis at cache:6379 is away, calls are counted in memory meanwhile: no answer")
BACK = (LogLevel.info, "Redis at cache:6379 is back, calls are counted there again")


def test_it_has_their_limit_and_window(world: World) -> None:
    assert (world.limiter.limit, world.limiter.window) == (2, 60.0)


def test_redis_counts_while_it_is_there(world: World) -> None:
    world.limiter.startService()
    for _ in range(5):
        assert world.ask() == [FROM_REDIS]
    assert world.limiter.available
    assert world.said() == []


def test_memory_counts_while_it_is_away(world: World) -> None:
    world.limiter.startService()
    world.redis.state = "no answer"
    assert [world.ask()[0].admitted for _ in range(5)] == [True, True, False, False, False]
    assert not world.limiter.available
    assert world.said() == [AWAY]
    assert world.redis.calls == 1, "the others did not try"


def test_calls_that_fail_together_are_warned_of_once(world: World) -> None:
    world.limiter.startService()
    world.redis.state = "silent"
    answers = [world.ask() for _ in range(3)]
    assert answers == [[], [], []]
    for asked in world.redis.open:
        asked.errback(RedisUnavailable("no answer"))
    assert [answer.admitted for [answer] in answers] == [True, True, False]
    assert world.said() == [AWAY]


def test_it_comes_back_by_itself(world: World) -> None:
    world.limiter.startService()
    world.redis.state = "no answer"
    world.ask()
    for _ in range(10):
        world.clock.advance(CHECK_SECONDS)
        assert not world.limiter.available
    assert world.redis.checks == 11
    world.redis.state = "there"
    world.ask()
    assert world.redis.calls == 1
    world.clock.advance(CHECK_SECONDS)
    assert world.limiter.available
    assert world.ask() == [FROM_REDIS]
    assert world.said() == [AWAY, BACK]


def test_it_is_told_again_when_it_goes_away_again(world: World) -> None:
    world.limiter.startService()
    for _ in range(2):
        world.redis.state = "no answer"
        world.ask()
        world.redis.state = "there"
        world.clock.advance(CHECK_SECONDS)
    assert world.said() == [AWAY, BACK, AWAY, BACK]


def test_that_it_is_away_shows_without_calls(world: World) -> None:
    world.redis.state = "no answer"
    world.limiter.startService()
    assert not world.limiter.available
    world.redis.state = "there"
    world.clock.advance(CHECK_SECONDS)
    assert world.limiter.available
    world.redis.state = "no answer"
    world.clock.advance(CHECK_SECONDS)
    assert not world.limiter.available
    assert world.said() == [AWAY, BACK, AWAY]


def test_it_looks_no_more_often_than_every_second(world: World) -> None:
    world.redis.state = "silent"
    world.limiter.startService()
    world.clock.pump([0.1] * 50)
    assert world.redis.checks == 1
    world.redis.open.pop().errback(RedisUnavailable("no answer"))
    world.clock.advance(CHECK_SECONDS - 0.01)
    assert world.redis.checks == 1
    world.clock.advance(0.01)
    assert world.redis.checks == 2


@pytest.mark.parametrize("state", ["there", "no answer", "silent"])
def test_stopping_leaves_nothing_behind(world: World, state: str) -> None:
    world.redis.state = state
    world.limiter.startService()
    stopped: list[None] = []
    world.limiter.stopService().addCallback(stopped.append)
    assert stopped == [None]
    assert world.redis.closings == 1
    assert world.clock.getDelayedCalls() == []
    before = world.said()
    for asked in world.redis.open:
        asked.errback(RedisUnavailable("closed"))
    world.clock.advance(10.0)
    assert world.redis.checks == 1
    assert world.said() == before


def test_who_leaves_is_no_reason_to_think_it_away(world: World) -> None:
    world.limiter.startService()
    world.redis.state = "silent"
    asking = world.limiter.admit("a")
    asking.cancel()
    failures: list[Any] = []
    asking.addErrback(failures.append)
    assert [failure.type for failure in failures] == [CancelledError]
    assert world.limiter.available


@pytest.mark.expects_logged_failure
def test_looking_goes_on_after_a_bug(world: World) -> None:
    world.redis.state = "silent"
    world.limiter.startService()
    world.redis.open.pop().errback(ZeroDivisionError("a bug"))
    world.clock.advance(CHECK_SECONDS)
    assert world.redis.checks == 2
    assert [event["log_level"] for event in world.logged] == [LogLevel.critical]


class TestServer:
    """With a real server."""

    @pytest.fixture
    def limiter(self, own_redis: RedisServer) -> Iterator[FallbackLimiter]:
        redis = RedisLimiter(reactor, parse_redis_url(own_redis.url), limit=3, window=60.0)
        memory = MemoryLimiter(reactor, limit=3, window=60.0, max_clients=10)
        limiter = FallbackLimiter(redis, memory, reactor)
        limiter.startService()
        yield limiter
        blockon(limiter.stopService())

    @ensureDeferred
    async def test_killed_and_started_again(self, own_redis: RedisServer, limiter: FallbackLimiter) -> None:
        with capturedLogs() as logged:
            assert [(await limiter.admit("a")).admitted for _ in range(4)] == [True, True, True, False]
            own_redis.kill()
            assert [(await limiter.admit("a")).admitted for _ in range(4)] == [True, True, True, False]
            assert not limiter.available
            own_redis.start()
            while not limiter.available:
                await deferLater(reactor, 0.01)
            assert [(await limiter.admit("a")).remaining for _ in range(2)] == [2, 1]
        assert [event["log_level"] for event in logged] == [LogLevel.warn, LogLevel.info]
