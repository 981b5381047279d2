"""Metrics of the HTTP surface."""

from linked import result_of
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ai_ticket.telemetry.metrics import END_REASONS, SCRAPE_SECONDS, Metrics, Scrapes


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_requests() -> None:
    metrics = Metrics("ns", CollectorRegistry())
    for status in (200, 502):
        metrics.request_started()
        metrics.request_finished("/event", "POST", status, 1.5)
    metrics.request_started()
    found = samples(metrics)
    for status, failures in (("200", None), ("502", 1)):
        labels = (("method", "POST"), ("route", "/event"), ("status", status))
        assert found["ns_server_requests_total", labels] == 1
        assert found["ns_server_request_duration_seconds_sum", labels] == 1.5
        assert found.get(("ns_server_request_failures_total", labels)) == failures
    assert found["ns_server_requests_in_flight", ()] == 1


def test_families_with_fixed_labels_are_there_from_the_start() -> None:
    found = samples(Metrics("ns", CollectorRegistry()))
    for reason in ("missing", "invalid"):
        assert found["ns_server_auth_failures_total", (("reason", reason),)] == 0
    for reason in ("protocol", "timeout", "closed"):
        assert found["ns_tls_handshake_failures_total", (("reason", reason),)] == 0
    for reason in END_REASONS:
        assert found["ns_server_connections_ended_total", (("reason", reason),)] == 0
    assert any(name == "ns_build_info" for name, _ in found)
    assert not any(name.endswith("_created") for name, _ in found)


def test_what_we_ended() -> None:
    metrics = Metrics("ns", CollectorRegistry())
    metrics.connection_ended("unread")
    assert samples(metrics)["ns_server_connections_ended_total", (("reason", "unread"),)] == 1


def test_two_of_them_do_not_clash() -> None:
    first, second = Metrics("ns", CollectorRegistry()), Metrics("ns", CollectorRegistry())
    first.authentication_failed("invalid")
    assert samples(second)["ns_server_auth_failures_total", (("reason", "invalid"),)] == 0


def test_open_metrics_with_exemplars_for_who_accepts_it() -> None:
    metrics = Metrics("ns", CollectorRegistry())
    metrics.request_started()
    metrics.request_finished("/event", "POST", 200, 1.5, "ab" * 16)
    text, content_type = metrics.render("application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    families = openmetrics_families(text.decode())
    [exemplar] = [s.exemplar for family in families for s in family.samples if s.exemplar is not None]
    assert exemplar.labels == {"trace_id": "ab" * 16}
    plain, content_type = metrics.render("*/*")
    assert content_type.startswith("text/plain")
    assert b"trace_id" not in plain


def test_what_we_took_ourselves() -> None:
    metrics = Metrics("ns", CollectorRegistry())
    metrics.overhead("/event", 0.002)
    assert samples(metrics)["ns_server_overhead_seconds_sum", (("route", "/event"),)] == 0.002


def test_values_that_are_read_when_rendered() -> None:
    metrics = Metrics("ns", CollectorRegistry())
    values = iter([3.0, 4.0])
    metrics.watch("server_connections", "Open connections.", lambda: next(values))
    assert samples(metrics)["ns_server_connections", ()] == 3
    assert samples(metrics)["ns_server_connections", ()] == 4


def test_handshakes_that_failed_and_the_lag_of_the_event_loop() -> None:
    metrics = Metrics("ns", CollectorRegistry())
    metrics.tls_handshake_failed("timeout")
    for lag in (0.0004, 0.3):
        metrics.reactor_lag(lag)
    found = samples(metrics)
    assert found["ns_tls_handshake_failures_total", (("reason", "timeout"),)] == 1
    assert found["ns_reactor_lag_seconds_count", ()] == 2
    assert found["ns_reactor_lag_seconds_bucket", (("le", "0.25"),)] == 1


OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def test_each_form_is_rendered_once_a_second() -> None:
    clock = Clock()
    made: list[str] = []

    async def render(accept: str) -> tuple[bytes, str]:
        made.append(accept)
        return f"{len(made)}".encode(), "text"

    scrapes = Scrapes(render, clock)
    for accept in ("", "text/plain", "*/*", "whatever"):
        assert got(scrapes, accept) == (b"1", "text")
    assert [got(scrapes, OPENMETRICS + extra) for extra in ("", ";q=1")] == [(b"2", "text")] * 2
    clock.advance(SCRAPE_SECONDS - 0.001)
    assert (got(scrapes), got(scrapes, OPENMETRICS)) == ((b"1", "text"), (b"2", "text"))
    clock.advance(0.001)
    assert (got(scrapes), got(scrapes, OPENMETRICS)) == ((b"3", "text"), (b"4", "text"))


def test_who_asks_while_it_is_rendered_gets_the_same() -> None:
    rendering: list[Deferred[tuple[bytes, str]]] = []

    async def render(accept: str) -> tuple[bytes, str]:
        rendering.append(Deferred())
        return await rendering[-1]

    scrapes = Scrapes(render, Clock())
    asked = [Deferred.fromCoroutine(scrapes.get("")) for _ in range(3)]
    rendering[0].callback((b"1", "text"))
    assert [result_of(each) for each in asked] == [(b"1", "text")] * 3
    assert len(rendering) == 1


def test_a_clock_that_is_set_back_holds_nothing_up() -> None:
    clock = Clock()
    clock.advance(1000)
    values = iter([b"old", b"new"])

    async def render(accept: str) -> tuple[bytes, str]:
        return next(values), "text"

    scrapes = Scrapes(render, clock)
    assert got(scrapes)[0] == b"old"
    clock.rightNow -= 500
    assert got(scrapes)[0] == b"new"


def got(scrapes: Scrapes, accept: str = "") -> tuple[bytes, str]:
    found: tuple[bytes, str] = result_of(Deferred.fromCoroutine(scrapes.get(accept)))
    return found
