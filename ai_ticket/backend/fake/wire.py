"""What KoboldCPP 1.115 puts on the wire, to the byte: heads, errors, answers and events. Pure."""

import html
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from wsgiref.handlers import format_date_time

from msgspec import Struct

_CROSS_ORIGIN = (
    "access-control-allow-origin: *\r\n"
    "access-control-allow-methods: *\r\n"
    "access-control-allow-headers: *, Accept, Content-Type, Content-Length, Cache-Control, Accept-Encoding, "
    "X-CSRF-Token, Client-Agent, X-Fields, Content-Type, Authorization, X-Requested-With, X-HTTP-Method-Override, "
    "apikey, genkey\r\n"
    "cache-control: no-store\r\n"
)
_STREAM = "X-Accel-Buffering: no\r\ncache-control: no-cache\r\nconnection: keep-alive\r\n"


def encode(value: Any) -> bytes:
    """JSON as Python's own encoder spaces it."""
    return json.dumps(value).encode()


def detail(message: str, kind: str, **more: str) -> bytes:
    """The body of an error."""
    return encode({"detail": {**more, "msg": message, "type": kind}})


BUSY = detail("Server is busy; please try again later.", "service_unavailable")
RATE_LIMITED = detail("You are sending requests too quickly. Please try again in 2 seconds.", "service_unavailable")
BAD_INPUT = detail("Error parsing input.", "bad_input")
UNAUTHORIZED = detail("Authentication key is missing or invalid.", "unauthorized", error="Unauthorized")
NO_SLOTS = {
    "error": {"code": 501, "message": "This server does not support slots endpoint.", "type": "not_supported_error"}
}
ABOUT_V1 = (
    b"KoboldCpp OpenAI compatible endpoint is running!<br>For usage reference, see "
    b"<a href='https://platform.openai.com/docs/api-reference'>https://platform.openai.com/docs/api-reference</a>"
    b"<br>For other endpoints, see <a href='/api'>KoboldCpp API Documentation</a>"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def too_big(limit: int) -> bytes:
    """The body of the error about a request larger than so many bytes."""
    megabytes = limit // 1_048_576
    return detail(f"Payload is too big. Max payload size is {megabytes}MB.", "bad_input")


def not_found(path: str) -> bytes:
    """The body of an answer to a GET of what there is not."""
    return (
        "Error: KoboldCpp HTTP Server is running, but this endpoint does not exist. Please check the URL and METHOD."
        f'<br><a href="/api">[Read API documentation here]</a><br><br>Current path: {html.escape(path)}'
    ).encode()


def head(
    status: int, content_type: str, now: float, *, length: int | None = None, stream: bool = False, reason: str = ""
) -> bytes:
    """The head of an answer. Errors and streams have no length: they end with the connection."""
    lines = _status(status, reason or HTTPStatus(status).phrase, now)
    if length is not None:
        lines += f"content-length: {length}\r\n"
    if stream:
        lines += _STREAM
    return f"{lines}{_CROSS_ORIGIN}content-type: {content_type}\r\n\r\n".encode()


def unsupported(method: str, now: float) -> bytes:
    """The whole answer to a method that there is not: Python's own page."""
    message = f"Unsupported method ('{method}')"
    page = f"""\
<!DOCTYPE HTML>
<html lang="en">
    <head>
        <meta charset="utf-8">
        <title>Error response</title>
    </head>
    <body>
        <h1>Error response</h1>
        <p>Error code: 501</p>
        <p>Message: {message}.</p>
        <p>Error code explanation: 501 - Server does not support this operation.</p>
    </body>
</html>
"""
    lines = _status(501, message, now) + "Connection: close\r\nContent-Type: text/html;charset=utf-8\r\n"
    return f"{lines}Content-Length: {len(page)}\r\n{_CROSS_ORIGIN}\r\n{page}".encode()


def _status(status: int, reason: str, now: float) -> str:
    return f"HTTP/1.0 {status} {reason}\r\nServer: KoboldCppServer 1\r\nDate: {format_date_time(now)}\r\n"


class Made(Struct, frozen=True):
    """What was generated. `number` tells answers apart."""

    number: int
    model: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """As the OpenAI endpoints count."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class Dialect(Struct, frozen=True):
    """How an endpoint that generates says it."""

    limit_name: str
    stops_name: str

    def whole(self, made: Made, now: float) -> bytes:
        """The body of an answer in one piece."""
        raise NotImplementedError

    def event(self, made: Made, text: str, finish_reason: str | None, now: float) -> bytes:
        """An event of a stream; the last one has a reason and no text."""
        raise NotImplementedError

    def trailer(self, made: Made, now: float, *, usage: bool) -> bytes:
        """What follows the last event."""
        raise NotImplementedError


class _OpenAI(Dialect, frozen=True):
    prefix: str
    object: str
    stream_object: str

    def whole(self, made: Made, now: float) -> bytes:
        return encode({**self._frame(self.object, made, now), "usage": made.usage, "choices": [self._choice(made)]})

    def event(self, made: Made, text: str, finish_reason: str | None, now: float) -> bytes:
        choice = {"index": 0, "finish_reason": finish_reason, **self._delta(text)}
        return self._data({**self._frame(self.stream_object, made, now), "choices": [choice]})

    def trailer(self, made: Made, now: float, *, usage: bool) -> bytes:
        frame = self._frame(self.stream_object, made, now)
        counted = self._data({**frame, "choices": [], "usage": made.usage}) if usage else b""
        return counted + b"data: [DONE]\n\n"

    def _frame(self, kind: str, made: Made, now: float) -> dict[str, Any]:
        return {"id": f"{self.prefix}-A{made.number}", "object": kind, "created": int(now), "model": made.model}

    def _data(self, value: Mapping[str, Any]) -> bytes:
        return b"data: " + encode(value) + b"\n\n"

    def _choice(self, made: Made) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class _Chat(_OpenAI, frozen=True):
    def _choice(self, made: Made) -> dict[str, Any]:
        message = {"role": "assistant", "content": made.text, "tool_calls": []}
        return {"index": 0, "message": message, "finish_reason": made.finish_reason, "logprobs": None}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text}}


class _Completions(_OpenAI, frozen=True):
    def _choice(self, made: Made) -> dict[str, Any]:
        return {"text": made.text, "index": 0, "finish_reason": made.finish_reason, "logprobs": None}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}


class _Native(Dialect, frozen=True):
    def whole(self, made: Made, now: float) -> bytes:
        result: dict[str, Any] = {
            "text": made.text,
            "tool_calls": [],
            "finish_reason": made.finish_reason,
            "logprobs": None,
            "prompt_tokens": made.prompt_tokens,
            "completion_tokens": made.completion_tokens,
        }
        return encode({"results": [result]})

    def event(self, made: Made, text: str, finish_reason: str | None, now: float) -> bytes:
        return b"event: message\ndata: " + encode({"token": text, "finish_reason": finish_reason}) + b"\n\n"

    def trailer(self, made: Made, now: float, *, usage: bool) -> bytes:
        return b""


CHAT: Dialect = _Chat("max_tokens", "stop", "chatcmpl", "chat.completion", "chat.completion.chunk")
COMPLETIONS: Dialect = _Completions("max_tokens", "stop", "cmpl", "text_completion", "text_completion")
NATIVE: Dialect = _Native("max_length", "stop_sequence")
