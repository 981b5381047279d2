"""What llhttp (by httptools) finds in the bytes of an HTTP/1.1 connection: heads, pieces of bodies, ends.

llhttp refuses most of what is malformed by itself, `heads.is_sound` the rest. It is fed a slice at a time, so that the
others get their turn whatever there is in what has come.
"""

from collections import deque
from collections.abc import Callable

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser
from msgspec import Struct
from twisted.logger import Logger

from ai_ticket.web.heads import MAX_HEAD_BYTES, MAX_HEAD_FIELDS, REQUEST_LINE, is_sound

SLICE_BYTES = 4096

FRAMING_RATIO = 8
"""How many bytes there may be around each byte of a chunked body: a chunk of one byte has five. What is beyond that,

extensions and trailers, counts towards the limit of a head.
"""


class Head(Struct, gc=False):
    """A request's head. `last`: its connection takes no further request. `arrived`: the clock's time of its end."""

    method: str
    target: bytes
    version: str
    headers: dict[bytes, bytes]
    last: bool
    arrived: float


class Broken(Struct, frozen=True):
    """What follows can't be read; `status` is the answer to it."""

    status: int


class End(Struct, gc=False):
    """The end of a request's body, which there is also where there is no body."""


_END = End()
Piece = Head | bytearray | End | Broken


class Parser:
    """Turns bytes into `pieces`, for others to take from the left. A body's bytes in a row make one piece.

    `unread` is what has come and was not parsed yet. `head_fed` is not 0 where a head has begun to come and is not
    complete: it counts its bytes, at the least.
    """

    _log = Logger()

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self._llhttp = HttpRequestParser(self)
        self.unread = b""
        self.pieces: deque[Piece] = deque()
        self._line: bytes | None = b""
        self._last_bytes = b""
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._fields = 0
        self._head_bytes = 0
        self.head_fed = 0
        self._in_head = True
        self._body_bytes = 0
        self._body_left = 0
        self._framing = 0
        self._work = 0
        self._broken = False

    def add(self, data: bytes) -> None:
        """Take in what has come."""
        if not self._broken:
            self.unread = self.unread + data if self.unread else data

    def close(self) -> None:
        """Nothing is read any more."""
        self._end()
        del self._llhttp  # they know each other: both would be garbage to be searched for

    def read_slice(self) -> int:
        """Read a little of it. Returns about how many microseconds that took."""
        data, self.unread = self.unread[:SLICE_BYTES], self.unread[SLICE_BYTES:]
        self._work = 5
        while data:
            # llhttp does not tell where in its bytes a message ends, but it ends with what it is fed then. So each
            # head begins with the first byte of a piece, and its request line can be looked at.
            end = self._body_left or self._message_end(data)
            self._read(data[:end])
            data = b"" if self._broken else data[end:]
        return self._work

    def _message_end(self, data: bytes) -> int:
        """The first place in these bytes where a head or a chunked body may end, which it does with an empty line."""
        before = self._last_bytes
        if before:
            data = before + data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            self._last_bytes, end = data[-3:], len(data)
        elif before:
            self._last_bytes = b""
        return end - len(before)

    def _read(self, data: bytes) -> None:
        if self._in_head:
            self.head_fed += len(data)
            if self._line is not None and not self._read_line(data):
                self._break(400)
                return
            self._parse(data)
        else:
            body_bytes = self._body_bytes
            self._parse(data)
            framing = len(data) - (1 + FRAMING_RATIO) * (self._body_bytes - body_bytes)
            self._framing = max(0, self._framing + framing)
            if not self._in_head and self._framing > MAX_HEAD_BYTES:
                self._break(400)
        if self._in_head and self.head_fed > MAX_HEAD_BYTES:
            self._break(431)

    def _read_line(self, data: bytes) -> bool:
        """Look at the request line once all of it is there. Whether there is nothing wrong with it so far."""
        line = self._line + data if self._line else data
        if b"\n" in data and line.find(b"\n", 2) > 0:
            self._line = None
            return REQUEST_LINE.match(line) is not None
        self._line = line
        return True

    def _parse(self, data: bytes) -> None:
        try:
            self._llhttp.feed_data(data)
        except HttpParserUpgrade:
            if self._llhttp.get_method() != b"CONNECT":
                self._decline_upgrade()
            else:
                self._end()
        except HttpParserCallbackError:
            self._log.failure("a parser callback failed")
            self._break(500)
        except HttpParserError:
            self._break(400)

    def _decline_upgrade(self) -> None:
        """Go on as if none had been offered, which declines it (RFC 9110, 7.8).

        llhttp stops after such a head, so a new parser gets the head again without the offer. CONNECT has no body that
        could be read: its answer is the last.
        """
        version = self._llhttp.get_http_version().encode()
        head = [b"%s %s HTTP/%s" % (self._llhttp.get_method(), self._target, version)]
        head += [b"%s: %s" % header for header in self._headers.items() if header[0] not in (b"upgrade", b"connection")]
        if b"close" in self._headers.get(b"connection", b"").lower():
            head.append(b"connection: close")
        self._llhttp = HttpRequestParser(self)
        self._work += 20
        if not self._broken:
            self._parse(b"\r\n".join([*head, b"\r\n"]))

    def _break(self, status: int) -> None:
        if not self._broken:
            self._end()
            self.pieces.append(Broken(status))

    def _end(self) -> None:
        """Read nothing any more."""
        self._broken = True
        self.unread = b""

    # What llhttp finds, in order.

    def on_message_begin(self) -> None:
        """A new head."""
        self._target = b""
        self._headers = {}
        self._fields = 0
        self._head_bytes = 14  # in the request line beside method and target, and in the empty line
        self._in_head = True

    def on_url(self, part: bytes) -> None:
        """A part of the request target."""
        self._target += part
        self._head_bytes += len(part)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; after the body it is a trailer, which nothing here wants but which counts all the same."""
        self._fields += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._fields > MAX_HEAD_FIELDS:
            self._break(431)
        elif self._in_head:
            name, value = name.lower(), value.rstrip()
            known = self._headers.get(name)
            self._headers[name] = value if known is None else known + b", " + value

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._work += 10 + self._fields
        self._in_head = False
        self.head_fed = self._framing = 0
        if self._broken:
            return
        method = self._llhttp.get_method().decode("ascii")
        self._head_bytes += len(method)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._break(431)
            return
        if self._llhttp.should_upgrade() and method != "CONNECT":
            return
        version = self._llhttp.get_http_version()
        if self._line is not None or not is_sound(method, self._target, version, self._headers):
            self._break(400)
            return
        length = self._headers.get(b"content-length")
        if length is not None:
            self._body_left = int(length)
        # HTTP/1.0 callers get one answer a connection: they would need to be told of each one kept open.
        last = not self._llhttp.should_keep_alive() or version != "1.1" or method == "CONNECT"
        self.pieces.append(Head(method, self._target, version, self._headers, last, self._now()))

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._work += 2
        self._body_bytes += len(data)
        self._body_left = max(0, self._body_left - len(data))
        before = self.pieces[-1] if self.pieces else None
        if isinstance(before, bytearray):
            before += data
        elif not self._broken:
            self.pieces.append(bytearray(data))

    def on_message_complete(self) -> None:
        """The body is complete, or llhttp gives up at an upgrade (see `_decline_upgrade`)."""
        self._in_head = True
        if self._broken or (self._llhttp.should_upgrade() and self._llhttp.get_method() != b"CONNECT"):
            return
        if self._head_bytes > MAX_HEAD_BYTES:
            self._break(431)
            return
        self._line = b""
        self._headers = {}
        self.pieces.append(_END)
