"""The answer that tells of an error, in the form that the callers of its path know."""

from collections.abc import Callable

from ai_ticket.errors import DomainError
from ai_ticket.web import kobold_faults, openai_faults
from ai_ticket.web.faults import error_body, error_headers, status_of
from ai_ticket.web.request import Request, Response

_FORMS: tuple[tuple[str, Callable[[DomainError, str], Response]], ...] = (
    (openai_faults.PATHS, openai_faults.openai_error),
    (kobold_faults.PATHS, kobold_faults.kobold_error),
)
"""By how a path begins, so that what is wrong with the path itself is told in the same form."""


def error_response(error: DomainError, request: Request) -> Response:
    """The answer that tells of an error."""
    for beginning, form in _FORMS:
        if request.path.startswith(beginning):
            return form(error, request.id)
    return Response(status_of(error), error_body(error, request.id), headers=error_headers(error))
