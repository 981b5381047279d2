"""What a request asks of the model, read as KoboldCPP reads it: hardly checked, so wrong types fail oddly. Pure."""

import json
from typing import Any

from msgspec import Struct

from ai_ticket.backend.fake import wire
from ai_ticket.backend.fake.text import chat_prompt

DEFAULT_LIMIT = 1024
LARGEST_SHARE = 0.8
"""Of the context, that an answer may take."""

ENDPOINTS: dict[str, tuple[wire.Dialect, bool | None]] = {
    "/chat/completions": (wire.CHAT, None),
    "/completions": (wire.COMPLETIONS, None),
    "/v1/completion": (wire.COMPLETIONS, None),
    "/api/extra/generate/stream": (wire.NATIVE, True),
    "/api/v1/generate": (wire.NATIVE, False),
    "/api/latest/generate": (wire.NATIVE, False),
}
"""What generates, by how the path ends: in which dialect, and whether it streams where the request has no say."""


class NotJSON(Exception):
    """The body can't be parsed."""


class Fatal(Exception):
    """The request ends the thread that reads it: the connection is closed without a byte."""


class Ask(Struct, frozen=True):
    """A request for a generation.

    `misread`: a field has a type that fails the generation before it begins, of which a caller is told by the body
    `null`, or by a stream that stays silent.
    """

    dialect: wire.Dialect
    stream: bool
    prompt: str = ""
    last: str = ""
    limit: int = DEFAULT_LIMIT
    stops: tuple[str, ...] = ()
    usage: bool = False
    key: str = ""
    endless: bool = False
    seed: int = -1
    misread: bool = False


def endpoint(path: str) -> str | None:
    """The end of the path that makes it an endpoint that generates."""
    return next((suffix for suffix in ENDPOINTS if path.endswith(suffix)), None)


def read(suffix: str, body: bytes, context_length: int) -> Ask:
    """Read a request to an endpoint that generates, known by the end of its path.

    @raise NotJSON: as it says. @raise Fatal: as it says.
    """
    dialect, streams = ENDPOINTS[suffix]
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise NotJSON
    if not isinstance(fields, dict):
        raise Fatal
    if _number(fields.get("rep_pen", 1.0)) is None:
        raise Fatal
    messages = read_messages(fields.get("messages", [])) if dialect is wire.CHAT else []
    stream = bool(fields.get("stream")) if streams is None else streams
    prompt = fields.get("prompt", "") if dialect is not wire.CHAT else chat_prompt(messages)
    stops = fields.get(dialect.stops_name) or []
    stops = [stops] if isinstance(stops, str) else stops
    limit = _limit(fields, dialect)
    if (
        not isinstance(prompt, str)
        or limit is None
        or not isinstance(stops, list)
        or not all(isinstance(stop, str) for stop in stops)
    ):
        return Ask(dialect, stream, misread=True)
    options = fields.get("stream_options")
    seed = _number(fields.get("seed", fields.get("sampler_seed")))
    return Ask(
        dialect,
        stream,
        prompt=str(fields.get("memory") or "") + prompt,
        last=messages[-1][1] if messages else prompt,
        limit=min(limit, int(context_length * LARGEST_SHARE)),
        stops=tuple(stops),
        usage=isinstance(options, dict) and bool(options.get("include_usage")),
        key=str(fields.get("genkey") or ""),
        endless=bool(fields.get("bypass_eos")),
        seed=int(seed) if seed is not None else -1,
    )


def read_messages(messages: Any) -> list[tuple[str, str]]:
    """The roles and contents of a conversation.

    @raise Fatal: it is none.
    """
    if not isinstance(messages, list):
        raise Fatal
    if not all(isinstance(message, dict) and "role" in message for message in messages):
        raise Fatal
    return [(str(message["role"]), _content(message.get("content"))) for message in messages]


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _limit(fields: dict[str, Any], dialect: wire.Dialect) -> int | None:
    """The most tokens. KoboldCPP's own endpoints can't do with what is not a number; the others take the default."""
    given = _number(fields.get(dialect.limit_name, DEFAULT_LIMIT))
    if given is None:
        return None if dialect is wire.NATIVE else DEFAULT_LIMIT
    return int(given) or DEFAULT_LIMIT


def _number(value: Any) -> float | None:
    try:
        number = float(value)
        int(number)
    except (TypeError, ValueError, OverflowError):
        return None
    return number
