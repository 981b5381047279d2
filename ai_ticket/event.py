"""Events and completions: values, and how a request's body becomes an event (contract, "The event"). Pure."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from ai_ticket import strictjson
from ai_ticket.content import Message, Options, ToolCall, absent, read_content
from ai_ticket.errors import (
    InvalidInputFormat,
    InvalidParameter,
    InvalidRequest,
    MissingContentField,
)
from ai_ticket.strictjson import LONE_SURROGATE_MARK, JSONError

FinishReason = Literal["stop", "length", "tool_calls"]
"""Why an answer ended; `tool_calls` only where tools were offered."""

LARGEST_SEED = 2**32 - 1
LONGEST_TEXT = 16_777_216
"""Characters of a completion: more than any model writes."""

LARGEST_TOP_K = 2**31 - 1
"""More than any vocabulary has tokens, and the most that a server's 32-bit integer holds: larger ones mean the same."""


class Parameters(Struct, frozen=True, omit_defaults=True):
    """How to generate. What is None is left to the model server."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None


class Chunks(Struct, frozen=True):
    """An answer in pieces as OpenAI's chunks, all with this `id`; `created` is in seconds since 1970.

    `usage`: the last of them is to tell the tokens.
    """

    id: str
    created: int
    usage: bool = False


class Event(Struct, frozen=True):
    """A caller's event, validated: a conversation, or a `raw_prompt` and no messages; and how to answer it.

    `max_tokens_given` says that the caller named `max_tokens`; a default may be lowered to what fits the context.

    `extra` are further fields for the model server, by OpenAI's names or KoboldCPP's, each value as JSON text. A server
    that can't have one of them refuses it. `chunks`: a sink gets OpenAI's chunks, not texts.

    `key` is what its caller calls the generation, to ask after it and to stop it (`interfaces.Generations`): maybe
    nothing, or what others call theirs; None where the caller can do neither.
    """

    messages: list[Message]
    parameters: Parameters
    max_tokens_given: bool = True
    stream: bool = False
    metadata: dict[str, str] | None = None
    raw_prompt: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    chunks: Chunks | None = None
    key: str | None = None

    @property
    def prompt(self) -> str:
        """For endpoints that take only a prompt: the raw one, or the user's texts, a line each."""
        if self.raw_prompt is not None:
            return self.raw_prompt
        return "\n".join(message.content for message in self.messages if message.role == "user")


class Usage(Struct, frozen=True):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(Struct, frozen=True):
    """A model's whole answer. `usage` is None where no token counts are told; `backend` is whose answer it is.

    `reasoning` is what the model thought before it answered, where the server tells the two apart. `logprobs` is what
    it says of each token, as JSON text of an array, where that was asked for.
    """

    text: str
    finish_reason: FinishReason
    model: str
    usage: Usage | None
    backend: str = ""
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    logprobs: str | None = None


class EventLimits(Struct, frozen=True):
    """Tokens: what an event may ask for, and what one gets that asks for nothing."""

    max_tokens: int
    default_max_tokens: int


class _StrictOptions(Options, forbid_unknown_fields=True):
    """`parameters` itself, where an unknown key is an error."""


class _Envelope(Struct):
    content: Raw | UnsetType = UNSET
    parameters: Raw | UnsetType = UNSET
    stream: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


_OPTION_TYPES: dict[str, tuple[Any, str]] = {
    "temperature": (Annotated[float, Meta(ge=0, le=5)], "a number from 0 to 5"),
    "top_p": (Annotated[float, Meta(gt=0, le=1)], "a number above 0 and up to 1"),
    "top_k": (Annotated[int, Meta(ge=0)], "a whole number of 0 or more"),
    "min_p": (Annotated[float, Meta(ge=0, le=1)], "a number from 0 to 1"),
    "seed": (Annotated[int, Meta(ge=0, le=LARGEST_SEED)], f"a whole number from 0 to {LARGEST_SEED}"),
    "stop": (
        Annotated[str, Meta(min_length=1)]
        | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=16)],
        "a non-empty string, or 1 to 16 of them",
    ),
}
_METADATA = dict[str, str | None]
MOST_METADATA = 16


def parse_event(body: bytes, limits: EventLimits, *, marked: bool = False) -> Event:
    """Read an event from its JSON text.

    @param marked: lone surrogates were replaced already (`strictjson.mark_lone_surrogates`).
    @raise DomainError: one of `InvalidRequest`, `InvalidInputFormat`, `MissingContentField`, `InvalidParameter`,
        `PromptExtractionFailed`; its details name the JSON path.
    """
    try:
        strictjson.check(body)
        envelope, marked_now = _read_envelope(body)
    except JSONError as error:
        raise InvalidRequest(str(error), message="The event is not valid JSON.")
    if isinstance(envelope.content, UnsetType):
        raise MissingContentField

    messages, inner_options = read_content(envelope.content)
    parameters, max_tokens_given = _read_parameters(envelope, inner_options, limits)
    stream = _read_field(envelope.stream, bool, "stream", "must be true or false")
    metadata = _read_field(envelope.metadata, _METADATA, "metadata", "must be an object of up to 16 string values")
    if metadata is not None:
        metadata = {key: value for key, value in metadata.items() if value is not None}
        if len(metadata) > MOST_METADATA:
            raise InvalidParameter("metadata must be an object of up to 16 string values")
    event = Event(messages, parameters, max_tokens_given, bool(stream), metadata)
    if marked or marked_now:
        _refuse_lone_surrogates(event)
    return event


def _read_envelope(body: bytes) -> tuple[_Envelope, bool]:
    """The top-level fields, and whether lone surrogates had to be marked (the decoder refuses them even unread)."""
    try:
        return _decode_envelope(body), False
    except JSONError:
        marked = strictjson.mark_lone_surrogates(body)
        if marked == body:
            raise
        return _decode_envelope(marked), True


def _decode_envelope(body: bytes) -> _Envelope:
    try:
        return strictjson.decode(body, _Envelope)
    except msgspec.ValidationError:
        strictjson.decode(body, Raw)  # at the first byte it is clear that it is no object, but not that it is JSON
        raise InvalidInputFormat


def _read_parameters(envelope: _Envelope, inner: Options | None, limits: EventLimits) -> tuple[Parameters, bool]:
    try:
        outer = _StrictOptions() if absent(envelope.parameters) else _decode_options(envelope.parameters)
    except msgspec.ValidationError as error:
        raise InvalidParameter(_unknown_parameter(str(error)))
    values: dict[str, Any] = {}
    for source, path in ((outer, "parameters"), (inner, "content")):
        if source is None:
            continue
        for name in Options.__struct_fields__:
            raw = getattr(source, name)
            if not absent(raw):
                values[name] = _read_option(name, raw, f"{path}.{name}", limits)
    given = "max_tokens" in values
    values.setdefault("max_tokens", min(limits.default_max_tokens, limits.max_tokens))
    return Parameters(**values), given


def _unknown_parameter(message: str) -> str:
    """Name the path of the parameter that msgspec calls an unknown field, or say what `parameters` must be."""
    name = message.partition("unknown field `")[2].rpartition("`")[0]
    return f"parameters.{name[:64]} is not a parameter" if name else "parameters must be an object"


def _decode_options(raw: Raw | UnsetType) -> Options:
    return strictjson.decode(raw, _StrictOptions)  # type: ignore[arg-type]


def _read_option(name: str, raw: Raw, path: str, limits: EventLimits) -> Any:
    if name == "max_tokens":
        type_ = Annotated[int, Meta(ge=1, le=limits.max_tokens)]
        return _read_field(raw, type_, path, f"must be a whole number from 1 to {limits.max_tokens}")
    type_, allowed = _OPTION_TYPES[name]
    value = _read_field(raw, type_, path, f"must be {allowed}")
    if name == "top_k":
        return min(value, LARGEST_TOP_K)
    return [value] if isinstance(value, str) else value


def _read_field(raw: Raw | UnsetType, type: Any, path: str, wanted: str) -> Any:
    """The field's value, or None where it is absent."""
    if absent(raw):
        return None
    try:
        return strictjson.decode(raw, type)  # type: ignore[arg-type]
    except (msgspec.ValidationError, JSONError):
        raise InvalidParameter(f"{path} {wanted}")


def _refuse_lone_surrogates(event: Event) -> None:
    read = [message.content for message in event.messages]
    read += event.parameters.stop or []
    read += [text for pair in (event.metadata or {}).items() for text in pair]
    if any(LONE_SURROGATE_MARK in text for text in read):
        raise InvalidRequest("a lone surrogate in a text", message="The event is not valid JSON.")
