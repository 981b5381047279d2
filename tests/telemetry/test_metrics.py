"""Metrics of the HTTP surface."""

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from ai_ticket.telemetry.metrics import Metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
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
    assert any(name == "ns_build_info" for name, _ in found)
    assert not any(name.endswith("_created") for name, _ in found)


def test_two_of_them_do_not_clash() -> None:
    first, second = Metrics("ns", CollectorRegistry()), Metrics("ns", CollectorRegistry())
    first.authentication_failed("invalid")
    assert samples(second)["ns_server_auth_failures_total", (("reason", "invalid"),)] == 0
