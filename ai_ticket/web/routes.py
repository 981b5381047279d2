"""What each path does."""

import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from msgspec import Struct
from twisted.internet.interfaces import IReactorTime

from ai_ticket.errors import DomainError
from ai_ticket.event import Completion, Event, EventLimits, parse_event
from ai_ticket.interfaces import BackendState, Client, Job, Pipeline
from ai_ticket.spans import Span
from ai_ticket.web.answers import answer_fields, facts, server_timing
from ai_ticket.web.batch import Batch, BatchRules, Sampling
from ai_ticket.web.batch_input import Element, array_elements, lines
from ai_ticket.web.batch_output import ArrayOutput, LinesOutput
from ai_ticket.web.budget import BodyBudget
from ai_ticket.web.faults import LengthRequired, PayloadTooLarge, UnsupportedMediaType
from ai_ticket.web.gate import Gate
from ai_ticket.web.request import Request, Response
from ai_ticket.web.site import Route, json_response
from ai_ticket.web.streaming import EventStream, Streamed

JSON = b"application/json"
NDJSON = b"application/x-ndjson"

_NOT_WANTED = re.compile(rb"(?:^|;)\s*q\s*=\s*0(?:\.0*)?\s*(?:;|$)")

BATCHES, BATCHES_EACH = 16, 4
"""Batches of the largest size that may be held at a time as one body, in all and of one client."""


class BodyLimits(Struct, frozen=True):
    """Sizes in bytes, of an event's body and of a batch's as a JSON array, and how many events that may have."""

    event: int
    batch: int
    batch_events: int


class EventRoutes:
    """`POST /event` and `POST /events`."""

    def __init__(
        self,
        *,
        gate: Gate,
        pipeline: Pipeline,
        clock: IReactorTime,
        limits: EventLimits,
        bodies: BodyLimits,
        request_timeout: float,
        sampling: Sampling,
    ):
        self._gate = gate
        self._pipeline = pipeline
        self._clock = clock
        self._limits = limits
        self._bodies = bodies
        self._request_timeout = request_timeout
        self._sampling = sampling
        self._budget = BodyBudget(BATCHES * bodies.batch, BATCHES_EACH * bodies.batch)

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route("/event", {"POST": self.post_event}, traced=True),
            Route("/events", {"POST": self.post_events}, traced=True),
        ]

    async def post_event(self, request: Request) -> Response | Streamed:
        """One event in, one completion out, whole or in pieces. What the head tells is refused before the body."""
        client = await self._gate.admit(request)
        _require_type(request, JSON)
        _require_size(request, self._bodies.event)
        deadline = request.arrived + self._request_timeout
        self._pipeline.check_room(client, deadline)
        begun = self._clock.seconds()
        body = await request.read_body(self._bodies.event)
        request.elsewhere = self._clock.seconds() - begun
        with self._sampling(request.id, "/event", body) as failed:
            answer = await self._complete(request, client, body, deadline)
            if isinstance(answer, Streamed) and answer.error is not None:
                failed(answer.error)
        return answer

    async def _complete(self, request: Request, client: Client, body: bytes, deadline: float) -> Response | Streamed:
        event = parse_event(body, self._limits)
        _describe(request.span, event)
        job = Job(event=event, client=client, timeout=self._request_timeout, deadline=deadline, span=request.span)
        outcome: Completion | DomainError | None = None
        try:
            if event.stream:
                streamed = await EventStream(request, self._clock, job, self._pipeline).answer()
                outcome = streamed.outcome
                return streamed
            outcome = await self._pipeline.submit(job)
        except DomainError as error:
            outcome = error
            raise
        finally:
            now = self._clock.seconds()
            request.elsewhere = (request.elsewhere or 0.0) + job.queue_seconds(now) + job.backend_seconds(now)
            request.facts |= facts(job, outcome, now)
            if not request.responded:
                request.common_headers.append(server_timing(job, now))
        return json_response(answer_fields(outcome, event, request.id))

    async def post_events(self, request: Request) -> Response | Streamed:
        """Many events in, a result for each out. Each counts and waits by itself; only what is no batch is refused."""
        client = await self._gate.identify(request)
        in_lines = _require_type(request, JSON, NDJSON) == NDJSON
        _require_size(request, None if in_lines else self._bodies.batch)
        batch = Batch(
            request,
            client,
            LinesOutput() if _accepts_lines(request) else ArrayOutput(),
            gate=self._gate,
            pipeline=self._pipeline,
            clock=self._clock,
            rules=BatchRules(self._limits, self._request_timeout, self._bodies.event, self._sampling),
        )
        with self._gate.batch(client):
            if in_lines:
                request.invite_body()
                return await batch.answer(lines(request.read_some, request.renew_body_time, self._bodies.event))
            size = request.content_length
            with self._budget.holding(client.key, self._bodies.batch if size is None else size):
                return await batch.answer(await self._elements(request, client))

    async def _elements(self, request: Request, client: Client) -> AsyncIterator[Element]:
        """What is in a JSON array. A body that holds no event counts as one all the same."""
        body = await request.read_body(self._bodies.batch)
        try:
            elements = array_elements(body, self._bodies.batch_events)
        except DomainError:
            await self._gate.quota(client)
            raise
        if not elements:
            await self._gate.quota(client)
        return _each(deque(elements))


def _describe(span: Span, event: Event) -> None:
    if span.recording and event.metadata is not None:
        span.set({f"ai_ticket.metadata.{name}": value for name, value in event.metadata.items()})


async def _each(elements: deque[Element]) -> AsyncIterator[Element]:
    while elements:
        yield elements.popleft()


def _require_size(request: Request, limit: int | None) -> None:
    size = request.content_length
    if size is None and request.version != "2" and b"transfer-encoding" not in request.headers:
        raise LengthRequired
    if limit is not None and size is not None and size > limit:
        raise PayloadTooLarge(f"the body is larger than {limit} bytes")


def _require_type(request: Request, *allowed: bytes) -> bytes:
    media_type = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type not in allowed:
        raise UnsupportedMediaType(message=f"The Content-Type must be {b' or '.join(allowed).decode()}.")
    return media_type


def _accepts_lines(request: Request) -> bool:
    ranges = request.headers.get(b"accept", b"").lower().split(b",")
    for each in ranges:
        media_type, _, parameters = each.partition(b";")
        if media_type.strip() == NDJSON and not _NOT_WANTED.search(parameters):
            return True
    return False


class HealthRoutes:
    """`/health`, `/health/live`, `/health/ready`: from memory, for anyone."""

    def __init__(
        self,
        backends: Callable[[], list[BackendState]],
        draining: Callable[[], bool],
        overload: Callable[[], str | None],
    ):
        """@param overload: why no events should be sent here for the moment, in a word; None: they may be."""
        self._backends = backends
        self._draining = draining
        self._overload = overload

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route("/health", {"GET": self.get_health}),
            Route("/health/live", {"GET": self.get_live}),
            Route("/health/ready", {"GET": self.get_ready}),
        ]

    async def get_health(self, request: Request) -> Response:
        """How the service and its backends are."""
        states = self._backends()
        status = "healthy" if all(state.up for state in states) and self._overload() is None else "degraded"
        report = {
            "status": "draining" if self._draining() else status,
            "shutdown_initiated": self._draining(),
            "backends": {state.name: _public(state) for state in states},
        }
        return json_response(report, 503 if self._draining() else 200)

    async def get_live(self, request: Request) -> Response:
        """The process is alive: it answers."""
        return json_response({"status": "alive"})

    async def get_ready(self, request: Request) -> Response:
        """Whether events should be sent here."""
        if self._draining():
            return json_response({"status": "draining"}, 503)
        if not any(state.up for state in self._backends()):
            return json_response({"status": "no usable backend"}, 503)
        overload = self._overload()
        if overload is not None:
            return json_response({"status": "overloaded", "reason": overload}, 503)
        return json_response({"status": "ready"})


def _public(state: BackendState) -> dict[str, Any]:
    fields = msgspec.to_builtins(state)
    return {
        "status": "up" if fields.pop("up") else "down",
        **{name: value for name, value in fields.items() if name != "name" and value is not None},
    }


def metrics_route(render: Callable[[str], tuple[bytes, str]]) -> Route:
    """`/metrics`. `render` gives the text and its type for an Accept header."""

    async def get_metrics(request: Request) -> Response:
        text, content_type = render(request.headers.get(b"accept", b"").decode("latin-1"))
        return Response(200, text, content_type.encode())

    return Route("/metrics", {"GET": get_metrics})
