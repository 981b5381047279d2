"""Logs: one JSON object a line, from Twisted's logger, the standard library's and our own alike."""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec
from twisted.logger import (
    FileLogObserver,
    FilteringLogObserver,
    ILogObserver,
    Logger,
    LogLevel,
    LogLevelFilterPredicate,
    formatEvent,
)
from twisted.python.failure import Failure

LEVELS = {
    "DEBUG": LogLevel.debug,
    "INFO": LogLevel.info,
    "WARN": LogLevel.warn,
    "WARNING": LogLevel.warn,
    "ERROR": LogLevel.error,
    "CRITICAL": LogLevel.critical,
}
_OWN_FIELDS = frozenset({"time", "level", "logger", "message", "exception"})
_INTERNAL_FIELDS = frozenset({"format", "isError", "system", "id", "failure", "why", "text", "reason_why"})
_NOISY = ("twisted.web.client._HTTP11ClientFactory",)
"""Twisted's loggers that have two lines for every connection to a model server, whatever `noisy` says."""

_TELLTALES = ("hpack", "h2")
"""Libraries that log every header of every request below WARNING, tokens included."""

_PLAIN = (str, int, float, bool, type(None))


class Logs:
    """The log of the process. `level` can be changed while it runs."""

    def __init__(self, level: str, out: TextIO | None = None):
        """@param out: where lines go; the process's own standard output by default, also where twistd has taken it."""
        self._predicate = LogLevelFilterPredicate(LEVELS[level])
        for namespace in _NOISY:
            self._predicate.setLogLevelForNamespace(namespace, LogLevel.warn)
        file = FileLogObserver(out or sys.__stdout__ or sys.stdout, format_line)
        self.observer: ILogObserver = FilteringLogObserver(file, [self._predicate])
        self.level = level

    @property
    def level(self) -> str:
        """The least severe level that is logged."""
        return self._level

    @level.setter
    def level(self, level: str) -> None:
        self._level = level
        self._predicate.setLogLevelForNamespace("", LEVELS[level])
        logging.getLogger().setLevel(level)

    def bridge(self) -> None:
        """Let the standard library's loggers come out here too."""
        for name in _TELLTALES:
            logging.getLogger(name).setLevel(logging.WARNING)
        root = logging.getLogger()
        if not any(isinstance(handler, Bridge) for handler in root.handlers):
            root.addHandler(Bridge())


class Bridge(logging.Handler):
    """Passes the records of the standard library's logging on to Twisted's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on."""
        level = LEVELS.get(record.levelname, LogLevel.info)
        fields: dict[str, Any] = {"log_text": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:
            fields["log_failure"] = Failure(record.exc_info[1], record.exc_info[0], record.exc_info[2])
        Logger(namespace=record.name).emit(level, "{log_text}", **fields)


def format_line(event: Mapping[str, Any]) -> str:
    """A Twisted log event as a line of JSON."""
    level = event.get("log_level") or LogLevel.info
    line: dict[str, Any] = {
        "time": datetime.fromtimestamp(event["log_time"], UTC).isoformat(timespec="milliseconds"),
        "level": level.name.upper(),
        "logger": event.get("log_namespace") or "twisted",
        "message": formatEvent(dict(event)),
    }
    for name, value in event.items():
        if not name.startswith("log_") and name not in _INTERNAL_FIELDS and name not in _OWN_FIELDS:
            line[name] = value if isinstance(value, _PLAIN) else str(value)
    failure = event.get("log_failure")
    if failure is not None:
        line["exception"] = failure.getTraceback()
    try:
        return msgspec.json.encode(line).decode() + "\n"
    except (UnicodeEncodeError, OverflowError):  # a lone surrogate, say; json escapes what msgspec refuses
        return json.dumps(line) + "\n"
