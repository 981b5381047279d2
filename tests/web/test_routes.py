"""The routes: every worked case through the HTTP stack, health, metrics, authentication, draining."""

import json
from typing import Any

import pytest
from harness import COMPLETION, HERE
from msgspec.structs import replace
from surface import Surface
from twisted.internet.defer import fail, succeed

from ai_ticket import errors
from ai_ticket.web import faults

CASES = json.loads((HERE / "data/events.json").read_text())
AUTH = b"Authorization: Bearer secret\r\n"


def post(surface: Surface, body: bytes, headers: bytes = b"", content_type: str = "application/json") -> Any:
    kind = f"Content-Type: {content_type}\r\n".encode() if content_type else b""
    head = b"POST /event HTTP/1.1\r\nHost: x\r\n" + AUTH + kind + headers
    [found] = surface.http1(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return found


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_worked_case(surface: Surface, case: dict[str, Any], http2: bool) -> None:
    body = case["body"].encode()
    content_type = case.get("content_type", "application/json")
    if http2:
        client = surface.connect2()
        headers = [("authorization", "Bearer secret"), *([("content-type", content_type)] if content_type else [])]
        status, _, answer = client.response(client.request("POST", "/event", headers, body))
    else:
        status, _, answer = post(surface, body, content_type=content_type)
    found = json.loads(answer)
    assert status == case["status"]
    if status != 200:
        assert found["error"] == case["error"]
        assert case.get("details_mentions", "") in f"{found['details']} {found['message']}"
        assert set(found) == {"error", "message", "details", "request_id"}
        return
    [job] = surface.pipeline.jobs
    event, client_, deadline = job.event, job.client, job.deadline
    assert [(message.role, message.content) for message in event.messages] == [
        (message["role"], message["content"]) for message in case["messages"]
    ]
    assert found.get("metadata") == case.get("metadata")
    assert deadline == 120
    assert client_.address == "192.0.2.7"


def test_the_whole_answer(surface: Surface) -> None:
    _, _, body = post(surface, b'{"content": "x", "metadata": {"a": "b"}}')
    assert json.loads(body) == {
        "completion": "Fine.",
        "finish_reason": "stop",
        "model": "a-model",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "request_id": "id0",
        "metadata": {"a": "b"},
    }


def test_usage_is_null_where_it_is_not_known(surface: Surface) -> None:
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, usage=None))
    assert json.loads(post(surface, b'{"content": "x"}')[2])["usage"] is None


@pytest.mark.parametrize(
    "header",
    [b"Authorization: bearer secret", b"Authorization: BEARER   other ", b"X-API-Key: secret", b"x-api-key: other"],
)
def test_tokens_that_are_accepted(surface: Surface, header: bytes) -> None:
    data = b"POST /event HTTP/1.1\r\nHost: x\r\n" + header + b"\r\nContent-Type: application/json\r\n"
    [(status, _, _)] = surface.http1(data + b'Content-Length: 16\r\n\r\n{"content": "x"}')
    assert status == 200


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"X: y", "missing"),
        (b"Authorization: Basic secret", "missing"),
        (b"Authorization: secret", "missing"),
        (b"Authorization: Bearer", "missing"),
        (b"Authorization: Bearer secret, other", "invalid"),
        (b"Authorization: Bearer secre", "invalid"),
        (b"Authorization: Bearer secret\r\nAuthorization: Bearer secret", "invalid"),
        (b"X-API-Key: Secret", "invalid"),
        (b"X-API-Key: \xff\xfe", "invalid"),
    ],
)
def test_tokens_that_are_refused(surface: Surface, header: bytes, reason: str) -> None:
    data = b"POST /event HTTP/1.1\r\nHost: x\r\n" + header + b"\r\nContent-Type: application/json\r\n"
    [(status, headers, _)] = surface.http1(data + b'Content-Length: 16\r\n\r\n{"content": "x"}')
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert surface.recorder.auth_failures == [reason]


def test_request_ids(surface: Surface) -> None:
    for given, expected in ((b"my-id_1.A", "my-id_1.A"), (b"x" * 129, None), (b"a b", None), (b"", None)):
        _, headers, body = post(surface, b"{}", b"X-Request-ID: " + given + b"\r\n")
        assert headers["x-request-id"] == json.loads(body)["request_id"]
        assert headers["x-request-id"] == (expected or headers["x-request-id"])
        if expected is None:
            assert headers["x-request-id"].startswith("id")


def test_a_token_sent_twice_is_no_request_id(surface: Surface) -> None:
    """Headers that were sent twice come as one."""
    line = b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Request-ID: secret\r\n"
    for field in (b"X-API-Key: secret\r\n", b"Authorization: Bearer secret\r\n", b"X-API-Key: other,secret\r\n"):
        [(_, headers, _)] = surface.http1(line + field * 2 + b"\r\n")
        assert headers["x-request-id"].startswith("id"), field


def test_a_target_with_a_host_and_no_path_is_that_of_the_root(surface: Surface) -> None:
    """Whatever its query has (RFC 9112, 3.2.2)."""
    for target, expected in (
        (b"http://x?/health/live", 404),
        (b"http://x?a=/health/live", 404),
        (b"http://x", 404),
        (b"http://x/health/live?/event", 200),
        (b"/health/live?http://x/event", 200),
        (b"/?http://x/health/live", 404),
    ):
        [(status, _, _)] = surface.http1(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status == expected, target


def errors_of_the_table() -> list[errors.DomainError]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")]
    return [kind("why", retry_after=2.1) for kind in kinds]


@pytest.mark.parametrize("error", errors_of_the_table(), ids=lambda error: error.code)
def test_every_fault_of_the_pipeline_has_its_status(surface: Surface, error: errors.DomainError) -> None:
    surface.pipeline.answer = lambda: fail(error)
    status, headers, body = post(surface, b'{"content": "x"}')
    assert status == faults.STATUSES[error.code]
    assert json.loads(body) == {
        "error": error.code,
        "message": error.message,
        "details": "why",
        "request_id": headers["x-request-id"],
    }
    assert headers["retry-after"] == "3"


@pytest.mark.expects_logged_failure
def test_a_bug_is_a_500_that_tells_nothing(surface: Surface) -> None:
    surface.pipeline.answer = lambda: fail(RuntimeError("secret thing"))
    status, _, body = post(surface, b'{"content": "x"}')
    assert (status, json.loads(body)["error"]) == (500, "internal_error")
    assert b"secret thing" not in body
    assert surface.recorder.in_flight == 0


def get(surface: Surface, path: str) -> tuple[int, Any]:
    [(status, _, body)] = surface.http1(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return status, json.loads(body) if body.startswith(b"{") else body


def test_health(surface: Surface) -> None:
    assert get(surface, "/health") == (
        200,
        {
            "status": "healthy",
            "shutdown_initiated": False,
            "backends": {"a:1": {"status": "up", "slots": 1, "model": "m"}},
        },
    )
    assert get(surface, "/health/ready")[0] == 200
    surface.backends[0] = replace(surface.backends[0], up=False, error="gone")
    status, report = get(surface, "/health")
    assert (status, report["status"], report["backends"]["a:1"]["error"]) == (200, "degraded", "gone")
    assert get(surface, "/health/ready")[0] == 503
    assert get(surface, "/health/live")[0] == 200


@pytest.mark.parametrize("reason", ["memory", "lag"])
def test_overloaded(surface: Surface, reason: str) -> None:
    surface.overload = reason
    assert get(surface, "/health/ready") == (503, {"status": "overloaded", "reason": reason})
    status, report = get(surface, "/health")
    assert (status, report["status"]) == (200, "degraded")
    assert get(surface, "/health/live")[0] == 200


def test_draining(surface: Surface) -> None:
    surface.draining = True
    status, report = get(surface, "/health")
    assert (status, report["status"], report["shutdown_initiated"]) == (503, "draining", True)
    assert get(surface, "/health/ready")[0] == 503
    assert get(surface, "/health/live")[0] == 200
    status, headers, body = post(surface, b'{"content": "x"}')
    assert (status, json.loads(body)["error"]) == (503, "shutting_down")
    assert int(headers["retry-after"]) >= 1


def test_metrics_and_paths(surface: Surface) -> None:
    assert get(surface, "/metrics") == (200, b"x 1\n")
    assert get(surface, "/metrics?x=y") == (200, b"x 1\n")
    assert get(surface, "http://x/metrics") == (200, b"x 1\n")
    for path in ("/", "/event/", "//event", "/Event", "/%65vent", "http://x"):
        assert get(surface, path)[0] == 404
    [(status, headers, _)] = surface.http1(b"DELETE /event HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, headers["allow"]) == (405, "POST")
    [(status, headers, _)] = surface.http1(b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert surface.recorder.finished[-1] == ("/health", "POST", 405)
    assert ("unmatched", "GET", 404) in surface.recorder.finished


def test_a_token_in_the_metadata_is_not_on_the_span(surface: Surface) -> None:
    post(surface, b'{"content": "x", "metadata": {"a": "secret", "b": "my secret!", "secret": "c", "d": "Bearer"}}')
    [span] = surface.tracer.ended
    assert {name for name in span.attributes if "metadata" in name} == {"ai_ticket.metadata.d"}


def test_a_request_has_a_span(surface: Surface) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = b'{"content": "x", "metadata": {"ticket": "7"}}'
    post(surface, body, headers=f"traceparent: {parent}\r\n".encode())
    [span] = surface.tracer.ended
    assert (span.name, span.kind, span.trace_id) == ("POST /event", "server", "0af7651916cd43dd8448eb211c80319c")
    assert span.parent_id == "b7ad6b7169203331"
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["ai_ticket.metadata.ticket"] == "7"
    assert span.attributes["ai_ticket.request_id"] == "id0"
    assert surface.pipeline.jobs[0].span is span


def test_a_failure_is_on_its_span(surface: Surface) -> None:
    surface.pipeline.answer = lambda: fail(errors.ApiServerError("details"))
    post(surface, b'{"content": "x"}')
    [span] = surface.tracer.ended
    assert (span.error, span.attributes["http.response.status_code"]) == ("api_server_error", 502)
    assert "details" not in str(span.attributes)


def test_probes_have_no_spans(surface: Surface) -> None:
    surface.http1(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert surface.tracer.ended == []


def test_our_own_share_of_the_time(surface: Surface) -> None:
    """Neither what the caller takes to send the body, nor the wait, nor the backend counts."""

    def slowly() -> Any:
        job = surface.pipeline.jobs[-1]
        job.queued_at, job.began_at, job.ended_at = 2.0, 5.0, 9.0
        surface.clock.advance(7.5)
        return succeed(COMPLETION)

    surface.pipeline.answer = slowly
    connection, _ = surface.connect()
    connection.dataReceived(b"POST /event HTTP/1.1\r\nHost: x\r\n" + AUTH + b"Content-Type: application/json\r\n")
    connection.dataReceived(b"Content-Length: 16\r\n\r\n")
    surface.clock.advance(2)
    connection.dataReceived(b'{"content": "x"}')
    assert surface.recorder.overheads == [("/event", 0.5)]
