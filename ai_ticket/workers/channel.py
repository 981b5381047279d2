"""The channel between the parent and a worker: frames of typed messages over a pair of sockets."""

import socket
from collections.abc import Callable
from struct import Struct
from typing import Any

import msgspec
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket.workers.message import Message
from ai_ticket.workers.messages import FromParent, FromWorker

LARGEST_FRAME = 67_108_864
MOST_UNREAD = 16_777_216
"""Bytes that may wait for a process at the other end that does not read: it hangs, and is given up."""

_HEAD = Struct(">I")
_encode = msgspec.msgpack.Encoder().encode
from_worker: "msgspec.msgpack.Decoder[Any]" = msgspec.msgpack.Decoder(FromWorker)
from_parent: "msgspec.msgpack.Decoder[Any]" = msgspec.msgpack.Decoder(FromParent)


def frame(message: Message) -> bytes:
    """A message as it is sent: its length in four bytes, then itself as msgpack."""
    data = _encode(message)
    return _HEAD.pack(len(data)) + data


def read_one(source: socket.socket, decoder: "msgspec.msgpack.Decoder[Any]") -> Any:
    """Wait for a message, before there is a reactor, and take nothing of what comes behind it.

    @raise EOFError: the other end has closed. @raise OSError: reading fails, or takes longer than the socket allows.
    """
    (size,) = _HEAD.unpack(_read(source, _HEAD.size))
    return decoder.decode(_read(source, size))


def _read(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = source.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


@implementer(IPushProducer)
class Channel(Protocol):
    """One end of a channel. What is sent within one turn of the reactor leaves together, by the transport's nature.

    `reading`: there may be more of the messages that have come together.
    """

    _log = Logger()
    transport: Any

    def __init__(
        self,
        decoder: "msgspec.msgpack.Decoder[Any]",
        received: Callable[[Any], None],
        lost: Callable[[], None],
        read: Callable[[], None] = lambda: None,
    ):
        """@param received: takes each message. @param lost: called once, when the channel is closed.

        @param read: called after the last of some messages that have come together.
        """
        self._decoder = decoder
        self._received = received
        self._lost = lost
        self._when_read = read
        self.reading = False
        self._buffer = bytearray()
        self._full = False
        self._unread = 0

    def connectionMade(self) -> None:
        """Watch how much waits for the other end."""
        self.transport.registerProducer(self, True)

    def send(self, message: Message) -> None:
        """Send a message; once the channel is closed, nothing happens."""
        if self.transport is None:
            return
        data = frame(message)
        if self._full:
            self._unread += len(data)
            if self._unread > MOST_UNREAD:
                self._log.error("the process at the other end does not read what it is sent")
                self.transport.abortConnection()
                return
        self.transport.write(data)

    def close(self) -> None:
        """Close, once all that was sent has left."""
        if self.transport is not None:
            self.transport.unregisterProducer()
            self.transport.loseConnection()

    def dataReceived(self, data: bytes) -> None:
        """Bytes have come."""
        self.reading = True
        try:
            self._read(data)
        finally:
            self.reading = False
            try:
                self._when_read()
            except Exception:  # nor must this
                self._log.failure("what messages that came together have changed can't be told")

    def _read(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        begin, come = 0, len(buffer)
        with memoryview(buffer) as view:
            while (body := begin + _HEAD.size) <= come:
                (size,) = _HEAD.unpack_from(view, begin)
                if size > LARGEST_FRAME - _HEAD.size:
                    self._log.error("a message of {size} bytes is too large", size=size)
                    self.transport.abortConnection()
                    return
                if come < body + size:
                    break
                begin = body + size
                message = self._decoder.decode(view[body:begin])
                self._take(message)
        del buffer[:begin]

    def _take(self, message: Any) -> None:
        try:
            self._received(message)
        except Exception:  # one that fails must not take with it those of all other callers
            self._log.failure("taking a message failed: {message}", message=type(message).__name__)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The channel is closed."""
        self.transport = None
        self._lost()

    def pauseProducing(self) -> None:
        """The other end has not read for a while."""
        self._full = True
        self._unread = 0

    def resumeProducing(self) -> None:
        """It has read all."""
        self._full = False

    def stopProducing(self) -> None:
        """`connectionLost` says so too."""


class Questions:
    """Questions that the other end of a channel has not answered yet, by their numbers."""

    def __init__(self, send: Callable[[Message], None]):
        self._send = send
        self._number = 0
        self._open: dict[int, Deferred[Any]] = {}
        self._over: Exception | None = None

    def ask(self, question: Callable[[int], Message]) -> Deferred[Any]:
        """Ask, and wait for the answer; who cancels no longer wants to know."""
        if self._over is not None:
            return fail(self._over)
        number = self._number = self._number + 1
        answer: Deferred[Any] = Deferred(lambda _: self._forget(number))
        self._open[number] = answer
        self._send(question(number))
        return answer

    def _forget(self, number: int) -> None:
        del self._open[number]

    def answered(self, number: int, answer: Any) -> None:
        """An answer has come."""
        waiting = self._open.pop(number, None)
        if waiting is not None:
            waiting.callback(answer)

    def refused(self, number: int, error: Exception) -> None:
        """One is answered with an error."""
        waiting = self._open.pop(number, None)
        if waiting is not None:
            waiting.errback(error)

    def fail(self, error: Exception) -> None:
        """None will be answered, nor any that is asked from now on."""
        self._over = error
        for waiting in list(self._open.values()):
            waiting.errback(error)
        self._open.clear()
