"""Whether a TLS server is believed to be the host that was asked for."""

import ipaddress
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from ai_ticket.backend.address import Location
from ai_ticket.backend.http_client import make_http_client
from ai_ticket.backend.probe import learn
from ai_ticket.backend.server import ModelServer
from ai_ticket.errors import DomainError


def certificate(folder: Path, names: list[x509.GeneralName] | None) -> tuple[Path, Path]:
    """A self-signed certificate for these names, or one with none but its subject."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    crt, key_file = folder / "x.crt", folder / "x.key"
    crt.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(*pem))
    return crt, key_file


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([x509.DNSName("elsewhere")], "certificate is for another host"),
        ([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))], "certificate is for another host"),
        (None, "certificate is for another host"),
    ],
    ids=["wrong", "address", "none"],
)
@ensureDeferred
async def test_identity(tmp_path: Path, names: list[x509.GeneralName] | None, reason: str) -> None:
    crt, key = certificate(tmp_path, names)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    serving = threading.Thread(target=server.serve_forever, args=(0.01,))
    serving.start()
    try:
        http = make_http_client(reactor, ca_file=str(crt), connect_timeout=5.0)
        location = Location(f"https://localhost:{server.server_port}", None)
        with pytest.raises(DomainError) as caught:
            await Deferred.fromCoroutine(
                learn(ModelServer(http, reactor, lambda: location), 5.0)  # type: ignore[arg-type]
            )
        assert reason in str(caught.value)
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
