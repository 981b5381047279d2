"""OpenAI's surface: its answers, streams, models, errors and headers; and that it is the same engine as for events."""

import json
from typing import Any

import pytest
from harness import COMPLETION
from msgspec.structs import replace
from surface import Surface
from test_streaming import Stream
from twisted.internet.defer import fail, succeed

from ai_ticket.content import Function, ToolCall
from ai_ticket.errors import (
    ApiClientError,
    ApiConnectionError,
    ApiEndpointMissing,
    ApiServerError,
    ContextLengthExceeded,
    DeadlineExceeded,
    DomainError,
    InternalError,
    NoBackendAvailable,
    Overloaded,
    UnsupportedParameter,
)
from ai_ticket.interfaces import Admission, BackendState

CHAT, TEXT, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
HELLO: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
ONCE: dict[str, Any] = {"model": "gpt-4o", "prompt": "Once"}
JSON = "application/json"

Answer = tuple[int, dict[str, str], Any]


def ask(surface: Surface, method: str, path: str, body: Any = None, *, http2: bool = False, **headers: str) -> Answer:
    """What comes back for a request, its JSON decoded."""
    fields = {"authorization": "Bearer secret", "content-type": JSON, **headers}
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    if http2:
        client = surface.connect2()
        stream = client.request(method, path, [(name, value) for name, value in fields.items() if value], data)
        status, answered, content = client.response(stream)
    else:
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: x",
            *(f"{name}: {value}" for name, value in fields.items() if value),
        ]
        lines.append(f"Content-Length: {len(data)}")
        [(status, answered, content)] = surface.http1("\r\n".join([*lines, "", ""]).encode() + data)
    return status, answered, json.loads(content) if content else None


def test_a_chat(surface: Surface) -> None:
    surface.clock.advance(1700000000.5)
    status, headers, answer = ask(surface, "POST", CHAT, HELLO)
    assert (status, headers["content-type"]) == (200, JSON)
    assert answer == {
        "id": "chatcmpl-id0",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "a-model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Fine.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    assert headers["x-request-id"] == "id0"
    assert [message.content for message in surface.pipeline.events[0].messages] == ["hello"]


def test_a_text(surface: Surface) -> None:
    _, _, answer = ask(surface, "POST", TEXT, ONCE)
    assert (answer["id"], answer["object"]) == ("cmpl-id0", "text_completion")
    assert answer["choices"] == [{"text": "Fine.", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    assert surface.pipeline.events[0].raw_prompt == "Once"


def test_calls_of_tools(surface: Surface) -> None:
    calls = [ToolCall("c1", Function("weather", '{"city": "Paris"}'))]
    completion = replace(COMPLETION, text="", finish_reason="tool_calls", tool_calls=calls, usage=None)
    surface.pipeline.answer = lambda: succeed(completion)
    _, _, answer = ask(surface, "POST", CHAT, HELLO)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    ]
    assert "usage" not in answer


def test_what_the_model_thought_and_how_likely_its_words_were(surface: Surface) -> None:
    completion = replace(COMPLETION, reasoning="Hm.", logprobs='[{"token": "Fine"}]')
    surface.pipeline.answer = lambda: succeed(completion)
    [choice] = ask(surface, "POST", CHAT, HELLO)[2]["choices"]
    assert choice["message"]["reasoning_content"] == "Hm."
    assert choice["logprobs"]["content"] == [{"token": "Fine"}]


@pytest.mark.parametrize("http2", [False, True])
def test_a_stream(surface: Surface, http2: bool) -> None:
    body = json.dumps({**HELLO, "stream": True}).encode()
    stream = Stream(surface, http2=http2, path=CHAT, body=body)
    assert stream.status == 0
    stream.sink.relay(b'data: {"id":"chatcmpl-id0"}\n\n')
    assert (stream.status, stream.body) == (200, 'data: {"id":"chatcmpl-id0"}\n\n')
    stream.done.callback(replace(COMPLETION, text=""))
    assert stream.body.endswith("}\n\ndata: [DONE]\n\n")
    assert stream.ended
    assert surface.recorder.finished == [(CHAT, "POST", 200)]


def test_signs_of_life_while_it_waits(surface: Surface) -> None:
    stream = Stream(surface, http2=False, path=CHAT, body=json.dumps({**HELLO, "stream": True}).encode())
    surface.clock.advance(10)
    assert stream.body == ": keep-alive\n\n"
    stream.done.errback(ApiServerError("it broke"))
    [_, event] = stream.body.split("\n\n")[:2]
    assert json.loads(event.removeprefix("data: ")) == {
        "error": {
            "message": "The model server failed. (it broke)",
            "type": "server_error",
            "param": None,
            "code": "api_server_error",
        }
    }
    assert "[DONE]" not in stream.body
    assert stream.ended


def test_a_stream_that_fails_at_once_has_a_status(surface: Surface) -> None:
    surface.pipeline.answer = lambda: fail(Overloaded(retry_after=3))
    status, headers, answer = ask(surface, "POST", CHAT, {**HELLO, "stream": True})
    assert (status, headers["retry-after"], answer["error"]["code"]) == (503, "3", "overloaded")


def test_who_leaves_stops_the_generation(surface: Surface) -> None:
    stream = Stream(surface, http2=False, path=CHAT, body=json.dumps({**HELLO, "stream": True}).encode())
    stream.leave()
    assert stream.cancelled == [True]
    assert surface.recorder.finished == [(CHAT, "POST", 499)]


def test_models(surface: Surface) -> None:
    surface.backends[:] = [
        BackendState(name="a:1", up=True, slots=1, model="koboldcpp/one"),
        BackendState(name="b:1", up=False, slots=1, model="koboldcpp/one"),
        BackendState(name="c:1", up=True, slots=1, model="two"),
        BackendState(name="d:1", up=False, slots=1),
    ]
    _, _, answer = ask(surface, "GET", MODELS)
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["koboldcpp/one", "two"]
    assert answer["data"][0] == {"id": "koboldcpp/one", "object": "model", "created": 0, "owned_by": "ai-ticket"}
    for path in ("koboldcpp/one", "koboldcpp%2Fone"):
        assert ask(surface, "GET", f"{MODELS}/{path}")[2] == answer["data"][0]
    assert surface.recorder.finished[-1] == ("/v1/models/{id}", "GET", 200)
    assert ask(surface, "GET", f"{MODELS}/")[2] == answer
    assert surface.recorder.finished[-1] == (MODELS, "GET", 200)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_slash_at_the_end_changes_nothing(surface: Surface, path: str) -> None:
    fields = HELLO if path == CHAT else ONCE
    assert ask(surface, "POST", f"{path}/", fields)[0] == ask(surface, "POST", path, fields)[0] == 200
    assert {finished[0] for finished in surface.recorder.finished} == {path}


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize(
    ("request_", "status", "error"),
    [
        (("GET", f"{MODELS}/gpt-4o"), 404, ("invalid_request_error", "model", "model_not_found")),
        (("GET", "/v1/embeddings"), 404, ("invalid_request_error", None, "not_found")),
        (("GET", CHAT), 405, ("invalid_request_error", None, "method_not_allowed")),
        (("POST", f"{MODELS}/x"), 405, ("invalid_request_error", None, "method_not_allowed")),
        (("POST", CHAT, b"{"), 400, ("invalid_request_error", None, "invalid_request")),
        (("POST", CHAT, {**HELLO, "n": 2}), 400, ("invalid_request_error", "n", "unsupported_parameter")),
        (("POST", CHAT, {**HELLO, "x": 2}), 400, ("invalid_request_error", "x", "unknown_parameter")),
        (("POST", CHAT, b"x" * 10_001), 413, ("invalid_request_error", None, "payload_too_large")),
    ],
)
def test_what_is_wrong_with_a_request(
    surface: Surface, http2: bool, request_: tuple[Any, ...], status: int, error: tuple[str, str | None, str]
) -> None:
    found, headers, answer = ask(surface, *request_, http2=http2)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert (answer["error"]["type"], answer["error"]["param"], answer["error"]["code"]) == error
    assert headers["x-request-id"] == "id0"
    assert ("allow" in headers) == (status == 405)


@pytest.mark.parametrize("http2", [False, True])
def test_who_may_not_come_in(surface: Surface, http2: bool) -> None:
    status, headers, answer = ask(surface, "POST", CHAT, HELLO, http2=http2, authorization="")
    assert (status, answer["error"]["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert answer["error"]["type"] == "authentication_error"
    status, _, answer = ask(surface, "POST", CHAT, HELLO, http2=http2, **{"content-type": "text/plain"})
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
    surface.draining = True
    status, headers, answer = ask(surface, "GET", MODELS, http2=http2)
    assert (status, answer["error"]["type"], headers["retry-after"]) == (503, "server_error", "5")
    assert surface.pipeline.jobs == []


def test_quotas(surface: Surface) -> None:
    surface.limiter.admissions = [Admission(True, 7, 1.5), Admission(False, 0, 31.2), Admission(False, 0, 90.0)]
    _, headers, _ = ask(surface, "POST", CHAT, HELLO)
    names = ("limit", "remaining", "reset")
    assert [headers[f"x-ratelimit-{name}-requests"] for name in names] == ["120", "7", "2s"]
    status, headers, answer = ask(surface, "POST", CHAT, HELLO)
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (429, "requests", "rate_limit_exceeded")
    assert [headers[f"x-ratelimit-{name}-requests"] for name in names] == ["120", "0", "32s"]
    assert headers["retry-after"] == "32"
    assert "x-should-retry" not in headers
    _, headers, _ = ask(surface, "POST", CHAT, HELLO)
    assert (headers["retry-after"], headers["x-should-retry"]) == ("90", "false")


def test_events_have_no_headers_of_openai(surface: Surface) -> None:
    _, headers, _ = ask(surface, "POST", "/event", {"content": "hello"})
    assert not [name for name in headers if name.startswith("x-ratelimit")]
    assert ask(surface, "POST", "/event", {})[2]["error"] == "missing_content_field"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "retry"),
    [
        (ApiConnectionError("x"), 502, "server_error", "api_connection_error", True),
        (NoBackendAvailable(retry_after=2), 503, "server_error", "no_backend_available", True),
        (InternalError(), 500, "server_error", "internal_error", True),
        (DeadlineExceeded(), 504, "server_error", "deadline_exceeded", False),
        (ApiEndpointMissing(), 502, "server_error", "api_client_error", False),
        (ApiClientError("the server answered 400"), 400, "invalid_request_error", "api_client_error", True),
        (ContextLengthExceeded("too long"), 400, "invalid_request_error", "context_length_exceeded", True),
        (UnsupportedParameter("tools"), 400, "invalid_request_error", "unsupported_parameter", True),
    ],
)
def test_what_fails(surface: Surface, error: DomainError, status: int, kind: str, code: str, retry: bool) -> None:
    surface.pipeline.answer = lambda: fail(error)
    found, headers, answer = ask(surface, "POST", CHAT, HELLO)
    assert (found, answer["error"]["type"], answer["error"]["code"]) == (status, kind, code)
    assert ("x-should-retry" not in headers) == retry
    assert surface.recorder.finished == [(CHAT, "POST", status)]


@pytest.mark.expects_logged_failure
def test_a_bug_gives_nothing_away(surface: Surface) -> None:
    def broken() -> Any:
        raise ZeroDivisionError("secret")

    surface.pipeline.answer = broken
    status, _, answer = ask(surface, "POST", CHAT, HELLO)
    assert (status, answer["error"]["message"]) == (500, "An internal error occurred.")


def test_it_is_watched_like_an_event(surface: Surface) -> None:
    """Its span, the overhead, and what the metadata says."""
    ask(surface, "POST", CHAT, {**HELLO, "metadata": {"team": "a"}})
    span = surface.tracer.named(f"POST {CHAT}")
    assert (span.attributes["http.route"], span.attributes["ai_ticket.metadata.team"]) == (CHAT, "a")
    assert [route for route, _ in surface.recorder.overheads] == [CHAT]
