"""Whether a TLS server is the host that was asked for.

Twisted's own check (26.10) lets a certificate without any subjectAltName pass for every host: service-identity raises
`CertificateError` for it, where Twisted expects a `VerificationError`, and what a callback raises OpenSSL never hears.
"""

from OpenSSL import SSL
from OpenSSL.crypto import X509
from service_identity.exceptions import CertificateError, VerificationError
from service_identity.hazmat import DNS_ID, IPAddress_ID, verify_service_identity
from service_identity.pyopenssl import extract_patterns
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from twisted.web.client import BrowserLikePolicyForHTTPS
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

IDENTITY_ERRORS = (VerificationError, CertificateError)

_UNTRUSTED = {9: "certificate is not yet valid", 10: "certificate has expired"}
"""OpenSSL's numbers of what can be wrong with a certificate (X509_V_ERR_...), as far as they say more than that."""


class UntrustedCertificate(SSL.Error):
    """A certificate that is not trusted, with what is wrong with it; in OpenSSL's own words it just is not."""

    def __init__(self, error: int):
        super().__init__([("SSL routines", "", "certificate verify failed")])
        self.reason = _UNTRUSTED.get(error, "certificate is not trusted")


@implementer(IOpenSSLClientConnectionCreator)
class VerifiedIdentity:
    """Connections that another creator makes, but each fails unless the certificate is for the host, or `own`."""

    def __init__(self, creator: IOpenSSLClientConnectionCreator, hostname: str, own: X509 | None = None):
        self._creator = creator
        self._own = own
        numeric = isIPAddress(hostname) or isIPv6Address(hostname)
        self._wanted = IPAddress_ID(hostname) if numeric else DNS_ID(hostname)

    def clientConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """OpenSSL's side of a new connection."""
        connection: SSL.Connection = self._creator.clientConnectionForTLS(tlsProtocol)

        def verify(_: SSL.Connection, certificate: X509, error: int, depth: int, trusted: int) -> bool:
            try:
                if not trusted:
                    raise UntrustedCertificate(error)
                if depth == 0 and not self._is_own(certificate):
                    verify_service_identity(extract_patterns(certificate), [self._wanted], [])
            except (UntrustedCertificate, *IDENTITY_ERRORS):
                tlsProtocol.failVerification(Failure())
                return False
            return True

        connection.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, verify)
        return connection

    def _is_own(self, certificate: X509) -> bool:
        return self._own is not None and certificate.to_cryptography() == self._own.to_cryptography()


@implementer(IPolicyForHTTPS)
class VerifyingPolicy:
    """Trusts the same as another policy, and verifies the host."""

    def __init__(self, policy: BrowserLikePolicyForHTTPS):
        self._policy = policy

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """What makes connections to that host."""
        return VerifiedIdentity(self._policy.creatorForNetloc(hostname, port), hostname.decode("ascii"))
