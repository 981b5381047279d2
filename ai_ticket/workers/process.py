"""A worker process, as the parent starts it and sees it."""

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from msgspec import Struct
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IProcessTransport
from twisted.internet.protocol import Factory, ProcessProtocol
from twisted.python.failure import Failure

from ai_ticket.workers.channel import Channel, frame, from_worker, read_one
from ai_ticket.workers.messages import PassedPort, Ready, Start

CHANNEL_FD = 3
FIRST_PORT_FD = 4
SEND_SECONDS = 30.0


class Port(Struct, frozen=True):
    """A port to hand on: its endpoint's name, its socket here, and whether we have bound it ourselves."""

    name: str
    fd: int
    ours: bool


class NotReady(Exception):
    """A worker did not get so far as to serve."""


class Process(Protocol):
    """A process that was started, and its channel."""

    @property
    def pid(self) -> int | None:
        """Its number in the system; None once it is gone."""

    def begin(self, start: Start) -> None:
        """Tell it all it needs to know. It blocks, as `wait_ready`: for the start, before the reactor runs."""

    def wait_ready(self, seconds: float) -> None:
        """Wait until it serves.

        @raise NotReady: it does not.
        """

    def connect(self, channel: Channel) -> None:
        """From here on the channel takes what it says."""

    def kill(self) -> None:
        """End it at once."""


Launch = Callable[[Callable[[str], None]], Process]
"""Starts a worker. What it is given is called with how that has ended, when it has."""


def passed(ports: Sequence[Port]) -> list[PassedPort]:
    """The ports as a worker finds them."""
    return [PassedPort(port.name, FIRST_PORT_FD + nth, port.ours) for nth, port in enumerate(ports)]


class Launcher:
    """Starts worker processes, in the same Python and from the same modules."""

    def __init__(
        self, reactor: Any, *, environ: Mapping[str, str], folder: str, log_fd: int, ports: Callable[[], Sequence[Port]]
    ):
        """@param folder: where relative paths of the settings begin. @param log_fd: where their log goes."""
        self._reactor = reactor
        self._environ = {**environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        self._folder = folder
        self._log_fd = log_fd
        self._ports = ports

    def __call__(self, ended: Callable[[str], None]) -> Process:
        """See `Launch`.

        @raise OSError: there can't be another process now.
        """
        ours, theirs = socket.socketpair()
        spawned = _Spawned(self._reactor, ours, ended)
        # With -P and our own path, the child finds the modules that we run, and none in the working directory.
        arguments = [sys.executable, "-P", "-m", "ai_ticket.workers"]
        inherited = {nth: port.fd for nth, port in enumerate(self._ports(), FIRST_PORT_FD)}
        with theirs, open(os.devnull, "rb") as nothing:
            self._reactor.spawnProcess(
                spawned,
                sys.executable,
                arguments,
                env=self._environ,
                path=self._folder,
                childFDs={0: nothing.fileno(), 1: self._log_fd, 2: 2, CHANNEL_FD: theirs.fileno(), **inherited},
            )
        return spawned


class _Spawned(ProcessProtocol):
    """A `Process` of the system."""

    transport: IProcessTransport

    def __init__(self, reactor: Any, ours: socket.socket, ended: Callable[[str], None]):
        self._reactor = reactor
        self._socket = ours
        self._ended = ended

    @property
    def pid(self) -> int | None:
        found: int | None = self.transport.pid
        return found

    def begin(self, start: Start) -> None:
        """See `Process`."""
        self._socket.settimeout(SEND_SECONDS)
        with suppress(OSError):  # it has ended already, which is told elsewhere
            self._socket.sendall(frame(start))

    def wait_ready(self, seconds: float) -> None:
        """See `Process`."""
        self._socket.settimeout(seconds)
        try:
            if not isinstance(read_one(self._socket, from_worker), Ready):
                raise NotReady("it says something else first")
        except (EOFError, ConnectionError):
            raise NotReady("it has ended")
        except OSError as error:
            raise NotReady(f"nothing is heard of it ({error})")

    def connect(self, channel: Channel) -> None:
        """See `Process`."""
        self._socket.setblocking(False)
        with self._socket:  # which is duplicated
            self._reactor.adoptStreamConnection(
                self._socket.fileno(),
                socket.AF_UNIX,
                Factory.forProtocol(lambda: channel),
            )

    def kill(self) -> None:
        """See `Process`."""
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess("KILL")

    def processEnded(self, reason: Failure) -> None:
        """It is gone."""
        self._ended(_how(reason))


def _how(reason: Failure) -> str:
    error = reason.value
    if isinstance(error, ProcessTerminated) and error.signal is not None:
        return f"was ended by signal {error.signal}"
    status = error.exitCode if isinstance(error, ProcessTerminated | ProcessDone) else None
    return f"ended with status {status}"
