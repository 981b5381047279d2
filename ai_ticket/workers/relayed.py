"""Backends as the parent's pool has them: it gives out their slots, and the worker that has the event uses them."""

from collections.abc import Callable
from typing import Protocol

from msgspec.structs import replace

from ai_ticket.backend.address import Location
from ai_ticket.backend.kobold import KoboldBackend
from ai_ticket.errors import ApiConnectionError
from ai_ticket.event import Completion, Event, Parameters
from ai_ticket.interfaces import BackendState, Sink, Tokens
from ai_ticket.spans import NO_SPAN, Span
from ai_ticket.workers.messages import Learnt

ANSWERED = Completion("", "stop", "", None)
"""Stands for an answer that its caller has already, by way of its worker."""


class Owner(Protocol):
    """Who has an event."""

    async def attempt(self, number: int, backend: int, deadline: float) -> None:
        """Make an attempt at it.

        @raise DomainError: as `Backend.complete`.
        """


class EventElsewhere(Event, frozen=True, kw_only=True):
    """Stands for an event that a worker has, by its number there."""

    owner: Owner
    number: int


def event_elsewhere(owner: Owner, number: int, *, stream: bool, key: str | None) -> EventElsewhere:
    """The event that a worker has under this number. Its text is not in it: no pipeline or pool looks at that."""
    return EventElsewhere([], _NO_PARAMETERS, stream=stream, key=key, owner=owner, number=number)


_NO_PARAMETERS = Parameters(max_tokens=1)


class RelayedBackend:
    """A backend that is probed here, and used by workers."""

    def __init__(
        self,
        number: int,
        probed: KoboldBackend,
        locate: Callable[[], Location | None],
        tell: Callable[[Learnt], None],
    ):
        """@param locate: where it is now, if it is a bundled one. @param tell: tells all workers what was learnt."""
        self._number = number
        self._probed = probed
        self._locate = locate
        self._tell = tell

    @property
    def state(self) -> BackendState:
        """What was last learnt of it, here or by a worker."""
        return self._probed.state

    @property
    def learnt(self) -> Learnt:
        """The same for workers."""
        return Learnt(self._number, self.state, self._locate())

    async def complete(
        self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
    ) -> Completion:
        """Have the event's worker make an attempt."""
        if not isinstance(event, EventElsewhere):
            raise TypeError("the event is not a worker's")
        try:
            await event.owner.attempt(event.number, self._number, deadline)
        except ApiConnectionError as error:
            if not error.after_first_token and self.state.up:
                self._adopt(replace(self.state, up=False, error=error.details))
            raise
        if not self.state.up:
            self._adopt(replace(self.state, up=True, error=None))
        return ANSWERED

    async def probe(self) -> BackendState:
        """Ask the server what it is."""
        state = await self._probed.probe()
        self._tell(self.learnt)
        return state

    async def tokenize(self, text: str) -> Tokens | None:
        """The text's tokens, counted from here."""
        return await self._probed.tokenize(text)

    async def settle(self) -> None:
        """Workers wait for their own: nothing was begun here."""

    def _adopt(self, state: BackendState) -> None:
        self._probed.adopt(state)
        self._tell(self.learnt)
