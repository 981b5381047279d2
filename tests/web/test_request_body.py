"""Bodies by pieces, on both HTTP versions: back-pressure, the caller's time, answers that begin while they come."""

import resource
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import Any

import h2.events
import pytest
import pytest_twisted
import trustme
from h2.exceptions import ProtocolError
from harness import Http2Client, MemoryTransport, connect, make_connections
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL.crypto import FILETYPE_PEM, load_certificate, load_privatekey
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.ssl import CertificateOptions
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThreadPool
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure

from ai_ticket.web.body import MAX_HELD
from ai_ticket.web.connections import ConnectionFactory, Connections
from ai_ticket.web.faults import PayloadTooLarge
from ai_ticket.web.request import HeaderList, Request, Response

reactor: Any = _reactor
HEAD = Response(200, b"", b"application/x-ndjson")


class Requests:
    """A listener that keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.lost = 0

    def received(self, request: Request) -> None:
        self.requests.append(request)
        request.when_lost(self._count)

    def _count(self) -> None:
        self.lost += 1

    def refuse(
        self, status: int, given: dict[bytes, bytes], peer: str, secure: bool, method: str | None = None
    ) -> tuple[HeaderList, bytes]:
        return [], b"refused"


class Producer:
    """What makes an answer."""

    paused = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        pass


class Upload:
    """A caller who sends a body of unknown length, on one HTTP version, and the request that it became."""

    def __init__(self, *, http2: bool, headers: dict[str, str] = {}) -> None:  # noqa: B006
        self.clock = Clock()
        self.connections = make_connections(self.clock)
        self.listener = Requests()
        self.client: Http2Client | None = None
        self.transport: Any
        if http2:
            self.client = Http2Client(self.connections, self.listener)
            self.connection, self.transport = self.client.connection, self.client.transport
            head = [(":method", "POST"), (":path", "/"), (":scheme", "https"), (":authority", "x"), *headers.items()]
            self.client.h2.send_headers(1, head)
            self.client.exchange()
        else:
            self.connection, self.transport = connect(self.connections, self.listener)
            fields = {"host": "x", "transfer-encoding": "chunked", **headers}
            lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            self.connection.dataReceived(f"POST / HTTP/1.1\r\n{lines}\r\n".encode())
        [self.request] = self.listener.requests

    def send(self, data: bytes) -> None:
        """Some of the body; on HTTP/2 within what the windows allow."""
        if self.client is None:
            self.connection.dataReceived(b"%x\r\n%b\r\n" % (len(data), data))
            return
        for start in range(0, len(data), 16_384):
            self.client.h2.send_data(1, data[start : start + 16_384])
            self.client.exchange()

    def end(self) -> None:
        if self.client is None:
            self.connection.dataReceived(b"0\r\n\r\n")
        else:
            self.client.h2.end_stream(1)
            self.client.exchange()

    def leave(self) -> None:
        if self.client is None:
            self.connection.connectionLost(Failure(ConnectionDone()))
        else:
            self.client.h2.reset_stream(1)
            self.client.exchange()

    @property
    def room(self) -> int:
        """How much the caller may send now."""
        if self.client is None:
            return 0 if self.transport.producerState == "paused" else 10_000
        self.client.exchange()
        return self.client.h2.local_flow_control_window(1)

    def fill(self) -> int:
        """Send as much as may be sent: how much that was."""
        sent = 0
        while self.room:
            size = min(self.room, 10_000)
            self.send(b"x" * size)
            sent += size
            assert sent <= 2 * MAX_HELD
        return sent

    def sweep(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.connections._check_deadlines()

    @property
    def cut(self) -> bool:
        if self.client is None:
            return bool(self.transport.aborted)
        self.client.exchange()
        return any(isinstance(event, h2.events.StreamReset) for event in self.client.events)

    @property
    def answer(self) -> bytes:
        """The answer's body so far, out of its chunks."""
        if self.client is not None:
            self.client.exchange()
            return self.client.response(1)[2]
        head, _, rest = self.transport.value().partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head:
            return bytes(rest)
        body = b""
        while rest and not rest.startswith(b"0\r\n"):
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return body

    @property
    def ended(self) -> bool:
        """Whether the answer came to its end."""
        if self.client is not None:
            self.client.exchange()
            return any(isinstance(event, h2.events.StreamEnded) for event in self.client.events)
        return bool(self.transport.value().endswith(b"0\r\n\r\n"))


def make_upload(http2: bool) -> Upload:
    return Upload(http2=http2)


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
def http2(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def upload(http2: bool) -> Upload:
    return Upload(http2=http2)


def result(of: Deferred[bytes]) -> bytes | Failure | None:
    """What came of a read; None while it waits."""
    found: list[Any] = []
    of.addBoth(found.append)
    return found[0] if found else None


def failed(of: Deferred[bytes]) -> type[Exception]:
    found = result(of)
    assert isinstance(found, Failure)
    return found.type  # type: ignore[return-value]


def test_pieces_as_they_come(upload: Upload) -> None:
    first = upload.request.read_some()
    assert not first.called
    upload.send(b"one")
    assert result(first) == b"one"
    upload.send(b"two")
    upload.send(b"three")
    assert result(upload.request.read_some()) == b"twothree"
    last = upload.request.read_some()
    upload.end()
    assert result(last) == b""
    assert result(upload.request.read_some()) == b""
    upload.request.respond(HEAD)


def test_what_came_before_the_end_is_read_before_it(upload: Upload) -> None:
    upload.send(b"all")
    upload.end()
    assert result(upload.request.read_some()) == b"all"
    assert result(upload.request.read_some()) == b""


def test_a_whole_body_that_came_before_it_was_asked_for(upload: Upload) -> None:
    upload.send(b"all of ")
    whole = upload.request.read_body(100)
    upload.send(b"it")
    upload.end()
    assert result(whole) == b"all of it"


def test_a_large_whole_body_that_nobody_asked_for_yet(upload: Upload) -> None:
    size = upload.fill()
    whole = upload.request.read_body(10 * MAX_HELD)
    for _ in range(50):
        assert upload.room >= 10_000
        upload.send(b"x" * 10_000)
        size += 10_000
    upload.end()
    assert result(whole) == b"x" * size


def test_a_whole_body_over_its_limit(upload: Upload) -> None:
    upload.send(b"x" * 60)
    whole = upload.request.read_body(100)
    upload.send(b"x" * 60)
    assert failed(whole) is PayloadTooLarge
    assert failed(upload.request.read_body(100)) is PayloadTooLarge


@given(http2=st.booleans(), pieces=st.lists(st.tuples(st.integers(1, 30_000), st.booleans()), max_size=15))
def test_any_pieces_make_the_same_body(http2: bool, pieces: list[tuple[int, bool]]) -> None:
    """However the caller cuts it up, and whether a reader waits for it or comes by when the caller must wait."""
    upload = make_upload(http2)
    sent, found = b"", b""
    waiting: Deferred[bytes] | None = None
    for number, (size, eager) in enumerate(pieces):
        if not upload.room:
            found += upload.request.read_some().result
        if eager and waiting is None:
            waiting = upload.request.read_some()
        piece = bytes([number]) * min(size, upload.room)
        sent += piece
        upload.send(piece)
        if waiting is not None:
            found += waiting.result
            waiting = None
    upload.end()
    found += upload.request.read_some().result
    assert found == sent
    assert upload.request.read_some().result == b""


@given(cuts=st.lists(st.integers(1, 400), max_size=30), sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_any_packets_make_the_same_chunked_body(cuts: list[int], sizes: list[int]) -> None:
    body = bytes(range(250)) * 8
    wire, rest = b"", body
    while rest:
        for size in sizes:
            wire += b"%x\r\n%b\r\n" % (len(rest[:size]), rest[:size]) if rest else b""
            rest = rest[size:]
    wire += b"0\r\n\r\n"
    upload = make_upload(False)
    found = b""
    for cut in cuts:
        upload.connection.dataReceived(wire[:cut])
        wire = wire[cut:]
        if upload.request.body._held:
            found += upload.request.read_some().result
    upload.connection.dataReceived(wire)
    found += upload.request.read_some().result
    assert found == body
    assert upload.request.body.ended


def test_the_caller_waits_while_nobody_reads(upload: Upload) -> None:
    """Memory holds about 64 KiB, and on HTTP/2 what its window lets in beyond that."""
    sent = read = 0
    for _ in range(8):
        sent += upload.fill()
        piece = result(upload.request.read_some())
        assert isinstance(piece, bytes)
        assert MAX_HELD <= len(piece) <= 2 * MAX_HELD
        read += len(piece)
    assert sent == read


def test_a_body_that_ends_while_the_caller_was_kept_waiting(http2: bool) -> None:
    """The end may come with the very bytes that were too many; reading goes on then."""
    upload = Upload(http2=http2)
    if http2:
        upload.send(b"x" * 65_535)
        upload.end()
    else:
        upload.connection.dataReceived(b"%x\r\n%b\r\n0\r\n\r\n" % (70_000, b"x" * 70_000))
        assert upload.transport.producerState == "producing"
    assert len(result(upload.request.read_some()) or b"") >= 65_535  # type: ignore[arg-type]
    assert result(upload.request.read_some()) == b""
    upload.request.respond(HEAD)
    if not http2:
        upload.connection.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert len(upload.listener.requests) == 2


def test_other_streams_go_on_while_one_is_not_read() -> None:
    upload = Upload(http2=True)
    assert upload.client is not None
    upload.fill()
    for stream in (3, 5, 7, 9):
        head = [(":method", "POST"), (":path", "/"), (":scheme", "https"), (":authority", "x")]
        upload.client.h2.send_headers(stream, head)
        upload.client.exchange()
        whole = upload.listener.requests[-1].read_body(10**6)
        for _ in range(10):
            upload.client.h2.send_data(stream, b"y" * 10_000)
            upload.client.exchange()
        upload.client.h2.end_stream(stream)
        upload.client.exchange()
        assert result(whole) == b"y" * 100_000
    assert not upload.room


def test_a_stream_that_was_not_read_and_is_reset_leaves_the_connection_its_window() -> None:
    upload = Upload(http2=True)
    assert upload.client is not None
    upload.fill()
    upload.leave()
    assert upload.listener.lost == 1
    head = [(":method", "POST"), (":path", "/"), (":scheme", "https"), (":authority", "x")]
    upload.client.h2.send_headers(3, head)
    assert upload.client.h2.local_flow_control_window(3) > 30_000


@pytest.mark.parametrize("read", [lambda request: request.read_some(), lambda request: request.read_body(9)])
def test_who_waits_for_it_is_told_once_to_send(http2: bool, read: Callable[[Request], Deferred[bytes]]) -> None:
    upload = Upload(http2=http2, headers={"expect": "100-continue"})

    def told() -> int:
        if upload.client is None:
            return int(upload.transport.value().count(b"100 Continue"))
        upload.client.exchange()
        return len([one for one in upload.client.events if isinstance(one, h2.events.InformationalResponseReceived)])

    assert told() == 0
    waiting = read(upload.request)
    assert told() == 1
    waiting.cancel()
    assert failed(waiting) is CancelledError
    read(upload.request).addErrback(lambda _: None)
    assert told() == 1


def test_it_is_too_late_to_tell_once_the_answer_has_begun() -> None:
    upload = Upload(http2=False, headers={"expect": "100-continue"})
    upload.request.start(HEAD, Producer())
    upload.request.read_some()
    assert b"100 Continue" not in upload.transport.value()


def test_a_caller_who_leaves(upload: Upload) -> None:
    waiting = upload.request.read_some()
    upload.leave()
    assert failed(waiting) is CancelledError
    assert failed(upload.request.read_some()) is CancelledError
    assert failed(upload.request.read_body(9)) is CancelledError
    assert upload.listener.lost == 1
    upload.request.start(HEAD, Producer())
    upload.request.write(b"x")
    assert not upload.request.streaming


def test_a_read_that_is_given_up_loses_nothing(upload: Upload) -> None:
    waiting = upload.request.read_some()
    waiting.cancel()
    assert failed(waiting) is CancelledError
    upload.send(b"all")
    upload.end()
    assert result(upload.request.read_some()) == b"all"


# The caller's time.


def test_no_time_runs_while_nobody_waits_for_the_caller(upload: Upload) -> None:
    upload.sweep(1000)
    upload.send(b"x")
    assert result(upload.request.read_some()) == b"x"
    upload.sweep(1000)
    upload.fill()
    upload.sweep(1000)
    assert not upload.cut


@pytest.mark.parametrize("read", [lambda request: request.read_some(), lambda request: request.read_body(9)])
def test_a_caller_we_wait_for_must_send_in_time(upload: Upload, read: Callable[[Request], Deferred[bytes]]) -> None:
    waiting = read(upload.request)
    upload.sweep(29)
    assert not upload.cut
    upload.sweep(2)
    assert upload.cut
    upload.connection.connectionLost(Failure(ConnectionDone()))
    assert failed(waiting) is CancelledError


def test_the_time_adds_up_over_all_pieces(upload: Upload) -> None:
    """A body that drips is cut off, however often."""
    for _ in range(29):
        waiting = upload.request.read_some()
        upload.sweep(1)
        upload.send(b"x")
        assert result(waiting) == b"x"
        upload.sweep(5)
        assert not upload.cut
    upload.request.read_some().addErrback(lambda _: None)
    upload.sweep(2)
    assert upload.cut


def test_a_body_that_makes_progress_has_all_the_time(upload: Upload) -> None:
    for _ in range(5):
        waiting = upload.request.read_some()
        upload.sweep(20)
        upload.send(b"a line\n")
        assert result(waiting) == b"a line\n"
        upload.request.renew_body_time()
    waiting = upload.request.read_some()
    upload.sweep(20)
    upload.request.renew_body_time()
    upload.sweep(29)
    assert not upload.cut
    upload.sweep(2)
    assert upload.cut
    waiting.addErrback(lambda _: None)


def test_no_time_runs_while_nothing_is_read() -> None:
    """What the caller has sent may lie there: here behind requests of which it takes no answers."""
    upload = Upload(http2=True)
    assert upload.client is not None
    waiting = upload.request.read_some()
    upload.sweep(20)
    large = Response(200, b"", headers=((b"large", b"x" * 5000),))
    upload.listener.received = lambda request: request.respond(large)  # type: ignore[method-assign]
    head = [(":method", "HEAD"), (":path", "/"), (":scheme", "https"), (":authority", "x")]
    for _ in range(10):
        upload.connection.pauseProducing()
        for _ in range(20):
            upload.client.h2.send_headers(upload.client.h2.get_next_available_stream_id(), head, end_stream=True)
        upload.connection.dataReceived(upload.client.h2.data_to_send())
        upload.sweep(0)
        assert upload.transport.producerState == "paused"
        upload.sweep(29)
        upload.connection.resumeProducing()
        upload.client.exchange()
        upload.sweep(0)
    assert not upload.cut
    upload.sweep(11)
    assert upload.cut
    waiting.addErrback(lambda _: None)


# Answers that begin while the body is still coming.


def test_an_answer_begins_while_the_body_comes(upload: Upload) -> None:
    upload.request.start(HEAD, Producer())
    for number in range(5):
        upload.send(b"question %d\n" % number)
        piece = result(upload.request.read_some())
        assert piece == b"question %d\n" % number
        upload.request.write(b"answer %d\n" % number)
        assert upload.answer.endswith(b"answer %d\n" % number)
    upload.end()
    assert result(upload.request.read_some()) == b""
    upload.request.write(b"last")
    assert upload.answer == b"".join(b"answer %d\n" % number for number in range(5)) + b"last"
    assert not upload.ended
    upload.request.finish()
    assert upload.ended
    assert not upload.cut


def test_the_connection_is_kept_where_the_body_ended_first() -> None:
    upload = Upload(http2=False)
    upload.request.start(HEAD, Producer())
    upload.end()
    upload.request.finish()
    assert b"connection: close" not in upload.transport.value()
    assert not upload.transport.disconnecting
    upload.connection.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert len(upload.listener.requests) == 2


def test_an_answer_that_ends_before_the_body(upload: Upload) -> None:
    """The rest is dropped, and who still waits for it told so."""
    waiting = upload.request.read_some()
    upload.request.start(HEAD, Producer())
    upload.request.write(b"enough")
    upload.request.finish()
    assert failed(waiting) is CancelledError
    assert failed(upload.request.read_some()) is CancelledError
    assert (upload.answer, upload.ended) == (b"enough", True)
    for _ in range(20):
        upload.send(b"x" * 10_000)
    assert not upload.request.body._held
    assert not upload.cut
    upload.end()
    if upload.client is None:
        assert upload.transport.disconnecting
    else:
        assert upload.connection.codec is not None
        assert upload.connection.codec.idle
    assert not upload.cut


@pytest.mark.parametrize("answer", ["respond", "finish"])
def test_what_is_not_read_any_more_is_let_in_and_dropped(upload: Upload, answer: str) -> None:
    """Also where the caller had been kept waiting."""
    upload.fill()
    if answer == "respond":
        upload.request.respond(Response(400, b"{}"))
    else:
        upload.request.start(HEAD, Producer())
        upload.request.finish()
    if upload.client is not None:
        upload.client.exchange()
    assert upload.room
    upload.send(b"x" * 10_000)
    upload.sweep(6)
    assert upload.cut, "but not for ever"


def test_a_whole_answer_while_the_body_is_read(upload: Upload) -> None:
    upload.send(b"some")
    assert result(upload.request.read_some()) == b"some"
    waiting = upload.request.read_some()
    upload.request.respond(Response(400, b"no more"))
    assert failed(waiting) is CancelledError
    assert upload.answer == b"no more"
    assert upload.listener.lost == 0


def test_an_answer_that_is_cut_while_the_body_comes(upload: Upload) -> None:
    waiting = upload.request.read_some()
    upload.request.start(HEAD, Producer())
    upload.request.write(b"some")
    upload.request.abort()
    upload.sweep(2)
    assert upload.cut
    assert failed(waiting) is CancelledError
    upload.request.write(b"more")
    assert upload.answer == b"some"


def test_a_body_that_turns_out_malformed_cuts_the_answer_that_has_begun() -> None:
    upload = Upload(http2=False)
    waiting = upload.request.read_some()
    upload.request.start(HEAD, Producer())
    upload.connection.dataReceived(b"zz\r\n")
    assert failed(waiting) is CancelledError
    assert upload.listener.lost == 1
    assert upload.transport.disconnecting
    assert not upload.ended


def test_a_caller_who_leaves_in_the_midst_of_both(upload: Upload) -> None:
    upload.request.start(HEAD, Producer())
    waiting = upload.request.read_some()
    upload.leave()
    assert failed(waiting) is CancelledError
    assert upload.listener.lost == 1
    upload.request.write(b"x")
    upload.request.finish()


def test_a_stream_that_ends_within_the_packet_that_begins_it_is_lost_though_its_answer_began() -> None:
    upload = Upload(http2=True)
    assert upload.client is not None
    upload.listener.received = lambda request: _answer_at_once(upload, request)  # type: ignore[method-assign]
    head = [(":method", "POST"), (":path", "/"), (":scheme", "https"), (":authority", "x")]
    upload.client.h2.send_headers(3, head)
    upload.client.h2.reset_stream(3)
    upload.client.exchange()
    assert upload.listener.lost == 1


def _answer_at_once(upload: Upload, request: Request) -> None:
    request.when_lost(upload.listener._count)
    request.start(HEAD, Producer())
    request.write(b"x")


def test_a_stream_whose_answer_can_not_begin_is_not_left_lying(monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Upload(http2=True)
    codec: Any = upload.connection.codec

    def refuse(*args: object, **named: object) -> None:
        raise ProtocolError

    monkeypatch.setattr(codec.h2, "send_headers", refuse)
    begin(upload)
    upload.sweep(1)
    assert upload.listener.lost == 1
    assert codec.idle


# Callers who do not take their answers.


def begin(upload: Upload) -> Producer:
    producer = Producer()
    upload.request.start(HEAD, producer)
    return producer


def fill(upload: Upload) -> None:
    """Answer until what waits for the caller is too much."""
    upload.transport.full_at = 50_000
    for _ in range(20):
        upload.request.write(b"x" * 10_000)


def test_a_producer_is_paused_while_the_caller_does_not_read(upload: Upload) -> None:
    producer = begin(upload)
    fill(upload)
    assert producer.paused
    size = len(upload.transport.value())
    upload.transport.clear()
    upload.connection.resumeProducing()
    for _ in range(10):
        if upload.client is not None:
            upload.client.h2.increment_flow_control_window(65_535)
            upload.client.h2.increment_flow_control_window(65_535, 1)
            upload.connection.dataReceived(upload.client.h2.data_to_send())
        upload.transport.clear()
        upload.connection.resumeProducing()
    assert size > 50_000
    assert not producer.paused


def test_a_producer_is_paused_at_once_where_the_transport_is_full_already() -> None:
    upload = Upload(http2=False)
    upload.connection.pauseProducing()
    producer = begin(upload)
    assert producer.paused
    upload.connection.resumeProducing()
    assert not producer.paused


def test_a_caller_who_takes_nothing_of_the_answer_is_cut(upload: Upload) -> None:
    begin(upload)
    fill(upload)
    upload.sweep(29)
    assert not upload.transport.aborted
    upload.sweep(2)
    assert upload.transport.aborted
    upload.connection.connectionLost(Failure(ConnectionDone()))
    assert upload.listener.lost == 1


def test_a_caller_whose_window_stays_shut_is_cut_alone() -> None:
    upload = Upload(http2=True)
    begin(upload)
    assert upload.client is not None
    upload.request.write(b"x" * 70_000)
    upload.client.exchange()
    upload.sweep(29)
    assert not upload.cut
    upload.sweep(2)
    assert upload.cut
    assert not upload.transport.aborted
    assert upload.listener.lost == 1


def test_a_caller_who_opens_its_window_little_by_little_is_not_cut() -> None:
    upload = Upload(http2=True)
    begin(upload)
    assert upload.client is not None
    upload.request.write(b"x" * 600_000)
    upload.client.exchange()
    for _ in range(5):
        upload.sweep(25)
        upload.client.h2.increment_flow_control_window(105_000, 1)
        upload.client.h2.increment_flow_control_window(105_000)
        upload.client.exchange()
        assert not upload.cut
    assert len(upload.answer) == 65_535 + 5 * 105_000


def test_a_caller_whose_transport_was_full_has_lost_no_time() -> None:
    upload = Upload(http2=True)
    begin(upload)
    assert upload.client is not None
    upload.request.write(b"x" * 70_000)
    upload.client.exchange()
    upload.sweep(20)
    upload.connection.pauseProducing()
    upload.sweep(20)
    upload.connection.resumeProducing()
    upload.sweep(9)
    assert not upload.cut
    upload.sweep(2)
    assert upload.cut


class Socket:
    """A socket of which the kernel tells something."""

    def __init__(self) -> None:
        self.state = 1
        self.acked = 0

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        return struct.pack("=B119xQ", self.state, self.acked)


def watched(upload: Upload) -> Socket:
    found = Socket()
    upload.transport.getHandle = lambda: found
    return found


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of this test is the test's own."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("socket.TCP_INFO", 11, raising=False)


@pytest.mark.usefixtures("linux")
def test_a_caller_who_reads_slowly_is_not_cut(upload: Upload) -> None:
    """The transport does not say so before its buffer is empty, but the kernel does."""
    kernel = watched(upload)
    begin(upload)
    fill(upload)
    for _ in range(10):
        upload.sweep(25)
        kernel.acked += 1000
    upload.sweep(1)
    assert not upload.transport.aborted
    upload.sweep(29)
    assert not upload.transport.aborted
    upload.sweep(1)
    assert upload.transport.aborted


@pytest.mark.usefixtures("linux")
def test_the_last_answer_is_waited_for_while_it_is_taken() -> None:
    upload = Upload(http2=False, headers={"connection": "close"})
    kernel = watched(upload)
    upload.end()
    upload.request.respond(Response(200, b"x" * 10**6))
    assert upload.transport.disconnecting
    for _ in range(10):
        upload.sweep(4)
        kernel.acked += 1000
    assert not upload.transport.aborted
    for _ in range(7):
        upload.sweep(1)
    assert upload.transport.aborted


def test_the_last_answer_is_waited_for_as_long_as_any_other() -> None:
    upload = Upload(http2=False, headers={"connection": "close"})
    upload.transport.full_at = 50_000
    upload.end()
    upload.request.respond(Response(200, b"x" * 10**6))
    assert upload.transport.disconnecting
    upload.sweep(29)
    assert not upload.transport.aborted
    upload.sweep(2)
    assert upload.transport.aborted


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize("state", [7, 8])
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_caller_who_leaves_while_nothing_is_read(state: int, pipelined: bool) -> None:
    upload = Upload(http2=False)
    kernel = watched(upload)
    if pipelined:
        upload.end()
        upload.connection.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3000)
    else:
        upload.fill()
    assert not upload.room
    upload.sweep(1)
    assert not upload.transport.aborted
    kernel.state = state
    upload.sweep(1)
    assert upload.transport.aborted


def test_where_the_kernel_does_not_say_a_paused_connection_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    upload = Upload(http2=False)
    watched(upload).state = 7
    upload.fill()
    upload.sweep(1000)
    assert not upload.transport.aborted
    assert isinstance(upload.transport, MemoryTransport)


# On a real network.


class Uploader(Thread):
    """A caller with a socket that blocks: sends a body in chunks for as long as it is let."""

    def __init__(self, port: int, chunks: int) -> None:
        super().__init__()
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._chunks = chunks
        self.answer = b""

    def run(self) -> None:
        chunk = b"%x\r\n%b\r\n" % (100_000, b"x" * 100_000)
        with self._socket:
            self._socket.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(self._chunks):
                self._socket.sendall(chunk)
            self._socket.sendall(b"0\r\n\r\n")
            self.answer = self._socket.recv(1000)


class Arriving(Requests):
    """Says when a request has come."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: Deferred[Request] = Deferred()
        self.gone: Deferred[None] = Deferred()

    def received(self, request: Request) -> None:
        super().received(request)
        self.arrived.callback(request)

    def _count(self) -> None:
        self.gone.callback(None)


def resident_bytes() -> int:
    """How much memory the process takes, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.fixture
def served() -> Iterator[tuple[Connections, Arriving, Callable[[Any], int]]]:
    """Connections that are watched on the real clock; a function that listens for them, and gives the port."""
    connections = make_connections(reactor)
    connections.start()
    ports: list[Any] = []

    def listen(factory: Any) -> int:
        ports.append(reactor.listenTCP(0, factory, interface="127.0.0.1"))
        return int(ports[-1].getHost().port)

    yield connections, Arriving(), listen
    connections.stop()
    for port in ports:
        pytest_twisted.blockon(port.stopListening())
    pytest_twisted.blockon(deferLater(reactor, 0.01))


Served = tuple[Connections, Arriving, Callable[[Any], int]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest_twisted.ensureDeferred
async def test_a_long_upload_with_a_slow_reader_keeps_memory_flat(served: Served) -> None:
    connections, listener, listen = served
    uploader = Uploader(listen(ConnectionFactory(connections, listener, secure=False)), 1000)
    uploader.start()
    request = await listener.arrived
    before = most = resident_bytes()
    size = 0
    while piece := await request.read_some():
        size += len(piece)
        most = max(most, resident_bytes())
        await deferLater(reactor, 0.0005)
    request.respond(Response(200, b"thanks"))
    await deferToThreadPool(reactor, reactor.getThreadPool(), uploader.join)
    assert size == 100_000_000
    assert uploader.answer.endswith(b"thanks")
    assert most - before < 10_000_000


class Vanishing:
    """A caller who sends the start of a large body, and goes when told to, without a word."""

    def __init__(self, *, secure: bool) -> None:
        self._secure = secure
        self._told = Event()

    def call(self, port: int, size: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as plain:
            caller = plain
            if self._secure:
                context = ssl.create_default_context()
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
                caller = context.wrap_socket(plain)
            caller.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n")
            caller.sendall(b"x" * size)
            self._told.wait(10)
            caller.close()

    def hang_up(self) -> None:
        self._told.set()


def with_tls(factory: Any) -> TLSMemoryBIOFactory:
    certificate = trustme.CA().issue_cert("localhost")
    options = CertificateOptions(
        privateKey=load_privatekey(FILETYPE_PEM, certificate.private_key_pem.bytes()),
        certificate=load_certificate(FILETYPE_PEM, certificate.cert_chain_pems[0].bytes()),
    )
    return TLSMemoryBIOFactory(options, False, factory, reactor)


async def vanish(served: Served, *, secure: bool, size: int, answer: bool) -> float:
    """How long it took to notice, in seconds, that a caller has gone while it was kept waiting."""
    connections, listener, listen = served
    factory: Any = ConnectionFactory(connections, listener, secure=secure)
    caller = Vanishing(secure=secure)
    port = listen(with_tls(factory) if secure else factory)
    calling = deferToThreadPool(reactor, reactor.getThreadPool(), caller.call, port, size)
    request = await listener.arrived
    while not request.body._paused:
        await deferLater(reactor, 0.01)
    caller.hang_up()
    await calling
    began = reactor.seconds()
    if answer:
        request.start(HEAD, Producer())
        request.write(b"x")
    await listener.gone.addTimeout(5, reactor)
    assert request.lost
    return float(reactor.seconds() - began)


linux_tells = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


@linux_tells
@pytest.mark.parametrize("secure", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_caller_who_hangs_up_while_it_is_kept_waiting(served: Served, secure: bool) -> None:
    assert await vanish(served, secure=secure, size=150_000, answer=False) < 1.5


@linux_tells
@pytest_twisted.ensureDeferred
async def test_a_caller_who_hangs_up_with_more_under_way_than_the_kernel_takes(served: Served) -> None:
    """Its good-bye waits behind what it has sent; but a piece of the answer is refused, which shows it."""
    assert await vanish(served, secure=False, size=400_000, answer=True) < 1.5
