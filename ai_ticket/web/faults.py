"""Errors to answers: the one table from a fault's code to its status, and the faults that only HTTP has."""

import math
from typing import Any

import msgspec
from msgspec import Struct

from ai_ticket.errors import DomainError

STATUSES = {
    "invalid_request": 400,
    "invalid_input_format": 400,
    "missing_content_field": 400,
    "invalid_parameter": 400,
    "unsupported_parameter": 400,
    "unauthorised": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "length_required": 411,
    "payload_too_large": 413,
    "unsupported_media_type": 415,
    "expectation_failed": 417,
    "prompt_extraction_failed": 422,
    "context_length_exceeded": 422,
    "rate_limited": 429,
    "internal_error": 500,
    "api_connection_error": 502,
    "api_server_error": 502,
    "api_client_error": 502,
    "api_authentication_error": 502,
    "api_response_format_error": 502,
    "api_response_structure_error": 502,
    "overloaded": 503,
    "shutting_down": 503,
    "no_backend_available": 503,
    "api_rate_limited": 503,
    "deadline_exceeded": 504,
}


class Unauthorised(DomainError):
    """No valid token."""

    code = "unauthorised"
    default_message = "A valid token is needed."


class NotFound(DomainError):
    """No such path."""

    code = "not_found"
    default_message = "There is nothing at this path."


class MethodNotAllowed(DomainError):
    """The path has no such method; `allowed` are those that it has."""

    code = "method_not_allowed"
    default_message = "The path does not take this method."

    def __init__(self, allowed: list[str]):
        self.allowed = allowed
        super().__init__(f"allowed: {', '.join(allowed)}")


class LengthRequired(DomainError):
    """A body of unknown length, which HTTP/1 can't have (RFC 9110, 15.5.12)."""

    code = "length_required"
    default_message = "The request needs a Content-Length or a chunked body."


class PayloadTooLarge(DomainError):
    """The body is over the limit."""

    code = "payload_too_large"
    default_message = "The body is too large."


class UnsupportedMediaType(DomainError):
    """Not JSON."""

    code = "unsupported_media_type"
    default_message = "The Content-Type must be application/json."


class ExpectationFailed(DomainError):
    """The caller expects something other than to be told to send the body (RFC 9110, 10.1.1)."""

    code = "expectation_failed"
    default_message = "Nothing but 100-continue may be expected."


class Quota(Struct, frozen=True):
    """At most `limit` requests of a client within any `window` seconds, of which `remaining` are left now."""

    limit: int
    window: float
    remaining: int


class RateLimited(DomainError):
    """The caller has sent too many. `quota` is the one that is used up, where callers are to know it."""

    code = "rate_limited"
    default_message = "Too many requests within a short time."

    def __init__(
        self, details: str | None = None, *, retry_after: float, message: str | None = None, quota: Quota | None = None
    ):
        self.quota = quota
        super().__init__(details, message=message, retry_after=retry_after)


def status_of(error: DomainError) -> int:
    """The status of the answer to this error."""
    return STATUSES[error.code]


def error_headers(error: DomainError) -> tuple[tuple[bytes, bytes], ...]:
    """The headers that go with this error."""
    headers = []
    if error.retry_after is not None:
        headers.append((b"retry-after", str(retry_after_seconds(error.retry_after)).encode()))
    if isinstance(error, Unauthorised):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    if isinstance(error, RateLimited) and error.quota is not None:
        headers += quota_headers(error.quota, error.retry_after or 0)
    if error.code == "shutting_down":
        headers.append((b"connection", b"close"))
    return tuple(headers)


def quota_headers(quota: Quota, seconds: float) -> tuple[tuple[bytes, bytes], ...]:
    """What a caller is told of its quota (draft-ietf-httpapi-ratelimit-headers-11).

    @param seconds: the time within which it can use no more than what remains.
    """
    policy = f'"default";q={quota.limit};w={max(1, math.ceil(quota.window))}'
    state = f'"default";r={quota.remaining};t={math.ceil(seconds)}'
    return (b"ratelimit-policy", policy.encode()), (b"ratelimit", state.encode())


def error_object(error: DomainError, request_id: str) -> dict[str, Any]:
    """The error as the caller gets it."""
    return {"error": error.code, "message": error.message, "details": error.details, "request_id": request_id}


def error_body(error: DomainError, request_id: str) -> bytes:
    """The error as the JSON text of an answer."""
    return msgspec.json.encode(error_object(error, request_id))


def retry_after_seconds(seconds: float) -> int:
    """A Retry-After in whole seconds: rounded up, 1 at the least."""
    return max(1, math.ceil(seconds))
