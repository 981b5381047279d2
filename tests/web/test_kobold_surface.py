"""KoboldCPP's surface: its answers, streams, what clients look for, keys of generations, and errors in its shape."""

import json
from pathlib import Path
from typing import Any

import pytest
from harness import COMPLETION
from msgspec.structs import replace
from surface import Surface
from test_openai import ask
from test_streaming import Stream
from twisted.internet.defer import fail, succeed

from ai_ticket.errors import (
    ApiClientError,
    ApiConnectionError,
    ApiEndpointMissing,
    ContextLengthExceeded,
    DeadlineExceeded,
    DomainError,
    NoBackendAvailable,
    Overloaded,
    UnsupportedParameter,
)
from ai_ticket.event import Usage
from ai_ticket.interfaces import Admission, BackendState, Tokens

GENERATE, STREAM = "/api/v1/generate", "/api/extra/generate/stream"
CHECK, ABORT, COUNT = "/api/extra/generate/check", "/api/extra/abort", "/api/extra/tokencount"
ONCE = {"prompt": "Once", "genkey": "KCPP1"}
CAPTURES = Path(__file__).parent.parent / "captures" / "koboldcpp"
OTHER = {"authorization": "Bearer other"}


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
def running(surface: Surface, request: pytest.FixtureRequest) -> Stream:
    """A generation in one piece, under way with the key KCPP1."""
    return Stream(surface, http2=request.param, path=GENERATE, body=json.dumps(ONCE).encode())


def check(surface: Surface, body: Any = None, **headers: str) -> str:
    status, _, answer = ask(surface, "POST", CHECK, body, **headers)
    assert (status, len(answer["results"])) == (200, 1)
    text: str = answer["results"][0]["text"]
    return text


def abort(surface: Surface, body: Any = None, **headers: str) -> tuple[str, str]:
    status, _, answer = ask(surface, "POST", ABORT, body, **headers)
    assert status == 200
    return answer["success"], answer["done"]


class TestGenerations:
    @pytest.mark.parametrize("path", [GENERATE, "/api/latest/generate", f"{GENERATE}/", "/api/latest/generate/"])
    def test_in_one_piece(self, surface: Surface, path: str) -> None:
        surface.pipeline.answer = lambda: (
            surface.pipeline.jobs[-1].sink.write("upon a time"),
            succeed(replace(COMPLETION, text="", usage=Usage(1, 3, 4), finish_reason="length")),
        )[1]
        status, headers, answer = ask(surface, "POST", path, ONCE)
        assert (status, headers["content-type"]) == (200, "application/json")
        assert answer == {
            "results": [
                {
                    "text": "upon a time",
                    "tool_calls": [],
                    "finish_reason": "length",
                    "logprobs": None,
                    "prompt_tokens": 1,
                    "completion_tokens": 3,
                }
            ]
        }
        assert surface.recorder.finished[-1][:3] == (GENERATE, "POST", 200)

    def test_without_counts(self, surface: Surface) -> None:
        surface.pipeline.answer = lambda: succeed(replace(COMPLETION, usage=None))
        result = ask(surface, "POST", GENERATE, ONCE)[2]["results"][0]
        assert result.keys() == {"text", "tool_calls", "finish_reason", "logprobs"}

    @pytest.mark.parametrize("http2", [False, True])
    def test_in_pieces(self, surface: Surface, http2: bool) -> None:
        stream = Stream(surface, http2=http2, path=STREAM, body=json.dumps(ONCE).encode())
        stream.sink.write("upon ")
        stream.sink.write("a time")
        stream.done.callback(COMPLETION)
        assert stream.body == (
            'event: message\ndata: {"token":"upon ","finish_reason":null}\n\n'
            'event: message\ndata: {"token":"a time","finish_reason":null}\n\n'
            'event: message\ndata: {"token":"","finish_reason":"stop"}\n\n'
        )
        assert stream.ended

    def test_a_stream_that_fails(self, surface: Surface) -> None:
        stream = Stream(surface, http2=False, path=STREAM, body=json.dumps(ONCE).encode())
        stream.sink.write("upon ")
        stream.done.errback(ApiConnectionError("it broke"))
        assert stream.body.endswith(
            "event: error\n"
            'data: {"detail":{"msg":"The connection to the model server failed. (it broke)",'
            '"type":"api_connection_error","code":"api_connection_error"}}\n\n'
        )

    def test_who_leaves_is_not_generated_for(self, running: Stream) -> None:
        running.leave()
        assert running.cancelled == [True]
        assert check(running.surface, {"genkey": "KCPP1"}) == ""

    def test_it_is_the_engine_of_events(self, surface: Surface) -> None:
        status, headers, _ = ask(surface, "POST", GENERATE, ONCE, traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
        assert status == 200
        assert {"x-request-id", "ratelimit", "ratelimit-policy", "server-timing"} <= headers.keys()
        [job] = surface.pipeline.jobs
        assert (job.event.raw_prompt, job.event.key, job.client.address) == ("Once", "KCPP1", "192.0.2.7")
        assert [span.name for span in surface.tracer.ended] == [f"POST {GENERATE}"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_tavern_at_openais_surface(self, surface: Surface, stream: bool) -> None:
        """It has the answer that it knows, and can be aborted as it does it."""
        body = {"prompt": "Once", "api_type": "koboldcpp", "skew": 0, "rep_pen": 1.1, "stream": stream}
        under_way = Stream(surface, http2=False, path="/v1/completions", body=json.dumps(body).encode())
        under_way.sink.write("upon")
        assert check(surface) == "upon"
        assert abort(surface) == ("true", "true")
        assert under_way.cancelled == [True]
        if stream:
            *chunks, done = under_way.body.split("\n\n")[:-1]
            assert done == "data: [DONE]"
            pieces = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
            assert [piece["choices"] for piece in pieces] == [
                [{"index": 0, "text": "upon", "logprobs": None, "finish_reason": None}],
                [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}],
            ]
            for piece in pieces:
                assert piece["id"].startswith("cmpl-")
                assert (piece["object"], piece["model"]) == ("text_completion", "m")
        else:
            assert json.loads(under_way.body)["id"].startswith("cmpl-")
            [choice] = json.loads(under_way.body)["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("upon", "length")

    def test_each_counts(self, surface: Surface) -> None:
        surface.limiter.admissions = [Admission(False, 0, 30.0)]
        status, headers, answer = ask(surface, "POST", GENERATE, ONCE)
        assert (status, headers["retry-after"], answer["detail"]["code"]) == (429, "30", "rate_limited")


class TestKeys:
    def test_a_look_at_ones_own(self, running: Stream) -> None:
        running.sink.write("upon ")
        running.sink.write("a")
        assert check(running.surface, {"genkey": "KCPP1"}) == "upon a"
        assert check(running.surface, {"genkey": "KCPP2"}) == ""
        assert check(running.surface, {"genkey": "KCPP1"}, **OTHER) == ""

    def test_without_a_key_the_only_one(self, running: Stream) -> None:
        """As clients ask that know of no keys: with no body at all, or an empty object."""
        running.sink.write("upon")
        surface = running.surface
        assert check(surface) == check(surface, {}) == check(surface, {"genkey": ""}) == "upon"
        assert ask(surface, "GET", CHECK)[2] == {"results": [{"text": "upon"}]}
        assert check(surface, **OTHER) == ""
        Stream(surface, http2=False, path=GENERATE, body=b'{"prompt": "x", "genkey": "KCPP2"}')
        assert check(surface) == ""

    @pytest.mark.parametrize("path", [ABORT, "/api/v1/abort", f"{ABORT}/"])
    def test_what_is_aborted_ends_with_what_had_come(self, surface: Surface, path: str) -> None:
        running = Stream(surface, http2=False, path=GENERATE, body=json.dumps(ONCE).encode())
        running.sink.write("upon")
        assert ask(surface, "POST", path, {"genkey": "KCPP1"})[2] == {"success": "true", "done": "true"}
        assert running.cancelled == [True]
        [result] = json.loads(running.body)["results"]
        assert (result["text"], result["finish_reason"]) == ("upon", "length")
        assert check(surface, {"genkey": "KCPP1"}) == ""

    def test_a_stream_that_is_aborted(self, surface: Surface) -> None:
        stream = Stream(surface, http2=False, path=STREAM, body=json.dumps(ONCE).encode())
        stream.sink.write("upon")
        assert abort(surface, {"genkey": "KCPP1"}) == ("true", "true")
        assert stream.body.endswith('data: {"token":"","finish_reason":"length"}\n\n')
        assert stream.ended

    def test_nobody_elses(self, running: Stream) -> None:
        surface = running.surface
        assert abort(surface, {"genkey": "KCPP1"}, **OTHER) == ("false", "false")
        assert abort(surface, {"genkey": "KCPP2"}) == ("false", "false")
        assert abort(surface, **OTHER) == ("true", "true")  # it has none at all: as it is meant to be
        assert not running.cancelled

    def test_without_a_key_only_where_it_is_clear_which(self, surface: Surface) -> None:
        first = Stream(surface, http2=False, path=GENERATE, body=json.dumps(ONCE).encode())
        second = Stream(surface, http2=False, path=GENERATE, body=json.dumps(ONCE).encode())
        assert abort(surface) == ("false", "false")
        assert not first.cancelled + second.cancelled
        assert abort(surface, {"genkey": "KCPP1"}) == ("true", "true")
        assert (first.cancelled, second.cancelled) == ([True], [True])

    def test_other_surfaces_are_not_touched(self, surface: Surface) -> None:
        """What has no key of its own is nothing that a key could name."""
        stream = Stream(surface, http2=False)
        assert abort(surface) == ("true", "true")
        assert not stream.cancelled

    @pytest.mark.parametrize("body", [b"{", b"[]", b'{"genkey": 5}', b'"KCPP1"'])
    def test_what_is_no_key(self, surface: Surface, body: bytes) -> None:
        for path in (CHECK, ABORT):
            status, _, answer = ask(surface, "POST", path, body)
            assert (status, answer["detail"]["type"]) == (400, "bad_input")

    def test_too_long_a_body(self, surface: Surface) -> None:
        assert ask(surface, "POST", ABORT, {"genkey": "x" * 5000})[0] == 413

    def test_no_length_and_no_body(self, surface: Surface) -> None:
        """As curl sends a POST without data."""
        head = f"POST {ABORT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n\r\n"
        [(status, _, body)] = surface.http1(head.encode())
        assert (status, json.loads(body)) == (200, {"success": "true", "done": "true"})


class TestFacts:
    @pytest.mark.parametrize(
        ("path", "answer"),
        [
            ("/api/v1/model", {"result": "koboldcpp/m"}),
            ("/api/latest/model", {"result": "koboldcpp/m"}),
            ("/api/v1/info/version", {"result": "1.2.5"}),
            ("/api/v1/config/max_length", {"value": 4096}),
            ("/api/v1/config/max_context_length", {"value": 2048}),
            ("/api/extra/true_max_context_length", {"value": 2048}),
            ("/api/extra/true_max_context_length/", {"value": 2048}),
        ],
    )
    def test_what_clients_look_for(self, surface: Surface, path: str, answer: Any) -> None:
        surface.backends[:] = [
            BackendState(name="down", up=False, slots=1, model="x", context_length=512),
            BackendState(name="a", up=True, slots=1, model="koboldcpp/m", context_length=8192),
            BackendState(name="b", up=True, slots=1, model="n", context_length=2048),
        ]
        assert ask(surface, "GET", path)[::2] == (200, answer)
        assert surface.limiter.asked == []

    def test_the_version(self, surface: Surface) -> None:
        answer = ask(surface, "GET", "/api/extra/version")[2]
        assert (answer["result"], answer["protected"], answer["llm"], answer["admin"]) == ("KoboldCpp", True, True, 0)
        assert not any(answer[part] for part in ("txt2img", "vision", "multiplayer", "savedata", "tts", "jinja"))

    def test_nothing_is_known_yet(self, surface: Surface) -> None:
        surface.backends[:] = [BackendState(name="a", up=False, slots=1)]
        assert ask(surface, "GET", "/api/v1/model")[2] == {"result": "inactive"}
        status, _, answer = ask(surface, "GET", "/api/v1/config/max_context_length")
        assert (status, answer["detail"]["code"]) == (503, "no_backend_available")

    def test_how_it_went(self, running: Stream) -> None:
        """The queue is everybody's; what was generated only one's own."""
        surface = running.surface
        before = ask(surface, "GET", "/api/extra/perf", **OTHER)[2]
        assert (before["queue"], before["idle"], before["total_gens"], before["stop_reason"]) == (3, 0, 0, -1)
        surface.pipeline.jobs[-1].began_at = surface.clock.seconds()
        surface.clock.advance(0.5)
        running.sink.write("upon")
        surface.clock.advance(2)
        running.done.callback(replace(COMPLETION, usage=Usage(10, 40, 50)))
        surface.clock.advance(7)
        after = ask(surface, "GET", "/api/extra/perf")[2]
        assert {name: after[name] for name in ("last_input_count", "last_token_count", "total_gens", "idletime")} == {
            "last_input_count": 10,
            "last_token_count": 40,
            "total_gens": 1,
            "idletime": 7,
        }
        assert (after["last_process_time"], after["last_process"], after["last_process_speed"]) == (0.5, 50, 20)
        assert (after["last_eval_time"], after["last_eval"], after["last_eval_speed"]) == (2, 50, 20)
        assert (after["stop_reason"], after["uptime"]) == (1, 9.5)
        assert ask(surface, "GET", "/api/extra/perf", **OTHER)[2]["total_gens"] == 0

    @pytest.mark.parametrize("path", ["/api/extra/perf", "/api/extra/version"])
    def test_the_fields_are_those_of_a_real_one(self, surface: Surface, path: str) -> None:
        """Clients read them by name."""
        recorded = CAPTURES / f"get-{path[1:].replace('/', '_')}.txt"
        real = json.loads(recorded.read_text().rpartition("\n{")[2].join(["{", ""]))
        assert ask(surface, "GET", path)[2].keys() == real.keys()


class TestTokens:
    def test_a_backend_counts(self, surface: Surface) -> None:
        asked = []

        async def tokenize(text: str) -> Tokens:
            asked.append(text)
            return Tokens(3, [1, 20, 30])

        surface.tokenize = tokenize
        status, _, answer = ask(surface, "POST", COUNT, {"prompt": "hello world"})
        assert (status, answer) == (200, {"value": 3, "ids": [1, 20, 30], "prompt": "hello world"})
        assert (asked, surface.limiter.asked) == (["hello world"], [])

    def test_none_can(self, surface: Surface) -> None:
        status, _, answer = ask(surface, "POST", COUNT, {"prompt": "hello"})
        assert (status, answer["detail"]["type"]) == (503, "service_unavailable")

    @pytest.mark.parametrize(
        ("body", "status"), [({}, 400), ({"prompt": 5}, 400), (b"{", 400), ({"prompt": "x" * 20_000}, 413)]
    )
    def test_what_can_not_be_counted(self, surface: Surface, body: Any, status: int) -> None:
        assert ask(surface, "POST", COUNT, body)[0] == status


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status", "kind", "headers"),
        [
            (Overloaded(retry_after=2.5), 503, "service_unavailable", {"retry-after": "3"}),
            (NoBackendAvailable(retry_after=1), 503, "service_unavailable", {"retry-after": "1"}),
            (ContextLengthExceeded("9 of 8"), 422, "bad_input", {}),
            (
                UnsupportedParameter("tfs", message="The model server can't do what `tfs` asks for."),
                400,
                "bad_input",
                {},
            ),
            (DeadlineExceeded(), 504, "deadline_exceeded", {}),
            (ApiClientError("400"), 400, "bad_input", {}),
            (ApiEndpointMissing(), 502, "api_client_error", {}),
        ],
    )
    def test_the_shape(
        self, surface: Surface, error: DomainError, status: int, kind: str, headers: dict[str, str]
    ) -> None:
        surface.pipeline.answer = lambda: fail(error)
        found, answered, answer = ask(surface, "POST", GENERATE, ONCE)
        assert (found, answer["detail"]["type"], answer["detail"]["code"]) == (status, kind, error.code)
        assert error.message in answer["detail"]["msg"]
        assert headers.items() <= answered.items()

    def test_a_wrong_field_is_named(self, surface: Surface) -> None:
        answer = ask(surface, "POST", GENERATE, {"prompt": "Once", "rep_pen": "x"})[2]
        assert answer["detail"] == {
            "msg": "rep_pen: Expected `float | null`, got `str`",
            "type": "bad_input",
            "code": "invalid_parameter",
        }

    @pytest.mark.parametrize(
        ("fields", "param", "code"),
        [
            ({"rep_pen": "x"}, "rep_pen", "invalid_value"),
            ({"prompt": ""}, "prompt", "invalid_value"),
            ({"max_tokens": 0}, "max_tokens", "invalid_value"),
            ({"max_length": 0}, "max_length", "invalid_value"),
            ({"custom_token_bans": "x"}, "custom_token_bans", "invalid_value"),
        ],
    )
    def test_taverns_are_openais(self, surface: Surface, fields: dict[str, Any], param: str, code: str) -> None:
        body = {"prompt": "Once", "api_type": "koboldcpp"} | fields
        status, _, answer = ask(surface, "POST", "/v1/completions", body)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code)
        assert param in answer["error"]["message"]

    def test_tavern_without_a_prompt(self, surface: Surface) -> None:
        status, _, answer = ask(surface, "POST", "/v1/completions", {"api_type": "koboldcpp"})
        assert (status, answer["error"]["param"]) == (400, "prompt")
        assert answer["error"]["code"] == "missing_required_parameter"

    @pytest.mark.parametrize(
        ("method", "path"), [("POST", GENERATE), ("GET", "/api/v1/model"), ("POST", ABORT), ("GET", "/api/extra/perf")]
    )
    def test_a_token_is_needed(self, surface: Surface, method: str, path: str) -> None:
        status, headers, answer = ask(surface, method, path, ONCE if method == "POST" else None, authorization="")
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert (answer["detail"]["error"], answer["detail"]["type"]) == ("Unauthorized", "unauthorized")

    def test_what_is_not_there(self, surface: Surface) -> None:
        status, _, answer = ask(surface, "GET", "/api/v1/nothing")
        assert (status, answer["detail"]["type"]) == (404, "not_found")
        status, headers, answer = ask(surface, "DELETE", GENERATE)
        assert (status, headers["allow"], answer["detail"]["type"]) == (405, "POST", "method_not_allowed")

    def test_the_end_of_the_service(self, surface: Surface) -> None:
        surface.draining = True
        for method, path in (("POST", GENERATE), ("GET", "/api/v1/model")):
            status, headers, answer = ask(surface, method, path, ONCE if method == "POST" else None)
            assert (status, answer["detail"]["code"]) == (503, "shutting_down")
            assert headers["retry-after"] == "5"
