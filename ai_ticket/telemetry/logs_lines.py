"""A log event as a line: of JSON for machines, or of text for a terminal."""

import json
import re
import time
from datetime import UTC, datetime
from functools import lru_cache
from string import Formatter
from typing import Any

import msgspec
from twisted.logger import LogLevel, formatEvent
from twisted.python.failure import Failure
from twisted.python.reflect import safe_str

Event = dict[str, Any]

_OURS = frozenset({"time", "level", "logger", "message", "exception"})
"""Names that a field of an event can't take: it gets an underscore."""

_LEGACY = frozenset({"format", "isError", "system", "failure", "why"})
"""What `twisted.python.log` puts into its events; the message has told it."""

_SPECIAL = _OURS | _LEGACY
_PLAIN = frozenset({str, int, float, bool, type(None)})
_UNSAFE = re.compile(rb"\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]")
"""In UTF-8: terminal control sequences that JSON lets pass, and what some take for the end of a line."""

_QUOTE = re.compile(r"[\s\"'=\\]")
_COLOURS = {LogLevel.debug: "2", LogLevel.warn: "33", LogLevel.error: "31", LogLevel.critical: "1;31"}


def message(event: Event) -> str:
    """What an event says."""
    if "failure" in event and event.get("log_namespace") == "log_legacy":  # its text has the traceback in it
        return safe_str(event.get("why") or "Unhandled Error")
    try:
        return str(event["log_format"].format_map(event))
    except Exception:  # what only Twisted's much slower way understands, or nobody
        return formatEvent(event)


def failure_of(event: Event) -> Failure | None:
    """The failure that an event tells of."""
    failure = event.get("log_failure") or (event.get("failure") if event.get("log_namespace") == "log_legacy" else None)
    return failure if isinstance(failure, Failure) else None


def json_line(event: Event) -> bytes:
    """One JSON object: `time`, `level`, `logger` and `message`, then the event's fields, `exception` the traceback."""
    line: Event = {
        "time": _time(event),
        "level": _level(event).name.upper(),
        "logger": event.get("log_namespace") or "twisted",
        "message": message(event),
        **_fields(event),
    }
    failure = failure_of(event)
    if failure is not None:
        line["exception"] = failure.getTraceback()
    try:
        encoded = msgspec.json.encode(line)
    except (UnicodeEncodeError, OverflowError):  # a lone surrogate, say; json escapes what msgspec refuses
        encoded = json.dumps(line).encode()
    if not encoded.isascii():
        encoded = _UNSAFE.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), encoded)
    return encoded + b"\n"


def text_line(event: Event, *, colours: bool) -> bytes:
    """Time, level and message, then those fields that the message has not told; a traceback follows indented."""
    told = _told(event.get("log_format"))
    fields = {name: value for name, value in _fields(event).items() if name not in told}
    fields["logger"] = event.get("log_namespace") or "twisted"
    level = _level(event)
    parts = (
        _coloured(_time(event), "2" if colours else None),
        _coloured(f"{level.name.upper():<8}", _COLOURS.get(level) if colours else None),
        escaped(message(event)),
        _coloured(" ".join(f"{name}={_quoted(value)}" for name, value in fields.items()), "2" if colours else None),
    )
    line = " ".join(parts) + "\n"
    failure = failure_of(event)
    if failure is not None:
        line += "".join(f"    {escaped(part)}\n" for part in failure.getTraceback().rstrip().split("\n"))
    return line.encode()


def escaped(text: str) -> str:
    """Text on one line, which does nothing to a terminal."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _level(event: Event) -> LogLevel:
    level: LogLevel = event.get("log_level") or LogLevel.info
    return level


def _time(event: Event) -> str:
    seconds, fraction = divmod(event.get("log_time") or time.time(), 1)
    return f"{_second(seconds)}.{int(fraction * 1000):03d}+00:00"


@lru_cache(maxsize=2)
def _second(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _fields(event: Event) -> Event:
    """An event's own fields, under names that do not collide with ours."""
    fields: Event = {}
    for name, value in event.items():
        if name[:4] == "log_":
            continue
        shown = _counts(value) if type(value) is dict else _plain(value)
        if name not in _SPECIAL:
            fields[name] = shown
        elif name in _OURS and event.get("log_namespace") != "log_legacy":
            fields[f"{name}_"] = shown
    return fields


def _plain(value: Any) -> Any:
    return value if type(value) in _PLAIN else safe_str(value)


def _counts(values: Event) -> Event:
    return {safe_str(name): _plain(value) for name, value in values.items()}


@lru_cache(maxsize=1024)
def _told(log_format: object) -> frozenset[str]:
    """The fields that a format has in it."""
    try:
        return frozenset(name for _, name, _, _ in Formatter().parse(str(log_format)) if name)
    except ValueError:
        return frozenset()


def _quoted(value: object) -> str:
    text = escaped(str(value))
    return text if text and not _QUOTE.search(text) else json.dumps(text, ensure_ascii=False)


def _coloured(text: str, colour: str | None) -> str:
    return text if colour is None else f"\x1b[{colour}m{text}\x1b[0m"
