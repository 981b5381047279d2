"""What KOBOLDCPP_API_URL may say."""

import pytest

from ai_ticket.backend.address import Location, parse_api_url


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
        "http://a|http://b",
        "http://a,http://b",
        "http://host:port",
        "/api",
        "",
    ],
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_api_url(text)


def test_a_location_does_not_show_its_key() -> None:
    assert "sesame" not in repr(Location("http://host", "sesame"))
