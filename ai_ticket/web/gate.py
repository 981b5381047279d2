"""Who may come in, and how often: what every request that asks for a completion passes before its body is read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from ai_ticket.errors import Overloaded, ShuttingDown
from ai_ticket.interfaces import Client, Limiter, Recorder
from ai_ticket.web import openai_faults
from ai_ticket.web.auth import Authenticator
from ai_ticket.web.faults import Quota, RateLimited, quota_headers, retry_after_seconds
from ai_ticket.web.request import Request

_LONGEST_NAP_SECONDS = 1.0

PRECEDENCE_SECONDS = 1.0
"""How long a batch holds back beyond the time when somebody of the same quota was told to come back."""

OVERLOAD_RETRY_SECONDS = 5.0
"""When a caller may come back to a service that is short of memory."""


class Gate:
    """Lets callers in: their tokens, whether the service still takes events, and their quota, in this order."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        limiter: Limiter | None,
        clock: IReactorTime,
        recorder: Recorder,
        draining: Callable[[], bool],
        short_of_memory: Callable[[], bool],
    ):
        self._authenticator = authenticator
        self._limiter = limiter
        self._clock = clock
        self._recorder = recorder
        self._draining = draining
        self._short_of_memory = short_of_memory
        self._batches: dict[str, int] = {}
        self._reserved_until: dict[str, float] = {}

    @property
    def draining(self) -> bool:
        """Whether the service takes no more events."""
        return self._draining()

    def shutting_down(self) -> ShuttingDown:
        """What such an event is told."""
        return ShuttingDown()

    async def identify(self, request: Request) -> Client:
        """Who sent the request; it does not count yet.

        @raise Unauthorised: nobody whom we know. @raise RateLimited: too many wrong tokens from this address.
        @raise ShuttingDown: the service takes no more events. @raise Overloaded: nor does it for the time being.
        """
        client = await self._authenticator.authenticate(request)
        if client.address != request.peer:
            request.facts["address"] = client.address
        if client.name is not None:
            request.facts["client"] = client.name
            request.span.set({"ai_ticket.client": client.name})
        if self.draining:
            raise self.shutting_down()
        if self._short_of_memory():
            raise Overloaded(
                "short of memory",
                message="The service takes no more events for the moment.",
                retry_after=OVERLOAD_RETRY_SECONDS,
            )
        return client

    async def admit(self, request: Request) -> Client:
        """Who sent the request, which counts as one call. The answer, whatever it will be, tells how many are left.

        @raise DomainError: as `identify`. @raise RateLimited: the client's quota is used up.
        """
        client = await self.identify(request)
        if self._limiter is not None:
            await self._count(request, self._limiter, client.quota)
        return client

    async def _count(self, request: Request, limiter: Limiter, key: str) -> None:
        admission = await limiter.admit(key)
        quota = Quota(limiter.limit, limiter.window, admission.remaining)
        if admission.admitted:
            request.common_headers += quota_headers(quota, admission.retry_after)
            if request.path.startswith(openai_faults.PATHS):
                request.common_headers += openai_faults.openai_quota_headers(quota, admission.retry_after)
            return
        self._recorder.rate_limited("quota")
        if key in self._batches:
            back = self._clock.seconds() + retry_after_seconds(admission.retry_after)
            self._reserved_until[key] = max(self._reserved_until.get(key, 0.0), back + PRECEDENCE_SECONDS)
        raise RateLimited(
            f"at most {quota.limit} events in {quota.window:g} s", retry_after=admission.retry_after, quota=quota
        )

    @contextmanager
    def batch(self, client: Client) -> Iterator[None]:
        """Within this there is a batch of the client, which holds back for others of the same quota."""
        key = client.quota
        self._batches[key] = self._batches.get(key, 0) + 1
        try:
            yield
        finally:
            self._batches[key] -= 1
            if not self._batches[key]:
                del self._batches[key]
                self._reserved_until.pop(key, None)

    async def quota(self, client: Client) -> None:
        """Wait until one more event of a batch may go on, and count it; or until the service takes no more.

        A batch would always be there first when a call may go on again, and callers who do as Retry-After says never.
        So what comes free is theirs, once they have been told to come back.
        """
        if self._limiter is None:
            return
        while not self.draining:
            wait = self._reserved_until.get(client.quota, 0.0) - self._clock.seconds()
            if wait <= 0:
                admission = await self._limiter.admit(client.quota)
                if admission.admitted:
                    return
                wait = admission.retry_after
            await deferLater(self._clock, min(wait, _LONGEST_NAP_SECONDS))
