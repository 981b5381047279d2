"""Spans for an OpenTelemetry collector: OTLP over HTTP, in protobuf, with OpenTelemetry's own exporter."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from msgspec import Struct
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState
from requests.utils import get_environ_proxies

from ai_ticket import __version__
from ai_ticket.telemetry.tracing import RecordedSpan
from ai_ticket.telemetry.tracing_export import ExportError

_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_COMPRESSIONS = {"none": Compression.NoCompression, "gzip": Compression.Gzip, "deflate": Compression.Deflate}
_NOISY = ("opentelemetry.exporter", "urllib3")
"""They log each failure several times, tracebacks included; `SpanExport` says what there is to say."""


class Collector(Struct, frozen=True):
    """Where spans go, and how. `timeout` is in seconds, for a batch with all attempts at it; files are PEM."""

    url: str
    headers: dict[str, str]
    timeout: float
    compression: str
    ca_file: str | None = None
    client_certificate_file: str | None = None
    client_key_file: str | None = None

    def __repr__(self) -> str:
        return f"Collector({self.url!r})"


class OtlpExporter:
    """Posts spans to a collector. What may pass is tried again, for as long as the time-out allows."""

    def __init__(self, collector: Collector, resource: Mapping[str, str]):
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._resource = _Resource(resource)
        self._scope = InstrumentationScope("ai_ticket", __version__)
        self._session = _Session()
        # What of the environment may change a request: its proxies, but no .netrc, which would replace the headers.
        self._session.trust_env = False
        self._session.proxies.update(get_environ_proxies(collector.url))
        self._exporter = OTLPSpanExporter(
            endpoint=collector.url,
            headers=collector.headers,
            timeout=collector.timeout,
            compression=_COMPRESSIONS[collector.compression],
            certificate_file=collector.ca_file,
            client_certificate_file=collector.client_certificate_file,
            client_key_file=collector.client_key_file,
            session=self._session,
        )

    def export(self, spans: Sequence[RecordedSpan]) -> None:
        """Post them, in one request.

        @raise ExportError: the collector can't be reached, or did not take all of them.
        """
        if self._exporter.export([self._readable(span) for span in spans]) is not SpanExportResult.SUCCESS:
            raise ExportError(self._session.outcome)
        if self._session.rejected:
            raise ExportError(self._session.outcome, self._session.rejected)

    def abandon(self) -> None:
        """End the wait for another attempt."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _readable(self, span: RecordedSpan) -> ReadableSpan:
        trace_id = span.context.trace_id
        state = TraceState.from_header([span.context.state])
        parent_id = span.parent_id
        return ReadableSpan(
            name=span.name,
            context=_context(trace_id, span.context.span_id, state=state),
            parent=None if parent_id is None else _context(trace_id, parent_id, remote=span.remote),
            resource=self._resource,
            attributes=span.attributes,
            links=[Link(_context(*link)) for link in span.links],
            kind=_KINDS[span.kind],
            status=Status(StatusCode.UNSET if span.error is None else StatusCode.ERROR),
            start_time=_nanoseconds(span.began),
            end_time=_nanoseconds(span.ended),
            instrumentation_scope=self._scope,
        )


class _Resource(Resource):
    """Hashed by identity: the exporter groups spans by their resource, and else makes JSON of it for each."""

    __hash__ = object.__hash__


class _Session(requests.Session):
    """Remembers what came of the last request: the exporter only says whether the spans were taken.

    `rejected` is how many of them the collector did not want, though it took the rest.
    """

    outcome = "no answer"
    rejected = 0

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """As in the base class, but that a redirect is an error, which the exporter takes for success."""
        self.rejected = 0
        try:
            response = super().request(*args, **kwargs)
        except Exception as error:
            self.outcome = _root(error)
            raise
        self.outcome = f"the collector answered {response.status_code} {response.reason}"
        if response.is_redirect:
            raise requests.TooManyRedirects(self.outcome)
        if response.ok:
            self._read(response.content)
        return response

    def _read(self, body: bytes) -> None:
        try:
            partial = ExportTraceServiceResponse.FromString(body).partial_success
        except Exception:  # the spans were taken, whatever else it says
            return
        self.rejected = partial.rejected_spans
        self.outcome = f"the collector rejected them: {partial.error_message[:200]!r}"


def _root(error: BaseException) -> str:
    """What is at the bottom of an error of `requests`, whose own text is of several layers and has the address."""
    while error.__context__ is not None:
        error = error.__context__
    return f"the collector can't be reached: {error}"


def _context(trace_id: str, span_id: str, *, remote: bool = False, state: TraceState | None = None) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), remote, TraceFlags(TraceFlags.SAMPLED), state)


def _nanoseconds(seconds: float | None) -> int:
    return round((seconds or 0.0) * 1e9)
