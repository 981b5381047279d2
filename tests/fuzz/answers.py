"""What a model server might answer: recorded answers, whole and damaged, and streams with anything in them."""

import json
from random import Random
from typing import Any

from harness import CAPTURES, Answer, capture
from twisted.internet.error import ConnectionDone, ConnectionLost

from fuzz.documents import value
from fuzz.mutation import mutate, split, text

RECORDED = [
    answer
    for path in sorted(CAPTURES.glob("*/*.txt"))
    if (answer := capture(str(path.relative_to(CAPTURES)))[1])
]  # fmt: skip


def answer(random: Random) -> Answer:
    """One answer, and how its connection ends; it always does."""
    kind = random.random()
    if kind < 0.45:
        data = random.choice(RECORDED)
    elif kind < 0.85:
        data = _head(random, b"text/event-stream") + _events(random)
    else:
        data = _head(random, b"application/json") + json.dumps(value(random, 5)).encode("utf-8", "surrogatepass")
    if random.random() < 0.5:
        data = mutate(random, data)
    return Answer(split(random, data), random.choice([ConnectionDone(), ConnectionLost()]))


def _head(random: Random, media_type: bytes) -> bytes:
    odd = [
        b"503 Busy", b"500 No", b"400 No", b"401 No", b"204 None", b"304 Not", b"302 There", b"100 Go", b"999 What",
        b"20 x", b"abc x",
    ]  # fmt: skip
    status = b"200 OK" if random.random() < 0.4 else random.choice(odd)
    lines = [
        random.choice([b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/1.1 ", b"HTTP/9.9 ", b"ICY "]) + status,
        b"content-type: " + media_type,
    ]
    extra = [
        b"content-length: 5", b"content-length: 10, 20", b"content-length: -1", b"content-length: x",
        b"transfer-encoding: chunked", b"transfer-encoding: gzip", b"content-encoding: gzip",
        b"connection: keep-alive", b"location: http://elsewhere/", b"x: \x80", b"nocolon", b" folded",
        b"set-cookie: a=b", b"retry-after: 99999999999", b"retry-after: x",
    ]  # fmt: skip
    lines += random.sample(extra, random.choice([0, 0, 0, 1, 2]))
    return b"\r\n".join([*lines, b"", b""])


def _events(random: Random) -> bytes:
    return b"".join(_event(random) for _ in range(random.randint(0, 8)))


def _event(random: Random) -> bytes:
    chunk: Any = {"choices": [{"delta": {"content": "a"}, "finish_reason": None, "index": 0}], "model": "m"}
    kind = random.random()
    if kind < 0.2:
        chunk["choices"][0]["finish_reason"] = random.choice(["stop", "length", "tool_calls", 7, "", None, "error"])
    elif kind < 0.3:
        chunk = {
            "choices": [],
            "usage": {
                "prompt_tokens": random.choice([1, -1, 2**70, 0.5, None]),
                "completion_tokens": 1,
                "total_tokens": 2,
            },
        }
    elif kind < 0.4:
        chunk = {"token": random.choice(["a", 7, None]), "finish_reason": random.choice([None, "stop", "length", []])}
    elif kind < 0.5:
        chunk = {"error": random.choice([{"message": "no", "code": 400}, "no", None, []])}
    elif kind < 0.6:
        chunk = value(random, 4)
    elif kind < 0.7:
        chunk["choices"] = random.choice(
            [None, {}, [None], [{}], [{"delta": None}], [{"delta": {"content": 7}}], [{"text": "a"}], "x"]
        )
    elif kind < 0.75:
        return b"data: [DONE]" + random.choice([b"\n\n", b"\r\n\r\n", b"\n", b""])
    elif kind < 0.8:
        return text(random)
    data = json.dumps(chunk).encode("utf-8", "surrogatepass")
    line = (
        random.choice([b"data: ", b"data:", b"data: ", b"data:  ", b"event: message\ndata: ", b": x\nid: 7\ndata: "])
        + data
    )
    return line + random.choice([b"\n\n", b"\n\n", b"\r\n\r\n", b"\r\r", b"\n"])
