"""One HTTP/2 stream: a request, and what is still to be sent of its answer."""

from typing import Protocol

from twisted.internet.interfaces import IPushProducer

from ai_ticket.web.request import HeaderList, Request


class Answering(Protocol):
    """The connection, as its streams see it."""

    def send(self, stream: "Stream", status: int, headers: HeaderList, body: bytes, content_length: int) -> None:
        """Send a whole answer on a stream."""

    def send_continue(self, stream: "Stream") -> None:
        """Tell the stream's caller to send the body."""

    def start(self, stream: "Stream", status: int, headers: HeaderList) -> None:
        """Begin an answer in pieces on a stream."""

    def flush(self, stream: "Stream") -> None:
        """Send what may be sent of a stream's answer."""

    def cut(self, stream: "Stream") -> None:
        """Reset a stream."""


class Stream:
    """One stream: a request, and what is still to be sent of its answer.

    `deadline` is when the body must be complete, or when the peer must have taken more of the answer. `answered` says
    that all of the answer is sent.
    """

    def __init__(self, codec: Answering, stream_id: int, deadline: float):
        self.codec = codec
        self.id = stream_id
        self.request: Request  # set as soon as it is made: each needs the other
        self.body_open = True
        self.answered = False
        self.deadline: float | None = deadline
        self.pending = bytearray()
        self.complete = False
        self.producer: IPushProducer | None = None
        self.paused = False

    def send(self, status: int, headers: HeaderList, body: bytes, content_length: int) -> None:
        """Send the answer, as far as flow control allows now."""
        self.codec.send(self, status, headers, body, content_length)

    def send_continue(self) -> None:
        """Tell the caller to send the body."""
        self.codec.send_continue(self)

    def start(self, status: int, headers: HeaderList, producer: IPushProducer) -> None:
        """Begin an answer in pieces."""
        self.producer = producer
        self.codec.start(self, status, headers)

    def write(self, data: bytes) -> None:
        """Send a piece of the answer, as far as flow control allows now."""
        self.pending += data
        self.codec.flush(self)

    def finish(self) -> None:
        """The answer in pieces is complete."""
        self.complete = True
        self.codec.flush(self)

    def abort(self) -> None:
        """Cut the answer in pieces: the caller gets a reset."""
        self.codec.cut(self)
