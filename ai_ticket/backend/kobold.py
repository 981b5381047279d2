"""One attempt at a completion on a KoboldCPP-compatible server."""

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ai_ticket.backend.attempt import Attempt
from ai_ticket.backend.body import Body
from ai_ticket.backend.context import fit
from ai_ticket.backend.dialect import ENDPOINTS, Endpoint
from ai_ticket.backend.figures import put_right
from ai_ticket.backend.generation import Generation
from ai_ticket.backend.http1_connection import Response
from ai_ticket.backend.probe import KOBOLD_API, KOBOLDCPP, LLAMACPP, learn, short_model_name
from ai_ticket.backend.relay import Relay
from ai_ticket.backend.server import ModelServer, NoSuchEndpoint
from ai_ticket.backend.sse import EventTooLarge, SSEDecoder
from ai_ticket.backend.tokens import tokenize
from ai_ticket.errors import (
    ApiConnectionError,
    ApiEndpointMissing,
    ApiResponseFormatError,
    ApiResponseStructureError,
    ApiServerError,
    DeadlineExceeded,
    DomainError,
)
from ai_ticket.event import Completion, Event, FinishReason
from ai_ticket.interfaces import BackendRecorder, BackendState, Sink, Tokens
from ai_ticket.spans import NO_SPAN, Span

PROBE_SECONDS = 5.0
LARGEST_BODY = 67_108_864


class BackendTimeouts(Struct, frozen=True):
    """Seconds: until the first token (None: what the deadline leaves), and between two of them."""

    first_token: float | None
    idle: float


class _Aborted(Struct):
    """KoboldCPP's answer to an abort; its booleans are strings."""

    success: str


class KoboldBackend:
    """A model server behind the `Backend` seam."""

    _log = Logger()

    def __init__(
        self,
        name: str,
        server: ModelServer,
        *,
        clock: IReactorTime,
        timeouts: BackendTimeouts,
        slots: int | None,
        new_key: Callable[[], str],
        recorder: BackendRecorder,
    ):
        """@param slots: generations at a time; None for what the server says. @param new_key: a fresh random key."""
        self._recorder = recorder
        self._server = server
        self._clock = clock
        self._timeouts = timeouts
        self._slots = slots
        self._new_key = new_key
        self._missing: set[Endpoint] = set()
        self._state = BackendState(name=name, up=False, slots=slots or 1, error="not yet asked")

    @property
    def state(self) -> BackendState:
        """What was last learnt of it, from memory."""
        return self._state

    async def probe(self) -> BackendState:
        """Ask the server what it is, without generating anything."""
        try:
            async with self._server.aside:
                info = await learn(self._server, PROBE_SECONDS)
        except DomainError as error:
            self._state = replace(self._state, up=False, error=error.details or error.message)
            return self._state
        found = BackendState(
            name=self._state.name,
            up=True,
            slots=self._slots or max(1, info.slots or 1),
            kind=info.kind,
            version=info.version,
            model=info.model,
            context_length=info.context_length,
            tools=info.tools,
        )
        self.adopt(found)
        return found

    def adopt(self, state: BackendState) -> None:
        """Go by what a probe has found, or an attempt: here, or in another process."""
        if state.up:
            # It may be another server, or another version meanwhile: which endpoints it has is open again.
            self._missing = {one for one in ENDPOINTS if one.openai} if state.kind == KOBOLD_API else set()
            self._server.keeps_connections = state.kind == LLAMACPP
        self._state = state

    async def tokenize(self, text: str) -> Tokens | None:
        """The text's tokens by the server's own count; None where it does not tell."""
        async with self._server.aside:
            return await tokenize(text, self._server, self._state.kind, PROBE_SECONDS)

    async def settle(self) -> None:
        """Wait until the server has been told of every generation that was to be stopped, or could not be."""
        async with self._server.aside:
            pass  # who asks later has its turn later

    async def complete(
        self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
    ) -> Completion:
        """Generate the whole answer, on the best endpoint that the server has."""
        try:
            completion = await self._complete(event, deadline, sink, span)
        except ApiConnectionError as error:
            if not error.after_first_token and self._state.up:
                self._log.warn("backend {backend} is down: {reason}", backend=self._state.name, reason=error.details)
            if not error.after_first_token:
                self._state = replace(self._state, up=False, error=error.details)
            raise
        if not self._state.up:
            self._state = replace(self._state, up=True, error=None)
        return completion

    async def _complete(self, event: Event, deadline: float, sink: Sink | None, span: Span) -> Completion:
        event = await fit(event, self._server, self._state, PROBE_SECONDS)
        endpoint = self._endpoint(event)
        while True:
            endpoint.check(event, self._state)
            try:
                return await self._attempt(endpoint, event, deadline, sink, span)
            except NoSuchEndpoint as error:
                self._missing.add(endpoint)
                tried, endpoint = endpoint, self._endpoint(event, error)
                self._log.warn(
                    "backend {backend} has no {path} ({reason}), using {next} instead",
                    backend=self._state.name,
                    path=tried.path,
                    reason=error.details,
                    next=endpoint.path,
                )

    def _endpoint(self, event: Event, error: NoSuchEndpoint | None = None) -> Endpoint:
        """The best that the server has, as far as is known."""
        for endpoint in ENDPOINTS:
            if endpoint.takes(event) and endpoint not in self._missing:
                return endpoint
        self._missing.clear()  # who comes next tries all of them again
        raise ApiEndpointMissing(None if error is None else error.details)

    async def _attempt(
        self, endpoint: Endpoint, event: Event, deadline: float, sink: Sink | None, span: Span
    ) -> Completion:
        with Attempt(
            backend=self._state.name,
            endpoint=endpoint.path,
            model=self._state.model,
            event=event,
            clock=self._clock,
            recorder=self._recorder,
            parent=span,
        ) as attempt:
            generation = await self._generate(endpoint, event, deadline, sink, attempt)
            completion = await self._completion(generation, event, deadline)
            attempt.completed(completion)
            return completion

    async def _generate(
        self, endpoint: Endpoint, event: Event, deadline: float, sink: Sink | None, attempt: Attempt
    ) -> Generation:
        left = deadline - attempt.begun
        first_token = min(left, self._timeouts.first_token or left)
        key = self._new_key()
        generation = self._generation(endpoint, event, sink)
        payload = endpoint.payload(event, key, self._state.kind)
        try:
            response = await self._server.post(
                endpoint.path, payload, first_token, generation.was_sent, attempt.span.headers()
            )
            if endpoint.streams and response.media_type == "text/event-stream":
                await self._read_stream(response, endpoint, generation, first_token, attempt)
            else:
                await self._read_whole(response, endpoint, generation, first_token, attempt)
            if generation.finish_reason == "error":
                raise ApiServerError("the server says that generating failed")
        except CancelledError:
            self._stop(generation, key)
            raise
        except DomainError as error:
            if isinstance(error, DeadlineExceeded):
                self._stop(generation, key)
            error.after_first_token = generation.begun
            raise
        return generation

    def _generation(self, endpoint: Endpoint, event: Event, sink: Sink | None) -> Generation:
        if sink is None or event.chunks is None:
            return Generation(sink)
        relay = Relay(
            event.chunks,
            sink,
            chat=event.raw_prompt is None,
            framed=endpoint.frames(event),
            model=lambda: self._model(generation),
        )
        generation = Generation(sink, relay)
        return generation

    def _model(self, generation: Generation) -> str:
        """The name for callers of what answers."""
        return short_model_name(generation.model) or self._state.model or "unknown"

    def _stop(self, generation: Generation, key: str) -> None:
        """Have KoboldCPP stop a generation by its key: of a stream that is closed it takes half a second to notice.

        Only where the server may have the key, which it gets but once: one that it does not know it keeps for ever.
        """
        if self._state.kind == KOBOLDCPP and generation.sent:
            stopping = Deferred.fromCoroutine(self._abort(key))
            stopping.addErrback(lambda failure: self._log.debug("abort: {reason}", reason=str(failure.value)))

    async def _abort(self, key: str) -> None:
        async with self._server.aside:
            await self._server.ask("/api/extra/abort", {"genkey": key}, _Aborted, PROBE_SECONDS)

    async def _read_stream(
        self,
        response: Response,
        endpoint: Endpoint,
        generation: Generation,
        first_token: float,
        attempt: Attempt,
    ) -> None:
        decoder = SSEDecoder()

        def received(data: bytes) -> None:
            try:
                for found in decoder.feed(data):
                    endpoint.read(found, generation)
                    if generation.done:
                        break  # whatever comes behind the end is none of ours
            except EventTooLarge:
                raise ApiResponseFormatError("an event of the stream is too large")
            finally:
                generation.flush()
            if generation.begun:
                attempt.token_came()
            if generation.done:
                body.complete()
            elif generation.begun:
                body.alive()

        body = Body(self._clock, received, first=first_token, idle=self._timeouts.idle, since=attempt.begun)
        reading = body.read(response)
        if generation.sink is not None:
            generation.sink.attach(body)
        await reading
        if generation.finish_reason is None:
            raise ApiResponseStructureError("the stream ended without its end")

    async def _read_whole(
        self, response: Response, endpoint: Endpoint, generation: Generation, timeout: float, attempt: Attempt
    ) -> None:
        """An answer in one piece: from the endpoint that has no stream, or a server that ignores our asking for one."""
        body = await self._server.read(response, timeout, LARGEST_BODY, since=attempt.begun)
        if endpoint.streams:
            raise _not_a_stream(response, body)
        endpoint.read(body, generation)
        generation.flush()

    async def _completion(self, generation: Generation, event: Event, deadline: float) -> Completion:
        usage, reason = generation.usage, generation.finish_reason
        if self._state.kind in (KOBOLDCPP, KOBOLD_API):
            left = deadline - self._clock.seconds()
            usage, reason = await put_right(usage, reason, event.parameters.max_tokens, self._server, left)
        finish_reason: FinishReason = "length" if reason == "length" else "stop"
        completion = Completion(
            generation.text,
            "tool_calls" if generation.called and finish_reason == "stop" else finish_reason,
            self._model(generation),
            usage,
            self._state.name,
            generation.tool_calls,
            generation.reasoning,
            generation.logprobs,
        )
        if generation.relay is not None:
            generation.relay.end(completion)
        return completion


def _not_a_stream(response: Response, body: bytes) -> DomainError:
    """What it means that an answer to a request for a stream is none: KoboldCPP says `null` to what it can't read."""
    if response.media_type != "application/json":
        return ApiResponseFormatError(f"the answer is {response.media_type or 'of no type'}, not a stream of events")
    return ApiResponseStructureError("the answer is JSON but not a stream" if body.strip() else "an empty reply")
