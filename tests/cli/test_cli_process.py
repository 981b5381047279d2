"""The client as a process of its own: its reactor, its exit statuses, signals, and what comes out where."""

import os
import pty
import signal
from contextlib import suppress

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.threads import deferToThread

ANSWER = {"completion": "Hello.", "finish_reason": "stop", "request_id": "r-1"}


@pytest.fixture
def connection(service, cacert):
    return "--url", service.url, "--cacert", cacert


def end(process):
    """Wait for its end, beside the reactor that serves it."""

    def wait():
        out, err = process.communicate()
        return process.returncode, out.decode() if out else "", err.decode() if err else ""

    return deferToThread(wait)


@ensureDeferred
async def test_a_completion(service, connection, start):
    """A prompt on stdin, the completion on stdout, nothing else said."""
    service.replies(200, ANSWER)
    reading, writing = os.pipe()
    os.write(writing, b"hi")
    os.close(writing)
    process = start("send", *connection, stdin=reading)
    os.close(reading)
    assert await end(process) == (0, "Hello.\n", "")
    assert service.bodies == [{"content": {"prompt": "hi"}}]


@ensureDeferred
async def test_a_completion_that_the_locale_cannot_write(service, connection, start, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    service.replies(200, ANSWER | {"completion": "é"})
    assert await end(start("send", "hi", *connection)) == (0, "\\xe9\n", "")


@ensureDeferred
async def test_an_error(service, connection, start):
    fields = {"error": "overloaded", "message": "Too many.", "details": None, "request_id": "r-1"}
    service.replies(503, fields, Retry_After="3")
    status, out, err = await end(start("send", "hi", *connection))
    assert (status, out) == (75, "")
    assert err == "error: overloaded: Too many.\n  request id: r-1\n  try again in 3 s\n"


@ensureDeferred
async def test_health(service, connection, start):
    service.replies(503, {"status": "draining", "shutdown_initiated": True, "backends": {}})
    assert await end(start("health", *connection)) == (1, "status: draining\n", "")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@ensureDeferred
async def test_signals(number, expected, service, connection, start):
    """Ctrl-C hangs up at once, and no traceback is shown."""
    service.is_silent()
    process = start("send", "hi", *connection)
    await service.asked
    process.send_signal(number)
    assert await end(process) == (expected, "", "")


@ensureDeferred
async def test_the_spinner_of_an_interrupted_command(service, connection, start):
    """It shows on a terminal, and Ctrl-C gives the cursor back."""
    service.is_silent()
    terminal, stderr = pty.openpty()
    process = start("send", "hi", *connection, stderr=stderr)
    os.close(stderr)
    await service.asked
    process.send_signal(signal.SIGINT)
    status, out, _ = await end(process)
    shown = _drain(terminal)
    assert (status, out) == (130, "")
    assert "waiting for the completion" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def _drain(terminal):
    content = b""
    with suppress(OSError):  # the way a terminal ends whose other side is closed
        while True:
            content += os.read(terminal, 65536)
    os.close(terminal)
    return content.decode()
