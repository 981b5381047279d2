"""A completion on a model server: against what real servers answered, and what they do when they fail."""

import json
from typing import Any

import pytest
from harness import Answer, Attempts, MemoryServer, ServerTransport, capture, recorded
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost, ConnectionRefusedError, DNSLookupError
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from ai_ticket.backend.address import Location
from ai_ticket.backend.kobold import BackendTimeouts, KoboldBackend
from ai_ticket.backend.server import ModelServer
from ai_ticket.errors import DomainError
from ai_ticket.event import Completion, Event, Message, Parameters, Usage
from ai_ticket.interfaces import Sink

EVENT = Event(
    [Message("system", "Be brief."), Message("user", "One"), Message("assistant", "1"), Message("user", "Two")],
    Parameters(max_tokens=60, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=7, stop=["5"]),
)
CHAT, TEXT = "POST /v1/chat/completions", "POST /v1/completions"
ABORT = "POST /api/extra/abort"
ABORTED = recorded("koboldcpp/busy-abort.txt")
NATIVE, WHOLE = "POST /api/extra/generate/stream", "POST /api/v1/generate"
KOBOLD = {
    "GET /api/extra/version": recorded("koboldcpp/get-api_extra_version.txt"),
    "GET /v1/models": recorded("koboldcpp/get-v1_models.txt"),
    "GET /api/extra/true_max_context_length": recorded("koboldcpp/get-api_extra_true_max_context_length.txt"),
    "GET /api/extra/perf": recorded("koboldcpp/get-api_extra_perf.txt"),
}
LLAMA = {"GET /props": recorded("llamacpp/props.txt")}


HOST = "host:5001"


class World:
    """A backend, the server in memory that it talks to, and their clock."""

    def __init__(self, answers: dict[str, Answer], *, first_token: float | None = None, key: str | None = None):
        self.clock = Clock()
        self.server = MemoryServer(self.clock, answers)
        keys = iter(f"key{n}" for n in range(100))
        self.attempts = Attempts()
        self.backend = KoboldBackend(
            "host:5001",
            ModelServer(self.server.http, self.clock, lambda: Location("http://host:5001", key)),
            clock=self.clock,
            timeouts=BackendTimeouts(first_token, 30.0),
            slots=None,
            new_key=lambda: next(keys),
            recorder=self.attempts,
        )

    def probe(self) -> Any:
        return self.result(Deferred.fromCoroutine(self.backend.probe()))

    def begin(self, event: Event = EVENT, deadline: float = 120.0, sink: Sink | None = None) -> Deferred[Completion]:
        answering = Deferred.fromCoroutine(self.backend.complete(event, deadline, sink))
        self.clock.advance(0)
        return answering

    def complete(self, event: Event = EVENT) -> Completion:
        found: Completion = self.result(self.begin(event))
        return found

    def result(self, deferred: Deferred[Any]) -> Any:
        """What comes of it when the clock stands still."""
        found: list[Any] = []
        deferred.addBoth(found.append)
        for _ in range(20):
            self.clock.advance(0)
        assert found, "no result yet"
        if isinstance(found[0], Failure):
            found[0].raiseException()
        return found[0]

    def fault_of(self, deferred: Deferred[Any]) -> tuple[str, str]:
        with pytest.raises(DomainError) as caught:
            self.result(deferred)
        return caught.value.code, caught.value.details or ""

    def fault(self) -> tuple[str, str]:
        return self.fault_of(self.begin())

    def sent(self, path: str) -> dict[str, Any]:
        [body] = [body for name, _, body in self.server.requests if name == path]
        found: dict[str, Any] = json.loads(body)
        return found

    def posts(self) -> list[str]:
        return [name for name, _, _ in self.server.requests if name.startswith("POST")]


def test_probing_koboldcpp() -> None:
    state = World(KOBOLD).probe()
    assert (state.up, state.kind, state.version, state.slots) == (True, "koboldcpp", "1.115.1", 1)
    assert (state.model, state.context_length) == ("koboldcpp/SmolLM2-135M-Instruct.Q4_1", 2048)


def test_probing_llamacpp() -> None:
    state = World(LLAMA).probe()
    assert (state.up, state.kind, state.slots, state.context_length) == (True, "llama.cpp", 2, 2048)
    assert state.model == "SmolLM2-135M-Instruct.Q4_1"


def test_probing_others() -> None:
    assert World({"GET /v1/models": recorded("llamacpp/v1-models.txt")}).probe().kind == "openai"
    united = World({"GET /api/v1/model": recorded("koboldcpp/get-api_v1_model.txt")}).probe()
    assert (united.up, united.kind) == (True, "kobold")
    assert not World({}).probe().up


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"GET /api/extra/version": recorded("koboldcpp-admin/nomodel-version.txt")}, "no language model"),
        ({"GET /props": recorded("llamacpp/loading-health.txt")}, "503 unavailable_error"),
        ({"GET /props": recorded("llamacpp/auth-wrong.txt")}, "401"),
        (
            dict.fromkeys(["GET /api/extra/version", "GET /props", "GET /v1/models", "GET /api/v1/model"], Answer([])),
            "without an answer",
        ),
    ],
)
def test_what_can_not_be_used_says_why(answers: dict[str, Answer], reason: str) -> None:
    state = World(answers).probe()
    assert not state.up
    assert reason in state.error


def test_probing_never_generates() -> None:
    for answers in (KOBOLD, LLAMA, {}):
        world = World(answers)
        world.probe()
        assert world.posts() == []


def test_a_probe_that_gets_no_answer_ends() -> None:
    world = World({"GET /api/extra/version": Answer([], ends=None)})
    probing = Deferred.fromCoroutine(world.backend.probe())
    world.clock.advance(5.1)
    assert not world.result(probing).up


def test_chat_on_koboldcpp() -> None:
    world = World({**KOBOLD, CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    world.probe()
    completion = world.complete(Event(EVENT.messages, Parameters(max_tokens=4)))
    assert completion == Completion(
        "I'm so sorry", "length", "koboldcpp/SmolLM2-135M-Instruct.Q4_1", Usage(16, 4, 20), "host:5001"
    )
    sent = world.sent(CHAT)
    assert sent == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "Two"},
        ],
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "genkey": "key0",
    }


def test_options_are_passed_on() -> None:
    world = World({CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    world.complete()
    sent = world.sent(CHAT)
    expected = {"max_tokens": 60, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "stop": ["5"]}
    assert {name: sent[name] for name in expected} == expected


def test_every_attempt_has_a_key_of_its_own() -> None:
    world = World({CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    world.complete()
    world.complete()
    assert [json.loads(body)["genkey"] for _, _, body in world.server.requests] == ["key0", "key1"]


def test_chat_on_llamacpp() -> None:
    world = World({**LLAMA, CHAT: recorded("llamacpp/chat-stream-usage.txt")})
    world.probe()
    completion = world.complete()
    assert completion == Completion("Hello, I'm", "length", "SmolLM2-135M-Instruct.Q4_1", Usage(37, 4, 41), HOST)


def test_koboldcpp_says_length_for_a_stop_sequence() -> None:
    """With fewer tokens than allowed it was a stop; llama.cpp's word is taken as it is."""
    usage_60 = [capture("koboldcpp/chat-stream-usage.txt")[1]]
    world = World({**KOBOLD, CHAT: Answer(usage_60)})
    world.probe()
    assert world.complete().finish_reason == "stop"
    assert world.complete(Event(EVENT.messages, Parameters(max_tokens=4))).finish_reason == "length"
    world = World({**LLAMA, CHAT: recorded("llamacpp/chat-stream-usage.txt")})
    world.probe()
    assert world.complete().finish_reason == "length"


def test_usage_that_koboldcpp_makes_up_is_not_believed() -> None:
    fake = capture("koboldcpp/chat-stream-usage.txt")[1].replace(
        b'"prompt_tokens": 16, "completion_tokens": 4, "total_tokens": 20',
        b'"prompt_tokens": 100, "completion_tokens": 100, "total_tokens": 200',
    )
    world = World({**KOBOLD, CHAT: Answer([fake])})
    world.probe()
    perf = json.loads(capture("koboldcpp/get-api_extra_perf.txt")[1].partition(b"\r\n\r\n")[2])
    usage = world.complete().usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (perf["last_input_count"], perf["last_token_count"])


def test_a_server_without_chat_gets_the_users_texts() -> None:
    world = World({TEXT: recorded("koboldcpp/completions-stream-usage.txt")})
    assert world.complete().text == ", the company had"
    assert world.sent(TEXT)["prompt"] == "One\nTwo"
    assert world.posts() == [CHAT, TEXT]
    world.complete()
    assert world.posts()[2:] == [TEXT], "what it does not have is not asked for again"


def test_a_server_with_kobolds_own_stream_only() -> None:
    perf = Answer([b'HTTP/1.0 200 OK\r\n\r\n{"last_token_count": 6, "last_input_count": 5, "stop_reason": 2}'])
    world = World(
        {
            "GET /api/v1/model": recorded("koboldcpp/get-api_v1_model.txt"),
            "GET /api/extra/perf": perf,
            NATIVE: recorded("koboldcpp/generate-stream.txt"),
        }
    )
    world.probe()
    completion = world.complete()
    assert completion.text == ", a group of friends had"
    assert (completion.finish_reason, completion.usage) == ("stop", Usage(5, 6, 11))
    assert completion.model == "koboldcpp/SmolLM2-135M-Instruct.Q4_1"
    assert world.posts() == [NATIVE]
    sent = world.sent(NATIVE)
    assert sent == {
        "prompt": "One\nTwo",
        "max_length": 60,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "sampler_seed": 7,
        "stop_sequence": ["5"],
        "genkey": "key0",
    }


def test_a_server_with_kobolds_first_endpoint_only() -> None:
    world = World({WHOLE: recorded("koboldcpp/generate-stop.txt")})
    completion = world.complete()
    assert (completion.text, completion.usage) == (" 6, 7, 8,", Usage(14, 11, 25))
    assert world.posts() == [CHAT, TEXT, NATIVE, WHOLE]


def test_a_server_that_comes_back_may_have_other_endpoints() -> None:
    world = World({**KOBOLD, TEXT: recorded("koboldcpp/completions-stream-usage.txt")})
    world.probe()
    world.complete()
    world.server.refusal = ConnectionRefusedError()
    world.probe()
    world.server.refusal = None
    world.server.answers[CHAT] = recorded("koboldcpp/chat-stream-usage.txt")
    world.probe()
    assert world.complete().text == "I'm so sorry"


def test_a_server_with_none_of_the_endpoints() -> None:
    assert World({}).fault()[0] == "api_client_error"


OK = b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
TOKEN = b'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n'
STOP = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (recorded("koboldcpp/busy-503-chat-stream.txt"), "api_rate_limited"),
        (recorded("koboldcpp-admin/ratelimit-2.txt"), "api_rate_limited"),
        (Answer([b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n"]), "api_rate_limited"),
        (recorded("llamacpp/loading-chat.txt"), "api_server_error"),
        (recorded("koboldcpp/err-badjson-chat.txt"), "api_server_error"),
        (recorded("koboldcpp-admin/nomodel-chat-stream.txt"), "api_server_error"),
        (Answer([OK + b'data: {"error": {"code": 500, "message": "x"}}\n\n']), "api_server_error"),
        (recorded("koboldcpp-password/chat-stream-nokey.txt"), "api_authentication_error"),
        (recorded("llamacpp/auth-wrong.txt"), "api_authentication_error"),
        (recorded("llamacpp/err-badtype.txt"), "api_client_error"),
        (recorded("llamacpp/err-overctx.txt"), "context_length_exceeded"),
        (recorded("koboldcpp/killed-midstream.txt"), "api_response_structure_error"),
        (Answer([OK]), "api_response_structure_error"),
        (Answer([OK + TOKEN]), "api_response_structure_error"),
        (recorded("koboldcpp/bad-reppen.txt"), "api_response_structure_error"),
        (recorded("koboldcpp/bad-maxlength.txt"), "api_response_structure_error"),
        (recorded("koboldcpp/chat.txt"), "api_response_structure_error"),
        (recorded("koboldcpp/get-v1.txt"), "api_response_format_error"),
        (Answer([OK + b"data: {oops\n\n"]), "api_response_format_error"),
        (Answer([OK + b"data: \xff\n\n"]), "api_response_format_error"),
        (Answer([OK + b"data: " + b"[" * 5000 + b"\n\n"]), "api_response_structure_error"),
        (Answer([OK + b"data: null\n\n"]), "api_response_structure_error"),
        (Answer([OK + b'data: {"choices": 5}\n\n']), "api_response_structure_error"),
        (Answer([OK + b'data: {"x": 5}\n\n']), "api_response_structure_error"),
        (
            Answer([b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n"]),
            "api_response_format_error",
        ),
        (Answer([OK + TOKEN], ends=ConnectionLost()), "api_connection_error"),
        (Answer([], ends=ConnectionLost()), "api_connection_error"),
        (Answer([], ends=SSL.Error([])), "api_connection_error"),
        (Answer([OK.replace(b"\r\n\r\n", b"\r\ncontent-length: 999\r\n\r\n") + TOKEN]), "api_response_structure_error"),
        (Answer([b"SSH-2.0-OpenSSH_9\r\n"]), "api_response_format_error"),
    ],
)
def test_faults(answer: Answer, code: str) -> None:
    world = World({CHAT: answer})
    found, details = world.fault()
    assert found == code
    assert details
    assert not world.clock.getDelayedCalls()


def test_faults_of_connecting() -> None:
    for refusal in (ConnectionRefusedError(), DNSLookupError()):
        world = World({CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
        world.server.refusal = refusal
        assert world.fault()[0] == "api_connection_error"
        assert not world.backend.state.up


def test_a_wrong_key_is_sent_as_it_is() -> None:
    world = World({CHAT: recorded("koboldcpp/chat-stream-usage.txt")}, key="sesame")
    world.complete()
    assert b"\r\nAuthorization: Bearer sesame\r\n" in world.server.requests[0][1] + b"\r\n"


def test_silence_before_the_first_token_ends_at_the_deadline() -> None:
    """KoboldCPP sends its head and then nothing, for ever, when it can't read an option of a streamed request."""
    world = World({CHAT: Answer([capture("koboldcpp/stream-badtype.txt")[1]], ends=None)})
    answering = world.begin(deadline=20)
    world.clock.advance(19)
    assert not answering.called
    world.clock.advance(1.1)
    assert world.fault_of(answering)[0] == "deadline_exceeded"
    assert world.server.transports[0].aborted
    assert not world.clock.getDelayedCalls()


@pytest.mark.parametrize("pieces", [[], [OK], [b"HTTP/1.0 200 OK\r\n"]])
def test_the_first_token_has_a_timeout_of_its_own(pieces: list[bytes]) -> None:
    world = World({CHAT: Answer(pieces, ends=None)}, first_token=3.0)
    answering = world.begin()
    world.clock.advance(2.9)
    assert not answering.called
    world.clock.advance(0.2)
    assert world.fault_of(answering)[0] == "deadline_exceeded"
    assert world.server.transports[0].lost


@pytest.mark.parametrize("head", [OK, b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n"])
def test_what_is_said_is_what_was_allowed_in_all(head: bytes) -> None:
    """Not what was left of it when the answer's head had come."""
    world = World({CHAT: Answer([], ends=None)}, first_token=3.0)
    answering = world.begin()
    world.clock.advance(2.0)
    world.server.transports[0].protocol_.dataReceived(head)
    world.clock.advance(0.9)
    assert not answering.called
    world.clock.advance(0.2)
    assert world.fault_of(answering) == ("deadline_exceeded", "the model server was silent for 3 s")


def test_connecting_for_ever_ends_too() -> None:
    world = World({}, first_token=3.0)
    world.server.never_connect()
    answering = world.begin()
    world.clock.advance(3.1)
    assert world.fault_of(answering)[0] == "deadline_exceeded"


def test_silence_between_tokens() -> None:
    world = World({CHAT: Answer([OK + TOKEN], ends=None)})
    answering = world.begin()
    transport = world.server.transports[0]
    for _ in range(4):
        world.clock.advance(29)
        transport.protocol_.dataReceived(TOKEN)
    world.clock.advance(31)
    assert world.fault_of(answering)[0] == "deadline_exceeded"
    assert transport.aborted


def test_a_server_that_keeps_the_connection_after_the_end() -> None:
    world = World({CHAT: Answer([OK + TOKEN + STOP + b"data: [DONE]\n\n"], ends=None)})
    assert world.complete().text == "hi"
    assert not world.server.transports[0].lost
    world.clock.advance(1.1)
    assert world.server.transports[0].lost


class Taken:
    """A `Sink` that keeps what it is given."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.producer: Any = None

    def write(self, text: str) -> None:
        self.texts.append(text)

    def attach(self, producer: Any) -> None:
        self.producer = producer


def test_a_sink_gets_the_text_as_it_comes_and_the_completion_has_none() -> None:
    world = World({CHAT: Answer([OK + TOKEN + TOKEN], ends=None)})
    sink = Taken()
    answering = world.begin(sink=sink)
    assert sink.texts == ["hihi"], "what comes together is handed on together"
    world.server.transports[0].protocol_.dataReceived(TOKEN)
    assert sink.texts == ["hihi", "hi"]
    world.server.transports[0].protocol_.dataReceived(STOP + b"data: [DONE]\n\n")
    completion = world.result(answering)
    assert (completion.text, completion.finish_reason) == ("", "stop")
    world.clock.advance(2)


def test_a_sink_that_is_full_stops_the_reading_and_in_the_end_the_generation() -> None:
    world = World({**KOBOLD, CHAT: Answer([OK + TOKEN], ends=None), ABORT: ABORTED})
    world.probe()
    sink = Taken()
    answering = world.begin(sink=sink)
    transport = world.server.transports[-1]
    sink.producer.pauseProducing()
    assert transport.producerState == "paused"
    sink.producer.resumeProducing()
    assert transport.producerState == "producing"
    sink.producer.pauseProducing()
    world.clock.advance(31)
    code, details = world.fault_of(answering)
    assert (code, "nothing was read" in details) == ("deadline_exceeded", True)
    assert transport.aborted
    assert world.sent(ABORT) == {"genkey": "key0"}


def test_a_fault_says_whether_some_of_the_answer_had_come() -> None:
    for pieces, begun in (([OK], False), ([OK + TOKEN], True)):
        world = World({CHAT: Answer(pieces)})
        failures: list[Any] = []
        world.begin().addErrback(failures.append)
        assert failures[0].value.after_first_token is begun


def test_cancelling_stops_the_generation_by_its_key() -> None:
    for pieces in ([], [OK], [OK + TOKEN]):
        world = World({**KOBOLD, CHAT: Answer(pieces, ends=None), ABORT: ABORTED})
        world.probe()
        answering = world.begin()
        answering.addErrback(lambda _: None)
        answering.cancel()
        world.clock.advance(0)
        assert world.sent(ABORT) == {"genkey": "key0"}
        assert not world.clock.getDelayedCalls()


def test_no_key_is_told_to_who_never_had_it() -> None:
    world = World({**KOBOLD, ABORT: ABORTED})
    world.probe()
    world.server.never_connect()
    answering = world.begin()
    answering.addErrback(lambda _: None)
    answering.cancel()
    world.server.refusal = None
    world.clock.advance(1)
    assert ABORT not in world.posts()
    llama = World({**LLAMA, CHAT: Answer([OK], ends=None)})
    llama.probe()
    answering = llama.begin()
    answering.addErrback(lambda _: None)
    answering.cancel()
    llama.clock.advance(1)
    assert llama.posts() == [CHAT]


def test_requests_beside_the_generations_are_one_at_a_time() -> None:
    world = World({**KOBOLD, CHAT: Answer([OK], ends=None), ABORT: Answer([], ends=None)})
    world.probe()
    for _ in range(3):
        answering = world.begin()
        answering.addErrback(lambda _: None)
        answering.cancel()
    world.clock.advance(0)
    assert world.posts().count(ABORT) == 1
    world.clock.advance(5.1)
    assert world.posts().count(ABORT) == 2
    for _ in range(3):
        world.clock.advance(5.1)
    assert not world.clock.getDelayedCalls()


COUNT = "POST /api/extra/tokencount"
LONG = Event([Message("user", "word " * 400)], Parameters(max_tokens=1000))


def count(value: int) -> Answer:
    return Answer([b'HTTP/1.0 200 OK\r\n\r\n{"value": %d, "ids": []}' % value])


def test_a_prompt_that_can_not_fit_is_refused_with_both_numbers() -> None:
    world = World({**KOBOLD, COUNT: count(1500), CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    world.probe()
    code, details = world.fault_of(world.begin(LONG))
    assert code == "context_length_exceeded"
    assert all(number in details for number in ("1500", "1000", "2048"))
    assert world.posts() == [COUNT]
    assert world.sent(COUNT) == {"messages": [{"role": "user", "content": "word " * 400}]}


def test_a_default_of_max_tokens_is_lowered_to_fit() -> None:
    world = World({**KOBOLD, COUNT: count(1500), CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    world.probe()
    world.complete(Event(LONG.messages, LONG.parameters, max_tokens_given=False))
    assert world.sent(CHAT)["max_tokens"] == 548
    full = World({**KOBOLD, COUNT: count(2048), CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    full.probe()
    assert full.fault_of(full.begin(Event(LONG.messages, LONG.parameters, max_tokens_given=False)))[0] == (
        "context_length_exceeded"
    )


def test_what_fits_anyhow_is_not_counted() -> None:
    world = World({**KOBOLD, COUNT: count(1), CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    world.probe()
    world.complete()
    assert world.posts() == [CHAT]


def test_a_server_that_does_not_count_has_the_last_word() -> None:
    world = World({**KOBOLD, CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    world.probe()
    world.complete(LONG)
    assert world.posts() == [COUNT, CHAT]


def test_the_count_of_a_very_long_prompt_is_large_itself() -> None:
    ids = json.dumps({"value": 300_000, "ids": [12345] * 300_000}).encode()
    world = World({**KOBOLD, COUNT: Answer([b"HTTP/1.0 200 OK\r\n\r\n" + ids])})
    world.probe()
    assert world.fault_of(world.begin(LONG))[0] == "context_length_exceeded"


@pytest.mark.parametrize("answer", [Answer([b"HTTP/1.0 500 No\r\n\r\n"]), Answer([b"HTTP/1.0 200 OK\r\n\r\nnull"])])
def test_koboldcpp_gets_no_prompt_that_it_might_cut(answer: Answer) -> None:
    """Where it counts, but not this time."""
    world = World({**KOBOLD, COUNT: answer, CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    world.probe()
    assert world.fault_of(world.begin(LONG))[0].startswith("api_")
    assert world.posts() == [COUNT]


def test_llamacpp_counts_with_its_template() -> None:
    world = World(
        {
            **LLAMA,
            "POST /apply-template": recorded("llamacpp/apply-template.txt"),
            "POST /tokenize": Answer([b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps({"tokens": [1] * 1500}).encode()]),
        }
    )
    world.probe()
    assert world.fault_of(world.begin(LONG))[0] == "context_length_exceeded"
    assert world.sent("POST /tokenize")["content"].startswith("<|im_start|>system")


def test_cancelling_closes_the_connection() -> None:
    for pieces in ([], [OK], [OK + TOKEN]):
        world = World({CHAT: Answer(pieces, ends=None)})
        answering = world.begin()
        answering.addErrback(lambda _: None)
        answering.cancel()
        assert world.server.transports[0].lost
        assert not world.clock.getDelayedCalls()
        assert world.backend.state.error == "not yet asked", "the server is not to blame"


STREAMS = {
    CHAT: ["koboldcpp/chat-stream-usage.txt", "koboldcpp/stop-chat-stream.txt", "llamacpp/chat-stream-usage.txt"],
    TEXT: ["koboldcpp/completions-stream-usage.txt", "llamacpp/completions-stream.txt"],
}


@given(st.data())
def test_any_split_of_a_recorded_stream_gives_the_same_completion(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(STREAMS)))
    name = data.draw(st.sampled_from(STREAMS[path]))
    raw = capture(name)[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    whole = World({path: Answer([raw])}).complete()
    assert World({path: Answer([piece for piece in pieces if piece])}).complete() == whole
    assert whole.text


def test_memory_server_transports_are_known() -> None:
    """The double tells what became of each connection."""
    world = World({CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    world.complete()
    assert all(isinstance(transport, ServerTransport) and transport.lost for transport in world.server.transports)
