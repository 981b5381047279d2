"""The one way from a request for a completion to its answer, whatever the callers of a path speak."""

from typing import Protocol

from twisted.internet.interfaces import IReactorTime

from ai_ticket.errors import DomainError
from ai_ticket.event import Completion, Event
from ai_ticket.interfaces import Job, Pipeline
from ai_ticket.web.answers import facts, server_timing
from ai_ticket.web.auth import credentials
from ai_ticket.web.batch import Sampling
from ai_ticket.web.faults import LengthRequired, PayloadTooLarge, UnsupportedMediaType
from ai_ticket.web.gate import Gate
from ai_ticket.web.request import Request, Response
from ai_ticket.web.streaming import AnswerStream, Framing, Streamed

JSON = b"application/json"


class Form(Protocol):
    """How the callers of a path ask, and how they are answered."""

    @property
    def path(self) -> str:
        """The path."""

    def read(self, body: bytes, request: Request) -> Event:
        """What a request asks for.

        @raise DomainError: it can't be told.
        """

    def whole(self, completion: Completion, event: Event, request: Request) -> Response:
        """The answer in one piece."""

    def framing(self, event: Event, request: Request) -> Framing:
        """How the pieces of an answer look."""


class Intake:
    """Lets requests in, has their events answered, and tells of it: one rule here is a rule for every surface."""

    def __init__(
        self,
        *,
        gate: Gate,
        pipeline: Pipeline,
        clock: IReactorTime,
        max_body: int,
        request_timeout: float,
        sampling: Sampling,
    ):
        """@param max_body: the size of a body in bytes. @param request_timeout: in seconds."""
        self.gate = gate
        self.pipeline = pipeline
        self.clock = clock
        self.max_body = max_body
        self.request_timeout = request_timeout
        self.sampling = sampling

    async def answer(self, request: Request, form: Form) -> Response | Streamed:
        """One request in, one completion out, whole or in pieces. What the head tells is refused before the body.

        @raise DomainError: it is refused, or failed before anything was sent.
        """
        client = await self.gate.admit(request)
        require_type(request, JSON)
        require_size(request, self.max_body)
        deadline = request.arrived + self.request_timeout
        await self.pipeline.check_room(client, deadline)
        begun = self.clock.seconds()
        body = await request.read_body(self.max_body)
        request.elsewhere = self.clock.seconds() - begun
        with self.sampling(request.id, form.path, body) as failed:
            event = form.read(body, request)
            _describe(request, event)
            job = Job(event=event, client=client, timeout=self.request_timeout, deadline=deadline, span=request.span)
            answer = await self._complete(request, job, form)
            if isinstance(answer, Streamed) and answer.error is not None:
                failed(answer.error)
        return answer

    async def _complete(self, request: Request, job: Job, form: Form) -> Response | Streamed:
        outcome: Completion | DomainError | None = None
        try:
            if job.event.stream:
                framing = form.framing(job.event, request)
                streamed = await AnswerStream(request, self.clock, job, self.pipeline, framing).answer()
                outcome = streamed.outcome
                return streamed
            outcome = await self.pipeline.submit(job)
        except DomainError as error:
            outcome = error
            raise
        finally:
            now = self.clock.seconds()
            request.elsewhere = (request.elsewhere or 0.0) + job.queue_seconds(now) + job.backend_seconds(now)
            request.facts |= facts(job, outcome, now)
            if not request.responded:
                request.common_headers.append(server_timing(job, now))
        return form.whole(outcome, job.event, request)


def _describe(request: Request, event: Event) -> None:
    """Put the metadata on the span, but what has a token in it that the caller has sent as one, too."""
    if not request.span.recording or event.metadata is None:
        return
    tokens = [word.decode("latin-1") for word in credentials(request.headers) if word and word.lower() != b"bearer"]
    request.span.set(
        {
            f"ai_ticket.metadata.{name}": value
            for name, value in event.metadata.items()
            if not any(token in name or token in value for token in tokens)
        }
    )


def require_size(request: Request, limit: int | None) -> None:
    """Refuse a body whose announced size is over the limit, or that may have none.

    @raise LengthRequired, PayloadTooLarge: as they say.
    """
    size = request.content_length
    if size is None and request.version != "2" and b"transfer-encoding" not in request.headers:
        raise LengthRequired
    if limit is not None and size is not None and size > limit:
        raise PayloadTooLarge(f"the body is larger than {limit} bytes")


def require_type(request: Request, *allowed: bytes) -> bytes:
    """The media type of a body.

    @raise UnsupportedMediaType: it is none of those allowed.
    """
    media_type = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type not in allowed:
        raise UnsupportedMediaType(message=f"The Content-Type must be {b' or '.join(allowed).decode()}.")
    return media_type
