"""Events and completions: values, and how a request's body becomes an event (contract, "The event"). Pure."""

from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from ai_ticket import strictjson
from ai_ticket.errors import (
    InvalidInputFormat,
    InvalidParameter,
    InvalidRequest,
    MissingContentField,
    PromptExtractionFailed,
)
from ai_ticket.strictjson import LONE_SURROGATE_MARK, JSONError

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length"]

_ROLES = get_args(Role)

LARGEST_SEED = 2**32 - 1
LARGEST_TOP_K = 2**31 - 1
"""More than any vocabulary has tokens, and the most that a server's 32-bit integer holds: larger ones mean the same."""


class Message(Struct, frozen=True, gc=False):
    """One message of a conversation."""

    role: Role
    content: str


class Parameters(Struct, frozen=True, omit_defaults=True):
    """How to generate. What is None is left to the model server."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None


class Event(Struct, frozen=True):
    """A caller's event, validated: a conversation with at least one user message, and how to answer it.

    `max_tokens_given` says that the caller named `max_tokens`; a default may be lowered to what fits the context.
    """

    messages: list[Message]
    parameters: Parameters
    max_tokens_given: bool = True
    stream: bool = False
    metadata: dict[str, str] | None = None

    @property
    def prompt(self) -> str:
        """For endpoints that take only a prompt: the user's texts, a line each."""
        return "\n".join(message.content for message in self.messages if message.role == "user")


class Usage(Struct, frozen=True):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(Struct, frozen=True):
    """A model's whole answer. `usage` is None where the server tells no token counts."""

    text: str
    finish_reason: FinishReason
    model: str
    usage: Usage | None


class EventLimits(Struct, frozen=True):
    """Tokens: what an event may ask for, and what one gets that asks for nothing."""

    max_tokens: int
    default_max_tokens: int


class _Part(Struct, gc=False):
    text: str
    type: Literal["text"]


class _Message(Struct, gc=False):
    role: Role
    content: str | list[_Part]


class _Item(Struct, gc=False):
    """An item of a content array that is not a text: a prompt, a message or messages."""

    prompt: str | None = None
    role: str | None = None
    content: str | list[_Part] | None = None
    messages: list[_Message] | None = None


class _Options(Struct):
    """The keys of `parameters`, read when their last occurrence is known."""

    max_tokens: Raw | UnsetType = UNSET
    temperature: Raw | UnsetType = UNSET
    top_p: Raw | UnsetType = UNSET
    top_k: Raw | UnsetType = UNSET
    min_p: Raw | UnsetType = UNSET
    seed: Raw | UnsetType = UNSET
    stop: Raw | UnsetType = UNSET


class _StrictOptions(_Options, forbid_unknown_fields=True):
    """`parameters` itself, where an unknown key is an error."""


class _ContentObject(_Options):
    """An object as content: messages or a prompt, and options that win over `parameters`."""

    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET


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
_METADATA = Annotated[dict[str, str | None], Meta(max_length=16)]


def parse_event(body: bytes, limits: EventLimits) -> Event:
    """Read an event from the JSON text of a request's body.

    @raise DomainError: one of `InvalidRequest`, `InvalidInputFormat`, `MissingContentField`, `InvalidParameter`,
        `PromptExtractionFailed`; its details name the JSON path.
    """
    try:
        strictjson.check(body)
        envelope, marked = _read_envelope(body)
    except JSONError as error:
        raise InvalidRequest(str(error), message="The body is not valid JSON.")
    if isinstance(envelope.content, UnsetType):
        raise MissingContentField

    messages, inner_options = _read_content(envelope.content)
    parameters, max_tokens_given = _read_parameters(envelope, inner_options, limits)
    stream = _read_field(envelope.stream, bool, "stream", "must be true or false")
    metadata = _read_field(envelope.metadata, _METADATA, "metadata", "must be an object of up to 16 string values")
    if metadata is not None:
        metadata = {key: value for key, value in metadata.items() if value is not None}
    event = Event(messages, parameters, max_tokens_given, bool(stream), metadata)
    if marked:
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
        raise InvalidInputFormat


def _read_content(content: Raw) -> tuple[list[Message], _Options | None]:
    kind = _first_byte(content)
    if kind == '"':
        return _read_text(_decode_read(content, str, "content"))
    if kind == "{":
        return _read_object(content, "content")
    if kind == "[":
        return _require_prompt(_read_array(content), "content"), None
    raise PromptExtractionFailed(f"content: a string, an object or an array is wanted, not {_kind(content)}")


def _read_text(text: str) -> tuple[list[Message], _Options | None]:
    """A string is the prompt, unless it is the JSON text of an object or array that holds one."""
    if text.lstrip(" \t\r\n")[:1] in ("{", "["):
        try:
            inner = text.encode()
            strictjson.check(inner)
            return _read_content(strictjson.decode(inner, Raw))
        except (JSONError, PromptExtractionFailed, InvalidRequest):
            pass  # it holds no prompt, so it is one
    return _require_prompt([Message("user", text)], "content"), None


def _read_object(content: Raw, path: str) -> tuple[list[Message], _Options]:
    found = _decode_read(content, _ContentObject, path)
    messages = _read_messages(found.messages, f"{path}.messages")
    if not messages:
        if _absent(found.prompt):
            raise PromptExtractionFailed(f"{path}: neither messages nor a prompt")
        messages = [Message("user", _decode_read(found.prompt, str, f"{path}.prompt"))]
    return _require_prompt(messages, path), found


def _read_array(content: Raw) -> list[Message]:
    """The items in order; consecutive plain texts become one user message, a line each."""
    messages: list[Message] = []
    texts: list[str] = []
    items: list[str | _Item] = _decode_read(content, list[str | _Item], "content")
    if items and isinstance(items[0], str) and set(map(type, items)) == {str}:  # the fastest way through many of them
        return [Message("user", "\n".join(items))]  # type: ignore[arg-type]
    for index, item in enumerate(items):
        if isinstance(item, str):
            texts.append(item)
        elif item.prompt is not None and item.content is None and not item.messages:
            texts.append(item.prompt)
        else:
            found = _read_messages_item(item, index)
            if texts:
                messages.append(Message("user", "\n".join(texts)))
                texts = []
            messages += found
    if texts:
        messages.append(Message("user", "\n".join(texts)))
    return messages


def _read_messages_item(item: _Item, index: int) -> list[Message]:
    if item.messages:
        return [Message(message.role, _text(message.content)) for message in item.messages]
    if item.role in _ROLES and item.content is not None:
        return [Message(item.role, _text(item.content))]  # type: ignore[arg-type]
    path = f"content[{index}]"
    if item.role is not None and item.role not in _ROLES:
        raise PromptExtractionFailed(f"{path}.role: must be one of {', '.join(_ROLES)}")
    if item.role is not None or item.content is not None:
        missing = "role" if item.role is None else "content"
        raise PromptExtractionFailed(f"{path}: a message needs a role and content, {missing} is missing")
    raise PromptExtractionFailed(f"{path}: neither a text nor a message")


def _read_messages(raw: Raw | UnsetType, path: str) -> list[Message]:
    if _absent(raw):
        return []
    found: list[_Message] = _decode_read(raw, list[_Message], path)
    return [Message(message.role, _text(message.content)) for message in found]


def _text(content: str | list[_Part]) -> str:
    return content if isinstance(content, str) else "".join([part.text for part in content])


def _require_prompt(messages: list[Message], path: str) -> list[Message]:
    if not any(message.role == "user" and message.content.strip() for message in messages):
        raise PromptExtractionFailed(f"{path}: no user message with text")
    return messages


def _decode_read(raw: Raw | UnsetType, type: Any, path: str) -> Any:
    """Decode what is to be the prompt, or part of it."""
    try:
        return strictjson.decode(raw, type)  # type: ignore[arg-type]
    except msgspec.ValidationError as error:
        raise PromptExtractionFailed(_where(error, path))
    except JSONError as error:
        raise InvalidRequest(f"{path}: {error}", message="The body is not valid JSON.")


def _read_parameters(envelope: _Envelope, inner: _Options | None, limits: EventLimits) -> tuple[Parameters, bool]:
    try:
        outer = _StrictOptions() if _absent(envelope.parameters) else _decode_options(envelope.parameters)
    except msgspec.ValidationError as error:
        raise InvalidParameter(_where(error, "parameters"))
    values: dict[str, Any] = {}
    for source, path in ((outer, "parameters"), (inner, "content")):
        if source is None:
            continue
        for name in _Options.__struct_fields__:
            raw = getattr(source, name)
            if not _absent(raw):
                values[name] = _read_option(name, raw, f"{path}.{name}", limits)
    given = "max_tokens" in values
    values.setdefault("max_tokens", min(limits.default_max_tokens, limits.max_tokens))
    return Parameters(**values), given


def _decode_options(raw: Raw | UnsetType) -> _Options:
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
    if _absent(raw):
        return None
    try:
        return strictjson.decode(raw, type)  # type: ignore[arg-type]
    except (msgspec.ValidationError, JSONError):
        raise InvalidParameter(f"{path} {wanted}")


def _absent(raw: Raw | UnsetType) -> bool:
    return isinstance(raw, UnsetType) or bytes(raw) == b"null"


def _first_byte(raw: Raw) -> str:
    return chr(memoryview(raw)[0])


def _kind(raw: Raw) -> str:
    return {"t": "a boolean", "f": "a boolean", "n": "null"}.get(_first_byte(raw), "a number")


def _where(error: msgspec.ValidationError, path: str) -> str:
    """msgspec's message, with the path that it ends with put in front and made whole."""
    what, found, at = str(error).rpartition(" - at `$")
    if not found:
        return f"{path}: {error}"
    return f"{path}{at.rstrip('`')}: {what}"


def _refuse_lone_surrogates(event: Event) -> None:
    read = [message.content for message in event.messages]
    read += event.parameters.stop or []
    read += [text for pair in (event.metadata or {}).items() for text in pair]
    if any(LONE_SURROGATE_MARK in text for text in read):
        raise InvalidRequest("a lone surrogate in a text", message="The body is not valid JSON.")
