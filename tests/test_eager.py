"""What is written to a connection is with the kernel at once, and in order where it takes no more."""

import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.protocol import Protocol
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure

from ai_ticket import eager
from ai_ticket.eager import EagerServer


class Reactor:
    """Keeps what wants to write."""

    def __init__(self) -> None:
        self.writing: set[Any] = set()

    def addReader(self, one: Any) -> None: ...

    def removeReader(self, one: Any) -> None: ...

    def addWriter(self, one: Any) -> None:
        self.writing.add(one)

    def removeWriter(self, one: Any) -> None:
        self.writing.discard(one)


class Pair:
    """Our end of a connection, and the peer's socket."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.peer = socket.create_connection(listening.getsockname())
            ours, address = listening.accept()
        ours.setblocking(False)
        self.peer.setblocking(False)
        self.transport = EagerServer(ours, Protocol(), address, None, 0, self.reactor)

    def received(self) -> bytes:
        parts = []
        while True:
            try:
                part = self.peer.recv(1 << 20)
            except BlockingIOError:
                return b"".join(parts)
            parts.append(part)

    def turn(self) -> None:
        """A turn of the reactor."""
        for one in list(self.reactor.writing):
            one.doWrite()

    def end(self) -> None:
        self.peer.close()
        self.transport.connectionLost(Failure(ConnectionError()))


@pytest.fixture
def pair() -> Iterator[Pair]:
    found = Pair()
    yield found
    found.end()


def test_a_piece_is_there_before_the_next_turn(pair: Pair) -> None:
    pair.transport.write(b"one")
    assert pair.received() == b"one"
    assert not pair.reactor.writing
    eager.write(pair.transport, b"two")
    assert pair.received() == b"two"


def test_what_the_kernel_does_not_take_follows_in_order(pair: Pair) -> None:
    large = bytes(range(256)) * 65_536
    pair.transport.write(large)
    pair.transport.write(b"behind")
    eager.write(pair.transport, b" it")
    assert pair.reactor.writing
    found = pair.received()
    while pair.reactor.writing:
        pair.turn()
        found += pair.received()
    assert found == large + b"behind it"


def test_a_producer_is_paused_while_the_rest_waits(pair: Pair) -> None:
    told: list[str] = []

    class Producer:
        def pauseProducing(self) -> None:
            told.append("pause")

        def resumeProducing(self) -> None:
            told.append("resume")

        def stopProducing(self) -> None: ...

    pair.transport.registerProducer(Producer(), True)
    pair.transport.write(b"x")
    assert told == []
    pair.transport.write(b"x" * 16_777_216)
    assert told == ["pause"]
    while pair.reactor.writing:
        pair.received()
        pair.turn()
    assert told == ["pause", "resume"]


def test_a_connection_that_is_lost_is_left_to_the_transport(pair: Pair) -> None:
    pair.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.peer.close()
    for _ in range(3):
        pair.transport.write(b"x")
    assert pair.reactor.writing == {pair.transport}
    assert isinstance(pair.transport.doWrite(), Exception)


def test_nothing_is_written_once_the_connection_is_over(pair: Pair) -> None:
    pair.transport.connected = False
    pair.transport.write(b"x")
    eager.write(pair.transport, b"x")
    assert pair.received() == b""
    pair.transport.connected = True


def test_what_is_no_plain_tcp_gets_all_of_it() -> None:
    class Other:
        written = b""

        def write(self, data: bytes) -> None:
            self.written += data

    other = Other()
    eager.write(other, b"x")
    assert other.written == b"x"


@given(st.lists(st.binary(max_size=8) | st.integers(0, 3_000_000), max_size=6))
def test_any_pieces_arrive_in_order(pieces: list[bytes | int]) -> None:
    pair = Pair()
    sent, found = b"", b""
    for number, piece in enumerate(pieces):
        data = piece if isinstance(piece, bytes) else bytes([number]) * piece
        pair.transport.write(data)
        sent += data
        if number % 2:
            pair.turn()
            found += pair.received()
    while pair.reactor.writing:
        pair.turn()
        found += pair.received()
    assert found + pair.received() == sent
    pair.end()


def test_what_it_rests_on_is_there() -> None:
    """Twisted's own names."""
    found = Pair()
    assert isinstance(found.transport, Connection)
    assert (found.transport.dataBuffer, found.transport._tempDataBuffer, found.transport.TLS) == (b"", [], False)
    assert not found.transport._writeDisconnected
    found.end()
