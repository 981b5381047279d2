"""How many bytes of bodies may be held at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from ai_ticket.errors import Overloaded

RETRY_SECONDS = 10.0


class BodyBudget:
    """Bytes of batches that came as one body each: so many in all, and so many of one client."""

    def __init__(self, total: int, each: int):
        self._total = total
        self._each = each
        self._held: dict[str, int] = {}

    @contextmanager
    def holding(self, client: str, size: int) -> Iterator[None]:
        """Hold so many bytes of a client.

        @raise Overloaded: there is no room for them now.
        """
        held = self._held.get(client, 0)
        if held + size > self._each or sum(self._held.values()) + size > self._total:
            raise Overloaded("other batches take up the room for their bodies", retry_after=RETRY_SECONDS)
        self._held[client] = held + size
        try:
            yield
        finally:
            self._held[client] -= size
            if not self._held[client]:
                del self._held[client]
