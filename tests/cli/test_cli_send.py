"""`ai-ticket send` against a service on this machine."""

import io
import json
import sys
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pytest_twisted import ensureDeferred
from treq.testing import StubTreq
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.web.server import NOT_DONE_YET

from ai_ticket.cli.arguments import parser
from ai_ticket.cli.http import exchange, make_client
from ai_ticket.cli.outcome import CommandError
from ai_ticket.cli.send import _prompt, make_event, send
from ai_ticket.cli.service import locate

SECRET = "s3cr3t-t0k3n"
ANSWER = {"completion": "Hello.", "finish_reason": "stop", "model": "m", "request_id": "r-1"}


@pytest.fixture
def ask(service, cacert, monkeypatch):
    """Sends a prompt to the service with these options."""
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN", SECRET)

    async def ask(*arguments):
        given = ["--url", service.url, "--cacert", cacert, *arguments]
        options = parser().parse_args(["send", "hi", *given])
        where = locate(options, with_token=True)
        event = make_event(options, options.prompt)
        return await send(reactor, make_client(reactor, where), where, event, as_json=options.json)

    return ask


@ensureDeferred
async def test_the_completion_alone_on_stdout(service, ask, capsys):
    """Nothing on stderr either: no spinner where there is no terminal."""
    service.replies(200, ANSWER)
    assert await ask() == 0
    assert capsys.readouterr() == ("Hello.\n", "")
    [request] = service.requests
    assert (request.method, request.uri) == (b"POST", b"/event")
    assert request.getHeader("Content-Type") == "application/json"
    assert request.getHeader("Authorization") == f"Bearer {SECRET}"
    assert service.bodies == [{"content": {"prompt": "hi"}}]


@ensureDeferred
async def test_the_whole_answer_as_json(service, ask, capsys):
    service.replies(200, json.dumps(ANSWER | {"completion": "a\nb é"}, indent=2).encode())
    assert await ask("--json") == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out) == ANSWER | {"completion": "a\nb é"}
    assert captured.err == ""


@ensureDeferred
async def test_a_cut_completion_is_told(service, ask, capsys):
    service.replies(200, ANSWER | {"finish_reason": "length"})
    assert await ask() == 0
    assert capsys.readouterr() == ("Hello.\n", "note: the completion was cut at max_tokens\n")


def test_the_event():
    """What was not asked for is not in it; zero was asked for."""
    options = parser().parse_args(
        "send - --system Be.brief --max-tokens 5 --temperature 0 --top-p 0.5 --seed 0 --stop a --stop b "
        "--metadata k=v --metadata empty= --metadata eq=a=b".split()
    )
    assert make_event(options, "hi") == {
        "content": {"messages": [{"role": "system", "content": "Be.brief"}, {"role": "user", "content": "hi"}]},
        "parameters": {"max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "seed": 0, "stop": ["a", "b"]},
        "metadata": {"k": "v", "empty": "", "eq": "a=b"},
    }


class Input(io.TextIOWrapper):
    def __init__(self, content, *, terminal=False):
        super().__init__(io.BytesIO(content))
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def test_a_prompt_from_stdin(monkeypatch, capsys):
    """As it is, in UTF-8 whatever the locale; somebody at a terminal is told how to end it."""
    assert parser().parse_args(["send"]).prompt == "-"
    monkeypatch.setattr(sys, "stdin", Input("é {}\r\n".encode()))
    assert _prompt("-") == "é {}\r\n"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdin", Input(b"hi", terminal=True))
    assert _prompt("-") == "hi"
    assert "Ctrl-D" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["-", "\udcff"])
def test_a_prompt_that_is_not_utf_8(argument, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Input(b"\xff"))
    with pytest.raises(CommandError, match="not UTF-8") as raised:
        _prompt(argument)
    assert raised.value.status == 2


@pytest.mark.parametrize(
    ("status", "code", "exit_status"),
    [
        (400, "invalid_parameter", 1),
        (401, "unauthorised", 1),
        (422, "prompt_extraction_failed", 1),
        (500, "internal_error", 1),
        (502, "api_connection_error", 1),
        (429, "rate_limited", 75),
        (503, "overloaded", 75),
        (504, "deadline_exceeded", 75),
    ],
)
@ensureDeferred
async def test_errors_of_the_service(status, code, exit_status, service, ask, capsys):
    fields = {"error": code, "message": "No.", "details": "$.x", "request_id": "r-1"}
    service.replies(status, fields, Retry_After="7")
    with pytest.raises(CommandError) as raised:
        await ask()
    error = raised.value
    assert error.status == exit_status
    assert (error.code, error.message, error.details, error.request_id) == (code, "No.", "$.x", "r-1")
    assert error.retry_after == 7
    assert json.loads(error.to_json()) == fields
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", ["Wed, 21 Oct 2026 07:28:00 GMT", "-1", "²", "9" * 5000])
@ensureDeferred
async def test_a_retry_after_that_is_no_number_of_seconds(value, service, ask):
    service.replies(503, {"error": "overloaded", "message": "No."}, Retry_After=value.encode())
    with pytest.raises(CommandError) as raised:
        await ask()
    assert raised.value.retry_after is None


@ensureDeferred
async def test_a_token_that_was_not_there(service, ask, monkeypatch, tmp_path):
    """The service refuses, and the reason why none was sent comes with that."""
    monkeypatch.delenv("AI_TICKET_AUTH_TOKEN")
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN_FILE", "tokens")
    (tmp_path / "tokens").write_text("sha256:00\n")
    service.replies(401, {"error": "unauthorised", "message": "No.", "details": None, "request_id": "r-1"})
    with pytest.raises(CommandError) as raised:
        await ask()
    assert service.requests[0].getHeader("Authorization") is None
    assert raised.value.details == ("No token was sent: tokens holds only hashes of tokens, no token itself.")


@pytest.mark.parametrize(
    ("status", "body", "exit_status"),
    [
        (502, b"<html><h1>Bad Gateway</h1></html>", 1),
        (503, b"<html>", 75),
        (200, b"", 1),
        (200, b"\xff", 1),
        (200, b"[]", 1),
        (200, b"[" * 100_000, 1),
        (301, b"", 1),
    ],
)
@ensureDeferred
async def test_what_is_not_the_service(status, body, exit_status, service, ask):
    """A proxy's page is one clear line; a redirect is not followed."""
    service.replies(status, body, Content_Type="text/html", X_Request_ID="r-1", Location="https://elsewhere")
    with pytest.raises(CommandError) as raised:
        await ask()
    error = raised.value
    assert (error.code, error.status, error.request_id) == ("not_the_service", exit_status, "r-1")
    assert error.details == f"HTTP status {status}, text/html, not a JSON object, redirects to https://elsewhere"
    assert len(service.requests) == 1


@ensureDeferred
async def test_an_answer_without_a_completion(service, ask):
    service.replies(200, {"status": "healthy"})
    with pytest.raises(CommandError, match="no completion") as raised:
        await ask()
    assert raised.value.status == 1


@ensureDeferred
async def test_an_answer_that_breaks_off(service, ask):
    def answer(request):
        request.setHeader("Content-Length", "1000")
        request.write(b"{")
        request.notifyFinish().addErrback(lambda _: None)
        request.transport.abortConnection()
        return NOT_DONE_YET

    service.answer = answer
    with pytest.raises(CommandError) as raised:
        await ask()
    assert (raised.value.code, raised.value.status) == ("unreachable", 3)


@pytest.mark.parametrize("start", [b"", b'{"completion": "Hel'])
@ensureDeferred
async def test_the_time_limit_has_the_body_in_it(start, service):
    """Also where the headers have come, and then no more."""
    service.is_silent(start)
    clock = Clock()
    where = locate(parser().parse_args(["send", "--url", service.url]), with_token=True)
    stub = StubTreq(service)
    waiting = Deferred.fromCoroutine(exchange(clock, stub, where, "event", event={}))
    stub.flush()
    clock.advance(129)
    assert not waiting.called
    clock.advance(1)
    with pytest.raises(CommandError, match=r"No complete answer from .* within 130 s") as raised:
        await waiting
    assert raised.value.status == 75
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize("start", [b"", b'{"completion": "Hel'])
@ensureDeferred
async def test_giving_up_closes_the_connection(start, service, ask):
    """The service sees that its caller has gone."""
    service.is_silent(start)
    waiting = Deferred.fromCoroutine(ask())
    waiting.addErrback(lambda _: None)
    request = await service.asked
    gone = request.notifyFinish()
    waiting.cancel()
    with pytest.raises(Exception, match="onnection"):
        await gone
    await waiting


@ensureDeferred
async def test_nobody_there(ask):
    port = reactor.listenTCP(0, Factory(), interface="127.0.0.1")
    number = port.getHost().port
    await port.stopListening()
    with pytest.raises(CommandError, match=f"Can't reach https://127.0.0.1:{number}: .*refused") as raised:
        await ask("--url", f"https://127.0.0.1:{number}")
    assert raised.value.status == 3


@ensureDeferred
async def test_no_such_host(ask):
    with pytest.raises(CommandError, match=r"Can't reach https://no-such-host\.invalid") as raised:
        await ask("--url", "https://no-such-host.invalid")
    assert raised.value.status == 3


@ensureDeferred
async def test_a_certificate_nobody_vouches_for(service, ask, tmp_path):
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    with pytest.raises(CommandError, match="certificate verify failed") as raised:
        await ask("--cacert", str(other))
    assert (raised.value.code, raised.value.status) == ("certificate_not_trusted", 3)
    assert "--cacert" in raised.value.details
    assert service.requests == []


@pytest.mark.parametrize("identity", [trustme.CA().issue_cert("example.org")], ids=["example.org"])
@ensureDeferred
async def test_a_certificate_for_another_host(identity, service, ask, tmp_path):
    """Though it is trusted, the name counts."""
    trusted = tmp_path / "trusted.pem"
    identity.cert_chain_pems[0].write_to_path(str(trusted))
    with pytest.raises(CommandError, match="is for another host name than localhost") as raised:
        await ask("--cacert", str(trusted))
    assert (raised.value.code, raised.value.status) == ("certificate_not_trusted", 3)
    assert service.requests == []


@pytest.mark.parametrize("identity", [trustme.CA().issue_cert("example.org")], ids=["example.org"])
@ensureDeferred
async def test_a_certificate_for_the_world_on_the_services_own_machine(identity, service, tmp_path, monkeypatch):
    """That of TLS_CERT_FILE is known by itself, so that localhost need not be among its names; no other is."""
    own = tmp_path / "own.pem"
    identity.cert_chain_pems[0].write_to_path(str(own))
    monkeypatch.setenv("TLS_CERT_FILE", str(own))
    service.replies(200, ANSWER)

    async def ask():
        where = locate(parser().parse_args(["send", "hi", "--url", service.url]))
        return await send(reactor, make_client(reactor, where), where, {"content": "hi"}, as_json=False)

    assert await ask() == 0
    ca = trustme.CA()
    own.write_bytes(ca.issue_cert("example.org").cert_chain_pems[0].bytes() + identity.cert_chain_pems[0].bytes())
    with pytest.raises(CommandError, match="is for another host name than localhost"):
        await ask()


@ensureDeferred
async def test_the_services_own_certificate_is_enough(service, identity, ask, tmp_path, capsys):
    """Though another has signed it: on the service's own machine TLS_CERT_FILE is all that is needed."""
    own = tmp_path / "own.pem"
    identity.cert_chain_pems[0].write_to_path(str(own))
    service.replies(200, ANSWER)
    assert await ask("--cacert", str(own)) == 0
    assert await ask("--cacert", str(own), "--url", service.url.replace("localhost", "127.0.0.1")) == 0


def self_signed():
    """For localhost, by itself, and not an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    return trustme.LeafCert(private, certificate.public_bytes(serialization.Encoding.PEM), [])


@pytest.mark.parametrize("identity", [self_signed()], ids=["self-signed"])
@ensureDeferred
async def test_a_self_signed_certificate(identity, service, ask, tmp_path):
    own = tmp_path / "own.pem"
    identity.cert_chain_pems[0].write_to_path(str(own))
    service.replies(200, ANSWER)
    assert await ask("--cacert", str(own)) == 0
    with pytest.raises(CommandError, match="certificate verify failed"):
        await ask()


@ensureDeferred
async def test_certificates_that_are_none(ask, tmp_path):
    path = tmp_path / "none.pem"
    path.write_text("nothing")
    with pytest.raises(CommandError, match="not PEM certificates"):
        await ask("--cacert", str(path))


@ensureDeferred
async def test_a_server_that_does_not_speak_tls(ask):
    class Plain(Protocol):
        def connectionMade(self):
            self.transport.write(b"220 hello\r\n")

        def connectionLost(self, reason):
            lost.callback(None)

    lost = Deferred()
    port = reactor.listenTCP(0, Factory.forProtocol(Plain), interface="127.0.0.1")
    with pytest.raises(CommandError, match="No TLS connection") as raised:
        await ask("--url", f"https://127.0.0.1:{port.getHost().port}")
    assert (raised.value.code, raised.value.status) == ("tls_error", 3)
    await port.stopListening()
    await lost


class Terminal(io.StringIO):
    def isatty(self):
        return True


@ensureDeferred
async def test_the_spinner(service, ask, capsys, monkeypatch):
    """On a terminal the seconds are shown while it waits, and wiped out after; stdout has none of it."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    service.replies(200, ANSWER)
    assert await ask() == 0
    shown = sys.stderr.getvalue()
    assert "waiting for the completion 0 s" in shown
    assert shown.endswith("\x1b[2K")
    assert capsys.readouterr().out == "Hello.\n"
