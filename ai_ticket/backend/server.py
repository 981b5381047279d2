"""HTTP to a model server: requests, and what its refusals mean."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import msgspec
from msgspec import Struct
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IReactorTime

from ai_ticket.backend.address import Location
from ai_ticket.backend.body import Body
from ai_ticket.backend.http1 import HttpClient, Origin, header_lines, request_head
from ai_ticket.backend.http1_connection import Response
from ai_ticket.errors import (
    ApiAuthenticationError,
    ApiClientError,
    ApiConnectionError,
    ApiRateLimited,
    ApiResponseFormatError,
    ApiResponseStructureError,
    ApiServerError,
    ContextLengthExceeded,
    DeadlineExceeded,
    DomainError,
)
from ai_ticket.urls import request_url

T = TypeVar("T")

BUSY_RETRY_SECONDS = 1.0
LARGEST_SMALL_BODY = 1_048_576
LARGEST_COUNT = 33_554_432
"""Of a prompt's tokens: KoboldCPP sends all of them, and the prompt as it took it."""

_NO_HEADERS: Mapping[str, str] = {}


def _nobody() -> None:
    """Who does not want to know when a request is on its way."""


class NoSuchEndpoint(ApiClientError):
    """The server does not have the path, or not for POST: another may serve."""


class _Problem(Struct):
    """What is common to the error objects of KoboldCPP (`detail`) and llama.cpp (`error`)."""

    type: str | None = None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class _Refusal(Struct):
    detail: _Problem | None = None
    error: _Problem | None = None


class ModelServer:
    """A model server, as far as HTTP goes.

    `aside` is for requests beside those that generate, one at a time: so there is never more than one connection beyond
    the slots. KoboldCPP has 24 threads, and a connection pins one of them. `keeps_connections` is to be set for a
    server that takes more than one request on a connection.
    """

    def __init__(self, http: HttpClient, clock: IReactorTime, locate: Callable[[], Location | None]):
        """@param locate: says where the server is now, or None while it is not running."""
        self._http = http
        self.aside = DeferredLock()
        self.keeps_connections = False
        self._clock = clock
        self._locate = locate
        self._location: Location | None = None
        self._origin: Origin | None = None
        self._heads: dict[tuple[str, str, bool], bytes] = {}

    async def post(
        self,
        path: str,
        payload: dict[str, Any],
        timeout: float,
        sent: Callable[[], object] = _nobody,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> Response:
        """Send a request; the answer's body is still to be read.

        @param timeout: for everything up to the answer's head, in seconds.
        @param sent: is called when the request is on its way: from then on the server may have begun.
        @param headers: to be sent beside those that every request has.
        @raise DomainError: the server can't be reached, is silent, or refuses.
        """
        response = await self._request(
            "POST", path, timeout, msgspec.json.encode(payload), sent=sent, more_headers=headers
        )
        if response.status != 200:
            raise await self._refusal(response)
        return response

    async def ask(
        self, path: str, payload: dict[str, Any], type: type[T], timeout: float, limit: int = LARGEST_SMALL_BODY
    ) -> T:
        """The JSON value that a path gives for a request.

        @param limit: the size of the answer, in bytes.
        @raise DomainError: as `post`; or the answer is too large, is not JSON, or not of the type.
        """
        return decode(await self.read(await self.post(path, payload, timeout), timeout, limit), type)

    async def get(self, path: str, type: type[T], timeout: float) -> T:
        """The JSON value that a path gives.

        @raise DomainError: as `post`; or the answer is not JSON, or not of the type.
        """
        response = await self._request("GET", path, timeout)
        if response.status != 200:
            raise await self._refusal(response)
        return decode(await self.read(response, timeout), type)

    async def read(
        self, response: Response, timeout: float, limit: int = LARGEST_SMALL_BODY, *, since: float | None = None
    ) -> bytes:
        """The whole body of a small answer.

        @param since: the clock's time from which on the time-out counts, where that is not now.
        @raise DomainError: it does not come in time, is too large, or breaks off.
        """
        chunks: list[bytes] = []
        size = 0

        def received(data: bytes) -> None:
            nonlocal size
            size += len(data)
            if size > limit:
                raise ApiResponseFormatError(f"the answer is larger than {limit} bytes")
            chunks.append(data)

        await Body(self._clock, received, first=timeout, idle=timeout, since=since).read(response)
        return b"".join(chunks)

    async def _request(
        self,
        method: str,
        path: str,
        timeout: float,
        body: bytes = b"",
        *,
        sent: Callable[[], object] = _nobody,
        more_headers: Mapping[str, str] = _NO_HEADERS,
    ) -> Response:
        location = self._locate()
        if location is None:
            raise ApiConnectionError("the model server is not running")
        if location is not self._location or self._origin is None:
            self._origin = self._http(request_url(location.url))
            self._heads.clear()
            self._location = location
        keep = self.keeps_connections
        head = self._heads.get((method, path, keep)) or self._make_head(location, method, path, keep)
        more = header_lines(more_headers) if more_headers else b""
        data = b"%sContent-Length: %d\r\n%s\r\n%s" % (head, len(body), more, body) if body else head + more + b"\r\n"
        asking = Deferred.fromCoroutine(self._origin.request(data, keep=keep, sent=sent))
        return await asking.addTimeout(max(0.0, timeout), self._clock, onTimeoutCancel=_silent)

    def _make_head(self, location: Location, method: str, path: str, keep: bool) -> bytes:
        """What is the same in every such request, built once."""
        fields = {"Accept-Encoding": "identity"}
        if not keep:
            fields["Connection"] = "close"
        if method == "POST":
            fields["Content-Type"] = "application/json"
        if location.api_key is not None:
            fields["Authorization"] = f"Bearer {location.api_key}"
        try:
            head = request_head(method, request_url(location.url + path), fields)
        except ValueError as error:
            raise ApiConnectionError(str(error))
        self._heads[method, path, keep] = head
        return head

    async def _refusal(self, response: Response) -> DomainError:
        """What an answer other than 200 means. Its text is not shown: it may quote the prompt."""
        status = response.status
        try:
            refusal = msgspec.json.decode(await self.read(response, 5.0), type=_Refusal)
        except (DomainError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            refusal = _Refusal()
        problem = refusal.detail or refusal.error or _Problem()
        what = f"the server answered {status}" + (f" {problem.type}" if problem.type and len(problem.type) < 64 else "")
        if problem.type == "exceed_context_size_error":
            return ContextLengthExceeded(
                f"the prompt has {problem.n_prompt_tokens} tokens, the context {problem.n_ctx} for prompt and answer"
            )
        if status == 429 or (status == 503 and problem.type == "service_unavailable"):
            return ApiRateLimited(what, retry_after=BUSY_RETRY_SECONDS)
        if status in (401, 403):
            return ApiAuthenticationError(what)
        if status in (404, 405, 501):
            return NoSuchEndpoint(what)
        if status >= 500:
            return ApiServerError(what)
        if status >= 400:
            return ApiClientError(what)
        return ApiResponseFormatError(what)


def decode(body: bytes, type: type[T]) -> T:
    """A JSON answer.

    @raise ApiResponseFormatError: it is not JSON. @raise ApiResponseStructureError: it is not of the type.
    """
    try:
        return msgspec.json.decode(body, type=type)
    except msgspec.ValidationError as error:
        raise ApiResponseStructureError(f"an unexpected shape: {error}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiResponseFormatError("not JSON")


def _silent(_: object, seconds: float) -> NoReturn:
    raise DeadlineExceeded(f"the model server did not answer within {seconds:g} s")
