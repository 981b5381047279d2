"""An exact sliding window in Redis or Valkey, shared by all services that count there.

Needs the `redis` extra. txredisapi imports the global reactor as it is imported itself; nothing of it is used here.
"""

from functools import partial
from math import ceil
from typing import Any, cast

from twisted.internet.defer import CancelledError, Deferred, TimeoutError, fail, succeed
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IDelayedCall, IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.ssl import optionsForClientTLS
from twisted.python.failure import Failure
from txredisapi import BaseRedisProtocol, RedisError

from ai_ticket.interfaces import Admission
from ai_ticket.limit.address import RedisAddress
from ai_ticket.server_identity import VerifiedIdentity

CALL_SECONDS = 0.25
LATE_SECONDS = 0.05
"""A timer that comes so late shows that it was the reactor that had no time."""
CONNECT_SECONDS = 5.0
PAUSE_SECONDS = 1.0
"""How long a server is left alone after a connection to it could not be made."""

PREFIX = "ai-ticket:calls"

SCRIPT = """
local key, limit, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local function at(index) return tonumber(redis.call('LINDEX', key, index)) end
local function digits(number) return string.format('%.0f', number) end

-- All times are in microseconds. The list holds those of the calls that count, the oldest first, and before them what
-- to add to the server's time: where that is set back, ours stands still for once and goes on from there.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local length = redis.call('LLEN', key)
local recorded = length > 0 and at(0) or 0
local set_back = length > 0 and math.max(recorded, at(-1) - now) or 0
now = now + set_back

local expired, live = 0, length
while live - expired > 1 do
    local middle = math.floor((expired + live) / 2)
    if at(middle) + window <= now then expired = middle else live = middle end
end
if expired > 0 or set_back ~= recorded then
    redis.call('LSET', key, expired, digits(set_back))
    redis.call('LTRIM', key, expired, -1)
end

local used = math.max(length - 1 - expired, 0)
local admitted = used < limit
if admitted then
    if length == 0 then
        redis.call('RPUSH', key, '0', digits(now))
    else
        redis.call('RPUSH', key, digits(now))
    end
    redis.call('PEXPIRE', key, digits(window / 1000 + 1000))
    used = used + 1
end
return {admitted and 1 or 0, limit - used, at(1) + window - now}
"""


class RedisUnavailable(Exception):
    """There is no answer to be had from the server now. It says why, without secrets."""


class RedisLimiter:
    """Counts each client's calls of the last `window` seconds, in microseconds of the server's time.

    It connects when it is first asked, and anew when asked after the connection was lost; where that fails, not again
    within a second. What can't be answered within 0.25 s fails, whatever the reason: the network, a wrong password, a
    server that is still loading, out of memory or not to be written to.
    """

    _script = SCRIPT

    def __init__(self, reactor: Any, address: RedisAddress, *, limit: int, window: float):
        """@param limit: calls within the window, at least 1. @param window: seconds."""
        self.limit = limit
        self.window = window
        self.name = address.name
        self._clock: IReactorTime = reactor
        self._endpoint = _endpoint(reactor, address)
        self._user, self._password, self._database = address.user, address.password, address.database
        self._span = ceil(window * 1_000_000)
        # Calls that were counted for one window are not all that count in a longer one.
        self._prefix = f"{PREFIX}:{self._span}:"
        self._connection: _Connection | None = None
        self._connecting: Deferred[Any] | None = None
        self._waiting: list[Deferred[_Connection]] = []
        self._reason = ""
        self._paused_until = 0.0

    def admit(self, client: str) -> Deferred[Admission]:
        """Whether a call may go on. It fails with `RedisUnavailable` where the server can't tell."""
        return Deferred.fromCoroutine(self._ask(self._prefix + client, self.limit, self._span))

    def check(self) -> Deferred[Admission]:
        """Do all that admitting a call takes, and count for nobody. It fails with `RedisUnavailable`."""
        return Deferred.fromCoroutine(self._ask(f"{PREFIX}:check", 1, 0))

    def close(self) -> Deferred[None]:
        """Give up the connection; fires when it is closed."""
        if self._connecting is not None:
            ended = self._wait().addBoth(lambda _: None)
            self._connecting.cancel()
            return ended
        return succeed(None) if self._connection is None else self._connection.close()

    async def _ask(self, key: str, limit: int, span: int) -> Admission:
        deadline = self._clock.seconds() + CALL_SECONDS
        connection = self._connection
        if connection is None:
            try:
                connection = await self._connected().addTimeout(CALL_SECONDS, self._clock)
            except TimeoutError:
                raise RedisUnavailable("not connected yet")
        try:
            answer: Deferred[Any] = connection.eval(self._script, [key], [limit, span])
            reply = await self._in_time(answer, deadline)
            admitted, remaining, microseconds = map(int, reply)
        except TimeoutError:
            connection.close()
            raise RedisUnavailable(f"no answer within {CALL_SECONDS} s")
        except (RedisError, TypeError, ValueError) as error:
            raise RedisUnavailable(connection.explain(error))
        return Admission(bool(admitted), remaining, microseconds / 1_000_000)

    def _in_time(self, answer: Deferred[Any], deadline: float) -> Deferred[Any]:
        """The answer, or a TimeoutError. Where it is we who are late, what has come meanwhile is read first."""
        timed_out = False
        timer: IDelayedCall

        def expire() -> None:
            nonlocal timer, timed_out
            timed_out = True
            if self._clock.seconds() - deadline > LATE_SECONDS:
                timer = self._clock.callLater(LATE_SECONDS, answer.cancel)
            else:
                answer.cancel()

        def ended(result: Any) -> Any:
            if timer.active():
                timer.cancel()
            if timed_out and isinstance(result, Failure) and result.check(CancelledError):
                raise TimeoutError
            return result

        timer = self._clock.callLater(max(0, deadline - self._clock.seconds()), expire)
        return answer.addBoth(ended)

    def _connected(self) -> "Deferred[_Connection]":
        if self._connecting is None and self._clock.seconds() < self._paused_until:
            return fail(RedisUnavailable(self._reason))
        waiting = self._wait()
        if self._connecting is None:
            self._connecting = Deferred.fromCoroutine(self._connect()).addTimeout(CONNECT_SECONDS, self._clock)
            self._connecting.addCallbacks(self._made, self._not_made)
        return waiting

    def _wait(self) -> "Deferred[_Connection]":
        self._waiting.append(Deferred())
        return self._waiting[-1]

    async def _connect(self) -> "_Connection":
        factory = Factory.forProtocol(partial(_Connection, self._clock))
        factory.noisy = False
        connection = cast(_Connection, await self._endpoint.connect(factory))
        try:
            if self._password is not None:
                await connection.auth(self._password, self._user)
            if self._database:
                await connection.select(self._database)
            await connection.ping()
        except CancelledError:
            await connection.close()
            raise
        except RedisError as error:
            reason = connection.explain(error)
            await connection.close()
            raise RedisUnavailable(reason)
        return connection

    def _made(self, connection: "_Connection") -> None:
        self._connecting = None
        self._connection = connection
        connection.whenDisconnected().addCallback(self._lost)
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            deferred.callback(connection)

    def _not_made(self, failure: Failure) -> None:
        self._connecting = None
        self._paused_until = self._clock.seconds() + PAUSE_SECONDS
        timed_out = failure.check(TimeoutError) is not None
        self._reason = f"no connection within {CONNECT_SECONDS} s" if timed_out else failure.getErrorMessage()
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            deferred.errback(RedisUnavailable(self._reason))

    def _lost(self, _: object) -> None:
        self._connection = None


class _Connection(BaseRedisProtocol):  # type: ignore[misc]
    """A connection; the limiter logs in."""

    def __init__(self, clock: IReactorTime):
        super().__init__()
        self.callLater = clock.callLater  # instead of the global reactor's
        self._ended: Failure | None = None

    def connectionMade(self) -> None:
        """Nothing: txredisapi would log in for its own factory."""

    def connectionLost(self, why: Failure) -> None:
        """What was asked and not answered fails."""
        self._ended = why
        super().connectionLost(why)

    def close(self) -> Deferred[None]:
        """Close it at once; fires when that is done."""
        if self._ended is not None:
            return succeed(None)
        closed: Deferred[None] = self.whenDisconnected().addCallback(lambda _: None)
        self.transport.abortConnection()
        return closed

    def explain(self, error: Exception) -> str:
        """What to tell of an error."""
        if self._ended is not None:
            return f"connection lost: {self._ended.getErrorMessage()}"
        # A server that does not know a command repeats its arguments, which may be a password.
        return str(error).partition(", with args")[0]


def _endpoint(reactor: Any, address: RedisAddress) -> IStreamClientEndpoint:
    if address.path is not None:
        return UNIXClientEndpoint(reactor, address.path, timeout=CONNECT_SECONDS)
    # A host's next address is tried so soon that all may have refused within the time of a call.
    endpoint = HostnameEndpoint(reactor, address.host, address.port, timeout=CONNECT_SECONDS, attemptDelay=0.05)
    if not address.tls:
        return endpoint
    return wrapClientTLS(VerifiedIdentity(optionsForClientTLS(address.host), address.host), endpoint)
