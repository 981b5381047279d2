"""What the service does when it runs short of memory, or its event loop of time: it takes on less, in steps.

Nothing that was taken on is given up. The steps, and why they are these, are in ops/decisions/.
"""

from collections import deque
from collections.abc import Callable
from enum import IntEnum

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger, LogLevel

from ai_ticket.memory import MEGABYTE

MEASURE_SECONDS = 1.0
RELEASE_MEASURES = 60
"""Memory that was freed is given back at each of so many measures; while it is short, at each."""

COLLECT_MEASURES = 5
"""Garbage is searched for before every so many of them: it holds everything up, some milliseconds for 1000 callers."""

PROBE_SECONDS = 0.1
LAG_SECONDS = 0.25
"""An event loop that is so late is late; less is noise."""

LAG_WINDOW_SECONDS = 10.0
LAGS = 3
"""Being late so many times within the window is no accident any more."""


class Strain(IntEnum):
    """How short of memory the service is. What is done at a step is done at the further ones, too."""

    NONE = 0
    BRIEF = 1
    """Connections are closed behind their answers."""
    REFUSING = 2
    """New events are refused, and idle connections closed."""
    CLOSED = 3
    """Nobody is let in."""


_BEGINS = {Strain.BRIEF: 0.80, Strain.REFUSING: 0.90, Strain.CLOSED: 0.95}
"""The share of the limit from which on there is each strain."""

_SLACK = 0.05
"""How far below that share it ends again."""


def strain_at(share: float, before: Strain) -> Strain:
    """The strain when this share of the limit is used, after what it was before."""
    found = Strain.NONE
    for strain, begins in _BEGINS.items():
        if share >= (begins - _SLACK if strain <= before else begins):
            found = strain
    return found


class MemoryWatch(Service):
    """Compares the memory used with its limit, once a second, and gives back to the system what was freed.

    `limit` is in bytes; None: there is none. It may be changed.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        *,
        limit: int | None,
        used: Callable[[], int | None],
        release: Callable[[], None],
        collect: Callable[[], object],
        act: Callable[[Strain], None],
    ):
        """@param used: bytes in use; None where that can't be known.

        @param release: gives back what was freed, so that it is no longer in use.
        @param collect: frees what only a search can find to be garbage. Nothing else may: where nobody is let in,
            nothing new is made, and the interpreter sees no reason to search.
        @param act: does what the strain asks for. It is called each second while there is any, and when it ends.
        """
        self.name = "memory watch"
        self.limit = limit
        self.strain = Strain.NONE
        self._used = used
        self._release = release
        self._collect = collect
        self._measures = 0
        self._act = act
        self._loop = LoopingCall(self._look)
        self._loop.clock = clock

    def startService(self) -> None:
        """Begin to look."""
        super().startService()  # type: ignore[no-untyped-call]
        self._loop.start(MEASURE_SECONDS).addErrback(
            lambda failure: self._log.failure("watching the memory failed", failure)
        )

    def stopService(self) -> None:
        """Look no more."""
        super().stopService()  # type: ignore[no-untyped-call]
        if self._loop.running:
            self._loop.stop()

    @property
    def refusing(self) -> bool:
        """Whether new events are refused."""
        return self.strain >= Strain.REFUSING

    def _look(self) -> None:
        before = self.strain
        self._measures += 1
        if before or self._measures % RELEASE_MEASURES == 0:
            if self._measures % COLLECT_MEASURES == 0:
                self._collect()
            self._release()
        used = None if self.limit is None else self._used()
        if used is None or self.limit is None:
            self.strain = Strain.NONE
        else:
            self.strain = strain_at(used / self.limit, before)
        if self.strain is not before:
            self._tell(used)
        if self.strain or before:
            self._act(self.strain)

    def _tell(self, used: int | None) -> None:
        self._log.emit(
            LogLevel.warn if self.strain else LogLevel.info,
            "memory: {used} of {limit} MB in use: {done}",
            used="?" if used is None else used // MEGABYTE,
            limit="?" if self.limit is None else self.limit // MEGABYTE,
            done=_DONE[self.strain],
        )


_DONE = {
    Strain.NONE: "all is served as usual again",
    Strain.BRIEF: "connections are closed behind their answers",
    Strain.REFUSING: "new events are refused, connections closed",
    Strain.CLOSED: "new events are refused, connections closed, and nobody is let in",
}


class LoopWatch(Service):
    """Has the event loop call it ten times a second, and tells by how much it was late."""

    def __init__(self, clock: IReactorTime, observe: Callable[[float], None]):
        """@param observe: takes each lag, in seconds."""
        self.name = "event loop watch"
        self._clock = clock
        self._observe = observe
        self._due = 0.0
        self._call: IDelayedCall | None = None
        self._late: deque[float] = deque(maxlen=LAGS)

    def startService(self) -> None:
        """Begin to look."""
        super().startService()  # type: ignore[no-untyped-call]
        self._call_again()

    def stopService(self) -> None:
        """Look no more."""
        super().stopService()  # type: ignore[no-untyped-call]
        if self._call is not None:
            self._call.cancel()
            self._call = None

    @property
    def lagging(self) -> bool:
        """Whether it was late several times of late.

        Once is not enough: a single long pause is over when somebody can be told of it.
        """
        return len(self._late) == LAGS and self._late[0] > self._clock.seconds() - LAG_WINDOW_SECONDS

    def _call_again(self) -> None:
        self._due = self._clock.seconds() + PROBE_SECONDS
        self._call = self._clock.callLater(PROBE_SECONDS, self._look)

    def _look(self) -> None:
        now = self._clock.seconds()
        lag = max(0.0, now - self._due)
        self._observe(lag)
        if lag > LAG_SECONDS:
            self._late.append(now)
        self._call_again()
