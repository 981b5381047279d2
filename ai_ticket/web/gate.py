"""Who may come in, and how often: what every request that asks for a completion passes before its body is read."""

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from ai_ticket.errors import ShuttingDown
from ai_ticket.interfaces import Client, Limiter, Recorder
from ai_ticket.web.auth import Authenticator
from ai_ticket.web.faults import Quota, RateLimited, quota_headers
from ai_ticket.web.request import Request

_LONGEST_NAP_SECONDS = 1.0


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
    ):
        self._authenticator = authenticator
        self._limiter = limiter
        self._clock = clock
        self._recorder = recorder
        self._draining = draining

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
        @raise ShuttingDown: the service takes no more events.
        """
        client = await self._authenticator.authenticate(request)
        if client.name is not None:
            request.facts["client"] = client.name
            request.span.set({"ai_ticket.client": client.name})
        if self.draining:
            raise self.shutting_down()
        return client

    async def admit(self, request: Request) -> Client:
        """Who sent the request, which counts as one call. The answer, whatever it will be, tells how many are left.

        @raise DomainError: as `identify`. @raise RateLimited: the client's quota is used up.
        """
        client = await self.identify(request)
        if self._limiter is not None:
            admission = await self._limiter.admit(client.quota)
            quota = Quota(self._limiter.limit, self._limiter.window, admission.remaining)
            if not admission.admitted:
                self._recorder.rate_limited("quota")
                raise RateLimited(
                    f"at most {quota.limit} events in {quota.window:g} s",
                    retry_after=admission.retry_after,
                    quota=quota,
                )
            request.common_headers += quota_headers(quota, admission.retry_after)
        return client

    async def quota(self, client: Client) -> None:
        """Wait until one more event of the client may go on, and count it; or until the service takes no more."""
        if self._limiter is None:
            return
        while not self.draining:
            admission = await self._limiter.admit(client.quota)
            if admission.admitted:
                return
            await deferLater(self._clock, min(admission.retry_after, _LONGEST_NAP_SECONDS))
