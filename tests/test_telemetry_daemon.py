"""What the running service tells of itself: spans to a collector, access lines, metrics; and what it never tells."""

import asyncio
import json
import random
import re
import signal
import socket
import string
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon import AUTH, PATIENCE, TOKEN, Daemon, model_server, running, wait_until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from threaded_server import Answers, ThreadedServer

from ai_ticket.telemetry.tracing_export import STOP_SECONDS

pytestmark = pytest.mark.e2e

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
SERVER, HANDLE, ATTEMPT = "POST /event", "pipeline.handle", "kobold.get_completion"


class Collector:
    """An OTLP receiver; `bodies` has what was posted to each path. It answers nothing until `go` is set."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        self.go = threading.Event()
        self.go.set()
        collector = self

        class Handler(Answers):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.go.wait(PATIENCE)
                collector.bodies.append((self.path, body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self._server = ThreadedServer(Handler)
        self.url = f"http://127.0.0.1:{self._server.port}"

    @property
    def spans(self) -> list[Span]:
        requests = [ExportTraceServiceRequest.FromString(body) for _, body in list(self.bodies)]
        scopes = [scope for request in requests for one in request.resource_spans for scope in one.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    def close(self) -> None:
        self.go.set()
        self._server.close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def attributes(span: Span) -> dict[str, Any]:
    def plain(value: AnyValue) -> Any:
        kind = value.WhichOneof("value") or "string_value"
        return [plain(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in span.attributes}


def tracing_to(url: str, **more: str) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100", **more}


def of_trace(collector: Collector, trace: str, count: int) -> dict[str, list[Span]]:
    """The spans of a trace by name, once there are so many."""

    def found() -> list[Span]:
        spans = [span for span in collector.spans if span.trace_id.hex() == trace]
        return spans if len(spans) >= count else []

    spans = wait_until(found, f"{count} spans of {trace}")
    assert len(spans) == count
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    return by_name


def scrape(daemon: Daemon, accept: str = "text/plain") -> str:
    url = f"http://127.0.0.1:{daemon.port('metrics')}/metrics"
    return httpx.get(url, trust_env=False, headers={"Accept": accept}, timeout=PATIENCE).text


class TestSpans:
    def test_three_levels_reach_the_collector(self, tmp_path: Path, collector: Collector) -> None:
        with (
            model_server() as server,
            running(tmp_path, KOBOLDCPP_API_URL=server.url, **tracing_to(collector.url)) as daemon,
            daemon.ready().client() as client,
        ):
            event = {"content": "hi", "parameters": {"max_tokens": 7, "temperature": 0.5}, "metadata": {"ticket": "7"}}
            assert client.post("/event", json=event, headers={**AUTH, "traceparent": TRACEPARENT}).status_code == 200
            spans = of_trace(collector, TRACE, 3)
            [request], [handle], [attempt] = spans[SERVER], spans[HANDLE], spans[ATTEMPT]
            assert {path for path, _ in collector.bodies} == {"/v1/traces"}
            assert request.parent_span_id.hex() == CALLER
            assert handle.parent_span_id == request.span_id
            assert attempt.parent_span_id == handle.span_id
            kinds = Span.SPAN_KIND_SERVER, Span.SPAN_KIND_INTERNAL, Span.SPAN_KIND_CLIENT
            assert (request.kind, handle.kind, attempt.kind) == kinds
            began = [span.start_time_unix_nano for span in (request, handle, attempt)]
            ended = [span.end_time_unix_nano for span in (attempt, handle, request)]
            assert sorted([*began, *ended]) == [*began, *ended]
            assert abs(began[0] / 1e9 - time.time()) < PATIENCE
            assert not any(span.status.code for span in (request, handle, attempt))

            said = attributes(attempt)
            host, port = server.url.removesuffix("/api").removeprefix("http://").split(":")
            assert (
                said.items()
                >= {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.provider.name": "koboldcpp",
                    "gen_ai.request.model": "koboldcpp/echo",
                    "gen_ai.request.max_tokens": 7,
                    "gen_ai.request.temperature": 0.5,
                    "gen_ai.response.finish_reasons": ["stop"],
                    "gen_ai.usage.input_tokens": 1,
                    "gen_ai.usage.output_tokens": 1,
                    "server.address": host,
                    "server.port": int(port),
                }.items()
            )
            assert (
                attributes(request).items()
                >= {
                    "http.request.method": "POST",
                    "http.route": "/event",
                    "http.response.status_code": 200,
                    "ai_ticket.metadata.ticket": "7",
                }.items()
            )
            resource = ExportTraceServiceRequest.FromString(collector.bodies[0][1]).resource_spans[0].resource
            assert {pair.key: pair.value.string_value for pair in resource.attributes}["service.name"] == "ai-ticket"

    def test_failures_and_retries(self, tmp_path: Path, collector: Collector) -> None:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with (
            running(tmp_path, KOBOLDCPP_API_URL=url, **tracing_to(collector.url)) as daemon,
            daemon.client() as client,
        ):
            headers = {**AUTH, "traceparent": TRACEPARENT}
            assert client.post("/event", json={"content": "hi"}, headers=headers).status_code == 502
            spans = of_trace(collector, TRACE, 5)
            [request], [handle] = spans[SERVER], spans[HANDLE]
            assert [span.parent_span_id for span in spans[ATTEMPT]] == [handle.span_id] * 3
            for span in (request, handle, *spans[ATTEMPT]):
                assert span.status.code == Status.STATUS_CODE_ERROR
                assert attributes(span)["error.type"] == "api_connection_error"
            assert attributes(request)["http.response.status_code"] == 502

            other = TRACE[::-1]
            answer = client.post("/event", json={"content": "hi"}, headers={"traceparent": f"00-{other}-{CALLER}-01"})
            assert answer.status_code == 401
            [refused] = of_trace(collector, other, 1)[SERVER]
            assert attributes(refused)["error.type"] == "unauthorised"

    def test_spans_that_wait_are_sent_before_the_end(self, tmp_path: Path, collector: Collector) -> None:
        with (
            model_server() as server,
            running(
                tmp_path,
                KOBOLDCPP_API_URL=server.url,
                **tracing_to(collector.url, OTEL_BSP_SCHEDULE_DELAY="3600000"),
            ) as daemon,
        ):
            with daemon.ready().client() as client:
                for _ in range(5):
                    assert client.post("/event", json={"content": "hi"}, headers=AUTH).status_code == 200
            assert collector.spans == []
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            assert len(collector.spans) == 15

    @pytest.mark.parametrize("kind", ["dead", "hanging", "slow"])
    def test_a_bad_collector_holds_nobody_up(self, tmp_path: Path, collector: Collector, kind: str) -> None:
        """Events go on, what there is no room for is dropped and counted, one line says so, and the end is in time."""
        collector.go.clear()
        with _silent() as silent, model_server() as server:
            with socket.create_server(("127.0.0.1", 0)) as reserved:
                dead = f"http://127.0.0.1:{reserved.getsockname()[1]}"
            url = {"dead": dead, "hanging": silent, "slow": collector.url}[kind]
            queue = {"OTEL_BSP_MAX_QUEUE_SIZE": "32", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
            with running(tmp_path, KOBOLDCPP_API_URL=server.url, **tracing_to(url, **queue)) as daemon:
                with daemon.ready().client() as client:
                    for _ in range(60):
                        asked = time.monotonic()
                        assert client.post("/event", json={"content": "hi"}, headers=AUTH).status_code == 200
                        assert time.monotonic() - asked < 2.0
                dropped = re.search(r"^ai_ticket_tracing_dropped_spans ([0-9.]+)$", scrape(daemon), re.MULTILINE)
                assert dropped is not None
                assert float(dropped[1]) >= 180 - 32 - 2 * 8
                daemon.signal(signal.SIGTERM)
                told = time.monotonic()
                assert daemon.wait() == 0
                assert time.monotonic() - told < 3.0 + 1.0, "and the machine may be busy"
                assert len(daemon.logged("spans dropped")) == 1, "once a minute"
                [line] = daemon.logged("stopped:")
                assert line["cut"] == 0
        assert STOP_SECONDS < 3.0


@contextmanager
def _silent() -> Iterator[str]:
    """The URL of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class TestAccessLines:
    def test_the_fields(self, tmp_path: Path, collector: Collector) -> None:
        tokens = tmp_path / "tokens"
        tokens.write_text("support one-token\n")
        with (
            model_server() as server,
            running(
                tmp_path,
                KOBOLDCPP_API_URL=server.url,
                AI_TICKET_AUTH_TOKEN="",
                AI_TICKET_AUTH_TOKEN_FILE=str(tokens),
                **tracing_to(collector.url),
            ) as daemon,
            daemon.ready().client() as client,
        ):
            headers = {"X-API-Key": "one-token", "X-Request-ID": "mine-1", "traceparent": TRACEPARENT}
            for stream in (False, True):
                event = {"content": "hi", "stream": stream}
                assert client.post("/event", json=event, headers=headers).status_code == 200
            assert client.post("/event", content=b"[]", headers={**headers, "Content-Type": "application/json"})
            assert client.post("/events", json=[{"content": "hi"}] * 3, headers=headers).status_code == 200
            assert client.post("/nowhere", headers=headers).status_code == 404
            lines = wait_until(lambda: found if len(found := access_lines(daemon)) >= 5 else None, "access lines")
            spans = of_trace(collector, TRACE, 3 + 3 + 1 + (1 + 3 * 2))
        one, streamed, refused, batch, unknown = lines
        for line in lines:
            assert line["request_id"] == "mine-1"
            assert line["duration"] > 0
            assert {"time", "level", "logger", "message", "method", "route", "status", "peer", "http"} <= set(line)
        for line in (one, streamed):
            assert (line["method"], line["route"], line["status"]) == ("POST", "/event", 200)
            assert line["client"] == "support"
            assert line["backend"] == server.url.removesuffix("/api").removeprefix("http://")
            assert (line["prompt_tokens"], line["completion_tokens"]) == (1, 1)
            assert 0 <= line["queue"] <= line["duration"]
            assert 0 < line["generated"] <= line["duration"]
            assert line["trace_id"] == TRACE
        assert [span.span_id.hex() for span in spans[SERVER]] == [
            one["span_id"],
            streamed["span_id"],
            refused["span_id"],
        ]
        assert (refused["status"], refused["error"]) == (400, "invalid_input_format")
        assert (batch["route"], batch["events"], batch["trace_id"]) == ("/events", 3, TRACE)
        assert (unknown["route"], unknown["error"]) == ("unmatched", "not_found")
        assert len({line["span_id"] for line in lines[:4]}) == 4


def access_lines(daemon: Daemon) -> list[dict[str, Any]]:
    return [line for line in daemon.lines if "duration" in line and not line.get("route", "").startswith("/health")]


CANARIES = {
    name: f"canary-{name}-{number}x9"
    for number, name in enumerate(
        ("prompt", "system", "stop", "wrong", "query", "path", "header", "password", "collector", "broken", "field")
    )
}


def test_what_is_never_told(tmp_path: Path, collector: Collector) -> None:
    """At DEBUG, with every trace recorded: no token, prompt or completion in any line, span or metric."""
    canary = CANARIES
    with (
        model_server() as server,
        running(
            tmp_path,
            KOBOLDCPP_API_URL=server.url,
            KOBOLDCPP_PASSWORD=canary["password"],
            LOG_LEVEL="DEBUG",
            **tracing_to(collector.url, OTEL_EXPORTER_OTLP_HEADERS=f"authorization={canary['collector']}"),
        ) as daemon,
    ):
        daemon.ready()
        messages = [
            {"role": "system", "content": canary["system"]},
            {"role": "user", "content": canary["prompt"]},
        ]
        event = {"content": {"messages": messages}, "parameters": {"stop": [canary["stop"]]}, canary["field"]: 1}
        for http2 in (False, True):
            with daemon.client(http2=http2) as client:
                for stream in (False, True):
                    answer = client.post("/event", json={**event, "stream": stream}, headers=AUTH)
                    assert canary["prompt"] in answer.text, "the model server echoes it"
                assert canary["prompt"] in client.post("/events", json=[event, {"content": 7}], headers=AUTH).text
                wrong = {"Authorization": f"Bearer {canary['wrong']}"}
                assert client.post("/event", json=event, headers=wrong).status_code == 401
                assert client.post("/event", json=event, headers={"X-API-Key": canary["wrong"]}).status_code == 401
                client.post(f"/{canary['path']}?token={canary['query']}", json=event, headers=AUTH)
                client.post(f"/event?token={canary['query']}", json=event, headers={canary["header"]: canary["header"]})
                for body in (canary["broken"], f'{{"content": "{canary["broken"]}', f'"{canary["broken"]}"'):
                    json_body = {**AUTH, "Content-Type": "application/json"}
                    assert client.post("/event", content=body.encode(), headers=json_body).status_code == 400
                bad = {"content": canary["prompt"], "parameters": {canary["field"]: canary["broken"]}}
                assert client.post("/event", json=bad, headers=AUTH).status_code == 400
        server.close()  # an event that fails at the backend
        with daemon.client() as client:
            assert client.post("/event", json=event, headers=AUTH).status_code == 502
            tls_metrics = client.get("/metrics").text
        metrics = scrape(daemon) + scrape(daemon, "application/openmetrics-text") + tls_metrics
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        told = {"log": daemon.out, "errors": daemon.err, "metrics": metrics}
    told["spans"] = "\n".join(map(str, collector.spans))
    assert len(collector.spans) > 30
    assert '"DEBUG"' in told["log"]
    assert "server_requests_total" in metrics
    found = [(where, name) for where, text in told.items() for name, value in canary.items() if value in text]
    assert found == []
    assert [where for where, text in told.items() if TOKEN in text] == []


FAMILIES = {
    "server_requests_total": "counter",
    "server_request_duration_seconds": "histogram",
    "server_request_failures_total": "counter",
    "server_requests_in_flight": "gauge",
    "server_connections": "gauge",
    "server_streams": "gauge",
    "server_overhead_seconds": "histogram",
    "server_auth_failures_total": "counter",
    "server_rate_limited_total": "counter",
    "pipeline_events_total": "counter",
    "pipeline_handler_duration_seconds": "histogram",
    "pipeline_batch_duration_seconds": "histogram",
    "pipeline_batch_size": "histogram",
    "pipeline_queue_wait_seconds": "histogram",
    "pipeline_queue_depth": "gauge",
    "pipeline_in_flight": "gauge",
    "pipeline_max_concurrency": "gauge",
    "kobold_requests_total": "counter",
    "kobold_request_failures_total": "counter",
    "kobold_request_duration_seconds": "histogram",
    "kobold_time_to_first_token_seconds": "histogram",
    "kobold_tokens_total": "counter",
    "kobold_backend_up": "gauge",
    "kobold_backend_in_flight": "gauge",
    "kobold_circuit_state": "gauge",
    "tls_certificate_expiry_timestamp_seconds": "gauge",
    "build_info": "gauge",
}
LABELS = {
    "server_requests": {"route", "method", "status"},
    "server_request_duration_seconds": {"route", "method", "status"},
    "server_request_failures": {"route", "method", "status"},
    "server_overhead_seconds": {"route"},
    "server_auth_failures": {"reason"},
    "server_rate_limited": {"reason"},
    "pipeline_events": {"outcome"},
    "kobold_requests": {"backend", "endpoint", "outcome"},
    "kobold_request_failures": {"backend", "error"},
    "kobold_request_duration_seconds": {"backend"},
    "kobold_time_to_first_token_seconds": {"backend"},
    "kobold_tokens": {"backend", "kind"},
    "kobold_backend_up": {"backend"},
    "kobold_backend_in_flight": {"backend"},
    "kobold_circuit_state": {"backend"},
    "build_info": {"version"},
}
FILLED = [name for name in LABELS if not name.startswith("server_request") and name != "server_overhead_seconds"]
"""The families whose label values are all there from the start."""


class TestMetrics:
    def test_every_family_from_the_start(self, tmp_path: Path) -> None:
        with running(tmp_path, KOBOLDCPP_API_URL="http://127.0.0.1:9", METRICS_NAMESPACE="other") as daemon:
            text = scrape(daemon)
            types = dict(re.findall(r"^# TYPE other_(\S+) (\S+)$", text, re.MULTILINE))
            assert types.items() >= FAMILIES.items()
            assert len(re.findall(r"^# HELP \S+ \S+", text, re.MULTILINE)) == len(re.findall("^# TYPE", text, re.M))
            families = {family.name.removeprefix("other_"): family for family in parse_plain(text)}
            for name in FILLED:
                assert families[name].samples, f"{name} is filled in"
                for sample in families[name].samples:
                    assert set(sample.labels) - {"le"} == LABELS[name]
            assert {sample.labels.get("backend") for sample in families["kobold_tokens"].samples} == {"127.0.0.1:9"}
            outcomes = {sample.labels["outcome"] for sample in families["pipeline_events"].samples}
            assert outcomes >= {"ok", "cancelled", "overloaded", "deadline_exceeded", "api_connection_error"}

    def test_openmetrics_with_exemplars(self, tmp_path: Path) -> None:
        with (
            model_server() as server,
            running(tmp_path, KOBOLDCPP_API_URL=server.url, OTEL_TRACES_SAMPLER_ARG="1") as daemon,
            daemon.ready().client() as client,
        ):
            headers = {**AUTH, "traceparent": TRACEPARENT}
            assert client.post("/event", json={"content": "hi"}, headers=headers).status_code == 200
            wait_until(lambda: access_lines(daemon), "the end of the request")
            not_sampled = {**AUTH, "traceparent": f"00-{'1' * 32}-{CALLER}-00"}
            assert client.post("/event", json={"content": "hi"}, headers=not_sampled).status_code == 200
            wait_until(lambda: len(access_lines(daemon)) == 2, "the end of the request")
            exposition = "application/openmetrics-text; version=1.0.0"
            for text in (scrape(daemon, exposition), client.get("/metrics", headers={"Accept": exposition}).text):
                assert text.endswith("# EOF\n")
                families = {family.name.removeprefix("ai_ticket_"): family for family in parse_openmetrics(text)}
                assert set(families) >= {name.removesuffix("_total") for name in FAMILIES}
                samples = families["server_request_duration_seconds"].samples
                found = [sample.exemplar.labels for sample in samples if sample.exemplar is not None]
                assert found == [{"trace_id": TRACE}], "what is not recorded can't be looked up"
            assert "# {" not in scrape(daemon), "the plain form has none"


METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "PURGE"]
ROUTES = ["/event", "/events", "/health", "/health/live", "/health/ready", "/metrics"]
STATUSES = {"200", "400", "401", "404", "405", "415", "422", "429"}
"""What those requests are answered with."""


class RandomRequests:
    """Requests of which hardly two are alike."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def word(self, characters: str = string.ascii_letters + string.digits + "-._~%!$&'()*+,;=:@") -> str:
        return "".join(self._chance.choices(characters, k=self._chance.randint(1, 20)))

    def make(self, method: str, path: str | None, token: str | None) -> bytes:
        """A request; `path` and `token`: None for any at all. Few have an event, which takes longer."""
        chance = self._chance
        target = path or "/" + "/".join(self.word() for _ in range(chance.randint(1, 4)))
        target += f"?{self.word()}" * chance.randint(0, 1)
        content = self.word() if chance.random() < 0.2 else chance.choice(["", 1, {self.word(): self.word()}])
        body = json.dumps({"content": content, self.word(): self.word()}).encode()
        body = body[: len(body) - chance.randint(0, 1)]
        kinds = ["application/json", "text/plain", f"x/{self.word(string.ascii_letters)}"]
        lines = [
            f"{method} {target} HTTP/1.1",
            "Host: x",
            f"Content-Length: {len(body)}",
            f"Content-Type: {chance.choice(kinds)}",
            f"Authorization: Bearer {token or self.word()}",
            f"X-Request-ID: {self.word()}",
            f"traceparent: 00-{chance.getrandbits(128):032x}-{chance.getrandbits(64):016x}-00",
            f"User-Agent: {self.word()}",
            f"X-Forwarded-For: 198.51.{chance.randrange(256)}.{chance.randrange(256)}",
            f"X-{self.word(string.ascii_letters)}: {self.word()}",
        ]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def any(self) -> bytes:
        chance = self._chance
        path = chance.choice([None, "/event", chance.choice(ROUTES)])
        return self.make(chance.choice([*METHODS, "POST", "POST"]), path, chance.choice([None, None, TOKEN]))

    def of_no_method(self) -> bytes:
        """What the parser of HTTP/1 refuses, and with it the connection."""
        return self.make(self.word(string.ascii_lowercase), None, None)

    def first(self) -> list[bytes]:
        """A thousand, with every known method at every route, allowed or not, with every kind of token."""
        known = list(product(METHODS, [*ROUTES, None], [TOKEN, None]))
        found = [self.make(*each) for each in known for _ in range(3)]
        found += [self.make("POST", path, TOKEN) for path in ("/event", "/events") for _ in range(80)]
        found += [self.make("POST", path, None) for path in ("/event", "/events") for _ in range(10)]
        return found + [self.any() for _ in range(990 - len(found))]


def series(daemon: Daemon) -> set[str]:
    text = scrape(daemon)
    return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def test_no_caller_can_make_series(tmp_path: Path) -> None:
    """10,000 requests with random paths, methods, tokens and headers."""
    requests = RandomRequests(3)
    first = requests.first()
    with (
        model_server() as server,
        running(
            tmp_path,
            KOBOLDCPP_API_URL=server.url,
            KOBOLDCPP_SLOTS="8",
            RATE_LIMIT_REQUESTS="0",
            OTEL_TRACES_EXPORTER="none",
        ) as daemon,
    ):
        daemon.ready()
        port = daemon.port("http")

        async def send(batch: list[bytes]) -> Counter[bytes]:
            """All of these on one connection, pipelined, and behind them one that ends it."""
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"".join([*batch, requests.of_no_method()]))
            answers = await asyncio.wait_for(reader.read(-1), PATIENCE)
            writer.close()
            return Counter(re.findall(rb"HTTP/1\.1 (\d{3}) ", answers))

        async def send_all(everything: list[bytes]) -> Counter[bytes]:
            batches = [everything[start : start + 99] for start in range(0, len(everything), 99)]
            answers: Counter[bytes] = Counter()
            for start in range(0, len(batches), 4):
                for found in await asyncio.gather(*map(send, batches[start : start + 4])):
                    answers += found
            return answers

        async def send_http2(count: int) -> None:
            """With random methods, which are no reason to end the connection there."""
            async with daemon.async_client(http2=True) as client:
                for _ in range(count):
                    await client.request(requests.word(string.ascii_letters), f"/{requests.word()}", headers=AUTH)
                    await client.request(requests.word(string.ascii_letters), "/event", headers={"x": requests.word()})

        before = series(daemon)
        answers = asyncio.run(send_all(first))
        assert answers.total() == 990 + 10, "each was answered"
        after_first = wait_until(lambda: (found := series(daemon)) > before and found, "series of what was asked")
        answers += asyncio.run(send_all([requests.any() for _ in range(8910)]))
        assert answers.total() == 10_000
        asyncio.run(send_http2(100))
        assert {status.decode() for status in answers} == STATUSES
        after_all = series(daemon)
    assert before < after_first
    assert after_all == after_first
    assert len(after_all) < 2500
    grown = after_all - before
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', one)) for one in grown]
    assert {each["route"] for each in labels} == {*ROUTES, "unmatched"}
    assert {each.get("method", "GET") for each in labels} == {*METHODS[:-2], "other"}
    assert {each.get("status", "200") for each in labels} <= STATUSES
    families = {one.partition("{")[0].removeprefix("ai_ticket_") for one in grown}
    assert {re.sub("_(bucket|sum|count|total)$", "", name) for name in families} == {
        "server_requests",
        "server_request_duration_seconds",
        "server_overhead_seconds",
    }
