"""HTTP/2 on one connection: h2 keeps the protocol's state, this turns streams into requests and answers into frames."""

from collections import deque
from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from ai_ticket.web.connections import Connection
from ai_ticket.web.http1_parser import MAX_HEAD_BYTES
from ai_ticket.web.http2_stream import Stream
from ai_ticket.web.request import Request

MAX_CONCURRENT_STREAMS = 100

MAX_OWED = 65_536
"""Bytes of replies to the peer's frames that may wait for a peer who takes nothing, before no more frames are read."""

GOAWAY_SECONDS = 0.1
"""How long callers have for their last answers, while we drain, until a GOAWAY closes the connection.

Some clients (httpx) give up all of their streams when it comes, even those whose answers they have not looked at yet.
"""

RESET_BURST = 200
RESETS_A_SECOND = 33.0
"""Streams that a peer may reset before it is taken for an attack (CVE-2023-44487): a burst, and a rate after that."""


class Http2:
    """The HTTP/2 codec of a connection."""

    _log = Logger()

    def __init__(self, connection: Connection):
        self.connection = connection
        self._now = connection.connections.now
        self._transport = connection.transport
        self._timeouts = connection.connections.timeouts
        self._streams: dict[int, Stream] = {}
        self._events: deque[h2.events.Event] = deque()
        self._owed = 0
        self._closing = False
        self._leaving: IDelayedCall | None = None
        self._resets = float(RESET_BURST)
        self._resets_at = self._now()
        self.deadline: float | None = self._now() + self._timeouts.header

        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self.h2 = h2.connection.H2Connection(config)
        self.h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: MAX_CONCURRENT_STREAMS,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD_BYTES,
            },
        )
        self.h2.initiate_connection()
        self.write()

    @property
    def idle(self) -> bool:
        """Whether no request is under way, and nothing is left to be sent."""
        return not (self._streams or self._events or self.connection.full)

    # What the connection tells the codec.

    def received(self, data: bytes) -> None:
        """Parse, then act on what was found."""
        if self._closing:
            return
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            # Its text is not logged: h2 quotes header values, a token's among them.
            self._log.info("HTTP/2 protocol error: {error}", error=type(error).__name__, peer=self.connection.peer)
            self._end_connection()
            return
        self._events.extend(events)
        self.advance()

    def advance(self) -> None:
        """Act on what was found, as far as requests may begin; until that is done no more is read."""
        while self._events and not self._closing:
            if isinstance(self._events[0], h2.events.RequestReceived) and not self.connection.may_begin():
                break
            self._handle(self._events.popleft())
        self.write()
        self._regulate()

    def _regulate(self) -> None:
        if self._events or self._owed > MAX_OWED or self._leaving is not None:
            self.connection.pause_reading()
        else:
            self.connection.resume_reading()

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                self._begin(event)
            case h2.events.DataReceived():
                self._body_received(event)
            case h2.events.StreamEnded():
                stream = self._streams.get(event.stream_id)
                if stream is not None:
                    stream.body_ended()
            case h2.events.StreamReset():
                self._reset_by_peer(event.stream_id)
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                self._flush_all()
            case h2.events.ConnectionTerminated():
                self._end_connection()

    def lost(self) -> None:
        """The connection is gone, and with it the callers of all requests under way."""
        self._closing = True
        self.deadline = None
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        self._events.clear()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.request.connection_lost()

    def check_deadlines(self, now: float) -> None:
        """End streams whose body comes, or whose answer is read, too slowly; and a connection idle for too long."""
        for stream in list(self._streams.values()):
            if stream.late(now):
                self.cut(stream)
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self._go_away()

    def leave(self) -> None:
        """Close at once if idle; otherwise the last of the streams under way does (see `forget`)."""
        if not self._closing and self.idle and self._leaving is None:
            self._go_away()

    # Requests.

    def _begin(self, event: h2.events.RequestReceived) -> None:
        stream_id = event.stream_id
        stream = Stream(self, stream_id)
        headers: dict[bytes, bytes] = {}
        for name, value in event.headers:
            known = headers.get(name)
            headers[name] = value if known is None else known + b", " + value
        stream.request = Request(
            stream,
            method=headers.pop(b":method", b"").decode("latin-1"),
            target=headers.pop(b":path", b""),
            version="2",
            headers=headers,
            peer=self.connection.peer,
            secure=self.connection.secure,
            arrived=self._now(),
        )
        self._streams[stream_id] = stream
        self.deadline = None
        self.connection.listener.received(stream.request)

    def _body_received(self, event: h2.events.DataReceived) -> None:
        stream = self._streams.get(event.stream_id)
        size = event.flow_controlled_length or 0
        if stream is not None:
            stream.body_received(event.data, size)
        elif size:
            with suppress(h2.exceptions.ProtocolError):
                self.h2.increment_flow_control_window(size)

    def _reset_by_peer(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            self.forget(stream)
            stream.request.connection_lost()
        now = self._now()
        self._resets = min(RESET_BURST, self._resets + max(0.0, now - self._resets_at) * RESETS_A_SECOND) - 1
        self._resets_at = now
        if self._resets < 0:
            self._log.info("too many stream resets", peer=self.connection.peer)
            self.h2.close_connection(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
            self._end_connection()

    def _flush_all(self) -> None:
        """Send what may be sent, of another stream first each time."""
        for stream in list(self._streams.values()):
            if self.connection.full:
                return
            if stream.waits:
                self._streams[stream.id] = self._streams.pop(stream.id)
                stream.flush()

    def cut(self, stream: Stream) -> None:
        """Reset a stream, whatever it waits for."""
        # Where there was an answer, the rest of the body is not wanted, and this is no error (RFC 9113, 8.1).
        code = h2.errors.ErrorCodes.NO_ERROR if stream.answered else h2.errors.ErrorCodes.CANCEL
        try:
            self.h2.reset_stream(stream.id, code)
        except h2.exceptions.ProtocolError:
            self._log.debug("a stream to reset was closed already")
        self.write()
        self.forget(stream)
        stream.request.connection_lost()

    def forget(self, stream: Stream) -> None:
        """A stream is over."""
        self._streams.pop(stream.id, None)
        if not self._streams:
            self.deadline = self._now() + self._timeouts.keepalive
            if self.connection.connections.draining and not self._closing and not self._requests_wait():
                self._take_leave()

    def _requests_wait(self) -> bool:
        return any(isinstance(event, h2.events.RequestReceived) for event in self._events)

    # The connection.

    def _take_leave(self) -> None:
        """Take no more requests, and close in a moment. The caller of one that is not taken knows by the GOAWAY."""
        if self._leaving is None:
            self._leaving = self.connection.connections.later(GOAWAY_SECONDS, self._go_away)
            self.deadline = None
            self.connection.pause_reading()

    def _go_away(self) -> None:
        """Close with a GOAWAY: the caller of a request that crosses it knows that it was not taken."""
        self._leaving = None
        self.h2.close_connection()
        self.write()
        self._close()

    def _end_connection(self) -> None:
        """Send what h2 has to say about it, and close; requests under way end as lost."""
        self.write()
        self.lost()
        self._close()

    def _close(self) -> None:
        self._closing = True
        self.connection.close()

    def write(self) -> None:
        """Hand what h2 has to send to the transport."""
        data = self.h2.data_to_send()
        if data:
            if self.connection.full:
                self._owed += len(data)
            self._transport.write(data)

    # The transport's flow control.

    def slow_down(self) -> None:
        """The transport holds enough; the streams look for themselves."""

    def speed_up(self) -> None:
        """The transport has room again; the deadlines have not run since it had none."""
        self._owed = 0
        for stream in self._streams.values():
            stream.be_patient()
        self._flush_all()
        self._regulate()
        if self.connection.connections.leaving:
            self.leave()
