"""What is taken from the queue together, and how long to wait for more of it."""

from collections.abc import Callable

import msgspec
from msgspec import Struct
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from ai_ticket.spans import Span


class Batch(Struct, eq=False):
    """Events that were taken together. There is room for so many more, and so many are still under way.

    `spans` are those of its events that are recorded.
    """

    began_at: float = 0.0
    room: int = 0
    size: int = 0
    under_way: int = 0
    spans: list[Span] = msgspec.field(default_factory=list)

    def trace(self, now: float) -> None:
        """Tell of a batch of several events that has ended: a span in the trace of the first, with links to all."""
        if self.size > 1 and self.spans:
            span = self.spans[0].child("pipeline.batch", links=self.spans, at=self.began_at)
            span.set({"ai_ticket.batch.size": self.size})
            span.end(now)


class Batches:
    """Gathers what waits into batches of a size, for as long as it may take."""

    def __init__(self, clock: IReactorTime, size: int, linger: float, ripened: Callable[[], None]):
        """@param size: events in a batch, at the most.

        @param linger: how many seconds to wait for that; 0: take what there is.
        @param ripened: called when it is time to take what waits, though the batch is not full.
        """
        self._clock = clock
        self.size = size
        self._linger = linger
        self._ripened = ripened
        self._batch = Batch()
        self._timer: IDelayedCall | None = None
        self._lingered = False

    def ripe(self, waiting: int, slots: int) -> bool:
        """Whether it is time to take what waits: as many as a batch has, or free slots. If not, it will `ripen`."""
        if not self._linger or self._lingered or self._batch.room or waiting >= min(self.size, slots):
            return True
        if self._timer is None:
            self._timer = self._clock.callLater(self._linger, self._linger_ended)
        return False

    def take(self, waiting: int, slots: int) -> Batch:
        """The batch to which the next event belongs that is taken from so many."""
        if not self._batch.room:
            self.close()
            self._batch = Batch(self._clock.seconds(), max(1, min(self.size, waiting, slots)))
        batch = self._batch
        batch.room -= 1
        batch.size += 1
        batch.under_way += 1
        return batch

    def close(self) -> None:
        """What comes from now on belongs to another batch."""
        self._batch.room = 0
        self._lingered = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _linger_ended(self) -> None:
        self._timer = None
        self._lingered = True
        self._ripened()
