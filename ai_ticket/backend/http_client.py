"""HTTP clients for model servers: treq over Twisted's Agent."""

from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint
from twisted.internet.ssl import Certificate, platformTrust, trustRootFromCertificates
from twisted.web.client import URI, Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool
from twisted.web.iweb import IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from ai_ticket.backend.body import remember_end
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


KEPT_SECONDS = 2
"""How long an idle connection is kept: less than the 5 s after which llama.cpp closes one, with a margin."""

MOST_KEPT = 16


def make_http_client(reactor: Any, *, ca_file: str | None, connect_timeout: float, keep: bool) -> HTTPClient:
    """A client for model servers.

    @param keep: keep connections for further requests. Not with KoboldCPP, where an idle one pins one of 24 threads.
    """
    policy = VerifyingPolicy(BrowserLikePolicyForHTTPS(trust_root(ca_file)))
    pool = HTTPConnectionPool(reactor, persistent=keep)
    pool.cachedConnectionTimeout = KEPT_SECONDS
    pool.maxPersistentPerHost = MOST_KEPT
    return HTTPClient(Agent.usingEndpointFactory(reactor, _Endpoints(reactor, policy, connect_timeout), pool))


@implementer(IAgentEndpointFactory)
class _Endpoints:
    """Where an Agent connects to; each connection remembers how it ended (see `body.lost_reason`)."""

    def __init__(self, reactor: Any, policy: IPolicyForHTTPS, connect_timeout: float):
        self._reactor = reactor
        self._policy = policy
        self._timeout = connect_timeout

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """The endpoint of a URL."""
        endpoint = HostnameEndpoint(self._reactor, uri.host, uri.port, timeout=self._timeout)
        if uri.scheme == b"https":
            return _Remembering(wrapClientTLS(self._policy.creatorForNetloc(uri.host, uri.port), endpoint))
        return _Remembering(endpoint)


@implementer(IStreamClientEndpoint)
class _Remembering:
    def __init__(self, endpoint: IStreamClientEndpoint):
        self._endpoint = endpoint

    def connect(self, factory: IProtocolFactory) -> Deferred[Any]:
        """Connect, and have the protocol's transport told why the connection ended."""
        return self._endpoint.connect(factory).addCallback(remember_end)
