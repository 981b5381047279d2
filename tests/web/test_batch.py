"""`POST /events`: arrays and lines, in and out, on both HTTP versions; each event for itself; back-pressure."""

import json
from typing import Any

import pytest
from harness import COMPLETION
from msgspec.structs import replace
from surface import Surface
from surface_batch import Upload
from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import globalLogPublisher

from ai_ticket.errors import ApiRateLimited, ApiServerError
from ai_ticket.interfaces import Admission, Job
from ai_ticket.web.http1 import CUT_SECONDS

NDJSON = "application/x-ndjson"
EVENT = (
    b"POST /event HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
    b'Content-Length: 16\r\n\r\n{"content": "x"}'
)


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
def upload(request: pytest.FixtureRequest, surface: Surface) -> Upload:
    return Upload(surface, http2=request.param)


def echo(surface: Surface) -> None:
    """Answer each event with its own prompt."""
    jobs = iter(range(10**6))
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text=surface.pipeline.jobs[next(jobs)].event.prompt))


def hold(surface: Surface) -> list[Deferred[Any]]:
    """Answer events when the test says so."""
    held: list[Deferred[Any]] = []

    def answer() -> Deferred[Any]:
        held.append(Deferred())
        return held[-1]

    surface.pipeline.answer = answer
    return held


def test_an_array_in_an_array_out(upload: Upload, surface: Surface) -> None:
    echo(surface)
    upload.send(b'[{"content": "a"}, {"content": "b", "metadata": {"k": "v"}}]')
    assert (upload.status, upload.headers["content-type"], upload.ended) == (200, "application/json", True)
    first, second = json.loads(upload.body)
    assert first == {
        "index": 0,
        "status": 200,
        "completion": "a",
        "finish_reason": "stop",
        "model": "a-model",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "request_id": upload.headers["x-request-id"],
    }
    assert (second["index"], second["completion"], second["metadata"]) == (1, "b", {"k": "v"})


def test_events_of_a_batch_are_submitted_as_such(upload: Upload, surface: Surface) -> None:
    upload.send(b'[{"content": "a"}]')
    [job] = surface.pipeline.jobs
    assert (job.batch, job.deadline, job.timeout, job.sink) == (True, None, 120, None)
    assert job.client.address == "192.0.2.7"


def test_an_empty_batch(upload: Upload) -> None:
    upload.send(b"[]")
    assert (upload.status, json.loads(upload.body), upload.ended) == (200, [], True)


def test_each_event_fails_alone(upload: Upload, surface: Surface) -> None:
    answers = iter([succeed(COMPLETION), fail(ApiServerError("x")), fail(ApiRateLimited(retry_after=2.5))])
    surface.pipeline.answer = lambda: next(answers)
    events: list[Any] = [
        {"content": "a"},
        {},
        3,
        {"content": "b", "parameters": {"wrong": 1}},
        {"content": "c", "stream": True},
        {"content": " "},
        {"content": "d"},
        {"content": "e"},
    ]
    upload.send(json.dumps(events).encode())
    results = json.loads(upload.body)
    assert [result["index"] for result in results] == list(range(8))
    assert [(result["status"], result.get("error")) for result in results] == [
        (200, None),
        (400, "missing_content_field"),
        (400, "invalid_input_format"),
        (400, "invalid_parameter"),
        (400, "invalid_parameter"),
        (422, "prompt_extraction_failed"),
        (502, "api_server_error"),
        (503, "api_rate_limited"),
    ]
    assert set(results[1]) == {"index", "status", "error", "message", "details", "request_id"}
    assert results[7]["retry_after"] == 3
    assert "stream" in results[4]["details"]


def test_lines_in_lines_out_as_they_end(upload: Upload, surface: Surface) -> None:
    held = hold(surface)
    upload.begin(content_type=NDJSON, accept=NDJSON)
    upload.more(b'{"content": "a"}\n{"cont')
    upload.more(b'ent": "b"}\nrubbish\n{"content": "c"}')
    assert upload.headers["content-type"] == NDJSON
    assert [line["index"] for line in upload.lines] == [2]
    assert upload.lines[0]["error"] == "invalid_request"
    held[1].callback(COMPLETION)
    assert [line["index"] for line in upload.lines] == [2, 1]
    upload.end()
    assert not upload.ended
    held[0].callback(COMPLETION)
    held[2].callback(COMPLETION)
    assert [line["index"] for line in upload.lines] == [2, 1, 0, 3]
    assert upload.ended


def test_lines_in_an_array_out_in_order(upload: Upload, surface: Surface) -> None:
    held = hold(surface)
    upload.begin(content_type=NDJSON)
    upload.more(b'{"content": "a"}\n{"content": "b"}\n{"content": "c"}\n')
    upload.end()
    held[2].callback(COMPLETION)
    assert upload.body == b""
    held[0].callback(COMPLETION)
    held[1].errback(ApiServerError())
    assert [(line["index"], line["status"]) for line in json.loads(upload.body)] == [(0, 200), (1, 502), (2, 200)]
    assert upload.ended


def test_an_array_in_lines_out(upload: Upload, surface: Surface) -> None:
    echo(surface)
    upload.send(b'[{"content": "a"}, {"content": "b"}]', accept=f"text/html;q=0.1, {NDJSON};q=0.9")
    assert [line["completion"] for line in upload.lines] == ["a", "b"]


def test_a_line_that_is_too_long_fails_alone(upload: Upload, surface: Surface) -> None:
    echo(surface)
    upload.begin(content_type=NDJSON, accept=NDJSON)
    upload.more(b'{"content": "a"}\n' + b"x" * 10_001 + b'\n{"content": "b"}\n')
    upload.end()
    assert [line.get("completion", line["status"]) for line in upload.lines] == ["a", 413, "b"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_request"),
        (b"{}", 400, "invalid_input_format"),
        (b"[" + b"1," * 20 + b"1]", 413, "payload_too_large"),
        (b"[" + b" " * 30_000 + b"]", 413, "payload_too_large"),
    ],
)
def test_a_batch_that_is_none(upload: Upload, body: bytes, status: int, code: str) -> None:
    upload.send(body)
    assert (upload.status, json.loads(upload.body)["error"]) == (status, code)


def test_what_the_head_tells_is_refused_before_the_body(upload: Upload, surface: Surface) -> None:
    upload.begin(content_type="text/plain")
    assert (upload.status, json.loads(upload.body)["error"]) == (415, "unsupported_media_type")
    again = Upload(surface, http2=upload.http2)
    again.begin(token="wrong")
    assert again.status == 401
    surface.draining = True
    third = Upload(surface, http2=upload.http2)
    third.begin()
    assert (third.status, third.headers["retry-after"]) == (503, "5")


def test_no_more_events_are_offered_than_the_pipeline_works_on(upload: Upload, surface: Surface) -> None:
    held = hold(surface)
    surface.pipeline.batch_window = 2
    upload.send(json.dumps([{"content": str(number)} for number in range(5)]).encode())
    assert len(held) == 2
    held[1].callback(COMPLETION)
    assert len(held) == 3
    for number in (0, 2, 3, 4):
        held[number].callback(COMPLETION)
    assert [one["index"] for one in json.loads(upload.body)] == [0, 1, 2, 3, 4]


def test_a_caller_who_does_not_read_gets_no_more_events_begun(upload: Upload, surface: Surface) -> None:
    upload.begin(content_type=NDJSON, accept=NDJSON)
    upload.lag()
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text="x" * 100_000))
    for _ in range(10):
        upload.more(b'{"content": "a"}\n')
    begun = len(surface.pipeline.jobs)
    assert begun < 10
    upload.catch_up()
    upload.end()
    surface.clock.advance(0)
    assert len(upload.lines) == 10
    assert upload.ended


def test_a_batch_waits_for_quota(upload: Upload, surface: Surface) -> None:
    echo(surface)
    admissions = [Admission(True, 1, 0), Admission(True, 0, 2.5), Admission(False, 0, 2.5), Admission(False, 0, 1.5)]
    admissions += [Admission(False, 0, 0.5), Admission(True, 0, 60)]
    surface.limiter.admissions = admissions
    upload.send(b'[{"content": "a"}, {"content": "b"}, {"content": "c"}]')
    assert len(surface.pipeline.jobs) == 2
    surface.clock.advance(1)
    surface.clock.advance(1)
    assert len(surface.pipeline.jobs) == 2
    surface.clock.advance(0.5)
    assert [one["completion"] for one in json.loads(upload.body)] == ["a", "b", "c"]
    assert surface.limiter.asked == ["192.0.2.7"] * 6


def test_malformed_events_count_as_well(upload: Upload, surface: Surface) -> None:
    upload.send(b'[1, 2, {"content": "a"}]')
    assert len(surface.limiter.asked) == 3


def test_a_caller_who_leaves_ends_all(upload: Upload, surface: Surface) -> None:
    cancelled: list[Any] = []
    surface.pipeline.answer = lambda: Deferred(cancelled.append)
    upload.begin(content_type=NDJSON, accept=NDJSON)
    upload.more(b'{"content": "a"}\n{"content": "b"}\n')
    upload.leave()
    assert len(cancelled) == 2
    assert surface.recorder.finished == [("/events", "POST", 499)]


def test_a_caller_who_leaves_while_the_batch_waits_for_quota(upload: Upload, surface: Surface) -> None:
    surface.limiter.admissions = [Admission(False, 0, 60)]
    upload.send(b'[{"content": "a"}]')
    upload.leave()
    assert not surface.pipeline.jobs
    assert surface.recorder.finished == [("/events", "POST", 499)]


def test_a_drain_leaves_what_runs_and_refuses_the_rest(upload: Upload, surface: Surface) -> None:
    held = hold(surface)
    surface.pipeline.batch_window = 1
    upload.send(b'[{"content": "a"}, {"content": "b"}, {"content": "c"}]')
    surface.draining = True
    held[0].callback(COMPLETION)
    results = json.loads(upload.body)
    assert [(one["status"], one.get("error"), one.get("retry_after")) for one in results] == [
        (200, None, None),
        (503, "shutting_down", 5),
        (503, "shutting_down", 5),
    ]


def test_a_drain_ends_the_wait_for_quota(upload: Upload, surface: Surface) -> None:
    surface.limiter.admissions = [Admission(False, 0, 60)] * 10
    upload.send(b'[{"content": "a"}, {"content": "b"}]')
    surface.draining = True
    surface.clock.advance(1)
    assert [one["error"] for one in json.loads(upload.body)] == ["shutting_down"] * 2


def test_a_cut_tells_each_event_of_an_array(upload: Upload, surface: Surface) -> None:
    hold(surface)
    surface.pipeline.batch_window = 2
    upload.send(b'[{"content": "a"}, {"content": "b"}, {"content": "c"}]')
    surface.site.cut()
    assert [one["error"] for one in json.loads(upload.body)] == ["shutting_down"] * 3
    assert upload.ended


def test_a_cut_of_lines_that_still_come_can_be_told(upload: Upload, surface: Surface) -> None:
    hold(surface)
    upload.begin(content_type=NDJSON, accept=NDJSON)
    upload.more(b'{"content": "a"}\n')
    surface.site.cut()
    assert [one["error"] for one in upload.lines] == ["shutting_down"]
    assert not upload.ended
    surface.clock.advance(CUT_SECONDS)
    surface.connections._check_deadlines()
    assert upload.cut


@pytest.mark.expects_logged_failure
def test_a_bug_fails_its_event_alone(upload: Upload, surface: Surface) -> None:
    answers = iter([fail(RuntimeError("secret")), succeed(COMPLETION)])
    surface.pipeline.answer = lambda: next(answers)
    upload.send(b'[{"content": "a"}, {"content": "b"}]')
    first, second = json.loads(upload.body)
    assert (first["status"], first["error"], second["status"]) == (500, "internal_error", 200)
    assert "secret" not in json.dumps(first)


def test_many_small_events_let_others_have_a_turn(upload: Upload, surface: Surface) -> None:
    echo(surface)
    upload.begin(content_type=NDJSON, accept=NDJSON)
    upload.more(b'{"content": "a"}\n' * 300)
    upload.end()
    assert len(surface.pipeline.jobs) < 100
    for _ in range(100):
        surface.clock.advance(0)
    assert len(upload.lines) == 300


def test_results_held_back_for_an_early_one_are_bounded(upload: Upload, surface: Surface) -> None:
    first: Deferred[Any] = Deferred()
    jobs: list[Job] = surface.pipeline.jobs
    surface.pipeline.answer = lambda: first if len(jobs) == 1 else succeed(replace(COMPLETION, text="x" * 1_000_000))
    upload.begin(content_type=NDJSON)
    upload.more(b'{"content": "a"}\n' * 12)
    upload.end()
    for _ in range(10):
        surface.clock.advance(0)
    assert 5 <= len(jobs) <= 7
    first.callback(COMPLETION)
    upload.catch_up()
    for _ in range(100):
        surface.clock.advance(0)
        upload.catch_up()
    assert len(json.loads(upload.body)) == 12


def test_an_answer_of_lines_ends_once(surface: Surface) -> None:
    """An empty piece would be the end of a chunked answer, and another end after that the begin of the next answer."""
    upload = Upload(surface, http2=False)
    upload.send(b'[{"content": "a"}]', accept=NDJSON)
    assert upload.raw.count(b"\r\n0\r\n\r\n") == 1
    assert upload.raw.endswith(b"}\n\r\n0\r\n\r\n")


def test_signs_of_life_while_nothing_else_goes_out(upload: Upload, surface: Surface) -> None:
    held = hold(surface)
    upload.send(b'[{"content": "a"}, {"content": "b"}]')
    surface.clock.advance(9)
    assert upload.body == b""
    surface.clock.advance(1)
    assert upload.body == b"\n"
    held[0].callback(COMPLETION)
    surface.clock.advance(9)
    before = upload.body
    surface.clock.advance(1)
    assert upload.body == before + b"\n"
    held[1].callback(COMPLETION)
    assert [one["index"] for one in json.loads(upload.body)] == [0, 1]
    assert not surface.clock.getDelayedCalls()


def test_large_events_are_not_held_in_numbers(upload: Upload, surface: Surface) -> None:
    held = hold(surface)
    event = json.dumps({"content": "x" * 4000}).encode()
    upload.begin(content_type=NDJSON, accept=NDJSON)
    for _ in range(5):
        upload.more(event + b"\n")
    assert len(held) == 2
    held[0].callback(COMPLETION)
    assert len(held) == 3
    upload.end()
    for number in range(1, 5):
        held[number].callback(COMPLETION)
    assert len(upload.lines) == 5


def test_bodies_of_one_client_s_batches_are_bounded(surface: Surface) -> None:
    hold(surface)
    body = b"[" + b'{"content": "a"}' + b" " * 29_000 + b"]"
    uploads = [Upload(surface, http2=True) for _ in range(5)]
    for upload in uploads:
        upload.send(body)
    assert [upload.status for upload in uploads] == [200] * 4 + [503]
    assert uploads[4].headers["retry-after"] == "10"
    assert json.loads(uploads[4].body)["error"] == "overloaded"
    uploads[0].leave()
    again = Upload(surface, http2=True)
    again.send(body)
    assert again.status == 200


def test_a_body_that_is_no_batch_counts_and_waits(upload: Upload, surface: Surface) -> None:
    surface.limiter.admissions = [Admission(False, 0, 0.5), Admission(True, 0, 1)]
    upload.send(b"{}")
    assert upload.status == 0
    surface.clock.advance(0.5)
    assert upload.status == 400
    assert len(surface.limiter.asked) == 2


def test_an_empty_batch_counts(upload: Upload, surface: Surface) -> None:
    upload.send(b"[]")
    assert len(surface.limiter.asked) == 1


def test_who_was_told_to_come_back_goes_before_a_batch(upload: Upload, surface: Surface) -> None:
    echo(surface)
    refused = Admission(False, 0, 3.2)
    surface.limiter.admissions = [Admission(True, 0, 4), Admission(False, 0, 4), refused]
    upload.send(b'[{"content": "a"}, {"content": "b"}]')
    asked = len(surface.limiter.asked)
    [(status, headers, _)] = surface.http1(EVENT)
    assert (status, headers["retry-after"]) == (429, "4")
    for _ in range(4):
        surface.clock.advance(1)
    assert len(surface.limiter.asked) == asked + 1, "the batch holds back"
    [(status, *_)] = surface.http1(EVENT)
    assert status == 200
    surface.clock.advance(1)
    surface.clock.advance(1)
    assert len(json.loads(upload.body)) == 2


def test_a_cut_of_lines_that_have_all_come_tells_each(upload: Upload, surface: Surface) -> None:
    hold(surface)
    surface.pipeline.batch_window = 2
    upload.begin(content_type=NDJSON, accept=NDJSON)
    upload.more(b'{"content": "a"}\n' * 5)
    upload.end()
    surface.site.cut()
    assert sorted(one["index"] for one in upload.lines) == [0, 1, 2, 3, 4]
    assert {one["error"] for one in upload.lines} == {"shutting_down"}
    assert upload.ended


def test_blank_lines_are_not_for_nothing(upload: Upload, surface: Surface) -> None:
    upload.begin(content_type=NDJSON, accept=NDJSON)
    for _ in range(5):
        upload.more(b"\n" * 4000)
    assert surface.limiter.asked, "so many of them count as an event"
    assert upload.lines[0]["error"] == "payload_too_large"
    upload.end()


def test_a_caller_who_waits_to_be_asked_for_lines(surface: Surface) -> None:
    connection, transport = surface.connect()
    head = b"POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/x-ndjson\r\n"
    connection.dataReceived(head + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n")
    assert transport.value().startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("accept", "lines"),
    [(NDJSON, True), (f"{NDJSON};q=0", False), (f"{NDJSON}; q=0.0", False), (f"{NDJSON};q=0.5", True), ("*/*", False)],
)
def test_which_form_is_wanted(surface: Surface, accept: str, lines: bool) -> None:
    upload = Upload(surface, http2=True)
    upload.send(b'[{"content": "a"}]', accept=accept)
    assert (upload.headers["content-type"] == NDJSON) == lines


def test_what_the_log_tells_of_a_batch(surface: Surface) -> None:
    logged: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(logged.append)
    try:
        upload = Upload(surface, http2=True)
        upload.send(b'[{"content": "a"}, {"content": "b"}, 3]')
    finally:
        globalLogPublisher.removeObserver(logged.append)
    [line] = [event for event in logged if event.get("route") == "/events"]
    facts = {name: line[name] for name in ("events", "errors", "prompt_tokens", "completion_tokens")}
    assert facts == {"events": 3, "errors": {"invalid_input_format": 1}, "prompt_tokens": 6, "completion_tokens": 4}
