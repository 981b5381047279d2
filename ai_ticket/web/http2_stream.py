"""One HTTP/2 stream: a request, what is let in of its body, and what is still to be sent of its answer."""

from contextlib import suppress
from enum import Enum, auto
from typing import Protocol

from h2.exceptions import ProtocolError
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger

from ai_ticket.web.body import BodyTime
from ai_ticket.web.connection import CLOSE_SECONDS, Connection
from ai_ticket.web.heads import Http2Head
from ai_ticket.web.http2_frames import Allowance
from ai_ticket.web.http2_state import ServerConnection
from ai_ticket.web.request import NO_CONTENT, HeaderList, Request

MAX_PENDING = 65_536
"""Bytes of an answer in pieces that wait for the caller's window before its producer is slowed down."""

IDLE_A_PIECE, BYTES_AN_IDLE = 4, 128
"""Frames that only open windows may come in return for a piece of an answer: so many, and one for so many bytes."""


class _Answer(Enum):
    """How far the answer is."""

    UNDER_WAY = auto()
    """It was not begun, or more of it may come."""
    GIVEN = auto()
    """All of it is here; some waits to be sent."""
    SENT = auto()


_UNDER_WAY, _GIVEN, _SENT = _Answer  # looked up once: that takes a while


class Streams(Protocol):
    """The codec of a connection, as its streams see it."""

    connection: Connection
    h2: ServerConnection
    idle_frames: Allowance

    @property
    def under_way(self) -> int:
        """How many streams there are."""

    def write(self) -> None:
        """Hand what h2 has to send to the transport."""

    def cut(self, stream: "Stream") -> None:
        """Reset a stream."""

    def spoil(self, stream: "Stream") -> None:
        """Reset a stream whose request turns out malformed."""

    def forget(self, stream: "Stream") -> Request | None:
        """A stream is over. Its request, unless that was known already."""


class Stream:
    """One stream, as its request and its connection see it."""

    _log = Logger()

    def __init__(self, codec: Streams, stream_id: int, head: Http2Head):
        self._codec = codec
        self._h2 = codec.h2
        self._connection = codec.connection
        self._now = codec.connection.connections.now
        self._timeouts = codec.connection.connections.timeouts
        self.id = stream_id
        self.body_time = BodyTime(codec.connection.reading_time, self._timeouts.body)
        self.request = Request(
            self,
            method=head.method,
            target=head.target,
            version="2",
            headers=head.headers,
            peer=self._connection.peer,
            secure=self._connection.secure,
            arrived=self._now(),
        )
        self._body_bytes = 0
        self._body_paused = False
        self._withheld = 0
        self._answer = _UNDER_WAY
        # As it was given, and how much of it is sent: an answer that many ask for is one, however many wait for it.
        self._pending = b""
        self._taken = 0
        self._taking: BodyTime | None = None
        self._producer: IPushProducer | None = None
        self._lags = False
        # By when a caller who has the answer must have noticed that the body is not wanted.
        self._deadline: float | None = None

    @property
    def answered(self) -> bool:
        """Whether all of the answer is sent."""
        return self._answer is _SENT

    @property
    def waits(self) -> bool:
        """Whether something of the answer waits to be sent."""
        return self._taken < len(self._pending) or self._answer is _GIVEN

    @property
    def waiting(self) -> int:
        """Bytes of the answer that wait to be sent."""
        return len(self._pending) - self._taken

    def end(self) -> Request:
        """It is over. Its request, which it knows no longer: each knowing the other, both would be garbage to be

        searched for.
        """
        request = self.request
        del self.request
        self._answer = _SENT
        self._pending, self._taken = b"", 0
        self._taking = None
        self._producer = None
        self._withheld = 0
        return request

    def late(self, now: float) -> str | None:
        """What the caller takes too long over, if anything (see `Recorder.connection_ended`)."""
        if self.body_time.over:
            return "body_timeout"
        if self._taking is not None and self._taking.over:
            return "unread"
        return "close_timeout" if self._deadline is not None and now >= self._deadline else None

    # The request's body.

    def body_received(self, data: bytes, size: int) -> None:
        """Some of the body has come, which flow control counts as `size` bytes."""
        self._body_bytes += len(data)
        if self._fits(ended=False):
            self.request.body_received(data)
        else:
            self._codec.spoil(self)
        if self._body_paused and size:
            # The other streams go on.
            self._withheld += size
            with suppress(ProtocolError):
                self._h2.increment_flow_control_window(size)
        elif size:
            # Also where it is not wanted: some callers see the answer only once they have sent all (httpx, for one).
            with suppress(ProtocolError):
                self._h2.acknowledge_received_data(size, self.id)

    def body_ended(self) -> None:
        """All of the body has come."""
        if not self._fits(ended=True):
            self._codec.spoil(self)
            return
        self.request.body_ended()
        if self.answered:
            self._codec.forget(self)

    def _fits(self, *, ended: bool) -> bool:
        """Whether the body is as long as was announced. A caller who has its answer may stop short."""
        announced = self.request.content_length
        if announced is None or (self.request.responded and not self.request.streaming):
            return True
        return self._body_bytes == announced if ended else self._body_bytes <= announced

    def send_continue(self) -> None:
        """Tell the caller to send the body."""
        # h2 has read the whole packet already: the stream, or the connection, may have ended further on in it.
        with suppress(ProtocolError):
            self._h2.send_headers(self.id, [(b":status", b"100")])
        self._codec.write()

    def pause_body(self) -> None:
        """Do not open the stream's window again."""
        self._body_paused = True

    def resume_body(self) -> None:
        """Open the stream's window again."""
        self._body_paused = False
        withheld, self._withheld = self._withheld, 0
        if withheld and not self.request.body.ended:
            with suppress(ProtocolError, KeyError):  # the stream may have ended further on in the packet
                self._h2.increment_flow_control_window(withheld, self.id)
            self._codec.write()

    # The answer.

    def send(self, status: int, headers: HeaderList, body: bytes, content_length: int) -> None:
        """Send the answer, as far as flow control allows now."""
        if status != NO_CONTENT:
            headers = [*headers, (b"content-length", b"%d" % content_length)]
        self._pending = body
        self._answer = _GIVEN
        if self._send_head(status, headers, end_stream=not body):
            if body:
                self.flush()
            else:
                self._sent()
        self._codec.write()

    def refuse(self, status: int) -> None:
        """Answer a request that is not to be looked at."""
        request = self.request
        headers, body = self._connection.listener.refuse(
            status, request.headers, request.peer, request.secure, request.method
        )
        request.responded = True
        request.body.drop()
        self.send(status, headers, body, len(body))

    def start(self, status: int, headers: HeaderList, producer: IPushProducer) -> None:
        """Begin an answer in pieces."""
        self._producer = producer
        self._send_head(status, headers, end_stream=False)
        self._codec.write()

    def write(self, data: bytes) -> None:
        """Send a piece of the answer, as far as flow control allows now."""
        self._codec.idle_frames.earn(IDLE_A_PIECE)
        self._pending = self._pending[self._taken :] + data
        self._taken = 0
        self.flush()

    def finish(self) -> None:
        """The answer in pieces is complete."""
        self._answer = _GIVEN
        self.flush()

    def abort(self) -> None:
        """Cut the answer in pieces: the caller gets a reset."""
        self._codec.cut(self)

    def _send_head(self, status: int, headers: HeaderList, *, end_stream: bool) -> bool:
        head = [(b":status", b"%d" % status), (b"date", self._connection.connections.date())]
        head += [header for header in headers if header[0] != b"connection"]
        try:
            self._h2.send_headers(self.id, head, end_stream=end_stream)
        except ProtocolError:
            # It has ended further on in the packet, which we are told of next; if not, the sweep ends it.
            self._deadline = self._now()
            return False
        return True

    def flush(self) -> None:
        """Send what flow control and the transport allow; slow the producer down if need be."""
        if self.answered:
            return
        try:
            self._flush()
        except ProtocolError:
            self._log.debug("an answer's stream has ended further on in the packet")

    def _flush(self) -> None:
        before = self._taken
        while not self._connection.full and self.waits:
            window = min(self._h2.local_flow_control_window(self.id), self._h2.max_outbound_frame_size)
            waiting = self.waiting
            data = self._pending[self._taken : self._taken + max(0, window)]
            if waiting and not data:
                break
            last = self._answer is _GIVEN and len(data) == waiting
            self._h2.send_data(self.id, data, end_stream=last)
            self._codec.idle_frames.earn(len(data) / BYTES_AN_IDLE)
            self._taken += len(data)
            self._codec.write()
            if last:
                self._sent()
                return
        self._time_taking(self._taken - before)
        self._slow_down()

    def _time_taking(self, sent: int) -> None:
        """While something waits for the caller's windows, time runs, by a rate that the connection's streams share."""
        if not self.waiting:
            self._pending, self._taken = b"", 0
            self._taking = None
            return
        if self._taking is None:
            self._taking = BodyTime(self._connection.reading_time, self._timeouts.idle)
        else:
            self._taking.extend(sent * self._codec.under_way)
        if self._connection.full:
            self._taking.stop()
        else:
            self._taking.run()

    def hold(self) -> None:
        """It is the transport that holds things up now, for which there is another deadline."""
        if self._taking is not None:
            self._taking.stop()

    def _slow_down(self) -> None:
        lags = self.waiting > MAX_PENDING
        if self._producer is not None and lags != self._lags:
            self._lags = lags
            if lags:
                self._producer.pauseProducing()
            else:
                self._producer.resumeProducing()

    def _sent(self) -> None:
        """All of the answer is sent. A caller who is still sending gets a while to notice before the stream is reset:

        a reset that comes with the answer makes curl 7 drop the answer.
        """
        self._answer = _SENT
        self._pending, self._taken = b"", 0
        self._taking = None
        if self.request.body.ended:
            self._codec.forget(self)
            return
        self._deadline = self._now() + CLOSE_SECONDS
