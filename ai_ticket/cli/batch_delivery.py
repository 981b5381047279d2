"""How one event of a batch gets its answer: when it is sent, put off, sent again, and given up."""

import math
from collections.abc import Awaitable, Callable

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from ai_ticket.cli.body import Fields
from ai_ticket.cli.http import Answer
from ai_ticket.cli.outcome import CommandError

Post = Callable[[bytes], Awaitable[Answer]]
"""Sends one line, and gives the service's answer or raises CommandError."""

_PUT_OFF = frozenset({429, 503})
_TRY_AGAIN = frozenset({502, 504})
_OF_THIS_EVENT = frozenset({400, 413, 422})
"""Refusals that say something of what was sent, where all others below 500 would meet every event."""
_UNREACHED = {"unreachable": 503, "tls_error": 503, "stream_cut": 503, "timeout": 504}
"""What went wrong on the way, and the status of a gateway that it happened to."""


def back_off(attempt: int, jitter: float) -> float:
    """Seconds to wait after the n-th attempt that failed: 1, 2, 4 ... 64, and up to half of that more.

    @param jitter: from 0 to 1.
    """
    seconds: float = 2 ** min(attempt - 1, 6)
    return seconds * (1 + jitter / 2)


class Gate:
    """Lets events go to the service, unless it has asked to wait: then they wait together, and none goes on trying."""

    def __init__(self, clock: IReactorTime, random: Callable[[], float]):
        self._clock = clock
        self._random = random
        self._opens_at = -math.inf
        self._pauses = 0
        self._pauses_in_a_row = 0
        self.reason = ""

    @property
    def closed_for(self) -> float:
        """Seconds until it opens; 0 if it is open."""
        return max(0.0, self._opens_at - self._clock.seconds())

    async def passed(self) -> int:
        """Wait until it is open; gives how often it was closed so far, which `close` asks for."""
        while seconds := self.closed_for:
            await deferLater(self._clock, seconds)
        return self._pauses

    def close(self, seen: int, retry_after: float | None, reason: str) -> float:
        """The service has asked an event to wait, `retry_after` seconds if it said so; gives for how long.

        @param seen: how often the gate had been closed when that event was sent.
        """
        if seen == self._pauses:  # else it is one more of those that were sent before the last pause
            self._pauses += 1
            self._pauses_in_a_row += 1
        delay = back_off(self._pauses_in_a_row, self._random()) if retry_after is None else max(1.0, retry_after)
        self._opens_at = max(self._opens_at, self._clock.seconds() + delay)
        self.reason = reason
        return delay

    def service_works(self) -> None:
        """It has answered an event, well or not."""
        self._pauses_in_a_row = 0


class Delivery:
    """Gets events their answers.

    @param max_wait: for how many seconds an event is put off, at the most.
    @param retries: how often one is sent again whose model server has failed.
    """

    def __init__(
        self,
        clock: IReactorTime,
        post: Post,
        gate: Gate,
        random: Callable[[], float],
        *,
        max_wait: float,
        retries: int,
    ):
        self._clock = clock
        self._post = post
        self._gate = gate
        self._random = random
        self._max_wait = max_wait
        self._retries = retries
        self._stopped = False

    def stop(self) -> None:
        """From here on no event gets an answer: a request that is cancelled looks like a connection that broke."""
        self._stopped = True

    async def answer(self, event: bytes) -> Fields:
        """Send an event until it has an answer, which may be an error; with its `status`.

        @raise CommandError: no event would get one. @raise CancelledError: it was stopped.
        """
        put_off_at: float | None = None
        retries = 0
        while True:
            seen = await self._gate.passed()
            result = await self._attempt(event)
            status = result["status"]
            if status in _PUT_OFF:
                now = self._clock.seconds()
                put_off_at = now if put_off_at is None else put_off_at
                delay = self._gate.close(seen, _retry_after(result), str(result.get("message")))
                if now + delay - put_off_at > self._max_wait:
                    return result
                continue
            self._gate.service_works()
            if status not in _TRY_AGAIN or retries == self._retries:
                return result
            retries += 1
            await deferLater(self._clock, back_off(retries, self._random()))

    async def _attempt(self, event: bytes) -> Fields:
        if self._stopped:
            raise CancelledError
        try:
            answer = await self._post(event + b"\n")
        except CommandError as error:
            if self._stopped:
                raise CancelledError
            return _without_answer(error)
        if answer.status == 200:
            status = answer.fields.get("status")
            if type(status) is not int:
                raise CommandError("not_the_service", "The service's answer to an event has no status.")
            return answer.fields
        refusal = answer.error()
        if _meets_every_event(answer.status):
            raise refusal
        return {"status": answer.status} | answer.fields | _waiting_time(refusal)


def error_result(status: int, code: str, message: str, details: str | None = None) -> Fields:
    """An error in the shape of the service's own."""
    return {"status": status, "error": code, "message": message, "details": details, "request_id": None}


def _without_answer(error: CommandError) -> Fields:
    """What becomes of an event that got no answer of the service.

    @raise CommandError: the same would become of every other.
    """
    status = error.http_status or _UNREACHED.get(error.code)
    if status is None or _meets_every_event(status):
        raise error
    result = error_result(status, error.code, error.message, error.details)
    return result | {"request_id": error.request_id} | _waiting_time(error)


def _meets_every_event(status: int) -> bool:
    return status < 500 and status not in _PUT_OFF | _OF_THIS_EVENT


def _waiting_time(error: CommandError) -> Fields:
    return {} if error.retry_after is None else {"retry_after": error.retry_after}


def _retry_after(result: Fields) -> float | None:
    value = result.get("retry_after")
    return value if isinstance(value, int | float) and math.isfinite(value) else None
