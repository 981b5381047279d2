"""The site: from a request to its route, and from what the route's handler does to the one answer."""

import re
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from msgspec import Struct
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from ai_ticket.errors import DomainError, InternalError, InvalidRequest, ShuttingDown
from ai_ticket.interfaces import Recorder
from ai_ticket.spans import Span, Tracer
from ai_ticket.web.auth import credentials
from ai_ticket.web.cors import Cors
from ai_ticket.web.error_forms import error_response
from ai_ticket.web.faults import ExpectationFailed, MethodNotAllowed, NotFound, error_body
from ai_ticket.web.request import HeaderList, Request, Response
from ai_ticket.web.streaming import Streamed

CLIENT_CLOSED_REQUEST = 499
"""Stands in logs and metrics where a caller left before the answer, as nginx has it."""

UNMATCHED = "unmatched"

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Tally(Struct):
    """What became of requests, those for health and metrics left out.

    They were answered (`finished`), told that the service is shutting down when they came or waited (`refused`), given
    up by their callers (`left`), or by us when the time was over (`cut`).
    """

    finished: int = 0
    refused: int = 0
    left: int = 0
    cut: int = 0


Handler = Callable[[Request], Awaitable[Response | Streamed]]


class Route(Struct, frozen=True):
    """What a path does, by method. HEAD is answered wherever GET is. What is `traced` has a span for each request.

    A path that ends with a name in braces stands for all that go on in its place. The `aliases` are further paths that
    do the same, and go by the one path in logs and metrics.
    """

    path: str
    handlers: Mapping[str, Handler]
    traced: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def allowed(self) -> list[str]:
        """The methods that the path takes."""
        return sorted({*self.handlers, *(["HEAD"] if "GET" in self.handlers else [])})

    def handler(self, method: str) -> Handler:
        """The handler of a method.

        @raise MethodNotAllowed: the path does not take it.
        """
        handler = self.handlers.get("GET" if method == "HEAD" else method)
        if handler is None:
            raise MethodNotAllowed(self.allowed)
        return handler


class Site:
    """Answers requests by a table of routes."""

    _log = Logger()

    def __init__(
        self,
        routes: list[Route],
        *,
        clock: IReactorTime,
        recorder: Recorder,
        tracer: Tracer,
        new_request_id: Callable[[], str],
        hsts_seconds: int,
        cors: Cors,
    ):
        self._routes = {path: route for route in routes for path in (route.path, *route.aliases)}
        self._open_routes = [(route.path.partition("{")[0], route) for route in routes if route.path.endswith("}")]
        self._clock = clock
        self._recorder = recorder
        self._tracer = tracer
        self._new_request_id = new_request_id
        self._cors = cors
        self._headers: HeaderList = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
        self._secure_headers = list(self._headers)
        if hsts_seconds:
            self._secure_headers.append((b"strict-transport-security", b"max-age=%d" % hsts_seconds))
        self._in_flight: dict[Request, Deferred[None] | None] = {}
        self._cut: set[Request] = set()
        self.tally = Tally()

    @property
    def in_flight(self) -> int:
        """How many requests are being answered."""
        return len(self._in_flight)

    @property
    def streams(self) -> int:
        """How many of them are being answered in pieces."""
        return sum(request.streaming for request in self._in_flight)

    def cut(self) -> None:
        """Give up what is being answered: the callers are told that the service is shutting down."""
        self._cut.update(self._in_flight)
        for answering in list(self._in_flight.values()):
            if answering is not None:
                answering.cancel()

    def received(self, request: Request) -> None:
        """Answer a request whose head is complete."""
        request.id = self._request_id(request.headers)
        request.common_headers = self._common_headers(request.id, request.secure)
        request.common_headers += self._cors.headers(request)
        self._in_flight[request] = None
        self._recorder.request_started()
        answering = Deferred.fromCoroutine(self._answer(request))
        if request in self._in_flight:
            self._in_flight[request] = answering
            request.when_lost(answering.cancel)
        answering.addErrback(self._failed, request)

    def refuse(
        self, status: int, given: dict[bytes, bytes], peer: str, secure: bool, method: str | None = None
    ) -> tuple[HeaderList, bytes]:
        """Headers and body of the answer to what could not be read as a request; `given` are those that could."""
        request_id = self._request_id(given)
        error = _malformed("the head is too large" if status == 431 else None)
        self._recorder.request_started()
        self._recorder.request_finished(UNMATCHED, "other", status, 0.0)
        known = {"method": method} if method in _METHODS else {}
        self._log.info("malformed request", status=status, request_id=request_id, peer=peer, **known)
        headers = [(b"content-type", b"application/json"), *self._common_headers(request_id, secure)]
        return headers, error_body(error, request_id)

    def _request_id(self, headers: dict[bytes, bytes]) -> str:
        """The caller's own, if it may be one: a token sent as that too, by mistake, would be in every log."""
        given = headers.get(b"x-request-id")
        if given is None or _REQUEST_ID.fullmatch(given) is None or given in credentials(headers):
            return self._new_request_id()
        return given.decode()

    def _common_headers(self, request_id: str, secure: bool) -> HeaderList:
        return [(b"x-request-id", request_id.encode()), *(self._secure_headers if secure else self._headers)]

    async def _answer(self, request: Request) -> None:
        route = self._routes.get(request.path) or self._open_route(request.path)
        if route is not None and route.traced:
            request.span = self._begin_span(request, route)
        failed: DomainError | None = None
        response: Response | Streamed | None = None
        try:
            if route is None:
                raise NotFound
            if request.headers.get(b"expect", b"100-continue").lower() != b"100-continue":
                raise ExpectationFailed
            response = self._cors.preflight(request, route.allowed)
            if response is None:
                response = await route.handler(request.method)(request)
        except DomainError as error:
            # Its traceback has this very frame, and with it the request: they would be garbage to be searched for.
            failed = error.with_traceback(None)
        except CancelledError:  # by `cut`, or because the caller is gone or its body can't be read
            failed = _malformed("the body can't be read to its end") if request.broken else ShuttingDown()
        except Exception:
            self._log.failure("a request failed", request_id=request.id, trace_id=request.span.trace_id)
            failed = InternalError()
        if request.lost:
            self._finished(request, route, CLIENT_CLOSED_REQUEST)
        elif isinstance(response, Streamed):
            self._finished(request, route, response.status, response.error)
        else:
            if response is None:
                response = error_response(failed or InternalError(), request)
            request.respond(response)
            self._finished(request, route, response.status, None if failed is None else failed.code)

    def _open_route(self, path: str) -> Route | None:
        for beginning, route in self._open_routes:
            if path.startswith(beginning) and path != beginning:
                return route
        return None

    def _begin_span(self, request: Request, route: Route) -> Span:
        span = self._tracer.start(
            f"{_method(request)} {route.path}",
            kind="server",
            traceparent=request.headers.get(b"traceparent"),
            tracestate=request.headers.get(b"tracestate"),
            at=request.arrived,
        )
        if span.recording:
            span.set(
                {
                    "http.request.method": _method(request),
                    "http.route": route.path,
                    "url.scheme": "https" if request.secure else "http",
                    "network.protocol.version": request.version,
                    "ai_ticket.request_id": request.id,
                }
            )
        return span

    def _end_span(self, span: Span, status: int, error: str | None) -> None:
        span.set({"http.response.status_code": status})
        if error is not None or status >= 500:
            span.fail(error or str(status))
        span.end()

    def _finished(self, request: Request, route: Route | None, status: int, error: str | None = None) -> None:
        self._in_flight.pop(request, None)
        name = route.path if route is not None else UNMATCHED
        method = _method(request)
        seconds = self._clock.seconds() - request.arrived
        self._recorder.request_finished(
            name, method, status, seconds, request.span.trace_id if request.span.recording else None
        )
        if request.elsewhere is not None:
            self._recorder.overhead(name, max(0.0, seconds - request.elsewhere))
        facts = request.facts
        if error is not None:
            facts["error"] = error
        if request.span.trace_id is not None:
            facts |= {"trace_id": request.span.trace_id, "span_id": request.span.span_id}
            self._end_span(request.span, status, error)
        probe = name == "/metrics" or name.startswith("/health")
        if not probe:
            self._count(request, error)
        self._log.emit(
            LogLevel.debug if probe and status < 400 else LogLevel.info,
            "{method} {route} {status}",
            method=method,
            route=name,
            status=status,
            duration=round(seconds, 6),
            request_id=request.id,
            peer=request.peer,
            http=request.version,
            **facts,
        )

    def _count(self, request: Request, error: str | None) -> None:
        tally = self.tally
        if request in self._cut and (error is not None or request.lost):
            tally.cut += 1
        elif request.lost:
            tally.left += 1
        elif error == ShuttingDown.code:
            tally.refused += 1
        else:
            tally.finished += 1

    def _failed(self, failure: Failure, request: Request) -> None:
        """Answering itself failed: a bug."""
        if request in self._in_flight:
            self._finished(request, None, 500)
        self._log.failure("answering a request failed", failure, request_id=request.id)


def _malformed(details: str | None) -> InvalidRequest:
    return InvalidRequest(details, message="This is not a well-formed HTTP request.")


def _method(request: Request) -> str:
    return request.method if request.method in _METHODS else "other"


def json_response(value: object, status: int = 200) -> Response:
    """An answer of this value as JSON."""
    return Response(status, msgspec.json.encode(value))
