"""The settings: each declared once with its type, default, bounds and meaning. `environment` reads them.

A setting's environment variable is its field name in upper case. Times are in seconds, sizes in bytes; OpenTelemetry's
own times are in milliseconds, as everywhere.
"""

from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta, Struct

Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(ge=0.01, le=86400)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Text = Annotated[str, Meta(min_length=1)]
LogLevel = Literal["DEBUG", "INFO", "WARN", "WARNING", "ERROR", "CRITICAL"]


def _help(text: str) -> Meta:
    return Meta(description=text)


def _secret(text: str) -> Meta:
    return Meta(description=text, extra={"secret": True})


class Settings(Struct, frozen=True, kw_only=True):
    """Every setting in force, validated. The defaults are those of a service on this machine for this machine."""

    bind_host: Annotated[str, _help("address to listen on; empty: all, IPv4 and IPv6")] = ""
    tls_port: Annotated[Port, _help("port of the HTTPS endpoint; 0 lets the kernel pick one")] = 8443
    http_port: Annotated[Port | None, _help("port of a plain HTTP endpoint for use behind a proxy; unset: none")] = None
    tls_cert_file: Annotated[Text, _help("certificate chain of the HTTPS endpoint, PEM")] = "ops/certs/server.crt"
    tls_key_file: Annotated[Text, _help("private key of the certificate, PEM")] = "ops/certs/server.key"
    tls_profile: Annotated[
        Literal["intermediate", "modern"],
        _help("profile of Mozilla's that TLS follows; modern: TLS 1.3 alone"),
    ] = "intermediate"
    hsts_seconds: Annotated[
        int, Meta(ge=0, le=63_072_000), _help("max-age of Strict-Transport-Security on HTTPS answers; 0: not sent")
    ] = 0
    workers: Annotated[
        Annotated[
            str,
            Meta(
                pattern=r"^(?i:auto)$|^([1-9]|[1-5][0-9]|6[0-4])$",
                extra={"allowed": "a whole number from 1 to 64, or auto"},
            ),
        ],
        _help("processes that serve callers, for several cores; auto: as many as there are cores"),
    ] = "1"
    max_connections: Annotated[Count, _help("open connections from callers, the exporter's not counted")] = 10_000
    max_connections_per_client: Annotated[
        Count, _help("open connections from one IP address (IPv6: its /64); of no effect with TRUST_PROXY_COUNT")
    ] = 1000
    memory_limit_mb: Annotated[
        Annotated[int, Meta(ge=0, le=16_777_216)] | None,
        _help("memory in MiB close to which less is taken on; 0: no limit; unset: the control group's, if it has one"),
    ] = None
    header_timeout_seconds: Annotated[Seconds, _help("time for a whole request head")] = 10.0
    body_timeout_seconds: Annotated[
        Seconds, _help("time for a whole request body, and a second more for each 4 KiB of it")
    ] = 30.0
    keepalive_timeout_seconds: Annotated[
        Seconds,
        _help(
            "time that an idle connection is kept, and for taking what is left of an answer once all is sent; "
            "a low value cuts slow readers"
        ),
    ] = 75.0
    max_body_bytes: Annotated[
        int, Meta(ge=1024, le=67_108_864), _help("size of the body of one event; larger ones get 413")
    ] = 1_048_576

    ai_ticket_auth: Annotated[bool, _help("off lets anyone in who reaches the port")] = True
    ai_ticket_auth_token: Annotated[str | None, _secret("accepted tokens, separated by commas")] = None
    ai_ticket_auth_token_file: Annotated[
        Text | None, _help("file of accepted tokens, one a line: `token`, `name token` or `name sha256:<hex>`")
    ] = None
    ai_ticket_auth_token_reload_interval: Annotated[
        Seconds, _help("time between looks at whether the token file has changed")
    ] = 30.0

    cors_allow_origins: Annotated[
        Text | None,
        _help("origins whose web pages may call, as `https://host` or `https://host:port`, separated by commas"),
    ] = None

    trust_proxy_count: Annotated[
        Annotated[int, Meta(ge=0, le=16)],
        _help("proxies in front whose X-Forwarded-For entries are believed; 0: the header is ignored"),
    ] = 0
    rate_limit_requests: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)], _help("events of a client within the window; 0: no limit")
    ] = 120
    rate_limit_window_seconds: Annotated[Seconds, _help("length of the sliding window")] = 60.0
    rate_limit_by: Annotated[
        Literal["ip", "token"], _help("whether a client is an IP address (IPv6: its /64) or a token")
    ] = "ip"
    rate_limit_max_clients: Annotated[
        Annotated[int, Meta(ge=1, le=10_000_000)],
        _help("clients that are counted each for itself; newcomers beyond share one quota"),
    ] = 100_000
    rate_limit_backend: Annotated[
        Literal["memory", "redis"], _help("where calls are counted; redis shares the count among several services")
    ] = "memory"
    redis_url: Annotated[
        str | None, _secret("`redis://[user:password@]host[:port][/database]`, rediss:// for TLS, unix:///path")
    ] = None

    koboldcpp_api_url: Annotated[
        Text,
        _help(
            "addresses of the KoboldCPP-compatible servers, `,` before a standby and a vertical bar between equals; "
            "`local:` for the bundled one, `local:/path/model.gguf`"
        ),
    ] = "http://localhost:5001/api"
    koboldcpp_password: Annotated[
        str | None, _secret("key that the model servers ask for: one for all, or one for each, separated by commas")
    ] = None
    koboldcpp_slots: Annotated[
        Text | None,
        _help(
            "generations at a time: one number for all servers, or one for each, separated by commas; "
            "unset: 1 for KoboldCPP, what the server says for llama.cpp"
        ),
    ] = None
    koboldcpp_max_attempts: Annotated[
        Annotated[int, Meta(ge=1, le=10)], _help("attempts at an event, on whichever servers; 1: no retries")
    ] = 3
    koboldcpp_ca_file: Annotated[Text | None, _help("certificates to trust for an https model server, PEM")] = None
    koboldcpp_connect_timeout_seconds: Annotated[Seconds, _help("time for connecting to the model server")] = 5.0
    koboldcpp_first_token_timeout_seconds: Annotated[
        Seconds | None, _help("time until the first token; unset: what is left of the event's deadline")
    ] = None
    koboldcpp_idle_timeout_seconds: Annotated[
        Seconds,
        _help(
            "longest silence between two tokens, and for which a caller takes nothing of an answer not yet all sent; "
            "a low value cuts readers that pause"
        ),
    ] = 30.0

    max_concurrency: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None,
        _help("events under way at a time, at the most; unset: the larger of 8 and all slots"),
    ] = None
    queue_limit: Annotated[
        int, Meta(ge=0, le=1_000_000), _help("events that may wait for a slot, those of batches not counted")
    ] = 256
    batch_size: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)], _help("events that are taken from the queue together, at the most")
    ] = 16
    batch_linger_seconds: Annotated[
        Annotated[float, Meta(ge=0, le=60)], _help("how long to wait for more events to take together")
    ] = 0.0
    max_batch_events: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)], _help("events in a JSON array to POST /events")
    ] = 1000
    max_batch_body_bytes: Annotated[
        Annotated[int, Meta(ge=1024, le=268_435_456)], _help("size of a JSON array to POST /events")
    ] = 4_194_304
    request_timeout_seconds: Annotated[Seconds, _help("an event's deadline, from its arrival, waiting included")] = 120
    default_max_tokens: Annotated[Count, _help("max_tokens of an event that names none")] = 512
    max_tokens_limit: Annotated[Count, _help("largest max_tokens that an event may ask for")] = 4096
    shutdown_delay_seconds: Annotated[
        Annotated[float, Meta(ge=0, le=3600)],
        _help("time that a service which is stopped serves on for those who have not heard yet"),
    ] = 0.0
    shutdown_grace_seconds: Annotated[Seconds, _help("time for what is in flight when the service is stopped")] = 120.0

    log_level: Annotated[LogLevel, _help("least severe level that is logged")] = "INFO"
    log_format: Annotated[Literal["json", "text"], _help("json: an object a line; text: for reading on a terminal")] = (
        "json"
    )
    log_payloads: Annotated[
        Annotated[
            str,
            Meta(
                pattern=r"^(?i:off|sample:[1-9][0-9]{0,3})$",
                extra={"allowed": "off, or sample:N with N from 1 to 9999 payloads a minute"},
            ),
        ],
        _help("`sample:N` logs up to N payloads a minute at DEBUG, shortened and without credentials; off: none"),
    ] = "off"
    metrics_namespace: Annotated[
        str, Meta(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$"), _help("prefix of the names of all metrics")
    ] = "ai_ticket"
    metrics_on_tls: Annotated[bool, _help("off leaves /metrics to the exporter alone")] = True
    otel_prometheus_host: Annotated[Text, _help("address of the metrics exporter")] = "0.0.0.0"
    otel_prometheus_port: Annotated[Port, _help("port of the metrics exporter, plain HTTP")] = 9464

    otel_sdk_disabled: Annotated[bool, _help("on switches traces off, as OTEL_TRACES_EXPORTER=none does")] = False
    otel_service_name: Annotated[Text, _help("the service's name in its traces")] = "ai-ticket"
    otel_resource_attributes: Annotated[
        Text | None, _help("more that its traces say of the service: `name=value`, separated by commas")
    ] = None
    otel_traces_exporter: Annotated[
        Literal["otlp", "console", "none"] | None,
        _help(
            "where traces go: to a collector, as lines of JSON to standard error, nowhere; "
            "unset: otlp where one of the two endpoints is set, else console"
        ),
    ] = None
    otel_traces_sampler: Annotated[
        Literal[
            "always_on",
            "always_off",
            "traceidratio",
            "parentbased_always_on",
            "parentbased_always_off",
            "parentbased_traceidratio",
        ],
        _help("which requests are traced; parentbased: as the caller says, where it says anything"),
    ] = "parentbased_always_on"
    otel_traces_sampler_arg: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None, _help("share of requests that traceidratio traces; unset: 1, all")
    ] = None
    otel_exporter_otlp_endpoint: Annotated[
        Text | None, _help("the collector, OTLP over HTTP; traces go to /v1/traces under it")
    ] = None
    otel_exporter_otlp_traces_endpoint: Annotated[
        Text | None, _help("the whole URL that traces go to, where it is another")
    ] = None
    otel_exporter_otlp_protocol: Annotated[Literal["http/protobuf"], _help("how traces are sent; there is one way")] = (
        "http/protobuf"
    )
    otel_exporter_otlp_headers: Annotated[
        str | None, _secret("headers for the collector: `name=value`, separated by commas, values percent-encoded")
    ] = None
    otel_exporter_otlp_timeout: Annotated[
        Annotated[int, Meta(ge=100, le=3_600_000)], _help("milliseconds for sending a batch, with all attempts at it")
    ] = 10_000
    otel_exporter_otlp_compression: Annotated[
        Literal["none", "gzip", "deflate"], _help("how what is sent to the collector is compressed")
    ] = "none"
    otel_exporter_otlp_certificate: Annotated[
        Text | None, _help("certificates to trust for an https collector, PEM")
    ] = None
    otel_exporter_otlp_client_certificate: Annotated[Text | None, _help("certificate to show the collector, PEM")] = (
        None
    )
    otel_exporter_otlp_client_key: Annotated[Text | None, _help("private key of that certificate, PEM")] = None
    otel_bsp_schedule_delay: Annotated[
        Annotated[int, Meta(ge=1, le=3_600_000)], _help("milliseconds that a span waits for others to be sent with")
    ] = 5000
    otel_bsp_max_queue_size: Annotated[Count, _help("spans that may wait; what ends while they do is dropped")] = 2048
    otel_bsp_max_export_batch_size: Annotated[Count, _help("spans that are sent together, at the most")] = 512
    otel_attribute_count_limit: Annotated[Count, _help("attributes of a span; further ones are left out")] = 128
    otel_attribute_value_length_limit: Annotated[
        Count, _help("characters of an attribute's value; longer ones are cut")
    ] = 4096
    otel_span_link_count_limit: Annotated[Count, _help("links of a span to others; further ones are left out")] = 128


MORE_SPECIFIC = {
    "OTEL_EXPORTER_OTLP_PROTOCOL": "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_HEADERS": "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_EXPORTER_OTLP_COMPRESSION": "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION",
    "OTEL_EXPORTER_OTLP_CERTIFICATE": "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CLIENT_KEY": "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY",
    "OTEL_ATTRIBUTE_COUNT_LIMIT": "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
}
"""OpenTelemetry's other names for some settings, which are for traces alone, and win where both are set."""


class Variable(Struct, frozen=True):
    """How one setting is written in the environment."""

    name: str
    field: str
    type: Any
    default: Any
    help: str
    secret: bool
    allowed: str


@cache
def variables() -> dict[str, Variable]:
    """The settings by the name of their environment variable, in the order of their declaration."""
    hints = get_type_hints(Settings, include_extras=True)
    declared = (_variable(field, hints[field], getattr(DEFAULTS, field)) for field in Settings.__struct_fields__)
    return {variable.name: variable for variable in declared}


def _variable(field: str, hint: Any, default: Any) -> Variable:
    metas = _metas(hint)
    extra: dict[str, Any] = {}
    for meta in metas:
        extra |= meta.extra or {}
    return Variable(
        name=field.upper(),
        field=field,
        type=hint,
        default=default,
        help=next(meta.description for meta in metas if meta.description),
        secret=extra.get("secret", False),
        allowed=extra.get("allowed") or _allowed(hint, metas),
    )


def _metas(hint: Any) -> list[Meta]:
    """All annotations of a type, those inside an optional included."""
    if get_origin(hint) is Annotated:
        return [meta for meta in hint.__metadata__ if isinstance(meta, Meta)] + _metas(hint.__origin__)
    if get_origin(hint) in (Union, UnionType):
        return [meta for part in get_args(hint) for meta in _metas(part)]
    return []


def bare_type(hint: Any) -> Any:
    """The plain type beneath annotations and `None`: int, float, bool, str or a Literal."""
    if get_origin(hint) is Annotated:
        return bare_type(hint.__origin__)
    if get_origin(hint) in (Union, UnionType):
        return bare_type(next(part for part in get_args(hint) if part is not type(None)))
    return hint


def _allowed(hint: Any, metas: list[Meta]) -> str:
    plain = bare_type(hint)
    if plain is bool:
        return "on or off"
    if get_origin(plain) is Literal:
        return "one of " + ", ".join(get_args(plain))
    if plain is str:
        pattern = next((meta.pattern for meta in metas if meta.pattern), None)
        return f"text that matches {pattern}" if pattern else "text"
    low = next((meta.ge for meta in metas if meta.ge is not None), None)
    high = next((meta.le for meta in metas if meta.le is not None), None)
    return f"a {'whole ' if plain is int else ''}number from {low} to {high}"


DEFAULTS = Settings()
