"""What llhttp (by httptools) finds in the bytes of an HTTP/1.1 connection: heads, pieces of bodies, ends."""

from collections import deque
from collections.abc import Callable

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser
from msgspec import Struct
from twisted.logger import Logger

MAX_HEAD_BYTES = 16_384
MAX_HEAD_FIELDS = 100
MAX_WAITING = 64
MAX_WAITING_BYTES = 65_536
"""Pieces, and their bytes of bodies, that may wait behind the request that is being answered."""


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

    `head_fed` counts the bytes of a head that has begun to come and is not complete.
    """

    _log = Logger()

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self._llhttp = HttpRequestParser(self)
        self.pieces: deque[Piece] = deque()
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._fields = 0
        self._head_bytes = 0
        self.head_fed = 0
        self._in_head = True

    @property
    def overfull(self) -> bool:
        """Whether more pieces wait than should."""
        if len(self.pieces) > MAX_WAITING:
            return True
        return sum(len(piece) for piece in self.pieces if isinstance(piece, bytearray)) > MAX_WAITING_BYTES

    def feed(self, data: bytes) -> None:
        """Parse what has come."""
        if self._in_head:
            self.head_fed += len(data)
        self._parse(data)
        if self._in_head and self.head_fed > MAX_HEAD_BYTES:
            self._break(431)

    def _parse(self, data: bytes) -> None:
        try:
            self._llhttp.feed_data(data)
        except HttpParserUpgrade as upgrade:
            if self._llhttp.get_method() == b"CONNECT":
                return
            self._decline_upgrade(data[upgrade.args[0] :])
        except HttpParserCallbackError:
            self._log.failure("a parser callback failed")
            self._break(500)
        except HttpParserError:
            self._break(400)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on as if none had been offered, which declines it (RFC 9110, 7.8).

        llhttp stops after such a head and leaves the body unread, so a new parser gets the head again without the
        offer, and then the rest. CONNECT has no body that could be read: its answer is the last.
        """
        head = [b"%s %s HTTP/1.1" % (self._llhttp.get_method(), self._target)]
        head += [b"%s: %s" % header for header in self._headers.items() if header[0] not in (b"upgrade", b"connection")]
        if b"close" in self._headers.get(b"connection", b"").lower():
            head.append(b"connection: close")
        self._llhttp = HttpRequestParser(self)
        self._parse(b"\r\n".join([*head, b"\r\n"]) + rest)

    def _break(self, status: int) -> None:
        self.pieces.append(Broken(status))

    # What llhttp finds, in order.

    def on_message_begin(self) -> None:
        """A new head."""
        self._target = b""
        self._headers = {}
        self._fields = self._head_bytes = 0
        self._in_head = True

    def on_url(self, part: bytes) -> None:
        """A part of the request target."""
        self._target += part
        self._head_bytes += len(part)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; after the body it is a trailer, which nothing here wants."""
        if not self._in_head:
            return
        self._fields += 1
        self._head_bytes += len(name) + len(value) + 4
        name = name.lower()
        known = self._headers.get(name)
        self._headers[name] = value if known is None else known + b", " + value

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._in_head = False
        self.head_fed = 0
        if self._head_bytes > MAX_HEAD_BYTES or self._fields > MAX_HEAD_FIELDS:
            self._break(431)
            return
        method = self._llhttp.get_method().decode("ascii")
        if self._llhttp.should_upgrade() and method != "CONNECT":
            return
        version = self._llhttp.get_http_version()
        if not _one_host(self._headers.get(b"host"), version):
            self._break(400)
            return
        # HTTP/1.0 callers get one answer a connection: they would need to be told of each one kept open.
        last = not self._llhttp.should_keep_alive() or version != "1.1" or method == "CONNECT"
        self.pieces.append(Head(method, self._target, version, self._headers, last, self._now()))

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        before = self.pieces[-1] if self.pieces else None
        if isinstance(before, bytearray):
            before += data
        else:
            self.pieces.append(bytearray(data))

    def on_message_complete(self) -> None:
        """The body is complete, or llhttp gives up at an upgrade (see `_decline_upgrade`)."""
        self._in_head = True
        if self._llhttp.should_upgrade() and self._llhttp.get_method() != b"CONNECT":
            return
        self.pieces.append(_END)


def _one_host(host: bytes | None, version: str) -> bool:
    """Whether there is the one Host header that HTTP/1.1 demands (RFC 9112, 3.2); repeated ones come joined."""
    return b"," not in host if host is not None else version == "1.0"
