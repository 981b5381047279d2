"""HTTP/2 on one connection: h2 keeps the protocol's state, this turns streams into requests and answers into frames.

h2 gets one frame at a time (`http2_frames`), and not the fields of a head (`http2_state`): see there why.
"""

from contextlib import suppress

import h2.events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from ai_ticket.web.connection import Connection
from ai_ticket.web.heads import are_trailers, http2_head
from ai_ticket.web.http2_frames import Allowance, ConnectionFault, Frame, Frames
from ai_ticket.web.http2_state import MAX_CONCURRENT_STREAMS, ServerConnection
from ai_ticket.web.http2_stream import Stream
from ai_ticket.web.request import Request

MAX_OWED = 65_536
"""Bytes of replies to the peer's frames that may wait for a peer who takes nothing, before no more frames are read."""

GOAWAY_SECONDS = 0.1
"""How long callers have for their last answers, while we drain, until a GOAWAY closes the connection.

Some clients (httpx) give up all of their streams when it comes, even those whose answers they have not looked at yet.
"""

MAX_WAITING = 1_048_576
"""Bytes of answers that may wait to be taken, before further requests are refused (the caller may send them again)."""

RESET_BURST, RESETS_A_SECOND = 200.0, 33.0
"""Streams that may come to nothing, reset by the peer or malformed, before that is an attack (CVE-2023-44487)."""

IDLE_BURST, IDLE_A_SECOND = 1000.0, 50.0
"""Frames that bring no request on: PING, SETTINGS, WINDOW_UPDATE and the like (CVE-2019-9511 to 9518)."""

IDLE_A_REQUEST = 10
"""How many more of them come with a request; more still come with its answer (see `Stream`)."""

FRAME_MICROSECONDS = 25

FLUSH_MICROSECONDS = 60
"""What it costs to look at a stream's window and to send what it has room for."""

RESIZE_MICROSECONDS = 2
"""What settings cost, beside, for each stream, whose window may be another by them."""


class Http2:
    """The HTTP/2 codec of a connection."""

    _log = Logger()

    def __init__(self, connection: Connection):
        self.connection = connection
        self._now = connection.connections.now
        self._transport = connection.transport
        self._timeouts = connection.connections.timeouts
        self._streams: dict[int, Stream] = {}
        self._frames = Frames()
        self._owed = 0
        self._closing = False
        self._parting = False
        self._leaving: IDelayedCall | None = None
        self._opened = False
        self._resets = Allowance(self._now, RESET_BURST, RESETS_A_SECOND)
        self.idle_frames = Allowance(self._now, IDLE_BURST, IDLE_A_SECOND)
        self.deadline: float | None = self._now() + self._timeouts.header
        self._head_deadline: float | None = None

        self.h2 = ServerConnection()
        self.write()

    @property
    def idle(self) -> bool:
        """Whether no request is under way, and nothing is left to be sent."""
        return not (self._streams or self._frames.behind or self.connection.full)

    @property
    def under_way(self) -> int:
        """How many streams there are."""
        return len(self._streams)

    # What the connection tells the codec.

    def received(self, data: bytes) -> None:
        """Read the frames, and act on each."""
        if not self._closing:
            self._frames.add(data)
            if not self.connection.turn_over:
                self.advance()

    def advance(self) -> None:
        """Act on the frames that have come, as far as this turn of the reactor allows.

        Only behind them, what windows have opened for all streams is used: every such frame may be followed by another.
        """
        try:
            while not self._closing and self._owed <= MAX_OWED and self.connection.has_turn():
                frame = self._frames.take()
                if frame is None:
                    break
                self._receive(frame)
        except ConnectionFault as fault:
            self._fail(fault.code)
        if self._closing:
            return
        if self._opened:
            self._flush_all()
        self.write()
        self._watch_head()
        self._part()
        self._regulate()

    def _watch_head(self) -> None:
        if not self._frames.in_head:
            self._head_deadline = None
        elif self._head_deadline is None:
            self._head_deadline = self.connection.reading_time() + self._timeouts.header

    def _regulate(self) -> None:
        if self.connection.turn_over or self._owed > MAX_OWED or self._leaving is not None:
            self.connection.pause_reading()
        else:
            self.connection.resume_reading()

    def _receive(self, frame: Frame) -> None:
        self.connection.spend(FRAME_MICROSECONDS + frame.size // (2 if frame.heads else 200))
        if not (frame.bears or self.idle_frames.spend(1 + frame.size / 64)):
            raise ConnectionFault(ErrorCodes.ENHANCE_YOUR_CALM)
        if frame.ignored:
            return
        if frame.parting:
            self._parting = True
            return
        try:
            events = self.h2.receive_data(frame.with_known_settings())
        except ProtocolError as error:
            # Its text is not logged: h2 quotes what the caller has sent.
            self._log.info("HTTP/2 protocol error: {error}", error=type(error).__name__, peer=self.connection.peer)
            self._end_connection()
            return
        except ConnectionFault:
            raise
        except Exception as error:  # whatever else h2 stumbles over, it can't go on
            self._log.error("HTTP/2 failed: {error}", error=type(error).__name__, peer=self.connection.peer)
            raise ConnectionFault(ErrorCodes.INTERNAL_ERROR)
        for event in events:
            self._handle(event)
        if frame.bears and not events and not self.idle_frames.spend():  # for a stream that is over
            raise ConnectionFault(ErrorCodes.ENHANCE_YOUR_CALM)

    def _fail(self, code: ErrorCodes) -> None:
        """The peer does what it must not: end the connection."""
        self._log.info("HTTP/2 connection ended: {code}", code=code.name, peer=self.connection.peer)
        self.h2.close_connection(code)
        self._end_connection()

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                self._begin(event)
            case h2.events.DataReceived():
                self._body_received(event)
            case h2.events.TrailersReceived():
                self._trailers_received(event)
            case h2.events.StreamEnded():
                stream = self._streams.get(event.stream_id)
                if stream is not None:
                    stream.body_ended()
            case h2.events.StreamReset():
                self._reset_by_peer(event.stream_id)
            case h2.events.WindowUpdated() if event.stream_id:
                stream = self._streams.get(event.stream_id)
                if stream is not None and stream.waits:
                    self._flush(stream)
            case h2.events.WindowUpdated():
                self._opened = True
            case h2.events.RemoteSettingsChanged():
                self._settings_changed(event)
            case h2.events.ConnectionTerminated():
                self._end_connection()

    def _settings_changed(self, event: h2.events.RemoteSettingsChanged) -> None:
        self.connection.spend(RESIZE_MICROSECONDS * len(self._streams))
        windows = event.changed_settings.get(SettingCodes.INITIAL_WINDOW_SIZE)
        if windows is not None and windows.new_value > (windows.original_value or 0):
            self._opened = True

    def lost(self) -> None:
        """The connection is gone, and with it the callers of all requests under way."""
        self._closing = True
        self.deadline = None
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        streams, self._streams = self._streams, {}
        self.h2.dismantle()
        for stream in streams.values():
            stream.end().connection_lost(self.connection.ended)

    def check_deadlines(self, now: float) -> None:
        """End streams whose body comes, or whose answer is read, too slowly; and a connection idle for too long."""
        for stream in list(self._streams.values()):
            reason = stream.late(now)
            if reason is not None:
                self.connection.tell_end("stream", reason)
                self.cut(stream, reason)
        if self._head_deadline is not None and self.connection.reading_time() >= self._head_deadline:
            self._head_deadline = None
            self.connection.end("header_timeout")
        elif self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self.connection.note_end("keepalive_timeout" if self.h2.highest_inbound_stream_id else "header_timeout")
            self._go_away()

    def leave(self) -> None:
        """Close at once if idle; otherwise the last of the streams under way does (see `forget`)."""
        if not self._closing and self.idle and self._leaving is None:
            self._go_away()

    # Requests.

    def _begin(self, event: h2.events.RequestReceived) -> None:
        self.connection.request_begins()
        self.idle_frames.earn(IDLE_A_REQUEST)
        waiting = sum(stream.waiting for stream in self._streams.values())
        if len(self._streams) >= MAX_CONCURRENT_STREAMS or waiting > MAX_WAITING:
            self._reject(event.stream_id, ErrorCodes.REFUSED_STREAM)
            return
        head = http2_head(self.h2.decoder.fields)
        if head is None:
            self._reject(event.stream_id, ErrorCodes.PROTOCOL_ERROR)
            return
        stream = Stream(self, event.stream_id, head)
        if event.stream_ended is not None and stream.request.content_length:
            stream.end()
            self._reject(event.stream_id, ErrorCodes.PROTOCOL_ERROR)
            return
        self._streams[event.stream_id] = stream
        self.deadline = None
        if head.refusal is not None:
            stream.refuse(head.refusal)
        else:
            self.connection.listener.received(stream.request)

    def _reject(self, stream_id: int, code: ErrorCodes) -> None:
        """Reset a stream that the peer should not have begun, or not so."""
        self._log.info("HTTP/2 stream refused: {code}", code=code.name, peer=self.connection.peer)
        with suppress(ProtocolError):
            self.h2.reset_stream(stream_id, code)
        self._count_reset()

    def _trailers_received(self, event: h2.events.TrailersReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is not None and not are_trailers(self.h2.decoder.fields):
            self.spoil(stream)

    def _body_received(self, event: h2.events.DataReceived) -> None:
        stream = self._streams.get(event.stream_id)
        size = event.flow_controlled_length or 0
        if stream is not None:
            stream.body_received(event.data, size)
        elif size:
            with suppress(ProtocolError):
                self.h2.increment_flow_control_window(size)

    def _reset_by_peer(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._lose(stream)
        self._count_reset()

    def _count_reset(self) -> None:
        if not self._resets.spend():
            raise ConnectionFault(ErrorCodes.ENHANCE_YOUR_CALM)

    def _flush_all(self) -> None:
        """Send what may be sent, of another stream first each time, as far as this turn of the reactor allows."""
        self._opened = False
        for stream in list(self._streams.values()):
            if self.connection.full:
                return
            if stream.waits:
                if not self.connection.has_turn():
                    self._opened = True
                    return
                self._streams[stream.id] = self._streams.pop(stream.id)
                self._flush(stream)

    def _flush(self, stream: Stream) -> None:
        self.connection.spend(FLUSH_MICROSECONDS)
        stream.flush()

    def cut(self, stream: Stream, reason: str | None = None) -> None:
        """Reset a stream, whatever it waits for. `reason`: what its caller has not done in time."""
        # Where there was an answer, the rest of the body is not wanted, and this is no error (RFC 9113, 8.1).
        self._end_stream(stream, ErrorCodes.NO_ERROR if stream.answered else ErrorCodes.CANCEL, reason)

    def spoil(self, stream: Stream) -> None:
        """Reset a stream whose request turns out malformed."""
        self._end_stream(stream, ErrorCodes.PROTOCOL_ERROR)
        self._count_reset()

    def _end_stream(self, stream: Stream, code: ErrorCodes, reason: str | None = None) -> None:
        try:
            self.h2.reset_stream(stream.id, code)
        except ProtocolError:
            self._log.debug("a stream to reset was closed already")
        self.write()
        self._lose(stream, reason)

    def _lose(self, stream: Stream, reason: str | None = None) -> None:
        """A stream is over, and the caller of its request gone."""
        request = self.forget(stream)
        if request is not None:
            request.connection_lost(reason)

    def forget(self, stream: Stream) -> Request | None:
        """A stream is over. Its request, unless that was known already."""
        if self._streams.pop(stream.id, None) is None:
            return None
        if not self._streams:
            self.deadline = self._now() + self._timeouts.keepalive
            self._parting = self._parting or self.connection.connections.draining
            self._part()
        return stream.end()

    # The connection.

    def _part(self) -> None:
        """If it is time to: take no more requests, and close in a moment.

        The caller of one that is not taken knows by the GOAWAY.
        """
        done = not (self._streams or self._closing or self._frames.behind)
        if self._parting and done and self._leaving is None:
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
        """The transport holds enough; the streams look for themselves before they send."""
        for stream in self._streams.values():
            stream.hold()

    def speed_up(self) -> None:
        """The transport has room again; the deadlines have not run since it had none."""
        self._owed = 0
        self._flush_all()
        self.advance()
        if self.connection.connections.leaving:
            self.leave()
