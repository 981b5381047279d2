"""Answers in pieces: tokens as they come, signs of life, errors within the stream, callers who lag or leave."""

import json
from collections.abc import Callable
from typing import Any

import h2.events
import pytest
from harness import COMPLETION, Http2Client, MemoryTransport
from msgspec.structs import replace
from surface import Surface
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from ai_ticket.errors import ApiServerError, Overloaded
from ai_ticket.interfaces import Sink

BODY = b'{"content": "hello", "stream": true, "metadata": {"a": "b"}}'
HEAD = b"POST /event HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
POST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
HEADERS = [("authorization", "Bearer secret"), ("content-type", "application/json")]


class Stream:
    """A streamed answer under way on one HTTP version: what the test makes come, and what the caller has of it."""

    def __init__(self, surface: Surface, *, http2: bool, path: str = "/event", body: bytes = BODY) -> None:
        self.surface = surface
        self.done: Deferred[Any] = Deferred(lambda _: self.cancelled.append(True))
        self.cancelled: list[bool] = []
        surface.pipeline.answer = lambda: self.done
        self.client: Http2Client | None = None
        if http2:
            self.client = surface.connect2()
            self.stream_id = self.client.request("POST", path, HEADERS, body)
        else:
            self.connection, self.transport = surface.connect()
            head = HEAD.replace(b"/event", path.encode()) + b"Content-Length: %d\r\n\r\n" % len(body)
            self.connection.dataReceived(head + body)

    @property
    def sink(self) -> Sink:
        sink = self.surface.pipeline.jobs[-1].sink
        assert sink is not None
        return sink

    @property
    def status(self) -> int:
        if self.client is not None:
            self.client.exchange()
            return self.client.response(self.stream_id)[0]
        head = self.transport.value().partition(b"\r\n\r\n")[0]
        return int(head.split()[1]) if head else 0

    @property
    def body(self) -> str:
        if self.client is not None:
            self.client.exchange()
            return self.client.response(self.stream_id)[2].decode()
        head, _, rest = self.transport.value().partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head:
            return rest.decode()
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return body.decode()

    @property
    def events(self) -> list[Any]:
        """The JSON of `data:` events; comments and named events as they are."""
        blocks = self.body.split("\n\n")
        assert blocks.pop() == ""
        return [json.loads(block[6:]) if block.startswith("data: ") else block for block in blocks]

    @property
    def ended(self) -> bool:
        if self.client is not None:
            self.client.exchange()
            return any(isinstance(event, h2.events.StreamEnded) for event in self.client.events)
        return self.transport.value().endswith(b"\r\n0\r\n\r\n")

    @property
    def cut(self) -> bool:
        if self.client is not None:
            self.client.exchange()
            return any(isinstance(event, h2.events.StreamReset) for event in self.client.events)
        return self.transport.aborted

    def leave(self) -> None:
        if self.client is not None:
            self.client.h2.reset_stream(self.stream_id)
            self.client.exchange()
        else:
            self.connection.connectionLost(Failure(ConnectionDone()))


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
def stream(surface: Surface, request: pytest.FixtureRequest) -> Stream:
    return Stream(surface, http2=request.param)


def test_tokens_as_they_come(stream: Stream) -> None:
    assert stream.status == 0
    stream.sink.write("Grüß ")
    assert stream.status == 200
    assert stream.events == [{"delta": "Grüß ", "done": False}]
    stream.sink.write("Gott 🙂")
    assert stream.events[1:] == [{"delta": "Gott 🙂", "done": False}]
    stream.done.callback(replace(COMPLETION, text=""))
    assert stream.events[2:] == [
        {
            "delta": "",
            "done": True,
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            "model": "a-model",
            "request_id": "id0",
            "metadata": {"a": "b"},
        }
    ]
    assert stream.ended
    assert stream.surface.recorder.finished == [("/event", "POST", 200)]
    assert not stream.surface.clock.getDelayedCalls()


def test_signs_of_life_while_it_waits(stream: Stream) -> None:
    stream.surface.clock.advance(9.9)
    assert stream.status == 0
    stream.surface.clock.advance(0.2)
    assert (stream.status, stream.events) == (200, [": keep-alive"])
    stream.surface.clock.advance(10)
    assert stream.events == [": keep-alive"] * 2
    stream.sink.write("x")
    stream.surface.clock.advance(100)
    assert stream.events[2:] == [{"delta": "x", "done": False}]
    stream.done.callback(COMPLETION)


def test_a_sign_of_life_tells_the_place_in_the_queue(stream: Stream, surface: Surface) -> None:
    surface.pipeline.place = 12
    surface.clock.advance(10)
    surface.pipeline.place = 1
    surface.clock.advance(10)
    surface.pipeline.place = None
    surface.clock.advance(10)
    assert stream.events == [": keep-alive position=12", ": keep-alive position=1", ": keep-alive"]


def test_a_failure_before_anything_was_sent_has_its_own_status(stream: Stream) -> None:
    stream.done.errback(Overloaded(retry_after=7))
    assert stream.status == 503
    assert json.loads(stream.body)["error"] == "overloaded"
    assert not stream.surface.clock.getDelayedCalls()


@pytest.mark.parametrize(
    "begin", [lambda stream: stream.sink.write("x"), lambda stream: stream.surface.clock.advance(11)]
)
def test_a_failure_after_that_is_told_within_the_stream(stream: Stream, begin: Callable[[Stream], None]) -> None:
    begin(stream)
    stream.done.errback(ApiServerError("why"))
    last = stream.events[-1]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2]) == {
        "error": "api_server_error",
        "message": "The model server failed.",
        "details": "why",
        "request_id": "id0",
    }
    assert stream.ended
    assert stream.surface.recorder.in_flight == 0


@pytest.mark.expects_logged_failure
def test_a_bug_is_told_within_the_stream_too(stream: Stream) -> None:
    stream.sink.write("x")
    stream.done.errback(RuntimeError("secret thing"))
    assert '"internal_error"' in stream.events[-1]
    assert "secret thing" not in stream.body
    assert stream.ended


@pytest.mark.parametrize("begun", [False, True])
def test_a_caller_who_leaves(stream: Stream, begun: bool) -> None:
    if begun:
        stream.sink.write("x")
    stream.leave()
    assert stream.cancelled == [True]
    stream.sink.write("y")
    assert stream.surface.recorder.finished == [("/event", "POST", 499)]
    assert stream.surface.recorder.in_flight == 0
    assert not stream.surface.clock.getDelayedCalls()


def test_a_stop_of_the_service_is_told_within_the_stream(stream: Stream) -> None:
    stream.sink.write("x")
    stream.surface.site.cut()
    assert '"shutting_down"' in stream.events[-1]
    assert stream.ended


def test_no_deadline_cuts_a_long_stream(stream: Stream) -> None:
    for _ in range(100):
        stream.sink.write("x")
        stream.surface.clock.advance(29)
        stream.surface.connections._check_deadlines()
    stream.done.callback(COMPLETION)
    assert len(stream.events) == 101
    assert stream.ended


class Producer:
    """Stands for the model server's stream."""

    def __init__(self) -> None:
        self.paused = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        pass


def test_a_caller_who_lags_slows_the_model_server_down_http1(surface: Surface) -> None:
    stream = Stream(surface, http2=False)
    upstream = Producer()
    stream.sink.attach(upstream)  # type: ignore[arg-type]
    stream.sink.write("x")
    own = stream.transport.producer
    assert own is not None
    own.pauseProducing()
    assert upstream.paused
    own.resumeProducing()
    assert not upstream.paused
    own.pauseProducing()
    late = Producer()
    stream.sink.attach(late)  # type: ignore[arg-type]
    assert late.paused
    stream.done.errback(ApiServerError())
    assert stream.cut, "who does not read would not take the error either"


def test_a_caller_who_lags_slows_the_model_server_down_http2(surface: Surface) -> None:
    stream = Stream(surface, http2=True)
    assert stream.client is not None
    upstream = Producer()
    stream.sink.attach(upstream)  # type: ignore[arg-type]
    text = "x" * 10_000
    sent = 0
    while not upstream.paused:
        stream.sink.write(text)
        sent += 1
        assert sent < 30
    assert 12 <= sent <= 15, "what the window takes, and not much more"
    for _ in range(40):
        stream.client.h2.increment_flow_control_window(50_000)
        stream.client.h2.increment_flow_control_window(50_000, stream.stream_id)
        stream.client.exchange()
    assert not upstream.paused
    stream.done.callback(COMPLETION)
    assert stream.body.count("x" * 10_000) == sent
    assert stream.ended


def test_a_caller_who_stops_reading_is_cut_off_http2(surface: Surface) -> None:
    stream = Stream(surface, http2=True)
    for _ in range(10):
        stream.sink.write("x" * 10_000)
    for _ in range(80):
        stream.sink.write("y")
        surface.clock.advance(1)
        surface.connections._check_deadlines()
    assert stream.cut
    assert stream.cancelled == [True]


def test_http_10_gets_the_stream_until_the_connection_closes(surface: Surface) -> None:
    surface.pipeline.answer = lambda: succeed(COMPLETION)
    connection, transport = surface.connect()
    connection.dataReceived(POST.replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = transport.value().partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body.startswith(b'data: {"delta":"","done":true')
    assert transport.disconnecting


def test_the_connection_serves_further_requests(surface: Surface) -> None:
    surface.pipeline.answer = lambda: succeed(COMPLETION)
    connection, transport = surface.connect()
    connection.dataReceived(POST + POST)
    connection.dataReceived(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert transport.value().count(b"HTTP/1.1 200 OK") == 3


def test_a_fault_that_comes_at_once(surface: Surface) -> None:
    surface.pipeline.answer = lambda: fail(Overloaded(retry_after=1))
    [(status, _, _)] = surface.http1(POST)
    assert status == 503


@pytest.mark.parametrize("when", ["before", "meanwhile", "leaving"])
def test_draining_closes_the_connection_behind_a_stream_that_said_so(surface: Surface, when: str) -> None:
    """Else its caller, who may be sending the next request on it, is told by the answer to that."""
    if when == "before":
        surface.connections.drain()
    stream = Stream(surface, http2=False)
    stream.sink.write("x")
    surface.connections.drain()
    if when == "leaving":
        surface.connections.leave()
    stream.done.callback(COMPLETION)
    assert stream.ended
    assert isinstance(stream.transport, MemoryTransport)
    assert (b"connection: close" in stream.transport.value()) is (when == "before")
    assert stream.transport.disconnecting is (when != "meanwhile")
