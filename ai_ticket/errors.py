"""What can go wrong with an event, each fault with its stable code. Nothing of HTTP: `web.faults` has the statuses."""

from typing import ClassVar

SHUTDOWN_RETRY_SECONDS = 5.0
"""When a caller may come back to a service that is shutting down: another instance, or the next start, takes it."""


class DomainError(Exception):
    """A fault that the caller is told of.

    `message` is for a person, `details` says what exactly and where, `retry_after` is in seconds where trying again
    later can help. None of them may hold a secret, a prompt or a completion. `after_first_token` says that some of the
    answer had come already, so that it can't be had again from the start; `backend` is where, if it was at one.
    """

    after_first_token = False
    backend: str | None = None

    code: ClassVar[str]
    default_message: ClassVar[str]

    def __init__(self, details: str | None = None, *, message: str | None = None, retry_after: float | None = None):
        self.message = message or self.default_message
        self.details = details
        self.retry_after = retry_after
        super().__init__(f"{self.code}: {self.message}" + (f" ({details})" if details else ""))


class InvalidRequest(DomainError):
    code = "invalid_request"
    default_message = "The request is not one that can be read."


class InvalidInputFormat(DomainError):
    code = "invalid_input_format"
    default_message = "An event must be a JSON object."


class MissingContentField(DomainError):
    code = "missing_content_field"
    default_message = "The event has no content."


class InvalidParameter(DomainError):
    code = "invalid_parameter"
    default_message = "A field of the event has a wrong type or value."


class UnsupportedParameter(DomainError):
    """The model server has no way to do it; `details` is the field's name alone. Another server may have."""

    code = "unsupported_parameter"
    default_message = "The model server has no such parameter."


class PromptExtractionFailed(DomainError):
    code = "prompt_extraction_failed"
    default_message = "No prompt could be found in the event's content."


class ContextLengthExceeded(DomainError):
    code = "context_length_exceeded"
    default_message = "The prompt and max_tokens do not fit into the model's context."


class Overloaded(DomainError):
    code = "overloaded"
    default_message = "Too many events are waiting."


class ShuttingDown(DomainError):
    code = "shutting_down"
    default_message = "The service is shutting down."

    def __init__(self, details: str | None = None, *, retry_after: float = SHUTDOWN_RETRY_SECONDS):
        super().__init__(details, retry_after=retry_after)


class DeadlineExceeded(DomainError):
    code = "deadline_exceeded"
    default_message = "The answer did not come in time."


class NoBackendAvailable(DomainError):
    code = "no_backend_available"
    default_message = "No model server is available at the moment."


class CallerTooSlow(DeadlineExceeded):
    default_message = "The answer was not read in time."


class ApiConnectionError(DomainError):
    code = "api_connection_error"
    default_message = "The connection to the model server failed."


class ApiServerError(DomainError):
    code = "api_server_error"
    default_message = "The model server failed."


class ApiRateLimited(DomainError):
    code = "api_rate_limited"
    default_message = "The model server is busy."


class ApiClientError(DomainError):
    code = "api_client_error"
    default_message = "The model server refused the request."


class ApiEndpointMissing(ApiClientError):
    default_message = "The model server has no endpoint that generates."


class ApiAuthenticationError(DomainError):
    code = "api_authentication_error"
    default_message = "The model server refused our credentials."


class ApiResponseFormatError(DomainError):
    code = "api_response_format_error"
    default_message = "The model server's answer is not in a format that we know."


class ApiResponseStructureError(DomainError):
    code = "api_response_structure_error"
    default_message = "The model server's answer is not complete or not of the expected shape."


class InternalError(DomainError):
    code = "internal_error"
    default_message = "An internal error occurred."
