"""What the texts among OpenTelemetry's variables may say, taken apart."""

import re
from urllib.parse import unquote, urlsplit

DEFAULT_ENDPOINT = "http://localhost:4318"
TRACES_PATH = "/v1/traces"

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")


def parse_pairs(text: str) -> dict[str, str]:
    """Read `name=value,name=value`, the values percent-encoded.

    @raise ValueError: it is not of that form.
    """
    found: dict[str, str] = {}
    for pair in filter(None, map(str.strip, text.split(","))):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError("must be name=value pairs, separated by commas")
        found[unquote(name.strip())] = unquote(value.strip())
    return found


def parse_headers(text: str) -> dict[str, str]:
    """Read headers of that form.

    @raise ValueError: it is not, or has what a header can't.
    """
    found = parse_pairs(text)
    if not all(_TOKEN.fullmatch(name) and _HEADER_VALUE.fullmatch(value) for name, value in found.items()):
        raise ValueError("must be names and values of HTTP headers: name=value, separated by commas")
    return found


def parse_endpoint(text: str) -> str:
    """The URL of a collector.

    @raise ValueError: it is not one.
    """
    try:
        url = urlsplit(text)
        url.port  # noqa: B018 - raises where it is no number
    except ValueError:
        url = urlsplit("")
    if url.scheme not in ("http", "https") or not url.hostname or url.fragment or re.search(r"\s", text):
        raise ValueError("must be an http:// or https:// URL")
    if url.username is not None:
        raise ValueError("must not have a user or password in it: OTEL_EXPORTER_OTLP_HEADERS takes what authenticates")
    return text


def traces_url(endpoint: str | None, traces_endpoint: str | None) -> str:
    """Where traces are posted to."""
    return traces_endpoint or (endpoint or DEFAULT_ENDPOINT).rstrip("/") + TRACES_PATH
