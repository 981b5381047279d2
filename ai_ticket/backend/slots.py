"""Who gets which slot: the backends of a pool, what is under way at each, and the attempts that wait."""

from collections.abc import Callable, Collection, Sequence
from enum import Enum, auto

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from ai_ticket.backend.circuit import Circuit, CircuitState
from ai_ticket.errors import ApiConnectionError, ApiRateLimited, DeadlineExceeded, DomainError, NoBackendAvailable
from ai_ticket.interfaces import Backend, BackendState

BLEMISH_SECONDS = 5.0
BUSY_SECONDS = 1.0

_CLOSED, _OPEN = CircuitState.CLOSED, CircuitState.OPEN  # Python 3.11 takes long to find a member in its enum


class Verdict(Enum):
    """What an attempt proves about its backend."""

    SUCCESS = auto()
    FAILURE = auto()
    NOTHING = auto()


class Member:
    """A backend in its place in a pool. `state` and `probe` are for whoever watches its health."""

    def __init__(self, backend: Backend, rank: int, circuit: Circuit, changed: Callable[[], None]):
        self.backend = backend
        self.rank = rank
        self.circuit = circuit
        self.running = 0
        self.last_turn = 0
        self._rests_until = 0.0
        self._failed_at: float | None = None
        self._avoided_until = 0.0
        self._unreachable = False
        self._changed = changed

    @property
    def state(self) -> BackendState:
        """What was last learnt of it."""
        return self.backend.state

    async def probe(self) -> BackendState:
        """Ask the server what it is; its circuit and those who wait for a slot profit from the answer."""
        state = await self.backend.probe()
        if not state.up:
            self._unreachable = True
            self.circuit.found_down()
        elif self._unreachable:
            self._unreachable = False
            self.circuit.found_up()
        self._changed()
        return state

    def failed(self, error: DomainError, now: float) -> None:
        """An attempt ended with this error: what that means for those that come next, beside the circuit."""
        self._avoided_until = now + BLEMISH_SECONDS
        if isinstance(error, ApiRateLimited):
            self._rests_until = max(self._rests_until, now + (error.retry_after or BUSY_SECONDS))
            return
        self._failed_at = now
        if isinstance(error, ApiConnectionError):
            self._unreachable = True

    @property
    def usable(self) -> bool:
        """Whether something may yet come of waiting for it."""
        return self.circuit.state is not _OPEN

    def free(self, now: float) -> bool:
        """Whether it can take an attempt now."""
        return self.running < self.state.slots and now >= self._rests_until and self.circuit.lets_through()

    @property
    def room(self) -> int:
        """Attempts that can be under way at it: those that are, and as many more as it would be let."""
        more = self.state.slots - self.running
        if self.circuit.state is not _CLOSED:
            more = min(more, int(self.circuit.lets_through()))
        return self.running + max(0, more)

    @property
    def ready_at(self) -> float:
        """The clock's time before which nothing is given to it."""
        return max(self._rests_until, self.circuit.closed_until)

    @property
    def avoided_until(self) -> float:
        """The clock's time until which an event that it did not answer rather waits for another."""
        return self._avoided_until

    def blemished(self, now: float) -> bool:
        """Whether it failed a moment ago. One that fails at once is the least busy of all, and must not profit."""
        return self._failed_at is not None and now - self._failed_at < BLEMISH_SECONDS


class Lease(Struct, frozen=True):
    """A slot of a member, and the ticket for its circuit."""

    member: Member
    ticket: int


class _Waiter(Struct, eq=False):
    turn: Deferred[Lease]
    tried: Collection[Member]


class SlotTable:
    """Gives out the members' slots, never more than each has; who can't have one yet waits, first in first out.

    A member is chosen by its health, then by whether it has been tried, by rank, and among equals by how busy it is.
    Slots, health and circuits are read anew at each turn.
    """

    def __init__(self, clock: IReactorTime):
        self.members: Sequence[Member] = ()
        self._clock = clock
        self._waiting: list[_Waiter] = []
        self._turns = 0
        self._dispatching = False
        self._wake: IDelayedCall | None = None
        self._watcher: Callable[[], None] | None = None

    @property
    def slots(self) -> int:
        """Attempts that can be under way, as `Pool.slots` has it."""
        usable = [member for member in self.members if member.usable]
        best = [member for member in usable if member.state.up] or usable
        slots = sum(member.room if member in best else member.running for member in self.members)
        return slots if best else slots + 1

    def watch(self, changed: Callable[[], None]) -> None:
        """As `Pool.watch` has it."""
        self._watcher = changed

    async def take(self, tried: Collection[Member], deadline: float) -> Lease:
        """A slot, as soon as there is one; cancelling leaves the queue.

        @param tried: members to be avoided where there are others.
        @raise NoBackendAvailable: every circuit is open. @raise DeadlineExceeded: none came free in time.
        """
        left = deadline - self._clock.seconds()
        if left <= 0:
            _too_late()
        waiter = _Waiter(Deferred(lambda _: self._leave(waiter)), tried)
        self._waiting.append(waiter)
        self.dispatch()
        if not waiter.turn.called:
            waiter.turn.addTimeout(left, self._clock, onTimeoutCancel=_too_late)
        return await waiter.turn

    def release(self, lease: Lease, verdict: Verdict) -> None:
        """Give a slot back, with what its attempt has proved."""
        member = lease.member
        member.running -= 1
        if verdict is Verdict.SUCCESS:
            member.circuit.succeeded(lease.ticket)
        elif verdict is Verdict.FAILURE:
            member.circuit.failed(lease.ticket)
        else:
            member.circuit.abandoned(lease.ticket)
        self.dispatch()

    def check(self) -> None:
        """Whether anything may come of waiting for a slot.

        @raise NoBackendAvailable: every circuit is open.
        """
        if not any(member.usable for member in self.members):
            raise NoBackendAvailable(retry_after=self._retry_after())

    def elsewhere(self, tried: Collection[Member]) -> bool:
        """Whether the next attempt would go to a member that has not been tried."""
        return any(member not in tried for member in self._best(tried))

    def look_again(self) -> None:
        """A member has changed, or time has passed."""
        self.dispatch()
        if self._watcher is not None:
            self._watcher()

    def dispatch(self) -> None:
        """Give out what there is: something has changed."""
        # Who gets a slot may give it back before `callback` returns: a loop, or many of them would nest too deep.
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self._serve_one():
                pass
        finally:
            self._dispatching = False
        self._set_wake()

    def _serve_one(self) -> bool:
        if not self._waiting:
            return False
        try:
            self.check()
        except NoBackendAvailable as error:
            self._waiting.pop(0).turn.errback(error)
            return True
        now = self._clock.seconds()
        if not any(member.free(now) for member in self.members):
            return False
        for waiter in self._waiting:
            member = self._choose(waiter.tried)
            if member is not None:
                self._waiting.remove(waiter)
                waiter.turn.callback(self._lease(member))
                return True
        return False

    def _choose(self, tried: Collection[Member]) -> Member | None:
        now = self._clock.seconds()
        free = [member for member in self._best(tried) if member.free(now)]
        return min(
            free,
            default=None,
            key=lambda one: (
                one in tried,
                one.rank,
                one.blemished(now),
                one.running / one.state.slots,
                one.last_turn,
            ),
        )

    def _best(self, tried: Collection[Member]) -> list[Member]:
        """The members worth waiting for, in whatever rank: of those that are up the ones that did not just fail.

        For a few seconds only: one that was busy, or failed once, may be free while the others are not for long.
        """
        now = self._clock.seconds()
        usable = [member for member in self.members if member.usable]
        worth = {member: (not member.state.up, member in tried and now < member.avoided_until) for member in usable}
        best = min(worth.values(), default=None)
        return [member for member in usable if worth[member] == best]

    def _lease(self, member: Member) -> Lease:
        self._turns += 1
        member.last_turn = self._turns
        member.running += 1
        return Lease(member, member.circuit.enter())

    def _leave(self, waiter: _Waiter) -> None:
        self._waiting.remove(waiter)
        self._set_wake()

    def _set_wake(self) -> None:
        """Look again when a rest, an open circuit's back-off or an avoidance ends, if somebody waits here.

        Those who wait where the watcher is get no further than to a slot: for them only the back-off counts.
        """
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        now = self._clock.seconds()
        ends: list[float] = []
        if self._waiting:
            ends = [time for member in self.members for time in (member.ready_at, member.avoided_until)]
        elif self._watcher is not None:
            ends = [member.circuit.closed_until for member in self.members]
        times = [time for time in ends if time > now]
        if times:
            self._wake = self._clock.callLater(min(times) - now, self._woken)

    def _woken(self) -> None:
        self._wake = None
        self.look_again()

    def _retry_after(self) -> float:
        return min(member.circuit.closed_until for member in self.members) - self._clock.seconds()


def _too_late(*_: object) -> None:
    raise DeadlineExceeded("no slot of a model server came free in time")
