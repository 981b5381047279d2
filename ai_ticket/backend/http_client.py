"""The HTTP client for model servers, on a reactor's connections."""

from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hyperlink import URL
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.ssl import Certificate, platformTrust, trustRootFromCertificates
from twisted.web.client import BrowserLikePolicyForHTTPS

from ai_ticket.backend.http1 import HttpClient, Origin
from ai_ticket.environment import read_text
from ai_ticket.server_identity import VerifyingPolicy


def trust_root(ca_file: str | None) -> Any:
    """What to trust for an https server: the certificates in a file, or those of the system.

    @raise OSError: the file can't be read. @raise ValueError: there is no certificate in it.
    """
    if ca_file is None:
        return platformTrust()
    found = x509.load_pem_x509_certificates(read_text(ca_file).encode())
    return trustRootFromCertificates([Certificate.loadPEM(one.public_bytes(Encoding.PEM)) for one in found])


def make_http_client(reactor: Any, *, ca_file: str | None, connect_timeout: float) -> HttpClient:
    """A client for model servers.

    @param connect_timeout: for a new connection, from its name to its TLS handshake, in seconds.
    """
    policy = VerifyingPolicy(BrowserLikePolicyForHTTPS(trust_root(ca_file)))

    def origin(url: URL) -> Origin:
        endpoint = _tcp_endpoint(reactor, url.host, url.port or 0, connect_timeout)
        secure = url.scheme == "https"
        if secure:
            # Once for all connections: reading what the system trusts takes longer than all of a request.
            endpoint = wrapClientTLS(policy.creatorForNetloc(url.host.encode("ascii"), url.port or 0), endpoint)
        return Origin(reactor, endpoint, secure=secure, connect_timeout=connect_timeout)

    return origin


def _tcp_endpoint(reactor: Any, host: str, port: int, timeout: float) -> IStreamClientEndpoint:
    """A name is looked up for every connection, and its addresses race; an address needs no thread for that."""
    if isIPAddress(host):
        return TCP4ClientEndpoint(reactor, host, port, timeout)
    if isIPv6Address(host):
        return TCP6ClientEndpoint(reactor, host, port, timeout)
    return HostnameEndpoint(reactor, host, port, timeout)
