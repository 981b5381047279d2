"""When another attempt is made: a pure policy, and the budget that keeps retries from making a bad hour worse."""

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime

from ai_ticket.errors import (
    ApiAuthenticationError,
    ApiConnectionError,
    ApiEndpointMissing,
    ApiRateLimited,
    ApiResponseFormatError,
    ApiResponseStructureError,
    ApiServerError,
    DeadlineExceeded,
    DomainError,
    UnsupportedParameter,
)

BASE_SECONDS = 0.25
LONGEST_SECONDS = 4.0

REQUESTS_PER_RETRY = 10
FLOOR = 10
FLOOR_SECONDS = 3600.0

_CURABLE = (
    ApiAuthenticationError,  # elsewhere, which is for the pool to see
    ApiConnectionError,
    ApiEndpointMissing,  # as well
    ApiRateLimited,
    ApiResponseFormatError,
    ApiResponseStructureError,
    ApiServerError,
    UnsupportedParameter,  # as well
)

RetryPolicy = Callable[[int, DomainError], float | None]
"""(how many attempts were made, what the last one failed with) -> seconds until the next, or None for no other."""


def make_retry_policy(*, max_attempts: int, silence_is_curable: bool, random: Callable[[], float]) -> RetryPolicy:
    """Exponential back-off with full jitter, beyond what the server asked for.

    @param silence_is_curable: whether a server that was silent for too long leaves time for another attempt. It does
        not where the time-out is all that the event's deadline leaves.
    @param random: a number from 0 to 1.
    """
    curable = (*_CURABLE, DeadlineExceeded) if silence_is_curable else _CURABLE

    def policy(attempt: int, error: DomainError) -> float | None:
        if attempt >= max_attempts or error.after_first_token or not isinstance(error, curable):
            return None
        # Beyond the exponent at which the cap is long reached, a float would overflow.
        longest = min(LONGEST_SECONDS, BASE_SECONDS * 2.0 ** min(attempt - 1, 32))
        return (error.retry_after or 0.0) + longest * random()

    return policy


class RetryBudget:
    """Lets one request in ten be retried.

    Each request adds a tenth of a retry, up to a floor, which is there from the start and comes back within an hour
    also where there are few requests. So in any span of time there are at most `requests / 10 + floor * (1 + hours)`
    retries, however bad it is.
    """

    def __init__(self, clock: IReactorTime, floor: Callable[[], int]):
        """@param floor: retries that are free; asked anew each time. At least `FLOOR` are."""
        self._clock = clock
        self._floor = floor
        self._spent = 0.0
        self._counted_at = clock.seconds()

    @property
    def left(self) -> float:
        """Retries that could be made now."""
        self._recover()
        return self._size() - self._spent

    def request(self) -> None:
        """A request came."""
        self._recover()
        self._spent = max(0.0, self._spent - 1 / REQUESTS_PER_RETRY)

    def withdraw(self) -> bool:
        """Use up one retry, if there is one left."""
        if self.left < 1:
            return False
        self._spent += 1
        return True

    def _recover(self) -> None:
        now = self._clock.seconds()
        self._spent = max(0.0, self._spent - self._size() * (now - self._counted_at) / FLOOR_SECONDS)
        self._counted_at = now

    def _size(self) -> int:
        return max(FLOOR, self._floor())
