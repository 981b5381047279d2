"""Requests to model servers: what is sent, on which connection, and how each stage of it ends."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from harness import MemoryTransport
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.endpoints import wrapClientTLS
from twisted.internet.error import ConnectingCancelledError, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint
from twisted.internet.ssl import optionsForClientTLS
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket.backend.address import Location
from ai_ticket.backend.body import Body
from ai_ticket.backend.http1 import Origin, header_lines, request_head
from ai_ticket.backend.http1_connection import Response
from ai_ticket.backend.server import ModelServer
from ai_ticket.errors import ApiConnectionError, ApiResponseStructureError, DomainError
from ai_ticket.urls import request_url

OK = b"HTTP/1.1 200 OK\r\n"
ANSWER = OK + b"Content-Length: 4\r\n\r\nbody"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ASKED = b"GET / HTTP/1.1\r\n\r\n"


class Wire(MemoryTransport):
    """The client's end of a connection; the test is the server."""

    def __init__(self, protocol: Any) -> None:
        super().__init__()
        self.protocol_ = protocol
        self.writes = 0
        self.closed = False

    def write(self, data: bytes) -> None:
        super().write(data)
        self.writes += 1

    def says(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.protocol_.dataReceived(piece)

    def ends(self, reason: Exception | None = None) -> None:
        if not self.closed:
            self.closed = True
            self.protocol_.connectionLost(Failure(reason or ConnectionDone()))

    def abortConnection(self) -> None:
        self.aborted = True
        self.ends(ConnectionLost())

    @property
    def paused(self) -> bool:
        return self.producerState == "paused"


@implementer(IStreamClientEndpoint)
class Wires:
    """Makes connections at once, or where `waits` when the test fires `waiting`."""

    def __init__(self, *, waits: bool = False) -> None:
        self.made: list[Wire] = []
        self.waiting: Deferred[Any] | None = None
        self._waits = waits

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[Any]:
        if self._waits:
            self.waiting = Deferred(lambda deferred: deferred.errback(ConnectingCancelledError("host:1")))
            return self.waiting
        protocol: Any = protocolFactory.buildProtocol(None)  # type: ignore[arg-type]
        wire = Wire(protocol)
        self.made.append(wire)
        protocol.makeConnection(wire)
        return succeed(protocol)


class Read:
    """A body that is read, and what became of it."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.pieces: list[bytes] = []
        self.outcome: list[DomainError | None] = []
        self._then = then

    def received(self, data: bytes) -> None:
        self.pieces.append(data)
        self._then()

    def ended(self, error: DomainError | None) -> None:
        self.outcome.append(error)


class World:
    """An origin, and requests to it."""

    def __init__(self, *, waits: bool = False) -> None:
        self.clock = Clock()
        self.wires = Wires(waits=waits)
        self.origin = Origin(self.clock, self.wires, secure=False, connect_timeout=5.0)

    @property
    def wire(self) -> Wire:
        return self.wires.made[-1]

    def ask(self, *, keep: bool = True, sent: Callable[[], object] = lambda: None) -> tuple[Deferred[Any], list[Any]]:
        asking = Deferred.fromCoroutine(self.origin.request(ASKED, keep=keep, sent=sent))
        found: list[Any] = []
        asking.addBoth(found.append)
        return asking, found

    def get(self, *pieces: bytes, keep: bool = True) -> Read:
        """Ask, have this answered on the connection that it was asked on, and read it."""
        _, found = self.ask(keep=keep)
        [wire] = [wire for wire in self.wires.made if wire.value()]
        wire.clear()
        wire.says(*pieces)
        read = Read()
        [response] = found
        response.deliver(read)
        return read


def fault(found: list[Any]) -> tuple[type[Exception], str]:
    [failure] = found
    return failure.type, failure.value.details


# What is sent.


@pytest.mark.parametrize(
    ("url", "line", "host"),
    [
        ("http://host:5001/v1/models", "/v1/models", "host:5001"),
        ("http://host/v1/models", "/v1/models", "host"),
        ("https://host:443/x", "/x", "host"),
        ("https://host:80/x", "/x", "host:80"),
        ("http://[::1]:5001/x", "/x", "[::1]:5001"),
        ("http://127.0.0.1:5001/a/b%20c/x", "/a/b%20c/x", "127.0.0.1:5001"),
        ("http://höst:1/ä/x", "/%C3%A4/x", "xn--hst-sna:1"),
    ],
)
def test_heads(url: str, line: str, host: str) -> None:
    head = request_head("GET", request_url(url), {"Name": "value"})
    assert head == f"GET {line} HTTP/1.1\r\nHost: {host}\r\nName: value\r\n".encode()


@pytest.mark.parametrize("value", ["a\r\nB: c", "a\nB: c", "a\rb", "a\0b", "a\x7fb", "a\x1bb", "a\udc80b"])
def test_a_value_can_not_add_a_field(value: str) -> None:
    with pytest.raises(ValueError, match="Name holds"):
        header_lines({"Name": value})
    server = ModelServer(lambda _: World().origin, Clock(), lambda: Location("http://host", value))
    found: list[Any] = []
    Deferred.fromCoroutine(server.get("/x", int, 5.0)).addErrback(found.append)
    assert fault(found) == (ApiConnectionError, "Authorization holds characters that can't be sent")


@given(st.dictionaries(st.sampled_from("ABC"), st.text(max_size=20)))
def test_a_field_is_one_line(fields: dict[str, str]) -> None:
    try:
        lines = header_lines(fields)
    except ValueError as error:
        assert str(error).endswith("holds characters that can't be sent")
        return
    assert lines.count(b"\n") == lines.count(b"\r") == len(fields)


class Server:
    """A `ModelServer` at a location that may change."""

    def __init__(self) -> None:
        self.world = World()
        self.location = Location("http://host:1/base", "sesame")
        self.origins: list[str] = []
        self.model_server = ModelServer(self.origin, self.world.clock, lambda: self.location)

    def origin(self, url: Any) -> Origin:
        self.origins.append(url.to_text())
        return self.world.origin

    def post(self) -> bytes:
        asking = self.model_server.post("/v1/x", {"a": 1}, 5.0, headers={"traceparent": "00-1"})
        asked = Deferred.fromCoroutine(asking)
        sent: bytes = self.world.wire.value()
        asked.addErrback(lambda failure: failure.trap(CancelledError))
        asked.cancel()
        return sent


def test_a_request_is_one_write() -> None:
    server = Server()
    assert server.post() == (
        b"POST /base/v1/x HTTP/1.1\r\nHost: host:1\r\nAccept-Encoding: identity\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nAuthorization: Bearer sesame\r\nContent-Length: 7\r\ntraceparent: 00-1\r\n"
        b'\r\n{"a":1}'
    )
    assert server.world.wire.writes == 1
    server.model_server.keeps_connections = True
    assert b"Connection" not in server.post()
    assert server.origins == ["http://host:1/base"]


def test_a_server_that_moves_is_asked_where_it_is_now() -> None:
    """The bundled one has another port and key after each start."""
    server = Server()
    server.post()
    server.location = Location("http://host:2", "melon")
    sent = server.post()
    assert b"POST /v1/x " in sent
    assert b"Host: host:2\r\n" in sent
    assert b"melon" in sent
    assert server.origins == ["http://host:1/base", "http://host:2"]


# Which connection.


def test_a_connection_is_kept_for_the_next_request() -> None:
    world = World()
    for _ in range(3):
        read = world.get(ANSWER)
        assert (read.pieces, read.outcome) == ([b"body"], [None])
        world.clock.advance(1.9)
    assert len(world.wires.made) == 1
    world.clock.advance(0.2)
    assert world.wire.disconnecting
    world.wire.ends()
    world.get(ANSWER)
    assert len(world.wires.made) == 2
    world.clock.advance(2.1)
    world.clock.advance(1.1)
    assert world.wire.aborted, "an orderly close has a second"
    assert not world.clock.getDelayedCalls()


def test_koboldcpp_gets_a_connection_for_each_request() -> None:
    world = World()
    for count in range(1, 4):
        assert world.get(ANSWER, keep=False).outcome == [None]
        assert len(world.wires.made) == count
        assert world.wire.disconnecting
        world.wire.ends()
    assert not world.clock.getDelayedCalls()


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Connection: close\r\nContent-Length: 4\r\n\r\nbody",
        ANSWER.replace(b"1.1", b"1.0"),
        ANSWER + b"HTTP/1.1 200 OK\r\n",
    ],
)
def test_a_connection_that_is_not_to_be_used_again_closes(answer: bytes) -> None:
    world = World()
    read = world.get(answer)
    assert (read.pieces, read.outcome) == ([b"body"], [None])
    assert world.wire.disconnecting
    world.wire.ends()


def test_requests_at_the_same_time_have_connections_of_their_own_and_not_too_many_are_kept() -> None:
    world = World()
    asked = [world.ask() for _ in range(20)]
    assert len(world.wires.made) == 20
    for wire in world.wires.made:
        wire.says(ANSWER)
    assert all(found[0].status == 200 for _, found in asked)
    assert [wire.disconnecting for wire in world.wires.made] == [False] * 16 + [True] * 4
    for wire in world.wires.made:
        wire.ends()
    assert not world.clock.getDelayedCalls()
    world.ask()
    assert len(world.wires.made) == 21, "those that the server closed are forgotten"
    world.wire.ends()


def test_what_comes_unasked_closes_a_kept_connection() -> None:
    world = World()
    world.get(ANSWER)
    world.wire.says(ANSWER)
    assert world.wire.aborted
    _, found = world.ask()
    assert len(world.wires.made) == 2
    assert not found
    world.wire.ends()


def test_who_gets_the_last_piece_may_ask_again_at_once_on_the_same_connection() -> None:
    world = World()
    _, found = world.ask()
    world.wire.says(CHUNKED)
    world.wire.clear()
    [response] = found
    response.deliver(Read(lambda: world.ask()))
    world.wire.says(b"4\r\nbody\r\n0\r\n\r\n")
    assert world.wire.value() == ASKED
    assert len(world.wires.made) == 1
    response.abort()
    assert not world.wire.aborted, "it is another's now"
    world.wire.ends()


@pytest.mark.parametrize("reason", [ConnectionDone(), ConnectionLost()])
def test_a_kept_connection_that_ends_without_a_byte_is_replaced_once(reason: Exception) -> None:
    world = World()
    world.get(ANSWER)
    sent: list[None] = []
    _, found = world.ask(sent=lambda: sent.append(None))
    world.wires.made[0].ends(reason)
    assert (len(world.wires.made), len(sent), found) == (2, 2, [])
    assert world.wire.value() == ASKED
    world.wire.ends(reason)
    assert len(world.wires.made) == 2
    [failure] = found
    assert failure.check(ApiConnectionError, ApiResponseStructureError)


def test_a_request_whose_answer_had_begun_is_not_sent_again() -> None:
    world = World()
    world.get(ANSWER)
    _, found = world.ask()
    world.wire.says(b"H")
    world.wire.ends()
    assert len(world.wires.made) == 1
    assert fault(found) == (ApiResponseStructureError, "the answer ended before its end")


def test_a_request_on_a_new_connection_is_not_sent_again() -> None:
    world = World()
    _, found = world.ask()
    world.wire.ends()
    assert len(world.wires.made) == 1
    assert fault(found) == (ApiResponseStructureError, "the server closed the connection without an answer")


# How each stage ends.


def cancelled(asking: Deferred[Any], found: list[Any]) -> bool:
    asking.cancel()
    return found[0].check(CancelledError) is not None


def test_cancelling_while_connecting() -> None:
    world = World(waits=True)
    asking, found = world.ask()
    assert cancelled(asking, found)
    assert not world.clock.getDelayedCalls()


@pytest.mark.parametrize("said", [[], [b"HTTP/1.1 200"], [b"HTTP/1.1 100 Continue\r\n\r\n"]])
def test_cancelling_before_the_head(said: list[bytes]) -> None:
    world = World()
    asking, found = world.ask()
    world.wire.says(*said)
    assert cancelled(asking, found)
    assert world.wire.aborted
    assert not world.clock.getDelayedCalls()


def test_aborting_an_answer() -> None:
    world = World()
    _, found = world.ask()
    world.wire.says(CHUNKED, b"2\r\nhi\r\n")
    read = Read()
    found[0].deliver(read)
    found[0].abort()
    assert world.wire.aborted
    assert (read.pieces, read.outcome) == ([b"hi"], [])
    world.ask()
    assert len(world.wires.made) == 2
    world.wire.ends()


def test_a_name_that_is_not_found_or_a_host_that_is_silent() -> None:
    """The time-out is for all of connecting; an endpoint has one for each address, and none for the name."""
    world = World(waits=True)
    _, found = world.ask()
    world.clock.advance(4.9)
    assert not found
    world.clock.advance(0.2)
    assert fault(found) == (ApiConnectionError, "connecting took too long")


def test_a_handshake_that_is_not_answered() -> None:
    clock, wires = Clock(), Wires()
    endpoint = wrapClientTLS(optionsForClientTLS("localhost"), wires)
    for seconds, outcome in ((5.1, (ApiConnectionError, "TLS: the handshake took too long")), (0.0, None)):
        origin = Origin(clock, endpoint, secure=True, connect_timeout=5.0)
        asking = Deferred.fromCoroutine(origin.request(ASKED, keep=True, sent=pytest.fail))
        found: list[Any] = []
        asking.addBoth(found.append)
        assert not wires.made[-1].aborted
        clock.advance(seconds)
        assert cancelled(asking, found) if outcome is None else fault(found) == outcome
        assert wires.made[-1].aborted
        assert not clock.getDelayedCalls()


@pytest.mark.parametrize(
    ("said", "reason", "expected"),
    [
        ([OK + b"\r\nbody"], ConnectionDone(), None),
        ([OK + b"\r\nbody"], ConnectionLost(), "the connection broke"),
        ([OK + b"Content-Length: 5\r\n\r\nbody"], ConnectionDone(), "the answer ended before its end"),
        ([OK + b"Content-Length: 5\r\n\r\nbody"], ConnectionLost(), "the connection broke"),
        ([CHUNKED + b"4\r\nbody\r\n"], ConnectionDone(), "the answer ended before its end"),
        ([CHUNKED + b"4\r\nbody\r\n0\r\n"], ConnectionDone(), "the answer ended before its end"),
        ([CHUNKED + b"4\r\nbody\r\n", b"oops"], None, "the answer is not HTTP/1.1"),
        ([CHUNKED + b"4\r\nbody\r\noops"], None, "the answer is not HTTP/1.1"),
    ],
)
def test_how_a_body_ends(said: list[bytes], reason: Exception | None, expected: str | None) -> None:
    world = World()
    _, found = world.ask()
    read = Read()
    world.wire.says(said[0])
    [response] = found
    response.deliver(read)
    world.wire.says(*said[1:])
    if reason is not None:
        world.wire.ends(reason)
    assert b"".join(read.pieces) == b"body"
    [error] = read.outcome
    assert expected == (None if error is None else error.details)
    assert world.wire.closed
    assert not world.clock.getDelayedCalls()


@pytest.mark.parametrize(
    ("said", "details"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n", "the answer is not HTTP/1.1"),
        (
            OK + b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\nbody",
            "the answer is compressed, which was not asked for",
        ),
    ],
)
def test_what_is_no_answer_closes_the_connection(said: bytes, details: str) -> None:
    world = World()
    _, found = world.ask()
    world.wire.says(said)
    assert fault(found)[1] == details
    assert world.wire.aborted


# Bodies.


def test_what_comes_in_one_packet_is_handed_on_in_one_piece() -> None:
    world = World()
    read = world.get(CHUNKED + b"2\r\nab\r\n1\r\nc\r\n", b"1\r\nd\r\n1\r\ne\r\n0\r\n\r\n")
    assert read.pieces == [b"abcde"], "all of it had come before it was read"
    world = World()
    _, found = world.ask()
    world.wire.says(CHUNKED)
    read = Read()
    found[0].deliver(read)
    world.wire.says(b"2\r\nab\r\n1\r\nc\r\n", b"1\r\nd\r\n1\r\ne\r\n0\r\n\r\n")
    assert read.pieces == [b"abc", b"de"]
    world.wire.ends()


def test_a_body_that_nobody_reads_yet_waits_at_the_server() -> None:
    world = World()
    _, found = world.ask()
    world.wire.says(OK + b"Content-Length: 9\r\n\r\nbody")
    assert world.wire.paused
    read = Read()
    response: Response = found[0]
    response.deliver(read)
    assert not world.wire.paused
    world.wire.says(b", all")
    assert (read.pieces, read.outcome) == ([b"body", b", all"], [None])
    world.wire.ends()


def test_a_connection_is_not_kept_paused() -> None:
    world = World()
    _, found = world.ask()
    world.wire.says(CHUNKED)
    read = Read(lambda: found[0].pause())
    found[0].deliver(read)
    world.wire.says(b"2\r\nhi\r\n")
    assert world.wire.paused
    world.wire.says(b"0\r\n\r\n")
    assert not world.wire.paused
    assert read.outcome == [None]
    found[0].pause()
    assert not world.wire.paused, "it is another's now"
    world.wire.ends()


def test_a_body_whose_reader_fails_is_not_blamed_on_the_server() -> None:
    """A fault of ours ends the answer as what it is, and closes the connection."""

    def fail(_: bytes) -> None:
        raise ZeroDivisionError

    world = World()
    _, found = world.ask()
    world.wire.says(CHUNKED)
    outcome: list[Any] = []
    Body(world.clock, fail, first=5.0, idle=5.0).read(found[0]).addErrback(outcome.append)
    world.wire.says(b"2\r\nhi\r\n")
    assert outcome[0].check(ZeroDivisionError)
    assert world.wire.aborted
    assert not world.clock.getDelayedCalls()


@pytest.mark.parametrize(("answer", "ends"), [(ANSWER, False), (OK + b"\r\nbody", True)])
def test_an_answer_leaves_nothing_to_the_garbage_collector(answer: bytes, ends: bool) -> None:
    world = World()
    _, found = world.ask()
    parser = weakref.ref(world.wire.protocol_._parser)

    def begin(response: Response) -> weakref.ref[Body]:
        body = Body(world.clock, lambda _: body.alive(), first=5.0, idle=5.0)
        body.read(response)
        return weakref.ref(body)

    gc.disable()
    try:
        world.wire.says(answer)
        response = weakref.ref(found[0])
        body = begin(found.pop())
        if ends:
            world.wire.ends()
        assert (parser(), response(), body()) == (None, None, None)
    finally:
        gc.enable()
    world.wire.ends()
