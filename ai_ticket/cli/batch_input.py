"""The events of a batch, one a line, read as they are needed."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol, Self

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.python.failure import Failure
from zope.interface import implementer

LONGEST_LINE = 16 * 1024 * 1024
"""In bytes. Far above what the service takes by default; it is there so that a file without line ends does no harm."""
_CHUNK = 256 * 1024


class Line(Struct, frozen=True):
    """A line that is not blank, with its number from 0; `content` is None where it is longer than LONGEST_LINE."""

    number: int
    content: bytes | None


class Survey(Struct, frozen=True):
    """What an input is known by, and how many `lines` it has, of which those that are not blank are `events`."""

    sha256: str
    lines: int
    events: int


class Lines(Protocol):
    """Lines in their order. Several may wait for the next at a time."""

    def __aiter__(self) -> Self:
        """Itself."""

    async def __anext__(self) -> Line:
        """The next line."""


class Splitter:
    """Cuts what comes into lines."""

    def __init__(self) -> None:
        self.count = 0
        self._partial = bytearray()
        self._too_long = False

    def feed(self, data: bytes) -> Iterator[Line]:
        """The lines that end within `data`; to be used up before there is more."""
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._extend(end)
            yield from self._line()
        self._extend(rest)

    def end(self) -> Iterator[Line]:
        """The last line, if it has no line end."""
        if self._partial or self._too_long:
            yield from self._line()

    def _extend(self, piece: bytes) -> None:
        if not self._too_long:
            self._partial += piece
            if len(self._partial) > LONGEST_LINE:
                self._too_long = True
                self._partial.clear()

    def _line(self) -> Iterator[Line]:
        content = bytes(self._partial.strip())
        number, too_long = self.count, self._too_long
        self.count += 1
        self._partial.clear()
        self._too_long = False
        if content or too_long:
            yield Line(number, None if too_long else content)


def survey(file: BinaryIO) -> Survey:
    """Read all of it once, and go back to its start."""
    digest, splitter, events = hashlib.sha256(), Splitter(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        events += sum(1 for _ in splitter.feed(chunk))
    events += sum(1 for _ in splitter.end())
    file.seek(0)
    return Survey(sha256=digest.hexdigest(), lines=splitter.count, events=events)


class FileLines:
    """The lines of a file on a disk, where reading takes no time to speak of."""

    def __init__(self, file: BinaryIO):
        self._lines = self._read(file)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Line:
        for line in self._lines:
            return line
        raise StopAsyncIteration

    @staticmethod
    def _read(file: BinaryIO) -> Iterator[Line]:
        splitter = Splitter()
        while chunk := file.read(_CHUNK):
            yield from splitter.feed(chunk)
        yield from splitter.end()


@implementer(IReadDescriptor)
class PipedLines:
    """The lines of a pipe or a terminal, which come when they come; no more is read while nobody waits for them."""

    def __init__(self, reactor: Any, descriptor: int):
        self._reactor = reactor
        self._descriptor = descriptor
        self._splitter = Splitter()
        self._ready: deque[Line] = deque()
        self._waiting: deque[Deferred[None]] = deque()
        self._ended = False
        self._error: OSError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Line:
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            waiting: Deferred[None] = Deferred(self._leave)
            self._waiting.append(waiting)
            self._reactor.addReader(self)
            await waiting
        return self._ready.popleft()

    def _leave(self, waiting: Deferred[None]) -> None:
        self._waiting.remove(waiting)
        if not self._waiting:
            self._reactor.removeReader(self)

    def fileno(self) -> int:
        """For the reactor, as all below."""
        return self._descriptor

    def logPrefix(self) -> str:
        """How the reactor calls it in its log."""
        return "batch input"

    def doRead(self) -> None:
        """There is something, or the end: one read does not block, so that the descriptor's own mode can stay."""
        try:
            data = os.read(self._descriptor, _CHUNK)
        except OSError as error:
            self._error = error
            data = b""
        if not data:
            self._end()
            return
        self._ready.extend(self._splitter.feed(data))
        self._wake()

    def connectionLost(self, reason: Failure = Failure(CONNECTION_DONE)) -> None:  # noqa: B008
        """The other side of the pipe was closed, and nothing is left in it."""
        self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._ready.extend(self._splitter.end())
            self._wake()

    def _wake(self) -> None:
        while self._waiting and (self._ready or self._ended):
            self._waiting.popleft().callback(None)
        if not self._waiting or self._ended:
            self._reactor.removeReader(self)
