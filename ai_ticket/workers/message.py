"""What every message between the parent and its workers is, and how an error travels in one."""

from typing import Any

from msgspec import Struct

from ai_ticket import errors
from ai_ticket.errors import DomainError, InternalError


class Message(Struct, frozen=True, array_like=True, tag=True):
    """What goes over a channel. `number` is the asking process's own, and stands in the answer."""


Handlers = dict[type[Message], Any]
"""What takes each kind of message."""


class Fault(Struct, frozen=True, array_like=True):
    """A `DomainError` on its way. `kind` is its class's name: several share a code."""

    kind: str
    message: str
    details: str | None
    retry_after: float | None
    after_first_token: bool
    backend: str | None

    @classmethod
    def of(cls, error: DomainError) -> "Fault":
        """What there is to tell of an error."""
        # A class that only one room knows travels as the one that all know.
        kind = next((each.__name__ for each in type(error).__mro__ if each.__name__ in _KINDS), InternalError.__name__)
        return cls(kind, error.message, error.details, error.retry_after, error.after_first_token, error.backend)

    def error(self) -> DomainError:
        """The error again."""
        kind = _KINDS[self.kind]
        error = kind.__new__(kind)
        DomainError.__init__(error, self.details, message=self.message, retry_after=self.retry_after)
        error.after_first_token = self.after_first_token
        error.backend = self.backend
        return error


_KINDS: dict[str, type[DomainError]] = {
    name: each
    for name, each in vars(errors).items()
    if isinstance(each, type) and issubclass(each, DomainError) and each is not DomainError
}
