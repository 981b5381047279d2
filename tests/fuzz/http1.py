"""HTTP/1.1 requests: good ones, ones with a single known defect, and ones with anything."""

from collections.abc import Callable
from random import Random
from typing import Literal, NamedTuple

from fuzz.documents import event
from fuzz.mutation import mutate, text

Verdict = Literal["good", "bad", "any"]
FOLLOWER = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
"""Comes behind a bad request: an answer to it would mean that the bad one was read as a request of some length."""


class Case(NamedTuple):
    """What is sent on a connection. Good: its first answer is 200; bad: nothing but one refusal, and the end."""

    data: bytes
    verdict: Verdict
    about: str


class Parts(NamedTuple):
    """A good POST in parts; the body is not in the lines."""

    lines: list[bytes]
    body: bytes

    def whole(self) -> bytes:
        return b"\r\n".join([*self.lines, b"", self.body])

    def without(self, name: bytes) -> list[bytes]:
        return [line for line in self.lines if not line.lower().startswith(name + b":")]


def make(random: Random, token: bytes) -> Case:
    """One of all kinds."""
    kind = random.random()
    if kind < 0.25:
        return good(random, token)
    if kind < 0.6:
        return bad(random, token)
    base = good(random, token) if random.random() < 0.7 else bad(random, token)
    return Case(mutate(random, base.data), "any", f"mutated: {base.about}")


def good(random: Random, token: bytes) -> Case:
    """A well-formed request for a completion, in one of the forms that there are."""
    parts = _post(random, token)
    if random.random() < 0.5:
        return Case(parts.whole(), "good", "sized")
    lines = [*parts.without(b"content-length"), b"Transfer-Encoding: chunked"]
    return Case(b"\r\n".join([*lines, b"", _chunked(random, parts.body)]), "good", "chunked")


def bad(random: Random, token: bytes) -> Case:
    """A request with one defect for which it must be refused."""
    name = random.choice(list(DEFECTS))
    parts = _post(random, token)
    return Case(DEFECTS[name](random, parts) + FOLLOWER, "bad", name)


def _post(random: Random, token: bytes) -> Parts:
    body = event(random)
    host = random.choice([b"x", b"localhost:8443", b"[::1]:1", b"127.0.0.1"])
    lines = [b"Host: " + host]
    lines.append(
        random.choice([b"Authorization: Bearer " + token, b"authorization: bearer " + token, b"X-API-Key:" + token])
    )
    lines.append(random.choice([b"Content-Type: application/json", b"content-type:\tapplication/json; charset=utf-8"]))
    lines.append(b"Content-Length: %d" % len(body))
    lines += random.sample(EXTRA, random.randint(0, 3))
    random.shuffle(lines)
    target = random.choice([b"/event", b"/event?a=b", b"http://%s/event" % host])
    return Parts([b"POST %s HTTP/1.1" % target, *lines], body)


EXTRA = [
    b"X-Request-ID: an.id_-7", b"X-Request-ID: not/one", b"Accept: */*", b"X-Forwarded-For: 1.2.3.4, ::1, junk",
    b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", b"traceparent: junk", b"tracestate: a=b",
    b"Expect: 100-continue", b"Connection: close", b"Connection: keep-alive", b"Cookie: a=b; c=\x80", b"X-Empty:",
    b"Upgrade: h2c\r\nConnection: upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    b"Accept: a/b;q=0",
]  # fmt: skip


def _chunked(random: Random, body: bytes, *, size: bytes | None = None, behind: bytes = b"\r\n") -> bytes:
    """A body in chunks; with `size`, that is what the first says instead, with `behind` that ends its data."""
    pieces = []
    at = 0
    while at < len(body):
        piece = body[at : at + random.choice([1, 7, 64, 4096])]
        at += len(piece)
        extension = random.choice([b"", b"", b";a", b";a=b", b';a="b c"'])
        said = (b"%x" if random.random() < 0.5 else b"%X") % len(piece)
        pieces.append((said + extension if size is None else size) + b"\r\n" + piece + behind)
        size, behind = None, b"\r\n"
    trailers = random.choice([b"", b"", b"X-Trailer: 1\r\n"])
    return b"".join([*pieces, b"0\r\n", trailers, b"\r\n"])


# Defects. Each makes of a good request all bytes of a bad one.


def _line(*choices: bytes) -> Callable[[Random, Parts], bytes]:
    """One more line in the head."""

    def make(random: Random, parts: Parts) -> bytes:
        lines = list(parts.lines)
        lines.insert(random.randint(1, len(lines)), random.choice(choices))
        return parts._replace(lines=lines).whole()

    return make


def _instead(name: bytes, *choices: bytes) -> Callable[[Random, Parts], bytes]:
    """Other lines in the place of a field."""

    def make(random: Random, parts: Parts) -> bytes:
        return parts._replace(lines=[*parts.without(name), random.choice(choices)]).whole()

    return make


def _first(*choices: bytes) -> Callable[[Random, Parts], bytes]:
    """Another request line."""

    def make(random: Random, parts: Parts) -> bytes:
        return parts._replace(lines=[random.choice(choices), *parts.lines[1:]]).whole()

    return make


def _coded(*codings: bytes) -> Callable[[Random, Parts], bytes]:
    """A body in chunks under a transfer coding that is not `chunked` alone."""

    def make(random: Random, parts: Parts) -> bytes:
        lines = [*parts.without(b"content-length"), b"Transfer-Encoding: " + random.choice(codings)]
        return b"\r\n".join([*lines, b"", _chunked(random, parts.body)])

    return make


def _chunks(*sizes: bytes, behind: bytes = b"\r\n") -> Callable[[Random, Parts], bytes]:
    """A body in chunks of which the first is malformed."""

    def make(random: Random, parts: Parts) -> bytes:
        lines = [*parts.without(b"content-length"), b"Transfer-Encoding: chunked"]
        size = random.choice(sizes) if sizes else None
        return b"\r\n".join([*lines, b"", _chunked(random, parts.body, size=size, behind=behind)])

    return make


def _line_feed(random: Random, parts: Parts) -> bytes:
    ends = [b"\r\n"] * len(parts.lines)
    ends[random.randrange(len(ends))] = b"\n"
    return b"".join(line + end for line, end in zip(parts.lines, ends, strict=True)) + b"\r\n" + parts.body


def _control(random: Random, parts: Parts) -> bytes:
    byte = bytes([random.choice([*range(9), 11, 12, *range(14, 32), 127])])
    return _line(b"X-A: b%sc" % byte, b"X-A:%s" % byte, b"X%s: a" % byte)(random, parts)


def _both(random: Random, parts: Parts) -> bytes:
    lines = [*parts.lines, b"Transfer-Encoding: chunked"]
    return b"\r\n".join([*lines, b"", _chunked(random, parts.body)])


def _length(*values: bytes) -> Callable[[Random, Parts], bytes]:
    return _instead(b"content-length", *(b"Content-Length: " + value for value in values))


def _many(random: Random, parts: Parts) -> bytes:
    lines = [*parts.lines, *(b"X-%d: %d" % (number, number) for number in range(random.randint(100, 120)))]
    return parts._replace(lines=lines).whole()


def _long(random: Random, parts: Parts) -> bytes:
    return _line(b"X-Long: " + b"a" * 16_400, b"X" * 16_400 + b": a")(random, parts)


DEFECTS: dict[str, Callable[[Random, Parts], bytes]] = {
    "a bare LF": _line_feed,
    "a bare CR": _line(b"X-A: a\rb", b"X-A: \r", b"X-A: a\rX-B: c", b"X\r: a"),
    "a control character": _control,
    "white space before the colon": _line(
        b"X-A : b", b"X-A\t: b", b"Content-Length : 0", b"Transfer-Encoding : chunked"
    ),
    "a folded line": lambda random, parts: parts._replace(lines=[*parts.lines, b"X-A: b", b" c"]).whole(),
    "a line that begins with white space": lambda random, parts: parts._replace(
        lines=[parts.lines[0], b" X-A: b", *parts.lines[1:]]
    ).whole(),
    "no colon": _line(b"X-A", b"justtext", b"GET / HTTP/1.1"),
    "no field name": _line(b": a", b":"),
    "a field name that is none": _line(b"X A: b", b"X(: b", b"X\x80: b", b"X@: b", b'X": b', b"X/: b", b"X{}: b"),
    "no Host": lambda random, parts: parts._replace(lines=parts.without(b"host")).whole(),
    "two Hosts": _line(b"Host: x", b"Host: y", b"host:"),
    "a Host that is none": _instead(
        b"host", b"Host: a b", b"Host: a,b", b"Host: a/b", b"Host: u@a", b"Host: a?b", b"Host: a#b"
    ),
    "a length and a transfer coding": _both,
    "two lengths": _line(b"Content-Length: 7", b"Content-Length: 0"),
    "a length that is none": _length(
        b"+5", b"-5", b"5 5", b"0x5", b"5,5", b"5, 6", b"abc", b"1e3", b"5.0", b"5;", b"\xb2", b"_5"
    ),
    "a length beyond all bounds": _length(b"18446744073709551616", b"9" * 30, b"9" * 5000),
    "a transfer coding other than chunked": _coded(
        b"identity",
        b"gzip",
        b"gzip, chunked",
        b"chunked, gzip",
        b"chunked, chunked",
        b"chunked, identity",
        b"xchunked",
        b"chunkedx",
        b"chunked;q=1",
        b'"chunked"',
        b"",
        b",",
        b"\x0bchunked",
        b"chunked\x80",
    ),
    "two transfer codings": lambda random, parts: _coded(
        b"chunked\r\nTransfer-Encoding: identity",
        b"chunked\r\nTransfer-Encoding: gzip",
        b"gzip\r\nTransfer-Encoding: chunked",
    )(random, parts),
    "a transfer coding in HTTP/1.0": lambda random, parts: _coded(b"chunked")(random, parts).replace(
        b"HTTP/1.1", b"HTTP/1.0", 1
    ),
    "a chunk size that is none": _chunks(b"g", b"-1", b"+1", b"0x5", b"", b" 5", b"5 5", b"5_0", b"\xb2", b";a", b"5,"),
    "a chunk size beyond all bounds": _chunks(b"ffffffffffffffff1", b"f" * 30, b"1" + b"0" * 16),
    "a chunk extension with a control character": _chunks(b"1;a\0", b"1;a=\x01", b"1;a=\rb", b"1;\x7f", b'1;a="\x02"'),
    "a chunk size that ends in LF": lambda random, parts: _chunks(b"1")(random, parts).replace(
        b"\r\n1\r\n", b"\r\n1\n", 1
    ),
    "a chunk whose data does not end": _chunks(behind=b""),
    "a chunk whose data ends in LF": _chunks(behind=b"\n"),
    "a chunk longer than it says": _chunks(behind=b"x\r\n"),
    "a method that is none": _first(
        b"post /event HTTP/1.1",
        b"P(ST /event HTTP/1.1",
        b" /event HTTP/1.1",
        b"BREW /event HTTP/1.1",
        b"\x80POST /event HTTP/1.1",
        b"POST\0 /event HTTP/1.1",
    ),
    "a version that is none": _first(
        b"POST /event HTTP/2.0",
        b"POST /event HTTP/1.9",
        b"POST /event HTTP/0.9",
        b"POST /event http/1.1",
        b"POST /event HTTP/1",
        b"POST /event HTTP/1.11",
        b"POST /event",
        b"POST /event HTTP/1.1x",
        b"POST /event HTTP /1.1",
        b"POST /event ICY/1.1",
    ),
    "a request line that is none": _first(
        b"POST\t/event HTTP/1.1",
        b"POST /event\tHTTP/1.1",
        b"POST /ev ent HTTP/1.1",
        b" POST /event HTTP/1.1",
        b"POST /event HTTP/1.1 ",
        b"POST",
        b"POST /ev\0ent HTTP/1.1",
        b"POST event HTTP/1.1",
        b"POST /ev\x7fent HTTP/1.1",
        b"POST HTTP/1.1",
        b"\0",
    ),
    "too many fields": _many,
    "too long a field": _long,
}


def noise(random: Random) -> Case:
    """Nothing like a request."""
    return Case(text(random, 60), "any", "noise")
