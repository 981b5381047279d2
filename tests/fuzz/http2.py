"""HTTP/2 connections: frames that are well formed, frames that are nearly so, and header blocks of both kinds."""

import struct
from random import Random
from typing import NamedTuple

from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError

from fuzz.documents import event
from fuzz.mutation import mutate

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4
Fields = list[tuple[bytes, bytes]]


class Case(NamedTuple):
    """What is sent on a connection, and the streams whose requests must not succeed, and those that must."""

    data: bytes
    refused: frozenset[int]
    answered: frozenset[int]
    about: str


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def make(random: Random, token: bytes) -> Case:
    """One connection."""
    encoder = Encoder()
    pieces = [PREFACE, frame(SETTINGS, 0, 0, _settings(random) if random.random() < 0.5 else b"")]
    about: list[str] = []
    refused, answered = set(), set()
    harmless = True
    stream = 1
    for _ in range(random.randint(1, 6)):
        kind = random.random()
        if kind < 0.35:
            pieces.append(_request(random, encoder, stream, _head(token), event(random)))
            if harmless:
                answered.add(stream)
            about.append("good")
        elif kind < 0.65:
            name = random.choice(list(DEFECTS))
            pieces.append(_request(random, encoder, stream, DEFECTS[name](random, _head(token)), event(random)))
            refused.add(stream)
            harmless = False  # some of them end the connection, and what was being answered with it
            answered.clear()
            about.append(name)
        else:
            name, piece = _odd(random, stream)
            pieces.append(piece)
            harmless = False
            answered.clear()
            about.append(name)
        stream += 2
    data = b"".join(pieces)
    if random.random() < 0.35:
        data = data[: len(PREFACE)] + mutate(random, data[len(PREFACE) :])
        about.append("mutated")
        refused.clear()
        answered.clear()
    return Case(data, frozenset(refused), frozenset(answered), ", ".join(about))


def statuses(data: bytes) -> tuple[dict[int, int], list[int]]:
    """The statuses in what a server sends, by stream, and the codes of its GOAWAYs.

    @raise AssertionError: its frames are malformed.
    """
    decoder = Decoder()
    decoder.max_allowed_table_size = 2**32  # as much as the settings sent may have allowed
    found: dict[int, int] = {}
    codes = []
    while data:
        assert len(data) >= 9, "half a frame"
        size = int.from_bytes(data[:3])
        kind, flags, stream = data[3], data[4], int.from_bytes(data[5:9]) & 0x7FFFFFFF
        payload, data = data[9 : 9 + size], data[9 + size :]
        assert len(payload) == size <= 16_384, "a frame that is not whole"
        if kind == HEADERS:
            assert flags & END_HEADERS
            try:
                headers = dict(decoder.decode(payload, raw=True))
            except HPACKError as error:
                raise AssertionError("a header block that can't be decoded") from error
            found[stream] = int(headers.get(b":status", b"0"))
        elif kind == GOAWAY:
            codes.append(int.from_bytes(payload[4:8]))
    return found, codes


def _head(token: bytes) -> Fields:
    return [
        (b":method", b"POST"), (b":scheme", b"https"), (b":path", b"/event"), (b":authority", b"localhost"),
        (b"authorization", b"Bearer " + token), (b"content-type", b"application/json"),
    ]  # fmt: skip


def _request(random: Random, encoder: Encoder, stream: int, fields: Fields, body: bytes) -> bytes:
    encoder.huffman_coding = True
    block = encoder.encode(fields, huffman=random.random() < 0.5)
    if random.random() < 0.2 and len(block) > 3:
        cut = random.randrange(1, len(block))
        head = frame(HEADERS, 0, stream, block[:cut]) + frame(CONTINUATION, END_HEADERS, stream, block[cut:])
    else:
        head = frame(HEADERS, END_HEADERS, stream, block)
    cut = random.randrange(len(body))
    return head + frame(DATA, 0, stream, body[:cut]) + frame(DATA, END_STREAM, stream, body[cut:])


def _settings(random: Random) -> bytes:
    """Settings that are allowed, so that what follows is answered."""
    choices = [
        (1, 0),
        (1, 65_536),
        (2, 0),
        (3, 1),
        (4, 65_535),
        (4, 2**31 - 1),
        (5, 16_384),
        (5, 65_536),
        (6, 2**20),
        (99, 7),
    ]
    return b"".join(struct.pack(">HI", *random.choice(choices)) for _ in range(random.randint(1, 4)))


# Defects of a head, for which the request must not succeed.


def _added(*fields: tuple[bytes, bytes]):  # type: ignore[no-untyped-def]
    return lambda random, head: [*head, random.choice(fields)]


def _changed(name: bytes, *values: bytes):  # type: ignore[no-untyped-def]
    def make(random: Random, head: Fields) -> Fields:
        value = random.choice(values)
        return [(each, value if each == name else old) for each, old in head]

    return make


def _without(*names: bytes):  # type: ignore[no-untyped-def]
    def make(random: Random, head: Fields) -> Fields:
        name = random.choice(names)
        return [field for field in head if field[0] != name]

    return make


DEFECTS = {
    "upper case": _added((b"X-A", b"b")),
    "no field name": _added((b"", b"b")),
    "a field name that is none": _added(
        (b"x a", b"b"), (b"x\n", b"b"), (b"x\0", b"b"), (b"x:", b"b"), (b"x\x80", b"b")
    ),
    "a value with a line's end": _added((b"x", b"a\r\nb: c"), (b"x", b"a\nb"), (b"x", b"a\rb"), (b"x", b"a\0b")),
    "of the connection": _added(
        (b"connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"),
        (b"keep-alive", b"5"),
        (b"proxy-connection", b"close"),
        (b"te", b"gzip"),
    ),
    "a pseudo-header too many": _added(
        (b":path", b"/event"), (b":method", b"POST"), (b":status", b"200"), (b":unknown", b"x")
    ),
    "a pseudo-header behind": lambda random, head: [*head[1:], head[0]],
    "a pseudo-header too few": _without(b":method", b":scheme", b":path"),
    "no path": _changed(b":path", b""),
    "a length that is another": _added(
        (b"content-length", b"1"),
        (b"content-length", b"99999"),
        (b"content-length", b"-1"),
        (b"content-length", b"x"),
        (b"content-length", b"1e3"),
    ),
    "a list too long": lambda random, head: [*head, (b"x", b"a" * 17_000)],
    "another token": _changed(b"authorization", b"Bearer wrong", b"", b"Basic secret", b"Bearer"),
}


# Frames that do not belong there, or are malformed.


def _odd(random: Random, stream: int) -> tuple[str, bytes]:
    other = random.choice([0, 1, 2, stream, stream + 100, 2**31 - 1])
    number = struct.pack(">I", random.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
    choices = {
        "data": frame(DATA, random.choice([0, 1, 8, 9]), other, random.randbytes(random.randint(0, 40))),
        "a header block of noise": frame(
            HEADERS, random.choice([4, 5, 12, 36]), other, random.randbytes(random.randint(0, 60))
        ),
        "an index beyond the table": frame(HEADERS, 5, stream, bytes([0x80 | random.randint(62, 126)])),
        "an integer without end": frame(HEADERS, 5, stream, b"\xff" * random.choice([2, 50, 5000])),
        "a table size beyond the limit": frame(HEADERS, 5, stream, b"\x3f\xff\xff\xff\x0f"),
        "a string longer than the block": frame(HEADERS, 5, stream, b"\x40\x7f\xff\xff\x03aaa"),
        "noise for Huffman": frame(HEADERS, 5, stream, b"\x40\x8a" + random.randbytes(10) + b"\x01a"),
        "an unfinished header block": frame(HEADERS, 0, stream, b"\x82\x87"),
        "a stray continuation": frame(CONTINUATION, random.choice([0, 4]), other, b"\x82"),
        "empty continuations": frame(HEADERS, 0, stream, b"\x82")
        + frame(CONTINUATION, 0, stream) * random.choice([3, 200]),
        "priority": frame(PRIORITY, 0, other, number + b"\x10"),
        "priority of the wrong size": frame(PRIORITY, 0, other, b"abc"),
        "reset": frame(RST_STREAM, 0, other, number),
        "reset of the wrong size": frame(RST_STREAM, 0, other, b"a"),
        "settings": frame(SETTINGS, random.choice([0, 1]), random.choice([0, 1]), _wild_settings(random)),
        "a promise": frame(PUSH_PROMISE, 4, other, number + b"\x82"),
        "ping": frame(PING, random.choice([0, 1]), random.choice([0, 1]), random.randbytes(random.choice([8, 8, 7]))),
        "goaway": frame(GOAWAY, 0, random.choice([0, 1]), number * 2 + b"bye"),
        "window": frame(WINDOW_UPDATE, 0, other, number),
        "window of the wrong size": frame(WINDOW_UPDATE, 0, other, b"abc"),
        "an unknown frame": frame(
            random.randint(10, 255), random.randrange(256), other, random.randbytes(random.randint(0, 30))
        ),
        "padding beyond the frame": frame(random.choice([DATA, HEADERS]), 8, stream, b"\xff\x82"),
        "too large a frame": frame(DATA, 0, stream, bytes(16_385)),
        "half a frame": frame(PING, 0, 0, bytes(8))[: random.randint(1, 16)],
    }
    name = random.choice(list(choices))
    return name, choices[name]


def _wild_settings(random: Random) -> bytes:
    values = [0, 1, 16_383, 16_384, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
    pairs = [struct.pack(">HI", random.randint(0, 9), random.choice(values)) for _ in range(random.randint(0, 5))]
    return b"".join(pairs) + random.choice([b"", b"", b"x"])
