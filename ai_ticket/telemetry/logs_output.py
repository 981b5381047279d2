"""Where log lines go: a stream that is never waited for, and what to do while its reader does not read.

A thread that writes costs a line as much as it saves, and its lines lag behind: it waits for the interpreter's lock
whenever the reactor is busy. Asking the kernel to take a line or refuse it costs nothing beyond the write itself, so
lines are written where they arise; only those that were refused wait here.
"""

import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TextIO

BACKLOG_BYTES = 1_048_576
"""Lines that wait for the reader, at the most: some thousands. Further ones are dropped until it has caught up."""


class Stream(Protocol):
    """Takes bytes, or refuses them."""

    def write(self, data: bytes) -> int:
        """Take some of the data, and say how much.

        @raise BlockingIOError: there is no room now. @raise OSError: the stream is broken, for now or for good.
        """

    def wait(self, seconds: float) -> bool:
        """Wait for room, at most so long, and say whether there is some. Not for while the service runs."""


class Descriptor:
    """A file descriptor as a `Stream`."""

    def __init__(self, fd: int):
        self._fd = fd
        self._private: int | None = None
        self._room = select.poll()
        self._room.register(fd, select.POLLOUT)

    def fileno(self) -> int:
        """The descriptor, for other processes to inherit."""
        return self._fd

    @property
    def coloured(self) -> bool:
        """Whether it is a terminal whose user has not asked for plain text (https://no-color.org)."""
        return os.isatty(self._fd) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def unblock(self) -> None:
        """Have the kernel refuse what it can't take at once.

        The flag for that belongs to what all processes share that have the same pipe or terminal, the operator's shell
        among them: so a pipe or terminal is opened a second time, for us alone. Where that can't be had (a socket, no
        /proc, no permission) `write` asks before, in pieces small enough that the answer holds.
        """
        mode = os.fstat(self._fd).st_mode
        if self._private is not None or not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            return
        with suppress(OSError):
            private = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            self._private = private

    def close(self) -> None:
        """Give back what `unblock` opened."""
        if self._private is not None:
            os.close(self._private)
            self._private = None

    def write(self, data: bytes) -> int:
        """See `Stream`."""
        if self._private is not None:
            return os.write(self._private, data)
        if not self.wait(0):
            raise BlockingIOError
        return os.write(self._fd, data[: select.PIPE_BUF])

    def wait(self, seconds: float) -> bool:
        """See `Stream`."""
        return bool(self._room.poll(seconds * 1000))


def standard_output() -> Descriptor:
    """The process's own, also where twistd has taken over `sys.stdout`."""
    out: TextIO | None = sys.__stdout__
    return Descriptor(os.open(os.devnull, os.O_WRONLY) if out is None else out.fileno())


class Output:
    """Writes lines to a stream in order, from any thread, without waiting; says how many it had to drop."""

    def __init__(self, stream: Stream, dropped_line: Callable[[int], bytes], limit: int = BACKLOG_BYTES):
        """@param dropped_line: the line that says how many were dropped. @param limit: of the backlog, in bytes."""
        self._stream = stream
        self._dropped_line = dropped_line
        self._limit = limit
        self._backlog: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._patience = 0.0
        # Reentrant: a collected object may log from within, wherever we are.
        self._lock = threading.RLock()
        self._writing = False
        self._torn = False

    @property
    def behind(self) -> bool:
        """Whether lines wait for the reader. `flush` should be called from time to time then."""
        return bool(self._backlog) or self._dropped > 0

    def write(self, line: bytes) -> None:
        """Write a line, or keep it for later."""
        with self._lock:
            if self._dropped or self._size + len(line) > self._limit:
                self._dropped += 1
            else:
                self._backlog.append(line)
                self._size += len(line)
            self.flush()

    def flush(self) -> None:
        """Write what the stream takes of what waits."""
        with self._lock:
            if self._writing:  # the line came from within: it will have its turn
                return
            self._writing = True
            try:
                self._flush()
            except OSError:  # nobody reads any more, or the disk is full
                self._dropped += len(self._backlog)
                self._backlog.clear()
                self._size = 0
            finally:
                self._writing = False

    def settle(self, seconds: float) -> None:
        """Wait for the reader, now and with lines still to come, but no longer than this in all."""
        with self._lock:
            self._patience = seconds
            self.flush()

    def _flush(self) -> None:
        while self._backlog or self._dropped:
            count = 0 if self._backlog else self._dropped
            line = b"\n" * self._torn + self._dropped_line(count) if count else self._backlog[0]
            try:
                taken = self._stream.write(line)
            except BlockingIOError:
                if not self._waited():
                    return
                continue
            if count:
                self._dropped -= count
                self._backlog.append(line)
                self._size += len(line)
            self._size -= taken
            self._torn = taken < len(line)
            if self._torn:
                self._backlog[0] = line[taken:]
            else:
                self._backlog.popleft()

    def _waited(self) -> bool:
        if self._patience <= 0:
            return False
        began = time.monotonic()
        room = self._stream.wait(self._patience)
        self._patience -= time.monotonic() - began
        return room
