"""Keeps what is known of a backend up to date, by asking it now and then."""

from collections.abc import Callable
from typing import Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from ai_ticket.interfaces import BackendState

UP_SECONDS = 10.0
DOWN_SECONDS = 1.0
JITTER = 0.2


class Probed(Protocol):
    """What of a `Backend` is needed for probing it."""

    @property
    def state(self) -> BackendState:
        """What was last learnt of it, from memory."""

    async def probe(self) -> BackendState:
        """Ask the server what it is."""


class Prober(Service):
    """Probes a backend: every 10 s while it is up, every second while it is not, give or take a fifth.

    Where an event finds out in between that it is not up, the next probe comes within a second.
    """

    _log = Logger()

    def __init__(self, backend: Probed, clock: IReactorTime, random: Callable[[], float]):
        """@param random: a number from 0 to 1, for the jitter."""
        self._backend = backend
        self._clock = clock
        self._random = random
        self._next: IDelayedCall | None = None
        self._due = 0.0
        self._probing: Deferred[None] | None = None

    def startService(self) -> None:
        """Probe at once, and from then on."""
        super().startService()  # type: ignore[no-untyped-call]
        self._probe()

    def stopService(self) -> None:
        """Stop probing; a probe under way is given up."""
        super().stopService()  # type: ignore[no-untyped-call]
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._probing is not None:
            self._probing.cancel()

    def _probe(self) -> None:
        self._next = None
        self._probing = Deferred.fromCoroutine(self._ask())
        self._probing.addErrback(lambda failure: self._log.failure("probing failed", failure) if self.running else None)
        self._probing.addBoth(self._done)

    async def _ask(self) -> None:
        before = self._backend.state
        state = await self._backend.probe()
        if state.up and not before.up:
            self._log.info(
                "backend {backend} is up: {software}, model {model}, slots: {slots}",
                backend=state.name,
                software=f"{state.kind} {state.version or 'of no known version'}",
                kind=state.kind,
                version=state.version or "",
                model=state.model,
                slots=state.slots,
            )
        elif not state.up and (before.up or before.error != state.error):
            self._log.warn("backend {backend} is down: {reason}", backend=state.name, reason=state.error)

    def _done(self, _: object) -> None:
        self._probing = None
        seconds = UP_SECONDS if self._backend.state.up else DOWN_SECONDS
        self._due = self._clock.seconds() + seconds * (1 + JITTER * (2 * self._random() - 1))
        self._schedule()

    def _schedule(self) -> None:
        if self.running:
            left = self._due - self._clock.seconds()
            self._next = self._clock.callLater(min(left, DOWN_SECONDS) if self._backend.state.up else left, self._look)

    def _look(self) -> None:
        self._next = None
        if self._backend.state.up and self._clock.seconds() < self._due:
            self._schedule()
        else:
            self._probe()
