"""HTTP/2 on one connection: h2 keeps the protocol's state, this turns streams into requests and answers into frames."""

from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from hyperframe.frame import GoAwayFrame
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from zope.interface import implementer

from ai_ticket.web.connections import CLOSE_SECONDS, Connection
from ai_ticket.web.http1 import MAX_HEAD_BYTES
from ai_ticket.web.http2_stream import Stream
from ai_ticket.web.request import HeaderList, Request

MAX_CONCURRENT_STREAMS = 100
MAX_PENDING = 65_536
"""Bytes of an answer in pieces that wait for the caller's window before its producer is slowed down."""

RESET_BURST = 200
RESETS_A_SECOND = 33.0
"""Streams that a peer may reset before it is taken for an attack (CVE-2023-44487): a burst, and a rate after that."""


@implementer(IPushProducer)
class Http2:
    """The HTTP/2 codec of a connection."""

    _log = Logger()

    def __init__(self, connection: Connection):
        self._connection = connection
        self._transport = connection.transport
        self._timeouts = connection.connections.timeouts
        self._streams: dict[int, Stream] = {}
        self._last_stream_id = 0
        self._blocked = False
        self._closing = False
        self._resets = float(RESET_BURST)
        self._resets_at = self._now()
        self.deadline: float | None = self._now() + self._timeouts.header

        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self._h2 = h2.connection.H2Connection(config)
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: MAX_CONCURRENT_STREAMS,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD_BYTES,
            },
        )
        self._transport.registerProducer(self, True)  # type: ignore[attr-defined]
        self._h2.initiate_connection()
        self._write()

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return not self._streams

    # What the connection tells the codec.

    def received(self, data: bytes) -> None:
        """Parse, then act on what was found."""
        if self._closing:
            return
        try:
            events = self._h2.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            # Its text is not logged: h2 quotes header values, a token's among them.
            self._log.info("HTTP/2 protocol error: {error}", error=type(error).__name__, peer=self._connection.peer)
            self._end_connection()
            return
        for event in events:
            if self._closing:
                return
            self._handle(event)
        self._write()

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                self._begin(event)
            case h2.events.DataReceived():
                self._body_received(event)
            case h2.events.StreamEnded():
                self._body_ended(event.stream_id)
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
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.request.connection_lost()

    def check_deadlines(self, now: float) -> None:
        """End streams whose body comes, or whose answer is read, too slowly; and a connection idle for too long."""
        for stream in list(self._streams.values()):
            if stream.deadline is not None and now >= stream.deadline:
                self.cut(stream)
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self._go_away()
            self._close()

    def drain(self) -> None:
        """Announce that no new streams are taken; streams under way go on to their end."""
        if not self._closing:
            self._go_away()
            if self.idle:
                self._close()

    # Requests.

    def _begin(self, event: h2.events.RequestReceived) -> None:
        stream_id = event.stream_id
        self._last_stream_id = max(self._last_stream_id, stream_id)
        stream = Stream(self, stream_id, self._now() + self._timeouts.body)
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
            peer=self._connection.peer,
            secure=self._connection.secure,
            arrived=self._now(),
        )
        self._streams[stream_id] = stream
        self.deadline = None
        self._connection.listener.received(stream.request)

    def _body_received(self, event: h2.events.DataReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is not None and not stream.answered:
            stream.request.body_received(event.data)
        if event.flow_controlled_length:
            # Also where it is not wanted: some callers see the answer only once they have sent all (httpx, for one).
            self._let_more_in(event.flow_controlled_length, event.stream_id if stream is not None else None)

    def _let_more_in(self, size: int, stream_id: int | None) -> None:
        """Open the connection's window again, and the stream's unless it is over."""
        with suppress(h2.exceptions.ProtocolError):
            if stream_id is not None:
                self._h2.acknowledge_received_data(size, stream_id)
            else:
                self._h2.increment_flow_control_window(size)

    def _body_ended(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.body_open = False
        if stream.answered:
            self._forget(stream)
        elif not stream.request.responded:
            stream.deadline = None
            stream.request.body_ended()

    def _reset_by_peer(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._forget(stream)
            stream.request.connection_lost()
        now = self._now()
        self._resets = min(RESET_BURST, self._resets + max(0.0, now - self._resets_at) * RESETS_A_SECOND) - 1
        self._resets_at = now
        if self._resets < 0:
            self._log.info("too many stream resets", peer=self._connection.peer)
            self._h2.close_connection(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
            self._end_connection()

    def cut(self, stream: Stream) -> None:
        """Reset a stream, whatever it waits for."""
        self._forget(stream)
        stream.request.connection_lost()
        # Where there was an answer, the rest of the body is not wanted, and this is no error (RFC 9113, 8.1).
        code = h2.errors.ErrorCodes.NO_ERROR if stream.answered else h2.errors.ErrorCodes.CANCEL
        try:
            self._h2.reset_stream(stream.id, code)
        except h2.exceptions.ProtocolError:
            self._log.debug("a stream to reset was closed already")
        self._write()

    # Answers.

    def send_continue(self, stream: Stream) -> None:
        """Tell the stream's caller to send the body."""
        # h2 has read the whole packet already: the stream, or the connection, may have ended further on in it.
        with suppress(h2.exceptions.ProtocolError):
            self._h2.send_headers(stream.id, [(b":status", b"100")])
        self._write()

    def send(self, stream: Stream, status: int, headers: HeaderList, body: bytes, content_length: int) -> None:
        """Send the answer on a stream."""
        stream.pending += body
        stream.complete = True
        headers = [*headers, (b"content-length", b"%d" % content_length)]
        if self._send_head(stream, status, headers, end_stream=not body):
            if body:
                self.flush(stream)
            else:
                self._answered(stream)
        self._write()

    def start(self, stream: Stream, status: int, headers: HeaderList) -> None:
        """Begin an answer in pieces on a stream."""
        self._send_head(stream, status, headers, end_stream=False)
        self._write()

    def _send_head(self, stream: Stream, status: int, headers: HeaderList, *, end_stream: bool) -> bool:
        head = [(b":status", b"%d" % status), (b"date", self._connection.connections.date())]
        head += [header for header in headers if header[0] != b"connection"]
        try:
            self._h2.send_headers(stream.id, head, end_stream=end_stream)
        except h2.exceptions.ProtocolError:
            self._forget(stream)
            return False
        return True

    def _flush_all(self) -> None:
        for stream in list(self._streams.values()):
            if stream.pending or stream.complete:
                self.flush(stream)

    def flush(self, stream: Stream) -> None:
        """Send what flow control and the transport allow of a stream's answer; slow its producer down if need be."""
        if stream.id not in self._streams or stream.answered:
            return
        try:
            self._flush(stream)
        except h2.exceptions.ProtocolError:
            self._log.debug("an answer's stream has ended further on in the packet")

    def _flush(self, stream: Stream) -> None:
        sent = False
        while not self._blocked and not stream.answered and (stream.pending or stream.complete):
            window = min(self._h2.local_flow_control_window(stream.id), self._h2.max_outbound_frame_size)
            data = bytes(stream.pending[: max(0, window)])
            if stream.pending and not data:
                break
            last = stream.complete and len(data) == len(stream.pending)
            self._h2.send_data(stream.id, data, end_stream=last)
            del stream.pending[: len(data)]
            sent = True
            self._write()
            if last:
                self._answered(stream)
        if not stream.answered:
            # While something waits to be taken, the caller must take some of it now and then.
            if not stream.pending:
                stream.deadline = None
            elif sent or stream.deadline is None:
                stream.deadline = self._now() + self._timeouts.keepalive
            self._slow_down(stream)

    def _slow_down(self, stream: Stream) -> None:
        lags = len(stream.pending) > MAX_PENDING
        if stream.producer is not None and lags != stream.paused:
            stream.paused = lags
            if lags:
                stream.producer.pauseProducing()
            else:
                stream.producer.resumeProducing()

    def _answered(self, stream: Stream) -> None:
        """All of the answer is sent. A caller who is still sending gets a while to notice before the stream is reset:

        a reset that comes with the answer makes curl 7 drop the answer.
        """
        stream.answered = True
        if stream.body_open:
            # A caller who notices ends the body early. To h2 that is less than was announced, and a fault of the whole
            # connection; it has no public way to say that nobody counts any more.
            kept = self._h2.streams.get(stream.id)
            if kept is not None:
                kept._expected_content_length = None
            stream.deadline = self._now() + CLOSE_SECONDS
        else:
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.id, None)
        if not self._streams:
            self.deadline = self._now() + self._timeouts.keepalive
            if self._connection.connections.draining and not self._closing:
                self._write()
                self._close()

    # The connection.

    def _go_away(self) -> None:
        # h2's own close_connection would forbid answering the streams that are still open.
        frame = GoAwayFrame(stream_id=0, last_stream_id=self._last_stream_id, error_code=0)
        self._transport.write(frame.serialize())

    def _end_connection(self) -> None:
        """Send what h2 has to say about it, and close; requests under way end as lost."""
        self._write()
        self.lost()
        self._close()

    def _close(self) -> None:
        self._closing = True
        # TLS says good-bye only when no producer is registered.
        self._transport.unregisterProducer()  # type: ignore[attr-defined]
        self._connection.close()

    def _write(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._transport.write(data)

    # The transport's flow control.

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        self._blocked = True

    def resumeProducing(self) -> None:
        """The transport's buffer has room again."""
        self._blocked = False
        self._flush_all()

    def stopProducing(self) -> None:
        """The transport takes no more."""
        self._blocked = True

    def _now(self) -> float:
        return self._connection.connections.now()
