"""What callers and the canned model server say to each other. Pure.

A prompt tells the model server what to answer with, so that it needs no other channel than the one that is measured.
"""

import json
import re
import time
from typing import NamedTuple

WORDS = ("The", " capital", " of", " France", " is", " Paris", ".")
TEXT = "".join(WORDS)
END_MARK = "#end"
_ORDER = re.compile(rb"#bench tokens=(\d+) pace=(\d+) size=(\d+) do=(\w+)#")
_TEXTS = re.compile(rb'"(?:completion|content|delta)":\s*"([^"]*)"')
_TOKEN = re.compile(rb"~([0-9a-f]{8})")
_ERROR = re.compile(rb'event: error\ndata: \{"error":"(\w+)"')
TOKEN_BYTES = 9


class Order(NamedTuple):
    """What a prompt asks for: so many tokens at so many a second (0: the canned answer, at once), or a failure.

    `do`: `answer`; `refuse` 400, `fail` 500, `busy` 503, `cut` off amid the answer, `stall` amid it.
    """

    tokens: int = 0
    pace: int = 0
    size: int = 0
    do: str = "answer"


def prompt(order: Order) -> str:
    """The text that asks for it, of `order.size` bytes or a little more."""
    begin = f"#bench tokens={order.tokens} pace={order.pace} size={order.size} do={order.do}#"
    filler = "What is the capital of France? "
    left = max(0, order.size - len(begin) - len(END_MARK))
    return begin + (filler * (left // len(filler) + 1))[:left] + END_MARK


def find_order(body: bytes) -> Order | None:
    """What a request's body asks for; None where the prompt did not come whole."""
    found = _ORDER.search(body, 0, 4096)
    if found is None:
        return Order()
    tokens, pace, size = (int(found[place]) for place in (1, 2, 3))
    if len(body) < size or body.find(END_MARK.encode(), found.end()) < 0:
        return None
    return Order(tokens, pace, size, found[4].decode())


def request(path: str, body: bytes, keep: bool = True) -> bytes:
    """A POST request."""
    end = "" if keep else "Connection: close\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer bench\r\n{end}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def event_body(order: Order, stream: bool) -> bytes:
    """An event for AI Ticket."""
    event: dict[str, object] = {"content": prompt(order), "parameters": {"max_tokens": 512}}
    if stream:
        event["stream"] = True
    return json.dumps(event).encode()


def chat_body(order: Order, stream: bool) -> bytes:
    """The same for the others, and for the model server itself."""
    chat: dict[str, object] = {"model": "bench", "messages": [{"role": "user", "content": prompt(order)}]}
    chat["max_tokens"] = 512
    if stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(chat).encode()


def has_ended(stream: bytes) -> bool:
    """Whether a stream has come to its end."""
    return b"data: [DONE]" in stream or b'"done":true' in stream


def error_within(body: bytes) -> str | None:
    """The code of the error that AI Ticket ended a stream with, if it did."""
    found = _ERROR.search(body) if b"event: error" in body else None
    return None if found is None else found[1].decode()


def text_of(body: bytes) -> str | None:
    """The text of an answer of any kind, in one piece or in events; None where its end is missing."""
    if body.startswith((b"data:", b":")):
        if not has_ended(body):
            return None
        return b"".join(_TEXTS.findall(body)).decode()
    found = _TEXTS.search(body)
    return None if found is None else found[1].decode()


def stamp() -> int:
    """Microseconds of the machine's steady clock, modulo 2**32: the same in all processes."""
    return time.monotonic_ns() // 1000 & 0xFFFFFFFF


def token(at: int) -> str:
    """A token that tells when it was sent."""
    return f"~{at:08x}"


def tokens(data: bytes) -> list[int]:
    """When each of the tokens in there was sent."""
    return [int(found, 16) for found in _TOKEN.findall(data)]


def since(later: int, earlier: int) -> int:
    """Microseconds from one stamp to another, which may be up to half an hour in the other order."""
    return ((later - earlier + 0x80000000) & 0xFFFFFFFF) - 0x80000000
