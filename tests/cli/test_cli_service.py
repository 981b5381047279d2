"""Where the client finds the service's address, certificate and token."""

from pathlib import Path

import pytest

from ai_ticket.cli.arguments import parser
from ai_ticket.cli.outcome import CommandError
from ai_ticket.cli.service import locate

SECRET = "s3cr3t-t0k3n"


def find(*arguments, **options):
    return locate(parser().parse_args(["send", "hi", *arguments]), with_token=True, **options)


def test_defaults():
    service = find()
    assert service.address == "https://localhost:8443"
    assert service.timeout == 130
    assert service.authorities is None
    assert service.token is None
    assert service.no_token == "neither AI_TICKET_AUTH_TOKEN nor AI_TICKET_AUTH_TOKEN_FILE is set"


def test_the_daemons_settings(monkeypatch):
    """From the environment and its file, however little the daemon itself could start with them."""
    Path(".env").write_text(f"TLS_PORT=9443\nAI_TICKET_AUTH_TOKEN={SECRET},other\nKOBOLDCPP_PASSWORD_FILE=/nowhere\n")
    Path("cert.pem").write_text("a certificate")
    monkeypatch.setenv("TLS_CERT_FILE", "cert.pem")
    monkeypatch.setenv("REQUEST_TIMEOUT_SECONDS", "5")
    monkeypatch.setenv("QUEUE_LIMIT", "rubbish")
    service = find()
    assert service.address == "https://localhost:9443"
    assert service.authorities == "a certificate"
    assert service.timeout == 15
    assert service.token == SECRET


def test_options_win(monkeypatch):
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN", "another")
    Path("ca.pem").write_text("an authority")
    Path("token").write_text(f"{SECRET}\n")
    service = find(
        "--url", "https://example.org/ai/", "--cacert", "ca.pem", "--token-file", "token", "--timeout", "2.5"
    )
    assert service.url.child("event").to_text() == "https://example.org/ai/event"
    assert service.authorities == "an authority"
    assert service.token == SECRET
    assert service.timeout == 2.5


def test_settings_that_cannot_be_used(monkeypatch, capsys):
    """They stop the client only where it has no --url."""
    monkeypatch.setenv("TLS_PORT", "rubbish")
    with pytest.raises(CommandError) as raised:
        find()
    assert raised.value.status == 1
    assert raised.value.details.startswith("TLS_PORT='rubbish'")
    assert find("--url", "https://example.org").address == "https://example.org"
    assert capsys.readouterr().err.startswith("warning: TLS_PORT='rubbish'")


def test_a_port_that_the_kernel_picks(monkeypatch):
    monkeypatch.setenv("TLS_PORT", "0")
    with pytest.raises(CommandError, match="--url"):
        find()
    assert find("--url", "https://localhost:1").address == "https://localhost:1"


@pytest.mark.parametrize(
    ("url", "request_url"),
    [
        ("https://[::1]:8443", "https://[::1]:8443/event"),
        ("https://[::1]/ai", "https://[::1]/ai/event"),
        ("http://127.0.0.1:80//", "http://127.0.0.1/event"),
        ("https://bücher.example", "https://xn--bcher-kva.example/event"),
    ],
)
def test_urls(url, request_url):
    """In the form in which they are requested, whichever way the host is named."""
    assert find("--url", url).url.child("event").to_uri().to_text() == request_url


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "ftp://localhost", "https://", "https://user:pw@host", "https://h?q", "https://h:port", "a:[b"],
)
def test_wrong_urls(url):
    with pytest.raises(CommandError) as raised:
        find("--url", url)
    assert raised.value.status == 2


@pytest.mark.parametrize(
    ("content", "token"),
    [
        ("plain\nother\n", "plain"),
        ("\n# a comment\nbob named\n", "named"),
        ("alice sha256:00\nsha256:11\nbob plain", "plain"),
        ("not a token\nplain\n", "plain"),
    ],
)
def test_token_files(content, token, monkeypatch):
    """The first token that is there as itself."""
    Path("tokens").write_text(content)
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN_FILE", "tokens")
    assert find().token == token
    assert find("--token-file", "tokens").token == token


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("bob sha256:00\n", "tokens holds only hashes of tokens, no token itself"),
        ("# nothing\n", "tokens holds no token"),
        (f"{SECRET}é\n", "the first token of tokens has characters that can't be sent"),
        (None, "tokens can't be read: No such file or directory"),
    ],
)
def test_files_without_a_token(content, reason, monkeypatch):
    """An error where the file was asked for; else only the service knows whether it matters. The token is not shown."""
    if content is not None:
        Path("tokens").write_text(content)
    with pytest.raises(CommandError) as raised:
        find("--token-file", "tokens")
    assert raised.value.message == f"--token-file: {reason}"
    assert raised.value.status == 1
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN_FILE", "tokens")
    service = find()
    assert (service.token, service.no_token) == (None, reason)


@pytest.mark.parametrize(("value", "token"), [(" , one ,two", "one"), ("sha256:00", "sha256:00"), ("a b", "a b")])
def test_tokens_in_the_environment(value, token, monkeypatch):
    """There each is taken as it is, by the daemon as well: no names, no hashes."""
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN", value)
    assert find().token == token


@pytest.mark.parametrize(
    ("value", "reason"),
    [(",", "AI_TICKET_AUTH_TOKEN holds no token"), ("é", "the first token of AI_TICKET_AUTH_TOKEN has characters")],
)
def test_no_token_in_the_environment(value, reason, monkeypatch):
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN", value)
    service = find()
    assert service.token is None
    assert service.no_token.startswith(reason)


def test_certificates_that_cannot_be_read():
    with pytest.raises(CommandError, match="no-such-file can't be read: No such file"):
        find("--cacert", "no-such-file")


@pytest.mark.parametrize(("url", "warned"), [("http://example.org", True), ("http://127.0.0.1:80", False)])
def test_plain_http_is_warned_of(url, warned, monkeypatch, capsys):
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN", SECRET)
    find("--url", url)
    shown = capsys.readouterr().err
    assert ("unencrypted" in shown) is warned
    assert SECRET not in shown
