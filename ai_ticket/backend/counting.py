"""Texts counted in tokens by model servers."""

from collections.abc import Sequence

from twisted.internet.defer import DeferredLock

from ai_ticket.backend.slots import BUSY_SECONDS
from ai_ticket.errors import Overloaded
from ai_ticket.interfaces import Backend, Tokens

MOST_COUNTS = 64
"""Texts that may wait for being counted."""


class Counting:
    """Has the first of some backends count that is up and tells."""

    def __init__(self, backends: Sequence[Backend]):
        """@param backends: in order of rank."""
        self._backends = backends
        self._one_at_a_time = DeferredLock()

    async def tokenize(self, text: str) -> Tokens | None:
        """The text's tokens; None where no backend tells.

        Those who ask wait for each other: that a server is told to stop a generation must not wait for all of them.

        @raise Overloaded: too many wait. Otherwise as `Backend.tokenize`.
        """
        if len(self._one_at_a_time.waiting) >= MOST_COUNTS:
            raise Overloaded("too many texts are being counted", retry_after=BUSY_SECONDS)
        async with self._one_at_a_time:
            for backend in self._backends:
                tokens = await backend.tokenize(text) if backend.state.up else None
                if tokens is not None:
                    return tokens
        return None
