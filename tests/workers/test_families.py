"""Metrics of several processes as one's."""

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from ai_ticket.telemetry.metrics import Metrics, rendered
from ai_ticket.workers.families import Collected, collected, departed, merged
from ai_ticket.workers.messages import Family


class Process:
    """A process that counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics("ns", self.registry)

    def answer(self, status: int, seconds: float, trace: str | None = None) -> None:
        self.metrics.request_started()
        self.metrics.request_finished("/event", "POST", status, seconds, trace)

    @property
    def families(self) -> list[Family]:
        """As they are after their way between processes."""
        return msgspec.msgpack.decode(msgspec.msgpack.encode(collected(self.registry)), type=list[Family])


def values(families: list[Family]) -> dict[str, float]:
    text, _ = rendered(Collected(families), "")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(sample.labels[name] for name in ("status", "le", "reason") if name in sample.labels)
            found[f"{sample.name} {labels}".strip()] = sample.value
    return found


def test_one_process_is_rendered_as_ever() -> None:
    process = Process()
    process.answer(200, 0.3)
    process.answer(502, 7.0)
    here, type_here = rendered(process.registry, "")
    there, type_there = rendered(Collected(process.families), "")
    steady = [line for line in here.split(b"\n") if b"process_" not in line]
    assert [line for line in there.split(b"\n") if b"process_" not in line] == steady
    assert type_here == type_there


def test_counters_histograms_and_gauges_are_summed() -> None:
    one, other = Process(), Process()
    one.answer(200, 0.3)
    one.answer(200, 0.3)
    other.answer(200, 7.0)
    other.answer(429, 0.001)
    other.metrics.request_started()
    one.metrics.watch("server_connections", "Open.", lambda: 3)
    other.metrics.watch("server_connections", "Open.", lambda: 4)
    found = values(merged([one.families, other.families]))
    assert found["ns_server_requests_total 200"] == 3
    assert found["ns_server_requests_total 429"] == 1, "which one of them alone has seen"
    assert found["ns_server_request_duration_seconds_count 200"] == 3
    assert found["ns_server_request_duration_seconds_sum 200"] == 7.6
    assert found["ns_server_request_duration_seconds_bucket 200,0.5"] == 2
    assert found["ns_server_request_duration_seconds_bucket 200,10.0"] == 3
    assert found["ns_server_requests_in_flight"] == 1
    assert found["ns_server_connections"] == 7


def test_what_is_the_same_for_all_is_not_summed() -> None:
    one, other = Process(), Process()
    for process, when in ((one, 2000.0), (other, 1000.0)):
        process.metrics.watch("tls_certificate_expiry_timestamp_seconds", "When.", lambda when=when: when)
    found = values(merged([one.families, other.families]))
    assert found["ns_build_info"] == 1
    assert found["ns_tls_certificate_expiry_timestamp_seconds"] == 1000, "the first to expire"
    assert found["process_start_time_seconds"] == values(one.families)["process_start_time_seconds"]
    assert found["process_max_fds"] == values(one.families)["process_max_fds"]
    assert found["process_open_fds"] > values(one.families)["process_open_fds"]


def test_of_a_process_that_is_gone_the_counts_stay_and_the_rest_does_not() -> None:
    one, other = Process(), Process()
    for process in (one, other):
        process.answer(200, 0.3)
        process.metrics.request_started()
    found = values(merged([departed(one.families), other.families]))
    assert found["ns_server_requests_total 200"] == 2
    assert found["ns_server_request_duration_seconds_count 200"] == 2
    assert found["ns_server_requests_in_flight"] == 1
    assert values(merged([departed(one.families)])).get("ns_server_requests_in_flight") is None


def test_exemplars_are_kept_and_the_newest_wins() -> None:
    one, other = Process(), Process()
    other.answer(200, 0.3, "bb" * 16)
    one.answer(200, 0.3, "aa" * 16)
    for order in ([one, other], [other, one]):
        text, content_type = rendered(
            Collected(merged(process.families for process in order)), "application/openmetrics-text"
        )
        assert content_type.startswith("application/openmetrics-text")
        found = openmetrics_families(text.decode())
        exemplars = [sample.exemplar for family in found for sample in family.samples if sample.exemplar is not None]
        assert [each.labels for each in exemplars] == [{"trace_id": "aa" * 16}]


def test_a_family_without_samples_keeps_its_place() -> None:
    registry = CollectorRegistry()
    Counter("a", "What.", ("x",), registry=registry)
    Gauge("b", "What.", ("x",), registry=registry)
    text, _ = rendered(Collected(merged([collected(registry)])), "")
    assert b"# TYPE a_total counter" in text
    assert b"# TYPE b gauge" in text


def test_what_is_of_all_processes_is_not_summed() -> None:
    processes = []
    for strain in (0, 2, 1):
        registry = CollectorRegistry()
        Gauge("overload_level", "", namespace="ns", registry=registry).set(strain)
        Gauge("memory_limit_bytes", "", namespace="ns", registry=registry).set(4096)
        processes.append(collected(registry))
    assert values(merged(processes)) == {"ns_overload_level": 2, "ns_memory_limit_bytes": 4096}
