"""Metrics of the pipeline."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ai_ticket.telemetry.pipeline_metrics import OUTCOMES, PipelineMetrics
from ai_ticket.web.faults import STATUSES


class World:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.metrics = PipelineMetrics("ns", self._registry)

    def samples(self) -> dict[tuple[str, str | None], float]:
        """The values by name, and by outcome or bucket."""
        return {
            (sample.name, sample.labels.get("outcome", sample.labels.get("le"))): sample.value
            for family in text_string_to_metric_families(generate_latest(self._registry).decode())
            for sample in family.samples
        }


def test_everything_is_there_from_the_start() -> None:
    world = World()
    world.metrics.watch(depth=lambda: 0, in_flight=lambda: 0, max_concurrency=lambda: 8)
    found = world.samples()
    for outcome in ("ok", "cancelled", "overloaded", "deadline_exceeded", "api_server_error", "internal_error"):
        assert found["ns_pipeline_events_total", outcome] == 0
    for name in ("handler_duration_seconds", "batch_duration_seconds", "queue_wait_seconds"):
        assert found[f"ns_pipeline_{name}_count", None] == 0
        assert (f"ns_pipeline_{name}_bucket", "300.0") in found, "models are slow"
    assert found["ns_pipeline_batch_size_count", None] == 0
    assert found["ns_pipeline_max_concurrency", None] == 8


def test_events() -> None:
    world = World()
    world.metrics.event_began(0.5)
    world.metrics.event_ended("ok", 2.0)
    world.metrics.event_ended("overloaded", None)
    world.metrics.batch_ended(3, 4.0)
    found = world.samples()
    assert found["ns_pipeline_events_total", "ok"] == 1
    assert found["ns_pipeline_events_total", "overloaded"] == 1
    assert found["ns_pipeline_queue_wait_seconds_sum", None] == 0.5
    assert found["ns_pipeline_handler_duration_seconds_sum", None] == 2
    assert found["ns_pipeline_handler_duration_seconds_count", None] == 1, "one never began"
    assert (found["ns_pipeline_batch_size_sum", None], found["ns_pipeline_batch_duration_seconds_sum", None]) == (3, 4)
    assert found["ns_pipeline_batch_size_bucket", "2.0"] == 0


def test_the_set_of_outcomes_is_fixed() -> None:
    """Each is `ok`, `cancelled` or an error with a status."""
    assert set(OUTCOMES) - {"ok", "cancelled"} <= set(STATUSES)
    assert len(set(OUTCOMES)) == len(OUTCOMES)
    world = World()
    before = set(world.samples())
    world.metrics.event_ended("what nobody has heard of", None)
    assert set(world.samples()) == before
    assert world.samples()["ns_pipeline_events_total", "internal_error"] == 1


def test_gauges_are_read_when_the_metrics_are() -> None:
    world = World()
    depth = [3]
    world.metrics.watch(depth=lambda: depth[0], in_flight=lambda: 2, max_concurrency=lambda: 8)
    depth[0] = 4
    found = world.samples()
    assert (found["ns_pipeline_queue_depth", None], found["ns_pipeline_in_flight", None]) == (4, 2)
