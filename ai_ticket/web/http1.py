"""HTTP/1.1 on one connection: llhttp (by httptools) parses, this decides when a request begins, ends and is answered.

Written on llhttp rather than on twisted.web's channel so that a head can be answered before its body, deadlines hold
for a whole head and body, and one write carries an answer (see ops/decisions/).
"""

from collections import deque
from enum import Enum, auto
from http import HTTPStatus

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger

from ai_ticket.web.connections import CLOSE_SECONDS, Connection
from ai_ticket.web.request import HeaderList, Request

MAX_HEAD_BYTES = 16_384
MAX_HEAD_FIELDS = 100
MAX_PIPELINED = 64
"""Parsed pieces (heads, pieces of bodies) that may wait behind the request that is being answered."""

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class _Piece(Enum):
    HEAD = auto()
    BODY = auto()
    END = auto()
    BROKEN = auto()


class Http1:
    """The HTTP/1.1 codec of a connection."""

    _log = Logger()

    def __init__(self, connection: Connection):
        self._connection = connection
        self._transport = connection.transport
        self._timeouts = connection.connections.timeouts
        self._parser = HttpRequestParser(self)
        self._pieces: deque[tuple[_Piece, Request | bytes | int]] = deque()
        self._advancing = False
        self._paused = False

        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._fields = 0
        self._head_bytes = 0
        self._fed_bytes = 0
        self._in_head = True

        self._request: Request | None = None
        self._body_open = False
        self._discarding = False
        self._chunked = self._closes = False
        self.deadline: float | None = self._now() + self._timeouts.header

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self._request is None and not self._fed_bytes

    # What the connection tells the codec.

    def received(self, data: bytes) -> None:
        """Parse, then act on what was found."""
        if self._discarding:
            self._discard(data)
            return
        if self.idle:
            self.deadline = self._now() + self._timeouts.header
        if self._in_head:
            self._fed_bytes += len(data)
        self._feed(data)
        if self._in_head and self._fed_bytes > MAX_HEAD_BYTES:
            self._break(431)
        self._advance()
        if len(self._pieces) > MAX_PIPELINED and not self._paused:
            self._paused = True
            self._transport.pauseProducing()  # type: ignore[attr-defined]

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            if self._parser.get_method() == b"CONNECT":
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
        head = [b"%s %s HTTP/1.1" % (self._parser.get_method(), self._target)]
        head += [b"%s: %s" % header for header in self._headers.items() if header[0] not in (b"upgrade", b"connection")]
        if b"close" in self._headers.get(b"connection", b"").lower():
            head.append(b"connection: close")
        self._parser = HttpRequestParser(self)
        self._feed(b"\r\n".join([*head, b"\r\n"]) + rest)

    def _break(self, status: int) -> None:
        """What follows can't be read: answer so, in its turn, and close."""
        self._pieces.append((_Piece.BROKEN, status))

    def lost(self) -> None:
        """The connection is gone: so is the caller of the request under way. Those behind it were never begun."""
        self._pieces.clear()
        if self._request is not None:
            self._request.connection_lost()
            self._request = None

    def check_deadlines(self, now: float) -> None:
        """Abort a connection whose head, body, or next request has not come in time."""
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self._connection.abort()

    def drain(self) -> None:
        """Close at once if idle; otherwise the answer under way closes (see `send`)."""
        if self.idle:
            self._connection.close()

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
        self._fed_bytes = 0
        if self._head_bytes > MAX_HEAD_BYTES or self._fields > MAX_HEAD_FIELDS:
            self._break(431)
            return
        method = self._parser.get_method().decode("ascii")
        if self._parser.should_upgrade() and method != "CONNECT":
            return
        version = self._parser.get_http_version()
        if not _one_host(self._headers.get(b"host"), version):
            self._break(400)
            return
        request = Request(
            self,
            method=method,
            target=self._target,
            version=version,
            headers=self._headers,
            peer=self._connection.peer,
            secure=self._connection.secure,
            arrived=self._now(),
        )
        # HTTP/1.0 callers get one answer a connection: they would need to be told of each one kept open.
        request.last = not self._parser.should_keep_alive() or version != "1.1" or method == "CONNECT"
        self._pieces.append((_Piece.HEAD, request))

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._pieces.append((_Piece.BODY, data))

    def on_message_complete(self) -> None:
        """The body is complete, or llhttp gives up at an upgrade (see `_decline_upgrade`)."""
        self._in_head = True
        if self._parser.should_upgrade() and self._parser.get_method() != b"CONNECT":
            return
        self._pieces.append((_Piece.END, b""))

    # Requests, one at a time.

    def _advance(self) -> None:
        """Act on the pieces that are there, as far as the request under way allows."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._pieces and not self._discarding:
                piece, value = self._pieces[0]
                if piece is _Piece.BROKEN and self._request is not None and self._body_open:
                    self._give_up_body(self._request)
                elif piece in (_Piece.HEAD, _Piece.BROKEN) and self._request is not None:
                    break
                if self._discarding:
                    break
                self._pieces.popleft()
                if isinstance(value, Request):
                    self._begin(value)
                elif isinstance(value, int):
                    self._refuse(value)
                elif piece is _Piece.BODY:
                    if self._request is not None:
                        self._request.body_received(value)
                else:
                    self._end_body()
        finally:
            self._advancing = False
        if self._paused and len(self._pieces) <= MAX_PIPELINED:
            self._paused = False
            self._transport.resumeProducing()  # type: ignore[attr-defined]

    def _give_up_body(self, request: Request) -> None:
        """The body of the request under way can't be read on: nobody must wait for the rest of it."""
        self._request = None
        request.connection_lost()
        if request.responded:
            self._pieces.clear()
            self._discarding = True
            self._connection.close()

    def _begin(self, request: Request) -> None:
        self._request = request
        self._body_open = True
        self.deadline = self._now() + self._timeouts.body
        self._connection.listener.received(request)

    def _end_body(self) -> None:
        self._body_open = False
        self.deadline = None
        if self._request is not None:
            self._request.body_ended()
            if self._request is not None and self._request.responded and not self._request.streaming:
                self._finish()

    def send_continue(self) -> None:
        """Tell the caller to send the body."""
        self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def send(self, status: int, headers: HeaderList, body: bytes, content_length: int) -> None:
        """Send the answer to the request under way, in one write."""
        close = self._must_close()
        lines = self._head(status, headers, close)
        lines += (b"content-length: %d\r\n\r\n" % content_length, body)
        self._transport.write(b"".join(lines))
        self._answered(close)

    def start(self, status: int, headers: HeaderList, producer: IPushProducer) -> None:
        """Begin an answer in pieces: chunks, or for HTTP/1.0 all that comes until the connection closes."""
        self._closes = self._must_close()
        self._chunked = self._request is not None and self._request.version == "1.1"
        lines = self._head(status, headers, self._closes)
        lines.append(b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        self._transport.write(b"".join(lines))
        self._transport.registerProducer(producer, True)  # type: ignore[attr-defined]

    def write(self, data: bytes) -> None:
        """Send a piece of the answer."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def finish(self) -> None:
        """The answer in pieces is complete."""
        self._transport.unregisterProducer()  # type: ignore[attr-defined]
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")
        self._answered(self._closes)

    def abort(self) -> None:
        """Cut the answer in pieces: a chunked body without its end shows that it was cut."""
        self._request = None
        self._connection.abort()

    def _head(self, status: int, headers: HeaderList, close: bool) -> list[bytes]:
        lines = [_STATUS_LINES[status], b"date: ", self._connection.connections.date(), b"\r\n"]
        for name, value in headers:
            if name != b"connection":
                lines += (name, b": ", value, b"\r\n")
        if close:
            lines.append(b"connection: close\r\n")
        return lines

    def _answered(self, close: bool) -> None:
        if close or self._connection.connections.draining:
            self._close_after_answer()
        elif not self._body_open:
            self._finish()

    def _must_close(self) -> bool:
        """Whether the answer under way is the last on this connection.

        A body that is still to come is waited for only if it is small and its size is known: reading a large one to
        the end just to keep the connection would cost more than a new connection.
        """
        request = self._request
        if request is None or request.last or self._connection.connections.draining:
            return True
        if not self._body_pending():
            return False
        size = request.content_length
        return size is None or size > MAX_HEAD_BYTES or b"expect" in request.headers

    def _body_pending(self) -> bool:
        """Whether some of the body of the request under way has not come yet."""
        for piece, _ in self._pieces:
            if piece is not _Piece.BODY:
                return self._body_open and piece is not _Piece.END
        return self._body_open

    def _finish(self) -> None:
        """The request under way is answered and read to its end: the next may begin."""
        self._request = None
        self.deadline = self._now() + (self._timeouts.header if self._fed_bytes else self._timeouts.keepalive)
        self._advance()

    def _close_after_answer(self) -> None:
        pending = self._body_pending()
        self._request = None
        self._pieces.clear()
        self._discarding = True
        if pending:
            # Closing while data is on its way makes the kernel send a reset, which can overtake the answer. So what
            # comes is read and dropped for a while (RFC 9112, 9.6).
            self.deadline = self._now() + CLOSE_SECONDS
        else:
            self._connection.close()

    def _discard(self, data: bytes) -> None:
        """Drop what comes after the last answer, and close where the body of its request ends."""
        if self.deadline is None:
            return
        self._feed(data)
        if any(piece in (_Piece.END, _Piece.BROKEN) for piece, _ in self._pieces):
            self.deadline = None
            self._connection.close()
        self._pieces.clear()

    def _refuse(self, status: int) -> None:
        """Answer what could not be read as a request, and close."""
        headers, body = self._connection.listener.refuse(status)
        self._body_open = False
        self.send(status, headers, body, len(body))

    def _now(self) -> float:
        return self._connection.connections.now()


def _one_host(host: bytes | None, version: str) -> bool:
    """Whether there is the one Host header that HTTP/1.1 demands (RFC 9112, 3.2); repeated ones come joined."""
    return b"," not in host if host is not None else version == "1.0"
