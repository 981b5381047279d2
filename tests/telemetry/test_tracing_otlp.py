"""Spans on their way to a collector over HTTP, on the loopback device: what it gets, and what it can do to us."""

import gzip
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from memory_tracer import FakeReactor, MemoryTracer, stop
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import SpanFlags
from threaded_server import Answers, ThreadedServer

from ai_ticket.telemetry.tracing import RecordedSpan
from ai_ticket.telemetry.tracing_export import STOP_SECONDS, ExportError, SpanExport
from ai_ticket.telemetry.tracing_otlp import Collector, OtlpExporter

RESOURCE = {"service.name": "ai-ticket", "service.version": "1", "service.instance.id": "i"}
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver:
    """A collector. `answers` are the statuses and bodies of its next answers; then it takes everything."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[tuple[int, bytes, dict[str, str]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()
        self.callers: set[Any] = set()
        receiver = self

        class Receiving(Answers):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                receiver.callers.add(self.client_address)
                receiver.asked.set()
                assert receiver.gate.wait(10)
                status, answer, headers = receiver.answers.pop(0) if receiver.answers else (200, b"", {})
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

        self._server = ThreadedServer(Receiving, tls)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.port}/v1/traces"

    def close(self) -> None:
        self.gate.set()
        self._server.close()

    def spans(self) -> list[ProtoSpan]:
        """All that it was sent."""
        found = []
        for _, _, body in self.requests:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a collector that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1/traces"


@pytest.fixture
def dead() -> str:
    """The URL of a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}/v1/traces"


@pytest.fixture
def tracer() -> MemoryTracer:
    clock = FakeReactor()
    clock.advance(1_700_000_000.0)
    return MemoryTracer(clock)


def make_exporter(url: str, **options: Any) -> OtlpExporter:
    settings: dict[str, Any] = {"headers": {}, "timeout": 10.0, "compression": "none"} | options
    return OtlpExporter(Collector(url, **settings), RESOURCE, lambda: 0.5)


def some(tracer: MemoryTracer, count: int = 1) -> list[RecordedSpan]:
    for number in range(count):
        tracer.start(str(number)).end()
    return tracer.ended[-count:]


def plain(values: Any) -> dict[str, Any]:
    """Attributes as a dictionary."""
    found = {}
    for pair in values:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


def test_what_a_collector_gets(receiver: Receiver, tracer: MemoryTracer) -> None:
    other = tracer.start("event")
    request = tracer.start(
        "POST /event", kind="server", traceparent=f"00-{TRACE}-{CALLER}-01".encode(), tracestate=b"a=b"
    )
    attempt = request.child("kobold.get_completion", kind="client", links=[other])
    attempt.set({"gen_ai.usage.input_tokens": 7, "gen_ai.response.finish_reasons": ["stop"], "t": 0.5, "yes": True})
    attempt.fail("api_server_error")
    attempt.end(at=1_700_000_001.5)
    request.end(at=1_700_000_002.0)

    make_exporter(receiver.url, headers={"authorization": "Bearer sesame"}).export(tracer.ended)

    [(path, headers, body)] = receiver.requests
    assert path == "/v1/traces"
    assert headers["content-type"] == "application/x-protobuf"
    assert headers["authorization"] == "Bearer sesame"
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert plain(resource.resource.attributes) == RESOURCE
    [scope] = resource.scope_spans
    assert scope.scope.name == "ai_ticket"
    client, server = scope.spans
    assert (server.name, server.kind) == ("POST /event", ProtoSpan.SPAN_KIND_SERVER)
    assert (client.name, client.kind) == ("kobold.get_completion", ProtoSpan.SPAN_KIND_CLIENT)
    assert server.trace_id.hex() == client.trace_id.hex() == TRACE
    assert server.parent_span_id.hex() == CALLER
    assert client.parent_span_id == server.span_id
    assert server.span_id.hex() == request.span_id
    assert server.trace_state == client.trace_state == "a=b"
    assert server.start_time_unix_nano == 1_700_000_000_000_000_000
    assert client.end_time_unix_nano == 1_700_000_001_500_000_000
    assert plain(client.attributes) == {
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.response.finish_reasons": ["stop"],
        "t": 0.5,
        "yes": True,
        "error.type": "api_server_error",
    }
    assert (client.status.code, client.status.message) == (2, "")
    assert server.status.code == 0
    [link] = client.links
    assert (link.trace_id.hex(), link.span_id.hex()) == (other.trace_id, other.span_id)
    known, remote = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK, SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
    assert server.flags == known | remote | 1
    assert client.flags == known | 1


def test_a_connection_is_kept(receiver: Receiver, tracer: MemoryTracer) -> None:
    exporter = make_exporter(receiver.url)
    for _ in range(3):
        exporter.export(some(tracer))
    assert len(receiver.requests) == 3
    assert len(receiver.callers) == 1


def test_compression(receiver: Receiver, tracer: MemoryTracer) -> None:
    make_exporter(receiver.url, compression="gzip").export(some(tracer))
    [(_, headers, body)] = receiver.requests
    assert headers["content-encoding"] == "gzip"
    assert len(ExportTraceServiceRequest.FromString(gzip.decompress(body)).resource_spans) == 1


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (401, {}, "the collector answered 401 Unauthorized"),
        (404, {}, "the collector answered 404 Not Found"),
        (301, {"Location": "https://elsewhere/"}, "the collector answered 301 Moved Permanently"),
    ],
)
def test_a_refusal_says_what_it_was(
    receiver: Receiver, tracer: MemoryTracer, status: int, headers: dict[str, str], reason: str
) -> None:
    receiver.answers = [(status, b"no", headers)]
    with pytest.raises(ExportError) as caught:
        make_exporter(receiver.url).export(some(tracer))
    assert str(caught.value) == reason
    assert caught.value.lost is None
    assert len(receiver.requests) == 1


def test_a_busy_collector_is_asked_again(receiver: Receiver, tracer: MemoryTracer) -> None:
    receiver.answers = [(503, b"", {"Retry-After": "0"}), (429, b"", {"Retry-After": "0"})]
    make_exporter(receiver.url).export(some(tracer))
    assert len(receiver.requests) == 3


def test_what_is_rejected_of_a_batch_is_told(receiver: Receiver, tracer: MemoryTracer) -> None:
    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans = 2
    answer.partial_success.error_message = "too old"
    receiver.answers = [(200, answer.SerializeToString(), {}), (200, b"<html>", {})]
    exporter = make_exporter(receiver.url)
    with pytest.raises(ExportError, match="rejected them: 'too old'") as caught:
        exporter.export(some(tracer, 3))
    assert caught.value.lost == 2
    exporter.export(some(tracer))  # it took them, whatever it says


def test_a_dead_collector(dead: str, tracer: MemoryTracer, caplog: pytest.LogCaptureFixture) -> None:
    """It is an error of one line, and nothing of it is logged elsewhere."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ExportError, match=r"^the collector can't be reached: .*Connection refused$"):
        make_exporter(dead, timeout=0.5).export(some(tracer))
    assert caplog.records == []


def test_a_hanging_collector(silent: str, tracer: MemoryTracer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    began = time.monotonic()
    with pytest.raises(ExportError, match="can't be reached: timed out"):
        make_exporter(silent, timeout=0.2).export(some(tracer))
    assert time.monotonic() - began < 4.0
    assert caplog.records == []


def test_a_batch_is_not_tried_for_longer_than_its_time(receiver: Receiver, tracer: MemoryTracer) -> None:
    """The next attempt would come a second later."""
    receiver.answers = [(503, b"", {}), (503, b"", {"Retry-After": "2"})]
    for _ in range(2):
        with pytest.raises(ExportError, match="answered 503 Service Unavailable"):
            make_exporter(receiver.url, timeout=0.9).export(some(tracer))
    assert len(receiver.requests) == 2


def test_no_second_attempt_when_the_service_stops(dead: str, tracer: MemoryTracer) -> None:
    exporter = make_exporter(dead, timeout=60.0)
    exporter.hurry()
    began = time.monotonic()
    with pytest.raises(ExportError, match="Connection refused"):
        exporter.export(some(tracer))
    assert time.monotonic() - began < 5.0


class TestTls:
    """An https collector."""

    @pytest.fixture
    def authority(self, tmp_path: Path) -> trustme.CA:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        ours = authority.issue_cert("client@example.org")
        ours.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
        return authority

    @pytest.fixture
    def secure(self, authority: trustme.CA) -> Iterator[Receiver]:
        """It wants a certificate of its callers."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        receiver = Receiver(context)
        yield receiver
        receiver.close()

    def test_both_show_their_certificates(self, secure: Receiver, tracer: MemoryTracer, tmp_path: Path) -> None:
        exporter = make_exporter(
            secure.url, ca_file=str(tmp_path / "ca.pem"), client_certificate_file=str(tmp_path / "client.pem")
        )
        exporter.export(some(tracer))
        assert [span.name for span in secure.spans()] == ["0"]

    def test_a_collector_that_is_not_trusted_gets_nothing(self, secure: Receiver, tracer: MemoryTracer) -> None:
        with pytest.raises(ExportError, match="certificate verify failed"):
            make_exporter(secure.url, timeout=0.5).export(some(tracer))
        assert secure.requests == []


def test_the_environments_proxy(receiver: Receiver, tracer: MemoryTracer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", receiver.url.removesuffix("/v1/traces"))
    monkeypatch.setenv("no_proxy", "localhost")
    make_exporter("http://collector.invalid:4318/v1/traces").export(some(tracer))
    assert receiver.requests[0][0] == "http://collector.invalid:4318/v1/traces"
    with pytest.raises(ExportError, match="Connection refused"):
        make_exporter("http://localhost:1/v1/traces", timeout=0.5).export(some(tracer))


class TestUnderLoad:
    """The whole of it, with the thread: what a bad collector costs."""

    QUEUE = 50

    def export_to(self, url: str, reactor: FakeReactor, timeout: float) -> SpanExport:
        return SpanExport(
            make_exporter(url, timeout=timeout),
            clock=reactor,
            call_in_reactor=reactor.callFromThread,
            queue_size=self.QUEUE,
            batch_size=10,
            delay=0.01,
        )

    @pytest.mark.parametrize("kind", ["dead", "hanging", "slow"])
    def test_nothing_accumulates_and_the_stop_is_in_time(
        self, kind: str, receiver: Receiver, silent: str, dead: str
    ) -> None:
        """The clock is the test's, so that the stop's time is over when it says so; real time hardly passes."""
        reactor = FakeReactor()
        receiver.gate.clear()
        url = {"dead": dead, "hanging": silent, "slow": receiver.url}[kind]
        export = self.export_to(url, reactor, timeout=5.0)
        export.startService()
        began = time.monotonic()
        for span in some(MemoryTracer(reactor), 5000):
            export.put(span)
            assert export.waiting <= self.QUEUE
        assert export.dropped >= 5000 - self.QUEUE - 10 * 5
        stopped: list[None] = []
        export.stopService().addCallback(stopped.append)
        reactor.advance(STOP_SECONDS)
        assert stopped == [None]
        assert time.monotonic() - began < 4.0
        assert export.dropped >= 5000 - 10
        receiver.gate.set()

    def test_a_slow_collector_gets_what_there_was_room_for(self, receiver: Receiver) -> None:
        reactor = FakeReactor()
        receiver.gate.clear()
        export = self.export_to(receiver.url, reactor, timeout=5.0)
        export.startService()
        ended = some(MemoryTracer(reactor), 1000)
        export.put(ended[0])
        assert receiver.asked.wait(10)
        for span in ended[1:]:
            export.put(span)
        receiver.gate.set()
        stop(reactor, export)
        assert [span.name for span in receiver.spans()] == [str(number) for number in range(1 + self.QUEUE)]
        assert export.dropped == 1000 - 1 - self.QUEUE
