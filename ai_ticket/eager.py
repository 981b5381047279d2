"""Writing to a TCP connection at once, where nothing waits to be written before.

Twisted keeps what is written until the reactor's next turn, which for a short piece, as of a stream, costs two calls of
epoll and another round of the reactor.
"""

from typing import Any

from twisted.internet.tcp import Connection, Server


def write(transport: Any, data: bytes) -> None:
    """Write what the kernel takes, and leave the rest to the transport; one that is not plain TCP gets all of it."""
    rest = _write_some(transport, data) if isinstance(transport, Connection) else data
    if rest:
        transport.write(rest)


class EagerServer(Server):
    """A caller's connection, as `twisted.internet.tcp.Port.transport` makes it, that writes at once."""

    def write(self, data: bytes) -> None:
        """Write what the kernel takes, and keep the rest."""
        rest = _write_some(self, data)
        if rest:
            super().write(rest)  # type: ignore[no-untyped-call]


def _write_some(transport: Connection, data: bytes) -> bytes:
    """Write what the kernel takes, unless something waits to be written before. What is left."""
    if (
        transport.dataBuffer
        or transport._tempDataBuffer  # Twisted's own: what was written in this turn. Nothing else tells of it
        or not transport.connected
        or transport.disconnecting
        or transport._writeDisconnected
        or transport.TLS
    ):
        return data
    sent = transport.writeSomeData(data)
    # If the connection is lost, the transport finds that out by itself.
    return data[sent:] if isinstance(sent, int) else data
