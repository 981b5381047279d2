"""Answers in pieces: server-sent events, from tokens as they come (contract, "The answer")."""

from typing import Protocol

import msgspec
from msgspec import Struct
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from ai_ticket.errors import DomainError, InternalError, ShuttingDown
from ai_ticket.event import Completion, Event, FinishReason, Usage
from ai_ticket.interfaces import Job, Pipeline
from ai_ticket.web.answers import server_timing
from ai_ticket.web.faults import error_object
from ai_ticket.web.request import Request, Response

KEEP_ALIVE_SECONDS = 10.0
_HEAD = Response(200, b"", b"text/event-stream", ((b"x-accel-buffering", b"no"),))


class _Delta(Struct, gc=False):
    delta: str
    done: bool


class _End(Struct, omit_defaults=True):
    delta: str
    done: bool
    finish_reason: FinishReason
    usage: Usage | None
    model: str
    request_id: str
    metadata: dict[str, str] | msgspec.UnsetType = msgspec.UNSET


class Framing(Protocol):
    """How the pieces of an answer look to callers of one kind."""

    def text(self, text: str) -> bytes:
        """Some text. Of an event that asks for OpenAI's chunks none comes: those are ready to be sent."""

    def end(self, completion: Completion) -> bytes:
        """The end of an answer that is complete."""

    def error(self, error: DomainError) -> bytes:
        """The end of one that failed."""


class EventFraming:
    """As callers of `POST /event` have it."""

    def __init__(self, event: Event, request: Request):
        self._event = event
        self._request = request

    def text(self, text: str) -> bytes:
        """Some text."""
        return b"data: " + msgspec.json.encode(_Delta(text, False)) + b"\n\n"

    def end(self, completion: Completion) -> bytes:
        """The end of an answer that is complete."""
        end = _End(
            delta="",
            done=True,
            finish_reason=completion.finish_reason,
            usage=completion.usage,
            model=completion.model,
            request_id=self._request.id,
            metadata=self._event.metadata if self._event.metadata is not None else msgspec.UNSET,
        )
        return b"data: " + msgspec.json.encode(end) + b"\n\n"

    def error(self, error: DomainError) -> bytes:
        """The end of one that failed."""
        return b"event: error\ndata: " + msgspec.json.encode(error_object(error, self._request.id)) + b"\n\n"


class Streamed(Struct, frozen=True):
    """What became of an answer in pieces: its status, and the completion or the error that it ended with."""

    status: int
    outcome: Completion | DomainError | None = None

    @property
    def error(self) -> str | None:
        """The code of the error."""
        return self.outcome.code if isinstance(self.outcome, DomainError) else None


@implementer(IPushProducer)
class AnswerStream:
    """The caller's end of a streamed answer: a `Sink` that slows the model server down while the caller lags.

    Nothing is sent before the first text, or the first sign of life after 10 s of waiting; so a failure until then can
    still be an answer with a status of its own.
    """

    _log = Logger()

    def __init__(self, request: Request, clock: IReactorTime, job: Job, pipeline: Pipeline, framing: Framing):
        self._request = request
        self._clock = clock
        self._job = job
        self._pipeline = pipeline
        self._framing = framing
        self._upstream: IPushProducer | None = None
        self._lags = False
        self._sign_of_life: IDelayedCall | None = clock.callLater(KEEP_ALIVE_SECONDS, self._keep_alive)

    async def answer(self) -> Streamed:
        """Have the job done, stream what comes of it, and then how it ended.

        @raise DomainError: it failed before anything was sent.
        """
        self._job.sink = self
        try:
            completion = await self._pipeline.submit(self._job)
        except CancelledError:
            if self._request.lost or not self._request.streaming:
                raise
            return self._fail(ShuttingDown())
        except DomainError as error:
            if not self._request.streaming:
                raise
            return self._fail(error)
        except Exception:
            if not self._request.streaming:
                raise
            self._log.failure("a streamed answer failed", request_id=self._request.id)
            return self._fail(InternalError())
        finally:
            self._stop_waiting()
        self._start()
        self._request.write(self._framing.end(completion))
        self._request.finish()
        return Streamed(200, completion)

    # The sink.

    def write(self, text: str) -> None:
        """Some text has come."""
        self._stop_waiting()
        self._start()
        self._request.write(self._framing.text(text))

    def relay(self, chunks: bytes) -> None:
        """Some chunks have come."""
        self._stop_waiting()
        self._start()
        self._request.write(chunks)

    def attach(self, producer: IPushProducer) -> None:
        """From here the text comes."""
        self._upstream = producer
        if self._lags:
            producer.pauseProducing()

    # What the caller's connection asks for.

    def pauseProducing(self) -> None:
        """The caller lags."""
        self._lags = True
        if self._upstream is not None:
            self._upstream.pauseProducing()

    def resumeProducing(self) -> None:
        """The caller has caught up."""
        self._lags = False
        if self._upstream is not None:
            self._upstream.resumeProducing()

    def stopProducing(self) -> None:
        """The caller is gone; the request says so too."""

    def _start(self) -> None:
        if not self._request.responded and not self._request.lost:
            self._request.common_headers.append(server_timing(self._job, self._clock.seconds()))
            self._request.start(_HEAD, self)

    def _keep_alive(self) -> None:
        self._start()
        position = self._pipeline.position(self._job)
        place = b"" if position is None else b" position=%d" % position
        self._request.write(b": keep-alive%b\n\n" % place)
        self._sign_of_life = self._clock.callLater(KEEP_ALIVE_SECONDS, self._keep_alive)

    def _stop_waiting(self) -> None:
        if self._sign_of_life is not None:
            self._sign_of_life.cancel()
            self._sign_of_life = None

    def _fail(self, error: DomainError) -> Streamed:
        """Tell of the error within the stream, and end it; a caller who does not read would not take that either."""
        self._request.write(self._framing.error(error))
        if self._lags:
            self._request.abort()
        else:
            self._request.finish()
        return Streamed(200, error)
