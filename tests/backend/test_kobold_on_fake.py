"""Our client of KoboldCPP on the fake one, in memory: what the fake does wrong, and what a caller is told of it."""

from typing import Any

import pytest
from fake_world import FakeWorld
from harness import Attempts
from memory_tracer import MemoryTracer
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from ai_ticket.backend import fake
from ai_ticket.backend.address import Location
from ai_ticket.backend.fake import Fault, Script
from ai_ticket.backend.kobold import BackendTimeouts, KoboldBackend
from ai_ticket.backend.server import ModelServer
from ai_ticket.errors import DomainError
from ai_ticket.event import Completion, Event, Message, Parameters, Usage

EVENT = Event([Message("user", "hi")], Parameters(max_tokens=100))
CHAT = "/v1/chat/completions"
STREAMS = [CHAT, "/v1/completions", "/api/extra/generate/stream"]


class World(FakeWorld):
    """The fake, and our client of it."""

    def __init__(self, *, key: str | None = None, first_token: float | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        numbers = iter(range(100))
        self.attempts = Attempts()
        self.backend = KoboldBackend(
            "host:5001",
            ModelServer(self.network.http, self.clock, lambda: Location("http://host:5001", key)),
            clock=self.clock,
            timeouts=BackendTimeouts(first_token, 10.0),
            slots=None,
            new_key=lambda: f"key{next(numbers)}",
            recorder=self.attempts,
        )

    def begin(self, event: Event = EVENT) -> tuple[Deferred[Completion], list[Any]]:
        """Ask, with two minutes' time; the list gets what comes of it."""
        answering = Deferred.fromCoroutine(self.backend.complete(event, self.clock.seconds() + 120.0))
        found: list[Any] = []
        answering.addBoth(found.append)
        self.run()
        return answering, found

    def complete(self, event: Event = EVENT) -> Completion:
        self.result(Deferred.fromCoroutine(self.backend.probe()))
        _, found = self.begin(event)
        return self.end(found)

    def end(self, found: list[Any]) -> Any:
        """What comes within the deadline."""
        for _ in range(1300):
            if found:
                break
            self.run(0.1)
        [result] = found
        if isinstance(result, Failure):
            result.raiseException()
        return result

    def result(self, asking: Deferred[Any]) -> Any:
        found: list[Any] = []
        asking.addBoth(found.append)
        return self.end(found)

    def fault(self) -> str:
        with pytest.raises(DomainError) as caught:
            self.complete()
        return caught.value.code


def test_what_it_learns() -> None:
    world = World(context_length=4096)
    state = world.result(Deferred.fromCoroutine(world.backend.probe()))
    assert (state.up, state.kind, state.version, state.slots) == (True, "koboldcpp", "1.115.1", 1)
    assert (state.model, state.context_length) == ("koboldcpp/fake", 4096)
    assert not [seen for seen in world.fake.requests if seen.method == "POST"]


def test_a_completion() -> None:
    world = World(text="The answer is 4.", password="sesame", key="sesame")
    assert world.complete() == Completion("The answer is 4.", "stop", "koboldcpp/fake", Usage(10, 7, 17), "host:5001")
    [asked] = [seen for seen in world.fake.requests if seen.method == "POST"]
    assert (asked.path, asked.json["stream"], asked.json["genkey"]) == (CHAT, True, "key0")
    world.run(0.2)
    assert (world.fake.connections, world.fake.most_connections) == (0, 2), "one is closed while the next is made"


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_whichever_endpoint_there_is(missing: int) -> None:
    """And whichever it is, a stop sequence is told from the end of the tokens."""
    world = World(text="one two three")
    world.fake.missing.update(STREAMS[:missing])
    stopped = world.complete(Event(EVENT.messages, Parameters(max_tokens=50, stop=[" three"])))
    assert (stopped.text, stopped.finish_reason) == ("one two", "stop")
    cut = world.complete(Event(EVENT.messages, Parameters(max_tokens=2)))
    assert (cut.text, cut.finish_reason) == ("one two", "length")


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (fake.BUSY, "api_rate_limited"),
        (fake.RATE_LIMITED, "api_rate_limited"),
        (fake.LOADING, "api_server_error"),
        (fake.SERVER_ERROR, "api_server_error"),
        (fake.FAILED, "api_server_error"),
        (fake.UNAUTHORIZED, "api_authentication_error"),
        (fake.WEB_PAGE, "api_response_format_error"),
        (fake.NULL, "api_response_structure_error"),
        (fake.EMPTY, "api_response_structure_error"),
        (fake.SILENT_STREAM, "deadline_exceeded"),
        (Script(before_headers=200.0), "deadline_exceeded"),
        (Script(first_token=200.0), "deadline_exceeded"),
        (Script(fault=Fault.SILENCE, after_tokens=5), "deadline_exceeded"),
        (Script(fault=Fault.EOF), "api_response_structure_error"),
        (Script(fault=Fault.EOF, after_tokens=5), "api_response_structure_error"),
        (Script(fault=Fault.RESET, after_tokens=5), "api_connection_error"),
    ],
)
def test_what_goes_wrong(script: Script, code: str) -> None:
    """Whatever it was, the next is answered as if nothing had been."""
    world = World()
    world.fake.script(script)
    assert world.fault() == code
    world.run(1.0)
    assert (world.fake.running, world.fake.connections) == (0, 0)
    assert world.complete().finish_reason == "stop"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (Script(length_error=5), "api_response_structure_error"),
        (Script(length_error=-5), "api_response_format_error"),
        (Script(fault=Fault.RESET), "api_connection_error"),
        (Script(fault=Fault.EOF), "api_response_structure_error"),
    ],
)
def test_what_goes_wrong_with_an_answer_in_one_piece(script: Script, code: str) -> None:
    world = World()
    world.fake.missing.update(STREAMS)
    world.fake.script(script, path="/api/v1/generate")
    assert world.fault() == code


def test_no_model_and_no_server() -> None:
    world = World(model=None)
    assert world.fault() == "api_server_error"
    world.fake.stalled = True
    assert world.fault() == "deadline_exceeded"


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.6])
def test_cancelling_stops_the_generation(seconds: float) -> None:
    world = World()
    world.fake.script(Script(tokens=90, tokens_per_second=10.0))
    answering, found = world.begin()
    world.run(seconds)
    answering.cancel()
    with pytest.raises(CancelledError):
        world.end(found)
    world.run(0.5)
    assert (world.fake.running, world.fake.disconnected, world.fake.connections) == (0, 1, 0)


def test_killed_in_the_middle() -> None:
    world = World()
    _, found = world.begin()
    world.run(0.5)
    world.fake.kill()
    with pytest.raises(DomainError) as caught:
        world.end(found)
    assert caught.value.code == "api_response_structure_error"
    assert world.complete().text


def test_what_is_recorded_of_an_attempt() -> None:
    world = World()
    world.complete()
    [attempt] = world.attempts
    assert (attempt.backend, attempt.endpoint, attempt.outcome) == ("host:5001", CHAT, "ok")
    assert attempt.usage == Usage(10, 52, 62)
    assert attempt.first_token is not None
    assert 0.3 < attempt.first_token <= attempt.seconds < 2


def test_an_attempt_that_is_given_up() -> None:
    world = World()
    world.result(Deferred.fromCoroutine(world.backend.probe()))
    answering, _ = world.begin()
    answering.cancel()
    world.run(1.0)
    [attempt] = world.attempts
    assert (attempt.outcome, attempt.first_token, attempt.usage) == ("cancelled", None, None)


def test_the_trace_goes_with_the_request() -> None:
    world = World()
    world.result(Deferred.fromCoroutine(world.backend.probe()))
    tracer = MemoryTracer(world.clock)
    root = tracer.start("root")
    found: list[Any] = []
    Deferred.fromCoroutine(world.backend.complete(EVENT, world.clock.seconds() + 120.0, None, root)).addBoth(
        found.append
    )
    world.run()
    world.end(found)
    [span] = tracer.ended
    assert (span.name, span.kind, span.parent_id) == ("kobold.get_completion", "client", root.span_id)
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["gen_ai.request.model"] == span.attributes["gen_ai.response.model"] == "koboldcpp/fake"
    assert span.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert (span.attributes["gen_ai.usage.input_tokens"], span.attributes["gen_ai.usage.output_tokens"]) == (10, 52)
    assert (span.attributes["server.address"], span.attributes["server.port"]) == ("host", 5001)
