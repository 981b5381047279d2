"""A connection as such: TLS that comes up, or does not."""

from typing import Any

import pytest
from harness import MemoryTransport
from logged import logged
from OpenSSL import SSL
from surface import Surface
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.python.failure import Failure

from ai_ticket.web.connection import TLS_HANDSHAKE_SECONDS, Connection


def shaking_hands(surface: Surface) -> tuple[Connection, MemoryTransport]:
    connection = Connection(surface.connections, surface.site, "192.0.2.7", True)
    transport = MemoryTransport()
    connection.makeConnection(transport)
    return connection, transport


def failures(surface: Surface) -> list[str]:
    recorder: Any = surface.connections.recorder
    found: list[str] = recorder.handshake_failures
    return found


@pytest.mark.parametrize(
    ("error", "reason", "said"),
    [
        (SSL.Error([("SSL routines", "", "http request")]), "protocol", "http request"),
        (SSL.Error([]), "protocol", "OpenSSL gives no reason"),
        (SSL.Error(), "protocol", "OpenSSL gives no reason"),
        (ConnectionDone(), "closed", "the peer has closed the connection"),
        (ConnectionLost(), "closed", "the peer has closed the connection"),
    ],
)
def test_a_handshake_that_fails(surface: Surface, error: Exception, reason: str, said: str) -> None:
    """It is counted, and nothing to be alarmed at: there is no traceback."""
    connection, _ = shaking_hands(surface)
    with logged() as lines:
        connection.connectionLost(Failure(error))
    assert failures(surface) == [reason]
    assert lines == [f"debug: no TLS with 192.0.2.7: {said}"]
    assert len(surface.connections) == 0


def test_a_handshake_that_takes_too_long(surface: Surface) -> None:
    surface.connections.start()
    connection, transport = shaking_hands(surface)
    surface.clock.pump([1.0] * int(TLS_HANDSHAKE_SECONDS - 1))
    assert not transport.aborted
    surface.clock.advance(1)
    assert transport.aborted
    connection.connectionLost(Failure(SSL.Error([])))
    assert failures(surface) == ["timeout"], "it counts once"
    surface.connections.stop()


def test_who_was_let_in_or_was_cut_by_us_has_not_failed(surface: Surface) -> None:
    connection, _ = shaking_hands(surface)
    connection.handshakeCompleted()
    connection.connectionLost(Failure(SSL.Error([("", "", "bad record mac")])))
    connection, _ = shaking_hands(surface)
    surface.connections.stop()
    connection.connectionLost(Failure(SSL.Error([])))
    connection, _ = surface.connect()
    connection.connectionLost(Failure(ConnectionDone()))
    assert failures(surface) == []
