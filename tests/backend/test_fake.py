"""The fake KoboldCPP in time: what was measured on a real one and is in no single recorded exchange.

What it puts on the wire is held against recordings in `test_backend_contract`.
"""

import json
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
from fake_world import FakeWorld, body_of, events_of, result_of, status_of, text_of
from hypothesis import given
from hypothesis import strategies as st
from memory_network import Caller

from ai_ticket.backend import fake
from ai_ticket.backend.fake import Fault, Script
from ai_ticket.backend.fake.text import PASSAGE, pieces, plan

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WHOLE, NATIVE = "/api/v1/generate", "/api/extra/generate/stream"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
LONG = Script(tokens=500)


@pytest.fixture
def world() -> FakeWorld:
    return FakeWorld()


def begin(world: FakeWorld, path: str = NATIVE, key: str = "", seconds: float = 0.0, tokens: int = 200) -> Caller:
    """A generation of 200 tokens, which takes about three seconds."""
    world.fake.script(Script(tokens=tokens))
    caller = world.post(path, {"prompt": "hi", **HI, "stream": path == CHAT, "genkey": key})
    world.run(seconds)
    return caller


# A stream in time.


def test_the_head_comes_at_once_and_the_first_token_a_third_of_a_second_later(world: FakeWorld) -> None:
    caller = begin(world)
    assert status_of(caller) == 200
    world.run(0.34)
    assert body_of(caller) == b""
    world.run(0.02)
    assert len(events_of(caller)) == 1
    assert len(pieces(text_of(caller))) == pytest.approx(0.35 * 70, abs=2), "what there was by then"


def test_tokens_are_coalesced_at_full_speed(world: FakeWorld) -> None:
    caller = begin(world, tokens=100, seconds=3.0)
    tokens = [len(pieces(event["token"])) for event in events_of(caller)[1:-1]]
    assert set(tokens) == {1, 2}
    assert 60 < len(tokens) + 25 < 80


def test_the_connection_ends_a_little_after_the_stream(world: FakeWorld) -> None:
    """So long the slot stays taken: who comes at once may have to wait, or find the queue full."""
    world.fake.settings.multiuser = 0
    caller = begin(world, tokens=3, seconds=0.36)
    assert events_of(caller)[-1]["finish_reason"] == "stop"
    assert (caller.ended, world.fake.idle) == (None, False)
    assert status_of(world.post(WHOLE, {"prompt": "hi"})) == 503
    world.run(0.2)
    assert (caller.ended, world.fake.idle) == ("closed", True)


def test_a_script_sets_the_pace(world: FakeWorld) -> None:
    world.fake.script(
        Script(before_headers=1.0, first_token=2.0, tokens_per_second=1.0, tokens_per_event=1, text="a b c")
    )
    caller = world.post(NATIVE, {"prompt": "x"})
    world.run(0.98)
    assert caller.received == b""
    world.run(0.04)
    assert status_of(caller) == 200
    counts = []
    for _ in range(5):
        counts.append(len(events_of(caller)))
        world.run(1.0)
    assert counts == [0, 0, 1, 2, 3]


def test_infinitely_fast(world: FakeWorld) -> None:
    world.fake.behaviour = Script(tokens_per_second=inf, tokens=1000, tokens_per_event=10)
    caller = world.post(NATIVE, {"prompt": "x"})
    world.run(0.4)
    assert len(events_of(caller)) == 101


def test_a_slow_reader_slows_the_stream_and_costs_no_memory(world: FakeWorld) -> None:
    world.fake.settings.context_length = 8192
    world.fake.script(Script(pieces=["x" * 10_000], tokens=200, tokens_per_second=inf, tokens_per_event=1))
    caller = world.post(NATIVE, {"prompt": "x"})
    caller.transport.pauseProducing()  # type: ignore[union-attr]
    world.run(5.0)
    assert caller.transport.buffered < 200_000  # type: ignore[union-attr]
    assert world.fake.running == 1
    caller.transport.resumeProducing()  # type: ignore[union-attr]
    for _ in range(100):
        world.run(0.2)
    assert len(text_of(caller)) == 2_000_000
    assert caller.ended == "closed"


# The slot and the queue.


@pytest.mark.parametrize(("multiuser", "served"), [(10, 10), (1, 10), (0, 1), (3, 3), (2, 2)])
def test_so_many_at_a_time_and_the_rest_is_turned_away(multiuser: int, served: int) -> None:
    world = FakeWorld(multiuser=multiuser)
    callers = [begin(world, WHOLE, tokens=10) for _ in range(14)]
    assert [status_of(caller) for caller in callers] == [0] * served + [503] * (14 - served)
    perf = world.get("/api/extra/perf")
    assert (perf["queue"], perf["idle"], world.fake.waiting, world.fake.rejected) == (
        served - 1,
        0,
        served - 1,
        14 - served,
    )
    world.run(3.0)
    assert [status_of(caller) for caller in callers] == [200] * served + [503] * (14 - served)
    assert (world.fake.finished, world.fake.idle) == (served, True)


def test_who_waits_gets_no_byte_and_is_served_in_turn(world: FakeWorld) -> None:
    first, second, third = begin(world), begin(world, CHAT), begin(world, WHOLE)
    world.run(2.5)
    assert (second.received, third.received) == (b"", b"")
    world.run(1.0)
    assert (first.ended, status_of(second), third.received) == ("closed", 200, b"")
    world.run(10.0)
    assert (second.ended, third.ended) == ("closed", "closed")


def test_what_needs_no_slot_is_answered_while_one_runs(world: FakeWorld) -> None:
    begin(world, seconds=1.0)
    assert world.get("/api/v1/info/version") == {"result": "1.2.5"}
    assert status_of(world.post("/api/extra/tokencount", {"prompt": "hi"})) == 200
    assert status_of(world.post("/api/extra/generate/check")) == 200


@pytest.mark.parametrize(
    ("path", "body", "status"), [("/nope", b"{}", 404), ("/v1/models", b"{}", 404), (WHOLE, b"{bad", 500)]
)
def test_nonsense_waits_for_the_slot_too(world: FakeWorld, path: str, body: bytes, status: int) -> None:
    begin(world)
    caller = world.post(path, body)
    world.run(1.0)
    assert caller.received == b""
    world.run(5.0)
    assert status_of(caller) == status


def test_the_password_is_looked_at_after_the_queue() -> None:
    world = FakeWorld(password="sesame", multiuser=2)
    running = world.post(NATIVE, {"prompt": "hi"}, authorization="Bearer sesame")
    waiting = world.post(WHOLE, {"prompt": "hi"})
    assert status_of(world.post(WHOLE, {"prompt": "hi"})) == 503
    assert waiting.received == b""
    world.run(3.0)
    assert (status_of(running), status_of(waiting)) == (200, 401)


def test_parallel_requests() -> None:
    """With `--parallelrequests` several run at once, none is said to wait, and an abort stops none of them."""
    world = FakeWorld(parallel=2)
    callers = [begin(world, key=key) for key in ("a", "b", "c")]
    world.run(1.0)
    assert [bool(caller.received) for caller in callers] == [True, True, False]
    assert world.get("/api/extra/perf")["queue"] == 0
    assert world.abort("b") == ("true", "true")
    world.run(1.0)
    assert world.fake.running == 2
    callers[0].transport.loseConnection()  # type: ignore[union-attr]
    world.run(0.5)
    assert (world.fake.disconnected, bool(callers[2].received)) == (1, True)


# Callers that leave.


def leave(world: FakeWorld, caller: Caller) -> None:
    caller.transport.loseConnection()  # type: ignore[union-attr]
    world.run()


@pytest.mark.parametrize("path", [CHAT, NATIVE])
@pytest.mark.parametrize("after", [0.1, 1.0])
def test_a_stream_stops_when_its_caller_leaves(world: FakeWorld, path: str, after: float) -> None:
    leave(world, begin(world, path, seconds=after))
    assert world.fake.running == 1
    world.run(0.5)
    assert (world.fake.running, world.fake.idle, world.fake.disconnected) == (0, True, 1)


def test_an_answer_in_one_piece_is_generated_to_its_end_for_nobody(world: FakeWorld) -> None:
    leave(world, begin(world, WHOLE, seconds=1.0))
    world.run(1.5)
    assert world.fake.running == 1
    world.run(1.0)
    assert (world.fake.running, world.fake.finished) == (0, 1)
    assert world.get("/api/extra/perf")["last_token_count"] == 201


@pytest.mark.parametrize(("path", "seconds", "tokens"), [(WHOLE, 3.0, 201), (NATIVE, 0.5, 28)])
def test_who_left_while_waiting_is_generated_for_as_well(
    world: FakeWorld, path: str, seconds: float, tokens: int
) -> None:
    first = begin(world, seconds=0.5)
    leave(world, begin(world, path))
    assert world.fake.waiting == 1
    leave(world, first)
    world.run(0.45)
    assert (world.fake.running, world.fake.waiting) == (1, 0)
    world.run(seconds)
    assert world.fake.running == 0
    assert world.get("/api/extra/perf")["last_token_count"] == pytest.approx(tokens, abs=2)


# Aborts.


@pytest.mark.parametrize("path", [CHAT, NATIVE, WHOLE])
def test_an_abort_by_key_ends_the_running_one_with_what_it_has(world: FakeWorld, path: str) -> None:
    caller = begin(world, path, key="mine", seconds=1.0)
    assert world.abort("mine") == ("true", "true")
    world.run(0.3)
    assert caller.ended == "closed"
    if path == WHOLE:
        result = result_of(caller)
        assert (result["finish_reason"], result["completion_tokens"]) == ("length", len(pieces(result["text"])))
        assert result["text"]
    else:
        assert '"finish_reason": "length"' in body_of(caller).decode()
    assert (world.fake.aborted, world.fake.aborts, world.fake.idle) == (1, ["mine"], True)


def test_an_abort_is_answered_after_a_tenth_of_a_second(world: FakeWorld) -> None:
    begin(world, key="mine", seconds=1.0)
    caller = world.post("/api/extra/abort", {"genkey": "mine"})
    world.run(0.08)
    assert caller.received == b""
    world.run(0.04)
    assert caller.ended == "closed"


def test_an_abort_without_a_key_ends_whoever_runs_unless_somebody_waits(world: FakeWorld) -> None:
    caller = begin(world, WHOLE, key="mine")
    waiting = begin(world, WHOLE, key="next")
    assert world.abort() == ("false", "false")
    world.run(3.0)
    assert world.abort() == ("true", "true")
    world.run()
    assert (result_of(caller)["finish_reason"], result_of(waiting)["finish_reason"]) == ("stop", "length")
    assert world.fake.aborts == [None, None]
    assert world.abort() == ("true", "true"), "it is a success also where nothing runs"


def test_a_key_that_nobody_has(world: FakeWorld) -> None:
    begin(world, key="mine")
    assert world.abort("another") == ("false", "false")


def test_an_abort_of_a_waiting_key_is_remembered(world: FakeWorld) -> None:
    begin(world, key="first")
    waiting = begin(world, WHOLE, key="second")
    assert world.abort("second") == ("true", "false")
    assert world.abort("first") == ("true", "true")
    world.run(0.5)
    result = result_of(waiting)
    assert (result["text"], result["finish_reason"], result["completion_tokens"], result["prompt_tokens"]) == (
        "",
        "length",
        0,
        0,
    )


def test_the_remembered_key_never_expires_and_swallows_once(world: FakeWorld) -> None:
    """Which is why no key may be used twice, nor be one that another could choose."""
    begin(world, tokens=50)
    begin(world, tokens=50)
    assert world.abort("forgotten") == ("true", "false")
    assert world.abort("later") == ("true", "false")
    world.run(20.0)
    assert result_of_whole(world, "later")["text"] == ""
    assert result_of_whole(world, "later")["text"] != ""
    assert result_of_whole(world, "forgotten")["text"] != "", "only one is remembered"


def result_of_whole(world: FakeWorld, key: str) -> dict[str, Any]:
    caller = world.post(WHOLE, {"prompt": "hi", "max_length": 4, "genkey": key})
    world.run(0.5)
    return result_of(caller)


def test_what_there_is_so_far(world: FakeWorld) -> None:
    begin(world, key="mine", seconds=1.0)

    def so_far(**fields: str) -> str:
        caller = world.post("/api/extra/generate/check", fields)
        text: str = json.loads(body_of(caller))["results"][0]["text"]
        return text

    assert PASSAGE.startswith(so_far(genkey="mine")[:40])
    assert len(pieces(so_far(genkey="mine"))) == pytest.approx(70, abs=3)
    assert so_far() == so_far(genkey="another") == ""


# Connections.


def test_idle_connections_pin_the_threads(world: FakeWorld) -> None:
    idle = [world.connect() for _ in range(23)]
    assert world.get("/api/v1/info/version") == {"result": "1.2.5"}
    idle.append(world.connect())
    caller = world.send("GET", "/api/v1/info/version")
    world.run(10.0)
    assert (caller.received, caller.ended) == (b"", None)
    leave(world, idle[0])
    assert status_of(caller) == 200
    assert (world.fake.connections, world.fake.most_connections) == (23, 25)


def test_a_server_that_does_not_accept(world: FakeWorld) -> None:
    world.fake.stalled = True
    caller = world.send("GET", "/ping")
    world.run(10.0)
    assert (caller.received, world.fake.requests) == (b"", [])
    world.fake.stalled = False
    world.run()
    assert status_of(caller) == 200


def test_a_silent_stream_pins_its_thread_but_no_slot(world: FakeWorld) -> None:
    caller = world.post(TEXT, {"prompt": None, "stream": True})
    world.run(600.0)
    assert caller.received.endswith(b"content-type: text/event-stream\r\n\r\n")
    assert (caller.ended, world.fake.connections, world.fake.idle) == (None, 1, True)


def test_a_connection_carries_one_request(world: FakeWorld) -> None:
    caller = world.connect()
    caller.transport.write(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n" * 2)  # type: ignore[union-attr]
    world.run()
    assert (caller.received.count(b"HTTP/1.0 200"), caller.ended, len(world.fake.requests)) == (1, "closed", 1)


def test_what_is_no_request(world: FakeWorld) -> None:
    caller = world.connect()
    caller.transport.write(b"\x16\x03\x01\x00\r\n\r\n")  # type: ignore[union-attr]
    world.run()
    assert caller.ended == "closed"


def test_a_chunked_body_and_one_that_is_too_big(world: FakeWorld) -> None:
    caller = world.connect()
    body = b'{"prompt":"hi","max_length":1}'
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    caller.transport.write(b"POST /api/v1/generate HTTP/1.1\r\n" + chunked)  # type: ignore[union-attr]
    world.run()
    assert result_of(caller)["completion_tokens"] == 1
    caller = world.connect()
    caller.transport.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 34603008\r\n\r\nxxx")  # type: ignore[union-attr]
    world.run()
    assert status_of(caller) == 500
    assert json.loads(body_of(caller))["detail"]["msg"] == "Payload is too big. Max payload size is 32MB."


@pytest.mark.parametrize(
    "path",
    ["/v1/completions/", "/v1/completions?x=1", "/foo/v1/completions", "/v1/completion", "/completions", "/v1" + TEXT],
)
def test_paths_are_known_by_their_ends(world: FakeWorld, path: str) -> None:
    caller = world.post(path, {"prompt": "hi", "max_tokens": 1})
    world.run(0.1)
    assert json.loads(body_of(caller))["object"] == "text_completion"


# What goes wrong on request.


def test_killed_in_the_middle(world: FakeWorld) -> None:
    """All connections end in order, and all is forgotten."""
    caller, waiting = begin(world, CHAT, seconds=1.0), begin(world)
    idle = world.connect()
    world.fake.kill()
    world.run()
    assert (caller.ended, waiting.ended, idle.ended) == ("closed", "closed", "closed")
    assert text_of(caller)
    assert b"[DONE]" not in caller.received
    assert (world.fake.running, world.fake.waiting, world.fake.idle, world.fake.connections) == (0, 0, True, 0)
    assert world.clock.getDelayedCalls() == []
    assert world.get("/api/extra/perf")["total_gens"] == 0


@pytest.mark.parametrize(
    ("fault", "ended", "running"), [(Fault.EOF, "closed", 0), (Fault.RESET, "reset", 0), (Fault.SILENCE, None, 1)]
)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_faults_after_so_many_tokens(
    world: FakeWorld, fault: Fault, ended: str | None, running: int, tokens: int
) -> None:
    world.fake.script(Script(fault=fault, after_tokens=tokens, tokens_per_event=1))
    caller = world.post(CHAT, HI)
    world.run(100.0)
    assert (caller.ended, world.fake.running) == (ended, running)
    assert len(events_of(caller)) == tokens
    leave(world, caller)
    world.run(0.5)
    assert (world.fake.running, world.fake.idle) == (0, True)
    ordinary = world.post(CHAT, HI)
    world.run(3.0)
    assert events_of(ordinary)[-1] == "[DONE]", "a script is for one request"


@pytest.mark.parametrize(
    ("fault", "ended", "running"), [(Fault.EOF, "closed", 0), (Fault.RESET, "reset", 0), (Fault.SILENCE, None, 1)]
)
def test_faults_of_an_answer_in_one_piece(world: FakeWorld, fault: Fault, ended: str | None, running: int) -> None:
    world.fake.script(Script(fault=fault, after_tokens=7))
    caller = world.post(WHOLE, {"prompt": "hi"})
    world.run(0.05)
    assert caller.ended is None
    world.run(100.0)
    assert (caller.received, caller.ended, world.fake.running) == (b"", ended, running)
    leave(world, caller)
    assert world.fake.idle


def test_an_abort_ends_a_stream_that_had_fallen_silent(world: FakeWorld) -> None:
    world.fake.script(Script(fault=Fault.SILENCE, after_tokens=3))
    caller = world.post(CHAT, {**HI, "genkey": "mine"})
    world.run(5.0)
    world.abort("mine")
    world.run(0.3)
    assert events_of(caller)[-1] == "[DONE]"


CANNED: list[tuple[Script, int, str | None, Callable[[bytes], bool]]] = [
    (fake.BUSY, 503, "closed", lambda body: b'"service_unavailable"' in body),
    (fake.RATE_LIMITED, 503, "closed", lambda body: b"too quickly" in body),
    (fake.LOADING, 503, "closed", lambda body: b'"unavailable_error"' in body),
    (fake.SERVER_ERROR, 500, "closed", lambda body: b"detail" in body),
    (fake.UNAUTHORIZED, 401, "closed", lambda body: b'"unauthorized"' in body),
    (fake.NOT_FOUND, 404, "closed", lambda body: not body),
    (fake.WEB_PAGE, 200, "closed", lambda body: body.startswith(b"<!DOCTYPE")),
    (fake.NULL, 200, "closed", lambda body: body == b"null"),
    (fake.EMPTY, 0, "closed", lambda body: not body),
    (fake.SILENT_STREAM, 200, None, lambda body: not body),
]


@pytest.mark.parametrize(("script", "status", "ended", "fits"), CANNED)
def test_canned_answers(
    world: FakeWorld, script: Script, status: int, ended: str | None, fits: Callable[[bytes], bool]
) -> None:
    world.fake.script(script, times=2)
    for _ in range(2):
        caller = world.post(CHAT, HI)
        world.run(1.0)
        assert (status_of(caller), caller.ended, fits(body_of(caller))) == (status, ended, True)
    assert world.fake.running == 0
    caller = world.post(CHAT, HI)
    world.run(3.0)
    assert events_of(caller)[-1] == "[DONE]"


def test_scripts_for_paths_and_for_good(world: FakeWorld) -> None:
    world.fake.script(fake.LOADING, times=None, path="/api/extra/version")
    world.fake.script(Script(before_headers=2.0), path="/ping")
    for _ in range(3):
        assert status_of(world.send("GET", "/api/extra/version")) == 503
    slow = world.send("GET", "/ping")
    world.run(1.9)
    assert slow.received == b""
    world.run(0.2)
    assert status_of(slow) == 200
    world.fake.clear()
    assert status_of(world.send("GET", "/api/extra/version")) == 200


def test_endpoints_that_it_has_not(world: FakeWorld) -> None:
    world.fake.missing.update([CHAT, "/api/extra/version"])
    assert status_of(world.post(CHAT, HI)) == 404
    assert status_of(world.send("GET", "/api/extra/version")) == 404
    assert status_of(world.post(TEXT, {"prompt": "hi", "stream": True})) == 200


def test_a_failed_generation_and_a_wrong_length(world: FakeWorld) -> None:
    world.fake.script(fake.FAILED)
    caller = world.post(CHAT, HI)
    world.run(1.0)
    assert [event["choices"][0]["finish_reason"] for event in events_of(caller)[:-1]] == ["error"]
    world.fake.script(Script(length_error=10))
    caller = world.post(WHOLE, {"prompt": "hi", "max_length": 1})
    world.run(0.1)
    assert f"content-length: {len(body_of(caller)) + 10}\r\n" in caller.received.decode()


def test_what_came_is_kept(world: FakeWorld) -> None:
    world.post(CHAT, HI, authorization="Bearer x")
    world.post(WHOLE, b"{bad")
    first, second = world.fake.requests
    assert (first.method, first.path, first.json, first.headers["authorization"]) == ("POST", CHAT, HI, "Bearer x")
    assert (second.body, second.json) == (b"{bad", None)


# What it says.


def test_echo_and_text() -> None:
    world = FakeWorld(echo=True)
    caller = world.post(CHAT, {"messages": [{"role": "user", "content": "Say this."}]})
    world.run(1.0)
    assert json.loads(body_of(caller))["choices"][0]["message"]["content"] == "Say this."
    world.fake.settings.text = "That."
    world.fake.settings.echo = False
    caller = world.post(WHOLE, {"prompt": "Say this."})
    world.run(1.0)
    assert result_of(caller)["text"] == "That."


def test_a_prompt_that_is_too_long_is_cut_without_a_word(world: FakeWorld) -> None:
    caller = world.post(WHOLE, {"prompt": "word " * 4000, "max_length": 4})
    world.run(1.0)
    assert (status_of(caller), result_of(caller)["prompt_tokens"]) == (200, 2044)


def test_an_answer_takes_at_most_four_fifths_of_the_context(world: FakeWorld) -> None:
    caller = world.post(WHOLE, {"prompt": "hi", "max_length": 5000, "bypass_eos": True})
    world.run(30.0)
    assert result_of(caller)["completion_tokens"] == 1638


@given(st.text())
def test_tokens_make_up_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text


@given(st.text("ab ", max_size=40), st.integers(1, 50), st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3))
def test_an_answer_never_shows_a_stop_sequence(text: str, limit: int, stops: list[str]) -> None:
    made = plan(pieces(text), limit, stops)
    shown = "".join(made.pieces)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert len(made.pieces) <= made.tokens <= limit


def test_tokencount_agrees_with_usage(world: FakeWorld) -> None:
    """But for the token that begins a bare prompt, as with the real one."""
    messages = [{"role": "system", "content": "Sei höflich."}, {"role": "user", "content": "Wie spät ist es?"}]
    caller = world.post(CHAT, {"messages": messages})
    world.run(2.0)
    counted = json.loads(body_of(world.post("/api/extra/tokencount", {"messages": messages})))
    assert counted["value"] == json.loads(body_of(caller))["usage"]["prompt_tokens"]
    caller = world.post(WHOLE, {"prompt": "Wie spät ist es?"})
    world.run(2.0)
    counted = json.loads(body_of(world.post("/api/extra/tokencount", {"prompt": "Wie spät ist es?"})))
    assert counted["value"] == result_of(caller)["prompt_tokens"] + 1
    ids = counted["ids"][1:]
    assert json.loads(body_of(world.post("/api/extra/detokenize", {"ids": ids})))["result"] == "Wie spät ist es?"
