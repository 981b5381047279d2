"""The workers of a service: as many as there are to be, started again when they end, and spoken to as one."""

from collections.abc import Callable
from contextlib import suppress

from twisted.application.service import Service
from twisted.internet.defer import Deferred, TimeoutError, gatherResults
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from ai_ticket.drain import wait_until
from ai_ticket.listening import CannotStart
from ai_ticket.web.site import Tally
from ai_ticket.workers.families import departed, merged
from ai_ticket.workers.generations import LinkLost, RemoteGenerations
from ai_ticket.workers.link import Link
from ai_ticket.workers.message import Message
from ai_ticket.workers.messages import Family, Hurry, Start, Stop
from ai_ticket.workers.process import Launch, NotReady, Process

START_SECONDS = 60.0
"""That a worker may take until it serves."""

LOOK_SECONDS = 1.0
HUNG_SECONDS = 10.0
"""Without an answer to a ping, after which a worker is killed."""

PLACES_LOOKS = 5
"""Looks between two times when those who wait are told their places."""

SAMPLES_SECONDS = 1.0
"""That a worker may take to tell its metrics; then those that it told last stand for them."""

TOLD_SECONDS = 1.0
"""That workers may take to say how much they have under way when they are told to stop."""

POLL_SECONDS = 0.02

END_SECONDS = 5.0
"""That a worker may take to end when all is done, for its last traces among others."""

FIRST_RETRY = 0.1
LAST_RETRY = 30.0
STEADY = 60.0
"""Seconds of service after which an end counts as the first again."""


class Worker:
    """One worker: its process while there is one, and what outlives that."""

    def __init__(self, number: int):
        self.number = number
        self.process: Process | None = None
        self.link: Link | None = None
        self.ready = False
        self.started_at = 0.0
        self.failures = 0
        self.retry: IDelayedCall | None = None
        self.families: list[Family] = []


class Crew(Service):
    """Runs the workers while this service runs."""

    _log = Logger()

    def __init__(
        self,
        count: int,
        *,
        clock: IReactorTime,
        launch: Launch,
        make_link: Callable[..., Link],
        start: Callable[[int], Start],
        used_memory: Callable[[], int | None],
        lagging: Callable[[], bool],
        jitter: Callable[[], float],
    ):
        """@param make_link: a link, given its `ready` and `lost`. @param start: a worker's first message.

        @param used_memory: bytes that this process uses. @param lagging: whether its event loop is late.
        @param jitter: a number from 0 to 1.
        """
        self._clock = clock
        self._launch = launch
        self._make_link = make_link
        self._start = start
        self._used_memory = used_memory
        self._lagging = lagging
        self._jitter = jitter
        self._workers = [Worker(number) for number in range(count)]
        self._departed: list[Family] = []
        self._look = LoopingCall(self._look_after)
        self._look.clock = clock
        self._looks = 0
        self._ending = False
        self._told: list[Link] = []

    @property
    def serving(self) -> int:
        """How many workers serve."""
        return sum(worker.ready for worker in self._workers)

    @property
    def well(self) -> bool:
        """Whether none of them has been silent for longer than it takes to see that it hangs, and to kill it."""
        silent_since = self._clock.seconds() - HUNG_SECONDS - 2 * LOOK_SECONDS
        ready = [worker.link for worker in self._workers if worker.ready]
        return all(link is not None and link.heard_at >= silent_since for link in ready)

    @property
    def generations(self) -> list[RemoteGenerations]:
        """Those of each worker that there is."""
        return [link.generations for link in self._links()]

    def tell(self, message: Message) -> None:
        """Tell all workers."""
        for link in self._links():
            link.send(message)

    def tell_each(self, message: Callable[[int], Message]) -> None:
        """Tell each worker what there is for its number."""
        for worker in self._workers:
            if worker.link is not None:
                worker.link.send(message(worker.number))

    def _links(self) -> list[Link]:
        return [worker.link for worker in self._workers if worker.link is not None]

    # Starting, and starting again.

    def startService(self) -> None:
        """Start all of them, and wait until they serve.

        @raise CannotStart: one does not.
        """
        super().startService()  # type: ignore[no-untyped-call]
        try:
            started = [(worker, self._spawn(worker)) for worker in self._workers]
        except OSError as error:
            raise self._refusal(f"there can't be another process: {error.strerror}")
        for worker, process in started:
            process.begin(self._start(worker.number))
        for worker, process in started:
            try:
                process.wait_ready(START_SECONDS)
            except NotReady as error:
                raise self._refusal(f"worker {worker.number} did not start: {error}")
        for worker, process in started:
            self._connect(worker, process)
            self._became_ready(worker)
        self._look.start(LOOK_SECONDS, now=False).addErrback(
            lambda failure: self._log.failure("looking after the workers failed", failure)
        )

    def _refusal(self, reason: str) -> CannotStart:
        self._log.critical("{reason}", reason=reason)
        self._ending = True
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()
        return CannotStart(reason)

    def _spawn(self, worker: Worker) -> Process:
        process = worker.process = self._launch(lambda how: self._ended(worker, how))
        worker.started_at = self._clock.seconds()
        return process

    def _connect(self, worker: Worker, process: Process) -> Link:
        link: Link = self._make_link(ready=lambda: self._became_ready(worker), lost=lambda: self._lost(worker, link))
        worker.link = link
        process.connect(link.channel)
        return link

    def _spawn_again(self, worker: Worker) -> None:
        worker.retry = None
        try:
            process = self._spawn(worker)
        except OSError as error:
            self._ended(worker, f"could not be started ({error.strerror})")
            return
        self._connect(worker, process).send(self._start(worker.number))

    def _became_ready(self, worker: Worker) -> None:
        worker.ready = True
        self._log.info(
            "worker {worker} serves", worker=worker.number, pid=None if worker.process is None else worker.process.pid
        )

    def _lost(self, worker: Worker, link: Link) -> None:
        """Nothing more is heard of a worker: if it has not ended yet, it is of no use any more."""
        if worker.link is not link:
            return
        worker.link = None
        worker.ready = False
        self._departed = merged([self._departed, departed(worker.families)])
        worker.families = []
        if worker.process is not None and not self._ending:
            worker.process.kill()

    def _ended(self, worker: Worker, how: str) -> None:
        """A worker's process is gone."""
        worker.process = None
        if self._ending:
            return
        if self._clock.seconds() - worker.started_at >= STEADY:
            worker.failures = 0
        delay = min(LAST_RETRY, FIRST_RETRY * 2.0 ** min(worker.failures, 32)) * (1 + self._jitter()) / 2
        worker.failures += 1
        self._log.error(
            "worker {worker} {how}; it is started again in {delay:.1f} s", worker=worker.number, how=how, delay=delay
        )
        worker.retry = self._clock.callLater(delay, self._spawn_again, worker)

    def _look_after(self) -> None:
        now = self._clock.seconds()
        self._looks += 1
        links = self._links()
        fair_share = sum(link.connections for link in links) / len(links) if links else 0.0
        memory = (self._used_memory() or 0) + sum(link.memory for link in links)
        for worker in self._workers:
            link, process = worker.link, worker.process
            if link is None or process is None:
                continue
            hung = now - link.heard_at >= HUNG_SECONDS if worker.ready else now - worker.started_at >= START_SECONDS
            if hung:
                self._log.error("worker {worker} hangs, and is killed", worker=worker.number)
                process.kill()
                continue
            link.ping(fair_share, memory, self._lagging())
            self._keep(worker)
            if not self._looks % PLACES_LOOKS:
                link.tell_places()

    # Metrics.

    def _keep(self, worker: Worker) -> None:
        """Keep a worker's metrics: what it has counted since is lost with it."""
        updating = Deferred.fromCoroutine(self._update(worker))
        updating.addErrback(lambda failure: self._log.failure("a worker's metrics can't be read", failure))

    async def families(self) -> list[Family]:
        """The metrics of all workers, those included that are gone."""
        await gatherResults([Deferred.fromCoroutine(self._update(worker)) for worker in self._workers])
        return merged([self._departed, *(worker.families for worker in self._workers)])

    async def _update(self, worker: Worker) -> None:
        link = worker.link
        if link is None or not worker.ready:
            return
        with suppress(TimeoutError, LinkLost):
            families = await link.samples().addTimeout(SAMPLES_SECONDS, self._clock)
            if worker.link is link:
                worker.families = families

    # The end.

    async def stop(self) -> int:
        """Have all of them stop, and start none again.

        @return: how many requests they had under way, as far as they say so soon.
        """
        self._begin_to_end(Stop())
        await self._until(lambda: all(link.in_flight is not None or link.gone for link in self._told), TOLD_SECONDS)
        return sum(link.in_flight or 0 for link in self._told)

    async def stopped(self, seconds: float) -> bool:
        """Wait until each has said what became of its requests, or is gone; whether that is so in time."""
        return await self._until(lambda: all(link.stopped is not None or link.gone for link in self._told), seconds)

    def hurry(self) -> None:
        """Have all of them cut at once what is under way."""
        self._begin_to_end(Hurry())

    @property
    def tally(self) -> Tally:
        """What became of the requests since the stop began. What a worker had that has not said it is cut."""
        total = Tally()
        for link in self._told:
            tally = Tally(cut=link.in_flight or 0) if link.stopped is None else link.stopped.tally
            total = Tally(*(getattr(total, name) + getattr(tally, name) for name in Tally.__struct_fields__))
        return total

    def stopService(self) -> Deferred[None]:
        """End all of them; fires when there is none. Who cancels that has them killed."""
        super().stopService()  # type: ignore[no-untyped-call]
        if self._look.running:
            self._look.stop()
        return Deferred.fromCoroutine(self._end())

    async def _end(self) -> None:
        try:
            if not self._told:
                self.hurry()
            await self._until(self._all_gone, END_SECONDS)
        finally:
            for worker in self._workers:
                if worker.process is not None:
                    self._log.warn("worker {worker} does not end, and is killed", worker=worker.number)
                    worker.process.kill()
        await self._until(self._all_gone, END_SECONDS)

    def _begin_to_end(self, message: Message) -> None:
        self._ending = True
        for worker in self._workers:
            if worker.retry is not None:
                worker.retry.cancel()
                worker.retry = None
        self._told = self._told or self._links()
        self.tell(message)

    def _all_gone(self) -> bool:
        return all(worker.process is None for worker in self._workers)

    async def _until(self, true: Callable[[], bool], seconds: float) -> bool:
        return await wait_until(true, self._clock.seconds() + seconds, self._clock, POLL_SECONDS)
