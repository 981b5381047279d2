"""One attempt at a backend, for those who watch: its span, and what the recorder is told when it has ended."""

from types import TracebackType

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime

from ai_ticket.errors import DomainError, InternalError
from ai_ticket.event import Completion, Event
from ai_ticket.interfaces import AttemptOutcome, BackendRecorder
from ai_ticket.spans import Span

SPAN = "kobold.get_completion"
CHAT, TEXT = "chat", "text_completion"
"""`gen_ai.operation.name`, by OpenTelemetry's conventions for generative AI."""


class Attempt:
    """A context in which an attempt is made. Whatever ends it, ends with it.

    `begun`: the clock's time when it began.
    """

    def __init__(
        self,
        *,
        backend: str,
        endpoint: str,
        model: str | None,
        event: Event,
        clock: IReactorTime,
        recorder: BackendRecorder,
        parent: Span,
    ):
        """@param endpoint: the path. @param model: what the backend runs, as far as is known."""
        self._backend = backend
        self._endpoint = endpoint
        self._clock = clock
        self._recorder = recorder
        self.begun = clock.seconds()
        self._first_token: float | None = None
        self._completion: Completion | None = None
        self.span = parent.child(SPAN, kind="client")
        if self.span.recording:
            host, _, port = backend.rpartition(":")
            self.span.set(
                {
                    "gen_ai.operation.name": CHAT if "chat" in endpoint else TEXT,
                    "gen_ai.provider.name": "koboldcpp",
                    "gen_ai.request.model": model,
                    "gen_ai.request.max_tokens": event.parameters.max_tokens,
                    "gen_ai.request.temperature": event.parameters.temperature,
                    "gen_ai.request.top_p": event.parameters.top_p,
                    "gen_ai.request.top_k": event.parameters.top_k,
                    "gen_ai.request.seed": event.parameters.seed,
                    "server.address": host.strip("[]") or backend,
                    "server.port": int(port) if port.isdigit() else None,
                    "url.path": endpoint,
                }
            )

    def __enter__(self) -> "Attempt":
        return self

    def token_came(self) -> None:
        """Some text of the answer has come."""
        if self._first_token is None:
            self._first_token = self._clock.seconds() - self.begun

    def completed(self, completion: Completion) -> None:
        """The answer is complete."""
        self._completion = completion

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = _outcome(error)
        completion = self._completion
        seconds = self._clock.seconds() - self.begun
        usage = None if completion is None else completion.usage
        self._recorder.attempt_ended(
            AttemptOutcome(self._backend, self._endpoint, outcome, seconds, self._first_token, usage)
        )
        if outcome != "ok":
            self.span.fail(outcome)
        elif completion is not None and self.span.recording:
            self.span.set(
                {
                    "gen_ai.response.model": completion.model,
                    "gen_ai.response.finish_reasons": [completion.finish_reason],
                    "gen_ai.usage.input_tokens": None if usage is None else usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": None if usage is None else usage.completion_tokens,
                }
            )
        self.span.end()


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, DomainError):
        return error.code
    return "cancelled" if isinstance(error, CancelledError | GeneratorExit) else InternalError.code
