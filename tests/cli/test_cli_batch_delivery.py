"""When an event of a batch is sent, put off, sent again and given up; in a time of its own."""

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers

from ai_ticket.cli.batch_delivery import Delivery, Gate, back_off
from ai_ticket.cli.http import Answer
from ai_ticket.cli.outcome import CommandError, ExitStatus

OK = {"index": 0, "status": 200, "completion": "Hello."}


def line(status, code="code", **more):
    """An event's answer within the service's."""
    return Answer(200, Headers(), {"index": 0, "status": status, "error": code, "message": "No."} | more)


def whole(status, code="code", **headers):
    """An answer of the service to the whole batch."""
    named = {name.replace("_", "-"): [value] for name, value in headers.items()}
    return Answer(status, Headers(named), {"error": code, "message": "No.", "request_id": "r-1"})


OK_ANSWER = Answer(200, Headers(), OK)
UNREACHABLE = CommandError("unreachable", "Can't reach it.", status=ExitStatus.UNREACHABLE)


class World:
    """A service that answers as the test says, now or later, and those who send to it."""

    def __init__(self, *, jitter=0.0, max_wait=100.0, retries=2):
        self.clock = Clock()
        self.sent = []
        self.script = []
        self.gate = Gate(self.clock, lambda: jitter)
        self.delivery = Delivery(self.clock, self.post, self.gate, lambda: jitter, max_wait=max_wait, retries=retries)

    async def post(self, content):
        self.sent.append((self.clock.seconds(), content))
        answer = self.script.pop(0)
        if isinstance(answer, Deferred):
            answer = await answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def send(self, content=b"{}"):
        return Deferred.fromCoroutine(self.delivery.answer(content))

    def times(self):
        return [seconds for seconds, _ in self.sent]

    def pass_time(self, seconds):
        """In small steps."""
        self.clock.pump([0.25] * int(seconds * 4))


def test_backing_off():
    assert [back_off(attempt, 0.0) for attempt in (1, 2, 3, 7, 8, 5000)] == [1, 2, 4, 64, 64, 64]
    assert back_off(1, 1.0) == 1.5


@ensureDeferred
async def test_an_answer():
    """The event goes as one line."""
    world = World()
    world.script = [OK_ANSWER]
    assert await world.send(b'{"content": "hi"}') == OK
    assert world.sent == [(0.0, b'{"content": "hi"}\n')]


@pytest.mark.parametrize("status", [400, 413, 422, 500])
@pytest.mark.parametrize("answer", [line, whole])
@ensureDeferred
async def test_an_error_is_an_answer(status, answer):
    world = World()
    world.script = [answer(status)]
    result = await world.send()
    assert (result["status"], result["error"], result["message"]) == (status, "code", "No.")


@pytest.mark.parametrize(
    ("refusal", "seconds"),
    [
        (line(429, retry_after=7), 7),
        (line(503, retry_after=2.5), 2.5),
        (line(503, retry_after=0), 1),
        (line(503, retry_after=-5), 1),
        (line(503, retry_after="soon"), 1.25),
        (line(503, retry_after=float("inf")), 1.25),
        (line(503), 1.25),
        (whole(429, Retry_After="7"), 7),
        (whole(503, Retry_After="0"), 1),
        (whole(503), 1.25),
        (UNREACHABLE, 1.25),
        (CommandError("stream_cut", "It broke off."), 1.25),
        (CommandError("tls_error", "It broke off."), 1.25),
        (CommandError("not_the_service", "A proxy.", http_status=503, retry_after=3), 3),
    ],
)
@ensureDeferred
async def test_waiting_as_long_as_the_service_says(refusal, seconds):
    """At least a second; where it says nothing, as backing off does, with its jitter."""
    world = World(jitter=0.5)
    world.script = [refusal, OK_ANSWER]
    waiting = world.send()
    world.pass_time(20)
    assert await waiting == OK
    assert world.times() == [0.0, seconds]
    assert world.clock.getDelayedCalls() == []


@ensureDeferred
async def test_waiting_longer_and_longer():
    """Until something works: then it begins anew."""
    world = World()
    world.script = [UNREACHABLE] * 4 + [OK_ANSWER, UNREACHABLE, OK_ANSWER]
    waiting = world.send()
    world.pass_time(15)
    assert await waiting == OK
    again = world.send()
    world.pass_time(5)
    assert await again == OK
    assert world.times() == [0, 1, 3, 7, 15, 15, 16]


@ensureDeferred
async def test_all_wait_together():
    """One that is asked to wait holds up those that were not sent yet, and the longest wait counts."""
    world = World()
    answers = [Deferred() for _ in range(3)]
    world.script = [*answers, *[OK_ANSWER] * 5]
    waiting = [world.send() for _ in range(3)]
    answers[0].callback(line(503, retry_after=10))
    waiting.append(world.send())
    world.pass_time(1)
    waiting.append(world.send())
    answers[1].callback(line(503))
    answers[2].callback(OK_ANSWER)
    assert len(world.sent) == 3
    assert world.gate.closed_for == 9
    assert world.gate.reason == "No."
    world.pass_time(8.75)
    assert len(world.sent) == 3
    world.pass_time(0.25)
    assert world.times() == [0, 0, 0, 10, 10, 10, 10]
    assert [await each for each in waiting] == [OK] * 5


@ensureDeferred
async def test_events_sent_together_fail_together():
    """Sixteen connections that break at once are one failure to back off from, and the next sixteen the second."""
    world = World()
    attempts = [[Deferred() for _ in range(16)] for _ in range(2)]
    world.script = [*attempts[0], *attempts[1], *[OK_ANSWER] * 16]
    waiting = [world.send() for _ in range(16)]
    for broken in attempts:
        for request in broken:
            request.callback(UNREACHABLE)
        world.pass_time(2)
    world.pass_time(1)
    assert world.times() == [0] * 16 + [1] * 16 + [4] * 16
    assert [await each for each in waiting] == [OK] * 16


@ensureDeferred
async def test_giving_up_waiting():
    """After --max-wait the error is the answer."""
    world = World(max_wait=10)
    world.script = [UNREACHABLE] * 10
    waiting = world.send()
    world.pass_time(10)
    result = await waiting
    assert (result["status"], result["error"], result["message"]) == (503, "unreachable", "Can't reach it.")
    assert set(result) == {"status", "error", "message", "details", "request_id"}
    assert world.times() == [0, 1, 3, 7]


@ensureDeferred
async def test_a_wait_that_would_be_too_long():
    """It is not begun, and what the service said is kept; the next event waits for the service all the same."""
    world = World(max_wait=10)
    world.script = [whole(429, Retry_After="11"), OK_ANSWER]
    result = await world.send()
    expected = {"status": 429, "error": "code", "message": "No.", "request_id": "r-1", "retry_after": 11}
    assert result == expected
    waiting = world.send()
    world.pass_time(11)
    assert await waiting == OK
    assert world.times() == [0, 11]


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (line(502), 502),
        (line(504), 504),
        (whole(502), 502),
        (CommandError("timeout", "No answer."), 504),
        (CommandError("not_the_service", "A proxy.", http_status=502), 502),
    ],
)
@ensureDeferred
async def test_failures_of_the_model_server(failure, status):
    """They are tried again, this event alone, so often; then they are the answer."""
    world = World(retries=2)
    world.script = [failure, OK_ANSWER, failure, OK_ANSWER]
    waiting = world.send()
    assert await world.send() == OK
    world.pass_time(3)
    assert await waiting == OK
    assert world.times() == [0, 0, 1, 3]
    world.script = [failure] * 3
    waiting = world.send()
    world.pass_time(3)
    assert (await waiting)["status"] == status


@ensureDeferred
async def test_no_retries():
    world = World(retries=0)
    world.script = [line(502)]
    assert (await world.send())["status"] == 502


@pytest.mark.parametrize(
    "refusal",
    [
        whole(401),
        whole(404),
        whole(301),
        CommandError("certificate_not_trusted", "No."),
        CommandError("not_the_service", "A page.", http_status=200),
        CommandError("not_the_service", "A page.", http_status=404),
        Answer(200, Headers(), {"status": "healthy"}),
        Answer(200, Headers(), {}),
    ],
)
@ensureDeferred
async def test_what_would_meet_every_event_is_no_answer(refusal):
    world = World()
    world.script = [refusal]
    with pytest.raises(CommandError):
        await world.send()


@ensureDeferred
async def test_stopping():
    """Requests that are given up look as if the connection broke: that is no answer, and nothing to try again."""
    world = World(max_wait=0)
    broken = Deferred(lambda request: request.errback(UNREACHABLE))
    world.script = [broken, OK_ANSWER]
    waiting = world.send()
    world.delivery.stop()
    waiting.cancel()
    for each in (waiting, world.send()):
        with pytest.raises(CancelledError):
            await each
    assert len(world.sent) == 1
    assert world.clock.getDelayedCalls() == []
