"""What a well-formed head is."""

from ai_ticket.web.heads import REQUEST_LINE, Http2Head, are_trailers, http2_head, is_sound

REQUEST = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"x"), (b":path", b"/y?z")]


def sound(target: bytes = b"/", method: str = "GET", version: str = "1.1", **headers: bytes) -> bool:
    fields = {b"host": b"x"} | {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return is_sound(method, target, version, {name: value for name, value in fields.items() if value != b"(none)"})


def test_hosts() -> None:
    for host in (
        b"x",
        b"",
        b"a.b",
        b"a:80",
        b"a:",
        b"127.0.0.1:8443",
        b"[::1]",
        b"[::1]:80",
        b"a_b",
        b"%41",
        b"a%2Db%2d",
        b"A",
        b"[::ffff:1.2.3.4]",
    ):
        assert sound(host=host), host


def test_malformed_hosts() -> None:
    """The last is how two of them come, which were not told apart from one."""
    for host in (b"a b", b"a/b", b"u@a", b"a:8x", b"a:8:8", b"[::1", b"::1", b"\xc3\xa9", b"a?b", b"a#b", b"a, a"):
        assert not sound(host=host), host
        assert not sound(host=host, version="1.0"), host


def test_hosts_with_an_address_or_an_escape_that_is_none() -> None:
    for host in (b"[::::]", b"[1.2.3.4]", b"[:]", b"[1:2:3:4:5:6:7:8:9]", b"x%zz", b"x%4", b"%", b"a%%41"):
        assert not sound(host=host), host
        assert http2_head([*REQUEST[:2], (b":authority", host), REQUEST[3]]) is None, host


def test_request_lines() -> None:
    for line, expected in (
        (b"GET / HTTP/1.1\r\n", True),
        (b"\r\nGET / HTTP/1.1\r\nHost: x", True),
        (b"GET / RTSP/1.1\r\n", False),
        (b"GET / ICE/1.0\r\n", False),
        (b"GET  / HTTP/1.1\r\n", False),
        (b"GET /  HTTP/1.1\r\n", False),
        (b"GET / HTTP/1.1 \r\n", False),
        (b"GET / HTTP/1.1\n", False),
        (b"\nGET / HTTP/1.1\r\n", False),
        (b"\rGET / HTTP/1.1\r\n", False),
        (b"\r\n\r\nGET / HTTP/1.1\r\n", False),
        (b"GET /\r\nX: y HTTP/1.1\r\n", False),
    ):
        assert (REQUEST_LINE.match(line) is not None) is expected, line


def test_only_http10_may_lack_the_host() -> None:
    assert sound(host=b"(none)", version="1.0")
    assert not sound(host=b"(none)")


def test_other_versions() -> None:
    for version in ("0.9", "2.0", "1.2"):
        assert not sound(version=version)


def test_transfer_codings() -> None:
    for coding, version, expected in (
        (b"chunked", "1.1", True),
        (b"Chunked", "1.1", True),
        (b"chunked", "1.0", False),
        (b"gzip, chunked", "1.1", False),
        (b"chunked, chunked", "1.1", False),
        (b"identity", "1.1", False),
        (b"identity, chunked", "1.1", False),
        (b", chunked", "1.1", False),
        (b"", "1.1", False),
    ):
        assert sound(transfer_encoding=coding, version=version) is expected, (coding, version)


def test_targets() -> None:
    for method, target, expected in (
        ("GET", b"/", True),
        ("GET", b"/a?b=c&d[]=%20{}", True),
        ("GET", b"/a#b", False),
        ("GET", b"/a b", False),
        ("GET", b"/\xc3\xa9", False),
        ("GET", b"a", False),
        ("GET", b"", False),
        ("OPTIONS", b"*", True),
        ("GET", b"*", False),
        ("GET", b"x:80", False),
        ("CONNECT", b"x:80", True),
        ("CONNECT", b"x", False),
        ("CONNECT", b"/", False),
        ("GET", b"http://x/y", True),
        ("GET", b"HTTPS://X", True),
        ("GET", b"http://x?y", True),
        ("GET", b"http://y/", False),
        ("GET", b"http://u@x/", False),
        ("GET", b"http:///y", False),
        ("GET", b"http:/x", False),
        ("GET", b"http://:80/y", False),
        ("GET", b"ftp://x/", False),
        ("GET", b"http://x/#y", False),
    ):
        assert sound(target, method) is expected, (method, target)


def test_lengths_that_are_not_numbers_or_too_large_for_one() -> None:
    for length in (b"", b"+5", b"-5", b"5, 5", b"0x5", b"5.0", b"5 5", b"1" * 21, b"\xb2"):
        assert not sound(content_length=length)
        assert http2_head([*REQUEST, (b"content-length", length)]) is None


def test_a_head_of_http2() -> None:
    head = http2_head([*REQUEST, (b"a", b"1"), (b"b", b""), (b"a", b"2"), (b"te", b"trailers"), (b"host", b"x")])
    assert head == Http2Head("GET", b"/y?z", {b"a": b"1, 2", b"b": b"", b"te": b"trailers", b"host": b"x"}, 350, 9)
    assert head.refusal is None


def test_methods_that_http1_does_not_know_are_refused_on_http2_too() -> None:
    for method, refusal in (("FOO", 400), ("TRACK", 400), ("get", 400), ("M-SEARCH", None), ("QUERY", None)):
        head = http2_head([(b":method", method.encode()), *REQUEST[1:]])
        assert head is not None
        assert head.refusal == refusal, method


def test_malformed_heads_of_http2() -> None:
    for fields in (
        REQUEST[1:],
        [*REQUEST[:1], *REQUEST[2:]],
        [*REQUEST[:2], REQUEST[3]],
        REQUEST[:3],
        [*REQUEST, REQUEST[0]],
        [(b"a", b"b"), *REQUEST],
        [*REQUEST[:3], (b":path", b"")],
        [*REQUEST[:3], (b":path", b"y")],
        [*REQUEST[:3], (b":path", b"*")],
        [*REQUEST[:3], (b":path", b"/a#b")],
        [*REQUEST[:3], (b":path", b"/a b")],
        [(b":method", b""), *REQUEST[1:]],
        [(b":method", b"G T"), *REQUEST[1:]],
        [(b":method", b"CONNECT"), *REQUEST[1:]],
        [*REQUEST, (b":status", b"200")],
        [*REQUEST, (b":protocol", b"websocket")],
        *([*REQUEST[:2], (b":authority", name), REQUEST[3]] for name in (b"u@x", b"", b":80")),
        [*REQUEST[:2], REQUEST[3], (b"host", b"")],
        *([REQUEST[0], (b":scheme", scheme), *REQUEST[2:]] for scheme in (b"", b"junk!", b"ftp", b"http ")),
        [*REQUEST, (b"host", b"y")],
        [*REQUEST, (b"host", b"x"), (b"host", b"x")],
        *([*REQUEST, (name, b"a")] for name in (b"A", b"", b"a b", b"a\0", b"a:", b"\xe9", b"a\r")),
        *([*REQUEST, (b"a", value)] for value in (b" b", b"b ", b"\tb", b"b\0", b"b\r", b"b\nc", b"\x7f")),
        *([*REQUEST, (name, b"a")] for name in (b"connection", b"keep-alive", b"proxy-connection", b"upgrade")),
        [*REQUEST, (b"transfer-encoding", b"chunked")],
        [*REQUEST, (b"te", b"gzip")],
        [*REQUEST, (b"content-length", b"5"), (b"content-length", b"5")],
    ):
        assert http2_head(fields) is None, fields


def test_the_other_forms_of_a_target_on_http2() -> None:
    assert http2_head([(b":method", b"OPTIONS"), *REQUEST[1:3], (b":path", b"*")]) is not None
    assert http2_head([(b":method", b"CONNECT"), (b":authority", b"x:1")]) is not None


def test_too_large_a_head_of_http2() -> None:
    for more, refusal in (([(b"a", b"")] * 96, None), ([(b"a", b"")] * 97, 431), ([(b"a", b"x" * 16_300)], 431)):
        head = http2_head([*REQUEST, *more])
        assert head is not None
        assert head.refusal == refusal


def test_trailers() -> None:
    assert are_trailers([(b"a", b"b")])
    assert not are_trailers([(b":path", b"/")])
    assert not are_trailers([(b"a", b"b\r\n")])
