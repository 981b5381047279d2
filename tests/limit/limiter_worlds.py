"""Limiters whose time a test decides, each with what else it takes to ask them."""

from itertools import count
from typing import Any

from linked import Told, Worker, make_office, make_pipeline
from twisted.internet import reactor
from twisted.internet.task import Clock

from ai_ticket.interfaces import Admission, Limiter
from ai_ticket.limit.address import parse_redis_url
from ai_ticket.limit.memory import MemoryLimiter
from ai_ticket.limit.redis import SCRIPT, RedisLimiter
from ai_ticket.workers.remote import RemoteLimiter

TODAY = 1_790_000_000.0
STEP = 1 / 64  # s; a whole number both of ticks and of microseconds
_numbers = count()


class World:
    """A limiter and its time. `tick` is the shortest time that it tells from none."""

    def __init__(self, limiter: Limiter, clock: Clock, tick: float) -> None:
        self.limiter = limiter
        self.clock = clock
        self.tick = tick
        self._number = next(_numbers)

    async def admit(self, client: str = "a") -> Admission:
        return await self.limiter.admit(f"test-{self._number}-{client}")

    async def admitted(self, times: int, client: str = "a") -> int:
        """How many of so many calls are admitted."""
        return sum([(await self.admit(client)).admitted for _ in range(times)])

    async def close(self) -> None:
        if isinstance(self.limiter, RedisLimiter):
            await self.limiter.close()

    def move(self, seconds: float) -> None:
        """Let time pass, or set the clock back."""
        self.clock.rightNow += seconds


class _OnClock(RedisLimiter):
    """The same script, but for where it has the time from."""

    test_clock: Clock

    @property
    def _script(self) -> str:
        seconds, microseconds = divmod(round(self.test_clock.seconds() * 1_000_000), 1_000_000)
        assert SCRIPT.count("redis.call('TIME')") == 1
        return SCRIPT.replace("redis.call('TIME')", f"{{'{seconds}', '{microseconds}'}}")


def today() -> Clock:
    clock = Clock()
    clock.rightNow = TODAY
    return clock


def memory_world(limit: int, window: float = 60.0, max_clients: int = 1000) -> World:
    clock = today()
    return World(MemoryLimiter(clock, limit=limit, window=window, max_clients=max_clients), clock, 2**-22)


def remote_world(limit: int, window: float = 60.0) -> World:
    """One in the parent, seen from a worker."""
    world = memory_world(limit, window)
    crew = Told()
    office = make_office(world.clock, make_pipeline(world.clock), crew, quota=world.limiter)
    worker = Worker(office, crew, world.clock, [])
    world.limiter = RemoteLimiter(worker.parent.questions, "quota", limit, window)
    return world


def redis_world(url: str, limit: int, window: float = 60.0) -> World:
    """Against a real server, whose own time only decides when it forgets a client, a second after the window."""
    some_reactor: Any = reactor
    limiter = _OnClock(some_reactor, parse_redis_url(url), limit=limit, window=window)
    limiter.test_clock = today()
    return World(limiter, limiter.test_clock, 1e-6)
