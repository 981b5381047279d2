"""What each path does."""

import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Struct

from ai_ticket.errors import DomainError
from ai_ticket.event import Completion, Event, EventLimits, parse_event
from ai_ticket.interfaces import BackendState, Client
from ai_ticket.web.answers import answer_fields
from ai_ticket.web.batch import Batch, BatchRules
from ai_ticket.web.batch_input import Element, array_elements, lines
from ai_ticket.web.batch_output import ArrayOutput, LinesOutput
from ai_ticket.web.budget import BodyBudget
from ai_ticket.web.intake import JSON, Intake, require_size, require_type
from ai_ticket.web.request import Request, Response
from ai_ticket.web.site import Route, json_response
from ai_ticket.web.streaming import EventFraming, Streamed

NDJSON = b"application/x-ndjson"

_NOT_WANTED = re.compile(rb"(?:^|;)\s*q\s*=\s*0(?:\.0*)?\s*(?:;|$)")

BATCHES, BATCHES_EACH = 16, 4
"""Batches of the largest size that may be held at a time as one body, in all and of one client."""


class BodyLimits(Struct, frozen=True):
    """The size in bytes of a batch that is a JSON array, and how many events that may have."""

    batch: int
    batch_events: int


class EventForm:
    """How `POST /event` is asked and answers."""

    path = "/event"

    def __init__(self, limits: EventLimits):
        self._limits = limits

    def read(self, body: bytes, request: Request) -> Event:
        """What a request asks for."""
        return parse_event(body, self._limits)

    def whole(self, completion: Completion, event: Event, request: Request) -> Response:
        """The answer in one piece."""
        return json_response(answer_fields(completion, event, request.id))

    def framing(self, event: Event, request: Request) -> EventFraming:
        """How the pieces of an answer look."""
        return EventFraming(event, request)


class EventRoutes:
    """`POST /event` and `POST /events`."""

    def __init__(self, intake: Intake, *, limits: EventLimits, bodies: BodyLimits):
        self._intake = intake
        self._form = EventForm(limits)
        self._limits = limits
        self._bodies = bodies
        self._budget = BodyBudget(BATCHES * bodies.batch, BATCHES_EACH * bodies.batch)

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route("/event", {"POST": self.post_event}, traced=True),
            Route("/events", {"POST": self.post_events}, traced=True),
        ]

    async def post_event(self, request: Request) -> Response | Streamed:
        """One event in, one completion out, whole or in pieces."""
        return await self._intake.answer(request, self._form)

    async def post_events(self, request: Request) -> Response | Streamed:
        """Many events in, a result for each out. Each counts and waits by itself; only what is no batch is refused."""
        gate = self._intake.gate
        client = await gate.identify(request)
        in_lines = require_type(request, JSON, NDJSON) == NDJSON
        require_size(request, None if in_lines else self._bodies.batch)
        batch = Batch(
            request,
            client,
            LinesOutput() if _accepts_lines(request) else ArrayOutput(),
            gate=gate,
            pipeline=self._intake.pipeline,
            clock=self._intake.clock,
            rules=BatchRules(self._limits, self._intake.request_timeout, self._intake.max_body, self._intake.sampling),
        )
        with gate.batch(client):
            if in_lines:
                request.invite_body()
                return await batch.answer(lines(request.read_some, request.renew_body_time, self._intake.max_body))
            size = request.content_length
            with self._budget.holding(client.key, self._bodies.batch if size is None else size):
                return await batch.answer(await self._elements(request, client))

    async def _elements(self, request: Request, client: Client) -> AsyncIterator[Element]:
        """What is in a JSON array. A body that holds no event counts as one all the same."""
        body = await request.read_body(self._bodies.batch)
        try:
            elements = array_elements(body, self._bodies.batch_events)
        except DomainError:
            await self._intake.gate.quota(client)
            raise
        if not elements:
            await self._intake.gate.quota(client)
        return _each(deque(elements))


async def _each(elements: deque[Element]) -> AsyncIterator[Element]:
    while elements:
        yield elements.popleft()


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


def metrics_route(render: Callable[[str], Awaitable[tuple[bytes, str]]]) -> Route:
    """`/metrics`. `render` gives the text and its type for an Accept header."""

    async def get_metrics(request: Request) -> Response:
        text, content_type = await render(request.headers.get(b"accept", b"").decode("latin-1"))
        return Response(200, text, content_type.encode())

    return Route("/metrics", {"GET": get_metrics})
