"""HTTP/2 by hand: frames that no client library would send, and what comes back."""

import struct
from collections.abc import Iterator

from hpack import Decoder, Encoder
from surface import Surface

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 0x1, 0x1, 0x4, 0x8, 0x20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

Fields = list[tuple[bytes, bytes]]
GET: Fields = [(b":method", b"GET"), (b":path", b"/health/live"), (b":scheme", b"https"), (b":authority", b"x")]
POST: Fields = [
    (b":method", b"POST"),
    (b":path", b"/event"),
    *GET[2:],
    (b"authorization", b"Bearer secret"),
    (b"content-type", b"application/json"),
]


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """The bytes of a frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def block(fields: Fields) -> bytes:
    """Fields as HPACK has them, without anything that those of other heads depend on."""
    return Encoder().encode([(*field, True) for field in fields])


def head(stream: int, fields: Fields = GET, *, ends: bool = True) -> bytes:
    """The frame of a request's head, whatever is in it."""
    return frame(HEADERS, END_HEADERS | (END_STREAM if ends else 0), stream, block(fields))


def settings(**values: int) -> bytes:
    names = {"header_table_size": 1, "initial_window_size": 4, "max_frame_size": 5}
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", names[name], value) for name, value in values.items()))


def window(increment: int, stream: int = 0) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


class RawClient:
    """The other end of an HTTP/2 connection in memory, that sends bytes as they are."""

    def __init__(self, surface: Surface, *, greets: bool = True) -> None:
        self._clock = surface.clock
        self.connection, self.transport = surface.connect_http2()
        self._decoder = Decoder()
        self.received: list[tuple[int, int, int, bytes]] = []
        if greets:
            self.send(PREFACE + settings())

    def send(self, data: bytes, *, turns: bool = True) -> None:
        """Send this; with `turns`, until there is nothing left to do with it."""
        self.connection.dataReceived(data)
        if turns:
            self._clock.advance(0)
        self.take()

    def take(self) -> None:
        """Take what has come."""
        self.received += _split(self.transport.value())
        self.transport.clear()

    def statuses(self) -> dict[int, int]:
        """The statuses of the answers, by stream. Once: a head is to be read in its place."""
        found = {}
        for kind, _, stream, payload in self.received:
            if kind == HEADERS:
                found[stream] = int(dict(self._decoder.decode(payload, raw=True))[b":status"])
        return found

    def resets(self) -> list[tuple[int, int]]:
        """The streams that were reset, each with its code."""
        return [(stream, _number(payload)) for kind, _, stream, payload in self.received if kind == RST_STREAM]

    @property
    def goaway(self) -> int | None:
        """The code with which the connection was ended."""
        codes = [_number(payload[4:8]) for kind, _, _, payload in self.received if kind == GOAWAY]
        assert self.transport.disconnecting == bool(codes)
        return codes[0] if codes else None

    def data(self, stream: int) -> bytes:
        """What has come of an answer."""
        return b"".join(payload for kind, _, found, payload in self.received if kind == DATA and found == stream)


def _split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    while data:
        size = int.from_bytes(data[:3])
        yield data[3], data[4], _number(data[5:9]), data[9 : 9 + size]
        data = data[9 + size :]


def _number(data: bytes) -> int:
    return int.from_bytes(data[:4])
