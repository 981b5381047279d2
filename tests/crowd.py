"""A model server that tells tokens one by one, and callers who ask again and again, all in one asyncio loop."""

import asyncio
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from daemon import AUTH, PATIENCE, TOKEN, Daemon

REFUSED = "All connection attempts failed"


class Model:
    """Answers each event with as many tokens as it asks for, one every 10 ms.

    `begun`, `ended` and `left` count the generations: all, those that came to their end, and those that the daemon
    left; `aborted` those that it asked to be stopped.
    """

    def __init__(self) -> None:
        self.begun = self.ended = self.left = self.aborted = 0
        self.url = ""

    @property
    def under_way(self) -> int:
        return self.begun - self.ended - self.left

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head, body = await read_message(reader)
            path = head.split()[1]
            if path.endswith("/completions"):
                await self._generate(json.loads(body), reader, writer)
            elif path == "/api/extra/abort":
                self.aborted += 1
                await _reply(writer, {"success": "true"})
            else:
                await _reply(writer, _PAGES.get(path))
        writer.close()

    async def _generate(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.begun += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        left = asyncio.ensure_future(reader.read(1))
        for _ in range(request["max_tokens"]):
            _event(writer, {"choices": [{"delta": {"content": "x"}, "finish_reason": None}], "model": "m"})
            if (await asyncio.wait([left], timeout=0.01))[0]:
                left.exception()
                self.left += 1
                return
        left.cancel()
        self.ended += 1
        _event(writer, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
        _event(writer, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}})
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()


_PAGES = {
    "/api/extra/version": {"result": "KoboldCpp", "version": "1.115.1", "llm": True},
    "/v1/models": {"data": [{"id": "koboldcpp/m"}]},
    "/api/extra/true_max_context_length": {"value": 4096},
}


def _event(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    writer.write(b"data: " + json.dumps(value).encode() + b"\n\n")


async def _reply(writer: asyncio.StreamWriter, value: object) -> None:
    status = b"404 Not Found" if value is None else b"200 OK"
    writer.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\n\r\n" + json.dumps(value).encode())
    await writer.drain()


async def read_message(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Head and body of a request or an answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n")[1:])}
    if fields.get("transfer-encoding") != "chunked":
        return head, await reader.readexactly(int(fields.get("content-length", 0)))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return head, body


@asynccontextmanager
async def model() -> AsyncIterator[Model]:
    found = Model()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0, backlog=512)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()


class Crowd:
    """Callers of a daemon. `answers` counts what they were told; whatever is no answer fails their task."""

    def __init__(self, daemon: Daemon, *, max_tokens: int = 3):
        self.answers: Counter[str] = Counter()
        self.closed_by_us = False
        # Each has its own, for httpx changes the one that it is given.
        self.tls, self.tls_http2 = (ssl.create_default_context(cafile=str(daemon.certificates.ca)) for _ in range(2))
        self.port = daemon.port("https")
        self._max_tokens = max_tokens

    def answered(self, count: int) -> bool:
        return self.answers["200"] >= count

    def body(self, stream: bool) -> bytes:
        tokens = 10 * self._max_tokens if stream else self._max_tokens
        return json.dumps({"content": "?", "stream": stream, "parameters": {"max_tokens": tokens}}).encode()

    def judge(self, status: int, body: bytes, stream: bool) -> None:
        """Count an answer, which must be whole."""
        if status == 200 and stream:
            last = body.rstrip().rpartition(b"\n\n")[2]
            if last.startswith(b"event: error\n"):
                self.answers["in-band " + json.loads(last.partition(b"data: ")[2])["error"]] += 1
                return
            assert json.loads(last.removeprefix(b"data: "))["done"] is True, f"a stream without its end: {last!r}"
        found = json.loads(body) if status != 200 or not stream else {}
        self.answers[f"{status} {found['error']}" if "error" in found else str(status)] += 1

    async def ask_http1(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: bool) -> bool:
        """Ask once, and say whether the connection stays."""
        body = self.body(stream)
        writer.write(
            f"POST /event HTTP/1.1\r\nHost: x\r\nX-API-Key: {TOKEN}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head, answer = await asyncio.wait_for(read_message(reader), PATIENCE)
        self.judge(int(head.split()[1]), answer, stream)
        if " 503 " in head:
            assert "\r\nretry-after: " in head
            assert "\r\nconnection: close\r\n" in head
        return "\r\nconnection: close\r\n" not in head

    async def http1(self, *, kept: bool, stream: bool) -> None:
        """Ask again and again, until the service lets nobody in."""
        while not self.closed_by_us:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls)
            except ConnectionRefusedError:
                self.answers["refused"] += 1
                return
            stays = True
            while stays and not self.closed_by_us:
                stays = await self.ask_http1(reader, writer, stream) and kept
            writer.close()

    async def http2(self, *, kept: bool, stream: bool) -> None:
        """As `http1`, with two requests at a time on a connection."""
        while not self.closed_by_us:
            async with self.client() as client:
                again = True
                while again and not self.closed_by_us:
                    going = await asyncio.gather(self.ask_http2(client, stream), self.ask_http2(client, not stream))
                    if not all(going):
                        return
                    again = kept

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{self.port}",
            headers=AUTH,
            verify=self.tls_http2,
            http1=False,
            http2=True,
            timeout=PATIENCE,
            trust_env=False,
        )

    async def ask_http2(self, client: httpx.AsyncClient, stream: bool) -> bool:
        """Ask once, and say whether the service lets anyone in."""
        try:
            headers = {"content-type": "application/json"}
            answer = await client.post("/event", content=self.body(stream), headers=headers)
        except httpx.ConnectError as error:
            if str(error) != REFUSED:
                raise
            self.answers["refused"] += 1
            return False
        self.judge(answer.status_code, answer.content, stream)
        return True

    def gather(self, each: int = 4) -> list[asyncio.Task[None]]:
        """So many callers of each kind: HTTP/1.1 and 2, on new and on kept connections, streaming and not."""
        return [
            asyncio.ensure_future(ask(kept=kept, stream=stream))
            for ask in (self.http1, self.http2)
            for kept in (False, True)
            for stream in (False, True)
            for _ in range(each)
        ]


async def until(true: Any, what: str) -> None:
    """Wait for something that another process does."""
    for _ in range(round(PATIENCE / 0.02)):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"in vain: {what}")
