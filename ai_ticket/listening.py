"""The ports: bound by us or passed to us, and closed so that nobody who was let in is turned away."""

import ctypes
import errno
import select
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ai_ticket.eager import EagerServer
from ai_ticket.systemd import PassedSocketError

BACKLOG = 1024
HANDSHAKE_SECONDS = 0.25
"""That the last of those who are connecting have to finish: a little more than the longest ways there are on earth."""

PassedSockets = Callable[[set[str]], dict[str, list[socket.socket]]]


class Endpoint(Struct, frozen=True):
    """What to listen for. An empty host means all addresses, IPv6 and IPv4; no port: only if a socket is passed.

    Without a factory nobody is let in here: the port is held for other processes, which inherit it.
    `always`: it is for the operator, who must get in also when callers are not let in (see `Listeners.accept`).
    """

    name: str
    variable: str
    host: str
    port: int | None
    factory: IProtocolFactory | None
    always: bool = False


class Held(Struct, frozen=True):
    """A port that is held for others. `ours`: we have bound it ourselves."""

    name: str
    listening: socket.socket
    ours: bool


class CannotStart(SystemExit, Exception):
    """The service can't start; the log says why.

    It ends the process with status 1. As it is an Exception as well, twistd tells of it to the process that waits for a
    daemon to start, and which would wait for ever otherwise.
    """

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(1)

    def __str__(self) -> str:
        return self.reason


class Listeners:
    """The ports of all endpoints."""

    _log = Logger()

    def __init__(self, reactor: Any, endpoints: Sequence[Endpoint], passed_sockets: PassedSockets):
        """@param passed_sockets: gives the sockets that were passed to the process, where their names are these."""
        self._reactor = reactor
        self._endpoints = endpoints
        self._passed_sockets = passed_sockets
        self._bound: list[IListeningPort] = []
        self._adopted: list[IListeningPort] = []
        self.held: list[Held] = []
        self._for_callers: list[Any] = []
        self._accepting = True

    def open(self) -> None:
        """Listen.

        @raise CannotStart: a port can't be listened on.
        """
        try:
            passed = self._passed_sockets({endpoint.name for endpoint in self._endpoints})
        except PassedSocketError as error:
            raise self._refusal(str(error))
        for endpoint in self._endpoints:
            if endpoint.name in passed:
                for each in passed[endpoint.name]:
                    self._adopt(endpoint, each)
            elif endpoint.port is not None:
                self._bind(endpoint, endpoint.port)

    def accept(self, accept: bool) -> None:
        """Whether callers are let in, or wait in the kernel; let in they are at first."""
        if accept != self._accepting:
            self._accepting = accept
            for port in self._for_callers:
                if accept:
                    port.startReading()
                else:
                    port.stopReading()

    async def close(self) -> None:
        """Take those whom the kernel has let in already, and listen no more.

        A socket that was passed stays open where it comes from: who waits there is the next process's. One that is held
        stays open where it is inherited.
        """
        self._let_go()
        self._for_callers.clear()
        await self._stop(self._adopted)
        ignored = [_let_nobody_in(port) for port in self._bound]
        if any(ignored):
            await deferLater(self._reactor, HANDSHAKE_SECONDS)
        for port in self._bound:
            _take_waiting(port)
        await self._stop(self._bound)

    async def close_at_once(self) -> None:
        """Listen no more, whoever waits."""
        self._let_go()
        self._for_callers.clear()
        await self._stop(self._adopted)
        await self._stop(self._bound)

    def _let_go(self) -> None:
        for held in self.held:
            held.listening.close()
        self.held.clear()

    async def _stop(self, ports: list[IListeningPort]) -> None:
        for port in ports:
            stopping = port.stopListening()
            if stopping is not None:
                await stopping
        ports.clear()

    def _adopt(self, endpoint: Endpoint, passed: socket.socket) -> None:
        if endpoint.factory is None:
            self.held.append(Held(endpoint.name, passed, ours=False))
            self._listening(endpoint, passed.getsockname(), "passed by systemd")
            return
        # Which duplicates it.
        with passed:
            port = self._reactor.adoptStreamPort(passed.fileno(), passed.family, endpoint.factory)
        self._adopted.append(port)
        self._let_in_by(endpoint, port)
        self._listening(endpoint, _address(port), "passed by systemd")

    def _bind(self, endpoint: Endpoint, number: int) -> None:
        hosts = [endpoint.host] if endpoint.host else ["::", "0.0.0.0"]
        for host in hosts:
            try:
                self._listening(endpoint, self._listen(endpoint, number, host), "ours")
            except CannotListenError as error:
                # "::" takes IPv4 as well, but can't be had where IPv6 is switched off.
                in_use = getattr(error.socketError, "errno", None)
                if host == hosts[-1] or in_use in _TAKEN:
                    reason = getattr(error.socketError, "strerror", None) or str(error.socketError)
                    raise self._refusal(f"{endpoint.variable}={number}: can't listen on {host}: {reason}")
            else:
                return

    def _listen(self, endpoint: Endpoint, number: int, host: str) -> tuple[Any, ...]:
        """Listen, or hold a port, on which the reactor can't, for it would shut it down for all when it closes it.

        @return: the address. @raise CannotListenError: it can't be had.
        """
        if endpoint.factory is None:
            held = _bound_socket(number, host)
            self.held.append(Held(endpoint.name, held, ours=True))
            found: tuple[Any, ...] = held.getsockname()
            return found
        port = self._reactor.listenTCP(number, endpoint.factory, backlog=BACKLOG, interface=host)
        self._bound.append(port)
        self._let_in_by(endpoint, port)
        return _address(port)

    def _let_in_by(self, endpoint: Endpoint, port: Any) -> None:
        port.transport = EagerServer
        if not endpoint.always:
            self._for_callers.append(port)

    def _listening(self, endpoint: Endpoint, address: tuple[Any, ...], origin: str) -> None:
        self._log.info(
            "listening for {endpoint} on {host} port {port}",
            endpoint=endpoint.name,
            host=address[0],
            port=address[1],
            socket=origin,
        )

    def _refusal(self, reason: str) -> CannotStart:
        self._log.critical("{reason}", reason=reason)
        return CannotStart(reason)


def _address(port: IListeningPort) -> tuple[str, int]:
    found: Any = port.getHost()
    return found.host, found.port


def _bound_socket(number: int, host: str) -> socket.socket:
    """A socket that listens, as the reactor would make it."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, number))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise CannotListenError(host, number, error)
    listening.setblocking(False)
    return listening


_TAKEN = (errno.EACCES, errno.EADDRINUSE)
"""What another address would not help against."""

# Linux' classic BPF, on a segment from its TCP header on: drop it if it asks for a connection, else keep all of it.
_BPF_STATEMENT = struct.Struct("=HBBI")
_DROP_NEWCOMERS = b"".join(
    _BPF_STATEMENT.pack(*statement)
    for statement in ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
)
_SO_ATTACH_FILTER = 26


def _let_nobody_in(port: Any) -> bool:
    """Have the kernel ignore whoever begins to connect: they try again a second later, when it refuses them.

    Without this, some would be let in between our last look at who waits and the closing, which resets them.

    @return: whether it does so. It is Linux that can.
    """
    program = ctypes.create_string_buffer(_DROP_NEWCOMERS, len(_DROP_NEWCOMERS))
    count = len(_DROP_NEWCOMERS) // _BPF_STATEMENT.size
    try:
        with socket.fromfd(port.fileno(), port.addressFamily, socket.SOCK_STREAM) as listening:
            listening.setsockopt(
                socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", count, ctypes.addressof(program))
            )
    except OSError:
        return False
    return True


def _take_waiting(port: Any) -> None:
    """Accept those who wait in the kernel."""
    waiting = select.poll()
    waiting.register(port.fileno(), select.POLLIN)
    for _ in range(BACKLOG):
        if not waiting.poll(0):
            return
        port.doRead()
