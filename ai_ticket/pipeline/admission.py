"""Who is let into the queue: whether there is room and time enough, whom that displaces, and when to come back."""

from bisect import bisect_right
from collections.abc import Callable, Collection
from math import floor

from ai_ticket.errors import DeadlineExceeded, Overloaded
from ai_ticket.interfaces import Client, Job
from ai_ticket.pipeline.forecast import Forecast
from ai_ticket.pipeline.queue import FairQueue


class AdmissionControl:
    """Judges by what waits, what is under way, and how long events take; and changes nothing of it.

    `slots`, wherever it is asked for: how many events may be under way at a time.
    """

    def __init__(
        self, now: Callable[[], float], queue: FairQueue, forecast: Forecast, running: Collection[Job], limit: int
    ):
        """@param now: the clock's time in seconds.

        @param running: the events under way, in the order in which they began.
        @param limit: events that may wait, those of batches not counted.
        """
        self._now = now
        self._queue = queue
        self._forecast = forecast
        self._running = running
        self._limit = limit

    def check(self, client: Client, deadline: float, slots: int) -> Job | None:
        """Whether there is room for an interactive event; if need be in place of the one that is returned.

        @raise DomainError: there is none (`Overloaded`), or no time (`DeadlineExceeded`).
        """
        left = deadline - self._now()
        if left <= 0:
            raise DeadlineExceeded
        waiting = len(self._queue)
        # To find its place takes a while; where even the last one is reached in time, there is no need to.
        if self._forecast.measured and self._wait(waiting + 1, slots) > left:
            wait = self._wait(self._queue.place_for(client), slots)
            if wait > left:
                raise Overloaded(
                    f"its turn would come in about {wait:.0f} s, after its deadline", retry_after=_past(wait - left)
                )
        # Those that begin at once do not wait, though they pass through the queue.
        interactive = self._queue.interactive
        free = slots - len(self._running) - (waiting - interactive)
        if interactive < self._limit + max(0, free):
            return None
        displaced = self._queue.displaced_by(client)
        if displaced is None:
            wait = self._wait(self._queue.place_for(client), slots)
            # By the time that this one would have, all that wait are gone, however long they take.
            raise Overloaded(f"{interactive} events are waiting", retry_after=_past(min(wait, left)))
        return displaced

    def displaced(self, job: Job, slots: int) -> Overloaded:
        """What to tell the caller of an event that waits, and has to give way."""
        retry_after = _past(self._wait(self._queue.position(job), slots))
        return Overloaded("displaced by an event of a client that has fewer waiting", retry_after=retry_after)

    def late(self, end: float, slots: int) -> list[Job]:
        """What waits and can't be answered by that time, as far as is known."""
        if not self._forecast.measured:
            return []
        longest_wait = end - self._now() - self._forecast.seconds
        places = range(1, len(self._queue) + 1)
        in_time = bisect_right(places, longest_wait, key=lambda place: self._wait(place, slots))
        return self._queue.beyond(in_time) if in_time < len(self._queue) else []

    def is_roomy(self, seconds: float, slots: int) -> bool:
        """Whether there is plenty of room, for events of anybody with half of so many seconds left or more."""
        in_time = not self._forecast.measured or 2 * self._wait(len(self._queue) + 1, slots) <= seconds
        return in_time and 2 * self._queue.interactive < self._limit

    def _wait(self, place: int, slots: int) -> float:
        return self._forecast.wait(place, slots, self._running, self._now())


def _past(seconds: float) -> float:
    """The next whole second, for a caller who is to come back then."""
    return floor(seconds) + 1.0
