"""Which web pages may call from a browser, by their origin (the Fetch standard's CORS protocol).

Callers show a token, never a cookie, so credentials of the browser's own are not allowed for.
"""

import re
from urllib.parse import urlsplit

from ai_ticket.web.request import HeaderList, Request, Response

SCOPE = ("/event", "/v1/", "/api/", "/openapi.json")
"""How the paths begin that pages may call."""

REMEMBERED_SECONDS = 7200
"""How long a browser may take a preflight's answer for granted: the most that any does."""

_HOST = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")
_DEFAULT_PORTS = {"http": 80, "https": 443}

_READABLE = (
    "x-request-id, retry-after, ratelimit, ratelimit-policy, server-timing, www-authenticate, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-should-retry"
)
_SENDABLE = "authorization, content-type, accept, x-api-key, x-request-id, traceparent, tracestate, *"
"""A browser takes the asterisk for any header but Authorization; one that does not know it takes the others."""


def parse_origins(text: str) -> list[str]:
    """Origins as browsers write them, separated by commas.

    @raise ValueError: one of them is none.
    """
    origins = [origin.strip() for origin in text.split(",") if origin.strip()]
    for origin in origins:
        _check(origin)
    return origins


def _check(origin: str) -> None:
    if origin == "*":
        raise ValueError("* is not allowed: name each origin")
    wanted = ValueError(f"{origin} must be scheme://host or scheme://host:port, in lower case, without a path")
    try:
        found = urlsplit(origin)
        host, port = found.hostname or "", found.port
    except ValueError:
        raise wanted
    if ":" in host:
        host = f"[{host}]"
    if not found.scheme or not _HOST.fullmatch(host):
        raise wanted
    if origin != f"{found.scheme}://{host}" + ("" if port is None else f":{port}"):
        raise wanted
    if port is not None and port == _DEFAULT_PORTS.get(found.scheme):
        raise ValueError(f"{origin}: browsers leave out the port of {found.scheme}")


class Cors:
    """Says it in the headers of every answer in scope, also of those that tell of errors."""

    def __init__(self, origins: list[str]):
        """@param origins: those whose pages may call."""
        self._origins = {origin.encode() for origin in origins}

    def headers(self, request: Request) -> HeaderList:
        """What the answer has beside its own headers, whatever it is."""
        if not self._origins or not request.path.startswith(SCOPE):
            return []
        headers = [(b"vary", b"Origin")]
        if self._allows(request):
            headers += [
                (b"access-control-allow-origin", request.headers[b"origin"]),
                (b"access-control-expose-headers", _READABLE.encode()),
            ]
        return headers

    def preflight(self, request: Request, methods: list[str]) -> Response | None:
        """The answer to a browser that asks before it sends the request itself; None where it is not that.

        @param methods: those that the path takes.
        """
        asked = request.method == "OPTIONS" and b"access-control-request-method" in request.headers
        if not asked or not request.path.startswith(SCOPE) or not self._allows(request):
            return None
        headers = (
            (b"access-control-allow-methods", ", ".join(methods).encode()),
            (b"access-control-allow-headers", _SENDABLE.encode()),
            (b"access-control-max-age", b"%d" % REMEMBERED_SECONDS),
        )
        return Response(204, b"", headers=headers)

    def _allows(self, request: Request) -> bool:
        return request.headers.get(b"origin") in self._origins
