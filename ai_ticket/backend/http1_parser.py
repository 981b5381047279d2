"""What llhttp (by httptools) finds in the bytes of an HTTP/1.1 answer: its head, its body, its end, within bounds."""

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpResponseParser

MAX_HEAD_BYTES = 32_768
MAX_HEAD_FIELDS = 100
LONGEST_MEDIA_TYPE = 128

_NOT_HTTP = "the answer is not HTTP/1.1"


class ResponseParser:
    """Reads one answer. Answers that announce it (1xx) are skipped, trailers dropped.

    `status` is 0 until the head is complete. `framed` says that the answer tells its own end; otherwise it ends with
    its connection. `complete`: that end has come. `reusable`: the connection may take another request then. `problem`:
    why what follows can't be read, where it can't.
    """

    def __init__(self) -> None:
        self.status = 0
        self.media_type = ""
        self.framed = False
        self.complete = False
        self.reusable = False
        self.problem: str | None = None
        self._llhttp: HttpResponseParser | None = HttpResponseParser(self)
        self._body: list[bytes] = []
        self._head_bytes = 0
        self._fields = 0
        self._barren_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """Take in what has come; the result is what there is of the body in it."""
        if self._llhttp is None:
            return b""
        try:
            self._llhttp.feed_data(data)
        except HttpParserUpgrade:
            self.problem = self.problem or "the answer switches to another protocol"
        except HttpParserCallbackError:
            if not self.complete:
                raise
        except HttpParserError:
            if not self.complete:  # what comes behind the end is none of ours
                self.problem = self.problem or _NOT_HTTP
        if self._body:
            self._barren_bytes = 0
            found = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body.clear()
        else:
            found = b""
            self._count_barren(len(data))
        if self.complete or self.problem is not None:
            self.stop()
        return found

    def stop(self) -> None:
        """Read no more."""
        self._llhttp = None  # it holds this object, as this one does it, which the garbage collector would have to find

    def _count_barren(self, size: int) -> None:
        """An endless head, or no end of chunk extensions, trailers or announcements, is given up after a while."""
        self._barren_bytes += size
        if self._barren_bytes > MAX_HEAD_BYTES and not self.complete:
            self.problem = self.problem or (
                "the answer's head is too large" if self.status == 0 else "the answer holds too much that is no body"
            )

    # What llhttp finds, in order.

    def on_message_begin(self) -> None:
        """An answer begins; behind the one that was asked for, llhttp is stopped."""
        if self.complete:
            self.reusable = False
            raise ValueError("an answer that nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; after the head it is a trailer, which nothing here wants."""
        if self.status:
            return
        self._fields += 1
        self._head_bytes += len(name) + len(value) + 4
        name = name.lower()
        if name == b"content-length":
            self.framed = True
        elif name == b"content-type":
            media_type = value.partition(b";")[0].strip().lower()
            self.media_type = self.media_type or media_type[:LONGEST_MEDIA_TYPE].decode("latin-1")
        elif name == b"transfer-encoding":
            self.framed = True
            if value.lower() != b"chunked":
                self.problem = "the answer has a transfer coding that is not known"
        elif name == b"content-encoding" and value.lower() not in (b"", b"identity"):
            self.problem = "the answer is compressed, which was not asked for"

    def on_headers_complete(self) -> None:
        """The head is complete, be it that of an announcement."""
        assert self._llhttp is not None  # noqa: S101 - it is what calls
        status = self._llhttp.get_status_code()
        if self._llhttp.get_http_version() not in ("1.1", "1.0"):
            self.problem = _NOT_HTTP
        elif self._head_bytes > MAX_HEAD_BYTES or self._fields > MAX_HEAD_FIELDS:
            self.problem = "the answer's head is too large"
        elif status < 200:
            self.media_type = ""
            self.framed = False
        elif self.problem is None:
            self.status = status
            self.framed = self.framed or status in (204, 304)

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        if self.status:
            self._body.append(data)

    def on_message_complete(self) -> None:
        """The end of the answer, or of an announcement."""
        if self.status and self._llhttp is not None:
            self.complete = True
            self.reusable = self._llhttp.should_keep_alive()
