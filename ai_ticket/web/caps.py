"""How many connections there may be, in all and of one client, and which of them makes room for a newcomer."""

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from msgspec import Struct
from twisted.logger import Logger

LOOK_SECONDS = 1.0
"""Between two looks for idle connections, unless the last one was worth its while: it goes through all of them."""

WORTH = 16
"""A look is worth its while if one in so many was idle. So a newcomer costs a look at no more than these."""


class Member(Protocol):
    """A connection, as far as its place goes. `asked_at`: when its latest request began, or it was opened."""

    client: str
    asked_at: float

    @property
    def idle(self) -> bool:
        """Whether no request is under way on it."""

    def abort(self) -> None:
        """Close at once."""


M = TypeVar("M", bound=Member)


class _Crowd(Generic[M]):
    """Connections of which there may be only so many: all of them, or those of one client."""

    __slots__ = ("_idle", "_look_from", "_looked_at", "members")

    def __init__(self) -> None:
        self.members: dict[M, None] = {}
        # Those that were idle at the last look, the one to go next at the end.
        self._idle: dict[M, None] = {}
        self._looked_at = self._look_from = float("-inf")

    def remove(self, member: M) -> None:
        del self.members[member]
        self._idle.pop(member, None)

    def dispensable(self, now: float) -> M | None:
        """The idle one that has asked for nothing for the longest time.

        Where most are busy, one that has just fallen idle is found by the next look, and till then newcomers refused.
        """
        found = self._next()
        if found is None and now >= self._look_from:
            idle = [member for member in self.members if member.idle]
            worth = len(idle) * WORTH >= len(self.members)
            self._looked_at, self._look_from = now, now if worth else now + LOOK_SECONDS
            self._idle = dict.fromkeys(sorted(idle, key=_asked_at, reverse=True))
            found = self._next()
        return found

    def _next(self) -> M | None:
        while self._idle:
            member, _ = self._idle.popitem()
            if member.asked_at <= self._looked_at and member.idle:
                return member
        return None


def _asked_at(member: Member) -> float:
    return member.asked_at


class _Tally(Struct):
    """What became of those who were too many."""

    closed: int = 0
    refused: int = 0


class Caps(Generic[M]):
    """The open connections, of which there are no more than `limit`, and of one client no more than `per_client`."""

    _log = Logger()

    def __init__(self, now: Callable[[], float], *, limit: int, per_client: int | None):
        """@param now: the clock's time in seconds. @param per_client: None: as many as there may be at all."""
        self._now = now
        self._limit = limit
        self._per_client = per_client
        self._all = _Crowd[M]()
        self._clients: dict[str, _Crowd[M]] = {}
        self._tally, self._client_tally = _Tally(), _Tally()
        self._crowding = ""

    def __len__(self) -> int:
        return len(self._all.members)

    def __iter__(self) -> Iterator[M]:
        return iter(self._all.members)

    def __contains__(self, member: object) -> bool:
        return member in self._all.members

    def clients(self) -> dict[str, int]:
        """How many connections each client has, where that is counted."""
        return {client: len(crowd.members) for client, crowd in self._clients.items()}

    def enter(self, newcomer: M) -> bool:
        """Whether there is a place for it: a free one, or that of an idle connection, which is closed."""
        own = self._clients.get(newcomer.client)
        if own is not None and self._per_client is not None and len(own.members) >= self._per_client:
            self._crowding = newcomer.client
            if not self._make_room(own, self._client_tally):
                return False
        if len(self) >= self._limit and not self._make_room(self._all, self._tally):
            return False
        self._all.members[newcomer] = None
        if self._per_client is not None:
            self._clients.setdefault(newcomer.client, _Crowd()).members[newcomer] = None
        return True

    def leave(self, member: M) -> None:
        """It is gone; nothing happens if it had no place, or has none any more."""
        if member not in self._all.members:
            return
        self._all.remove(member)
        own = self._clients.get(member.client)
        if own is not None:
            own.remove(member)
            if not own.members:
                del self._clients[member.client]

    def _make_room(self, crowd: _Crowd[M], tally: _Tally) -> bool:
        oldest = crowd.dispensable(self._now())
        if oldest is None:
            tally.refused += 1
            return False
        tally.closed += 1
        self.leave(oldest)  # it closes a little later; the next newcomer must not count on it again
        oldest.abort()
        return True

    def report(self) -> None:
        """Log for how many there was no room since the last report."""
        if self._client_tally != _Tally():
            self._tell("MAX_CONNECTIONS_PER_CLIENT", self._per_client, self._client_tally, client=self._crowding)
            self._client_tally = _Tally()
        if self._tally != _Tally():
            self._tell("MAX_CONNECTIONS", self._limit, self._tally)
            self._tally = _Tally()

    def _tell(self, variable: str, limit: int | None, tally: _Tally, **facts: str) -> None:
        self._log.warn(
            "{variable}={limit} reached: {closed} idle connections closed for newcomers, {refused} newcomers refused",
            variable=variable,
            limit=limit,
            closed=tally.closed,
            refused=tally.refused,
            **facts,
        )
