"""Tracing as the settings say."""

from collections.abc import Callable
from random import Random
from typing import TextIO

from twisted.application.service import MultiService
from twisted.internet.interfaces import IReactorTime

from ai_ticket import __version__
from ai_ticket.settings import DEFAULTS, Settings
from ai_ticket.spans import Tracer
from ai_ticket.telemetry.tracing import ForwardingTracer, SpanLimits, SpanTracer, make_sampler
from ai_ticket.telemetry.tracing_export import ConsoleExporter, Exporter, SpanExport
from ai_ticket.telemetry.tracing_values import parse_headers, parse_pairs, traces_url


class Tracing(MultiService):
    """The `tracer`, and what exports its spans while the service runs."""

    def __init__(self, tracer: Tracer, export: SpanExport | None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self._export = export
        if export is not None:
            export.setServiceParent(self)  # type: ignore[no-untyped-call]

    @property
    def dropped(self) -> int:
        """How many spans have ended and were not exported, for want of room, of a collector or of time."""
        return 0 if self._export is None else self._export.dropped


def make_tracing(
    settings: Settings,
    *,
    clock: IReactorTime,
    call_in_reactor: Callable[..., object],
    random: Random,
    instance_id: str,
    console: TextIO | None = None,
) -> Tracing:
    """Tracing with these settings, not yet started.

    @param random: the ids come from it.
    @param instance_id: tells this process from others of its service.
    @param console: where the console's lines go; the process's own standard error by default.
    """
    target = settings.otel_traces_exporter or _default_exporter(settings)
    if settings.otel_sdk_disabled or target == "none":
        return Tracing(ForwardingTracer(), None)
    resource = make_resource(settings, instance_id)
    exporter = (
        ConsoleExporter(resource, console) if target == "console" else _make_otlp_exporter(settings, resource, random)
    )
    export = SpanExport(
        exporter,
        clock=clock,
        call_in_reactor=call_in_reactor,
        queue_size=settings.otel_bsp_max_queue_size,
        batch_size=settings.otel_bsp_max_export_batch_size,
        delay=settings.otel_bsp_schedule_delay / 1000,
    )
    ratio = settings.otel_traces_sampler_arg
    tracer = SpanTracer(
        clock=clock,
        random=random,
        sampler=make_sampler(settings.otel_traces_sampler, 1.0 if ratio is None else ratio),
        limits=SpanLimits(
            attributes=settings.otel_attribute_count_limit,
            characters=settings.otel_attribute_value_length_limit,
            links=settings.otel_span_link_count_limit,
        ),
        finished=export.put,
    )
    return Tracing(tracer, export)


def make_resource(settings: Settings, instance_id: str) -> dict[str, str]:
    """What all spans say of the service. OTEL_SERVICE_NAME wins over OTEL_RESOURCE_ATTRIBUTES, but for its default."""
    ours = {
        "service.name": settings.otel_service_name,
        "service.version": __version__,
        "service.instance.id": instance_id,
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "ai-ticket",
    }
    found = ours | parse_pairs(settings.otel_resource_attributes or "")
    if settings.otel_service_name != DEFAULTS.otel_service_name:
        found["service.name"] = settings.otel_service_name
    return found


def _default_exporter(settings: Settings) -> str:
    endpoints = settings.otel_exporter_otlp_endpoint, settings.otel_exporter_otlp_traces_endpoint
    return "otlp" if any(endpoints) else "console"


def _make_otlp_exporter(settings: Settings, resource: dict[str, str], random: Random) -> Exporter:
    # It takes megabytes and a tenth of a second, which those need not spend who have no collector.
    from ai_ticket.telemetry.tracing_otlp import Collector, OtlpExporter  # noqa: PLC0415

    collector = Collector(
        url=traces_url(settings.otel_exporter_otlp_endpoint, settings.otel_exporter_otlp_traces_endpoint),
        headers=parse_headers(settings.otel_exporter_otlp_headers or ""),
        timeout=settings.otel_exporter_otlp_timeout / 1000,
        compression=settings.otel_exporter_otlp_compression,
        ca_file=settings.otel_exporter_otlp_certificate,
        client_certificate_file=settings.otel_exporter_otlp_client_certificate,
        client_key_file=settings.otel_exporter_otlp_client_key,
    )
    return OtlpExporter(collector, resource, random.random)
