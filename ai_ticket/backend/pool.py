"""Several backends as one: routed by rank and load, with another attempt elsewhere where that can help."""

from collections.abc import Callable, Sequence

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ai_ticket.backend.circuit import Circuit
from ai_ticket.backend.counting import Counting
from ai_ticket.backend.retry import RetryBudget, RetryPolicy
from ai_ticket.backend.slots import Lease, Member, SlotTable, Verdict
from ai_ticket.errors import (
    ApiAuthenticationError,
    ApiConnectionError,
    ApiEndpointMissing,
    ApiRateLimited,
    ApiResponseFormatError,
    ApiResponseStructureError,
    ApiServerError,
    CallerTooSlow,
    ContextLengthExceeded,
    DeadlineExceeded,
    DomainError,
    NoBackendAvailable,
    UnsupportedParameter,
)
from ai_ticket.event import Completion, Event
from ai_ticket.interfaces import Backend, BackendState, Sink, Tokens
from ai_ticket.spans import NO_SPAN, Span

_FAILURES = (
    ApiAuthenticationError,
    ApiConnectionError,
    ApiEndpointMissing,
    ApiResponseFormatError,
    ApiResponseStructureError,
    ApiServerError,
)
"""What is the backend's fault. A wrong key is, too: it fails whatever is sent there."""

_CURABLE_ELSEWHERE = (ApiAuthenticationError, ApiEndpointMissing, UnsupportedParameter)
"""What trying again at the same backend can't help."""

_log = Logger()


class Pool:
    """Some backends behind the `Backend` seam."""

    def __init__(
        self,
        ranks: Sequence[Sequence[Backend]],
        *,
        clock: IReactorTime,
        random: Callable[[], float],
        policy: RetryPolicy,
    ):
        """@param ranks: the preferred backends, then their standbys; those of a rank are equals.

        @param random: a number from 0 to 1, for the circuits' jitter.
        """
        self._clock = clock
        self._policy = policy
        self._table = SlotTable(clock)
        self._table.members = [
            Member(backend, rank, Circuit(backend.state.name, clock, random), self._table.look_again)
            for rank, equals in enumerate(ranks)
            for backend in equals
        ]
        self._counting = Counting([member.backend for member in self._table.members])
        # As many retries as there are slots are always to be had: a backend that dies fails no more at once.
        self._budget = RetryBudget(clock, lambda: sum(state.slots for state in self.states))

    @property
    def members(self) -> Sequence[Member]:
        """The backends in order of rank, each with its circuit and how many attempts are under way."""
        return self._table.members

    @property
    def states(self) -> list[BackendState]:
        """What was last learnt of each, in order of rank."""
        return [member.state for member in self.members]

    @property
    def slots(self) -> int:
        """Events that can be under way as things are: those that are, and as many more as would get a slot.

        Where every circuit is open that is one more: it is told so.
        """
        return self._table.slots

    def watch(self, changed: Callable[[], None]) -> None:
        """Call this when there may be more slots, other than by the end of an event."""
        self._table.watch(changed)

    @property
    def state(self) -> BackendState:
        """All of them as one: up where any is."""
        return BackendState(name="pool", up=any(state.up for state in self.states), slots=self.slots)

    def check(self) -> None:
        """Whether an event, sent now, has a chance.

        @raise NoBackendAvailable: every circuit is open.
        """
        self._table.check()

    async def probe(self) -> BackendState:
        """Ask each of them in turn."""
        for member in self.members:
            await member.probe()
        return self.state

    async def tokenize(self, text: str) -> Tokens | None:
        """The text's tokens; see `Counting`."""
        return await self._counting.tokenize(text)

    async def settle(self) -> None:
        """Wait until each of them has been told of every generation that was to be stopped, or could not be."""
        for member in self.members:
            await member.backend.settle()

    async def complete(
        self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
    ) -> Completion:
        """Generate an answer, in as many attempts as the policy and the budget allow.

        @raise NoBackendAvailable: every circuit was open before any attempt. Otherwise as `Backend.complete`; the
            error is that of the last attempt.
        """
        self._budget.request()
        tried: list[Member] = []
        lease = await self._table.take(tried, deadline)
        while True:
            try:
                return await self._attempt(lease, event, deadline, sink, span)
            except DomainError as error:
                tried.append(lease.member)
                delay = self._delay(tried, error, deadline)
                if delay is None:
                    raise
                failed = error
            _log.info(
                "backend {backend}: attempt {attempt} failed with {code}, there will be another",
                backend=lease.member.state.name,
                attempt=len(tried),
                code=failed.code,
            )
            await deferLater(self._clock, delay)
            lease = await self._take_again(tried, deadline, failed)

    def _delay(self, tried: Sequence[Member], error: DomainError, deadline: float) -> float | None:
        """Seconds until the next attempt: none of waiting where it goes elsewhere. None: there will be no other."""
        delay = self._policy(len(tried), error)
        if delay is None:
            return None
        if isinstance(error, _CURABLE_ELSEWHERE) and not self._table.elsewhere(tried):
            return None
        if self._table.elsewhere(tried):
            delay = 0.0
        if self._clock.seconds() + delay >= deadline:
            return None
        # Busy is no failure, and going where there is room makes no bad hour worse.
        return delay if isinstance(error, ApiRateLimited) or self._budget.withdraw() else None

    async def _take_again(self, tried: Sequence[Member], deadline: float, failed: DomainError) -> Lease:
        """@raise DomainError: what failed already, where it tells more than why there is no slot."""
        try:
            return await self._table.take(tried, deadline)
        except NoBackendAvailable:
            raise failed
        except DeadlineExceeded:
            if isinstance(failed, ApiRateLimited):
                raise failed
            raise

    async def _attempt(self, lease: Lease, event: Event, deadline: float, sink: Sink | None, span: Span) -> Completion:
        verdict = Verdict.NOTHING
        try:
            completion = await lease.member.backend.complete(event, deadline, sink, span)
            verdict = Verdict.SUCCESS
            return completion
        except DomainError as error:
            error.backend = lease.member.state.name
            verdict = self._verdict(error, deadline)
            if not isinstance(error, CallerTooSlow | ContextLengthExceeded | UnsupportedParameter):
                lease.member.failed(error, self._clock.seconds())
            raise
        finally:
            self._table.release(lease, verdict)

    def _verdict(self, error: DomainError, deadline: float) -> Verdict:
        """Whether a failed attempt is the backend's fault."""
        if isinstance(error, CallerTooSlow):
            return Verdict.NOTHING
        # At the event's own deadline, silence may mean no more than that the event had waited for long.
        silent = isinstance(error, DeadlineExceeded) and self._clock.seconds() < deadline
        return Verdict.FAILURE if silent or isinstance(error, _FAILURES) else Verdict.NOTHING
