"""`ai-ticket send --stream` against a service on this machine."""

import io
import json
import os
import signal
import sys

import pytest
from pytest_twisted import ensureDeferred
from treq.testing import StubTreq
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.internet.tcp import Client
from twisted.internet.threads import deferToThread
from twisted.web.server import NOT_DONE_YET

from ai_ticket.cli.arguments import parser
from ai_ticket.cli.http import make_client
from ai_ticket.cli.outcome import CommandError
from ai_ticket.cli.send import make_event, send
from ai_ticket.cli.service import locate

END = {"delta": "", "done": True, "finish_reason": "stop", "model": "m", "request_id": "r-1"}
OVERLOADED = {"error": "overloaded", "message": "No.", "details": "$.x", "request_id": "r-1"}


def data(*objects):
    return b"".join(b"data: %s\n\n" % json.dumps(fields).encode() for fields in objects)


def deltas(*texts):
    return data(*({"delta": text, "done": False} for text in texts))


def fault(fields):
    return b"event: error\n" + data(fields)


class Stream:
    """A streamed answer that a test writes piece by piece."""

    def __init__(self, service):
        self.begun = Deferred()
        service.answer = self._begin

    def _begin(self, request):
        self.request = request
        request.setHeader("Content-Type", "text/event-stream; charset=utf-8")
        request.setHeader("X-Request-ID", "r-0")
        self.gone = request.notifyFinish()
        self.gone.addErrback(lambda _: None)
        self.begun.callback(None)
        return NOT_DONE_YET


def streams(service, body):
    """Answer with this stream, at once."""
    stream = Stream(service)

    def write(_):
        stream.request.write(body)
        stream.request.finish()

    stream.begun.addCallback(write)


@pytest.fixture
def ask(service, cacert):
    """Sends a prompt to the service, for a stream, with these options."""

    async def ask(*arguments, clock=reactor, client=None):
        given = ["--stream", "--url", service.url, "--cacert", cacert, *arguments]
        options = parser().parse_args(["send", "hi", *given])
        where = locate(options, with_token=True)
        event = make_event(options, options.prompt)
        return await send(clock, client or make_client(reactor, where), where, event, as_json=options.json)

    return ask


def no_client_connected():
    return not any(isinstance(reader, Client) for reader in reactor.getReaders())


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await deferLater(reactor, 0.01)
    pytest.fail("waited in vain")


@ensureDeferred
async def test_the_text_as_it_comes(service, ask, capsys):
    """Each piece at once, wherever the chunks are split; keep-alives are not shown."""
    stream = Stream(service)
    asked = Deferred.fromCoroutine(ask())
    await stream.begun
    out = ""

    async def shows(written, text):
        nonlocal out
        stream.request.write(written)
        expected = out + text

        def shown():
            nonlocal out
            out += capsys.readouterr().out
            return out == expected

        await until(shown)

    euro = b'data: {"delta": "\xe2\x82\xac", "done": false}\n\n'
    await shows(b": keep-alive\n\n" + deltas("Hel"), "Hel")
    await shows(deltas("lo\n") + euro[:18], "lo\n")
    await shows(euro[18:] + b": keep-alive\n\n", "€")
    stream.request.write(data(END))
    stream.request.finish()
    assert await asked == 0
    assert capsys.readouterr() == ("\n", "")
    assert service.bodies == [{"content": {"prompt": "hi"}, "stream": True}]
    assert service.requests[0].getHeader("Accept") == "text/event-stream, application/json"


@pytest.mark.parametrize(
    ("texts", "shown"), [(["a"], "a\n"), (["a\n"], "a\n"), (["a\n", "", "b\n\n"], "a\nb\n\n"), ([], "\n")]
)
@ensureDeferred
async def test_the_end_of_the_last_line(texts, shown, service, ask, capsys):
    streams(service, deltas(*texts) + data(END))
    assert await ask() == 0
    assert capsys.readouterr() == (shown, "")


@ensureDeferred
async def test_the_end_counts_not_the_connections(service, ask, capsys):
    """After the end nothing is waited for, and what else comes is not shown."""
    stream = Stream(service)
    stream.begun.addCallback(lambda _: stream.request.write(deltas("a") + data(END) + deltas("b")))
    assert await ask() == 0
    assert capsys.readouterr() == ("a\n", "")
    stream.request.write(deltas("c"))
    stream.request.finish()
    await until(no_client_connected)
    assert capsys.readouterr() == ("", "")


@ensureDeferred
async def test_a_cut_completion_is_told(service, ask, capsys):
    streams(service, deltas("a") + data(END | {"finish_reason": "length"}))
    assert await ask() == 0
    assert capsys.readouterr() == ("a\n", "note: the completion was cut at max_tokens\n")


@ensureDeferred
async def test_json_lines(service, ask, capsys):
    """Each object as it is, also with fields that are unknown here."""
    objects = [{"delta": "a\nb €", "done": False, "more": [1]}, {"delta": "", "done": False}, END | {"metadata": {}}]
    streams(service, data(*objects))
    assert await ask("--json") == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.split("\n")[:-1]] == objects
    assert captured.out.endswith("\n")
    assert captured.err == ""


@pytest.mark.parametrize(
    ("code", "exit_status"),
    [
        ("overloaded", 75),
        ("shutting_down", 75),
        ("no_backend_available", 75),
        ("api_rate_limited", 75),
        ("rate_limited", 75),
        ("deadline_exceeded", 75),
        ("api_response_structure_error", 1),
        ("api_connection_error", 1),
        ("internal_error", 1),
        ("not_heard_of", 1),
    ],
)
@ensureDeferred
async def test_errors_in_the_stream(code, exit_status, service, ask, capsys):
    fields = OVERLOADED | {"error": code}
    streams(service, deltas("Hel") + fault(fields))
    with pytest.raises(CommandError) as raised:
        await ask()
    error = raised.value
    assert error.status == exit_status
    assert (error.code, error.message, error.details, error.request_id) == (code, "No.", "$.x", "r-1")
    assert json.loads(error.to_json()) == fields
    assert capsys.readouterr() == ("Hel\n", "")


@pytest.mark.parametrize(("texts", "shown"), [([], ""), (["a\n"], "a\n"), (["a"], "a\n")])
@pytest.mark.parametrize("end", [fault(OVERLOADED), b"", b'data: {"delta": "", "done": true'])
@ensureDeferred
async def test_an_error_begins_a_line_of_its_own(texts, shown, end, service, ask, capsys):
    streams(service, b": keep-alive\n\n" + deltas(*texts) + end)
    with pytest.raises(CommandError):
        await ask()
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("abort", [False, True])
@ensureDeferred
async def test_a_stream_without_its_end(abort, service, ask, capsys):
    """Whether the body ends or the connection breaks."""
    stream = Stream(service)
    asked = Deferred.fromCoroutine(ask())
    await stream.begun
    stream.request.write(deltas("Hel"))
    await until(lambda: capsys.readouterr().out == "Hel")
    if abort:
        stream.request.transport.abortConnection()
    else:
        stream.request.finish()
    with pytest.raises(CommandError, match="broke off before its end") as raised:
        await asked
    assert (raised.value.code, raised.value.status, raised.value.request_id) == ("stream_cut", 1, "r-0")
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    "piece", [b"[DONE]", b"[]", b"\xff", b"[" * 100_000, b'{"delta": null}', b"{}", b"x" * 1_100_000]
)
@ensureDeferred
async def test_a_stream_of_something_else(piece, service, ask, capsys):
    streams(service, deltas("Hel") + b"data: " + piece + b"\n\n")
    with pytest.raises(CommandError) as raised:
        await ask()
    assert (raised.value.code, raised.value.status) == ("not_the_service", 1)
    assert capsys.readouterr().out == "Hel\n"


@pytest.mark.parametrize(("status", "exit_status"), [(422, 1), (429, 75), (503, 75)])
@ensureDeferred
async def test_an_error_before_the_stream(status, exit_status, service, ask, capsys):
    service.replies(status, OVERLOADED, Retry_After="7")
    with pytest.raises(CommandError) as raised:
        await ask()
    assert (raised.value.status, raised.value.retry_after) == (exit_status, 7)
    assert raised.value.answer == OVERLOADED
    assert capsys.readouterr().out == ""


@ensureDeferred
async def test_a_service_that_does_not_stream(service, ask, capsys):
    service.replies(200, {"completion": "Hello.", "finish_reason": "length"})
    assert await ask() == 0
    assert capsys.readouterr() == ("Hello.\n", "note: the completion was cut at max_tokens\n")


@ensureDeferred
async def test_the_time_limit_has_the_stream_in_it(service, ask, capsys):
    """Though pieces come all the time."""
    stream = Stream(service)
    clock, stub = Clock(), StubTreq(service)
    asked = Deferred.fromCoroutine(ask("--timeout", "5", clock=clock, client=stub))
    stub.flush()
    for _ in range(4):
        clock.advance(1)
        stream.request.write(deltas("a"))
        stub.flush()
    assert not asked.called
    clock.advance(1)
    with pytest.raises(CommandError, match="within 5 s") as raised:
        await asked
    assert raised.value.status == 75
    assert capsys.readouterr().out == "aaaa\n"
    assert clock.getDelayedCalls() == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@ensureDeferred
async def test_the_spinner_goes_when_the_text_comes(service, ask, monkeypatch):
    """Both on one terminal: it must not be drawn over the text, nor the text drive the terminal."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    streams(service, b": keep-alive\n\n" + data({"delta": "", "done": False}) + deltas("Hel\x1b[2J", "lo") + data(END))
    assert await ask() == 0
    before, text = terminal.getvalue().split("Hel", 1)
    assert "waiting for the completion 0 s" in before
    assert text == "\\x1b[2Jlo\n"


@ensureDeferred
async def test_a_reader_that_has_gone(service, ask, monkeypatch):
    """The service is told at once, that it need not go on."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    stream = Stream(service)
    asked = Deferred.fromCoroutine(ask())
    await stream.begun
    stream.request.write(deltas("a"))
    with pytest.raises(BrokenPipeError):
        await asked
    await stream.gone
    await until(no_client_connected)


# As a process of its own.


def end(process):
    """Wait for its end, beside the reactor that serves it."""

    def wait():
        out, err = process.communicate()
        return process.returncode, out.decode(), err.decode()

    return deferToThread(wait)


@pytest.fixture
def run(start, service, cacert):
    return lambda *arguments: start("send", "hi", "--stream", "--url", service.url, "--cacert", cacert, *arguments)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@ensureDeferred
async def test_signals(number, expected, service, run):
    """Ctrl-C hangs up; what had come by then had been written."""
    stream = Stream(service)
    process = run()
    await stream.begun
    stream.request.write(deltas("Hel"))
    assert await deferToThread(os.read, process.stdout.fileno(), 100) == b"Hel"
    process.send_signal(number)
    assert await end(process) == (expected, "\n", "")
    await stream.gone


@ensureDeferred
async def test_a_reader_that_goes(service, run):
    stream = Stream(service)
    process = run()
    await stream.begun
    stream.request.write(deltas("Hel"))
    assert await deferToThread(os.read, process.stdout.fileno(), 100) == b"Hel"
    process.stdout.close()
    stream.request.write(deltas("lo"))
    assert await deferToThread(process.wait) == 1
    assert process.stderr.read() == b""
    await stream.gone


@ensureDeferred
async def test_a_slow_reader(service, run):
    """All of it comes out; meanwhile the connection is not read."""
    texts = ["x" * 1000 + "\n"] * 1000
    streams(service, deltas(*texts) + data(END))
    process = run()
    await service.asked
    await deferLater(reactor, 0.5)
    assert process.poll() is None
    assert await end(process) == (0, "".join(texts), "")


@ensureDeferred
async def test_an_error_as_the_last_line_of_json(service, run):
    first = {"delta": "Hel", "done": False}
    streams(service, data(first) + fault(OVERLOADED))
    status, out, err = await end(run("--json"))
    assert status == 75
    assert [json.loads(line) for line in out.splitlines()] == [first, OVERLOADED]
    assert err == "error: overloaded: No.\n  $.x\n  request id: r-1\n"
