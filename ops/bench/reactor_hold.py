"""For how long a single request, or connection, of the costliest shapes holds the reactor; the aim is under 50 ms.

`python ops/bench/reactor_hold.py [NAME...]` on Linux, with the daemon installed, or importable by PYTHONPATH. Measured
by a tick within the daemon (see `attacked`): how late the latest was while a shape was being sent, and how much CPU the
reactor's thread had taken by then. Of `ROUNDS` rounds the least counts: on a machine that others use too, a tick is
late whenever they have the CPU, and the second number says more.
"""

import argparse
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator

from attacked import TOKEN, Daemon, attacked
from hpack import Encoder
from parse_event import BODIES

ROUNDS = 3
MIB = 1_048_576
LIMIT_MS = 50.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def post(path: str, body: bytes, media_type: str = "application/json", extra: str = "") -> bytes:
    """A request of HTTP/1.1."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {TOKEN}\r\nContent-Type: {media_type}\r\n{extra}"
    if "chunked" not in extra:
        head += f"Content-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def filled(before: bytes, unit: bytes, after: bytes, size: int) -> bytes:
    """So many bytes, the middle repeated."""
    return before + unit * ((size - len(before) - len(after)) // len(unit)) + after


def plain_shapes() -> Iterator[tuple[str, bytes]]:
    """What is sent over HTTP/1.1."""
    for name, parts in BODIES.items():
        yield f"event: {name}", post("/event", filled(*parts, MIB))
    for name, unit in {"{},": b"{},", "0,": b"0,", "[],": b"[],", '"",': b'"",', "strings": b'"\\n\\n\\n\\n",'}.items():
        yield f"batch: {name}", post("/events", filled(b"[", unit, b"0]", 4 * MIB))
    thousand = b"[" + b",".join([b'{"content":"x","u":[' + b"[]," * 1300 + b"0]}"] * 999) + b"]"
    yield "batch: 999 costly events", post("/events", thousand)
    yield "batch: lone surrogates", post("/events", filled(b'["', rb"\ud800", b'"]', 4 * MIB))
    yield "batch: depth", post("/events", filled(b"[", b"[", b"]", 4 * MIB))
    lines = {"blank": b"\n", "spaces": b" ", "tiny": b"0\n", "events": b'{"content":7}\n', "returns": b"\r\n"}
    for name, unit in lines.items():
        yield f"lines: {name}", post("/events", unit * (2 * MIB // len(unit)), "application/x-ndjson")
    chunked = "Transfer-Encoding: chunked\r\n"
    for path, media_type in (("/event", "application/json"), ("/events", "application/x-ndjson")):
        for name, unit in {"of a byte": b"1\r\n \r\n", "with extensions": b"1;" + b"a" * 500 + b"\r\n \r\n"}.items():
            yield (
                f"chunks {name}: {path}",
                post(path, unit * (2 * MIB // len(unit)) + b"0\r\n\r\n", media_type, chunked),
            )
    yield "trailers", post("/event", b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 300_000 + b"\r\n", extra=chunked)
    fields = {
        "X-Forwarded-For: ,": "," * 16_000,
        "X-Forwarded-For: addresses": "1.2.3.4," * 2000,
        "Accept: ,": "," * 16_000,
        "Accept: q": "application/x-ndjson;" + ";q=0" * 3900,
        "traceparent": "0" * 16_000,
        "tracestate": "a=b," * 4000,
        "Authorization: spaces": " " * 16_000,
        "X-Request-ID": "a" * 16_000,
        "Content-Type": "a;" * 8000,
        "Cookie": "a=b;" * 4000,
    }
    for name, value in fields.items():
        yield f"field {name}", post("/events", b"[]", extra=f"{name.partition(':')[0]}: {value}\r\n")
    yield "99 fields", post("/event", b"{}", extra="".join(f"x{number}: {'a' * 150}\r\n" for number in range(95)))
    yield "pipelined", b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000
    yield "pipelined metrics", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 500
    yield "pipelined events", post("/event", b'{"content":7}') * 5000
    yield "pipelined refusals", b"POST /event HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n " * 10_000


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def window_size(size: int) -> bytes:
    """The frame that says how much of each answer is let in at first."""
    return frame(4, 0, 0, struct.pack(">HI", 4, size))


def head(encoder: Encoder, path: str = "/event", *fields: tuple[str, str], method: str = "POST") -> bytes:
    """A header block."""
    pseudo = [(":method", method), (":scheme", "https"), (":path", path), (":authority", "x")]
    found: bytes = encoder.encode([*pseudo, ("x-api-key", TOKEN), ("content-type", "application/json"), *fields])
    return found


def secure_shapes() -> Iterator[tuple[str, bytes]]:
    """What is sent over HTTP/2."""
    opening = PREFACE + frame(4, 0, 0)
    requests = Encoder()
    streams = b"".join(frame(1, 4, 1 + 2 * number, head(requests)) for number in range(100))
    repeated = {
        "PING": frame(6, 0, 0, bytes(8)),
        "SETTINGS": frame(4, 0, 0, struct.pack(">HI", 4, 65_535) * 100),
        "empty SETTINGS": frame(4, 0, 0),
        "PRIORITY": frame(2, 0, 1, struct.pack(">IB", 3, 1)),
        "WINDOW_UPDATE": frame(8, 0, 0, struct.pack(">I", 1)),
        "WINDOW_UPDATE of a stream": frame(8, 0, 1, struct.pack(">I", 1)),
        "empty DATA": frame(0, 0, 1),
        "DATA of a byte": frame(0, 0, 1, b" "),
        "padded DATA": frame(0, 8, 1, b"\x00"),
        "unknown": frame(0x77, 0, 0, b"x"),
    }
    for path in ("/health/live", "/metrics"):
        asking = Encoder()
        shut = PREFACE + window_size(0)
        shut += b"".join(frame(1, 5, 1 + 2 * number, head(asking, path, method="GET")) for number in range(100))
        openings = {
            "WINDOW_UPDATE": frame(8, 0, 0, struct.pack(">I", 1)) * 900,
            "empty SETTINGS": frame(4, 0, 0) * 900,
            "windows of 0 and 1": (window_size(0) + window_size(1)) * 450,
            "windows of 1, 2, 3": b"".join(window_size(size) for size in range(1, 900)),
        }
        for name, flood in openings.items():
            yield f"HTTP/2 waiting {path}: {name}", shut + flood
    for name, unit in repeated.items():
        yield f"HTTP/2 {name}", opening + streams + unit * (MIB // len(unit))
    resets = Encoder()
    rapid = (frame(1, 5, n, head(resets)) + frame(3, 0, n, struct.pack(">I", 8)) for n in range(1, 20_000, 2))
    yield "HTTP/2 rapid reset", opening + b"".join(rapid)
    yield "HTTP/2 CONTINUATION", opening + frame(1, 0, 1, head(Encoder())) + frame(9, 0, 1, b"\x00\x01a\x01b") * 50_000
    yield "HTTP/2 empty CONTINUATION", opening + frame(1, 0, 1, head(Encoder())) + frame(9, 0, 1) * 100_000
    bomb = Encoder()
    first = frame(1, 5, 1, head(bomb, "/event", ("a", "b" * 4000)))
    indexed = frame(1, 5, 3, bomb.encode([("a", "b" * 4000)]) * 16_000)
    yield "HTTP/2 HPACK bomb", opening + first + indexed
    yield "HTTP/2 tiny fields", opening + frame(1, 5, 1, head(Encoder()) + b"\x00\x01a\x01b" * 3200)
    huffman = Encoder()
    blocks = b"".join(frame(1, 5, n, head(huffman, "/event", ("a", "\x01" * 3000))) for n in range(1, 199, 2))
    yield "HTTP/2 Huffman", opening + blocks
    bodies = Encoder()
    events = (frame(1, 4, n, head(bodies)) + frame(0, 1, n, b'{"content":7}') for n in range(1, 199, 2))
    yield "HTTP/2 100 events", opening + b"".join(events)
    body = filled(*BODIES["content: messages"], 60_000)
    pieces = b"".join(frame(0, 0, 1, body[at : at + 16_384]) for at in range(0, len(body), 16_384))
    yield "HTTP/2 event of 60 KB", opening + frame(1, 4, 1, head(Encoder())) + pieces + frame(0, 1, 1)


def send(daemon: Daemon, data: bytes, *, secure: bool) -> None:
    """All of it as fast as it is taken, reading what comes; then wait a moment for the last of it to be worked on."""
    with socket.create_connection(("127.0.0.1", daemon.secure if secure else daemon.plain)) as plain:
        connection: socket.socket = plain
        if secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            connection = context.wrap_socket(plain)
        connection.settimeout(0.3)
        end = time.monotonic() + 5.0
        try:
            # So that the daemon always has something to read, and something that was read of what it writes.
            for at in range(0, len(data), 65_536):
                connection.settimeout(2.0)
                connection.sendall(data[at : at + 65_536])
                connection.settimeout(0.0)
                try:
                    while connection.recv(MIB):
                        pass
                except (BlockingIOError, ssl.SSLWantReadError):
                    pass
            connection.settimeout(0.3)
            while time.monotonic() < end and connection.recv(MIB):
                pass
        except OSError:  # it has closed, or has nothing more to say
            pass


def measure(daemon: Daemon, work: Callable[[], None]) -> tuple[float, float]:
    """How late a tick was at the most meanwhile, and the CPU that the worst had; in milliseconds, of the best round."""
    rounds = []
    for _ in range(ROUNDS):
        begun = time.monotonic()
        work()
        time.sleep(0.05)
        found = [tick for tick in daemon.ticks if tick.at >= begun]
        rounds.append((max((tick.late for tick in found), default=0.0), max((tick.cpu for tick in found), default=0.0)))
    return min(late for late, _ in rounds) * 1000, min(cpu for _, cpu in rounds) * 1000


def main() -> None:
    """Print a line for each shape, and fail if one of them holds the reactor for too long."""
    parser = argparse.ArgumentParser(description="For how long the costliest requests hold up all others.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="shapes with this in their name; all by default")
    wanted = parser.parse_args().names
    shapes = [(name, data, False) for name, data in plain_shapes()]
    shapes += [(name, data, True) for name, data in secure_shapes()]
    unknown = [each for each in wanted if not any(each in name for name, _, _ in shapes)]
    if unknown:
        names = "\n".join(name for name, _, _ in shapes)
        parser.error(f"no such shape: {', '.join(unknown)}; there are:\n{names}")
    worst: tuple[float, str] = (0.0, "")
    with attacked({"LOG_LEVEL": "WARN", "TRUST_PROXY_COUNT": "2"}) as daemon:
        late, cpu = measure(daemon, lambda: time.sleep(1.0))
        print(f"{'at rest':48} {late:6.1f} ms late {cpu:6.1f} ms CPU")
        for name, data, secure in shapes:
            if wanted and not any(each in name for each in wanted):
                continue
            late, cpu = measure(daemon, lambda data=data, secure=secure: send(daemon, data, secure=secure))  # type: ignore[misc]
            print(f"{name:48} {late:6.1f} ms late {cpu:6.1f} ms CPU{'  !' if cpu > LIMIT_MS else ''}", flush=True)
            worst = max(worst, (cpu, name))
        if daemon.process.poll() is not None or "Traceback" in daemon.log:
            sys.exit(f"the daemon has failed: {daemon.log[-3000:]}")
    print(f"the worst: {worst[1]}, {worst[0]:.1f} ms")
    sys.exit(worst[0] > LIMIT_MS)


if __name__ == "__main__":
    main()
