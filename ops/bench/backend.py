"""The canned model server that all are measured before, and the collector: `python ops/bench/backend.py KIND`.

It prints its port. It is an asyncio protocol that answers from memory, so that it is the fastest part of every
measurement. As llama.cpp it keeps connections and sends chunks; as KoboldCPP it closes them, and their end is the
answer's. Streams are paced by one timer for all that have the same pace; their tokens carry the time they were sent.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import cast

import wire

SLOTS = 1100
PHASES = 20

ABOUT = {
    "koboldcpp": {
        b"/api/extra/version": b'{"result":"KoboldCpp","version":"1.115.1","llm":true}',
        b"/v1/models": b'{"data":[{"id":"koboldcpp/m"}]}',
        b"/api/extra/true_max_context_length": b'{"value":131072}',
        b"/api/extra/abort": b'{"success":"true"}',
    },
    "llama.cpp": {
        b"/props": b'{"total_slots":%d,"model_alias":"m","default_generation_settings":{"n_ctx":131072}}' % SLOTS,
        b"/v1/models": b'{"object":"list","data":[{"id":"m","object":"model"}]}',
        b"/health": b'{"status":"ok"}',
    },
    "collector": {},
}
USAGE = '"usage":{"prompt_tokens":7,"completion_tokens":7,"total_tokens":14}'
COMMON = '"created":1790000000,"id":"chatcmpl-8WqCi0zKbwyNFoYvvUj3xk6h0V6x2aTS","model":"m"'
REFUSALS = {
    "refuse": (b"400 Bad Request", b'{"error":{"code":400,"message":"no","type":"invalid_request_error"}}'),
    "fail": (b"500 Internal Server Error", b'{"error":{"code":500,"message":"no","type":"server_error"}}'),
    "busy": (b"503 Service Unavailable", b'{"detail":{"msg":"busy","type":"service_unavailable"}}'),
}


def _event(delta: str, finish: str = "null") -> bytes:
    choice = f'{{"finish_reason":{finish},"index":0,"delta":{delta}}}'
    return f'data: {{"choices":[{choice}],{COMMON},"object":"chat.completion.chunk"}}\n\n'.encode()


def _token(text: str) -> bytes:
    return _event(f'{{"content":"{text}"}}')


ROLE = _event('{"role":"assistant","content":null}')
ENDING = [
    _event("{}", '"stop"'),
    f'data: {{"choices":[],{COMMON},"object":"chat.completion.chunk",{USAGE}}}\n\n'.encode(),
    b"data: [DONE]\n\n",
]
EVENTS = [ROLE, *(_token(word) for word in wire.WORDS), *ENDING]
WHOLE = (
    f'{{"choices":[{{"finish_reason":"stop","index":0,"message":{{"role":"assistant","content":"{wire.TEXT}"}}}}],'
    f'{COMMON},"object":"chat.completion",{USAGE}}}'
).encode()


class Framing:
    """How a stream goes over the connection: chunked, or up to the connection's end."""

    def __init__(self, keep: bool) -> None:
        transfer = b"transfer-encoding: chunked" if keep else b"connection: close"
        self.head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + transfer + b"\r\n\r\n"
        self.piece: Callable[[bytes], bytes] = _chunk if keep else bytes
        self.begin = self.head + self.piece(ROLE)
        self.end = b"".join(map(self.piece, ENDING)) + (b"0\r\n\r\n" if keep else b"")
        self.whole = self.head + b"".join(map(self.piece, EVENTS)) + (b"0\r\n\r\n" if keep else b"")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Pace:
    """Sends tokens to all streams of one pace: a share of them at each tick, as servers with slots of their own do."""

    def __init__(self, a_second: int, framing: Framing) -> None:
        self._framing = framing
        self._step = 1 / a_second / PHASES
        self._phases: list[set[Connection]] = [set() for _ in range(PHASES)]
        self._next = 0
        self._count = 0

    def join(self, stream: "Connection") -> None:
        """From now on this stream gets tokens, its first at once."""
        if not stream.step(self._framing.begin + self._piece()):
            return
        self._phases[self._next - 1].add(stream)
        self._count += 1
        if self._count == 1:
            self._due = asyncio.get_running_loop().time() + self._step
            self._wait()

    def _piece(self) -> bytes:
        return self._framing.piece(_token(wire.token(wire.stamp())))

    def _wait(self) -> None:
        asyncio.get_running_loop().call_at(self._due, self._tick)

    def _tick(self) -> None:
        streams = self._phases[self._next]
        self._next = (self._next + 1) % PHASES
        if streams:
            piece = self._piece()
            over = [stream for stream in streams if not stream.step(piece)]
            streams.difference_update(over)
            self._count -= len(over)
        if self._count:
            self._due += self._step
            self._wait()


class Connection(asyncio.Protocol):
    """Answers each request at once, or begins a stream."""

    def __init__(self, answers: dict[bytes, bytes], framing: Framing, keep: bool, paces: dict[int, Pace]) -> None:
        self._answers = answers
        self._framing = framing
        self._keep = keep
        self._paces = paces
        self._data = b""
        self._left = 0
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A connection has come."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller is gone."""
        self._lost = True

    def data_received(self, data: bytes) -> None:
        """Some of a request has come."""
        self._data = self._data + data if self._data else data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            place = head.find(b"\r\ncontent-length:")
            size = int(head[place + 17 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
            if len(self._data) < end + 4 + size:
                return
            body, self._data = self._data[end + 4 : end + 4 + size], self._data[end + 4 + size :]
            method, path, _ = head.split(b" ", 2)
            if path == b"/v1/chat/completions":
                self._generate(body)
            else:
                found = self._answers.get(path, b"")
                missing = method == b"get" and not found
                self._answer(b"404 Not Found" if missing else b"200 OK", found)

    def _answer(self, status: bytes, body: bytes) -> None:
        end = b"" if self._keep else b"connection: close\r\n"
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n"
        self._transport.write(head % (status, end, len(body)) + body)
        self._ended()

    def _ended(self) -> None:
        if not self._keep:
            self._transport.close()

    def _generate(self, body: bytes) -> None:
        order = wire.find_order(body)
        streams = b'"stream":true' in body or b'"stream": true' in body
        if order is None:
            self._answer(*REFUSALS["refuse"])
        elif order.do in REFUSALS:
            self._answer(*REFUSALS[order.do])
        elif order.do in ("cut", "stall"):
            self._transport.write(self._framing.begin + self._framing.piece(EVENTS[1]))
            if order.do == "cut":
                self._transport.close()
        elif not streams:
            self._answer(b"200 OK", WHOLE)
        elif order.tokens:
            self._left = order.tokens
            if order.pace not in self._paces:
                self._paces[order.pace] = Pace(order.pace, self._framing)
            self._paces[order.pace].join(self)
        else:
            self._transport.write(self._framing.whole)
            self._ended()

    def step(self, piece: bytes) -> bool:
        """Send a token; whether more are to come."""
        if self._lost:
            return False
        self._left -= 1
        if self._left:
            self._transport.write(piece)
            return True
        self._transport.write(piece + self._framing.end)
        self._ended()
        return False


async def serve(kind: str) -> None:
    """Be a server of this kind."""
    keep, paces = kind != "koboldcpp", dict[int, Pace]()
    framing = Framing(keep)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(ABOUT[kind], framing, keep, paces), "127.0.0.1", 0, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def run(main: Coroutine[None, None, None]) -> None:
    """Run on uvloop where it is there: it takes half the CPU."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


if __name__ == "__main__":
    run(serve(sys.argv[1]))
