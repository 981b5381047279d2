"""A request's body as it comes: whole or by pieces, with back-pressure, and the time that its caller has for it."""

from collections.abc import Callable
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred, fail, succeed

from ai_ticket.web.faults import PayloadTooLarge

MAX_HELD = 65_536
"""Bytes of a body that may have come and not been asked for: from there on the connection does not read on."""


MIN_RATE = 4096
"""Bytes a second: a caller who sends so fast never runs out of time for the body, nor who takes an answer so fast."""


class BodyTime:
    """How long the caller may still take over the body, in seconds: it runs only while we wait for the caller.

    Also over an answer that comes with flow control (HTTP/2), which the caller must take at the same rate.
    """

    __slots__ = ("_left", "_now", "_seconds", "_since")

    def __init__(self, now: Callable[[], float], seconds: float):
        self._now = now
        self._seconds = self._left = seconds
        self._since: float | None = None

    def run(self) -> None:
        """From here on we wait for the caller."""
        if self._since is None:
            self._since = self._now()

    def stop(self) -> None:
        """We have what we want, for now."""
        if self._since is not None:
            self._left -= self._now() - self._since
            self._since = None

    def renew(self) -> None:
        """All of the time is there again."""
        self._left = self._seconds
        if self._since is not None:
            self._since = self._now()

    def extend(self, size: int) -> None:
        """So many bytes have come, or were taken."""
        self._left += size / MIN_RATE

    @property
    def over(self) -> bool:
        """Whether the caller has taken too long."""
        return self._since is not None and self._now() - self._since >= self._left


class BodySource(Protocol):
    """Where a body comes from: its connection (HTTP/1) or stream (HTTP/2)."""

    body_time: BodyTime

    def send_continue(self) -> None:
        """Tell a caller who waits for it to send the body."""

    def pause_body(self) -> None:
        """Read no more of the body; what is on its way may still come."""

    def resume_body(self) -> None:
        """Read on."""


class Body:
    """A request's body. It has one reader at a time.

    `ended`: all of it has come, whether it was read or not.
    """

    __slots__ = (
        "_headers",
        "_held",
        "_limit",
        "_paused",
        "_size",
        "_source",
        "_told",
        "_waiting",
        "_wanted",
        "ended",
    )

    def __init__(self, source: BodySource, headers: dict[bytes, bytes]):
        self._source = source
        self._headers = headers
        self._held = bytearray()
        self._size = 0
        self._limit: int | None = None
        self._waiting: Deferred[bytes] | None = None
        self._paused = False
        self._wanted = True
        self._told = False
        self.ended = False

    @property
    def announced(self) -> int | None:
        """Its size in bytes as the head has it, or None where it does not say."""
        value = self._headers.get(b"content-length")
        return int(value) if value is not None and value.isdigit() else None

    def read_all(self, limit: int) -> Deferred[bytes]:
        """The whole body, once it is there."""
        self._limit = limit
        if not self._wanted:
            return fail(CancelledError())
        if max(self._size, self.announced or 0) > limit:
            return fail(self._too_large())
        return succeed(self._take()) if self.ended else self._wait()

    def read_some(self) -> Deferred[bytes]:
        """What has come, once something has; b"" at the end."""
        if not self._wanted:
            return fail(CancelledError())
        return succeed(self._take()) if self._held or self.ended else self._wait()

    def drop(self) -> None:
        """The request is answered: the rest is not wanted."""
        if self._paused:
            self._resume()
        self.lose()

    # What the connection tells the body, by way of its request.

    def received(self, data: bytes | bytearray) -> None:
        """Some of it has come."""
        if not self._wanted:
            return
        self._told = True
        self._size += len(data)
        self._source.body_time.extend(len(data))
        if self._limit is not None and self._size > self._limit:
            if self._waiting is not None:
                self._served(self._waiting).errback(self._too_large())
        elif self._limit is None and self._waiting is not None:
            self._served(self._waiting).callback(bytes(data))
        else:
            self._held += data
            if self._limit is None and len(self._held) >= MAX_HELD and not self._paused:
                self._paused = True
                self._source.pause_body()

    def end(self) -> None:
        """All of it has come."""
        self.ended = True
        if self._paused:
            self._resume()
        if self._waiting is not None:
            self._served(self._waiting).callback(self._take())
        else:
            self._source.body_time.stop()

    def lose(self) -> None:
        """The caller is gone."""
        self._wanted = False
        self._held.clear()
        if self._waiting is not None:
            self._served(self._waiting).errback(CancelledError())

    def refrain(self) -> None:
        """The answer was begun: it is too late to tell the caller to send the body."""
        self._told = True

    def invite(self) -> None:
        """Tell a caller who waits for it to send the body."""
        if not self._told:
            self._told = True
            if self._headers.get(b"expect", b"").lower() == b"100-continue":
                self._source.send_continue()

    def _wait(self) -> Deferred[bytes]:
        self.invite()
        if self._paused:
            self._resume()
        self._source.body_time.run()
        self._waiting = Deferred(self._cancelled)
        return self._waiting

    def _served(self, waiting: Deferred[bytes]) -> Deferred[bytes]:
        self._waiting = None
        self._source.body_time.stop()
        return waiting

    def _cancelled(self, waiting: Deferred[bytes]) -> None:
        self._served(waiting).errback(CancelledError())

    def _take(self) -> bytes:
        data = bytes(self._held)
        self._held.clear()
        if self._paused:
            self._resume()
        return data

    def _resume(self) -> None:
        self._paused = False
        self._source.resume_body()

    def _too_large(self) -> PayloadTooLarge:
        self._held.clear()
        return PayloadTooLarge(f"the body is larger than {self._limit} bytes")
