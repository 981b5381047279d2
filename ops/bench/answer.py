"""An HTTP answer, read as it comes."""


class Answer:
    """The parser of an answer: the head, then a body of known length, in chunks, or up to the end."""

    def __init__(self) -> None:
        self._data = b""
        self._left: int | None = 0
        self.chunked = False
        self._in_body = False
        self.status = 0
        self.closes = False
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """What of the body these bytes bring."""
        if not self._in_body:
            self._data += data
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return b""
            head, data, self._data = self._data[:end].lower(), self._data[end + 4 :], b""
            self._in_body = True
            self.status = int(head[9:12])
            self.closes = b"\r\nconnection: close" in head or head.startswith(b"http/1.0")
            place = head.find(b"\r\ncontent-length:")
            self.chunked = b"\r\ntransfer-encoding: chunked" in head
            self._left = int(head[place + 17 :].split(b"\r\n", 1)[0]) if place >= 0 else None
        if self.chunked:
            return self._chunks(data)
        if self._left is not None:
            self._left -= len(data)
            self.done = self._left <= 0
        return data

    def _chunks(self, data: bytes) -> bytes:
        data = self._data + data if self._data else data
        found, place = [], 0
        while (end := data.find(b"\r\n", place)) >= 0:
            size = int(data[place:end].split(b";", 1)[0], 16)
            if len(data) < end + 4 + size:
                break
            found.append(data[end + 2 : end + 2 + size])
            place = end + 4 + size
            if not size:
                self.done = True
                break
        self._data = data[place:]
        return found[0] if len(found) == 1 else b"".join(found)

    def ended(self) -> None:
        """The connection has ended, and with it a body that has no other end."""
        self.done = self.done or (self._in_body and self._left is None and not self.chunked)
