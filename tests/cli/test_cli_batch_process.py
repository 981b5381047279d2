"""`ai-ticket batch` as a process of its own: killed and resumed, interrupted, between pipes."""

import json
import os
import signal
import subprocess
from collections import Counter

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

LINES = 600


@pytest.fixture
def connection(service, cacert):
    return "--url", service.url, "--cacert", cacert


@pytest.fixture
def events(tmp_path):
    """An input with a blank line, so that events and lines are not the same."""
    lines = [json.dumps({"content": f"event {number}"}) for number in range(LINES)]
    lines[100] = ""
    (tmp_path / "in").write_text("\n".join(lines))


def end(process):
    """Wait for its end, beside the reactor that serves it."""

    def wait():
        out, err = process.communicate()
        return process.returncode, out.decode() if out else "", err.decode() if err else ""

    return deferToThread(wait)


def results(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]


class Model:
    """Answers each event by what it says; of every so many one is refused for now, or fails."""

    def __init__(self, service):
        self.service = service
        self.answered = Counter()
        self.until = None
        service.answer = self.answer

    def after(self, number):
        """Fires when it has answered so many in all."""
        self.until = number, Deferred()
        return self.until[1]

    def answer(self, request):
        content = self.service.bodies[-1]["content"]
        number = int(content.split()[1])
        self.answered[number] += 1
        if self.until is not None and self.answered.total() == self.until[0]:
            self.until[1].callback(None)
        fields = {"index": 0, "status": 200, "completion": f"answer {number}", "usage": {"completion_tokens": 1}}
        if number % 50 == 7:
            fields = {"index": 0, "status": 422, "error": "prompt_extraction_failed", "message": "No."}
        if number == 60 and self.answered[number] == 1:
            fields = {"index": 0, "status": 503, "error": "overloaded", "message": "No.", "retry_after": 1}
        return json.dumps(fields).encode() + b"\n"


@pytest.mark.e2e
@ensureDeferred
async def test_killed_twice_and_resumed(service, connection, events, start, tmp_path):
    """Every event has one answer in the end, its own; and few were sent twice: those under way when it was killed."""
    model = Model(service)
    command = "batch", "in", "out", *connection, "--concurrency", "8"
    for killed_after in (150, 400):
        reached = model.after(killed_after)
        process = start(*command)
        await reached
        process.kill()
        assert (await end(process))[0] == -signal.SIGKILL
    with (tmp_path / "out").open("ab") as output:
        output.write(b'{"index": 599, "stat')  # as if it had been killed while it wrote
    status, out, err = await end(start(*command))
    assert (status, out) == (1, "")
    found = results(tmp_path)
    assert sorted(result["index"] for result in found) == [*range(100), *range(101, LINES)]
    for result in found:
        failed = result["index"] % 50 == 7
        assert result["status"] == (422 if failed else 200)
        assert failed or result["completion"] == f"answer {result['index']}"
    assert "skipped as already done" in err
    assert "--retry-failed sends the 12 that failed again" in err
    twice = [number for number, times in model.answered.items() if times > 1]
    assert len(twice) <= 2 * 8 + 1

    status, _, err = await end(start(*command))
    assert (status, err.splitlines()[0]) == (
        1,
        "0 answered, 0 failed, 599 skipped as already done (12 of them failed)",
    )

    before = model.answered.total()
    service.replies(200, {"index": 0, "status": 200, "completion": "at last"})
    status, _, err = await end(start(*command, "--retry-failed"))
    assert (status, err.splitlines()[0]) == (0, "12 answered, 0 failed, 587 skipped as already done")
    assert model.answered.total() == before
    found = results(tmp_path)
    assert sorted(result["index"] for result in found) == [*range(100), *range(101, LINES)]
    assert {result["status"] for result in found} == {200}


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@ensureDeferred
async def test_interrupted(number, expected, service, connection, events, start, tmp_path):
    service.is_silent()
    process = start("batch", "in", "out", *connection)
    await service.asked
    process.send_signal(number)
    status, out, err = await end(process)
    assert (status, out) == (expected, "")
    assert err.splitlines()[-1] == "stopped with 599 events to go: the same command goes on from here"
    assert results(tmp_path) == []


@ensureDeferred
async def test_a_token_that_is_not_valid(service, connection, events, start):
    service.replies(401, {"error": "unauthorised", "message": "No.", "details": None, "request_id": "r-1"})
    status, out, err = await end(start("batch", "in", "out", *connection))
    assert (status, out) == (1, "")
    assert "stopped with 599 events to go" in err
    assert "error: unauthorised: No." in err
    assert len(service.requests) <= 16


@ensureDeferred
async def test_between_pipes(service, connection, start):
    """An event is sent when it has come, though its line's successor has not, and its answer goes out at once."""
    Model(service)
    process = start("batch", "-", "-", *connection, stdin=subprocess.PIPE)
    for number in (1, 2):
        os.write(process.stdin.fileno(), b'{"content": "event %d"}\n' % number)
        line = await deferToThread(process.stdout.readline)
        assert json.loads(line)["completion"] == f"answer {number}"
    os.write(process.stdin.fileno(), b'{"content": "event 3"}')
    status, out, err = await end(process)
    assert status == 0
    assert json.loads(out)["completion"] == "answer 3"
    assert "can't be resumed" in err
    assert "3 answered, 0 failed" in err


@ensureDeferred
async def test_stdin_that_is_a_file(service, connection, events, start, tmp_path):
    Model(service)
    with (tmp_path / "in").open("rb") as source:
        status, _, _ = await end(start("batch", "-", "out", *connection, stdin=source))
    assert status == 1
    assert len(results(tmp_path)) == 599


@ensureDeferred
async def test_a_reader_that_has_gone(service, connection, events, start):
    """As of `head`."""
    Model(service)
    process = start("batch", "in", "-", *connection)
    await deferToThread(process.stdout.readline)
    process.stdout.close()
    status = await deferToThread(process.wait)
    assert status == 1
    assert b"Traceback" not in process.stderr.read()
