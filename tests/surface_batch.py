"""A caller of `POST /events` in memory, on either HTTP version: sends the body in pieces while results come."""

import json
from typing import Any

import h2.events
from surface import Surface
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure


class Upload:
    """One request to `/events`."""

    def __init__(self, surface: Surface, *, http2: bool) -> None:
        self.http2 = http2
        self._surface = surface
        if http2:
            self._client = surface.connect2()
        else:
            self._connection, self._transport = surface.connect()
        self._stream_id = 0
        self._taken = 0

    def send(self, body: bytes, *, accept: str = "*/*") -> None:
        """All of it at once."""
        self._start("application/json", accept, "secret", len(body))
        self._send(body)
        self.end(chunked=False)

    def begin(self, *, content_type: str = "application/json", accept: str = "*/*", token: str = "secret") -> None:
        """The head of a body of unknown length."""
        self._start(content_type, accept, token, None)

    def _start(self, content_type: str, accept: str, token: str, size: int | None) -> None:
        headers = [("authorization", f"Bearer {token}"), ("content-type", content_type), ("accept", accept)]
        if size is not None:
            headers.append(("content-length", str(size)))
        if self.http2:
            head = [(":method", "POST"), (":path", "/events"), (":scheme", "https"), (":authority", "localhost")]
            self._stream_id = self._client.h2.get_next_available_stream_id()
            self._client.h2.send_headers(self._stream_id, [*head, *headers])
            self._client.exchange()
            return
        if size is None:
            headers.append(("transfer-encoding", "chunked"))
        lines = ["POST /events HTTP/1.1", "host: localhost", *(f"{name}: {value}" for name, value in headers)]
        self._connection.dataReceived(("\r\n".join(lines) + "\r\n\r\n").encode())

    def more(self, data: bytes) -> None:
        """Some of a body of unknown length."""
        self._send(data if self.http2 else b"%x\r\n%b\r\n" % (len(data), data))

    def _send(self, data: bytes) -> None:
        if not self.http2:
            self._connection.dataReceived(data)
            return
        for start in range(0, len(data), 16_384):
            if not self._over:
                self._client.h2.send_data(self._stream_id, data[start : start + 16_384])
                self._client.exchange()

    @property
    def _over(self) -> bool:
        over = h2.events.StreamEnded | h2.events.StreamReset
        return any(isinstance(event, over) for event in self._client.events)

    def end(self, *, chunked: bool = True) -> None:
        """The end of the body."""
        if self.http2:
            if not self._over:
                self._client.h2.end_stream(self._stream_id)
                self._client.exchange()
        elif chunked:
            self._connection.dataReceived(b"0\r\n\r\n")

    def leave(self) -> None:
        """The caller is gone."""
        if self.http2:
            self._client.h2.reset_stream(self._stream_id)
            self._client.exchange()
        else:
            self._connection.connectionLost(Failure(ConnectionDone()))

    def lag(self) -> None:
        """No longer take results; on HTTP/2 the windows see to that by themselves."""
        if not self.http2:
            producer: Any = self._transport.producer
            producer.pauseProducing()

    def catch_up(self) -> None:
        """Take what has come, and more."""
        if not self.http2:
            producer: Any = self._transport.producer
            if producer is not None:
                producer.resumeProducing()
            return
        self._client.exchange()
        while self._taken < len(self._client.events):
            fresh, self._taken = self._client.events[self._taken :], len(self._client.events)
            for event in fresh:
                if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                    self._client.h2.increment_flow_control_window(event.flow_controlled_length)
                    if not self._over:
                        self._client.h2.increment_flow_control_window(event.flow_controlled_length, self._stream_id)
            self._client.exchange()

    # What has come back.

    @property
    def raw(self) -> bytes:
        """Of HTTP/1.1, all bytes."""
        return self._transport.value()

    def _response(self) -> tuple[int, dict[str, str], bytes]:
        if self.http2:
            self._client.exchange()
            return self._client.response(self._stream_id)
        head, _, rest = self._transport.value().partition(b"\r\n\r\n")
        if not head:
            return 0, {}, b""
        status_line, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if "transfer-encoding" not in headers:
            return int(status_line.split()[1]), headers, rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return int(status_line.split()[1]), headers, body

    @property
    def status(self) -> int:
        return self._response()[0]

    @property
    def headers(self) -> dict[str, str]:
        return self._response()[1]

    @property
    def body(self) -> bytes:
        return self._response()[2]

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def ended(self) -> bool:
        if self.http2:
            self._client.exchange()
            return any(isinstance(event, h2.events.StreamEnded) for event in self._client.events)
        return self._transport.value().endswith(b"\r\n0\r\n\r\n")

    @property
    def cut(self) -> bool:
        if self.http2:
            self._client.exchange()
            return any(isinstance(event, h2.events.StreamReset) for event in self._client.events)
        return self._transport.aborted
