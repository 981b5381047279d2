"""An exact sliding window in memory: four bytes for each call that counts."""

from array import array
from bisect import bisect_right
from collections import OrderedDict
from math import ceil, floor, frexp

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime

from ai_ticket.interfaces import Admission

FINEST = 22
"""A tick of 2**-22 s is the step of today's time as a float: a finer one would tell no more times apart."""

MOST_FORGOTTEN = 500
_FEW, _MANY = 4, 128
_LOW_BITS = 0xFFFF_FFFF


class MemoryLimiter:
    """Counts each client's calls of the last `window` seconds, in ticks.

    A tick is the finest power of two of a second of which fewer than 2**31 make a window, though never finer than the
    clock's own steps. It is as fine as those for windows below 512 s, and at most 61 us for those of up to a day.

    There are at most `max_clients` at a time that are counted each for itself. Those who come later share one quota
    until one of the others has not been admitted for a whole window; who then gets a quota of its own begins with the
    shared calls, for some of them were its own.
    """

    def __init__(self, clock: IReactorTime, *, limit: int, window: float, max_clients: int):
        """@param limit: calls within the window, at least 1. @param window: seconds."""
        self.limit = limit
        self.window = window
        self._clock = clock
        self._per_second = 1 << min(FINEST, 31 - frexp(window)[1])
        self._span = ceil(window * self._per_second)
        self._max_clients = max_clients
        # The one whose last call is the longest ago comes first. In a plain dict that one would be found ever more
        # slowly, the more have been moved to the end.
        self._clients: OrderedDict[str, _Calls] = OrderedDict()
        self._shared = _calls(array("I"))
        self._now = 0
        self._set_back = 0
        self._epoch = 0

    def __len__(self) -> int:
        """How many clients are counted each for itself, idle ones that are not yet forgotten included."""
        return len(self._clients)

    def admit(self, client: str) -> Deferred[Admission]:
        """Whether a call may go on, known at once."""
        return succeed(self._admit(client))

    def forget_idle(self) -> None:
        """Forget clients whose last call no longer counts, not too many at once: to be called every second."""
        self._forget(MOST_FORGOTTEN, self._tick())

    def _admit(self, client: str) -> Admission:
        now, span = self._tick(), self._span
        calls = self._clients.get(client)
        if calls is None:
            self._forget(2, now)  # one more than comes, so that there is room as soon as there can be
            calls = self._shared
        alone = calls is not self._shared or len(self._clients) < self._max_clients
        calls.drop(now, span)
        admitted = calls.used < self.limit
        if admitted:
            if calls.used == len(calls) or (alone and calls is self._shared):
                calls = calls.copy(self.limit)
            calls.add(now, self._epoch)
            if alone:
                self._clients[client] = calls
                self._clients.move_to_end(client)
            else:
                self._shared = calls
        return Admission(admitted, self.limit - calls.used, (span - calls.age(0, now)) / self._per_second)

    def _forget(self, most: int, now: int) -> None:
        while most and self._clients:
            client = next(iter(self._clients))
            if now - self._clients[client].last < self._span:
                return
            del self._clients[client]
            most -= 1

    def _tick(self) -> int:
        """The present. Where the clock is set back, it stands still for once and goes on from there."""
        tick = floor(self._clock.seconds() * self._per_second) + self._set_back
        if tick < self._now:
            self._set_back += self._now - tick
            tick = self._now
        self._now = tick
        if tick >> 32 != self._epoch:
            self._epoch = tick >> 32  # kept, so that all clients share the one object
        return tick


class _Calls(array):  # type: ignore[type-arg]  # at run time it takes none
    """The ticks of a client's calls, modulo 2**32, in a ring. An array itself, which takes less than one that has one.

    Wrapping around never brings a tick back: when one is added, none is older than a window; and where the one added
    last has expired, as `epoch`, its upper bits, tells, so have all. So of those that are looked at none is older than
    two windows, and two windows are no more than 2**32 ticks.
    """

    __slots__ = ("epoch", "first", "used")
    first: int
    used: int
    epoch: int

    @property
    def last(self) -> int:
        """The whole tick of the last call, where there is one."""
        tick: int = self[(self.first + self.used - 1) % len(self)]
        return self.epoch << 32 | tick

    def age(self, nth: int, now: int) -> int:
        """How many ticks ago the nth call was of those that still count, the first being the longest ago."""
        tick: int = self[(self.first + nth) % len(self)]
        return now - tick & _LOW_BITS

    def drop(self, now: int, span: int) -> None:
        """Leave out what is as old as the window or older."""
        if self.used and now - self.last >= span:
            self.first = self.used = 0
        elif self.used and self.age(0, now) >= span:
            expired = bisect_right(range(self.used), -span, key=lambda nth: -self.age(nth, now))
            self.first = (self.first + expired) % len(self)
            self.used -= expired

    def add(self, now: int, epoch: int) -> None:
        """Count a call; there must be room for it."""
        self[(self.first + self.used) % len(self)] = now & _LOW_BITS
        self.used += 1
        self.epoch = epoch

    def copy(self, limit: int) -> "_Calls":
        """The same calls, fewer than the limit, with room for more.

        At first there is little room, then much at once: each size below 512 bytes leaves memory behind that only
        arrays of that size can use.
        """
        room = min(limit, _FEW if self.used < _FEW else max(_MANY, 2 * self.used)) - self.used
        live = (self[self.first :] + self[: self.first])[: self.used]
        return _calls(live + array("I", bytes(4 * room)), self.used, self.epoch)


def _calls(ring: "array[int]", used: int = 0, epoch: int = 0) -> _Calls:
    calls = _Calls("I", ring)
    calls.first = 0
    calls.used = used
    calls.epoch = epoch
    return calls
