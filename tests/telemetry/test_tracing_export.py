"""The queue and the thread that exports spans: bounded, never in the way, gone in time."""

import io
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from memory_tracer import PATIENCE, FakeReactor, MemoryTracer, stop
from twisted.logger import LogLevel, globalLogPublisher

from ai_ticket.telemetry.tracing import RecordedSpan
from ai_ticket.telemetry.tracing_export import STOP_SECONDS, ConsoleExporter, Exporter, ExportError, SpanExport


class ScriptedExporter:
    """Takes spans as the test lets it: each batch waits for `gate`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.batches: list[list[str]] = []
        self.error = error
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.abandoned = False
        self.threads: set[int] = set()

    def export(self, spans: Sequence[RecordedSpan]) -> None:
        self.threads.add(threading.get_ident())
        self.began.set()
        assert self.gate.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        self.batches.append([span.name for span in spans])

    def abandon(self) -> None:
        self.abandoned = True


@pytest.fixture
def reactor() -> FakeReactor:
    return FakeReactor()


@pytest.fixture
def warnings() -> Any:
    found: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if event.get("log_level") is LogLevel.warn and "count" in event:
            found.append(event["log_format"].format(**event))

    globalLogPublisher.addObserver(observe)
    yield found
    globalLogPublisher.removeObserver(observe)


def make_export(reactor: FakeReactor, exporter: Exporter, **options: Any) -> SpanExport:
    settings: dict[str, Any] = {"queue_size": 10, "batch_size": 4, "delay": 0.01} | options
    return SpanExport(exporter, clock=reactor, call_in_reactor=reactor.callFromThread, **settings)


def spans(reactor: FakeReactor, count: int, first: int = 0) -> list[RecordedSpan]:
    tracer = MemoryTracer(reactor)
    for number in range(first, first + count):
        tracer.start(str(number)).end()
    return tracer.ended


def test_no_thread_before_the_start(reactor: FakeReactor) -> None:
    before = threading.active_count()
    export = make_export(reactor, ScriptedExporter())
    assert threading.active_count() == before
    export.startService()
    assert threading.active_count() == before + 1
    stop(reactor, export)


def test_all_come_out_in_order_in_another_thread(reactor: FakeReactor) -> None:
    exporter = ScriptedExporter()
    export = make_export(reactor, exporter, delay=60.0)
    export.startService()
    for span in spans(reactor, 10):
        export.put(span)
    stop(reactor, export)
    assert [name for batch in exporter.batches for name in batch] == [str(number) for number in range(10)]
    assert max(map(len, exporter.batches)) <= 4
    assert threading.get_ident() not in exporter.threads
    assert export.dropped == 0


def test_a_full_batch_does_not_wait(reactor: FakeReactor) -> None:
    exporter = ScriptedExporter()
    export = make_export(reactor, exporter, delay=60.0)
    export.startService()
    for span in spans(reactor, 4):
        export.put(span)
    assert exporter.began.wait(PATIENCE)
    stop(reactor, export)


def test_a_few_do_not_wait_longer_than_the_delay(reactor: FakeReactor) -> None:
    exporter = ScriptedExporter()
    export = make_export(reactor, exporter)
    export.startService()
    export.put(spans(reactor, 1)[0])
    assert exporter.began.wait(PATIENCE)
    stop(reactor, export)


def test_what_finds_the_queue_full_is_dropped_and_counted(reactor: FakeReactor, warnings: list[str]) -> None:
    """However many end while the exporter is stuck, no more than the queue holds are kept."""
    exporter = ScriptedExporter()
    exporter.gate.clear()
    export = make_export(reactor, exporter)
    export.startService()
    export.put(spans(reactor, 1)[0])
    assert exporter.began.wait(PATIENCE)
    for span in spans(reactor, 5000, first=1):
        export.put(span)
    assert export.waiting == 10
    assert export.dropped == 4990
    assert warnings == ["1 spans were dropped: they end faster than they can be exported"]
    exporter.gate.set()
    stop(reactor, export)
    assert [name for batch in exporter.batches for name in batch] == [str(number) for number in range(11)]


def test_one_warning_a_minute_says_how_many(reactor: FakeReactor, warnings: list[str]) -> None:
    exporter = ScriptedExporter(ExportError("no answer"))
    export = make_export(reactor, exporter, batch_size=1)
    export.startService()

    def fail(count: int) -> None:
        before = export.dropped
        for span in spans(reactor, count):
            export.put(span)
        reactor.run_until(lambda: export.dropped == before + count)
        reactor.run_calls()

    fail(1)
    assert warnings == ["1 spans were dropped: no answer"]
    reactor.advance(59.9)
    fail(3)
    assert len(warnings) == 1
    reactor.advance(0.1)
    fail(1)
    assert warnings[1:] == ["4 spans were dropped: no answer"]
    stop(reactor, export)


def test_what_a_collector_rejects_is_counted(reactor: FakeReactor) -> None:
    exporter = ScriptedExporter(ExportError("too old", lost=1))
    export = make_export(reactor, exporter)
    export.startService()
    for span in spans(reactor, 3):
        export.put(span)
    stop(reactor, export)
    assert export.dropped == 1


def test_a_fault_costs_its_batch_alone(reactor: FakeReactor, warnings: list[str]) -> None:
    exporter = ScriptedExporter(KeyError("oops"))
    export = make_export(reactor, exporter)
    export.startService()
    export.put(spans(reactor, 1)[0])
    reactor.run_until(lambda: bool(warnings))
    assert warnings == ["1 spans were dropped: KeyError('oops')"]
    exporter.error = None
    export.put(spans(reactor, 1)[0])
    stop(reactor, export)
    assert exporter.batches == [["0"]]


def test_a_stuck_exporter_does_not_hold_up_the_stop(reactor: FakeReactor, warnings: list[str]) -> None:
    exporter = ScriptedExporter()
    exporter.gate.clear()
    export = make_export(reactor, exporter)
    export.startService()
    export.put(spans(reactor, 1)[0])
    assert exporter.began.wait(PATIENCE)
    for span in spans(reactor, 5):
        export.put(span)
    done: list[None] = []
    began = time.monotonic()
    export.stopService().addCallback(done.append)
    reactor.advance(STOP_SECONDS - 0.01)
    assert not done
    reactor.advance(0.01)
    assert done == [None]
    assert time.monotonic() - began < 1.0
    assert exporter.abandoned
    assert export.dropped == 5
    assert len(warnings) == 1
    exporter.gate.set()
    reactor.run_call()  # the thread has ended, with what was in the queue still there
    assert exporter.batches == [["0"]]
    assert STOP_SECONDS < 3.0


def test_what_ends_after_the_stop_is_counted(reactor: FakeReactor) -> None:
    exporter = ScriptedExporter()
    export = make_export(reactor, exporter)
    export.startService()
    stop(reactor, export)
    export.put(spans(reactor, 1)[0])
    assert (export.dropped, export.waiting) == (1, 0)


RESOURCE = {"service.name": "ai-ticket"}


class TestConsole:
    """Lines of JSON."""

    def test_a_line_for_each_span(self, reactor: FakeReactor) -> None:
        out = io.StringIO()
        reactor.advance(1_700_000_000.25)
        tracer = MemoryTracer(reactor)
        other = tracer.start("event")
        span = tracer.start("POST /event", kind="server", attributes={"text": "two\nlines ä", "list": ["a"], "n": 1})
        child = span.child("kobold", kind="client", links=[other])
        child.fail("api_connection_error")
        reactor.advance(1.5)
        child.end()
        span.end()
        ConsoleExporter(RESOURCE, out).export(tracer.ended)
        first, second = (json.loads(line) for line in out.getvalue().splitlines())
        assert first == {
            "name": "kobold",
            "kind": "client",
            "trace_id": span.trace_id,
            "span_id": child.span_id,
            "parent_id": span.span_id,
            "start": "2023-11-14T22:13:20.250000+00:00",
            "end": "2023-11-14T22:13:21.750000+00:00",
            "status": "error",
            "attributes": {"error.type": "api_connection_error"},
            "links": [{"trace_id": other.trace_id, "span_id": other.span_id}],
            "resource": RESOURCE,
        }
        assert second["attributes"] == {"text": "two\nlines ä", "list": ["a"], "n": 1}
        assert second["parent_id"] is None
        assert "links" not in second

    def test_standard_error_where_twistd_has_taken_it(
        self, reactor: FakeReactor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, taken = io.StringIO(), io.StringIO()
        monkeypatch.setattr("sys.__stderr__", real)
        monkeypatch.setattr("sys.stderr", taken)
        ConsoleExporter(RESOURCE).export(spans(reactor, 2))
        assert len(real.getvalue().splitlines()) == 2
        assert taken.getvalue() == ""

    def test_a_closed_one_is_an_export_error(self, reactor: FakeReactor) -> None:
        out = io.StringIO()
        out.close()
        with pytest.raises(ExportError, match="standard error"):
            ConsoleExporter(RESOURCE, out).export(spans(reactor, 1))
