"""TLS for the HTTPS endpoint: Mozilla's intermediate or modern profile, from files that can be read anew.

Versions, suites and curves: Mozilla's "Security/Server Side TLS", version 6.0. Which of them is used is the client's
choice there, and so it is here.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography.x509 import Certificate
from OpenSSL import SSL, crypto
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from ai_ticket.environment import open_regular

Profile = Literal["intermediate", "modern"]

TLS12_CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
)
TLS13_CIPHERS = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
CURVES = ("X25519MLKEM768", "X25519", "prime256v1", "secp384r1")
ALPN = (b"h2", b"http/1.1")
EXPIRES_SOON = timedelta(days=14)


class CertificateError(Exception):
    """The certificate or its key can't be used; `variable` names the setting that says which file."""

    def __init__(self, variable: str, path: str, reason: str):
        self.variable = variable
        self.path = path
        self.reason = reason
        super().__init__(f"{variable}={path!r}: {reason}")


def server_context(certificate_file: str, key_file: str, profile: Profile) -> SSL.Context:
    """A context for new connections, from the files as they are now. Blocks while it reads them.

    @raise CertificateError: a file can't be read or is malformed, the key is not the certificate's, or one of them is
        so weak that OpenSSL does not serve it.
    """
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION if profile == "modern" else SSL.TLS1_2_VERSION)
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    context.set_cipher_list(":".join(TLS12_CIPHERS).encode())
    context.set_tls13_ciphersuites(":".join(TLS13_CIPHERS).encode())
    _set_curves(context, CURVES)
    context.set_passwd_cb(lambda *_: b"")  # or OpenSSL would ask on the terminal
    context.set_alpn_select_callback(_select_protocol)
    _load("TLS_CERT_FILE", certificate_file, context.use_certificate_chain_file, "no PEM certificate in it")
    _load("TLS_KEY_FILE", key_file, context.use_privatekey_file, "no PEM private key without a pass phrase in it")
    try:
        context.check_privatekey()  # a key of another type than the certificate's was not compared with it yet
    except SSL.Error:
        raise CertificateError("TLS_KEY_FILE", key_file, "not the key of the certificate")
    return context


def _load(variable: str, path: str, load: object, malformed: str) -> None:
    try:
        with open(path, "rb", opener=open_regular):
            pass  # OpenSSL says only "system lib" of a file that it can't open, and waits for who writes to a pipe
        load(path)  # type: ignore[operator]
    except OSError as error:
        raise CertificateError(variable, path, error.strerror or str(error))
    except (SSL.Error, crypto.Error) as error:
        raise CertificateError(variable, path, _reason([reason for *_, reason in error.args[0]]) or malformed)


def _reason(reasons: list[str]) -> str | None:
    """What OpenSSL finds wrong with a file that it can read; None: it can't read it."""
    # It compares a key with the certificate that is already loaded: their values, or first of all their types.
    if any("mismatch" in reason for reason in reasons):
        return "not the key of the certificate"
    weak = next((reason for reason in reasons if "too small" in reason or "too weak" in reason), None)
    return f"too weak to be served: {weak}" if weak else None


def certificate_warnings(context: SSL.Context, path: str, now: float) -> Iterator[str]:
    """A line if callers refuse the certificate of a context, or soon will; none of that keeps it from being served.

    @param path: where it is from. @param now: seconds since the epoch.
    """
    certificate = _certificate(context)
    if certificate is None:
        return
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    time = datetime.fromtimestamp(now, UTC)
    which = f"TLS_CERT_FILE={path!r}: the certificate"
    if time < begins:
        yield f"{which} is not valid before {begins:%Y-%m-%d %H:%M} UTC: callers refuse it until then"
    if ends < time:
        yield f"{which} has expired on {ends:%Y-%m-%d %H:%M} UTC: callers refuse it; replace it and send SIGHUP"
    elif ends - time < EXPIRES_SOON:
        yield f"{which} expires on {ends:%Y-%m-%d %H:%M} UTC, in {(ends - time).days} days; replace it and send SIGHUP"


def _certificate(context: SSL.Context) -> Certificate | None:
    found = SSL.Connection(context, None).get_certificate()
    return None if found is None else found.to_cryptography()


def _set_curves(context: SSL.Context, curves: tuple[str, ...]) -> None:
    """Allow exactly these curves.

    pyOpenSSL can set only one publicly (`set_tmp_ecdh`), so this calls OpenSSL by its private bindings.
    """
    if SSL._lib.SSL_CTX_set1_curves_list(context._context, ":".join(curves).encode()) != 1:  # type: ignore[attr-defined]
        raise RuntimeError("OpenSSL does not know the curves of the TLS profile")


def handshake_fault(failure: Failure) -> tuple[str, str]:
    """Why a connection has ended before TLS was up: in a word, for metrics, and in OpenSSL's words, for the log.

    None of them are the peer's. `protocol`: there was no agreement; `closed`: the peer had enough.
    """
    error = failure.value
    if not isinstance(error, SSL.Error):
        return "closed", "the peer has closed the connection"
    [reasons] = error.args or [[]]
    return "protocol", next((reason for *_, reason in reasons), "OpenSSL gives no reason")


def _select_protocol(connection: SSL.Connection, offered: list[bytes]) -> bytes | SSL._NoOverlappingProtocols:
    return next((protocol for protocol in ALPN if protocol in offered), SSL.NO_OVERLAPPING_PROTOCOLS)


@implementer(IOpenSSLServerConnectionCreator)
class TlsConnections:
    """Gives each new connection the context that is in force when it is accepted."""

    def __init__(self, context: SSL.Context):
        self.context = context

    @property
    def expires(self) -> float:
        """When the certificate in force expires, in seconds since the epoch."""
        certificate = _certificate(self.context)
        return 0.0 if certificate is None else certificate.not_valid_after_utc.timestamp()

    def serverConnectionForTLS(self, protocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """OpenSSL's side of a new connection."""
        return SSL.Connection(self.context, None)
