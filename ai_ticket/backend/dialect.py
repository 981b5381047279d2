"""What the endpoints of KoboldCPP-compatible servers take and give: requests built, stream events read. Pure.

Every endpoint but the last is asked to stream, also for one answer: closing a stream is the only way to stop every
server's generation, and tokens that come are the only sign that it lives.
"""

from typing import Any

import msgspec
from msgspec import Struct

from ai_ticket.backend.server import decode
from ai_ticket.errors import ApiResponseFormatError, ApiResponseStructureError, ApiServerError
from ai_ticket.event import Event, Usage
from ai_ticket.interfaces import Sink

LONGEST_TEXT = 16_777_216


class _Delta(Struct, gc=False):
    content: str | None = None


class _Choice(Struct, gc=False):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(Struct, gc=False):
    """Token counts, as far as a server tells them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def whole(self) -> Usage | None:
        """Both counts and their sum, if both are there."""
        if self.prompt_tokens is None or self.completion_tokens is None:
            return None
        return Usage(self.prompt_tokens, self.completion_tokens, self.prompt_tokens + self.completion_tokens)


class _Chunk(Struct, gc=False):
    """A `data:` event of the OpenAI endpoints."""

    choices: list[_Choice] | None = None
    model: str | None = None
    usage: _Usage | None = None
    error: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Token(Struct, gc=False):
    """A `data:` event of KoboldCPP's own stream."""

    token: str
    finish_reason: str | None = None


class _Result(Struct):
    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Results(Struct):
    """The body of KoboldCPP's answer that is not streamed."""

    results: list[_Result]


class Generation:
    """What has come of an answer so far. With a sink the text goes there, and is not kept."""

    def __init__(self, sink: Sink | None = None) -> None:
        self.sink = sink
        self._parts: list[str] = []
        self._size = 0
        self.sent = False
        self.begun = False
        self.finish_reason: str | None = None
        self.model: str | None = None
        self.usage: Usage | None = None
        self.done = False

    def was_sent(self) -> None:
        """The request is on its way."""
        self.sent = True

    def add(self, text: str) -> None:
        """Some text has come.

        @raise ApiResponseFormatError: more than any model writes, which would fill the memory.
        """
        self._size += len(text)
        if self._size > LONGEST_TEXT and self.sink is None:
            raise ApiResponseFormatError("the answer is too large")
        self._parts.append(text)

    def flush(self) -> None:
        """Hand on what has come since the last time: in one piece, however many tokens it was."""
        if not self._parts:
            return
        self.begun = True
        if self.sink is not None:
            text = self.text
            self._parts.clear()
            self.sink.write(text)

    @property
    def text(self) -> str:
        """The text so far, but for what the sink has."""
        return "".join(self._parts)


class Endpoint(Struct, frozen=True):
    """A path that generates, and how to speak to it."""

    name: str
    path: str
    streams: bool = True

    def payload(self, event: Event, key: str) -> dict[str, Any]:
        """The body of a request. `key` names the generation, for stopping it."""
        raise NotImplementedError

    def read(self, data: bytes, generation: Generation) -> None:
        """Take in the data of one event, or the whole body where the endpoint does not stream.

        @raise ApiResponseFormatError: it is not JSON. @raise ApiResponseStructureError: it is of another shape.
        @raise ApiServerError: the server says that generating failed.
        """
        raise NotImplementedError


class _OpenAIEndpoint(Endpoint, frozen=True):
    def payload(self, event: Event, key: str) -> dict[str, Any]:
        options = msgspec.to_builtins(event.parameters)
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        return {**self._input(event), **options, **streaming, "genkey": key}

    def _input(self, event: Event) -> dict[str, Any]:
        raise NotImplementedError

    def read(self, data: bytes, generation: Generation) -> None:
        if data == b"[DONE]":
            generation.done = True
            return
        chunk = decode(data, _Chunk)
        if chunk.error is not msgspec.UNSET and bytes(chunk.error) != b"null":
            raise ApiServerError("the server reported an error in its stream")
        if chunk.choices is None and chunk.usage is None:
            raise ApiResponseStructureError("an event of the stream has no choices")
        for choice in chunk.choices or []:
            text = choice.delta.content if choice.delta is not None else choice.text
            if text:
                generation.add(text)
            if choice.finish_reason is not None:
                generation.finish_reason = choice.finish_reason
        generation.model = chunk.model or generation.model
        if chunk.usage is not None:
            generation.usage = chunk.usage.whole()


class _Chat(_OpenAIEndpoint, frozen=True):
    def _input(self, event: Event) -> dict[str, Any]:
        return {"messages": event.messages}


class _Completions(_OpenAIEndpoint, frozen=True):
    def _input(self, event: Event) -> dict[str, Any]:
        return {"prompt": event.prompt}


class _Kobold(Endpoint, frozen=True):
    def payload(self, event: Event, key: str) -> dict[str, Any]:
        options = msgspec.to_builtins(event.parameters)
        renamed = {"max_tokens": "max_length", "seed": "sampler_seed", "stop": "stop_sequence"}
        own = {renamed.get(name, name): value for name, value in options.items()}
        return {"prompt": event.prompt, **own, "genkey": key}

    def read(self, data: bytes, generation: Generation) -> None:
        token = decode(data, _Token)
        if token.token:
            generation.add(token.token)
        if token.finish_reason is not None:
            generation.finish_reason = token.finish_reason
            generation.done = True


class _KoboldWhole(_Kobold, frozen=True):
    def read(self, data: bytes, generation: Generation) -> None:
        results = decode(data, _Results).results
        if not results:
            raise ApiResponseStructureError("the answer holds no result")
        result = results[0]
        generation.add(result.text)
        generation.finish_reason = result.finish_reason or "length"
        generation.usage = _Usage(result.prompt_tokens, result.completion_tokens).whole()
        generation.done = True


ENDPOINTS: tuple[Endpoint, ...] = (
    _Chat("chat", "/v1/chat/completions"),
    _Completions("completions", "/v1/completions"),
    _Kobold("generate_stream", "/api/extra/generate/stream"),
    _KoboldWhole("generate", "/api/v1/generate", streams=False),
)
"""Best first: a chat endpoint keeps the roles, and KoboldCPP's own stream can at least be stopped."""

FIRST_NATIVE = 2
"""The first of them that is KoboldCPP's own."""
