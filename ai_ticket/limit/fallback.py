"""Limits that hold on while Redis is away."""

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from ai_ticket.interfaces import Admission, Limiter
from ai_ticket.limit.redis import RedisLimiter, RedisUnavailable

CHECK_SECONDS = 1.0


class FallbackLimiter(Service):
    """Counts in Redis; while that is away, in the memory of this process.

    That it is away is found out by a call or by a look at it every second, and that it is back by such a look alone: no
    call waits for a server that is known to be away.
    """

    _log = Logger()

    def __init__(self, redis: RedisLimiter, memory: Limiter, clock: IReactorTime):
        """Both are to have the same limit and window."""
        self.limit = redis.limit
        self.window = redis.window
        self._redis = redis
        self._memory = memory
        self._clock = clock
        self._available = True
        self._next: IDelayedCall | None = None
        self._checking: Deferred[None] | None = None

    @property
    def available(self) -> bool:
        """Whether calls are counted in Redis. So it is taken to be until it is known better."""
        return self._available

    def admit(self, client: str) -> Deferred[Admission]:
        """Whether a call may go on."""
        return Deferred.fromCoroutine(self._admit(client)) if self._available else self._memory.admit(client)

    def startService(self) -> None:
        """Connect, and look after it from then on."""
        super().startService()  # type: ignore[no-untyped-call]
        self._check()

    def stopService(self) -> Deferred[None]:
        """Close the connection to Redis."""
        super().stopService()  # type: ignore[no-untyped-call]
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._checking is not None:
            self._checking.cancel()
        return self._redis.close()

    async def _admit(self, client: str) -> Admission:
        try:
            return await self._redis.admit(client)
        except RedisUnavailable as error:
            self._away(error)
        return await self._memory.admit(client)

    def _check(self) -> None:
        self._next = None
        self._checking = Deferred.fromCoroutine(self._look())
        self._checking.addErrback(
            lambda failure: self._log.failure("checking failed", failure) if self.running else None
        )
        self._checking.addBoth(self._checked)

    async def _look(self) -> None:
        try:
            await self._redis.check()
        except RedisUnavailable as error:
            self._away(error)
        else:
            self._back()

    def _checked(self, _: object) -> None:
        self._checking = None
        if self.running:
            self._next = self._clock.callLater(CHECK_SECONDS, self._check)

    def _away(self, error: RedisUnavailable) -> None:
        if self._available:
            self._available = False
            self._log.warn(
                "Redis at {server} is away, calls are counted in memory meanwhile: {reason}",
                server=self._redis.name,
                reason=str(error),
            )

    def _back(self) -> None:
        if not self._available:
            self._available = True
            self._log.info("Redis at {server} is back, calls are counted there again", server=self._redis.name)
