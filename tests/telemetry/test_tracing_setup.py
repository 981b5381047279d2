"""OpenTelemetry's variables: what they make of tracing, and what is said of wrong ones."""

import io
import json
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
from memory_tracer import FakeReactor, stop

from ai_ticket import __version__, preflight
from ai_ticket.environment import ConfigurationError, Loaded, load
from ai_ticket.settings import MORE_SPECIFIC, Settings, variables
from ai_ticket.telemetry import tracing_otlp
from ai_ticket.telemetry.tracing import ForwardingTracer, SpanTracer
from ai_ticket.telemetry.tracing_export import ConsoleExporter
from ai_ticket.telemetry.tracing_otlp import Collector
from ai_ticket.telemetry.tracing_setup import Tracing, make_resource, make_tracing
from ai_ticket.telemetry.tracing_values import parse_headers, parse_pairs

BASE = {"AI_TICKET_AUTH_TOKEN": "t"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in variables():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def collectors(monkeypatch: pytest.MonkeyPatch) -> list[Collector]:
    """The collectors that spans would go to."""
    found: list[Collector] = []

    def make(collector: Collector, *others: Any) -> ConsoleExporter:
        found.append(collector)
        return ConsoleExporter({}, io.StringIO())

    monkeypatch.setattr(tracing_otlp, "OtlpExporter", make)
    return found


def loaded(**environ: str) -> Loaded:
    return load({**BASE, **environ})


def settings(**environ: str) -> Settings:
    return loaded(**environ).settings


def problems(**environ: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        loaded(**environ)
    return caught.value.problems


def tracing(console: io.StringIO | None = None, **environ: str) -> Tracing:
    reactor = FakeReactor()
    made = make_tracing(
        settings(**environ),
        clock=reactor,
        call_in_reactor=reactor.callFromThread,
        random=Random(1),
        instance_id="i",
        console=console,
    )
    made.reactor = reactor  # type: ignore[attr-defined]
    return made


class TestExporters:
    """Where traces go."""

    def test_the_console_unless_an_endpoint_is_set(self) -> None:
        out = io.StringIO()
        before = threading.active_count()
        service: Any = tracing(out)
        assert threading.active_count() == before
        service.startService()
        span = service.tracer.start("POST /event", kind="server")
        span.child("pipeline.handle").end()
        span.end()
        stop(service.reactor, service)
        first, second = map(json.loads, out.getvalue().splitlines())
        assert (first["name"], second["name"]) == ("pipeline.handle", "POST /event")
        assert first["parent_id"] == second["span_id"]
        assert second["resource"]["service.name"] == "ai-ticket"
        assert service.dropped == 0

    @pytest.mark.parametrize(
        ("environ", "url"),
        [
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://c/otlp/"}, "https://c/otlp/v1/traces"),
            ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/x"}, "http://c:4318/x"),
            (
                {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://d/x"},
                "http://d/x",
            ),
            ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4318/v1/traces"),
        ],
    )
    def test_a_collector(self, collectors: list[Collector], environ: dict[str, str], url: str) -> None:
        assert isinstance(tracing(**environ).tracer, SpanTracer)
        [collector] = collectors
        assert collector == Collector(url, {}, 10.0, "none")

    def test_how_a_collector_is_spoken_to(self, collectors: list[Collector]) -> None:
        tracing(
            OTEL_EXPORTER_OTLP_ENDPOINT="http://c",
            OTEL_EXPORTER_OTLP_HEADERS="Authorization=Bearer%20sesame, x-tenant = a",
            OTEL_EXPORTER_OTLP_TIMEOUT="2500",
            OTEL_EXPORTER_OTLP_COMPRESSION="GZIP",
            OTEL_EXPORTER_OTLP_CERTIFICATE="/ca",
            OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE="/cert",
            OTEL_EXPORTER_OTLP_CLIENT_KEY="/key",
        )
        headers = {"Authorization": "Bearer sesame", "x-tenant": "a"}
        assert collectors == [Collector("http://c/v1/traces", headers, 2.5, "gzip", "/ca", "/cert", "/key")]
        assert "sesame" not in repr(collectors)

    def test_the_file_counts_as_well(self, collectors: list[Collector], tmp_path: Path) -> None:
        """The SDK itself would look at the process's environment alone."""
        (tmp_path / ".env").write_text(
            "OTEL_EXPORTER_OTLP_ENDPOINT=http://file\nOTEL_EXPORTER_OTLP_TIMEOUT=700\n"
            "OTEL_EXPORTER_OTLP_HEADERS=a=file\nOTEL_SERVICE_NAME=x\n"
        )
        tracing(OTEL_EXPORTER_OTLP_HEADERS="a=environment")
        assert collectors == [Collector("http://file/v1/traces", {"a": "environment"}, 0.7, "none")]

    @pytest.mark.parametrize("environ", [{"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_SDK_DISABLED": "true"}])
    def test_none(self, environ: dict[str, str], collectors: list[Collector]) -> None:
        before = threading.active_count()
        service: Any = tracing(OTEL_EXPORTER_OTLP_ENDPOINT="http://c", **environ)
        service.startService()
        assert threading.active_count() == before
        assert isinstance(service.tracer, ForwardingTracer)
        assert service.dropped == 0
        stop(service.reactor, service)
        assert collectors == []

    def test_the_console_where_it_is_asked_for(self, collectors: list[Collector]) -> None:
        tracing(OTEL_TRACES_EXPORTER="console", OTEL_EXPORTER_OTLP_ENDPOINT="http://c")
        assert collectors == []


class TestSamplersAndLimits:
    """What is recorded."""

    def test_a_share(self) -> None:
        tracer = tracing(OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0.25").tracer
        assert 400 < sum(tracer.start("x").recording for _ in range(2000)) < 600

    def test_all_of_them_where_no_share_is_named(self) -> None:
        tracer = tracing(OTEL_TRACES_SAMPLER="traceidratio").tracer
        assert all(tracer.start("x").recording for _ in range(100))

    def test_limits(self) -> None:
        tracer = tracing(
            OTEL_ATTRIBUTE_COUNT_LIMIT="2",
            OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT="1",
            OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT="3",
            OTEL_SPAN_LINK_COUNT_LIMIT="1",
        ).tracer
        other = tracer.start("y")
        span: Any = tracer.start("x", attributes={"a": "xxxx", "b": 1}, links=[other, other])
        assert span.attributes == {"a": "xxx"}
        assert len(span.links) == 1

    def test_the_queue(self) -> None:
        service: Any = tracing(OTEL_BSP_MAX_QUEUE_SIZE="5", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="5")
        service.tracer.start("x").end()
        assert service.dropped == 1  # it does not run


class TestResource:
    """What spans say of the service."""

    def test_by_default(self) -> None:
        assert make_resource(settings(), "i") == {
            "service.name": "ai-ticket",
            "service.version": __version__,
            "service.instance.id": "i",
            "telemetry.sdk.language": "python",
            "telemetry.sdk.name": "ai-ticket",
        }

    def test_more(self) -> None:
        text = "deployment.environment.name=prod, service.name=x,service.instance.id=pod%201,"
        found = make_resource(settings(OTEL_RESOURCE_ATTRIBUTES=text), "i")
        assert found["deployment.environment.name"] == "prod"
        assert found["service.instance.id"] == "pod 1"
        assert found["service.name"] == "x"

    def test_the_name_wins(self) -> None:
        found = make_resource(settings(OTEL_RESOURCE_ATTRIBUTES="service.name=x", OTEL_SERVICE_NAME="y"), "i")
        assert found["service.name"] == "y"


class TestVariables:
    """What is said of them."""

    @pytest.mark.parametrize(
        ("name", "text", "allowed"),
        [
            ("OTEL_TRACES_EXPORTER", "zipkin", "must be one of otlp, console, none"),
            ("OTEL_TRACES_SAMPLER", "sometimes", "must be one of always_on, always_off, traceidratio, parentbased_"),
            ("OTEL_TRACES_SAMPLER_ARG", "1.5", "must be a number from 0 to 1"),
            ("OTEL_SDK_DISABLED", "maybe", "must be on or off"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317", "must be an http:// or https:// URL"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://", "must be an http:// or https:// URL"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:port", "must be an http:// or https:// URL"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://[c", "must be an http:// or https:// URL"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://a b/", "must be an http:// or https:// URL"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "must be one of http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc", "must be one of http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10", "must be a whole number from 100 to 3600000"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1s", "must be a whole number from 100 to 3600000"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "must be one of none, gzip, deflate"),
            ("OTEL_RESOURCE_ATTRIBUTES", "a", "must be name=value pairs, separated by commas"),
            ("OTEL_BSP_SCHEDULE_DELAY", "0", "must be a whole number from 1 to 3600000"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "x", "must be a whole number from 1 to 1000000"),
            ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1", "must be a whole number from 1 to 1000000"),
        ],
    )
    def test_a_wrong_value_is_one_line(self, name: str, text: str, allowed: str) -> None:
        [line] = problems(**{name: text})
        assert line.startswith(f"{name}={text!r}: {allowed}")

    def test_a_batch_that_the_queue_can_not_hold(self) -> None:
        [line] = problems(OTEL_BSP_MAX_QUEUE_SIZE="100")
        assert line == "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=512: must not be more than OTEL_BSP_MAX_QUEUE_SIZE, 100"

    @pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"])
    @pytest.mark.parametrize("text", ["sesame", "a=sesame%0d%0ab", "a b=sesame", "a=sesame%C3%A4", "=sesame"])
    def test_wrong_headers_are_not_shown(self, name: str, text: str) -> None:
        [line] = problems(**{name: text})
        assert line.startswith(f"{name}=(hidden): must be ")

    def test_a_password_in_an_endpoint_is_not_shown(self) -> None:
        [line] = problems(OTEL_EXPORTER_OTLP_ENDPOINT="http://me:sesame@c")
        assert "sesame" not in line
        assert "OTEL_EXPORTER_OTLP_HEADERS" in line

    def test_a_key_without_its_certificate(self) -> None:
        assert problems(OTEL_EXPORTER_OTLP_CLIENT_KEY="/x") == [
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE: not set, though OTEL_EXPORTER_OTLP_CLIENT_KEY is"
        ]

    def test_the_name_for_traces_alone_wins(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT=300\n")
        found = loaded(OTEL_EXPORTER_OTLP_TIMEOUT="200")
        assert found.settings.otel_exporter_otlp_timeout == 300
        source = f"OTEL_EXPORTER_OTLP_TRACES_TIMEOUT ({tmp_path / '.env'})"
        assert found.sources["OTEL_EXPORTER_OTLP_TIMEOUT"] == source
        assert found.warnings == []

    def test_every_general_name_is_a_setting(self) -> None:
        assert set(MORE_SPECIFIC) <= set(variables())
        assert not set(MORE_SPECIFIC.values()) & set(variables())

    @pytest.mark.parametrize("name", ["OTEL_PROPAGATORS", "OTEL_METRICS_EXPORTER", "OTEL_EXPORTER_OTLP_LOGS_TIMEOUT"])
    def test_what_is_not_used_is_named(self, name: str) -> None:
        [warning] = loaded(**{name: "x"}).warnings
        assert warning.startswith(f"{name}: not used, the value has no effect")

    def test_a_share_that_the_sampler_does_not_take(self) -> None:
        [warning] = loaded(OTEL_TRACES_SAMPLER_ARG="0.1").warnings
        assert warning == "OTEL_TRACES_SAMPLER_ARG: of no effect with OTEL_TRACES_SAMPLER=parentbased_always_on"

    def test_pairs(self) -> None:
        assert parse_pairs("a=b=c, d%20e = f%2Cg ,h=,") == {"a": "b=c", "d e": "f,g", "h": ""}
        assert parse_headers("") == {}


class TestPreflight:
    """The files that the variables name."""

    def found(self, **environ: str) -> list[str]:
        return [line for line in preflight.problems(settings(**environ)) if line.startswith("OTEL_")]

    def test_files_that_are_not_there(self) -> None:
        for name in ("OTEL_EXPORTER_OTLP_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"):
            [line] = self.found(**{name: "/nowhere"})
            assert line.startswith(f"{name}='/nowhere': can't be read")
            assert "No such file" in line

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text("no certificate")
        [line] = self.found(OTEL_EXPORTER_OTLP_CERTIFICATE="ca.pem")
        assert line.startswith("OTEL_EXPORTER_OTLP_CERTIFICATE='ca.pem': can't be read")

    def test_files_that_fit(self, tmp_path: Path) -> None:
        import trustme

        authority = trustme.CA()
        authority.cert_pem.write_to_path("ca.pem")
        ours = authority.issue_cert("client")
        ours.cert_chain_pems[0].write_to_path("cert.pem")
        ours.private_key_pem.write_to_path("key.pem")
        files = {"OTEL_EXPORTER_OTLP_CERTIFICATE": "ca.pem", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "cert.pem"}
        assert self.found(**files, OTEL_EXPORTER_OTLP_CLIENT_KEY="key.pem") == []
        [line] = self.found(**files)
        assert line.startswith("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE='cert.pem': can't be read, or has no private key")


def test_the_collectors_part_is_not_loaded_without_one() -> None:
    """It takes memory and time that others need not spend."""
    import subprocess

    script = (
        "import sys, io; from random import Random; from twisted.internet.task import Clock;"
        "from ai_ticket.settings import Settings; from ai_ticket.telemetry.tracing_setup import make_tracing;"
        "make_tracing(Settings(), clock=Clock(), call_in_reactor=print, random=Random(), instance_id='i');"
        "print([name for name in sys.modules if name.split('.')[0] in ('opentelemetry', 'urllib3', 'google')])"
    )
    path = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], cwd=path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
