"""What a request passes before its body is read: token, draining, quota, room; and what callers are told of these."""

import json
from typing import Any

import pytest
from harness import COMPLETION
from surface import Surface
from twisted.internet.defer import Deferred, fail, succeed

from ai_ticket.errors import ApiServerError, NoBackendAvailable, Overloaded
from ai_ticket.interfaces import Admission

HEAD = b"POST /event HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"content": "hello"}'
JSON = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(BODY)
TOKEN = b"Authorization: Bearer secret\r\n"
POST = HEAD + TOKEN + JSON + b"\r\n" + BODY


def answer(surface: Surface, data: bytes = POST) -> tuple[int, dict[str, str], Any]:
    [(status, headers, body)] = surface.http1(data)
    return status, headers, json.loads(body)


def test_every_answer_tells_what_is_left_of_the_quota(surface: Surface) -> None:
    surface.limiter.admissions = [Admission(True, 119, 0.0)]
    _, headers, _ = answer(surface)
    assert headers["ratelimit-policy"] == '"default";q=120;w=60'
    assert headers["ratelimit"] == '"default";r=119;t=0'
    _, headers, _ = answer(surface, POST.replace(b"application/json", b"text/plain"))
    assert "ratelimit" in headers


def test_a_quota_that_is_used_up(surface: Surface) -> None:
    surface.limiter.admissions = [Admission(False, 0, 12.2)]
    status, headers, body = answer(surface, HEAD + TOKEN + JSON + b"\r\n")
    assert (status, body["error"], headers["retry-after"]) == (429, "rate_limited", "13")
    assert headers["ratelimit"] == '"default";r=0;t=13'
    assert headers["ratelimit-policy"] == '"default";q=120;w=60'
    assert "120" in body["details"]
    assert surface.recorder.refused == ["quota"]
    assert surface.pipeline.jobs == []


def test_retry_after_is_never_zero(surface: Surface) -> None:
    surface.limiter.admissions = [Admission(False, 0, 0.0001)]
    _, headers, _ = answer(surface)
    assert headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("data", "draining", "asked"),
    [
        (POST, False, 1),
        (POST.replace(b"secret", b"wrong"), False, 0),
        (POST, True, 0),
        (POST.replace(b"/event", b"/nothing"), False, 0),
        (POST.replace(b"POST", b"PUT"), False, 0),
        (POST.replace(b"application/json", b"text/plain"), False, 1),
        (POST.replace(BODY, b'{"conten": "hello"}{'), False, 1),
    ],
)
def test_what_counts(surface: Surface, data: bytes, draining: bool, asked: int) -> None:
    surface.draining = draining
    answer(surface, data)
    assert len(surface.limiter.asked) == asked


def test_a_limiter_that_takes_its_time(surface: Surface) -> None:
    waiting: Deferred[Admission] = Deferred()
    surface.limiter.admit = lambda client: waiting  # type: ignore[method-assign]
    connection, transport = surface.connect()
    connection.dataReceived(POST)
    assert surface.pipeline.jobs == []
    waiting.callback(Admission(True, 3, 0.0))
    assert transport.value().startswith(b"HTTP/1.1 200")


def test_a_full_queue_is_told_from_the_head(surface: Surface) -> None:
    surface.pipeline.refusal = Overloaded("256 events are waiting", retry_after=7)
    status, headers, body = answer(surface, HEAD + TOKEN + JSON + b"\r\n")
    assert (status, body["error"], headers["retry-after"]) == (503, "overloaded", "7")


@pytest.mark.parametrize("path", [b"/event", b"/events"])
def test_short_of_memory_no_event_is_taken(surface: Surface, path: bytes) -> None:
    """From the head, who may call alone, and without using anything of the quota."""
    surface.short_of_memory = True
    head = HEAD.replace(b"/event", path) + TOKEN + JSON + b"\r\n"
    status, headers, body = answer(surface, head)
    assert (status, body["error"], headers["retry-after"]) == (503, "overloaded", "5")
    assert body["details"] == "short of memory"
    assert answer(surface, head.replace(b"secret", b"wrong"))[0] == 401
    assert surface.limiter.asked == []


@pytest.mark.parametrize("path", ["/event", "/events"])
def test_nor_over_http2(surface: Surface, path: str) -> None:
    surface.short_of_memory = True
    client = surface.connect2()
    stream = client.h2.get_next_available_stream_id()
    names = [(":method", "POST"), (":path", path), (":scheme", "https"), (":authority", "a")]
    client.h2.send_headers(stream, [*names, ("authorization", "Bearer secret"), ("content-type", "application/json")])
    client.exchange()
    status, headers, body = client.response(stream)
    assert (status, json.loads(body)["error"], headers["retry-after"]) == (503, "overloaded", "5")


def test_what_was_taken_goes_on_when_memory_is_short(surface: Surface) -> None:
    waiting: Deferred[object] = Deferred()
    surface.pipeline.answer = lambda: waiting
    connection, transport = surface.connect()
    connection.dataReceived(POST)
    surface.short_of_memory = True
    waiting.callback(COMPLETION)
    assert transport.value().startswith(b"HTTP/1.1 200")


def test_a_batch_that_was_taken_goes_on_when_memory_is_short(surface: Surface) -> None:
    waiting: list[Deferred[object]] = [Deferred() for _ in range(20)]
    left = iter(waiting)
    surface.pipeline.answer = lambda: next(left)
    events = b"[" + b",".join([BODY] * 20) + b"]"
    connection, transport = surface.connect()
    head = HEAD.replace(b"/event", b"/events") + TOKEN + JSON.replace(b"%d" % len(BODY), b"%d" % len(events))
    connection.dataReceived(head + b"\r\n" + events)
    surface.short_of_memory = True
    for one in waiting:
        one.callback(COMPLETION)
        surface.clock.advance(0)
    assert transport.value().count(b'"status":200') == 20


def test_so_is_it_that_no_backend_is_available(surface: Surface) -> None:
    surface.pipeline.refusal = NoBackendAvailable(retry_after=2.5)
    status, headers, body = answer(surface, HEAD + TOKEN + JSON + b"\r\n")
    assert (status, body["error"], headers["retry-after"]) == (503, "no_backend_available", "3")


def timed(surface: Surface, outcome: Any) -> None:
    def at_once() -> Any:
        job = surface.pipeline.jobs[-1]
        job.queued_at, job.began_at, job.ended_at = 0.0, 1.5, 1.52
        return outcome()

    surface.pipeline.answer = at_once


def test_an_answer_tells_where_its_time_went(surface: Surface) -> None:
    timed(surface, lambda: succeed(COMPLETION))
    _, headers, _ = answer(surface)
    assert headers["server-timing"] == "queue;dur=1500.0, backend;dur=20.0"


def test_so_does_a_failure(surface: Surface) -> None:
    timed(surface, lambda: fail(ApiServerError()))
    status, headers, _ = answer(surface)
    assert (status, headers["server-timing"]) == (502, "queue;dur=1500.0, backend;dur=20.0")
