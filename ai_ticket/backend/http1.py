"""HTTP/1.1 to model servers: where requests go, on which connection, and what they look like.

Written on llhttp rather than on Twisted's Agent: see ops/decisions/.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from hyperlink import URL
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure

from ai_ticket.backend.http1_connection import Connection, Response, SecureConnection
from ai_ticket.backend.http1_errors import connecting_error
from ai_ticket.errors import ApiConnectionError, DomainError


class Origin:
    """A scheme, host and port: requests to it, and the connections to it that are kept."""

    def __init__(self, clock: IReactorTime, endpoint: IStreamClientEndpoint, *, secure: bool, connect_timeout: float):
        """@param connect_timeout: for a new connection, from its name to its TLS handshake, in seconds."""
        self._clock = clock
        self._endpoint = endpoint
        self._make = SecureConnection if secure else Connection
        self._secure = secure
        self._connect_timeout = connect_timeout
        self._kept: list[Connection] = []

    async def request(self, data: bytes, *, keep: bool, sent: Callable[[], object]) -> Response:
        """Send a request; the result is the answer from its head on. Cancelling closes the connection.

        @param data: the whole request.
        @param keep: take a connection that was kept, and keep this one.
        @param sent: is called when the request is on its way, and again if it has to be sent again.
        @raise DomainError: the server can't be reached, or what it answers is not HTTP.
        """
        if keep and self._kept:
            connection = self._kept.pop()
            try:
                return await connection.request(data, sent)
            except DomainError:
                # A server may close an idle connection while the request is under way. Where not a byte came back, that
                # is what happened, as far as anybody can tell, and nothing of it is the server's fault.
                if connection.heard:
                    raise
        connection = await self._connect(keep)
        return await connection.request(data, sent)

    async def _connect(self, keep: bool) -> Connection:
        connecting: Deferred[Any] = self._endpoint.connect(
            _Factory(self._make, self._clock, self._kept if keep else None)
        )
        if self._secure:
            connecting.addCallback(lambda connection: connection.secured)
        connecting.addTimeout(self._connect_timeout, self._clock, onTimeoutCancel=_too_long)
        try:
            return await connecting  # type: ignore[no-any-return]
        except ConnectingCancelledError:
            raise CancelledError
        except CancelledError:
            raise
        except Exception as error:
            raise connecting_error(error)


HttpClient = Callable[[URL], Origin]
"""Gives the origin of a URL, which is to be kept for further requests."""


class _Factory(Factory):
    noisy = False

    def __init__(self, make: type[Connection], clock: IReactorTime, kept: list[Connection] | None):
        self._make = make
        self._clock = clock
        self._kept = kept

    def buildProtocol(self, addr: object) -> Connection:
        """A connection, perhaps one of several that race."""
        return self._make(self._clock, self._kept)


def _too_long(result: Any, seconds: float) -> None:
    waiting_for_tls = isinstance(result, Failure) and result.check(ConnectingCancelledError) is None
    raise ApiConnectionError("TLS: the handshake took too long" if waiting_for_tls else "connecting took too long")


_FIELD = re.compile(r"[\t\x20-\x7e\x80-\ud7ff\ue000-\U0010ffff]*")


def request_head(method: str, url: URL, fields: Mapping[str, str]) -> bytes:
    """The request line and the fields that are the same for every request, `Host` among them.

    @raise ValueError: a field holds what would end it.
    """
    text = url.to_text()
    target = text[text.index("/", len(url.scheme) + 3) :]
    host = f"[{url.host}]" if ":" in url.host else url.host
    if url.port != (443 if url.scheme == "https" else 80):
        host = f"{host}:{url.port}"
    return f"{method} {target} HTTP/1.1\r\n".encode("ascii") + header_lines({"Host": host, **fields})


def header_lines(fields: Mapping[str, str]) -> bytes:
    """Fields as they are sent.

    @raise ValueError: a value holds what would end it.
    """
    for name, value in fields.items():
        if _FIELD.fullmatch(value) is None:
            raise ValueError(f"{name} holds characters that can't be sent")
    return "".join([f"{name}: {value}\r\n" for name, value in fields.items()]).encode()
