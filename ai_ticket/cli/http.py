"""One HTTP exchange with the service, over treq and within one time limit."""

import re
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
from msgspec import Struct
from OpenSSL.SSL import Error as TLSError
from treq.client import HTTPClient
from twisted.internet import error as internet_error
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.web.client import Agent, HTTPConnectionPool, RequestTransmissionFailed, ResponseFailed
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from ai_ticket import __version__
from ai_ticket.cli.body import Fields, NotAnObject, parse, read, read_events
from ai_ticket.cli.outcome import CommandError, ExitStatus
from ai_ticket.cli.service import Service
from ai_ticket.cli.trust import SystemAndMore, read_certificates
from ai_ticket.server_identity import IDENTITY_ERRORS

_TRY_LATER = frozenset({429, 503, 504})
_TRY_LATER_CODES = frozenset(  # those that have such a status where they come before a stream, not in it
    {"overloaded", "shutting_down", "no_backend_available", "api_rate_limited", "rate_limited", "deadline_exceeded"}
)
_CONNECT_TIMEOUT = 10.0
_NO_CONNECTION = (
    internet_error.ConnectError,
    internet_error.ConnectionClosed,
    internet_error.DNSLookupError,
    internet_error.TimeoutError,
    RequestTransmissionFailed,
    ResponseFailed,
    TLSError,
    *IDENTITY_ERRORS,
)


class Answer(Struct, frozen=True):
    """What came back: always a JSON object, whatever the status; of a stream the object that ended it."""

    status: int
    headers: Headers
    fields: Fields

    def to_json(self) -> str:
        """The object on one line."""
        return msgspec.json.encode(self.fields).decode()

    def error(self, *, hint: str | None = None) -> CommandError:
        """The answer as an error, with the service's own account of it; `hint` goes with the details."""
        code = _text(self.fields, "error")
        details = [text for text in (_text(self.fields, "details"), hint) if text]
        later = self.status in _TRY_LATER or (self.status == 200 and code in _TRY_LATER_CODES)
        return CommandError(
            code or f"http_{self.status}",
            _text(self.fields, "message") or f"The service answered with HTTP status {self.status}.",
            status=ExitStatus.TRY_LATER if later else ExitStatus.FAILED,
            details="\n".join(details) or None,
            request_id=_text(self.fields, "request_id") or _header(self.headers, "X-Request-ID"),
            retry_after=_seconds(_header(self.headers, "Retry-After")),
            answer=self.fields,
        )


def make_client(reactor: Any, service: Service, pool: HTTPConnectionPool | None = None) -> HTTPClient:
    """A client for one exchange, or with a pool that keeps connections for many.

    @raise CommandError: the certificates to trust are none.
    """
    try:
        more = read_certificates(service.authorities) if service.authorities is not None else []
    except ValueError:
        raise CommandError("usage", "The certificates to trust (--cacert, TLS_CERT_FILE) are not PEM certificates.")
    agent = Agent(
        reactor,
        contextFactory=SystemAndMore(more, more[0] if service.own and more else None),
        # Below the limit of the whole, so that a host that is silent is told from a service that is slow.
        connectTimeout=min(_CONNECT_TIMEOUT, service.timeout / 2),
        pool=pool or HTTPConnectionPool(reactor, persistent=False),
    )
    return HTTPClient(agent)


async def exchange(
    clock: IReactorTime,
    client: HTTPClient,
    service: Service,
    path: str,
    *,
    event: object = None,
    line: bytes | None = None,
    receive: Callable[[Fields], None] | None = None,
) -> Answer:
    """POST the event, or a line of NDJSON, or GET where there is neither.

    `receive` gets the objects of a streamed answer, but not its error.

    @raise CommandError: the service can't be reached or not in time, or what answered is not the service, or its
        stream is cut.
    """

    def timed_out(result: object, seconds: float) -> NoReturn:
        # Whatever a cancelled request ends with, which is not always a CancelledError.
        message = f"No complete answer from {service.address} within {seconds:g} s."
        raise CommandError("timeout", message, status=ExitStatus.TRY_LATER)

    # treq's own time limit ends at the headers; this one has the body in it.
    whole = Deferred.fromCoroutine(_exchange(client, service, path, event=event, line=line, receive=receive))
    try:
        return await whole.addTimeout(service.timeout, clock, timed_out)
    except _NO_CONNECTION as error:
        raise _unreachable(error, service)


async def _exchange(
    client: HTTPClient,
    service: Service,
    path: str,
    *,
    event: object,
    line: bytes | None,
    receive: Callable[[Fields], None] | None,
) -> Answer:
    kind = "application/json" if line is None else "application/x-ndjson"
    accept = kind if receive is None else f"text/event-stream, {kind}"
    headers = Headers({"Accept": [accept], "User-Agent": [f"ai-ticket/{__version__}"]})
    if service.token is not None:
        headers.setRawHeaders("Authorization", [f"Bearer {service.token}"])
    body = line if event is None else msgspec.json.encode(event)
    if body is not None:
        headers.setRawHeaders("Content-Type", [kind])
    response = await client.request(
        "GET" if body is None else "POST",
        service.url.child(path),
        headers=headers,
        data=body,
        allow_redirects=False,  # the service has none, and a token is not for whoever a redirect names
        unbuffered=True,
    )
    try:
        if receive is not None and response.code == 200 and _is_event_stream(response):
            fields = await read_events(response, receive)
        else:
            content = await read(response)
            # A whole batch is accepted before it is answered, so an answer that is cut may have an end of its own.
            fields = None if line is not None and response.code == 200 and not content.strip() else parse(content)
    except NotAnObject:
        raise _not_ours(response, service)
    if fields is None:
        message = f"The answer of {service.address} broke off before its end."
        raise CommandError("stream_cut", message, request_id=_header(response.headers, "X-Request-ID"))
    return Answer(status=response.code, headers=response.headers, fields=fields)


def _is_event_stream(response: IResponse) -> bool:
    kind = _header(response.headers, "Content-Type") or ""
    return kind.partition(";")[0].strip().lower() == "text/event-stream"


def _not_ours(response: IResponse, service: Service) -> CommandError:
    """What something else than the service, perhaps a proxy before it, answered."""
    kind = _header(response.headers, "Content-Type") or "no content type"
    details = f"HTTP status {response.code}, {kind}, not a JSON object"
    location = _header(response.headers, "Location")
    return CommandError(
        "not_the_service",
        f"What answers at {service.address} is not AI Ticket, or a proxy before it has failed.",
        status=ExitStatus.TRY_LATER if response.code in _TRY_LATER else ExitStatus.FAILED,
        details=details + (f", redirects to {location}" if location else ""),
        request_id=_header(response.headers, "X-Request-ID"),
        retry_after=_seconds(_header(response.headers, "Retry-After")),
        http_status=response.code,
    )


def _unreachable(error: Exception, service: Service) -> CommandError:
    causes: list[BaseException] = [failure.value for failure in getattr(error, "reasons", ())] or [error]
    for cause in causes:
        if isinstance(cause, IDENTITY_ERRORS):
            message = f"The certificate of {service.address} is for another host name than {service.url.host}."
            return CommandError("certificate_not_trusted", message, status=ExitStatus.UNREACHABLE)
        if isinstance(cause, TLSError):
            reasons = _tls_reasons(cause)
            untrusted = "certificate verify failed" in reasons
            return CommandError(
                "certificate_not_trusted" if untrusted else "tls_error",
                f"No TLS connection to {service.address}: {reasons}.",
                status=ExitStatus.UNREACHABLE,
                details="--cacert FILE trusts its certificate, or whoever issued it" if untrusted else None,
            )
    message = f"Can't reach {service.address}: {'; '.join(str(cause) for cause in causes).rstrip('.')}."
    return CommandError("unreachable", message, status=ExitStatus.UNREACHABLE)


def _tls_reasons(error: TLSError) -> str:
    """OpenSSL's own words: a list of (library, function, reason), or something else where the connection just ended."""
    if error.args and isinstance(error.args[0], list):
        return "; ".join(str(reason[-1]) for reason in error.args[0])
    return str(error) or type(error).__name__


def _text(fields: Fields, name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None


def _header(headers: Headers, name: str) -> str | None:
    values = headers.getRawHeaders(name.encode(), [])  # as text, they would have to be UTF-8
    return values[0].decode("latin-1") if values else None


def _seconds(text: str | None) -> int | None:
    # The other form, a date, is nothing that the service sends.
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,9}", text) else None
