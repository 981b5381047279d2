"""What becomes of spans that have ended: a bounded queue, and a thread that exports them in batches."""

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from threading import Event, Thread
from typing import Any, Protocol, TextIO

import msgspec
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from ai_ticket.telemetry.tracing import RecordedSpan

STOP_SECONDS = 2.5
"""How long the spans that are left may take when the service stops; what else is to be done fits within 3 s."""

WARNING_SECONDS = 60.0


class ExportError(Exception):
    """Spans could not be exported. `lost` of the batch are gone; all where it is None."""

    def __init__(self, reason: str, lost: int | None = None):
        super().__init__(reason)
        self.lost = lost


class Exporter(Protocol):
    """Takes spans to where they are looked at."""

    def export(self, spans: Sequence[RecordedSpan]) -> None:
        """Called in a thread of its own; may block.

        @raise ExportError: they could not be exported.
        """

    def abandon(self) -> None:
        """Called in another thread than the one that exports: it need not try any longer."""


class SpanExport(Service):
    """Exports spans in a thread, which it starts and stops.

    `put` never blocks. What finds the queue full is dropped, as is what the exporter fails at: both are counted, and
    told of once a minute at most.
    """

    _log = Logger()

    def __init__(
        self,
        exporter: Exporter,
        *,
        clock: IReactorTime,
        call_in_reactor: Callable[..., object],
        queue_size: int,
        batch_size: int,
        delay: float,
    ):
        """@param delay: how long a span waits for others, in seconds, unless there is a batch of them."""
        self._exporter = exporter
        self._clock = clock
        self._call_in_reactor = call_in_reactor
        self._queue_size = queue_size
        self._batch_size = batch_size
        self._delay = delay
        self._queue: deque[RecordedSpan] = deque()
        self._wake = Event()
        self._stopping = False
        self._abandoned = False
        self._overflowed = 0  # written in the reactor's thread alone,
        self._failed = 0  # and this in the exporting thread alone
        self._told = 0
        self._told_at: float | None = None
        self._giving_up: IDelayedCall | None = None
        self._stopped: Deferred[None] | None = None

    @property
    def dropped(self) -> int:
        """How many spans have ended and were not exported."""
        return self._overflowed + self._failed

    @property
    def waiting(self) -> int:
        """How many spans are in the queue."""
        return len(self._queue)

    def put(self, span: RecordedSpan) -> None:
        """Export it in its turn."""
        if not self.running:
            self._overflowed += 1
        elif len(self._queue) >= self._queue_size:
            self._overflowed += 1
            self._warn("they end faster than they can be exported")
        else:
            self._queue.append(span)
            if len(self._queue) >= self._batch_size and not self._wake.is_set():
                self._wake.set()

    def startService(self) -> None:
        """Start the thread. It is a daemon: a process that ends does not wait for it."""
        super().startService()  # type: ignore[no-untyped-call]
        Thread(target=self._run, name="span export", daemon=True).start()

    def stopService(self) -> Deferred[None]:
        """Export what is left, as far as there is time; fires when that is done, or the time is over."""
        super().stopService()  # type: ignore[no-untyped-call]
        self._stopped = Deferred()
        self._giving_up = self._clock.callLater(STOP_SECONDS, self._give_up)
        self._stopping = True
        self._wake.set()
        return self._stopped

    def _give_up(self) -> None:
        self._abandoned = True
        self._exporter.abandon()
        self._overflowed += len(self._queue)
        self._warn("there was no time left for them")
        self._finish()

    def _finish(self) -> None:
        if self._stopped is not None and self._giving_up is not None:
            if self._giving_up.active():
                self._giving_up.cancel()
            stopped, self._stopped = self._stopped, None
            stopped.callback(None)

    def _warn(self, reason: str) -> None:
        now = self._clock.seconds()
        if self._told_at is None or now - self._told_at >= WARNING_SECONDS:
            count, self._told = self.dropped - self._told, self.dropped
            self._told_at = now
            self._log.warn("{count} spans were dropped: {reason}", count=count, reason=reason)

    # In the thread.

    def _run(self) -> None:
        stopping = False
        while not stopping:
            self._wake.wait(self._delay)
            self._wake.clear()
            stopping = self._stopping  # before the queue is looked at: nothing is put in it afterwards
            while self._queue and not self._abandoned:
                self._export([self._queue.popleft() for _ in range(min(len(self._queue), self._batch_size))])
        self._call_in_reactor(self._finish)

    def _export(self, batch: list[RecordedSpan]) -> None:
        try:
            self._exporter.export(batch)
        except ExportError as error:
            self._failed += len(batch) if error.lost is None else error.lost
            self._call_in_reactor(self._warn, str(error))
        except Exception as error:  # a fault of ours costs these spans, not all that come after
            self._failed += len(batch)
            self._call_in_reactor(self._warn, repr(error))


class ConsoleExporter:
    """Writes spans as lines of JSON."""

    def __init__(self, resource: Mapping[str, str], out: TextIO | None = None):
        """@param out: the process's own standard error by default, also where twistd has taken it."""
        self._resource = msgspec.Raw(msgspec.json.encode(resource))
        self._out = out or sys.__stderr__ or sys.stderr

    def export(self, spans: Sequence[RecordedSpan]) -> None:
        """Write them, all at once."""
        try:
            self._out.write(b"".join(msgspec.json.encode(self._line(span)) + b"\n" for span in spans).decode())
            self._out.flush()
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise ExportError(f"they can't be written to standard error: {error}")

    def abandon(self) -> None:
        """Nothing can be done about a terminal that takes no more."""

    def _line(self, span: RecordedSpan) -> dict[str, Any]:
        line: dict[str, Any] = {
            "name": span.name,
            "kind": span.kind,
            "trace_id": span.trace_id,
            "span_id": span.span_id,
            "parent_id": span.parent_id,
            "start": _time(span.began),
            "end": _time(span.ended),
            "status": "ok" if span.error is None else "error",
            "attributes": span.attributes,
        }
        if span.links:
            line["links"] = [{"trace_id": trace_id, "span_id": span_id} for trace_id, span_id in span.links]
        return line | {"resource": self._resource}


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds or 0.0, UTC).isoformat(timespec="microseconds")
