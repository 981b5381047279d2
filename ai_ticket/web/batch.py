"""`POST /events`: many events in one request, each of which succeeds or fails alone (contract, "A batch")."""

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
from ai_ticket.web.faults import error_object, retry_after_seconds, status_of
from ai_ticket.web.gate import Gate
from ai_ticket.web.request import Request, Response
from ai_ticket.web.streaming import Streamed

MAX_HELD_BYTES = 4_194_304
"""Results of a batch that wait for an earlier one, before no further events are begun."""

_TURN_EVENTS = 16
_TURN_BYTES = 65_536
"""What is read of a batch in one turn of the reactor, at the most."""


Sampling = Callable[[str, str, bytes], AbstractContextManager[Callable[[str], None]]]
"""Samples the payload of what is done within: a request's id, its route, the payload (see `telemetry.payloads`)."""


class BatchRules(Struct, frozen=True):
    """What holds for every event of a batch. `timeout` in seconds, from when its turn comes."""

    limits: EventLimits
    timeout: float
    sampling: Sampling


@implementer(IPushProducer)
class Batch:
    """One batch under way: begins its events as there is room, and sends each result.

    No more events are offered to the pipeline than it works on at a time, and none while the caller does not take the
    results: so neither the queue nor the memory fills, however long the batch is.
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
        self._running: set[Deferred[None]] = set()
        self._lags = False
        self._change: Deferred[None] | None = None

    async def answer(self, elements: AsyncIterator[Element], total: int | None) -> Streamed:
        """Answer every element; `total` is their number where it is known.

        When the service is cut short, what has not ended is answered `shutting_down`. Where it can't be known how much
        that is, the answer is cut, so that the caller can tell.
        """
        head = Response(200, b"", self._output.content_type, ((b"x-accel-buffering", b"no"),))
        self._request.start(head, self)
        error = None
        try:
            await self._begin_all(elements)
            while self._running:
                await self._changed()
        except CancelledError:
            error = self._gate.shutting_down()
            for event in list(self._running):
                event.cancel()
            if total is None:
                self._request.abort()
            else:
                for index in range(self._begun, total):
                    self._send(index, self._error(error))
        except Exception:
            for event in list(self._running):
                event.cancel()
            self._request.abort()
            raise
        self._request.facts["events"] = self._begun
        self._request.write(self._output.end())
        self._request.finish()
        return Streamed(200, error)

    async def _begin_all(self, elements: AsyncIterator[Element]) -> None:
        read = 0
        async for element in elements:
            while not self._has_room():
                await self._changed()
            await self._gate.quota(self._client)
            self._begin(element)
            read += 1 if isinstance(element.text, DomainError) else 1 + len(element.text) * _TURN_EVENTS // _TURN_BYTES
            if read >= _TURN_EVENTS:
                read = 0
                await deferLater(self._clock, 0)

    def _has_room(self) -> bool:
        return (
            not self._lags
            and len(self._running) < self._pipeline.max_concurrency
            and self._output.held < MAX_HELD_BYTES
        )

    def _begin(self, element: Element) -> None:
        index, self._begun = self._begun, self._begun + 1
        event = Deferred.fromCoroutine(self._answer_one(index, element))
        if not event.called:
            self._running.add(event)
        event.addBoth(self._ended, event)

    def _ended(self, result: Any, event: Deferred[None]) -> None:
        self._running.discard(event)
        self._signal()

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
            self._request.write(piece)

    async def _complete(self, element: Element) -> dict[str, Any]:
        if self._gate.draining:
            raise self._gate.shutting_down()
        if isinstance(element.text, DomainError):
            raise element.text
        with self._rules.sampling(self._request.id, "/events", element.text):
            return await self._submit(element.text, element.marked)

    async def _submit(self, text: bytes, marked: bool) -> dict[str, Any]:
        event = parse_event(text, self._rules.limits, marked=marked)
        if event.stream:
            raise InvalidParameter("stream must be false or absent in a batch")
        job = Job(event=event, client=self._client, timeout=self._rules.timeout, batch=True, span=self._request.span)
        completion = await self._pipeline.submit(job)
        return {"status": 200, **answer_fields(completion, event, self._request.id)}

    def _error(self, error: DomainError) -> dict[str, Any]:
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
