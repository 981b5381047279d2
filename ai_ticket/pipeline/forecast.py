"""When a place in the queue will come to its turn, by the time that events have taken so far."""

from collections.abc import Collection
from itertools import islice

from ai_ticket.interfaces import Job

GUESS_SECONDS = 2.0
"""What an event takes, as long as nobody knows."""

_SMOOTHING = 0.2


class Forecast:
    """Learns how long events hold a slot, and tells from it how long others will wait for one."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    @property
    def measured(self) -> bool:
        """Whether it is more than a guess."""
        return self._seconds is not None

    @property
    def seconds(self) -> float:
        """How long an event holds its slot."""
        return GUESS_SECONDS if self._seconds is None else self._seconds

    def succeeded(self, seconds: float) -> None:
        """An event was answered after so long."""
        self._seconds = seconds if self._seconds is None else self._seconds + _SMOOTHING * (seconds - self._seconds)

    def cut(self, seconds: float) -> None:
        """An event was cut by its deadline after so long. Nothing else that fails tells how long events take."""
        if seconds > self.seconds:
            self.succeeded(seconds)

    def wait(self, place: int, slots: int, running: Collection[Job], now: float) -> float:
        """Seconds until the turn of a place in the queue, 1 being the next.

        @param running: what holds a slot, the longest first. More of them than slots may do so, where slots were lost.
        """
        free, surplus = max(0, slots - len(running)), max(0, len(running) - slots)
        if place <= free:
            return 0.0
        # Slots come free in the order in which they were taken, again and again.
        rounds, nth = divmod(place - 1 - free, slots)
        job = next(islice(running, surplus + nth, None), None)
        age = 0.0 if job is None or job.began_at is None else now - job.began_at
        return rounds * self.seconds + max(0.0, self.seconds - age)
