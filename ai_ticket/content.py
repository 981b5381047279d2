"""What an event's `content` may be, and the conversation that it becomes (contract, "`content`"). Pure."""

from typing import Any, Literal, get_args

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from ai_ticket import strictjson
from ai_ticket.errors import InvalidRequest, PromptExtractionFailed
from ai_ticket.strictjson import JSONError

Role = Literal["system", "developer", "user", "assistant", "tool"]

_ROLES = get_args(Role)


class Function(Struct, frozen=True, gc=False):
    """A function that a model calls; `arguments` is JSON text as the model wrote it, which may be none."""

    name: str
    arguments: str


class ToolCall(Struct, frozen=True, gc=False):
    """A call that a model makes, to be answered by a message of the role `tool` with its id."""

    id: str
    function: Function
    type: Literal["function"] = "function"


class Message(Struct, frozen=True, gc=False, omit_defaults=True):
    """One message of a conversation. The last three only OpenAI's clients send."""

    role: Role
    content: str
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


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

    def __post_init__(self) -> None:
        """At the first item that is nothing the rest need not be read: 350,000 of them fit into a body of 1 MiB."""
        if self.prompt is None and self.role is None and self.content is None and not self.messages:
            raise ValueError("neither a text nor a message")


class Options(Struct):
    """The keys of `parameters`, read when their last occurrence is known."""

    max_tokens: Raw | UnsetType = UNSET
    temperature: Raw | UnsetType = UNSET
    top_p: Raw | UnsetType = UNSET
    top_k: Raw | UnsetType = UNSET
    min_p: Raw | UnsetType = UNSET
    seed: Raw | UnsetType = UNSET
    stop: Raw | UnsetType = UNSET


class _ContentObject(Options):
    """An object as content: messages or a prompt, and options that win over `parameters`."""

    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET


def read_content(content: Raw) -> tuple[list[Message], Options | None]:
    """The conversation of a `content`, and the options that an object holds beside it.

    @raise PromptExtractionFailed: there is none in it; the details say where and why.
    @raise InvalidRequest: a text that is read holds what can't be decoded.
    """
    kind = _first_byte(content)
    if kind == '"':
        return _read_text(_decode_read(content, str, "content"))
    if kind == "{":
        return _read_object(content, "content")
    if kind == "[":
        return _require_prompt(_read_array(content), "content"), None
    raise PromptExtractionFailed(f"content: a string, an object or an array is wanted, not {_kind(content)}")


def _read_text(text: str) -> tuple[list[Message], Options | None]:
    """A string is the prompt, unless it is the JSON text of an object or array that holds one."""
    if text.lstrip(" \t\r\n")[:1] in ("{", "["):
        try:
            inner = text.encode()
            strictjson.check(inner)
            return read_content(strictjson.decode(inner, Raw))
        except (JSONError, PromptExtractionFailed, InvalidRequest):
            pass  # it holds no prompt, so it is one
    return _require_prompt([Message("user", text)], "content"), None


def _read_object(content: Raw, path: str) -> tuple[list[Message], Options]:
    found = _decode_read(content, _ContentObject, path)
    messages = _read_messages(found.messages, f"{path}.messages")
    if not messages:
        if absent(found.prompt):
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
            if texts:
                messages.append(Message("user", "\n".join(texts)))
                texts = []
            if item.messages:
                messages += [Message(message.role, _text(message.content)) for message in item.messages]
            elif item.role in _ROLES and item.content is not None:
                messages.append(Message(item.role, _text(item.content)))  # type: ignore[arg-type]
            else:
                raise _no_message(item, f"content[{index}]")
    if texts:
        messages.append(Message("user", "\n".join(texts)))
    return messages


def _no_message(item: _Item, path: str) -> PromptExtractionFailed:
    if item.role is not None and item.role not in _ROLES:
        return PromptExtractionFailed(f"{path}.role: must be one of {', '.join(_ROLES)}")
    missing = "role" if item.role is None else "content"
    return PromptExtractionFailed(f"{path}: a message needs a role and content, {missing} is missing")


def _read_messages(raw: Raw | UnsetType, path: str) -> list[Message]:
    if absent(raw):
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
        raise PromptExtractionFailed(where(error, path))
    except JSONError as error:
        raise InvalidRequest(f"{path}: {error}", message="The event is not valid JSON.")


def absent(raw: Raw | UnsetType) -> bool:
    """Whether a field is not there, or null, which counts as much."""
    return isinstance(raw, UnsetType) or bytes(raw) == b"null"


def _first_byte(raw: Raw) -> str:
    return chr(memoryview(raw)[0])


def _kind(raw: Raw) -> str:
    return {"t": "a boolean", "f": "a boolean", "n": "null"}.get(_first_byte(raw), "a number")


def where(error: msgspec.ValidationError, path: str) -> str:
    """msgspec's message, with the path that it ends with put in front and made whole."""
    text = strictjson.complaint(error)
    what, found, at = text.rpartition(" - at `$")
    if not found:
        return f"{path}: {text}"
    return f"{path}{at.rstrip('`')}: {what}"
