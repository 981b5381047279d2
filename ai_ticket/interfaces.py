"""The seams between the rooms."""

from typing import Protocol

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer

from ai_ticket.event import Completion, Event, FinishReason, Usage
from ai_ticket.spans import NO_SPAN, Span


class Client(Struct, frozen=True):
    """Who calls.

    `key` tells callers apart in the queue (by token; by address where authentication is off) and `quota` for the rate
    limit (as RATE_LIMIT_BY says), neither giving away a token. `name` is what the token file calls the token, `address`
    the caller's IP address as far as trusted proxies tell it. `weight` is its turns in a round of the queue.
    """

    key: str
    name: str | None
    address: str
    quota: str = ""
    weight: int = 1


class Admission(Struct, frozen=True):
    """What a limiter says to a call.

    `remaining` is how many further calls would be admitted now; `retry_after` the seconds until one more than that
    would be, at the latest: where `admitted` is false, a call at that time is admitted.
    """

    admitted: bool
    remaining: int
    retry_after: float


class Limiter(Protocol):
    """Admits at most `limit` calls of a client within any `window` seconds."""

    limit: int
    window: float

    def admit(self, client: str) -> Deferred[Admission]:
        """Whether a call may go on. An admitted call counts from now on; a refused one uses nothing up."""


class BackendState(Struct, frozen=True):
    """What was last learnt of a model server, without asking it. `error` says why it can't be used, where it can't.

    `tools`: whether its model can be offered any; None where the server does not tell.
    """

    name: str
    up: bool
    slots: int
    kind: str | None = None
    version: str | None = None
    model: str | None = None
    context_length: int | None = None
    tools: bool | None = None
    error: str | None = None


class Tokens(Struct, frozen=True):
    """A text in a model's tokens: how many, and which, where that is known."""

    count: int
    ids: list[int]


class Sink(Protocol):
    """Takes an answer as it comes, and may ask for it to come slower.

    It comes as text, or where the event asks for them as OpenAI's chunks; then the `Completion` has none of it.
    """

    def write(self, text: str) -> None:
        """Some text has come; never empty."""

    def relay(self, chunks: bytes) -> None:
        """Some chunks have come, each a whole server-sent event. The `[DONE]` at the end is not among them."""

    def attach(self, producer: IPushProducer) -> None:
        """From here the text comes: pausing it slows the model server's stream down."""


class Backend(Protocol):
    """A model server."""

    @property
    def state(self) -> BackendState:
        """What was last learnt of it, from memory."""

    async def complete(
        self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
    ) -> Completion:
        """Generate an answer, in one attempt.

        @param deadline: the clock's time by which it must be done, in seconds.
        @param sink: takes the text as it comes; the `Completion` then has none.
        @param span: the operation that it is part of.
        @raise DomainError: one of the `Api...` errors, `ContextLengthExceeded` or `DeadlineExceeded`; its
            `after_first_token` says whether some of the answer had come.
        """

    async def probe(self) -> BackendState:
        """Ask the server what it is, without generating anything. Never fails: the state says what is wrong."""

    async def tokenize(self, text: str) -> Tokens | None:
        """The text's tokens by the server's own count; None where it does not tell.

        @raise DomainError: one of the `Api...` errors, or `DeadlineExceeded`.
        """

    async def settle(self) -> None:
        """Wait until it has been told of every generation that was to be stopped, or could not be. Never fails."""


class Job(Struct, eq=False, kw_only=True):
    """An event on its way through the pipeline.

    `deadline` is the clock's time by which it must be done, in seconds. An event of a `batch` has none until it begins:
    it waits for room as long as it takes, behind the other events of its client, and then has `timeout` seconds.
    `sink` takes the text as it comes; the `Completion` then has none. `span` is the operation that it is part of.

    The pipeline fills in when it was queued, when it began and when it ended.
    """

    event: Event
    client: Client
    timeout: float
    deadline: float | None = None
    batch: bool = False
    sink: Sink | None = None
    span: Span = NO_SPAN
    queued_at: float | None = None
    began_at: float | None = None
    ended_at: float | None = None

    def queue_seconds(self, now: float) -> float:
        """How long it has waited for its turn."""
        return 0.0 if self.queued_at is None else (now if self.began_at is None else self.began_at) - self.queued_at

    def backend_seconds(self, now: float) -> float:
        """How long the backend has taken so far, its retries included."""
        return 0.0 if self.began_at is None else (now if self.ended_at is None else self.ended_at) - self.began_at


class Pipeline(Protocol):
    """Takes events in, and answers each when its turn has come."""

    @property
    def batch_window(self) -> int:
        """How many events a batch is to offer at a time: enough of them to keep all slots busy, and no more."""

    async def submit(self, job: Job) -> Completion:
        """Wait for a slot and generate; cancelling leaves the queue, or stops the generation.

        @raise DomainError: `Overloaded`, `DeadlineExceeded`, or what the backend raises.
        """

    async def check_room(self, client: Client, deadline: float) -> None:
        """Whether an event of this client, submitted now, would be taken in.

        @raise Overloaded: it would not, and is counted as refused.
        """

    def position(self, job: Job) -> int | None:
        """Which place in the queue it has, 1 being the next; None once it has begun."""


class Figures(Struct, frozen=True):
    """How many events wait and are under way, whoever sent them; and what a client itself has had.

    `generations` since the start of the service. Of the last of them: `idle_seconds` since it ended, `prompt_seconds`
    until its first text came, `seconds` from there to its end.
    """

    queue: int
    in_flight: int
    generations: int = 0
    idle_seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    finish_reason: FinishReason | None = None


class Generations(Protocol):
    """What clients may know of their own generations, and do to them. Nobody's key reaches those of another client.

    A `key` is as the client gave it (`Event.key`). With an empty one the client means the only generation that it has.
    """

    async def text(self, client: str, key: str) -> str:
        """What has come so far; empty where there is no such generation."""

    async def stop(self, client: str, key: str) -> bool:
        """End those of this key, as if the model had stopped there.

        Whether it is as the client wants it: there was any, or it has none at all and called no key.
        """

    async def figures(self, client: str) -> Figures:
        """What has been going on."""


class PipelineRecorder(Protocol):
    """Is told what happens in the pipeline."""

    def event_began(self, waited: float) -> None:
        """An event's turn has come, after so many seconds."""

    def event_ended(self, outcome: str, handled: float | None) -> None:
        """An event has ended: `ok`, an error's code, or `cancelled`; `handled` seconds after it began, if it did."""

    def batch_ended(self, size: int, seconds: float) -> None:
        """The last of the events that were taken from the queue together has ended."""


class AttemptOutcome(Struct, frozen=True):
    """How one attempt at a backend went. `endpoint` is a path; `outcome` is `ok`, an error's code, or `cancelled`.

    `seconds` from its begin to its end, `first_token` until some text came, if any did.
    """

    backend: str
    endpoint: str
    outcome: str
    seconds: float
    first_token: float | None
    usage: Usage | None


class BackendRecorder(Protocol):
    """Is told what happens at the backends. All arguments come from fixed sets but for the numbers."""

    def attempt_ended(self, attempt: AttemptOutcome) -> None:
        """An attempt has ended."""


class Recorder(Protocol):
    """Is told what happens at the HTTP surface. All arguments come from fixed sets but for the seconds."""

    def request_started(self) -> None:
        """A request's head has come."""

    def request_finished(
        self, route: str, method: str, status: int, seconds: float, trace_id: str | None = None
    ) -> None:
        """A request was answered, or its caller left (status 499). `trace_id` is of its trace, if that is recorded."""

    def overhead(self, route: str, seconds: float) -> None:
        """What of that time we took ourselves."""

    def authentication_failed(self, reason: str) -> None:
        """A request had no token (`missing`) or a wrong one (`invalid`)."""

    def rate_limited(self, reason: str) -> None:
        """A request was refused: its client's `quota` is used up, or its address sent too many an `invalid_token`."""

    def tls_handshake_failed(self, reason: str) -> None:
        """A connection ended before TLS was up: by a `protocol` error, a `timeout`, or because the peer `closed` it."""

    def connection_ended(self, reason: str) -> None:
        """We ended a connection, or one of HTTP/2's streams.

        Its caller took too long over the head (`header_timeout`), the body (`body_timeout`) or the next request
        (`keepalive_timeout`), took nothing of what waits for it (`unread`), or did not part in time once the last
        answer was given (`close_timeout`). Or there were too many, and while idle it made room for a newcomer
        (`max_connections`, `max_connections_per_client`) or was refused as one (the same with `_refused`).
        """
