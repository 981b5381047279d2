"""OpenAI's requests, read into events. Pure."""

import re
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, UnsetType

from ai_ticket import strictjson
from ai_ticket.content import Function, Message, ToolCall, absent
from ai_ticket.errors import InvalidRequest, UnsupportedParameter
from ai_ticket.event import MOST_METADATA, Chunks, Event, EventLimits, Parameters
from ai_ticket.strictjson import JSONError
from ai_ticket.web.openai_faults import InvalidField
from ai_ticket.web.openai_fields import (
    Bias,
    ChatFields,
    ChatMessage,
    Choice,
    Common,
    Part,
    ResponseFormat,
    TextFields,
    Tool,
)

T = TypeVar("T")

MOST_STOPS = 16
MOST_TOOLS = 128
LARGEST_SMALL = 65_536
"""Bytes of a field of which only few entries are good for anything: reading very many would hold up the service."""

DEEPEST = 64
"""Levels of nesting in a schema: servers that read it recursively take more of them for a fault of their own."""

_FURTHER = ("presence_penalty", "frequency_penalty", "repeat_penalty")
_TOKEN = re.compile(r"\d{1,10}")


def read_chat(body: bytes, limits: EventLimits, *, id: str, now: float) -> Event:
    """What a request to `/v1/chat/completions` asks for.

    @param id: of the answer. @param now: the time, in seconds since 1970.
    @raise DomainError: `InvalidRequest`, `InvalidField` or `UnsupportedParameter`.
    """
    asked = _decode(body, ChatFields)
    if not asked.messages:
        raise InvalidField("messages", "There must be at least one message.")
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise InvalidField("max_tokens", "max_tokens and max_completion_tokens say different things.")
    limit = ("max_tokens", asked.max_tokens)
    if asked.max_completion_tokens is not None:
        limit = ("max_completion_tokens", asked.max_completion_tokens)
    extra = _response_format(asked.response_format) | _tools(asked)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidField("top_logprobs", "top_logprobs is only allowed when logprobs is true.")
    if asked.logprobs:
        extra |= {"logprobs": "true"}
        extra |= {"top_logprobs": str(asked.top_logprobs)} if asked.top_logprobs is not None else {}
    messages = [_message(message, index) for index, message in enumerate(asked.messages)]
    return _event(asked, limits, limit, id, now, messages=messages, extra=extra, metadata=_metadata(asked.metadata))


def read_text(body: bytes, limits: EventLimits, *, id: str, now: float) -> Event:
    """What a request to `/v1/completions` asks for; as `read_chat`."""
    asked = _decode(body, TextFields)
    if asked.echo:
        raise _unsupported("echo", "The prompt can't be echoed.")
    if asked.suffix:
        raise _unsupported("suffix", "Nothing can be inserted before a suffix.")
    if asked.best_of not in (None, 1):
        raise _unsupported("best_of", "There is but one answer: best_of must be 1.")
    prompt = _prompt(asked.prompt)
    return _event(asked, limits, ("max_tokens", asked.max_tokens), id, now, messages=[], raw_prompt=prompt, extra={})


def _event(
    asked: Common,
    limits: EventLimits,
    limit: tuple[str, int | None],
    id: str,
    now: float,
    *,
    extra: dict[str, str],
    **of_its_kind: Any,
) -> Event:
    if asked.n not in (None, 1):
        raise _unsupported("n", "There is but one answer: n must be 1.")
    if asked.stream_options is not None and not asked.stream:
        raise InvalidField("stream_options", "stream_options is only allowed when stream is true.")
    name, wanted = limit
    if wanted is not None and not 1 <= wanted <= limits.max_tokens:
        raise InvalidField(name, f"{name} must be from 1 to {limits.max_tokens}.")
    values = {name: value for name in _FURTHER if (value := getattr(asked, name)) is not None}
    parameters = Parameters(
        max_tokens=min(limits.default_max_tokens, limits.max_tokens) if wanted is None else wanted,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=asked.seed,
        stop=_stop(asked.stop),
    )
    return Event(
        parameters=parameters,
        max_tokens_given=wanted is not None,
        stream=bool(asked.stream),
        extra={name: msgspec.json.encode(value).decode() for name, value in values.items()}
        | _logit_bias(asked.logit_bias)
        | extra,
        chunks=Chunks(id, int(now), asked.stream_options is not None and bool(asked.stream_options.include_usage)),
        **of_its_kind,
    )


def _stop(raw: Raw | UnsetType) -> list[str] | None:
    stop: str | list[str] | None = _small(raw, str | list[str], "stop")
    stops = [stop] if isinstance(stop, str) else stop
    if stops and (len(stops) > MOST_STOPS or "" in stops):
        raise InvalidField("stop", f"stop must be a non-empty string, or up to {MOST_STOPS} of them.")
    return stops or None


def _logit_bias(raw: Raw | UnsetType) -> dict[str, str]:
    for token in _small(raw, dict[str, Bias], "logit_bias") or ():
        if not _TOKEN.fullmatch(token):
            raise InvalidField("logit_bias", "logit_bias must name tokens by their numbers.")
    return {} if absent(raw) else {"logit_bias": bytes(raw).decode()}  # type: ignore[arg-type]


def _metadata(raw: Raw | UnsetType) -> dict[str, str] | None:
    metadata: dict[str, str] | None = _small(raw, dict[str, str], "metadata")
    if metadata is not None and len(metadata) > MOST_METADATA:
        raise InvalidField("metadata", f"There may be at most {MOST_METADATA} of them.")
    return metadata


def _prompt(raw: Raw) -> str:
    prompts: list[str]
    if bytes(raw)[:1] != b"[":
        prompts = [_decode_part(raw, str, "prompt")]
    else:
        try:
            prompts = strictjson.decode(raw, list[str])
        except msgspec.ValidationError:
            raise _unsupported("prompt", "A prompt must be a text: tokens are the model server's own.")
    if len(prompts) > 1:
        raise _unsupported("prompt", "There can be but one prompt in a request.")
    if not any(prompts):
        raise InvalidField("prompt", "There must be a prompt.")
    return prompts[0]


def _message(message: ChatMessage, index: int) -> Message:
    role, content = message.role, message.content
    if isinstance(content, str) and role != "tool" and message.tool_calls is None and message.tool_call_id is None:
        return Message(role, content, message.name)  # the fastest way through many of them
    path = f"messages[{index}]"
    if message.tool_calls and role != "assistant":
        raise InvalidField(f"{path}.tool_calls", "Only an assistant calls tools.")
    if role == "tool" and message.tool_call_id is None:
        raise _missing(f"{path}.tool_call_id")
    if role != "tool" and message.tool_call_id is not None:
        raise InvalidField(f"{path}.tool_call_id", "Only a message of the role tool answers a call.")
    calls = [
        ToolCall(call.id, Function(call.function.name, call.function.arguments)) for call in message.tool_calls or ()
    ]
    text = "" if content is None and calls else _content(content, path)
    return Message(role, text, message.name, calls or None, message.tool_call_id)


def _content(content: str | list[Part] | None, path: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise _missing(f"{path}.content")
    for index, part in enumerate(content):
        if part.type != "text":
            raise _unsupported(f"{path}.content[{index}].type", "Only parts that are text can be read.")
        if part.text is None:
            raise _missing(f"{path}.content[{index}].text")
    return "".join([part.text or "" for part in content])


def _response_format(raw: Raw | UnsetType) -> dict[str, str]:
    if absent(raw):
        return {}
    asked = _decode_part(raw, ResponseFormat, "response_format")
    if asked.type == "text":
        return {}
    if asked.type == "json_schema" and asked.json_schema is None:
        raise _missing("response_format.json_schema")
    if asked.json_schema is not None:
        _require_object(asked.json_schema.schema, "response_format.json_schema.schema")
    return {"response_format": _text(raw, "response_format")}


def _tools(asked: ChatFields) -> dict[str, str]:
    """The tools that are offered. To choose one by its name is to offer no other, and to require a call."""
    tools: list[Tool] = [] if absent(asked.tools) else _decode_part(asked.tools, list[Tool], "tools")
    if len(tools) > MOST_TOOLS:
        raise InvalidField("tools", f"There may be at most {MOST_TOOLS} tools.")
    for index, tool in enumerate(tools):
        if not absent(tool.function.parameters):
            _require_object(tool.function.parameters, f"tools[{index}].function.parameters")
    offered: list[Raw] = _decode_part(asked.tools, list[Raw], "tools") if tools else []
    choice = None if absent(asked.tool_choice) else _choice(asked.tool_choice)
    if isinstance(choice, Choice):
        name = choice.function.name
        offered = [raw for raw, tool in zip(offered, tools, strict=True) if tool.function.name == name]
        if not offered:
            raise InvalidField("tool_choice", "tool_choice names a function that is not among the tools.")
        choice = "required"
    if not offered:
        if choice == "required":
            raise InvalidField("tool_choice", "A call can't be required where there are no tools.")
        return {}
    found = {"tools": "[" + ",".join(_text(raw, "tools") for raw in offered) + "]"}
    if choice is not None:
        found["tool_choice"] = f'"{choice}"'
    if asked.parallel_tool_calls is not None:
        found["parallel_tool_calls"] = "true" if asked.parallel_tool_calls else "false"
    return found


def _choice(raw: Raw | UnsetType) -> str | Choice:
    choice: str | Choice = _decode_part(raw, str | Choice, "tool_choice")
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise InvalidField("tool_choice", "tool_choice must be none, auto, required, or name a function.")
    return choice


def _require_object(raw: Raw | UnsetType, path: str) -> None:
    if not bytes(raw).startswith(b"{"):  # type: ignore[arg-type]
        raise InvalidField(path, f"Expected `object`: '{path}'.", "invalid_type")


def _text(raw: Raw | UnsetType, path: str) -> str:
    """The JSON text of a field that is passed on as it is."""
    text = bytes(raw)  # type: ignore[arg-type]
    if strictjson.deeper_than(text, DEEPEST):
        raise InvalidField(path, f"{path} is nested too deep.")
    return text.decode()


def _decode(body: bytes, type: type[T]) -> T:
    try:
        strictjson.check(body)
        return strictjson.decode(body, type)
    except msgspec.ValidationError as error:
        raise _fault(strictjson.complaint(error), "")
    except JSONError as error:
        raise InvalidRequest(str(error), message="The request is not valid JSON.")


def _decode_part(raw: Raw | UnsetType, type: Any, path: str) -> Any:
    try:
        return strictjson.decode(raw, type)  # type: ignore[arg-type]
    except msgspec.ValidationError as error:
        raise _fault(strictjson.complaint(error), path)


def _small(raw: Raw | UnsetType, type: Any, path: str) -> Any:
    """The value of a field, or None where it is absent."""
    if absent(raw):
        return None
    if len(memoryview(raw)) > LARGEST_SMALL:  # type: ignore[arg-type]
        raise InvalidField(path, f"{path} is too large.")
    return _decode_part(raw, type, path)


def _fault(text: str, within: str) -> InvalidField | UnsupportedParameter:
    """What msgspec says, in OpenAI's words."""
    what, _, at = text.rpartition(" - at `$")
    what, at = (what, at[:-1]) if what else (text, "")
    path = (within + at).removeprefix(".")
    named = re.search(r"(unknown|required) field `(.*)`$", what, re.DOTALL)
    if named is not None:
        path = f"{path}.{named[2][:64]}".removeprefix(".")
        if named[1] == "required":
            return _missing(path)
        return InvalidField(path, f"Unknown parameter: '{path}'.", "unknown_parameter")
    if what.startswith("Expected `null`"):
        return _unsupported(path, f"Unsupported parameter: '{path}'.")
    kind = "invalid_type" if ", got `" in what else "invalid_value"
    return InvalidField(path or None, f"{what}: '{path}'." if path else f"{what}.", kind)


def _missing(path: str) -> InvalidField:
    return InvalidField(path, f"Missing required parameter: '{path}'.", "missing_required_parameter")


def _unsupported(path: str, message: str) -> UnsupportedParameter:
    return UnsupportedParameter(path, message=message)
