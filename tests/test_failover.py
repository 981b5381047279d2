"""Two model servers behind the real daemon: one dies and comes back, callers leave in droves."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import httpx
import pytest
from daemon import AUTH, PATIENCE, ROOT, TOKEN, Daemon, running, wait_until

pytestmark = pytest.mark.e2e


AI_TICKET = str(Path(sys.executable).parent / "ai-ticket")
SLOW = (AI_TICKET, "fake-backend", "--tokens-per-second", "50", "--port")
QUICK = (sys.executable, str(ROOT / "tests/fake_process.py"))


class Fake:
    """A fake KoboldCPP in a process of its own, on a port that it keeps across restarts."""

    def __init__(self, command: tuple[str, ...]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = command
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen([*self._command, str(self.port)], stdout=subprocess.PIPE, cwd=ROOT)
        assert self._process.stdout is not None
        assert self._process.stdout.readline()

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def perf(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/api/extra/perf", timeout=PATIENCE, trust_env=False).json()
        return found


@contextmanager
def fakes(count: int, command: tuple[str, ...]) -> Iterator[list[Fake]]:
    started = [Fake(command) for _ in range(count)]
    try:
        yield started
    finally:
        for fake in started:
            fake.kill()


def gauge(daemon: Daemon, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{daemon.port('metrics')}/metrics", trust_env=False).text
    found = re.search(rf"^ai_ticket_{name} ([0-9.e+]+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


async def stream(client: httpx.AsyncClient, number: int) -> tuple[int, list[Any], str | None]:
    """A streamed event: its status, the data objects, and the code of an in-band error."""
    event = {"content": f"number {number}", "stream": True, "parameters": {"max_tokens": 30}}
    found: list[Any] = []
    async with client.stream("POST", "/event", json=event, headers=AUTH) as answer:
        if answer.status_code != 200:
            return answer.status_code, [json.loads(await answer.aread())], None
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
    return 200, found, found[-1].get("error") if found else "nothing"


def test_a_model_server_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    """What had no token yet is answered by the other; what had is told so; nothing is lost, doubled or hangs."""
    with (
        fakes(2, QUICK) as (one, two),
        running(tmp_path, KOBOLDCPP_API_URL=f"{one.url}|{two.url}", KOBOLDCPP_SLOTS="4") as daemon,
    ):
        daemon.ready()

        async def run() -> list[tuple[int, list[Any], str | None]]:
            gate = asyncio.Semaphore(8)
            outcomes: list[Any] = [None] * 200
            done = 0

            async def one_event(client: httpx.AsyncClient, number: int) -> None:
                nonlocal done
                async with gate:
                    outcomes[number] = await asyncio.wait_for(stream(client, number), PATIENCE)
                    done += 1
                    if done == 60:
                        one.kill()

            async with daemon.async_client() as client:
                await asyncio.gather(*(one_event(client, number) for number in range(200)))
            return outcomes

        outcomes = asyncio.run(run())
        assert len(outcomes) == 200
        cut = 0
        for status, objects, error in outcomes:
            assert status == 200, objects
            if error is None:
                assert [found["done"] for found in objects].count(True) == 1
                assert objects[-1]["done"]
            else:
                cut += 1
                assert error in ("api_connection_error", "api_response_structure_error")
                assert any(found.get("delta") for found in objects[:-1]), "it had a token"
        assert cut <= 4, "no more than the slots of the one that died"
        with daemon.client() as client:
            report = client.get("/health").json()
            assert report["status"] == "degraded"
            assert client.get("/health/ready").status_code == 200
            one.start()
            wait_until(lambda: client.get("/health").json()["status"] == "healthy", "the return of the one that died")
        for name in ("pipeline_queue_depth", "pipeline_in_flight"):
            assert gauge(daemon, name) == 0

        async def again() -> list[tuple[int, list[Any], str | None]]:
            async with daemon.async_client() as client:
                return list(await asyncio.gather(*(stream(client, number) for number in range(16))))

        before = one.perf()["total_gens"]
        assert all(error is None for _, _, error in asyncio.run(again()))
        assert one.perf()["total_gens"] > before, "it is used again"


async def leave_http1(daemon: Daemon, number: int, seconds: float) -> None:
    """Ask on a connection of its own, and close it."""
    _, writer = await open_connection(daemon, "http/1.1")
    body = event_to_leave(number)
    head = f"POST /event HTTP/1.1\r\nHost: x\r\nX-API-Key: {TOKEN}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await asyncio.sleep(seconds)
    writer.transport.abort()


class Http2Callers:
    """Callers that share one connection, and each reset their stream."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._h2.initiate_connection()
        self._writer = writer

    async def leave(self, number: int, seconds: float) -> None:
        await asyncio.sleep(seconds / 3)
        stream = self._h2.get_next_available_stream_id()
        head = [(":method", "POST"), (":path", "/event"), (":scheme", "https"), (":authority", "x")]
        self._h2.send_headers(stream, [*head, ("x-api-key", TOKEN), ("content-type", "application/json")])
        self._h2.send_data(stream, event_to_leave(number), end_stream=True)
        self._writer.write(self._h2.data_to_send())
        await asyncio.sleep(seconds)
        with suppress(h2.exceptions.ProtocolError):  # it may have been answered
            self._h2.reset_stream(stream)
        self._writer.write(self._h2.data_to_send())

    async def read(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65_536):
            for event in self._h2.receive_data(data):
                if isinstance(event, h2.events.DataReceived) and event.stream_id is not None:
                    with suppress(h2.exceptions.ProtocolError):
                        self._h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)


async def open_connection(daemon: Daemon, protocol: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.create_default_context(cafile=str(daemon.certificates.ca))
    context.set_alpn_protocols([protocol])
    return await asyncio.open_connection("127.0.0.1", daemon.port("https"), ssl=context, server_hostname="localhost")


def event_to_leave(number: int) -> bytes:
    return json.dumps({"content": "x", "stream": number % 2 == 0, "parameters": {"max_tokens": 500}}).encode()


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_a_hundred_callers_leave_at_random_moments(tmp_path: Path, http2: bool) -> None:
    """Within moments nothing runs and nothing waits, here and at the model server."""
    chance = random.Random(7)
    moments = [chance.uniform(0.0, 3.0) for _ in range(100)]
    with fakes(1, SLOW) as (fake,), running(tmp_path, KOBOLDCPP_API_URL=fake.url) as daemon:
        daemon.ready()

        async def run() -> None:
            if not http2:
                await asyncio.gather(*(leave_http1(daemon, number, moments[number]) for number in range(100)))
                return
            reader, writer = await open_connection(daemon, "h2")
            callers = Http2Callers(writer)
            reading = asyncio.ensure_future(callers.read(reader))
            await asyncio.gather(*(callers.leave(number, moments[number]) for number in range(100)))
            await asyncio.sleep(1.0)
            for name in ("pipeline_queue_depth", "pipeline_in_flight"):
                assert gauge(daemon, name) == 0, "the connection is still open"
            reading.cancel()
            writer.transport.abort()

        asyncio.run(run())
        for name in ("pipeline_queue_depth", "pipeline_in_flight"):
            wait_until(lambda name=name: gauge(daemon, name) == 0, name)  # type: ignore[misc]
        wait_until(lambda: fake.perf()["idle"] == 1 and fake.perf()["queue"] == 0, "an idle model server")
        with daemon.client() as client:
            event = {"content": "x", "parameters": {"max_tokens": 5}}
            assert client.post("/event", json=event, headers=AUTH).status_code == 200
