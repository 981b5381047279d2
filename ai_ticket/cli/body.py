"""The body of an answer: the whole of it, or the objects of an event stream one by one as they come."""

from collections.abc import Callable
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IResponse

from ai_ticket.backend.sse import EventTooLarge, SSEDecoder

Fields = dict[str, Any]


class NotAnObject(ValueError):
    """What should have been a JSON object is something else."""


def read(response: IResponse) -> "Deferred[bytes]":
    """The whole body."""
    body = _Whole()
    response.deliverBody(body)
    return body.finished


def read_events(response: IResponse, receive: Callable[[Fields], None]) -> "Deferred[Fields | None]":
    """Give each object of an event stream to `receive`, up to the one with `"done": true`, which is the result too.

    An error object is only the result. That is None if the stream ends, or breaks off, without one of the two. What
    `receive` raises becomes the failure of the result, and so does NotAnObject where an event is no JSON object.
    """
    body = _Events(receive)
    response.deliverBody(body)
    return body.finished


def parse(content: bytes) -> Fields:
    """Read a JSON object.

    @raise NotAnObject: it is none.
    """
    try:
        fields = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise NotAnObject
    if not isinstance(fields, dict):
        raise NotAnObject
    return fields


class _Whole(Protocol):
    def __init__(self) -> None:
        self._content = bytearray()
        self.finished: Deferred[bytes] = Deferred(lambda finished: _hang_up(self))

    def dataReceived(self, data: bytes) -> None:
        self._content += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.finished.called:
            return
        # PotentialDataLoss: the end of the connection was the end of the body. If it is cut it is no JSON.
        if reason.check(ResponseDone, PotentialDataLoss):
            self.finished.callback(bytes(self._content))
        else:
            self.finished.errback(reason)


class _Events(Protocol):
    def __init__(self, receive: Callable[[Fields], None]) -> None:
        self._receive = receive
        self._decoder = SSEDecoder()
        self.finished: Deferred[Fields | None] = Deferred(lambda finished: _hang_up(self))

    def dataReceived(self, data: bytes) -> None:
        if self.finished.called:
            return
        try:
            end = self._read(data)
        except Exception:
            _hang_up(self)
            self.finished.errback()
        else:
            if end is not None:
                self.finished.callback(end)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if not self.finished.called:
            self.finished.callback(None)

    def _read(self, data: bytes) -> Fields | None:
        """The object that ends the stream, if that is among them."""
        try:
            events = self._decoder.feed(data)
        except EventTooLarge:
            raise NotAnObject
        for event in events:
            fields = parse(event)
            if "error" in fields:  # the event's name says it too, but no other object has such a field
                return fields
            self._receive(fields)
            if fields.get("done") is True:
                return fields
        return None


def _hang_up(body: Protocol) -> None:
    # Not abortConnection(), as readBody() does: what twisted.web gives us as a transport has none.
    if body.transport is not None:
        body.transport.loseConnection()
