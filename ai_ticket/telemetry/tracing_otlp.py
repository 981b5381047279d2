"""Spans for an OpenTelemetry collector: OTLP over HTTP, in protobuf.

https://opentelemetry.io/docs/specs/otlp/
"""

import gzip
import logging
import ssl
import zlib
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from time import monotonic
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from msgspec import Struct
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import SpanFlags, Status

from ai_ticket import __version__
from ai_ticket.telemetry.tracing import Attribute, RecordedSpan
from ai_ticket.telemetry.tracing_export import ExportError, giving_way

_PASSING = (429, 502, 503, 504)
"""Statuses after which another attempt may succeed."""

_FIRST_PAUSE = 1.0
_SHORTEST = 0.01
_KINDS = {
    "internal": ProtoSpan.SPAN_KIND_INTERNAL,
    "server": ProtoSpan.SPAN_KIND_SERVER,
    "client": ProtoSpan.SPAN_KIND_CLIENT,
}
_COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
_LONGEST_MESSAGE = 200


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

    def __init__(self, collector: Collector, resource: Mapping[str, str], random: Callable[[], float]):
        """@param random: a number from 0 to 1, for the jitter."""
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # what goes wrong, `SpanExport` says
        self._url = collector.url
        self._timeout = collector.timeout
        self._random = random
        self._resource = Resource()
        for name, value in resource.items():
            _put(self._resource.attributes.add(), name, value)
        self._scope = InstrumentationScope(name="ai_ticket", version=__version__)
        self._compress = _COMPRESS.get(collector.compression, bytes)
        self._headers = {"Content-Type": "application/x-protobuf", "User-Agent": f"ai-ticket/{__version__}"}
        if collector.compression != "none":
            self._headers["Content-Encoding"] = collector.compression
        self._headers |= collector.headers
        self._http = _http(collector)
        self._hurried = Event()

    def export(self, spans: Sequence[RecordedSpan]) -> None:
        """Post them, in one request.

        @raise ExportError: the collector can't be reached, or did not take all of them.
        """
        body = self._compress(self._encode(spans))
        end = monotonic() + self._timeout
        pause = _FIRST_PAUSE
        while True:
            asked_pause = None
            left = max(end - monotonic(), _SHORTEST)
            try:
                response = self._http.request(
                    "POST", self._url, body=body, headers=self._headers, timeout=left, redirect=False
                )
            except urllib3.exceptions.HTTPError as error:
                reason = f"the collector can't be reached: {_root(error)}"
            else:
                if 200 <= response.status < 300:
                    return _check_all_taken(response.data)
                reason = f"the collector answered {response.status} {response.reason}"
                if response.status not in _PASSING:
                    raise ExportError(reason)
                asked = response.headers.get("Retry-After", "")
                asked_pause = int(asked) if asked.isdecimal() else None
            wait = pause * (0.8 + 0.4 * self._random()) if asked_pause is None else asked_pause
            pause *= 2
            if monotonic() + wait >= end or self._hurried.wait(wait):
                raise ExportError(reason)

    def hurry(self) -> None:
        """Try no batch a second time."""
        self._hurried.set()

    def _encode(self, spans: Sequence[RecordedSpan]) -> bytes:
        request = ExportTraceServiceRequest()
        of_resource = request.resource_spans.add(resource=self._resource)
        encoded = of_resource.scope_spans.add(scope=self._scope).spans
        for span in giving_way(spans):
            _fill(encoded.add(), span)
        encoded_request: bytes = request.SerializeToString()
        return encoded_request


def _http(collector: Collector) -> urllib3.PoolManager:
    """A client that keeps its connection, and uses the environment's proxy where there is one for the collector."""
    tls = ssl.create_default_context(cafile=collector.ca_file)
    if collector.client_certificate_file is not None:
        tls.load_cert_chain(collector.client_certificate_file, collector.client_key_file)
    url = urlsplit(collector.url)
    proxy = getproxies().get(url.scheme)
    if proxy is None or proxy_bypass(url.netloc):
        return urllib3.PoolManager(ssl_context=tls, retries=False)
    return urllib3.ProxyManager(proxy, ssl_context=tls, retries=False)


def _fill(encoded: ProtoSpan, span: RecordedSpan) -> None:
    encoded.trace_id = bytes.fromhex(span.context.trace_id)
    encoded.span_id = bytes.fromhex(span.context.span_id)
    encoded.trace_state = span.context.state
    encoded.flags = span.context.flags | SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
    if span.parent_id is not None:
        encoded.parent_span_id = bytes.fromhex(span.parent_id)
    if span.remote:
        encoded.flags |= SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
    encoded.name = span.name
    encoded.kind = _KINDS[span.kind]
    encoded.start_time_unix_nano = _nanoseconds(span.began)
    encoded.end_time_unix_nano = _nanoseconds(span.ended)
    for name, value in span.attributes.items():
        _put(encoded.attributes.add(), name, value)
    for trace_id, span_id in span.links:
        encoded.links.add(trace_id=bytes.fromhex(trace_id), span_id=bytes.fromhex(span_id))
    if span.error is not None:
        encoded.status.code = Status.STATUS_CODE_ERROR


def _put(pair: KeyValue, name: str, value: Attribute) -> None:
    """Fill in an attribute in its place: to make it elsewhere and copy it takes twice as long."""
    pair.key = name
    encoded = pair.value
    if isinstance(value, str):
        encoded.string_value = value
    elif isinstance(value, bool):
        encoded.bool_value = value
    elif isinstance(value, int):
        encoded.int_value = value
    elif isinstance(value, float):
        encoded.double_value = value
    else:
        encoded.array_value.SetInParent()
        for item in value:
            encoded.array_value.values.add().string_value = item


def _nanoseconds(seconds: float | None) -> int:
    return round((seconds or 0.0) * 1e9)


def _check_all_taken(body: bytes) -> None:
    try:
        partial = ExportTraceServiceResponse.FromString(body).partial_success
    except Exception:  # it is no such message; the spans were taken, whatever else it says
        return
    if partial.rejected_spans:
        reason = f"the collector rejected them: {partial.error_message[:_LONGEST_MESSAGE]!r}"
        raise ExportError(reason, partial.rejected_spans)


def _root(error: BaseException) -> BaseException:
    """What is at the bottom of an error of urllib3, whose own text is of several layers."""
    while error.__context__ is not None:
        error = error.__context__
    return error
