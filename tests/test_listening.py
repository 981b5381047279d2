"""The ports, on loopback, under a reactor that the tests turn by hand."""

import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from logged import logged
from twisted.internet import tcp
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure

from ai_ticket.listening import HANDSHAKE_SECONDS, CannotStart, Endpoint, Listeners
from ai_ticket.systemd import PassedSocketError
from ai_ticket.workers.messages import PassedPort
from ai_ticket.workers.ports import REST_SECONDS, YIELD_SECONDS, InheritedPorts

HOST = "127.0.0.1"


class Reactor(MemoryReactorClock):
    """Listens on real sockets, at which it looks when it is told to."""

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> tcp.Port:
        found = tcp.Port(port, factory, backlog, interface, self)
        found.startListening()
        return found

    def adoptStreamPort(self, fileDescriptor: int, addressFamily: Any, factory: Any) -> tcp.Port:
        found = tcp.Port._fromListeningDescriptor(self, fileDescriptor, addressFamily, factory)
        found.startListening()
        return found


class Accepted(Factory):
    """Keeps the connections that it got."""

    noisy = False

    def __init__(self) -> None:
        self.protocols: list[Protocol] = []

    def buildProtocol(self, addr: Any) -> Protocol:
        self.protocols.append(Protocol())
        return self.protocols[-1]


class World:
    def __init__(self) -> None:
        self.reactor = Reactor()
        self.accepted = Accepted()
        self.passed: dict[str, list[socket.socket]] = {}
        self.clients: list[socket.socket] = []
        self.listeners = self.listening(Endpoint("https", "TLS_PORT", HOST, 0, self.accepted))

    def listening(self, *endpoints: Endpoint) -> Listeners:
        return Listeners(self.reactor, endpoints, lambda names: self.passed)

    def open(self) -> tuple[str, int]:
        with logged() as lines:
            self.listeners.open()
        [line] = lines
        assert line.startswith("info: listening for https on 127.0.0.1 port ")
        return HOST, int(line.split()[-1])

    def connect(self, address: tuple[str, int], *, wait: bool = True) -> socket.socket:
        client = socket.socket()
        self.clients.append(client)
        client.setblocking(wait)
        try:
            client.connect(address)
        except BlockingIOError:
            assert not wait
        return client

    def close(self, how: Callable[[], Any]) -> list[Any]:
        done: list[Any] = []
        Deferred.fromCoroutine(how()).addBoth(done.append)
        return done

    def turn(self) -> None:
        self.reactor.advance(0)


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    yield found
    found.close(found.listeners.close_at_once)
    found.turn()
    for client in found.clients:
        client.close()
    for protocol in found.accepted.protocols:
        transport: Any = protocol.transport
        transport.connectionLost(Failure(ConnectionDone()))
    for several in found.passed.values():
        for each in several:
            each.close()


def refused(world: World, address: tuple[str, int]) -> bool:
    try:
        world.connect(address)
    except ConnectionRefusedError:
        return True
    return False


def test_who_was_let_in_is_taken_before_the_port_closes(world: World) -> None:
    address = world.open()
    clients = [world.connect(address) for _ in range(150)]
    done = world.close(world.listeners.close)
    assert not done
    assert not world.accepted.protocols
    world.reactor.advance(HANDSHAKE_SECONDS)
    assert len(world.accepted.protocols) == 150
    world.turn()
    assert done == [None]
    for client, protocol in zip(clients, world.accepted.protocols, strict=True):
        transport: Any = protocol.transport
        transport.socket.send(b"hello")
        assert client.recv(9) == b"hello"
    assert refused(world, address)


def test_who_comes_while_it_closes_is_not_let_in_to_be_reset(world: World) -> None:
    """The kernel does not answer them meanwhile; it refuses them when they try again, a second later."""
    address = world.open()
    before = world.connect(address)
    world.close(world.listeners.close)
    during = world.connect(address, wait=False)
    world.reactor.advance(HANDSHAKE_SECONDS)
    world.turn()
    assert len(world.accepted.protocols) == 1
    before.send(b"is heard")
    transport: Any = world.accepted.protocols[0].transport
    assert transport.socket.recv(9) == b"is heard"
    waiting = select.poll()
    waiting.register(during)
    assert not waiting.poll(0)


def test_closing_at_once_does_not_wait(world: World) -> None:
    address = world.open()
    done = world.close(world.listeners.close_at_once)
    world.turn()
    assert done == [None]
    assert refused(world, address)


def test_closing_at_once_in_the_midst_of_closing(world: World) -> None:
    """As on a second signal."""
    address = world.open()
    closing = Deferred.fromCoroutine(world.listeners.close())
    closing.addErrback(lambda _: None)
    closing.cancel()
    done = world.close(world.listeners.close_at_once)
    world.turn()
    assert done == [None]
    assert refused(world, address)


def test_a_port_that_is_taken(world: World) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        listeners = world.listening(Endpoint("http", "HTTP_PORT", HOST, port, world.accepted))
        with logged() as lines, pytest.raises(CannotStart) as caught:
            listeners.open()
    reason = f"HTTP_PORT={port}: can't listen on 127.0.0.1: Address already in use"
    assert lines == [f"critical: {reason}"]
    assert (str(caught.value), caught.value.code) == (reason, 1)
    assert isinstance(caught.value, Exception), "twistd tells no other to whoever waits for a daemon's start"


def test_a_passed_socket_is_used_in_the_place_of_a_port(world: World) -> None:
    """It is left as it is: whoever waits at it is served by the next process."""
    original = socket.create_server((HOST, 0))
    original.setblocking(False)
    world.passed = {"https": [original.dup()]}
    address = world.open()
    assert address == original.getsockname()
    assert world.passed["https"][0].fileno() == -1, "one descriptor is enough"
    first = world.connect(address)
    [port] = world.reactor.getReaders()
    port.doRead()
    assert len(world.accepted.protocols) == 1
    second = world.connect(address)
    done = world.close(world.listeners.close)
    world.turn()
    assert done == [None], "there is nothing to wait for"
    third = world.connect(address)
    assert len(world.accepted.protocols) == 1
    for waiting in (second, third):
        found, peer = original.accept()
        assert peer == waiting.getsockname()
        found.close()
    assert first.getpeername() == address
    original.close()


def test_an_endpoint_without_a_port_is_there_only_if_it_is_passed(world: World) -> None:
    world.listeners = world.listening(Endpoint("http", "HTTP_PORT", HOST, None, world.accepted))
    world.listeners.open()
    assert not world.reactor.getReaders()
    world.passed = {"http": [socket.create_server((HOST, 0)), socket.create_server((HOST, 0))]}
    world.listeners.open()
    assert len(world.reactor.getReaders()) == 2


def test_a_socket_that_can_not_be_used_ends_the_start(world: World) -> None:
    def passed(names: set[str]) -> dict[str, list[socket.socket]]:
        assert names == {"https"}
        raise PassedSocketError("a reason")

    endpoint = Endpoint("https", "TLS_PORT", HOST, 0, world.accepted)
    with logged() as lines, pytest.raises(CannotStart, match="a reason"):
        Listeners(world.reactor, [endpoint], passed).open()
    assert lines == ["critical: a reason"]


def test_callers_wait_while_nobody_is_let_in(world: World) -> None:
    address = world.open()
    for _ in range(2):
        world.listeners.accept(False)
    assert world.reactor.getReaders() == []
    world.connect(address)
    world.listeners.accept(True)
    [port] = world.reactor.getReaders()
    port.doRead()
    assert len(world.accepted.protocols) == 1


def test_who_waits_then_is_taken_when_the_port_closes(world: World) -> None:
    address = world.open()
    world.listeners.accept(False)
    world.connect(address)
    done = world.close(world.listeners.close)
    world.reactor.advance(HANDSHAKE_SECONDS)
    world.turn()
    assert done == [None]
    assert len(world.accepted.protocols) == 1
    world.listeners.accept(True)
    assert [port for port in world.reactor.getReaders() if isinstance(port, tcp.Port)] == []


def test_the_operator_is_always_let_in(world: World) -> None:
    world.listeners = world.listening(
        Endpoint("https", "TLS_PORT", HOST, 0, world.accepted),
        Endpoint("metrics", "OTEL_PROMETHEUS_PORT", HOST, 0, world.accepted, always=True),
    )
    with logged() as lines:
        world.listeners.open()
    world.listeners.accept(False)
    [port] = world.reactor.getReaders()
    assert lines[1] == f"info: listening for metrics on {HOST} port {port.getHost().port}"


class TestHeldForOthers:
    """Ports that other processes inherit; here the other is another holder of the same descriptors."""

    def test_nobody_is_let_in_here(self, world: World) -> None:
        world.listeners = world.listening(Endpoint("https", "TLS_PORT", HOST, 0, None))
        address = world.open()
        world.connect(address)
        assert not world.reactor.getReaders()
        [held] = world.listeners.held
        assert (held.name, held.ours) == ("https", True)
        assert not held.listening.getblocking(), "several accept there"
        found, _ = held.listening.accept()
        found.close()

    def test_it_stays_open_where_it_is_inherited(self, world: World) -> None:
        world.listeners = world.listening(Endpoint("https", "TLS_PORT", HOST, 0, None))
        address = world.open()
        with world.listeners.held[0].listening.dup() as inherited:
            done = world.close(world.listeners.close)
            assert done == [None]
            world.connect(address)
            found, _ = inherited.accept()
            found.close()
        assert refused(world, address)

    def test_a_passed_one(self, world: World) -> None:
        world.listeners = world.listening(Endpoint("https", "TLS_PORT", HOST, 1, None))
        original = socket.create_server((HOST, 0))
        world.passed = {"https": [original.dup()]}
        assert world.open() == original.getsockname()
        [held] = world.listeners.held
        assert not held.ours
        world.close(world.listeners.close_at_once)
        assert held.listening.fileno() == -1
        original.close()

    def test_one_that_is_taken(self, world: World) -> None:
        with socket.create_server((HOST, 0)) as taken:
            port = taken.getsockname()[1]
            listeners = world.listening(Endpoint("http", "HTTP_PORT", HOST, port, None))
            with logged(), pytest.raises(CannotStart, match=f"HTTP_PORT={port}: can't listen .* already in use"):
                listeners.open()
        assert not listeners.held


class TestInherited:
    """Ports as a worker has them."""

    ahead = False

    def look(self, world: World) -> None:
        """Let the reactor look once, at what it watches."""
        for port in world.reactor.getReaders():
            port.doRead()  # type: ignore[attr-defined]

    def inherit(self, world: World, listening: socket.socket, *, ours: bool) -> Any:
        passed = PassedPort("https", os.dup(listening.fileno()), ours)
        world.listeners = InheritedPorts(
            world.reactor,
            [Endpoint("https", "TLS_PORT", HOST, None, world.accepted)],
            [passed],
            ahead=lambda: self.ahead,
        )
        world.listeners.open()
        [port] = world.reactor.getReaders()
        return port

    def test_callers_are_taken_one_at_a_time_so_that_each_worker_has_some(self, world: World) -> None:
        with socket.create_server((HOST, 0)) as held:
            held.setblocking(False)
            self.inherit(world, held, ours=True)
            for _ in range(5):
                world.connect(held.getsockname())
            for count in (1, 2, 3):
                self.look(world)
                assert len(world.accepted.protocols) == count
                self.look(world)
                assert len(world.accepted.protocols) == count, "the next is for who is free"
                world.reactor.advance(REST_SECONDS)

    def test_who_has_more_than_the_others_leaves_them_a_while_and_no_more(self, world: World) -> None:
        with socket.create_server((HOST, 0)) as held:
            held.setblocking(False)
            self.inherit(world, held, ours=True)
            self.ahead = True
            for _ in range(2):
                world.connect(held.getsockname())
            for count in (1, 2):
                self.look(world)
                assert len(world.accepted.protocols) == count - 1
                world.reactor.advance(YIELD_SECONDS)
                self.look(world)
                assert len(world.accepted.protocols) == count
                world.reactor.advance(REST_SECONDS)

    def test_nobody_is_let_in_for_a_while_also_while_it_rests(self, world: World) -> None:
        with socket.create_server((HOST, 0)) as held:
            held.setblocking(False)
            port = self.inherit(world, held, ours=True)
            for _ in range(3):
                world.connect(held.getsockname())
            port.doRead()
            world.listeners.accept(False)
            world.reactor.advance(REST_SECONDS)
            assert port not in world.reactor.getReaders()
            world.listeners.accept(True)
            port.doRead()
            assert len(world.accepted.protocols) == 2
            for accept in (False, True):
                world.listeners.accept(accept)
            assert port not in world.reactor.getReaders(), "it rests all the same"
            world.reactor.advance(REST_SECONDS)
            port.doRead()
            assert len(world.accepted.protocols) == 3

    def test_closing_while_it_rests(self, world: World) -> None:
        with socket.create_server((HOST, 0)) as held:
            held.setblocking(False)
            self.inherit(world, held, ours=True)
            for _ in range(2):
                world.connect(held.getsockname())
            self.look(world)
            world.close(world.listeners.close_at_once)
            world.turn()
            assert not world.reactor.getDelayedCalls()

    def test_what_is_ours_is_emptied_before_it_closes(self, world: World) -> None:
        with socket.create_server((HOST, 0), backlog=200) as held:
            held.setblocking(False)
            self.inherit(world, held, ours=True)
            for _ in range(150):
                world.connect(held.getsockname())
            done = world.close(world.listeners.close)
            world.reactor.advance(HANDSHAKE_SECONDS)
            world.turn()
            assert len(world.accepted.protocols) == 150
            assert done == [None]

    def test_what_was_passed_is_let_go_and_nobody_there_is_lost(self, world: World) -> None:
        with socket.create_server((HOST, 0)) as held:
            held.setblocking(False)
            self.inherit(world, held, ours=False)
            world.connect(held.getsockname())
            done = world.close(world.listeners.close)
            world.turn()
            assert done == [None]
            assert not world.accepted.protocols
            found, _ = held.accept()
            found.close()
