"""What KOBOLDCPP_API_URL may say."""

import pytest

from ai_ticket.backend.address import Location, parse_api_url, parse_api_urls, parse_passwords, parse_slots


@pytest.mark.parametrize(
    ("text", "name", "url"),
    [
        ("http://localhost:5001/api", "localhost:5001", "http://localhost:5001"),
        ("http://localhost:5001", "localhost:5001", "http://localhost:5001"),
        ("http://localhost:5001/", "localhost:5001", "http://localhost:5001"),
        ("http://host:5001/v1", "host:5001", "http://host:5001"),
        ("https://host/api/v1/", "host:443", "https://host"),
        ("http://host/kobold/api", "host:80", "http://host/kobold"),
        ("http://[::1]:5001/api", "[::1]:5001", "http://[::1]:5001"),
        (" http://host/apiary ", "host:80", "http://host/apiary"),
        ("http://HOST:5001", "host:5001", "http://HOST:5001"),
    ],
)
def test_urls(text: str, name: str, url: str) -> None:
    address = parse_api_url(text)
    assert (address.name, address.url) == (name, url)


def test_local() -> None:
    assert parse_api_url("local:").name == "local"
    assert parse_api_url("local:").url is None
    assert parse_api_url("local:/models/x.gguf").model_path == "/models/x.gguf"


@pytest.mark.parametrize(
    "text",
    [
        "host:5001",
        "ftp://host",
        "http://",
        "http://user:pw@host",
        "http://host?x",
        "http://host#x",
        "http://host:port",
        "http://host:99999",
        "http://host:0",
        "http://kobold_cpp:5001",
        "http://a..b",
        "/api",
        "",
    ],
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_api_url(text)


def test_a_location_does_not_show_its_key() -> None:
    assert "sesame" not in repr(Location("http://host", "sesame"))


def names(text: str) -> list[list[str]]:
    return [[address.name for address in rank] for rank in parse_api_urls(text)]


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("http://a", [["a:80"]]),
        ("http://a,http://b", [["a:80"], ["b:80"]]),
        ("http://a|http://b", [["a:80", "b:80"]]),
        (" http://a:1/api | http://b:2/v1 , local: ", [["a:1", "b:2"], ["local"]]),
        ("local:/models/x.gguf,http://[::1]:5001|https://b", [["local"], ["[::1]:5001", "b:443"]]),
    ],
)
def test_ranks_and_equals(text: str, ranks: list[list[str]]) -> None:
    assert names(text) == ranks


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("http://a,http://a", "a:80 is named twice"),
        ("http://a|http://A/api", "a:80 is named twice"),
        ("local:,local:/x.gguf", "local is named twice"),
        ("http://a,", "is missing"),
        ("|http://a", "is missing"),
        ("http://a,,http://b", "is missing"),
        ("http://a,b:5001", "'b:5001' must be an http:// or https:// URL"),
    ],
)
def test_lists_that_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_api_urls(text)


def test_passwords() -> None:
    assert parse_passwords(None, 2) == [None, None]
    assert parse_passwords("x", 2) == ["x", "x"]
    assert parse_passwords("x, y", 2) == ["x", "y"]
    assert parse_passwords("x,", 2) == ["x", None]
    assert parse_passwords("x,y", 1) == ["x,y"], "a single server's may have commas"
    with pytest.raises(ValueError, match="has 2 entries for 3 servers"):
        parse_passwords("x,y", 3)


def test_slots() -> None:
    assert parse_slots(None, 2) == [None, None]
    assert parse_slots("4", 2) == [4, 4]
    assert parse_slots("4, ,1024", 3) == [4, None, 1024]
    assert parse_slots(",", 2) == [None, None]


@pytest.mark.parametrize("text", ["0", "1025", "-1", "+1", "1.5", "1_0", "²", "99999999999999999999", "x", "1,x"])
def test_slots_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a whole number from 1 to 1024"):
        parse_slots(text, 2 if "," in text else 1)
