"""What the fake can be told to do with a request: how fast, what text, and what goes wrong."""

from enum import Enum, auto

import msgspec
from msgspec import Struct

from ai_ticket.backend.fake import wire

JSON = "application/json"
HTML = "text/html"


class Fault(Enum):
    """What breaks in the middle of an answer."""

    EOF = auto()
    """An orderly end of the connection without a terminal event, as when the server is killed."""
    RESET = auto()
    SILENCE = auto()
    """Nothing more, with the connection open. The slot stays taken until the caller leaves or aborts."""


class Reply(Struct, frozen=True):
    """An answer that has nothing to do with the question.

    A body of None is the end of the connection without a byte; a stream is only begun.
    """

    status: int = 200
    body: bytes | None = b""
    content_type: str = JSON
    stream: bool = False


class Script(Struct, frozen=True, kw_only=True):
    """What to do with a request. Everything that is not said is as KoboldCPP does it.

    @ivar before_headers: seconds of silence before the first byte, with the slot taken where it is a generation.
    @ivar first_token: seconds until the model has its first token.
    @ivar tokens_per_second: after it; infinity for all at once. None: what the server is set to.
    @ivar tokens_per_event: the most tokens in one event of a stream. None: all that there are by then.
    @ivar text: what the model says. None: what the server is set to, or the prompt if that is to be echoed.
    @ivar pieces: the same, already in tokens, which may be of any size.
    @ivar tokens: how many tokens the model has to say, the text being repeated; the request's own limits still hold.
    @ivar finish_reason: instead of the right one.
    @ivar fault: what goes wrong once there are `after_tokens` of the answer. An answer in one piece has no first byte
        then.
    @ivar length_error: is added to the Content-Length of an answer in one piece.
    @ivar reply: is the whole answer, at once, whatever was asked and whether or not a slot is free.
    """

    before_headers: float = 0.0
    first_token: float = 0.0
    tokens_per_second: float | None = None
    tokens_per_event: int | None = None
    text: str | None = None
    pieces: list[str] | None = None
    tokens: int | None = None
    finish_reason: str | None = None
    fault: Fault | None = None
    after_tokens: int = 0
    length_error: int = 0
    reply: Reply | None = None


def _llamacpp(status: int, kind: str, message: str) -> Script:
    body = msgspec.json.encode({"error": {"message": message, "type": kind, "code": status}})
    return Script(reply=Reply(status, body, "application/json; charset=utf-8"))


BUSY = Script(reply=Reply(503, wire.BUSY))
RATE_LIMITED = Script(reply=Reply(503, wire.RATE_LIMITED))
LOADING = _llamacpp(503, "unavailable_error", "Loading model")
"""As llama.cpp says it: KoboldCPP refuses connections while it loads."""
SERVER_ERROR = Script(reply=Reply(500, wire.detail("Something went wrong.", "server_error")))
UNAUTHORIZED = Script(reply=Reply(401, wire.UNAUTHORIZED))
NOT_FOUND = Script(reply=Reply(404, b"", HTML))
WEB_PAGE = Script(reply=Reply(200, b"<!DOCTYPE html>\n<title>Sign in</title>\n", HTML))
"""As a proxy in between says it."""
NULL = Script(reply=Reply(200, b"null"))
EMPTY = Script(reply=Reply(body=None))
SILENT_STREAM = Script(reply=Reply(stream=True))
"""The head of a stream, and then nothing for ever."""
FAILED = Script(tokens=0, finish_reason="error")
