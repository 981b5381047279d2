"""Server-sent events, decoded from any split into chunks (HTML Living Standard, 9.2.6)."""

LARGEST_EVENT = 1_048_576


class EventTooLarge(ValueError):
    """An event is larger than any that a model server sends."""


class SSEDecoder:
    """Turns the bytes of a stream into the data of its events. Text is not decoded: an event's data is whole bytes."""

    def __init__(self) -> None:
        self._buffer = b""
        self._at_start = True
        self._held = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that these bytes complete; events without data and comments are left out.

        @raise EventTooLarge: more than LARGEST_EVENT bytes have come without an event's end.
        """
        data = self._held + data
        self._held = b""
        if data.endswith(b"\r"):  # it may be the first half of a line's end
            data, self._held = data[:-1], b"\r"
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        self._buffer += data
        if self._at_start and len(self._buffer) >= 3:
            self._buffer = self._buffer.removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        *blocks, self._buffer = self._buffer.split(b"\n\n")
        if len(self._buffer) > LARGEST_EVENT:
            raise EventTooLarge
        return [found for block in blocks if (found := _data(block)) is not None]


def _data(block: bytes) -> bytes | None:
    """The joined `data` fields of an event's lines, or None where it has none."""
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]
    values = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None
