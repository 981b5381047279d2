"""How a service of several processes comes to its end: each worker goes through it by itself, and the parent waits."""

from contextlib import suppress

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ai_ticket.drain import ABORT_SECONDS, BRIEFLY_SECONDS, DrainedPipeline, report
from ai_ticket.listening import Listeners
from ai_ticket.systemd import Systemd
from ai_ticket.web.connection import CLOSE_SECONDS
from ai_ticket.web.connections import Connections
from ai_ticket.workers.crew import Crew

MARGIN_SECONDS = 5.0
"""That workers may take longer than they should."""


class CrewDrain:
    """The end of the service, as the parent has it."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        *,
        delay: float,
        grace: float,
        crew: Crew,
        listeners: Listeners,
        scrapers: Connections,
        pipeline: DrainedPipeline,
        systemd: Systemd,
    ):
        """As `Drain` has it."""
        self._clock = clock
        self._delay = delay
        self._grace = grace
        self._crew = crew
        self._listeners = listeners
        self._scrapers = scrapers
        self._pipeline = pipeline
        self._systemd = systemd
        self._begun_at: float | None = None

    async def run(self) -> None:
        """Go through all of it. Who cancels this cuts what is under way at once."""
        try:
            await self._run()
        except CancelledError:
            self._crew.hurry()
            with suppress(CancelledError):
                await self._crew.stopped(BRIEFLY_SECONDS + MARGIN_SECONDS)

    async def _run(self) -> None:
        began = self._begun_at = self._clock.seconds()
        self._systemd.stopping("stopping", self._delay + self._grace)
        self._scrapers.drain()
        in_flight = await self._crew.stop()
        self._log.info("stopping: {count} requests in flight", count=in_flight)
        self._systemd.status(f"stopping: {in_flight} requests in flight")
        await deferLater(self._clock, max(0.0, began + self._delay - self._clock.seconds()))
        end = began + self._delay + self._grace
        self._pipeline.drain(end)
        await self._listeners.close()
        self._systemd.status("no longer listening")
        left = end + ABORT_SECONDS + CLOSE_SECONDS + MARGIN_SECONDS - self._clock.seconds()
        if not await self._crew.stopped(left):
            self._log.warn("a worker has not finished in time")
        self._scrapers.leave()

    def report(self) -> None:
        """Log what became of the requests that were under way when the stop began, and of those that came later."""
        if self._begun_at is not None:
            report(self._log, self._crew.tally, self._clock.seconds() - self._begun_at)
