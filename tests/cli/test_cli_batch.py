"""`ai-ticket batch`: what goes out, how much at a time, and how it ends."""

import json

import pytest
import trustme
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers
from twisted.web.server import NOT_DONE_YET

from ai_ticket.cli import main
from ai_ticket.cli.arguments import parser
from ai_ticket.cli.batch import batch, connected
from ai_ticket.cli.batch_input import Line, Survey
from ai_ticket.cli.batch_output import Done, Output
from ai_ticket.cli.http import Answer
from ai_ticket.cli.outcome import CommandError
from ai_ticket.cli.service import locate


def result(status=200, **more):
    return {"index": 0, "status": status, "completion": "Hello."} | more


class Source:
    """A million lines, less what was taken."""

    def __init__(self, *contents):
        self.taken = 0
        self.contents = contents

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.taken == (len(self.contents) or 1_000_000):
            raise StopAsyncIteration
        self.taken += 1
        content = self.contents[self.taken - 1] if self.contents else b"%d" % (self.taken - 1)
        return Line(self.taken - 1, content)


class Run:
    """A batch with a service and files that are all in memory."""

    def __init__(self, source, *arguments, done=None, surveyed=True):
        self.clock = Clock()
        self.asked = {}
        self.source = source
        self.written = []
        self.broken = CancelledError()
        lines = len(source.contents) or 1_000_000
        self.finished = Deferred.fromCoroutine(
            batch(
                self.clock,
                lambda: 0.0,
                self.post,
                lines=source,
                output=Output(
                    lambda line: self.written.append(json.loads(line)),
                    lambda: None,
                    done or Done(lines),
                    resumable=surveyed,
                ),
                surveyed=Survey("5a", lines, lines) if surveyed else None,
                options=parser().parse_args(["batch", "in", "out", *arguments]),
            )
        )

    async def post(self, content):
        self.asked[content] = Deferred(lambda request: request.errback(self.broken))
        return Answer(200, Headers(), await self.asked[content])

    def answer(self, content, fields=None):
        self.asked.pop(content).callback(fields or result())


@ensureDeferred
async def test_so_many_at_a_time(capsys):
    """The input is read as it is needed, and one that is slow holds up none but itself."""
    run = Run(Source(), "--concurrency", "3")
    assert (set(run.asked), run.source.taken) == ({b"0\n", b"1\n", b"2\n"}, 3)
    for number in range(2, 1_000):
        run.answer(b"%d\n" % number)
        if number == 2:
            assert set(run.asked) == {b"0\n", b"1\n", b"3\n"}
    assert run.source.taken == 1_001
    run.answer(b"0\n")
    assert [written["index"] for written in run.written] == [*range(2, 1_000), 0]
    assert run.written[0] == result(index=2)
    run.finished.cancel()
    with pytest.raises(CancelledError):
        await run.finished
    assert len(run.written) == 999
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stopped with 999,001 events to go: the same command goes on from here"
    )
    assert run.clock.getDelayedCalls() == []


@ensureDeferred
async def test_what_is_done_is_not_sent(capsys):
    done = Done(4)
    done.add(0, 200)
    done.add(2, 200)
    run = Run(Source(b"a", b"b", b"c", b"d"), done=done)
    assert set(run.asked) == {b"b\n", b"d\n"}
    run.answer(b"d\n")
    run.answer(b"b\n")
    assert await run.finished == 0
    assert [written["index"] for written in run.written] == [3, 1]
    assert capsys.readouterr().err.startswith("2 answered, 0 failed, 2 skipped as already done\n")


@pytest.mark.parametrize("earlier", [True, False])
@ensureDeferred
async def test_the_exit_status_tells_of_failures(earlier, capsys):
    """Also of those in a run before."""
    done = Done(2)
    if earlier:
        done.add(0, 422)
    run = Run(Source(b"a", b"b"), done=done)
    if not earlier:
        run.answer(b"a\n", {"index": 0, "status": 422, "error": "prompt_extraction_failed"})
    run.answer(b"b\n")
    assert await run.finished == 1
    assert capsys.readouterr().err.splitlines()[-1] == "--retry-failed sends the 1 that failed again"


@ensureDeferred
async def test_a_line_that_cannot_be_sent():
    """It has an error all the same."""
    run = Run(Source(None, b"b"))
    run.answer(b"b\n")
    assert await run.finished == 1
    assert run.written[0] == {
        "index": 0,
        "status": 413,
        "error": "payload_too_large",
        "message": "A line may have up to 16777216 bytes.",
        "details": None,
        "request_id": None,
    }
    assert run.written[1]["index"] == 1


@ensureDeferred
async def test_a_refusal_that_meets_all_ends_the_run(capsys):
    """What was done is kept, the others are given up, and none of them gets an answer."""
    run = Run(Source(), "--concurrency", "3")
    run.answer(b"1\n")
    run.asked.pop(b"2\n").errback(CommandError("unauthorised", "No."))
    with pytest.raises(CommandError, match="unauthorised"):
        await run.finished
    assert [written["index"] for written in run.written] == [1]
    assert all(request.called for request in run.asked.values())
    assert run.source.taken == 4
    err = capsys.readouterr().err
    assert err.startswith("1 answered, 0 failed\n")
    assert "stopped with 999,999 events to go" in err
    assert run.clock.getDelayedCalls() == []


@ensureDeferred
async def test_an_answer_that_cannot_be_written_ends_the_run():
    run = Run(Source(), "--concurrency", "2")
    run.written = None  # whose append() fails
    run.answer(b"0\n")
    with pytest.raises(AttributeError):
        await run.finished
    assert run.source.taken == 2


@ensureDeferred
async def test_interrupted_while_all_wait():
    run = Run(Source(), "--concurrency", "2")
    run.answer(b"0\n", {"index": 0, "status": 503, "error": "overloaded", "message": "No.", "retry_after": 60})
    run.answer(b"1\n", {"index": 0, "status": 502, "error": "api_server_error", "message": "No."})
    run.finished.cancel()
    with pytest.raises(CancelledError):
        await run.finished
    assert run.clock.getDelayedCalls() == []
    assert run.written == []


@ensureDeferred
async def test_requests_that_are_given_up_are_no_failures():
    """Though they end as if their connections had broken."""
    run = Run(Source(), "--concurrency", "1", "--max-wait", "0")
    run.broken = CommandError("unreachable", "It broke.")
    run.answer(b"0\n")
    run.finished.cancel()
    with pytest.raises(CancelledError):
        await run.finished
    assert [written["index"] for written in run.written] == [0]
    assert run.source.taken == 2


@ensureDeferred
async def test_quiet(capsys):
    run = Run(Source(b"a"), "--quiet")
    run.clock.advance(60)
    run.answer(b"a\n", {"index": 0, "status": 422, "error": "prompt_extraction_failed"})
    assert await run.finished == 1
    assert capsys.readouterr() == ("", "")


@ensureDeferred
async def test_what_cannot_be_resumed_says_so(capsys):
    run = Run(Source(b"a"), surveyed=False)
    run.finished.cancel()
    with pytest.raises(CancelledError):
        await run.finished
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: there is no way to go on from here"


@pytest.fixture
def posting(service, cacert):
    """Connections to the service on this machine."""

    def posting(*arguments, connections=2):
        given = ["batch", "in", "out", "--url", service.url, "--cacert", cacert, *arguments]
        where = locate(parser().parse_args(given), with_token=True)
        return connected(reactor, where, connections)

    return posting


@ensureDeferred
async def test_the_request(service, posting, monkeypatch):
    """One line of NDJSON, over a connection that is used again."""
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN", "s3cr3t")
    service.replies(200, result())
    async with posting() as post:
        for _ in range(3):
            assert (await post(b'{"content": "hi"}\n')).fields == result()
    assert service.bodies == [{"content": "hi"}] * 3
    request = service.requests[0]
    assert (request.method, request.uri) == (b"POST", b"/events")
    for name, value in {
        "Content-Type": "application/x-ndjson",
        "Accept": "application/x-ndjson",
        "Authorization": "Bearer s3cr3t",
    }.items():
        assert request.getHeader(name) == value
    assert len({request.getClientAddress().port for request in service.requests}) == 1


@ensureDeferred
async def test_without_a_token(service, posting):
    service.replies(401, {"error": "unauthorised", "message": "No.", "details": None, "request_id": "r-1"})
    async with posting() as post:
        with pytest.raises(CommandError, match="unauthorised") as raised:
            await post(b"{}\n")
    assert "No token was sent" in raised.value.details


@pytest.mark.parametrize("cut", [True, False])
@ensureDeferred
async def test_an_answer_that_breaks_off(cut, service, posting):
    """Before the line has come: on the way, or by the service's own end."""

    def answer(request):
        request.write(b"")
        request.notifyFinish().addErrback(lambda _: None)
        if cut:
            request.transport.abortConnection()
            return NOT_DONE_YET
        return b""

    service.answer = answer
    async with posting() as post:
        with pytest.raises(CommandError) as raised:
            await post(b"{}\n")
    assert raised.value.code == ("unreachable" if cut else "stream_cut")


@ensureDeferred
async def test_a_page_of_a_proxy(service, posting):
    service.replies(502, b"<html>", Content_Type="text/html")
    async with posting() as post:
        with pytest.raises(CommandError) as raised:
            await post(b"{}\n")
    assert (raised.value.code, raised.value.http_status) == ("not_the_service", 502)


@ensureDeferred
async def test_an_untrusted_certificate(service, posting, tmp_path):
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    async with posting("--cacert", str(other)) as post:
        with pytest.raises(CommandError) as raised:
            await post(b"{}\n")
    assert raised.value.code == "certificate_not_trusted"


def test_help_has_the_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["batch", "--help"])
    assert "exit statuses:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["in"],
        ["in", "out", "--concurrency", "0"],
        ["in", "out", "--concurrency", "1001"],
        ["in", "out", "--max-wait", "-1"],
        ["in", "out", "--retries", "x"],
        ["in", "out", "--overwrite", "--retry-failed"],
    ],
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as exit:
        main(["batch", *arguments])
    assert exit.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["in", "in"], 2, "the same file"),
        (["missing", "out"], 1, "missing: No such file"),
        (["in", "missing/out"], 1, "missing/out.state: No such file"),
        (["in", "-", "--overwrite"], 2, "OUTPUT that is a file"),
    ],
)
def test_files_that_will_not_do(arguments, status, said, tmp_path, capsys):
    (tmp_path / "in").write_text("{}\n")
    assert main(["batch", *arguments]) == status
    assert said in capsys.readouterr().err
    assert (tmp_path / "in").read_text() == "{}\n"
