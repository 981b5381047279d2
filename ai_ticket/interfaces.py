"""The seams between the rooms."""

from typing import Protocol

from msgspec import Struct
from twisted.internet.interfaces import IPushProducer

from ai_ticket.event import Completion, Event


class Client(Struct, frozen=True):
    """Who calls. `key` tells clients apart without giving away a token; `name` is what the token file calls it."""

    key: str
    name: str | None
    address: str


class BackendState(Struct, frozen=True):
    """What was last learnt of a model server, without asking it. `error` says why it can't be used, where it can't."""

    name: str
    up: bool
    slots: int
    kind: str | None = None
    version: str | None = None
    model: str | None = None
    context_length: int | None = None
    error: str | None = None


class Sink(Protocol):
    """Takes an answer's text as it comes, and may ask for it to come slower."""

    def write(self, text: str) -> None:
        """Some text has come; never empty."""

    def attach(self, producer: IPushProducer) -> None:
        """From here the text comes: pausing it slows the model server's stream down."""


class Backend(Protocol):
    """A model server."""

    @property
    def state(self) -> BackendState:
        """What was last learnt of it, from memory."""

    async def complete(self, event: Event, deadline: float, sink: Sink | None = None) -> Completion:
        """Generate an answer, in one attempt.

        @param deadline: the clock's time by which it must be done, in seconds.
        @param sink: takes the text as it comes; the `Completion` then has none.
        @raise DomainError: one of the `Api...` errors, `ContextLengthExceeded` or `DeadlineExceeded`; its
            `after_first_token` says whether some of the answer had come.
        """

    async def probe(self) -> BackendState:
        """Ask the server what it is, without generating anything. Never fails: the state says what is wrong."""


class Pipeline(Protocol):
    """Takes events in, and answers each when its turn has come."""

    async def submit(self, event: Event, client: Client, deadline: float, sink: Sink | None = None) -> Completion:
        """Wait for a slot and generate.

        @param deadline: the clock's time by which it must be done, in seconds.
        @param sink: takes the text as it comes; the `Completion` then has none.
        @raise DomainError: `Overloaded`, `DeadlineExceeded`, or what the backend raises.
        """


class Recorder(Protocol):
    """Is told what happens at the HTTP surface. All arguments come from fixed sets but for the seconds."""

    def request_started(self) -> None:
        """A request's head has come."""

    def request_finished(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered, or its caller left (status 499)."""

    def authentication_failed(self, reason: str) -> None:
        """A request had no token (`missing`) or a wrong one (`invalid`)."""
