"""Random damage to bytes."""

from collections.abc import Callable, Sequence
from random import Random

INTERESTING = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b"\x7f", b"\x80", b"\xff", b"\xc3\x28", b"\xed\xa0\x80",
    b"\xef\xbb\xbf", b" ", b"\t", b":", b";", b",", b'"', b"\\", b"[", b"]", b"{", b"}", b"0", b"-1", b"1e999",
    b"NaN", b"null", b"true", b"ffffffffffffffff", b"18446744073709551616", b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Host: y\r\n", b"Expect: 100-continue\r\n",
    b"Upgrade: h2c\r\nConnection: upgrade\r\n", b"Connection: close\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"data: ", b"data: [DONE]\n\n", b"event: error\n", b"\\ud800", b"\\u0000",
]  # fmt: skip


def mutate(random: Random, data: bytes, most: int = 4) -> bytes:
    """These bytes with up to so many changes."""
    changed = bytearray(data)
    for _ in range(random.randint(1, most)):
        random.choice(_CHANGES)(random, changed)
    return bytes(changed)


def split(random: Random, data: bytes) -> list[bytes]:
    """These bytes as they may arrive."""
    if random.random() < 0.1 and len(data) < 2000:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted(random.sample(range(len(data) + 1), min(len(data), random.randint(0, 6))))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start != end]


def text(random: Random, most: int = 12) -> bytes:
    """Some bytes, more often telling ones than not."""
    return b"".join(
        random.choice(INTERESTING) if random.random() < 0.4 else random.randbytes(random.randint(1, 4))
        for _ in range(random.randint(0, most))
    )


def _span(random: Random, data: Sequence[int]) -> tuple[int, int]:
    start = random.randint(0, len(data))
    return start, min(len(data), start + random.choice([1, 1, 2, 4, 16, 200]))


def _flip(random: Random, data: bytearray) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(random: Random, data: bytearray) -> None:
    if data:
        data[random.randrange(len(data))] = random.randrange(256)


def _delete(random: Random, data: bytearray) -> None:
    start, end = _span(random, data)
    del data[start:end]


def _insert(random: Random, data: bytearray) -> None:
    at = random.randint(0, len(data))
    data[at:at] = random.choice(INTERESTING)


def _repeat(random: Random, data: bytearray) -> None:
    start, end = _span(random, data)
    data[end:end] = data[start:end] * random.choice([1, 1, 2, 50])


def _swap(random: Random, data: bytearray) -> None:
    start, end = _span(random, data)
    data[start:end] = data[start:end][::-1]


def _cut(random: Random, data: bytearray) -> None:
    del data[random.randint(0, len(data)) :]


_CHANGES: list[Callable[[Random, bytearray], None]] = [_flip, _set, _delete, _insert, _insert, _repeat, _swap, _cut]
