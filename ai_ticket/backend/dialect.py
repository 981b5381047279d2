"""What the endpoints of KoboldCPP-compatible servers take and give: requests built, stream events read. Pure.

Every endpoint but the last is asked to stream, also for one answer: closing a stream is the only way to stop every
server's generation, and tokens that come are the only sign that it lives.
"""

from typing import Any

import msgspec
from msgspec import Struct

from ai_ticket.backend.fields import fields, refused
from ai_ticket.backend.generation import Generation
from ai_ticket.backend.server import decode
from ai_ticket.errors import ApiResponseStructureError, ApiServerError, UnsupportedParameter
from ai_ticket.event import Event, Usage
from ai_ticket.interfaces import BackendState


class _Function(Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _Call(Struct, gc=False):
    """Some of a call of a tool."""

    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(Struct, gc=False):
    content: str | None = None
    tool_calls: list[_Call] | None = None
    reasoning_content: str | None = None


class _Logprobs(Struct, gc=False):
    content: msgspec.Raw = msgspec.Raw(b"null")


class _Choice(Struct, gc=False):
    index: int | None = None
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


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


class Endpoint(Struct, frozen=True):
    """A path that generates, and how to speak to it.

    `chat`: it takes a conversation; the others a prompt. `openai`: it takes and gives what OpenAI's does.
    """

    path: str
    streams: bool = True
    chat: bool = False
    openai: bool = False

    def takes(self, event: Event) -> bool:
        """Whether the event may be sent here: a raw prompt goes to where no template is put around it."""
        return not self.chat or event.raw_prompt is None

    def frames(self, event: Event) -> bool:
        """Whether its stream has the chunks that the event wants."""
        return self.openai and self.chat == (event.raw_prompt is None)

    def check(self, event: Event, state: BackendState) -> None:
        """Whether a server can do here all that the event asks for.

        @raise UnsupportedParameter: it can't.
        """
        name = refused(event, state, chat=self.chat, openai=self.openai)
        if name is not None:
            raise UnsupportedParameter(name, message=f"The model server can't do what `{name}` asks for.")

    def payload(self, event: Event, key: str, kind: str | None) -> dict[str, Any]:
        """The body of a request to a server of this kind. `key` names the generation, for stopping it."""
        body: dict[str, Any] = {"messages": event.messages} if self.chat else {"prompt": event.prompt}
        body |= fields(event, kind, openai=self.openai)
        if self.openai:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        body["genkey"] = key
        return body

    def read(self, data: bytes, generation: Generation) -> None:
        """Take in the data of one event, or the whole body where the endpoint does not stream.

        @raise ApiResponseFormatError: it is not JSON. @raise ApiResponseStructureError: it is of another shape.
        @raise ApiServerError: the server says that generating failed.
        """
        raise NotImplementedError


class _OpenAIEndpoint(Endpoint, frozen=True):
    def read(self, data: bytes, generation: Generation) -> None:
        if data == b"[DONE]":
            generation.done = True
            return
        chunk = decode(data, _Chunk)
        if chunk.error is not msgspec.UNSET and bytes(chunk.error) != b"null":
            raise ApiServerError("the server reported an error in its stream")
        if chunk.choices is None and chunk.usage is None:
            raise ApiResponseStructureError("an event of the stream has no choices")
        for choice in chunk.choices or ():
            if not choice.index:  # one answer is asked for: what a server gives beyond it is none of its text
                _read_choice(choice, generation)
        generation.model = chunk.model or generation.model
        if chunk.usage is not None:
            generation.usage = chunk.usage.whole()
        if generation.relay is not None and generation.relay.framed:
            if chunk.choices:
                generation.relay.take(data, last=generation.finish_reason is not None)
            elif chunk.usage is not None:
                generation.relay.take_counts(data, generation.usage)


def _read_choice(choice: _Choice, generation: Generation) -> None:
    text = choice.text
    delta = choice.delta
    if delta is not None:
        text = delta.content
        if delta.reasoning_content:
            generation.add_reasoning(delta.reasoning_content)
        for position, call in enumerate(delta.tool_calls or ()):
            function = call.function or _Function()
            index = position if call.index is None else call.index
            generation.add_call(index, call.id, function.name, function.arguments)
    if text:
        generation.add(text)
    if choice.logprobs is not None and bytes(choice.logprobs.content).startswith(b"["):
        generation.add_logprobs(bytes(choice.logprobs.content))
    if choice.finish_reason is not None:
        generation.finish_reason = choice.finish_reason


class _Kobold(Endpoint, frozen=True):
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
    _OpenAIEndpoint("/v1/chat/completions", chat=True, openai=True),
    _OpenAIEndpoint("/v1/completions", openai=True),
    _Kobold("/api/extra/generate/stream"),
    _KoboldWhole("/api/v1/generate", streams=False),
)
"""Best first: a chat endpoint keeps the roles, and KoboldCPP's own stream can at least be stopped."""
