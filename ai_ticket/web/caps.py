"""How many connections there may be, in all and of one client, and which of them makes room for a newcomer."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from msgspec import Struct, field
from twisted.logger import Logger

LOOK_SECONDS = 1.0
"""Between two looks for idle connections, unless the last one was worth its while: it goes through all of them."""

WORTH = 16
"""A look is worth its while if one in so many was idle. So a newcomer costs a look at no more than these."""

TELL_SECONDS = 61.0
"""Between two reports: a little more than the log takes what differs in numbers alone for a repeat of the first."""


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


class _Cap(Struct):
    """How many there may be, by which variable, and what became of those who were too many since it was last told.

    `clients`: how many of them each client had.
    """

    variable: str
    limit: int | None
    closed: int = 0
    refused: int = 0
    clients: Counter[str] = field(default_factory=Counter)
    told_at: float = float("-inf")

    @property
    def reason(self) -> str:
        """What `Recorder.connection_ended` calls it."""
        return self.variable.lower()


class Caps(Generic[M]):
    """The open connections, of which there are no more than `limit`, and of one client no more than `per_client`."""

    _log = Logger()

    def __init__(self, now: Callable[[], float], *, limit: int, per_client: int | None, ended: Callable[[str], None]):
        """
        @param now: the clock's time in seconds.
        @param per_client: None: as many as there may be at all.
        @param ended: is told why one was closed or refused (see `Recorder.connection_ended`).
        """
        self._now = now
        self._ended = ended
        self._limit = limit
        self._per_client = per_client
        self._all = _Crowd[M]()
        self._clients: dict[str, _Crowd[M]] = {}
        self._cap = _Cap("MAX_CONNECTIONS", limit)
        self._client_cap = _Cap("MAX_CONNECTIONS_PER_CLIENT", per_client)

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
            self._client_cap.clients[newcomer.client] += 1
            if not self._make_room(own, self._client_cap):
                return False
        if len(self) >= self._limit and not self._make_room(self._all, self._cap):
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

    def _make_room(self, crowd: _Crowd[M], cap: _Cap) -> bool:
        oldest = crowd.dispensable(self._now())
        if oldest is None:
            cap.refused += 1
            self._ended(f"{cap.reason}_refused")
            return False
        cap.closed += 1
        self._ended(cap.reason)
        self.leave(oldest)  # it closes a little later; the next newcomer must not count on it again
        oldest.abort()
        return True

    def report(self) -> None:
        """Log for how many there was no room since the last report: the first at once, more once in a while."""
        for cap in (self._client_cap, self._cap):
            if (cap.closed or cap.refused) and self._now() >= cap.told_at + TELL_SECONDS:
                self._tell(cap)

    def _tell(self, cap: _Cap) -> None:
        facts: dict[str, object] = {}
        if cap.clients:
            facts = {"client": cap.clients.most_common(1)[0][0], "clients": len(cap.clients)}
        self._log.warn(
            "{variable}={limit} reached: {closed} idle connections closed for newcomers, {refused} newcomers refused",
            variable=cap.variable,
            limit=cap.limit,
            closed=cap.closed,
            refused=cap.refused,
            **facts,
        )
        cap.closed = cap.refused = 0
        cap.clients.clear()
        cap.told_at = self._now()
