"""The log of the process: from Twisted's logger, the standard library's and our own alike, a line each."""

import atexit
import logging
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import ILogObserver, Logger, LogLevel
from twisted.python.failure import Failure
from twisted.python.reflect import safe_str
from zope.interface import implementer

from ai_ticket.telemetry.logs_lines import Event, json_line, text_line
from ai_ticket.telemetry.logs_output import Descriptor, Output, Stream, standard_output
from ai_ticket.telemetry.logs_repeats import Repeats
from ai_ticket.telemetry.payloads import PayloadSampler

RETRY_SECONDS = 0.1
"""Until a reader that had no room is tried again, where no further line is written before."""

FLUSH_SECONDS = 2.0
"""That the end waits for such a reader, in all."""

LEVELS = {
    "DEBUG": LogLevel.debug,
    "INFO": LogLevel.info,
    "WARN": LogLevel.warn,
    "WARNING": LogLevel.warn,
    "ERROR": LogLevel.error,
    "CRITICAL": LogLevel.critical,
}
_BY_NUMBER = LogLevel.debug, LogLevel.info, LogLevel.warn, LogLevel.error, LogLevel.critical
_RANKS = {level: rank for rank, level in enumerate(_BY_NUMBER)}
_DEBUG, _INFO, _REPEATING = (_RANKS[level] for level in (LogLevel.debug, LogLevel.info, LogLevel.warn))

_FACTORY_NOISE = frozenset({"Starting factory {factory!r}", "Stopping factory {factory!r}"})
_PORT_NOISE = re.compile(r"\S+(?: \(TLS\))? starting on \S+|\(.*Port \S+ Closed\)")
"""What Twisted says at INFO of each factory (each connection to a model server has one) and each port. We say it."""

_TELLTALES = ("asyncio", "h2", "hpack", "http.client", "httpcore", "httpx", "requests", "urllib3")
"""Libraries that log headers or addresses below WARNING, tokens included."""


@implementer(ILogObserver)
class Logs:
    """The log of the process, an observer of Twisted's. `level` and `payloads.a_minute` can change while it runs."""

    _log = Logger()

    def __init__(
        self,
        level: str,
        form: Literal["json", "text"],
        payloads: int,
        *,
        reactor: Any,
        out: Stream | None = None,
        worker: int | None = None,
    ):
        """
        @param payloads: how many to log a minute, at DEBUG.
        @param worker: which of several processes it is, as each of its lines then says.
        @param out: where lines go; the process's own standard output by default, also where twistd has taken it.
        """
        self._reactor = reactor
        self._stream = standard_output() if out is None else out
        coloured = isinstance(self._stream, Descriptor) and self._stream.coloured
        line: Callable[[Event], bytes] = json_line if form == "json" else partial(text_line, colours=coloured)
        self._format = line if worker is None else lambda event: line({"worker": worker, **event})
        self._output = Output(self._stream, self._dropped_line)
        self._repeats = Repeats()
        self._repeats_lock = threading.RLock()
        self._thread: int | None = None
        self._tick_call: IDelayedCall | None = None
        self.level = level
        self.payloads = PayloadSampler(payloads, reactor, wanted=lambda: self._rank == _DEBUG)

    @property
    def level(self) -> str:
        """The least severe level that is logged, by all sources."""
        return self._level

    @level.setter
    def level(self, level: str) -> None:
        self._rank = _RANKS[LEVELS[level]]
        self._level = level
        logging.getLogger().setLevel(level)

    def start(self) -> None:
        """Listen to the standard library too, and stop waiting for the reader of the lines."""
        for name in _TELLTALES:
            logging.getLogger(name).setLevel(logging.WARNING)
        root = logging.getLogger()
        if not any(isinstance(handler, Bridge) for handler in root.handlers):
            root.addHandler(Bridge())
        if isinstance(self._stream, Descriptor):
            self._stream.unblock()
        self._thread = threading.get_ident()
        self._reactor.addSystemEventTrigger("after", "shutdown", self.stop)
        atexit.register(self.stop)  # where the start fails, there is no shutdown
        if self.payloads.a_minute and self._rank > _DEBUG:
            self._log.warn("LOG_PAYLOADS has no effect while LOG_LEVEL is {log_level_name}", log_level_name=self._level)

    def forget_repeats(self) -> None:
        """Tell how often what was repeated, and write it again: an operator has asked, and should get an answer."""
        with self._repeats_lock:
            events = self._repeats.ended(self._reactor.seconds())
        for event in events:
            self._write(event)

    def stop(self) -> None:
        """Tell what has been held back. Lines still to come are written at once, as long as the reader reads."""
        if self._thread is None:
            return
        self._thread = None
        atexit.unregister(self.stop)
        if self._tick_call is not None:
            self._tick_call.cancel()
            self._tick_call = None
        self.forget_repeats()
        self._output.settle(FLUSH_SECONDS)

    def __call__(self, event: Event) -> None:
        """Log an event, from any thread."""
        rank = _RANKS[event.get("log_level") or LogLevel.info]
        if rank == _INFO and _is_noise(event):
            rank = _DEBUG
            event = {**event, "log_level": LogLevel.debug}
        if rank < self._rank:
            return
        if rank < _REPEATING or self._thread is None:
            self._write(event)
            return
        with self._repeats_lock:
            events = self._repeats.seen(event, self._reactor.seconds())
            due = self._repeats.due
        for each in events:
            self._write(each)
        if due is not None:
            self._wake(due)

    def _write(self, event: Event) -> None:
        self._output.write(self._format(event))
        if self._output.behind:
            self._wake(self._reactor.seconds() + RETRY_SECONDS)

    def _wake(self, when: float) -> None:
        """Call `_tick` then, or before."""
        if self._thread is None:
            return
        if threading.get_ident() != self._thread:
            self._reactor.callFromThread(self._wake, when)
            return
        if self._tick_call is not None:
            if self._tick_call.getTime() <= when:
                return
            self._tick_call.cancel()
        self._tick_call = self._reactor.callLater(max(when - self._reactor.seconds(), 0), self._tick)

    def _tick(self) -> None:
        self._tick_call = None
        now = self._reactor.seconds()
        with self._repeats_lock:
            events = self._repeats.expired(now)
            due = self._repeats.due
        for event in events:
            self._write(event)
        self._output.flush()
        if self._output.behind:
            self._wake(now + RETRY_SECONDS)
        if due is not None:
            self._wake(due)

    def _dropped_line(self, count: int) -> bytes:
        return self._format(
            {
                "log_level": LogLevel.warn,
                "log_namespace": self._log.namespace,
                "log_format": "{dropped} lines of the log were dropped: nobody read them in time",
                "dropped": count,
            }
        )


class Bridge(logging.Handler):
    """Passes the records of the standard library's logging on to Twisted's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on."""
        try:
            text = record.getMessage()
        except Exception:  # its arguments do not fit
            text = f"{record.msg} {record.args}"
        fields: dict[str, Any] = {"log_text": text, "log_template": _template(record)}
        if record.exc_info and record.exc_info[1] is not None:
            fields["log_failure"] = Failure(record.exc_info[1], record.exc_info[0], record.exc_info[2])
        Logger(namespace=record.name).emit(_level(record.levelno), "{log_text}", **fields)


def _level(number: int) -> LogLevel:
    """Twisted's level for one of the standard library's, named or not."""
    level: LogLevel = _BY_NUMBER[min(max(number // 10 - 1, 0), len(_BY_NUMBER) - 1)]
    return level


def _template(record: logging.LogRecord) -> object:
    """A record's message without the numbers in it."""
    arguments = record.args if isinstance(record.args, tuple) else (record.args,)
    return str(record.msg), *(safe_str(each) for each in arguments if not isinstance(each, (int, float)))


def _is_noise(event: Event) -> bool:
    if event.get("log_namespace") == "log_legacy":
        return _PORT_NOISE.fullmatch(str(event.get("log_text"))) is not None
    return event.get("log_format") in _FACTORY_NOISE
