"""Fair turns in the running service."""

import asyncio
import json
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from daemon import PATIENCE, ROOT, TOKEN, Daemon, running

pytestmark = pytest.mark.e2e

EVENTS = 1000
SERVICE_SECONDS = 0.5
TOKENS_PER_SECOND = 50


@contextmanager
def fake_backend() -> Iterator[str]:
    """A model server with a single slot."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    ai_ticket = str(Path(sys.executable).parent / "ai-ticket")
    command = [ai_ticket, "fake-backend", "--tokens-per-second", str(TOKENS_PER_SECOND), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def request(token: str) -> bytes:
    body = json.dumps({"content": "x", "parameters": {"max_tokens": int(TOKENS_PER_SECOND * SERVICE_SECONDS)}}).encode()
    head = f"POST /event HTTP/1.1\r\nHost: x\r\nX-API-Key: {token}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def queue_depth(daemon: Daemon) -> float:
    text = httpx.get(f"http://127.0.0.1:{daemon.port('metrics')}/metrics", trust_env=False, timeout=PATIENCE).text
    found = re.search(r"^ai_ticket_pipeline_queue_depth ([0-9.]+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * EVENTS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_single_question_beside_a_thousand_events(tmp_path: Path, many_files: None) -> None:
    """It waits for less than two events."""
    with (
        fake_backend() as url,
        running(
            tmp_path,
            KOBOLDCPP_API_URL=url,
            AI_TICKET_AUTH_TOKEN=f"{TOKEN},another",
            QUEUE_LIMIT=str(2 * EVENTS),
            MAX_CONNECTIONS_PER_CLIENT=str(2 * EVENTS),
            RATE_LIMIT_REQUESTS="0",
            REQUEST_TIMEOUT_SECONDS="3600",
        ) as daemon,
    ):
        daemon.ready()
        port = daemon.port("http")

        async def run() -> float:
            noisy = [await asyncio.open_connection("127.0.0.1", port) for _ in range(EVENTS)]
            for _, writer in noisy:
                writer.write(request(TOKEN))
            end = time.monotonic() + PATIENCE
            while queue_depth(daemon) < EVENTS - 10:
                assert time.monotonic() < end
                await asyncio.sleep(0.1)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            asked = time.monotonic()
            writer.write(request("another"))
            answer = await reader.readline()
            seconds = time.monotonic() - asked
            assert b" 200 " in answer
            for _, one in noisy:
                one.transport.abort()
            writer.transport.abort()
            return seconds

        assert asyncio.run(run()) < 3 * SERVICE_SECONDS, "two of waiting, and its own"
