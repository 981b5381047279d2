"""What systemd is told of the service, and the sockets that it passes to it. Elsewhere nothing of this happens.

See sd_notify(3) and sd_listen_fds(3).
"""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

FIRST_PASSED = 3
RETRY_SECONDS = 0.1
MOST_UNSENT = 64
MARGIN_SECONDS = 30.0
"""What stopping may take beyond what is waited for requests: connections that close, what runs in the background."""


class Systemd:
    """Tells systemd how the service is, without ever waiting for it, and that the reactor still turns.

    Where the process was not started by systemd, or not by a unit that wants to know, nothing is told.
    """

    _log = Logger()

    def __init__(self, environ: Mapping[str, str], clock: IReactorTime, well: Callable[[], bool] = lambda: True):
        """@param well: whether the service is, apart from this process's reactor: else the watchdog is not fed."""
        self._well = well
        self._environ = environ
        self._clock = clock
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        self._unsent: deque[bytes] = deque(maxlen=MOST_UNSENT)
        self._retry: IDelayedCall | None = None
        self._watchdog = LoopingCall(self._feed)
        self._watchdog.clock = clock
        self._stopping = False

    def ready(self, status: str) -> None:
        """The service serves, for the first time or after it has read its settings again."""
        if self._stopping:
            return
        self._tell("READY=1", f"STATUS={status}")
        interval = self._watchdog_interval()
        if interval is not None and not self._watchdog.running:
            self._watchdog.start(interval / 2).addErrback(
                lambda failure: self._log.failure("feeding the watchdog failed", failure)
            )

    def reloading(self) -> None:
        """The settings are read again; `ready` says that they have been."""
        if not self._stopping:
            self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reading settings again")

    def stopping(self, status: str, seconds: float) -> None:
        """The service has begun to stop, which may take so long, whatever TimeoutStopSec says."""
        self._stopping = True
        self._tell(
            "STOPPING=1", f"EXTEND_TIMEOUT_USEC={round((seconds + MARGIN_SECONDS) * 1_000_000)}", f"STATUS={status}"
        )

    def status(self, text: str) -> None:
        """What `systemctl status` is to show."""
        self._tell(f"STATUS={text}")

    def stop(self) -> None:
        """Tell nothing more."""
        if self._watchdog.running:
            self._watchdog.stop()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._unsent.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _watchdog_interval(self) -> float | None:
        """Within how many seconds it wants to hear from us, again and again."""
        interval = self._environ.get("WATCHDOG_USEC", "")
        meant_for = self._environ.get("WATCHDOG_PID", str(os.getpid()))
        if self._address is None or not interval.isdigit() or not int(interval) or meant_for != str(os.getpid()):
            return None
        return int(interval) / 1_000_000

    def _feed(self) -> None:
        if self._well():
            self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if self._address is not None:
            self._unsent.append("\n".join(lines).encode())
            self._send()

    def _send(self) -> None:
        if self._retry is not None:
            if self._retry.active():
                self._retry.cancel()
            self._retry = None
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        while self._unsent:
            try:
                self._socket.sendto(self._unsent[0], self._address or "")
            except BlockingIOError:  # systemd is busy; what was not told must still be
                self._retry = self._clock.callLater(RETRY_SECONDS, self._send)
                return
            except OSError as error:
                self._log.warn("systemd can't be told how the service is: {reason}", reason=error.strerror)
            self._unsent.popleft()


def _address(name: str) -> str | None:
    """The address of a notification socket: a path, or a name in the abstract namespace."""
    return "\0" + name[1:] if name.startswith("@") else name if name.startswith("/") else None


def environment_at_start() -> dict[str, str]:
    """The environment that the process was given.

    As it is imported, Twisted takes out of `os.environ` what is said there of passed sockets, for an endpoint of its
    own that knows one socket by each name.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = os.fsdecode(file.read()).split("\0")
    except OSError:
        return dict(os.environ)
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


class PassedSocketError(Exception):
    """A socket was passed that can't be listened on."""


def sockets_at_start(names: set[str]) -> dict[str, list[socket.socket]]:
    """The sockets that were passed to this process; otherwise as `passed_sockets`."""
    return passed_sockets(environment_at_start(), names)


def passed_sockets(environ: Mapping[str, str], names: set[str]) -> dict[str, list[socket.socket]]:
    """The sockets that were passed to this process, by the name that the unit gives them.

    @param names: those that may be given.
    @raise PassedSocketError: one has another name, or does not listen on TCP.
    """
    found: dict[str, list[socket.socket]] = {}
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return found
    given = environ.get("LISTEN_FDNAMES", "").split(":")
    for number in range(int(environ.get("LISTEN_FDS", "0"))):
        name = given[number] if number < len(given) else ""
        if name not in names:
            raise PassedSocketError(
                f"systemd passes a socket named {name!r}: FileDescriptorName= must be one of {', '.join(sorted(names))}"
            )
        try:
            passed = socket.socket(fileno=FIRST_PASSED + number)
            listens = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise PassedSocketError(f"systemd passes no socket as {name!r}: {error.strerror}")
        if not listens or passed.family not in (socket.AF_INET, socket.AF_INET6):
            raise PassedSocketError(f"systemd passes a socket as {name!r} that does not listen on TCP")
        passed.setblocking(False)
        passed.set_inheritable(False)
        found.setdefault(name, []).append(passed)
    return found
