"""HTTP/1.1 on one connection: the parser finds requests, this decides when each begins, ends and is answered.

Written on llhttp rather than on twisted.web's channel so that a head can be answered before its body, deadlines hold
for a whole head and body, and one write carries an answer (see ops/decisions/).
"""

from enum import Enum, auto

from twisted.internet.interfaces import IPushProducer

from ai_ticket.web.body import BodyTime
from ai_ticket.web.connection import CLOSE_SECONDS, Connection
from ai_ticket.web.heads import MAX_HEAD_BYTES
from ai_ticket.web.http1_answer import CONTINUE, Answer, whole
from ai_ticket.web.http1_parser import Broken, End, Head, Parser
from ai_ticket.web.request import HeaderList, Request

MAX_UNREAD = 65_536
"""Bytes that may wait behind the request under way before nothing more is taken from the kernel."""

CUT_SECONDS = 1.0
"""How long the rest of a body is dropped whose answer was cut, for what there is of it to arrive."""


class _State(Enum):
    SERVING = auto()
    DISCARDING = auto()
    """The last answer is sent; what still comes of its request's body is dropped."""
    CLOSED = auto()


_SERVING, _DISCARDING, _CLOSED = _State  # to look a member up by its name takes longer than all that is done with it


class Http1:
    """The HTTP/1.1 codec of a connection."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._now = connection.connections.now
        self._transport = connection.transport
        self._timeouts = connection.connections.timeouts
        self._parser = Parser(self._now)
        self._pieces = self._parser.pieces
        self._state = _SERVING
        self._advancing = False
        self._body_paused = False
        self._in_head = True
        self._request: Request | None = None
        self._answer: Answer | None = None
        self.body_time = BodyTime(self._now, self._timeouts.body)
        self.deadline: float | None = self._now() + self._timeouts.header

    @property
    def idle(self) -> bool:
        """Whether no request is under way, and nothing is left to be sent."""
        return self._request is None and not (
            self._pieces or self._parser.head_fed or self._parser.unread or self._connection.full
        )

    # What the connection tells the codec.

    def received(self, data: bytes) -> None:
        """Parse, and act on what is found."""
        if self._state is _CLOSED:
            return
        if self.idle and self._state is _SERVING:
            self._in_head = True
            self.deadline = self._now() + self._timeouts.header
        self._parser.add(data)
        if not self._connection.turn_over:
            self.advance()

    def lost(self) -> None:
        """The connection is gone: so is the caller of the request under way. Those behind it were never begun."""
        self._state = _CLOSED
        self._parser.close()
        self._pieces.clear()
        request, self._request, self._answer = self._request, None, None
        if request is not None:
            request.connection_lost(self._connection.ended)

    def check_deadlines(self, now: float) -> None:
        """Abort a connection whose head, body, or next request has not come in time."""
        if self.body_time.over:
            reason = "body_timeout"
        elif self.deadline is None or now < self.deadline:
            return
        elif self._state is _DISCARDING:
            reason = "close_timeout"
        else:
            reason = "header_timeout" if self._in_head else "keepalive_timeout"
        self.body_time.stop()
        self.deadline = None
        self._connection.end(reason)

    def leave(self) -> None:
        """Close at once if idle; otherwise the answer under way closes (see `send`)."""
        if self.idle and self._state is _SERVING:
            self._close()

    def slow_down(self) -> None:
        """The transport holds enough."""
        if self._answer is not None:
            self._answer.producer.pauseProducing()

    def speed_up(self) -> None:
        """The transport has room again; the deadlines have not run since it had none."""
        if self._answer is not None:
            self._answer.producer.resumeProducing()
        elif self._state is _DISCARDING:
            self.deadline = self._now() + CLOSE_SECONDS
        elif self.idle and self._connection.connections.leaving:
            self._close()
        elif self._request is None:
            self._await_next()
        self.advance()

    # Requests, one at a time.

    def advance(self) -> None:
        """Read and act on what was found, as far as the request under way and this turn of the reactor allow."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._state is not _CLOSED:
                if self._pieces:
                    if not self._act():
                        break
                elif self._parser.unread and self._connection.has_turn():
                    self._connection.spend(self._parser.read_slice())
                else:
                    break
        finally:
            self._advancing = False
        if self._pieces or self._parser.unread or not self._connection.reading:
            self._regulate()

    def _act(self) -> bool:
        """Act on the next piece. Whether that was possible."""
        piece = self._pieces[0]
        if self._state is _DISCARDING:
            self._discard()
        elif isinstance(piece, Head):
            if self._request is not None or self._connection.full or not self._connection.has_turn():
                return False
            self._connection.request_begins()
            self._pieces.popleft()
            self._begin(piece)
        elif isinstance(piece, End):
            self._pieces.popleft()
            self._end_body()
        elif isinstance(piece, bytearray):
            self._pieces.popleft()
            if self._request is not None:
                self._request.body_received(piece)
        elif self._request is None:
            self._refuse(piece)
        elif self._request.body.ended:
            return False
        else:
            self._pieces.popleft()
            self._give_up_body(self._request)
        return True

    def _begin(self, head: Head) -> None:
        self._request = request = Request(
            self,
            method=head.method,
            target=head.target,
            version=head.version,
            headers=head.headers,
            peer=self._connection.peer,
            secure=self._connection.secure,
            arrived=head.arrived,
        )
        request.last = head.last
        self.deadline = None
        self.body_time.renew()
        self._connection.listener.received(request)

    def _end_body(self) -> None:
        request = self._request
        if request is not None:
            request.body_ended()
            if request is self._request and request.responded and not request.streaming:
                self._finish()

    def _give_up_body(self, request: Request) -> None:
        """The body of the request under way can't be read on: it is refused, or its answer cut. It is the last."""
        request.last = True
        if not request.responded:
            request.body_broken()
            return
        self._request = self._answer = None
        request.connection_lost()
        self._close()

    def _refuse(self, broken: Broken) -> None:
        """Answer what could not be read as a request, and close."""
        connection = self._connection
        headers, body = connection.listener.refuse(broken.status, {}, connection.peer, connection.secure)
        self.send(broken.status, headers, body, len(body))

    def _finish(self) -> None:
        """The request under way is answered and read to its end: the next may begin."""
        self._request = None
        self._await_next()
        self.advance()

    def _await_next(self) -> None:
        self._in_head = bool(self._parser.head_fed)
        self.deadline = self._now() + (self._timeouts.header if self._in_head else self._timeouts.keepalive)

    # The request's body.

    def send_continue(self) -> None:
        """Tell the caller to send the body, if it knows that it may be told (RFC 9110, 10.1.1)."""
        if self._request is not None and self._request.version == "1.1":
            self._transport.write(CONTINUE)

    def pause_body(self) -> None:
        """Read no more."""
        self._body_paused = True
        self._regulate()

    def resume_body(self) -> None:
        """Read on."""
        self._body_paused = False
        self._regulate()

    def _regulate(self) -> None:
        """Take more from the kernel or not: no more than what can be acted on, and a little."""
        if self._body_paused or self._connection.turn_over or len(self._parser.unread) > MAX_UNREAD:
            self._connection.pause_reading()
        else:
            self._connection.resume_reading()

    # The answer.

    def send(self, status: int, headers: HeaderList, body: bytes, content_length: int) -> None:
        """Send the answer to the request under way, in one write."""
        last = self._is_last()
        self._transport.write(
            whole(status, self._connection.connections.date(), headers, body, content_length, last=last)
        )
        self._answered(last)

    def start(self, status: int, headers: HeaderList, producer: IPushProducer) -> None:
        """Begin an answer in pieces. Whether the caller stops in the midst of a large body shows only at its end."""
        request = self._request
        last = request is None or request.last or self._connection.connections.draining
        chunked = request is not None and request.version == "1.1"
        self._answer = Answer(self._transport, producer, chunked=chunked, last=last)
        if self._connection.full:
            producer.pauseProducing()
        self._answer.begin(status, self._connection.connections.date(), headers)

    def write(self, data: bytes) -> None:
        """Send a piece of the answer."""
        if self._answer is not None:
            self._answer.write(data)

    def finish(self) -> None:
        """The answer in pieces is complete."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.end()
            # While draining, a connection whose caller was not told stays for the next request, which tells it.
            self._answered(answer.last or self._connection.connections.leaving or self._is_spent())

    def abort(self) -> None:
        """Cut the answer in pieces: what there is of it is sent, and a chunked body without its end shows the cut."""
        self._answer = None
        if self._connection.full:  # who does not read would not take the rest either
            self._state = _CLOSED
            self._request = None
            self._connection.abort()
        else:
            self._close_after_answer(CUT_SECONDS)

    def _answered(self, last: bool) -> None:
        if last:
            self._close_after_answer()
        elif self._request is not None and self._request.body.ended:
            self._finish()
        else:
            self.body_time.run()

    def _is_last(self) -> bool:
        """Whether an answer that begins now is the last on this connection."""
        return self._connection.connections.draining or self._is_spent()

    def _is_spent(self) -> bool:
        """Whether the connection can't take another request.

        A body that is still to come is waited for only if it is small and its size is known: reading a large one to
        the end just to keep the connection would cost more than a new connection.
        """
        request = self._request
        if request is None or request.last:
            return True
        if not self._body_pending():
            return False
        size = request.content_length
        return size is None or size > MAX_HEAD_BYTES or b"expect" in request.headers

    def _body_pending(self) -> bool:
        """Whether some of the body of the request under way has not come yet."""
        if self._request is None or self._request.body.ended or self._request.broken:
            return False
        for piece in self._pieces:
            if not isinstance(piece, bytearray):
                return not isinstance(piece, End)
        return True

    def _close_after_answer(self, seconds: float = CLOSE_SECONDS) -> None:
        pending = self._body_pending()
        self._request = None
        self._pieces.clear()
        if pending:
            # Closing while data is on its way makes the kernel send a reset, which can overtake the answer. So what
            # comes is read and dropped for a while (RFC 9112, 9.6).
            self._state = _DISCARDING
            self.deadline = self._now() + seconds
            self._regulate()
        else:
            self._close()

    def _discard(self) -> None:
        """Drop what comes after the last answer, and close where the body of its request ends."""
        if any(isinstance(piece, (End, Broken)) for piece in self._pieces):
            self._close()
        self._pieces.clear()

    def _close(self) -> None:
        self._state = _CLOSED
        self._pieces.clear()
        self._connection.close()
