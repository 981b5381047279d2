"""What each path does."""

from collections.abc import Callable
from typing import Any

import msgspec
from twisted.internet.interfaces import IReactorTime

from ai_ticket.errors import ShuttingDown
from ai_ticket.event import Completion, Event, EventLimits, parse_event
from ai_ticket.interfaces import BackendState, Job, Pipeline
from ai_ticket.web.auth import Authenticator
from ai_ticket.web.faults import LengthRequired, PayloadTooLarge, UnsupportedMediaType
from ai_ticket.web.request import Request, Response
from ai_ticket.web.site import DRAINING_RETRY_SECONDS, Route, json_response
from ai_ticket.web.streaming import EventStream, Streamed


class EventRoutes:
    """`POST /event`."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        pipeline: Pipeline,
        clock: IReactorTime,
        limits: EventLimits,
        max_body_bytes: int,
        request_timeout: float,
        draining: Callable[[], bool],
    ):
        self._authenticator = authenticator
        self._pipeline = pipeline
        self._clock = clock
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._request_timeout = request_timeout
        self._draining = draining

    def routes(self) -> list[Route]:
        """The table."""
        return [Route("/event", {"POST": self.post_event})]

    async def post_event(self, request: Request) -> Response | Streamed:
        """One event in, one completion out, whole or in pieces. What the head tells is refused before the body."""
        client = await self._authenticator.authenticate(request)
        if self._draining():
            raise ShuttingDown(retry_after=DRAINING_RETRY_SECONDS)
        _require_json(request)
        self._require_size(request)
        body = await request.read_body(self._max_body_bytes)
        event = parse_event(body, self._limits)
        deadline = request.arrived + self._request_timeout
        if event.stream:
            stream = EventStream(request, self._clock)
            job = Job(event=event, client=client, timeout=self._request_timeout, deadline=deadline, sink=stream)
            return await stream.answer(event, self._pipeline.submit(job))
        job = Job(event=event, client=client, timeout=self._request_timeout, deadline=deadline)
        completion = await self._pipeline.submit(job)
        return json_response(_answer(completion, event, request.id))

    def _require_size(self, request: Request) -> None:
        size = request.content_length
        if size is None and request.version != "2" and b"transfer-encoding" not in request.headers:
            raise LengthRequired
        if size is not None and size > self._max_body_bytes:
            raise PayloadTooLarge(f"the body is larger than {self._max_body_bytes} bytes")


def _require_json(request: Request) -> None:
    media_type = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        raise UnsupportedMediaType


def _answer(completion: Completion, event: Event, request_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "model": completion.model,
        "usage": msgspec.to_builtins(completion.usage),
        "request_id": request_id,
    }
    if event.metadata is not None:
        answer["metadata"] = event.metadata
    return answer


class HealthRoutes:
    """`/health`, `/health/live`, `/health/ready`: from memory, for anyone."""

    def __init__(self, backends: Callable[[], list[BackendState]], draining: Callable[[], bool]):
        self._backends = backends
        self._draining = draining

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
        status = "healthy" if all(state.up for state in states) else "degraded"
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
        return json_response({"status": "ready"})


def _public(state: BackendState) -> dict[str, Any]:
    fields = msgspec.to_builtins(state)
    return {
        "status": "up" if fields.pop("up") else "down",
        **{name: value for name, value in fields.items() if name != "name" and value is not None},
    }


def metrics_route(render: Callable[[], bytes], content_type: str) -> Route:
    """`/metrics` in the Prometheus text format."""

    async def get_metrics(request: Request) -> Response:
        return Response(200, render(), content_type.encode())

    return Route("/metrics", {"GET": get_metrics})
