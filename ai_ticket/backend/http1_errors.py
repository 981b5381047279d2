"""What went wrong with a connection to a model server, in words for a person. No address: whoever asks knows it."""

import os

from OpenSSL import SSL
from twisted.internet.error import ConnectError, ConnectionDone, DNSLookupError, TimeoutError, UnknownHostError

from ai_ticket.errors import ApiConnectionError, ApiResponseStructureError, DomainError
from ai_ticket.server_identity import IDENTITY_ERRORS, UntrustedCertificate

_NO_TLS = ("wrong version number", "packet length too long", "record layer failure")
"""What OpenSSL makes of a server that answers in plain text."""


def connecting_error(error: BaseException) -> DomainError:
    """Why a connection did not come about, its TLS handshake included."""
    if isinstance(error, DomainError):
        return error
    if isinstance(error, (DNSLookupError, UnknownHostError)):
        return ApiConnectionError("host name not found")
    if isinstance(error, TimeoutError):
        return ApiConnectionError("connecting took too long")
    if isinstance(error, ConnectError) and error.osError:
        return ApiConnectionError(os.strerror(error.osError).lower())
    return ApiConnectionError("could not connect")


def handshake_error(error: BaseException | None) -> DomainError:
    """Why a connection ended before its TLS handshake did."""
    return ApiConnectionError(_tls_words(error) or "TLS: the connection ended during the handshake")


def _tls_words(error: BaseException | None) -> str | None:
    if isinstance(error, IDENTITY_ERRORS):
        return "TLS: certificate is for another host"
    if isinstance(error, UntrustedCertificate):
        return f"TLS: {error.reason}"
    if isinstance(error, SSL.Error):
        found = error.args[0] if error.args else None
        reason = str(found[-1][-1]) if isinstance(found, list) and found else "it failed"
        return "TLS: the server does not speak it" if reason in _NO_TLS else f"TLS: {reason}"
    return None


def ended_error(error: BaseException | None, *, heard: bool) -> DomainError:
    """Which fault it is that a connection ended before the answer did: closed in order, or broken.

    @param heard: whether anything of the answer had come.
    """
    if isinstance(error, ConnectionDone):
        return ApiResponseStructureError(
            "the answer ended before its end" if heard else "the server closed the connection without an answer"
        )
    return ApiConnectionError(_tls_words(error) or "the connection broke")
