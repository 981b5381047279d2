"""Which servers the client believes: those with a certificate for their host name that leads to a trusted one."""

from collections.abc import Sequence

from cryptography.x509 import load_pem_x509_certificates
from OpenSSL.crypto import X509, X509StoreFlags
from OpenSSL.SSL import Connection
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import optionsForClientTLS
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from ai_ticket.server_identity import VerifiedIdentity


def read_certificates(pem: str) -> list[X509]:
    """The certificates in a PEM text.

    @raise ValueError: there is none, or one is malformed.
    """
    return [X509.from_cryptography(certificate) for certificate in load_pem_x509_certificates(pem.encode())]


@implementer(IPolicyForHTTPS)
class SystemAndMore:
    """Trusts what the system trusts, and some more certificates; host names are verified, but not of `own`."""

    def __init__(self, more: Sequence[X509], own: X509 | None = None):
        self._more = more
        self._own = own

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """What makes connections to that host."""
        host = hostname.decode("ascii")
        return VerifiedIdentity(_TrustingMore(optionsForClientTLS(host), self._more), host, self._own)


@implementer(IOpenSSLClientConnectionCreator)
class _TrustingMore:
    """Adds to the trust store of the connections that another creator makes.

    A trust root of Twisted's is either the system's or a list of one's own, and to write one that is both needs its
    private interface; this does not.
    """

    def __init__(self, creator: IOpenSSLClientConnectionCreator, more: Sequence[X509]):
        self._creator = creator
        self._more = more

    def clientConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> Connection:
        connection: Connection = self._creator.clientConnectionForTLS(tlsProtocol)
        store = connection.get_context().get_cert_store()
        assert store is not None  # noqa: S101 - every context has one from its birth
        for certificate in self._more:
            store.add_cert(certificate)
        # So that a server's own certificate is enough, also where somebody else has signed it.
        store.set_flags(X509StoreFlags.PARTIAL_CHAIN)
        return connection
