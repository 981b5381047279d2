"""How the service comes to its end: whom it still serves, whom it waits for, and what it cuts."""

from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from typing import Protocol

from msgspec.structs import replace
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ai_ticket.listening import Listeners
from ai_ticket.systemd import Systemd
from ai_ticket.web.connection import CLOSE_SECONDS
from ai_ticket.web.connections import Connections
from ai_ticket.web.site import Site, Tally

LINGER_SECONDS = 2.0
"""How long idle connections are kept when nothing is under way any more, for requests that may be on their way."""

ABORT_SECONDS = 2.0
"""How long the model servers may take to hear that what we cut is to be stopped."""

FAREWELL_SECONDS = 0.5
"""How long callers may take to say good-bye, who have nothing more to come."""

BRIEFLY_SECONDS = 0.2
"""How long those have whom a second signal cuts."""

LOOK_SECONDS = 0.05


class Phase(Enum):
    """Of the service's life. Each leads to the next; a second signal leads to the last."""

    SERVING = auto()
    ANNOUNCED = auto()
    """It was told to stop, and says so; those who have not heard yet are still served."""
    FINISHING = auto()
    """What is under way goes on; nothing new is begun."""
    CUTTING = auto()
    """The time is over: what is left is told so."""
    LEAVING = auto()
    """Nothing is under way; connections are closed."""
    OVER = auto()


async def wait_until(
    true: Callable[[], bool], deadline: float, clock: IReactorTime, look: float = LOOK_SECONDS
) -> bool:
    """Wait for something, but not much longer than until that time. Whether it came true.

    @param look: seconds between two looks.
    """
    while not true() and clock.seconds() < deadline:
        await deferLater(clock, look)
    return true()


def report(log: Logger, tally: Tally, seconds: float) -> None:
    """Log what became of the requests of a stop that took so long."""
    log.info(
        "stopped: {finished} requests finished, {cut} cut, {refused} refused, {left} given up by their callers",
        finished=tally.finished,
        cut=tally.cut,
        refused=tally.refused,
        left=tally.left,
        seconds=round(seconds, 3),
    )


class DrainedPipeline(Protocol):
    """A pipeline, as far as its end goes."""

    def drain(self, deadline: float) -> None:
        """Take in nothing more that can't be answered by then."""


class Ending(Protocol):
    """The end of a service, in one process or several."""

    async def run(self) -> None:
        """Go through all of it. Who cancels this cuts what is under way at once."""

    def report(self) -> None:
        """Log what became of the requests that were under way, if it was gone through."""


class Drain:
    """The end of the service, from the first signal until nothing is under way."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        *,
        delay: float,
        grace: float,
        listeners: Listeners,
        callers: Connections,
        scrapers: Connections,
        site: Site,
        pipeline: DrainedPipeline,
        stopped_at_backends: Callable[[], Deferred[None]],
        systemd: Systemd,
        announced: Callable[[int], None] | None = None,
    ):
        """@param delay: seconds during which requests are still served. @param grace: seconds to finish in after that.

        @param stopped_at_backends: fires when the model servers know of all that was cut.
        @param announced: is told how many requests are under way when it begins; by default the log and systemd are.
        """
        self._clock = clock
        self._delay = delay
        self._grace = grace
        self._listeners = listeners
        self._callers = callers
        self._scrapers = scrapers
        self._site = site
        self._pipeline = pipeline
        self._stopped_at_backends = stopped_at_backends
        self._systemd = systemd
        self._announced = announced or self._tell_of_begin
        self._begun_at = 0.0
        self.phase = Phase.SERVING

    @property
    def announced(self) -> bool:
        """Whether the service has been told to stop."""
        return self.phase is not Phase.SERVING

    @property
    def refusing(self) -> bool:
        """Whether the service takes no more events."""
        return self.phase not in (Phase.SERVING, Phase.ANNOUNCED)

    async def run(self) -> None:
        """Go through all of it. Who cancels this cuts what is under way at once."""
        try:
            await self._announce()
            await self._finish(self._clock.seconds() + self._grace)
            if self._site.in_flight:
                await self._cut()
            await self._leave()
        except CancelledError:
            self._site.cut()
            self._callers.leave()
            with suppress(CancelledError):
                await deferLater(self._clock, BRIEFLY_SECONDS)
        finally:
            self.phase = Phase.OVER

    def report(self) -> None:
        """Log what became of the requests that were under way when the stop began, and of those that came later."""
        if self.announced:
            report(self._log, self.tally, self._clock.seconds() - self._begun_at)

    @property
    def tally(self) -> Tally:
        """What became of requests so far; those still under way are cut."""
        tally = self._site.tally
        return replace(tally, cut=tally.cut + self._site.in_flight)

    async def _announce(self) -> None:
        self.phase = Phase.ANNOUNCED
        self._begun_at = self._clock.seconds()
        self._site.tally = Tally()
        self._announced(self._site.in_flight)
        self._callers.drain()
        self._scrapers.drain()
        if self._delay:
            await deferLater(self._clock, self._delay)

    def _tell_of_begin(self, in_flight: int) -> None:
        self._log.info("stopping: {count} requests in flight", count=in_flight)
        self._systemd.stopping(f"stopping: {in_flight} requests in flight", self._delay + self._grace)

    async def _finish(self, deadline: float) -> None:
        self.phase = Phase.FINISHING
        self._pipeline.drain(deadline)
        await self._listeners.close()
        self._systemd.status(f"no longer listening: {self._site.in_flight} requests in flight")
        quiet_since = self._clock.seconds()

        def finished() -> bool:
            nonlocal quiet_since
            if self._site.in_flight or self._callers.lagging:
                quiet_since = self._clock.seconds()
                return False
            return not len(self._callers) or self._clock.seconds() >= quiet_since + LINGER_SECONDS

        await wait_until(finished, deadline, self._clock)

    async def _cut(self) -> None:
        self.phase = Phase.CUTTING
        self._log.warn("the time to finish is over: {count} requests are cut", count=self._site.in_flight)
        self._systemd.status(f"cutting {self._site.in_flight} requests")
        self._site.cut()
        try:
            await self._stopped_at_backends().addTimeout(ABORT_SECONDS, self._clock)
        except TimeoutError:
            self._log.warn("a model server has not confirmed in time that it stops what was cut")

    async def _leave(self) -> None:
        self.phase = Phase.LEAVING
        self._callers.leave()
        self._scrapers.leave()
        begun = self._clock.seconds()

        def left() -> bool:
            if not len(self._callers) and not len(self._scrapers):
                return True
            # What fits into the kernel's buffers is sent even when the process is gone.
            return self._clock.seconds() >= begun + FAREWELL_SECONDS and not self._callers.lagging

        await wait_until(left, begun + CLOSE_SECONDS, self._clock)
