"""Web pages of other origins: who may call, what their browsers are told, and origins that can't be."""

import pytest
from surface import Surface
from test_openai import ask

from ai_ticket.interfaces import Admission
from ai_ticket.web.cors import parse_origins

PAGE = "https://page.test"
ALLOW = "access-control-allow-origin"
EVENT = {"content": "hello"}


def preflight(surface: Surface, path: str, origin: str = PAGE, *, http2: bool = False) -> tuple[int, dict[str, str]]:
    status, headers, _ = ask(
        surface,
        "OPTIONS",
        path,
        http2=http2,
        authorization="",
        origin=origin,
        **{"access-control-request-method": "POST", "access-control-request-headers": "authorization"},
    )
    return status, headers


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/event", "POST"),
        ("/events", "POST"),
        ("/v1/chat/completions", "POST"),
        ("/v1/models", "GET, HEAD"),
        ("/v1/models/m", "GET, HEAD"),
        ("/api/v1/generate", "POST"),
        ("/api/extra/generate/check", "GET, HEAD, POST"),
    ],
)
def test_a_browser_that_asks_first_needs_no_token(surface: Surface, path: str, methods: str, http2: bool) -> None:
    status, headers = preflight(surface, path, http2=http2)
    assert (status, headers[ALLOW], headers["access-control-allow-methods"]) == (204, PAGE, methods)
    assert {"authorization", "content-type", "x-api-key", "*"} <= set(
        headers["access-control-allow-headers"].split(", ")
    )
    assert headers["access-control-max-age"] == "7200"
    assert headers["vary"] == "Origin"
    assert not {"content-length", "content-type", "access-control-allow-credentials"} & headers.keys()


def test_its_request_then(surface: Surface) -> None:
    status, headers, _ = ask(surface, "POST", "/event", EVENT, origin=PAGE)
    assert (status, headers[ALLOW], headers["vary"]) == (200, PAGE, "Origin")
    readable = set(headers["access-control-expose-headers"].split(", "))
    assert {"x-request-id", "retry-after", "ratelimit", "ratelimit-policy"} <= readable
    assert "access-control-allow-credentials" not in headers


def test_errors_can_be_read_as_well(surface: Surface) -> None:
    """Without the headers a browser would tell the page no more than that something failed."""
    surface.limiter.admissions = [Admission(False, 0, 30.0)]
    answers = [
        ask(surface, "POST", "/event", EVENT, origin=PAGE),
        ask(surface, "POST", "/v1/completions", {}, origin=PAGE, authorization="Bearer wrong"),
        ask(surface, "GET", "/api/v1/nothing", origin=PAGE),
        ask(surface, "DELETE", "/api/v1/model", origin=PAGE),
    ]
    assert [status for status, _, _ in answers] == [429, 401, 404, 405]
    assert {headers[ALLOW] for _, headers, _ in answers} == {PAGE}


def test_streams(surface: Surface) -> None:
    body = b'{"content": "hello", "stream": true}'
    head = b"POST /event HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
    head += b"Origin: https://page.test\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection, transport = surface.connect()
    connection.dataReceived(head + body)
    answer = transport.value()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\ncontent-type: text/event-stream\r\n" in answer
    assert b"\r\naccess-control-allow-origin: https://page.test\r\n" in answer


@pytest.mark.parametrize("origin", ["https://other.test", "https://page.test:444", "https://page.test/", "null", ""])
def test_others_are_told_nothing(surface: Surface, origin: str) -> None:
    status, headers = preflight(surface, "/event", origin)
    assert (status, headers["allow"]) == (405, "POST")
    found = [headers, ask(surface, "POST", "/event", EVENT, origin=origin)[1]]
    for headers in found:
        assert not [name for name in headers if name.startswith("access-control-")]
        assert headers["vary"] == "Origin"


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_what_is_not_for_pages(surface: Surface, path: str) -> None:
    asked = f"GET {path} HTTP/1.1\r\nHost: x\r\nOrigin: {PAGE}\r\n\r\n"
    [(status, headers, _)] = surface.http1(asked.encode())
    assert status == 200
    assert not {"vary", ALLOW} & headers.keys()
    assert preflight(surface, path)[0] == 405


def test_options_that_asks_for_nothing(surface: Surface) -> None:
    status, headers, _ = ask(surface, "OPTIONS", "/event", origin=PAGE)
    assert (status, headers["allow"]) == (405, "POST")


def test_origins() -> None:
    text = "https://a.test, http://b.test:8080,http://localhost:3000 , https://[2001:db8::1]:444, tauri://localhost,"
    assert parse_origins(text) == [
        "https://a.test",
        "http://b.test:8080",
        "http://localhost:3000",
        "https://[2001:db8::1]:444",
        "tauri://localhost",
    ]


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "a.test",
        "https://",
        "https://a.test/",
        "https://a.test/path",
        "https://a.test?x",
        "https://user@a.test",
        "https://A.test",
        "HTTPS://a.test",
        "https://*.a.test",
        "https://a.test:443",
        "http://a.test:80",
        "https://a.test:x",
        "https://a.test:99999",
        "https://a b.test",
        "https://ä.test",
        "https://a.test\r\nx: y",
    ],
)
def test_what_is_no_origin(origin: str) -> None:
    """A browser would never send it, so that nobody could call; or it would let anybody in."""
    with pytest.raises(ValueError, match=r"scheme://host|not allowed|leave out"):
        parse_origins(f"https://good.test,{origin}")
