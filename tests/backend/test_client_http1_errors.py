"""What is said of connections to model servers that fail: words for a person, no names of classes."""

import errno
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from OpenSSL import SSL
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, ConnectionLost, DNSLookupError, UserError, getConnectError
from twisted.internet.error import TimeoutError as ConnectTimeout
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import deferLater

from ai_ticket.backend.address import Location
from ai_ticket.backend.http1_errors import connecting_error, handshake_error
from ai_ticket.backend.http_client import make_http_client
from ai_ticket.backend.server import ModelServer
from ai_ticket.errors import DomainError

reactor: Any = _reactor


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (getConnectError(OSError(errno.ECONNREFUSED, "x")), "connection refused"),
        (getConnectError(OSError(errno.ENETUNREACH, "x")), "network is unreachable"),
        (getConnectError(OSError(errno.EHOSTUNREACH, "x")), "no route to host"),
        (getConnectError(OSError(errno.ETIMEDOUT, "x")), "connection timed out"),
        (getConnectError(OSError(errno.EMFILE, "x")), "too many open files"),
        (DNSLookupError("x"), "host name not found"),
        (ConnectError(), "could not connect"),
        (UserError(), "could not connect"),
        (ValueError("x"), "could not connect"),
        (ConnectTimeout(), "connecting took too long"),
    ],
)
def test_connecting(error: Exception, words: str) -> None:
    assert connecting_error(error).details == words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SSL.Error([("SSL routines", "", "sslv3 alert handshake failure")]), "TLS: sslv3 alert handshake failure"),
        (SSL.Error([("SSL routines", "", "wrong version number")]), "TLS: the server does not speak it"),
        (SSL.Error([]), "TLS: it failed"),
        (SSL.Error(), "TLS: it failed"),
        (ConnectionLost(), "TLS: the connection ended during the handshake"),
    ],
)
def test_a_handshake(error: Exception, words: str) -> None:
    assert handshake_error(error).details == words


class Answering(Protocol):
    """A server that answers all with the same."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer

    def dataReceived(self, data: bytes) -> None:
        if self.answer is None:
            self.transport.loseConnection()  # type: ignore[union-attr]
        else:
            self.transport.write(self.answer)  # type: ignore[union-attr]


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n5"
NOW = datetime.now(UTC)


def _sockets() -> set[Any]:
    return {*reactor.getReaders(), *reactor.getWriters()}


async def said(answer: bytes | None, ca: Path | None, server: trustme.LeafCert | None, *, seconds: float = 5.0) -> Any:
    """What becomes of a request to a server over TLS, or to one without."""
    factory = Factory.forProtocol(lambda: Answering(answer))  # type: ignore[arg-type]
    factory.noisy = False
    if server is None:
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    else:
        pem = server.private_key_pem.bytes() + server.cert_chain_pems[0].bytes()
        port = reactor.listenSSL(0, factory, PrivateCertificate.loadPEM(pem).options(), interface="127.0.0.1")
    sockets = _sockets()
    location = Location(f"https://127.0.0.1:{port.getHost().port}", "sesame")
    http = make_http_client(reactor, ca_file=None if ca is None else str(ca), connect_timeout=seconds)
    try:
        return await Deferred.fromCoroutine(ModelServer(http, reactor, lambda: location).get("/x", int, 5.0))
    except DomainError as error:
        return error.details
    finally:
        for _ in range(500):
            if _sockets() <= sockets:
                break
            await deferLater(reactor, 0.01)
        await port.stopListening()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca(authority: trustme.CA, tmp_path: Path) -> Path:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path / "ca.pem"


@ensureDeferred
async def test_tls(authority: trustme.CA, ca: Path) -> None:
    assert await said(ANSWER, ca, authority.issue_cert("127.0.0.1")) == 5


@pytest.mark.parametrize(
    ("began", "ends", "words"),
    [
        (NOW - timedelta(9), NOW - timedelta(1), "TLS: certificate has expired"),
        (NOW + timedelta(1), NOW + timedelta(9), "TLS: certificate is not yet valid"),
    ],
)
@ensureDeferred
async def test_a_certificate_of_another_time(
    authority: trustme.CA, ca: Path, began: datetime, ends: datetime, words: str
) -> None:
    assert await said(ANSWER, ca, authority.issue_cert("127.0.0.1", not_before=began, not_after=ends)) == words


@ensureDeferred
async def test_a_certificate_of_an_authority_that_is_not_trusted(ca: Path) -> None:
    assert await said(ANSWER, ca, trustme.CA().issue_cert("127.0.0.1")) == "TLS: certificate is not trusted"
    assert await said(ANSWER, None, trustme.CA().issue_cert("127.0.0.1")) == "TLS: certificate is not trusted"


@ensureDeferred
async def test_servers_that_do_not_speak_tls() -> None:
    assert await said(b"HTTP/1.1 400 Bad Request\r\n\r\n", None, None) == "TLS: the server does not speak it"
    assert await said(None, None, None) == "TLS: the connection ended during the handshake"
    assert await said(b"", None, None, seconds=0.1) == "TLS: the handshake took too long"
