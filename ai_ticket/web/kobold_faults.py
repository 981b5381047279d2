"""Errors as KoboldCPP's clients expect them: `{"detail": {"msg", "type"}}`. Our own code stands beside them."""

import msgspec

from ai_ticket.errors import ApiClientError, ApiEndpointMissing, DomainError, UnsupportedParameter
from ai_ticket.web.faults import Unauthorised, error_headers, status_of
from ai_ticket.web.openai_faults import InvalidField
from ai_ticket.web.request import Response

PATHS = "/api/"
"""Below this all errors look like that."""

_TYPES = {400: "bad_input", 401: "unauthorized", 413: "bad_input", 422: "bad_input", 503: "service_unavailable"}
"""What KoboldCPP calls them; what it does not know goes by our code."""


def kobold_error(error: DomainError, request_id: str) -> Response:
    """The answer that tells of an error."""
    return Response(_status(error), msgspec.json.encode(_object(error)), headers=error_headers(error))


def kobold_error_event(error: DomainError) -> bytes:
    """The same within a stream: its last event, in the place of one with a reason to finish."""
    return b"event: error\ndata: " + msgspec.json.encode(_object(error)) + b"\n\n"


def _status(error: DomainError) -> int:
    """Ours, but what a model server refuses was wrong with the request, as KoboldCPP would say itself."""
    refused = isinstance(error, ApiClientError) and not isinstance(error, ApiEndpointMissing)
    return 400 if refused else status_of(error)


def _object(error: DomainError) -> dict[str, object]:
    message = error.message
    if error.details is not None and not isinstance(error, UnsupportedParameter | InvalidField):
        message += f" ({error.details})"
    detail = {"msg": message, "type": _TYPES.get(_status(error), error.code), "code": error.code}
    if isinstance(error, Unauthorised):
        detail["error"] = "Unauthorized"
    return {"detail": detail}
