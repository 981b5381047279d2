"""Limits in the running service: exactly as many as they say, also where two services share them."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from daemon import PATIENCE, TOKEN, Daemon, ModelServer, model_server, running, wait_until
from msgspec import Struct
from redis_server import redis_server

pytestmark = pytest.mark.e2e

CALLERS = 50
BODY = json.dumps({"content": "x"}).encode()
REQUEST = (
    f"POST /event HTTP/1.1\r\nHost: x\r\nX-API-Key: {TOKEN}\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n"
).encode() + BODY


class Answer(Struct):
    status: int
    headers: dict[str, str]
    seconds: float


class Caller:
    """Asks on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self) -> Answer:
        asked = time.monotonic()
        self._writer.write(REQUEST)
        head = (await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), PATIENCE)).decode()
        status, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(status.split()[1]), headers, time.monotonic() - asked)

    def leave(self) -> None:
        self._writer.close()


async def callers(daemons: list[Daemon], count: int = CALLERS) -> list[Caller]:
    """So many, of each service in turn."""
    ports = [daemon.port("http") for daemon in daemons]
    return [Caller(*await asyncio.open_connection("127.0.0.1", ports[n % len(ports)])) for n in range(count)]


def ask_at_once(daemons: list[Daemon], times: int) -> list[Answer]:
    """What many callers are answered who all ask at once, each so many times."""

    async def one(caller: Caller) -> list[Answer]:
        found = [await caller.ask() for _ in range(times)]
        caller.leave()
        return found

    async def run() -> list[Answer]:
        answers = await asyncio.gather(*map(one, await callers(daemons)))
        return [answer for found in answers for answer in found]

    return asyncio.run(run())


def count(answers: list[Answer]) -> dict[int, int]:
    found = [answer.status for answer in answers]
    return {status: found.count(status) for status in set(found)}


def metric(daemon: Daemon, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{daemon.port('metrics')}/metrics", trust_env=False).text
    [value] = re.findall(rf"^ai_ticket_{re.escape(name)} ([0-9.e+]+)$", text, re.MULTILINE)
    return float(value)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as found:
        yield found


def limits(server: ModelServer, requests: int, seconds: float, **more: str) -> dict[str, str]:
    return {
        "KOBOLDCPP_API_URL": server.url,
        "KOBOLDCPP_SLOTS": "8",
        "RATE_LIMIT_REQUESTS": str(requests),
        "RATE_LIMIT_WINDOW_SECONDS": str(seconds),
        "OTEL_TRACES_EXPORTER": "none",
        **more,
    }


def test_fifty_callers_get_the_limit_and_no_more(tmp_path: Path, server: ModelServer) -> None:
    with running(tmp_path, **limits(server, 120, 60)) as daemon:
        daemon.ready()
        began = time.monotonic()
        answers = ask_at_once([daemon], 4)
        seconds = time.monotonic() - began
        assert seconds < 30
        assert count(answers) == {200: 120, 429: 80}
        assert len(server.requests) == 120
        for answer in answers:
            policy = dict(re.findall(r"(\w)=(\d+)", answer.headers["ratelimit-policy"]))
            assert policy == {"q": "120", "w": "60"}
            remaining = int(dict(re.findall(r"(\w)=(\d+)", answer.headers["ratelimit"]))["r"])
            assert remaining == 0 if answer.status == 429 else 0 <= remaining < 120
            if answer.status == 429:
                assert 60 - seconds <= int(answer.headers["retry-after"]) <= 60
        assert metric(daemon, 'server_rate_limited_total{reason="quota"}') == 80


def admitted_at(daemon: Daemon) -> list[float]:
    """When those requests came that were let in, by the service's own clock."""
    lines = [line for line in daemon.logged("POST /event") if line["status"] == 200]
    return sorted(datetime.fromisoformat(line["time"]).timestamp() - line["duration"] for line in lines)


def test_no_span_of_time_has_more(tmp_path: Path, server: ModelServer) -> None:
    """Callers who never stop asking get 20 in every 2 s wherever those begin, and lose none of them."""
    limit, window, windows = 20, 2.0, 4
    with running(tmp_path, **limits(server, limit, window)) as daemon:
        daemon.ready()

        async def one(caller: Caller, end: float) -> list[Answer]:
            found = []
            while time.monotonic() < end:
                found.append(await caller.ask())
                await asyncio.sleep(0.1)
            caller.leave()
            return found

        async def run() -> list[Answer]:
            asking = await callers([daemon])
            end = time.monotonic() + windows * window + window / 2
            answers = await asyncio.gather(*(one(caller, end) for caller in asking))
            return [answer for found in answers for answer in found]

        answers = asyncio.run(run())
        times = wait_until(
            lambda: found if len(found := admitted_at(daemon)) >= count(answers)[200] else None, "access lines"
        )
    admitted = count(answers)[200]
    assert limit * windows < admitted <= limit * (windows + 1)
    assert count(answers) == {200: admitted, 429: len(answers) - admitted}
    assert len(answers) > 10 * admitted, "they asked all the time"
    # A busy machine may hold up a request between its arrival, which is what is logged, and its admission.
    shortest = min(later - earlier for earlier, later in zip(times, times[limit:], strict=False))
    assert window - 0.05 < shortest < window + 0.5


def test_two_services_share_one_limit_and_go_on_without_redis(tmp_path: Path, server: ModelServer) -> None:
    with redis_server(tmp_path) as redis, ExitStack() as stack:
        settings = limits(server, 120, 60, RATE_LIMIT_BACKEND="redis", REDIS_URL=redis.url)
        daemons = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            daemons.append(stack.enter_context(running(tmp_path / name, **settings)))
        for daemon in daemons:
            daemon.ready()
            assert metric(daemon, "rate_limit_redis_up") == 1
        assert count(ask_at_once(daemons, 4)) == {200: 120, 429: 80}

        redis.kill()
        answers = ask_at_once(daemons, 6)
        assert count(answers) == {200: 240, 429: 60}, "each counts for itself, from nothing"
        assert max(answer.seconds for answer in answers) < 5.0
        for daemon in daemons:
            wait_until(lambda daemon=daemon: metric(daemon, "rate_limit_redis_up") == 0, "it knows")  # type: ignore[misc]
            [line] = daemon.logged("is away, calls are counted in memory")
            assert line["level"] == "WARN"

        redis.start()
        for daemon in daemons:
            wait_until(lambda daemon=daemon: metric(daemon, "rate_limit_redis_up") == 1, "its return")  # type: ignore[misc]
            assert len(daemon.logged("is back, calls are counted there again")) == 1
        assert count(ask_at_once(daemons, 4)) == {200: 120, 429: 80}, "the new server knows of no call"
