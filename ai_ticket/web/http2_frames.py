"""HTTP/2 frames as they come in, whole ones, one at a time: h2 itself would read all that has come in one go.

And it would first take in a frame of any size, and keep settings and header blocks of any number.
"""

import struct
from collections.abc import Callable

from h2.errors import ErrorCodes
from msgspec import Struct

from ai_ticket.web.heads import MAX_HEAD_BYTES

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME_BYTES = 16_384
MAX_BLOCK_BYTES = 2 * MAX_HEAD_BYTES
"""What is read of a request's head at all, to tell the caller that it is too large; beyond, the connection ends."""

_CONTINUATION_BYTES = 512
"""What each frame of a head that is not the last counts as, beside its size."""

_HEADER = struct.Struct(">BHBBL")
_DATA, _HEADERS, _PRIORITY, _SETTINGS, _GOAWAY, _CONTINUATION = 0, 1, 2, 4, 7, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 0x1, 0x1, 0x4, 0x8
_KNOWN_SETTINGS = frozenset({1, 2, 3, 4, 5, 6, 8})


class ConnectionFault(Exception):
    """What came ends the connection, with a GOAWAY of this code."""

    def __init__(self, code: ErrorCodes):
        self.code = code
        super().__init__(code.name)


class Frame(Struct, frozen=True, gc=False):
    """A frame; `data` is all of it. `in_block`: it has come between the frames of a head."""

    kind: int
    flags: int
    stream_id: int
    data: bytes
    in_block: bool

    @property
    def size(self) -> int:
        """Bytes of its payload."""
        return len(self.data) - 9

    @property
    def heads(self) -> bool:
        """Whether it has a head or a part of one."""
        return self.kind in (_HEADERS, _CONTINUATION)

    @property
    def bears(self) -> bool:
        """Whether it brings a request on: part of a head, of a body, or the end of one."""
        if self.kind == _DATA:
            padding = 1 + self.data[9] if self.flags & _PADDED and self.size else 0
            return self.size > padding or bool(self.flags & _END_STREAM)
        return self.kind == _HEADERS

    @property
    def ignored(self) -> bool:
        """Whether it is of a type that we don't know, or says how to order streams, which is obsolete (5.3)."""
        if self.in_block:
            return False
        return self.kind > _CONTINUATION or (self.kind == _PRIORITY and self.size == 5 and self.stream_id > 0)

    @property
    def parting(self) -> bool:
        """Whether it says that the peer wants no further streams, but those that are open."""
        return self.kind == _GOAWAY and not self.stream_id and self.data[13:17] == bytes(4) and not self.in_block

    def with_known_settings(self) -> bytes:
        """Its bytes without the settings that nobody knows, which h2 would keep."""
        if self.kind != _SETTINGS or self.size % 6 or self.flags & _ACK:
            return self.data
        found = [self.data[at : at + 6] for at in range(9, len(self.data), 6)]
        known = b"".join(setting for setting in found if int.from_bytes(setting[:2]) in _KNOWN_SETTINGS)
        return _HEADER.pack(0, len(known), self.kind, self.flags, self.stream_id) + known


class Frames:
    """Cuts what comes into frames."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._preface = PREFACE
        self._begun = False
        self._block = 0

    def add(self, data: bytes) -> None:
        """Take in what has come."""
        self._unread += data

    @property
    def behind(self) -> bool:
        """Whether there is a whole frame."""
        unread = self._unread
        return len(unread) >= 9 and len(unread) >= 9 + int.from_bytes(unread[:3])

    @property
    def in_head(self) -> bool:
        """Whether the rest is awaited of a head, or of a frame that is no body's."""
        return bool(self._block) or (bool(self._unread) and not (len(self._unread) > 3 and self._unread[3] == _DATA))

    def take(self) -> Frame | None:
        """The next frame, if it is whole.

        @raise ConnectionFault: it is not to be read.
        """
        unread = self._unread
        if self._preface and not self._begin():
            return None
        if len(unread) < 9:
            return None
        high, low, kind, flags, stream_id = _HEADER.unpack_from(unread)
        size = high << 16 | low
        self._check(kind, flags, size)
        if len(unread) < 9 + size:
            return None
        in_block = self._block > 0
        if kind in (_HEADERS, _CONTINUATION):
            self._block = 0 if flags & _END_HEADERS else self._block + size + _CONTINUATION_BYTES
        frame = Frame(kind, flags, stream_id & 0x7FFFFFFF, bytes(unread[: 9 + size]), in_block)
        del unread[: 9 + size]
        self._begun = True
        return frame

    def _begin(self) -> bool:
        size = min(len(self._unread), len(self._preface))
        if self._unread[:size] != self._preface[:size]:
            raise ConnectionFault(ErrorCodes.PROTOCOL_ERROR)
        del self._unread[:size]
        self._preface = self._preface[size:]
        return not self._preface

    def _check(self, kind: int, flags: int, size: int) -> None:
        if size > MAX_FRAME_BYTES:
            raise ConnectionFault(ErrorCodes.FRAME_SIZE_ERROR)
        if not self._begun and kind != _SETTINGS:
            raise ConnectionFault(ErrorCodes.PROTOCOL_ERROR)
        if kind == _SETTINGS and flags & _ACK and size:
            raise ConnectionFault(ErrorCodes.FRAME_SIZE_ERROR)
        if kind in (_HEADERS, _CONTINUATION) and self._block + size > MAX_BLOCK_BYTES:
            raise ConnectionFault(ErrorCodes.ENHANCE_YOUR_CALM)


class Allowance:
    """How much of something a peer may do before it is taken for an attack: a `burst`, and `rate` a second after it."""

    def __init__(self, now: Callable[[], float], burst: float, rate: float):
        self._now = now
        self._burst = self._left = burst
        self._rate = rate
        self._at = now()

    def earn(self, more: float) -> None:
        """So much more is due to what we did ourselves."""
        self._left = min(self._burst, self._left + more)

    def spend(self, cost: float = 1) -> bool:
        """Whether the peer may do this much."""
        now = self._now()
        self.earn((now - self._at) * self._rate)
        self._at = now
        self._left -= cost
        return self._left >= 0
