"""How answers look on HTTP/1.1."""

from http import HTTPStatus

from twisted.internet.interfaces import IPushProducer, ITransport

from ai_ticket.web.request import NO_CONTENT, HeaderList

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


def _head(status: int, date: bytes, headers: HeaderList, *, last: bool) -> list[bytes]:
    lines = [_STATUS_LINES[status], b"date: ", date, b"\r\n"]
    for name, value in headers:
        if name != b"connection":
            lines += (name, b": ", value, b"\r\n")
    if last:
        lines.append(b"connection: close\r\n")
    return lines


def whole(status: int, date: bytes, headers: HeaderList, body: bytes, content_length: int, *, last: bool) -> bytes:
    """A whole answer. `last`: the connection is closed behind it."""
    lines = _head(status, date, headers, last=last)
    if status != NO_CONTENT:
        lines.append(b"content-length: %d\r\n" % content_length)
    lines += (b"\r\n", body)
    return b"".join(lines)


class Answer:
    """An answer in pieces: chunks, or for HTTP/1.0 all that comes until the connection closes.

    `last`: the connection is closed behind it.
    """

    def __init__(self, transport: ITransport, producer: IPushProducer, *, chunked: bool, last: bool):
        self._transport = transport
        self._chunked = chunked
        self.producer = producer
        self.last = last

    def begin(self, status: int, date: bytes, headers: HeaderList) -> None:
        """Send the head."""
        lines = _head(status, date, headers, last=self.last)
        lines.append(b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        self._transport.write(b"".join(lines))

    def write(self, data: bytes) -> None:
        """Send a piece."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """That was all."""
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")
