"""The real daemon is stopped in the midst of a crowd: whoever was let in gets an answer."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from crowd import Crowd, Model, model, until
from daemon import PATIENCE, Daemon, running

pytestmark = pytest.mark.e2e
RESTARTS = 3


@asynccontextmanager
async def serving(folder: Path, **environ: str) -> AsyncIterator[tuple[Daemon, Model]]:
    async with model() as backend:
        with running(
            folder, KOBOLDCPP_API_URL=backend.url, KOBOLDCPP_SLOTS="8", OTEL_TRACES_EXPORTER="none", **environ
        ) as daemon:
            await until(lambda: daemon.logged("is up"), "the model server")
            yield daemon, backend


async def ended(daemon: Daemon) -> int:
    return await asyncio.get_running_loop().run_in_executor(None, daemon.wait)


def report(daemon: Daemon) -> dict[str, int]:
    """What the last of our lines says; and it is true, by the access lines since the stop."""
    [line] = daemon.logged("stopped:")
    lines = daemon.lines
    [begun] = [number for number, each in enumerate(lines) if each["message"].startswith("stopping:")]
    answered = [each for each in lines[begun:] if each["message"].startswith("POST ")]
    told = [each for each in answered if each.get("error") == "shutting_down"]
    assert line["cut"] + line["refused"] >= len(told)
    assert line["finished"] == len([each for each in answered if "error" not in each])
    assert line["finished"] + line["cut"] + line["refused"] + line["left"] >= lines[begun]["count"]
    return line


async def crowded(tasks: list[asyncio.Task[None]]) -> None:
    done, late = await asyncio.wait(tasks, timeout=PATIENCE)
    for task in late:
        task.cancel()
    for task in done:
        task.result()
    assert not late, "a caller hangs"


def test_whoever_was_let_in_is_answered(tmp_path: Path) -> None:
    """32 callers and their streams, on new and kept connections, in both versions of HTTP."""

    async def run() -> None:
        async with serving(tmp_path) as (daemon, backend):
            crowd = Crowd(daemon)
            tasks = crowd.gather()
            assert len(tasks) == 32
            await until(lambda: crowd.answers["200"] > 100, "a hundred answers")
            kept = await asyncio.open_connection("127.0.0.1", crowd.port, ssl=crowd.tls)
            assert await crowd.ask_http1(*kept, stream=True)
            daemon.signal(signal.SIGTERM)
            told = time.monotonic()
            await until(lambda: daemon.logged("stopping:"), "the stop")
            assert not await crowd.ask_http1(*kept, stream=False)
            kept[1].close()
            await crowded(tasks)
            assert await ended(daemon) == 0
            assert time.monotonic() - told < 10
            assert set(crowd.answers) <= {"200", "503 shutting_down", "refused"}
            assert crowd.answers["503 shutting_down"] > 0
            found = report(daemon)
            assert found["cut"] == found["left"] == 0
            assert found["finished"] > 0
            assert backend.left == 0
            assert backend.under_way == 0

    asyncio.run(run())


def test_during_the_delay_all_are_served(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, SHUTDOWN_DELAY_SECONDS="1.5") as (daemon, _):
            crowd = Crowd(daemon)
            tasks = crowd.gather(1)
            await until(lambda: crowd.answers["200"] > 20, "some answers")
            daemon.signal(signal.SIGTERM)
            told = time.monotonic()
            await until(lambda: daemon.logged("stopping:"), "the stop")
            async with crowd.client() as client:
                health = await client.get("/health")
                assert (health.status_code, health.json()["status"]) == (503, "draining")
                assert (await client.get("/health/ready")).status_code == 503
            before = crowd.answers["200"]
            while time.monotonic() < told + 1.2:
                assert set(crowd.answers) == {"200"}
                await asyncio.sleep(0.05)
            assert crowd.answers["200"] > before
            await crowded(tasks)
            assert await ended(daemon) == 0
            assert set(crowd.answers) <= {"200", "503 shutting_down", "refused"}
            assert report(daemon)["cut"] == 0

    asyncio.run(run())


def test_a_grace_period_that_is_too_short(tmp_path: Path) -> None:
    """Who has some of an answer is told in it, the others by a 503, and the model server by the end of its streams."""

    async def run() -> None:
        async with serving(tmp_path, SHUTDOWN_GRACE_SECONDS="1") as (daemon, backend):
            crowd = Crowd(daemon, max_tokens=300)
            tasks = crowd.gather(2)
            await until(lambda: backend.under_way == 8, "all slots at work")
            await asyncio.sleep(0.3)
            daemon.signal(signal.SIGTERM)
            told = time.monotonic()
            await crowded(tasks)
            assert await ended(daemon) == 0
            assert time.monotonic() - told < 5
            assert set(crowd.answers) <= {"503 shutting_down", "in-band shutting_down", "refused"}
            assert crowd.answers["503 shutting_down"] > 0
            assert crowd.answers["in-band shutting_down"] > 0
            found = report(daemon)
            assert found["finished"] == found["left"] == 0
            assert found["cut"] >= 16 + 8, "what was asked, on HTTP/2 twice at a time"
            assert (backend.ended, backend.left, backend.under_way) == (0, 8, 0)
            assert backend.aborted == 8

    asyncio.run(run())


def test_a_second_signal_cuts_at_once_and_the_log_says_so(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as (daemon, backend):
            crowd = Crowd(daemon, max_tokens=300)
            tasks = crowd.gather(1)
            await until(lambda: backend.under_way == 8, "all slots at work")
            daemon.signal(signal.SIGTERM)
            await until(lambda: daemon.logged("stopping:"), "the stop")
            await asyncio.sleep(0.5)
            told = time.monotonic()
            daemon.signal(signal.SIGTERM)
            assert await ended(daemon) == 0
            assert time.monotonic() - told < 2
            await asyncio.wait(tasks)
            for task in tasks:
                task.exception()  # what they ask now may find the connection closed
            assert set(crowd.answers) <= {"503 shutting_down", "in-band shutting_down", "refused"}
            found = report(daemon)
            assert (found["finished"], found["cut"]) == (0, 8 + 4)
            await until(lambda: backend.left == 8, "the end of the generations")

    asyncio.run(run())


@pytest.mark.parametrize("lines", [False, True], ids=["array", "lines"])
def test_a_batch_says_where_it_stopped(tmp_path: Path, lines: bool) -> None:
    """Its events that have begun finish, the others are told."""

    async def run() -> None:
        async with serving(tmp_path) as (daemon, backend):
            crowd = Crowd(daemon, max_tokens=50)
            event = crowd.body(stream=False)
            kind = "application/x-ndjson" if lines else "application/json"
            body = b"\n".join([event] * 40) if lines else b"[" + b",".join([event] * 40) + b"]"
            async with crowd.client() as client:
                asking = asyncio.ensure_future(
                    client.post("/events", content=body, headers={"content-type": kind, "accept": kind})
                )
                await until(lambda: backend.ended >= 8 and backend.under_way == 8, "some of its events")
                begun = backend.begun
                daemon.signal(signal.SIGTERM)
                answer = await asking
            assert await ended(daemon) == 0
            found = [json.loads(line) for line in answer.text.splitlines()] if lines else answer.json()
            assert sorted(result["index"] for result in found) == list(range(40))
            told = [(result["error"], result["retry_after"]) for result in found if result["status"] != 200]
            assert told == [("shutting_down", 5)] * (40 - backend.begun)
            assert begun <= backend.begun <= begun + 8
            assert backend.left == 0

    asyncio.run(run())


def test_restarts_with_a_socket_that_is_passed_refuse_nobody(tmp_path: Path) -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as held:
            async with model() as backend:
                environ = {"KOBOLDCPP_API_URL": backend.url, "KOBOLDCPP_SLOTS": "8", "OTEL_TRACES_EXPORTER": "none"}
                crowd: Crowd | None = None
                tasks: list[asyncio.Task[None]] = []
                authority = None
                for number in range(RESTARTS + 1):
                    folder = tmp_path / str(number)
                    folder.mkdir()
                    if authority is not None:
                        environ |= {"TLS_CERT_FILE": authority[0], "TLS_KEY_FILE": authority[1]}
                    with running(folder, listening={"https": held}, **environ) as daemon:
                        await until(lambda: daemon.logged("is up"), "the model server")
                        if crowd is None:
                            authority = str(daemon.certificates.certificate), str(daemon.certificates.key)
                            assert daemon.port("https") == held.getsockname()[1]
                            crowd = Crowd(daemon)
                            tasks = crowd.gather()
                        crowd.answers["200"] = 0
                        await until(partial(crowd.answered, 50), "some answers")
                        if number == RESTARTS:
                            crowd.closed_by_us = True
                            await crowded(tasks)
                        daemon.signal(signal.SIGTERM)
                        assert await ended(daemon) == 0
                        assert report(daemon)["cut"] == 0
                assert crowd is not None
                assert set(crowd.answers) <= {"200", "503 shutting_down"}

    asyncio.run(run())
