"""Workers who share the reactor."""

from collections.abc import Callable, Iterator

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Cooperator, SchedulerStopped
from twisted.logger import Logger
from twisted.python.failure import Failure

SLICE_SECONDS = 0.01
"""How long they may hold up the reactor, if they do not wait."""


class Workers:
    """Cooperative workers, each of which does one thing after the other, and goes home when there is nothing to do."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, begin: Callable[[], Deferred[None] | None]):
        """@param begin: begins what a worker is to do next, and returns when that has ended; None: nothing."""
        self._clock = clock
        self._begin = begin
        self._count = 0
        self._cooperator = Cooperator(
            terminationPredicateFactory=self._time_slice, scheduler=lambda tick: clock.callLater(0, tick), started=True
        )

    def __len__(self) -> int:
        return self._count

    def call(self) -> None:
        """Have one more come. It begins at the reactor's next turn."""
        self._count += 1
        self._cooperator.cooperate(self._work()).whenDone().addErrback(self._failed)

    def stop(self) -> None:
        """Nobody begins anything any more."""
        self._cooperator.stop()

    def _work(self) -> Iterator[Deferred[None]]:
        try:
            while (ended := self._begin()) is not None:
                yield ended
        finally:
            self._count -= 1

    def _failed(self, failure: Failure) -> None:
        if not failure.check(SchedulerStopped):
            self._log.failure("a worker failed", failure)

    def _time_slice(self) -> Callable[[], bool]:
        end = self._clock.seconds() + SLICE_SECONDS
        return lambda: self._clock.seconds() >= end
