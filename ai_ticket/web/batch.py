"""`POST /events`: many events in one request, each of which succeeds or fails alone (contract, "A batch")."""

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

import msgspec
from msgspec import Struct
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from ai_ticket.errors import DomainError, InternalError, InvalidParameter
from ai_ticket.event import EventLimits, parse_event
from ai_ticket.interfaces import Client, Job, Pipeline
from ai_ticket.web.answers import answer_fields
from ai_ticket.web.batch_input import Element
from ai_ticket.web.batch_output import BatchOutput
from ai_ticket.web.faults import PayloadTooLarge, error_object, retry_after_seconds, status_of
from ai_ticket.web.gate import Gate
from ai_ticket.web.request import Request, Response
from ai_ticket.web.streaming import KEEP_ALIVE_SECONDS, Streamed

MAX_HELD_BYTES = 4_194_304
"""Results of a batch that wait for an earlier one, before no further events are begun."""

_TURN_EVENTS = 16
_TURN_BYTES = 65_536
"""What is read of a batch in one turn of the reactor, at the most."""


Sampling = Callable[[str, str, bytes], AbstractContextManager[Callable[[str], None]]]
"""Samples the payload of what is done within: a request's id, its route, the payload (see `telemetry.payloads`)."""


class BatchRules(Struct, frozen=True):
    """What holds for every event of a batch: `timeout` in seconds, from when its turn comes.

    Events of no more than `size` bytes together are under way at a time, or a single one.
    """

    limits: EventLimits
    timeout: float
    size: int
    sampling: Sampling


@implementer(IPushProducer)
class Batch:
    """One batch under way: begins its events as there is room, and sends each result.

    No more events are offered to the pipeline than keep it busy, and none while the caller does not take the results:
    so neither the queue nor the memory fills, however long the batch is.
    """

    _log = Logger()

    def __init__(
        self,
        request: Request,
        client: Client,
        output: BatchOutput,
        *,
        gate: Gate,
        pipeline: Pipeline,
        clock: IReactorTime,
        rules: BatchRules,
    ):
        self._request = request
        self._client = client
        self._output = output
        self._gate = gate
        self._pipeline = pipeline
        self._clock = clock
        self._rules = rules
        self._begun = 0
        self._running: dict[Deferred[None], int] = {}
        self._size = 0
        self._next: Element | None = None
        self._errors: Counter[str] = Counter()
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0}
        self._lags = False
        self._change: Deferred[None] | None = None

    async def answer(self, elements: AsyncIterator[Element]) -> Streamed:
        """Answer every element.

        When the service is cut short, what has come and has not ended is answered `shutting_down`. If more was to come,
        the answer is cut, so that the caller can tell.
        """
        head = Response(200, b"", self._output.content_type, ((b"x-accel-buffering", b"no"),))
        self._request.start(head, self)
        self._sign_of_life = self._clock.callLater(KEEP_ALIVE_SECONDS, self._keep_alive)
        error = None
        try:
            await self._begin_all(elements)
            while self._running:
                await self._changed()
        except CancelledError:
            error = self._gate.shutting_down()
            self._cancel_all()
            await self._refuse_rest(elements, error)
        except Exception:
            self._cancel_all()
            self._request.abort()
            raise
        finally:
            self._sign_of_life.cancel()
        self._request.facts |= {"events": self._begun, "errors": dict(self._errors), **self._usage}
        self._request.span.set({"ai_ticket.batch.events": self._begun, "ai_ticket.batch.failed": self._errors.total()})
        self._write(self._output.end())
        self._request.finish()
        return Streamed(200, error)

    async def _begin_all(self, elements: AsyncIterator[Element]) -> None:
        read = 0
        async for element in elements:
            self._next = element
            while not self._has_room(element):
                await self._changed()
            await self._gate.quota(self._client)
            self._next = None
            self._begin(element)
            read += 1 + element.size * _TURN_EVENTS // _TURN_BYTES
            if read >= _TURN_EVENTS:
                read = 0
                await deferLater(self._clock, 0)

    def _has_room(self, element: Element) -> bool:
        if self._lags or self._output.held >= MAX_HELD_BYTES:
            return False
        fits = self._size + element.size <= self._rules.size
        return not self._running or (fits and len(self._running) < self._pipeline.batch_window)

    def _begin(self, element: Element) -> None:
        index, self._begun = self._begun, self._begun + 1
        event = Deferred.fromCoroutine(self._answer_one(index, element))
        if not event.called:
            self._running[event] = element.size
            self._size += element.size
        event.addBoth(self._ended, event)

    def _ended(self, result: Any, event: Deferred[None]) -> None:
        self._size -= self._running.pop(event, 0)
        self._signal()

    def _cancel_all(self) -> None:
        for event in list(self._running):
            event.cancel()

    async def _refuse_rest(self, elements: AsyncIterator[Element], error: DomainError) -> None:
        if self._request.lost or not self._request.body.ended:
            self._request.abort()
            return
        left = [] if self._next is None else [self._next]
        left += [element async for element in elements]
        for _ in left:
            self._send(self._begun, self._error(error))
            self._begun += 1

    async def _answer_one(self, index: int, element: Element) -> None:
        try:
            result = await self._complete(element)
        except DomainError as error:
            result = self._error(error)
        except CancelledError:
            result = self._error(self._gate.shutting_down())
        except Exception:
            self._log.failure("an event of a batch failed", request_id=self._request.id, index=index)
            result = self._error(InternalError())
        self._send(index, result)

    def _send(self, index: int, result: dict[str, Any]) -> None:
        for piece in self._output.add(index, msgspec.json.encode({"index": index, **result})):
            self._write(piece)

    def _write(self, piece: bytes) -> None:
        self._request.write(piece)
        if self._sign_of_life.active():
            self._sign_of_life.reset(KEEP_ALIVE_SECONDS)

    def _keep_alive(self) -> None:
        """Send a blank line, nothing in either form: it shows the caller that we live, and us if it is gone."""
        self._request.write(b"\n")
        self._sign_of_life = self._clock.callLater(KEEP_ALIVE_SECONDS, self._keep_alive)

    async def _complete(self, element: Element) -> dict[str, Any]:
        if self._gate.draining:
            raise self._gate.shutting_down()
        if isinstance(element.text, DomainError):
            raise element.text
        if element.size > self._rules.size:
            raise PayloadTooLarge(f"the event is larger than {self._rules.size} bytes")
        with self._rules.sampling(self._request.id, "/events", element.text):
            return await self._submit(element.text, element.marked)

    async def _submit(self, text: bytes, marked: bool) -> dict[str, Any]:
        event = parse_event(text, self._rules.limits, marked=marked)
        if event.stream:
            raise InvalidParameter("stream must be false or absent in a batch")
        job = Job(event=event, client=self._client, timeout=self._rules.timeout, batch=True, span=self._request.span)
        completion = await self._pipeline.submit(job)
        if completion.usage is not None:
            self._usage["prompt_tokens"] += completion.usage.prompt_tokens
            self._usage["completion_tokens"] += completion.usage.completion_tokens
        return {"status": 200, **answer_fields(completion, event, self._request.id)}

    def _error(self, error: DomainError) -> dict[str, Any]:
        self._errors[error.code] += 1
        found: dict[str, Any] = {"status": status_of(error), **error_object(error, self._request.id)}
        if error.retry_after is not None:
            found["retry_after"] = retry_after_seconds(error.retry_after)
        return found

    # Waiting for something to change: an event that ends, or the caller who takes results again.

    async def _changed(self) -> None:
        self._change = Deferred()
        await self._change

    def _signal(self) -> None:
        if self._change is not None and not self._change.called:
            change, self._change = self._change, None
            change.callback(None)

    def pauseProducing(self) -> None:
        """The caller lags."""
        self._lags = True

    def resumeProducing(self) -> None:
        """The caller has caught up."""
        self._lags = False
        self._signal()

    def stopProducing(self) -> None:
        """The caller is gone; the request says so too."""
