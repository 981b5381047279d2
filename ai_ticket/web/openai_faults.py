"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, and when to try again.

Where OpenAI has a code of its own it is that one, else ours.
"""

import math

import msgspec

from ai_ticket.errors import (
    ApiClientError,
    ApiEndpointMissing,
    ContextLengthExceeded,
    DeadlineExceeded,
    DomainError,
    InvalidParameter,
    UnsupportedParameter,
)
from ai_ticket.web.faults import (
    MethodNotAllowed,
    NotFound,
    Quota,
    RateLimited,
    Unauthorised,
    error_headers,
    status_of,
)
from ai_ticket.web.request import Response

PATHS = "/v1/"
"""Below this all errors look like that."""

LONGEST_WAIT = 60.0
"""Seconds of `Retry-After` that the SDKs take; for a longer one they would come back much too early."""

_MESSAGE = 300


class InvalidField(InvalidParameter):
    """A field can't be read, or not be used. `param` is its path, `kind` OpenAI's code for what is wrong."""

    def __init__(self, param: str | None, message: str, kind: str = "invalid_value"):
        self.param = param
        self.kind = kind
        super().__init__(param, message=message[:_MESSAGE])


class ModelNotFound(NotFound):
    """No model has this id."""

    default_message = "There is no model of this name."


def openai_error(error: DomainError, request_id: str) -> Response:
    """The answer that tells of an error."""
    return Response(_status(error), msgspec.json.encode(_object(error)), headers=_headers(error))


def openai_error_event(error: DomainError) -> bytes:
    """The same within a stream: its last event."""
    return b"data: " + msgspec.json.encode(_object(error)) + b"\n\n"


def openai_quota_headers(quota: Quota, seconds: float) -> tuple[tuple[bytes, bytes], ...]:
    """What OpenAI's clients are told of their quota.

    @param seconds: the time within which no more can be used than what remains.
    """
    return (
        (b"x-ratelimit-limit-requests", b"%d" % quota.limit),
        (b"x-ratelimit-remaining-requests", b"%d" % quota.remaining),
        (b"x-ratelimit-reset-requests", b"%ds" % math.ceil(seconds)),
    )


def _status(error: DomainError) -> int:
    """Ours, but that what is wrong with the request is always 400: the model server may be the one who says so."""
    status = status_of(error)
    refused = isinstance(error, ApiClientError) and not isinstance(error, ApiEndpointMissing)
    return 400 if status == 422 or refused else status


def _object(error: DomainError) -> dict[str, object]:
    status = _status(error)
    kind, param, code = "invalid_request_error", None, error.code
    message = error.message
    if isinstance(error, InvalidField):
        param, code = error.param, error.kind
    elif isinstance(error, UnsupportedParameter):
        param = error.details
    elif isinstance(error, ContextLengthExceeded):
        param, message = "messages", f"{error.message} ({error.details})"
    elif isinstance(error, ModelNotFound):
        param, code = "model", "model_not_found"
    elif isinstance(error, Unauthorised):
        kind, code = "authentication_error", "invalid_api_key"  # litellm takes OpenAI's type for a faulty request
    elif isinstance(error, RateLimited):
        kind, code = "requests", "rate_limit_exceeded"
    elif error.details is not None:
        message = f"{error.message} ({error.details})"
    if status >= 500:
        kind = "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _headers(error: DomainError) -> tuple[tuple[bytes, bytes], ...]:
    headers = list(error_headers(error))
    if isinstance(error, RateLimited) and error.quota is not None:
        headers += openai_quota_headers(error.quota, error.retry_after or 0.0)
    if _pointless(error):
        headers.append((b"x-should-retry", b"false"))
    return tuple(headers)


def _pointless(error: DomainError) -> bool:
    """Whether the SDKs, which try again after any 429 and 5xx, should not.

    An event that has had all of its time would need as much again, from a service that is too busy already.
    """
    if isinstance(error, DeadlineExceeded | ApiEndpointMissing | MethodNotAllowed):
        return True
    return error.retry_after is not None and error.retry_after > LONGEST_WAIT
